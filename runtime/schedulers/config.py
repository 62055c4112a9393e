"""The scheduler's configuration, read from diffusers' `scheduler_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from ipa.engines.errors import BundleError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")

# Keys of diffusers' other schedulers that change nothing in DDIM and PNDM; diffusers ignores them here, too.
_OTHER_SCHEDULERS_KEYS = frozenset(
    {
        "algorithm_type",
        "clip_sample",
        "clip_sample_range",
        "disable_corrector",
        "dynamic_thresholding_ratio",
        "euler_at_final",
        "final_sigmas_type",
        "flow_shift",
        "interpolation_type",
        "lambda_min_clipped",
        "lower_order_final",
        "original_inference_steps",
        "predict_x0",
        "rescale_betas_zero_snr",
        "sample_max_value",
        "shift_terminal",
        "sigma_max",
        "sigma_min",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "thresholding",
        "time_shift_type",
        "timestep_scaling",
        "timestep_type",
        "use_lu_lambdas",
        "variance_type",
    }
)
# Keys that ask for other timesteps than DDIM and PNDM have.
_MUST_BE_OFF = (
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_flow_sigmas",
    "use_karras_sigmas",
)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What DDIM and PNDM share. Defaults are those of diffusers' classes: saved files may leave keys out.

    Attributes:
        num_train_timesteps: steps of the diffusion the model was trained on.
        beta_start, beta_end: variances of its first and last step.
        beta_schedule: how they go from one to the other, one of `BETA_SCHEDULES`.
        trained_betas: all variances, instead of the three above.
        set_alpha_to_one: whether the last step ends at no noise, rather than at the noise of timestep 0.
        steps_offset: added to the timesteps of `leading` spacing.
        prediction_type: what the model predicts.
        timestep_spacing: one of `TIMESTEP_SPACINGS`. Source: arXiv:2305.08891, table 2.
    """

    PREDICTION_TYPES: ClassVar[tuple[str, ...]]

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    set_alpha_to_one: bool
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"

    def __post_init__(self) -> None:
        _check_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        _check_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        _check_choice("prediction_type", self.prediction_type, self.PREDICTION_TYPES)
        if self.num_train_timesteps < 1:
            raise _bad("num_train_timesteps", self.num_train_timesteps, "1 or more")
        if self.steps_offset < 0:
            raise _bad("steps_offset", self.steps_offset, "0 or more")
        for name in ("beta_start", "beta_end"):
            if not 0 < getattr(self, name) < 1:
                raise _bad(name, getattr(self, name), "a number between 0 and 1")
        if self.trained_betas is not None:
            if len(self.trained_betas) != self.num_train_timesteps:
                raise _bad("trained_betas", self.trained_betas, f"a list of {self.num_train_timesteps} numbers")
            if not all(0 < beta <= 1 for beta in self.trained_betas):
                raise _bad("trained_betas", self.trained_betas, "numbers above 0, up to 1")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """The configuration diffusers' `from_config` makes of this dictionary, whichever scheduler it was saved by.

        Args:
            config: the contents of a `scheduler_config.json`. Keys that start with an underscore are notes.
        Raises:
            BundleError: a key is unknown or asks for what this scheduler cannot do, or a value is of the wrong type.
        """
        names = {field.name for field in fields(cls)}
        defaulted = config.get("_use_default_values", ())  # filled in by another class, whose defaults are not ours
        for key, value in config.items():
            if key in _MUST_BE_OFF:
                if value:
                    raise _bad(key, value, "false: `ddim` and `pndm` have no such option")
            elif not (key in names or key in _OTHER_SCHEDULERS_KEYS or key.startswith("_")):
                raise BundleError(
                    f"scheduler_config.json: unknown key '{key}'; remove it if pictures do not depend on it"
                )
        return cls(**{key: _typed(key, config[key]) for key in config if key in names and key not in defaulted})


@dataclass(frozen=True, kw_only=True)
class DDIMConfig(SchedulerConfig):
    """What DDIM adds.

    Attributes:
        clip_sample: whether the predicted clean latents are clipped to `clip_sample_range`.
        thresholding: whether they are clipped to a quantile of themselves instead, and scaled back to 1.
        dynamic_thresholding_ratio: that quantile, 0 to 1.
        sample_max_value: the largest value that the quantile may take.
        rescale_betas_zero_snr: whether the noise schedule is stretched to end in pure noise.
    """

    PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dynamic_thresholding_ratio <= 1:
            raise _bad("dynamic_thresholding_ratio", self.dynamic_thresholding_ratio, "a number from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class PNDMConfig(SchedulerConfig):
    """What PNDM adds.

    Attributes:
        skip_prk_steps: whether the run starts without Runge-Kutta steps, as Stable Diffusion's does.
    """

    PREDICTION_TYPES = ("epsilon", "v_prediction")

    set_alpha_to_one: bool = False
    skip_prk_steps: bool = False


_TYPES: dict[str, type | tuple[type, ...]] = {"bool": bool, "int": int, "float": (int, float), "str": str}
_FIELD_TYPES = {field.name: str(field.type) for cls in (DDIMConfig, PNDMConfig) for field in fields(cls)}


def _typed(key: str, value: Any) -> Any:
    """`value` if it is of the key's type, a list of numbers as a tuple."""
    if key == "trained_betas":
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(_is_a(beta, "float") for beta in value):
            raise _bad(key, value, "null or a list of numbers")
        return tuple(float(beta) for beta in value)
    if not _is_a(value, _FIELD_TYPES[key]):
        raise _bad(key, value, f"a value of type {_FIELD_TYPES[key]}")
    return value


def _is_a(value: Any, type_name: str) -> bool:
    return isinstance(value, _TYPES[type_name]) and (type_name == "bool" or not isinstance(value, bool))


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise _bad(key, value, f"one of {', '.join(choices)}")


def _bad(key: str, value: object, expected: str) -> BundleError:
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    return BundleError(f"scheduler_config.json: {key} is {shown}, expected {expected}")
