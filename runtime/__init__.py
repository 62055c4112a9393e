"""From a request to a picture: numpy and one inference engine, no PyTorch."""
