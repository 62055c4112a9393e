"""From PyTorch weights to a bundle of ONNX graphs, and the proof that they agree."""
