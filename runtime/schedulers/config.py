"""What the schedulers' configurations share, read from diffusers' `scheduler_config.json`.

Each scheduler's own options stand beside it in its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from ipa.engines.errors import BundleError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
FINAL_SIGMAS_TYPES = ("zero", "sigma_min")

# Options that only some schedulers have. The others ignore them, as diffusers does.
_SOME_SCHEDULERS_KEYS = frozenset(
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
        "set_alpha_to_one",
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
        "variance_type",
    }
)
# They belong to models of another kind, which none of our schedulers can sample.
_FLOW_KEYS = ("use_dynamic_shifting", "use_flow_sigmas")
# They ask for other timesteps. A scheduler without them may ignore them only where they belong to the one that the
# file was saved by.
_SPACING_KEYS = ("use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas")
_CLASSES_WITHOUT_SPACING_KEYS = (
    None,
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What all share. Defaults are those of diffusers' classes: saved files may leave keys out.

    Attributes:
        num_train_timesteps: steps of the diffusion the model was trained on.
        beta_start, beta_end: variances of its first and last step.
        beta_schedule: how they go from one to the other, one of `BETA_SCHEDULES`.
        trained_betas: all variances, instead of the three above.
        steps_offset: added to the timesteps of `leading` spacing.
        prediction_type: what the model predicts, one of the class's `PREDICTION_TYPES`.
        timestep_spacing: one of `TIMESTEP_SPACINGS`. Source: arXiv:2305.08891, table 2.
    """

    PREDICTION_TYPES: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction", "sample")
    # By key: other schedulers' values, and what diffusers takes them for in this one.
    ALIASES: ClassVar[Mapping[str, Mapping[str, str]]] = {}

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"

    def __post_init__(self) -> None:
        check_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        check_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        check_choice("prediction_type", self.prediction_type, self.PREDICTION_TYPES)
        if self.num_train_timesteps < 1:
            raise bad_option("num_train_timesteps", self.num_train_timesteps, "1 or more")
        if self.steps_offset < 0:
            raise bad_option("steps_offset", self.steps_offset, "0 or more")
        for name in ("beta_start", "beta_end"):
            if not 0 < getattr(self, name) < 1:
                raise bad_option(name, getattr(self, name), "a number between 0 and 1")
        if self.trained_betas is not None:
            if len(self.trained_betas) != self.num_train_timesteps:
                raise bad_option("trained_betas", self.trained_betas, f"a list of {self.num_train_timesteps} numbers")
            if not all(0 < beta <= 1 for beta in self.trained_betas):
                raise bad_option("trained_betas", self.trained_betas, "numbers above 0, up to 1")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """The configuration diffusers' `from_config` makes of this dictionary, whichever scheduler it was saved by.

        Args:
            config: the contents of a `scheduler_config.json`. Keys that start with an underscore are notes.
        Raises:
            BundleError: a key is unknown or asks for what this scheduler cannot do, or a value is of the wrong type.
        """
        types = {field.name: str(field.type) for field in fields(cls)}
        defaulted = config.get("_use_default_values", ())  # filled in by another class, whose defaults are not ours
        saved_by = config.get("_class_name")
        options = {}
        for key, value in config.items():
            if key in types:
                if key not in defaulted and not (value is None and key in _SPACING_KEYS):  # diffusers: bool | None
                    typed = _typed(key, value, types[key])
                    options[key] = cls.ALIASES[key].get(typed, typed) if key in cls.ALIASES else typed
            elif key in _FLOW_KEYS or key in _SPACING_KEYS:
                if value and (key in _FLOW_KEYS or saved_by in _CLASSES_WITHOUT_SPACING_KEYS):
                    raise bad_option(key, value, "false: the scheduler has no such option")
            elif not (key in _SOME_SCHEDULERS_KEYS or key.startswith("_")):
                raise BundleError(
                    f"scheduler_config.json: unknown key '{key}'; remove it if pictures do not depend on it"
                )
        return cls(**options)


