"""Clean latents and noise, from whichever of them, or of their mixture v, the model predicts.

Noisy latents are `signal * clean + sigma * noise`, with `signal**2 + sigma**2 == 1`.
Source: arXiv:2010.02502, formula (12) for noise; arXiv:2202.00512, section 4 and appendix D, for v.
"""

from __future__ import annotations

from ipa.runtime.schedulers.schedule import Array


def predicted_clean(prediction_type: str, output: Array, latents: Array, signal: float, sigma: float) -> Array:
    """The clean latents in noisy ones."""
    match prediction_type:
        case "epsilon":
            return (latents - sigma * output) / signal
        case "v_prediction":
            return signal * latents - sigma * output
        case _:
            return output


def predicted_noise(prediction_type: str, output: Array, latents: Array, signal: float, sigma: float) -> Array:
    """The noise in noisy latents."""
    match prediction_type:
        case "epsilon":
            return output
        case "v_prediction":
            return signal * output + sigma * latents
        case _:
            return (latents - signal * output) / sigma
