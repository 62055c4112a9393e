"""IP-Adapter training."""