@dataclass(frozen=True, kw_only=True)
class ZeroSNRConfig(SchedulerConfig):
    """For all but PNDM.

    Attributes:
        rescale_betas_zero_snr: whether the noise schedule is stretched to end in pure noise.
    """

    rescale_betas_zero_snr: bool = False


@dataclass(frozen=True, kw_only=True)
class ThresholdingConfig(SchedulerConfig):
    """For schedulers that predict clean latents and can hold them to a range.

    Attributes:
        thresholding: whether they are clipped to a quantile of themselves, and scaled back to 1.
        dynamic_thresholding_ratio: that quantile, 0 to 1.
        sample_max_value: the largest value that the quantile may take.
    """

    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dynamic_thresholding_ratio <= 1:
            raise bad_option("dynamic_thresholding_ratio", self.dynamic_thresholding_ratio, "a number from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class ClippingConfig(ThresholdingConfig, ZeroSNRConfig):
    """For DDIM, DDPM and LCM.

    Attributes:
        clip_sample: whether the predicted clean latents are clipped to `clip_sample_range`; thresholding goes first.
    """

    clip_sample: bool = True
    clip_sample_range: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SigmaConfig(ZeroSNRConfig):
    """For Euler, DPM-Solver++ and UniPC, whose noise levels need not be those of training timesteps.

    Attributes:
        use_karras_sigmas: whether they fall as arXiv:2206.00364 says.
        use_exponential_sigmas: whether they fall by the same factor at each step.
        use_beta_sigmas: always false: quantiles of a beta distribution are not supported.
        final_sigmas_type: where the run ends, one of `FINAL_SIGMAS_TYPES`.
    """

    timestep_spacing: str = "linspace"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    final_sigmas_type: str = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("final_sigmas_type", self.final_sigmas_type, FINAL_SIGMAS_TYPES)
        if self.use_beta_sigmas:
            raise bad_option("use_beta_sigmas", True, "false: supported are use_karras_sigmas and its like")
        chosen = [key for key in _SPACING_KEYS if getattr(self, key, False)]
        if len(chosen) > 1:
            raise BundleError(f"scheduler_config.json: {' and '.join(chosen)} are both true, expected one of them")


@dataclass(frozen=True, kw_only=True)
class SigmaRangeConfig(SigmaConfig):
    """For Euler and UniPC.

    Attributes:
        sigma_min, sigma_max: ends of karras and exponential sigmas, if not those of the noise schedule.
    """

    sigma_min: float | None = None
    sigma_max: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sigma_min", "sigma_max"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise bad_option(name, value, "null or a number above 0")


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a BundleError unless `value` is one of `choices`."""
    if value not in choices:
        raise bad_option(key, value, f"one of {', '.join(choices)}")


def bad_option(key: str, value: object, expected: str) -> BundleError:
    """The error for an option's value that makes no sense, or that we cannot do."""
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    return BundleError(f"scheduler_config.json: {key} is {shown}, expected {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(is_item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(is_item, value))


# By the fields' annotations: whether a value from JSON is of the type, and how to say what is.
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: isinstance(value, bool), "a value of type bool"),
    "int": (_is_int, "a value of type int"),
    "float": (_is_number, "a value of type float"),
    "str": (lambda value: isinstance(value, str), "a value of type str"),
    "None": (lambda value: value is None, "null: it is not supported"),
    "float | None": (lambda value: value is None or _is_number(value), "null or a number"),
    "str | None": (lambda value: isinstance(value, str | None), "null or a name"),
    "tuple[int, ...]": (_is_list_of(_is_int), "a list of whole numbers"),
    "tuple[float, ...] | None": (
        lambda value: value is None or _is_list_of(_is_number)(value),
        "null or a list of numbers",
    ),
}


def _typed(key: str, value: Any, type_name: str) -> Any:
    """`value` if it is of the key's type, a list as a tuple."""
    is_of_type, description = _TYPES[type_name]
    if not is_of_type(value):
        raise bad_option(key, value, description)
    return tuple(value) if isinstance(value, list) else value
