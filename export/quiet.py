"""Keeping libraries from talking on stderr, which is for our own messages and progress."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Silence warnings and progress bars of torch, transformers and diffusers. Call it before importing them."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
