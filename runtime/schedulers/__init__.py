"""Noise schedulers in numpy, configured by diffusers' own `scheduler_config.json`."""
