"""What a request and a model's noise schedule must fit before a run begins."""

from __future__ import annotations

from ipa.engines.errors import BundleError, RequestError


def check_eta_is_zero(eta: float, method: str) -> None:
    """For methods whose noise has no weight to choose.

    Raises:
        RequestError: it is not 0.
    """
    if eta != 0:
        raise RequestError(f"--eta is {eta}, but {method} has no such option: leave it out, or use --scheduler ddim")


def check_start(start: int, num_inference_steps: int) -> None:
    """For runs that begin in the middle.

    Raises:
        RequestError: there is no such step.
    """
    if not 0 <= start < num_inference_steps:
        last = num_inference_steps - 1
        raise RequestError(f"a run of {num_inference_steps} steps can begin at step 0 to {last}, not at {start}")


def check_first_timestep(prediction_type: str, timestep: int, alpha: float) -> None:
    """A model that predicts noise says nothing about the picture where there is only noise.

    Args:
        timestep: the first of the run.
        alpha: share of the clean latents in the variance there.
    Raises:
        BundleError: it does, and there is.
    """
    if prediction_type == "epsilon" and alpha == 0:
        raise BundleError(
            f"scheduler_config.json: timestep {timestep} is pure noise (rescale_betas_zero_snr), where a model "
            "of prediction_type 'epsilon' says nothing; set the option to false, or (not for lcm) timestep_spacing to "
            "'leading'"
        )
