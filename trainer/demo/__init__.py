"""The demo model: a tiny Stable Diffusion pipeline trained from scratch on drawn shapes."""
