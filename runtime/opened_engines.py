"""The engines of one bundle: which components a request needs, and in which back-end each is opened."""

from __future__ import annotations

from collections.abc import Sequence

from ipa.engines.bundle import Bundle
from ipa.engines.closing import Closing
from ipa.engines.engine import Engine
from ipa.engines.errors import EngineError, RequestError
from ipa.engines.registry import resolve_engine
from ipa.engines.tensorrt_library import MODULES
from ipa.runtime.request import Request


def components_of(text: Sequence[str], requests: Sequence[Request]) -> list[str]:
    """Names of the graphs that resolved requests run, those that every request runs first.

    Args:
        text: those that encode prompts.
    """
    names = [*text, "unet", "vae_decoder"]
    prompts = [prompt for request in requests for prompt in request.all_image_prompts]
    names += ["image_encoder"] if any(prompt.images for prompt in prompts) else []
    names += [f"ip_adapter/{prompt.adapter}" for prompt in prompts]
    names += [f"controlnet/{control.name}" for request in requests for control in request.controls]
    names += ["vae_encoder"] if any(request.init_image is not None for request in requests) else []
    return list(dict.fromkeys(names))


class Engines(Closing):
    """Opens a component when it is first asked for, and keeps it until `close`.

    Attributes:
        choice: the back-end of the base model, and why.
    """

    def __init__(self, bundle: Bundle, engine: str, is_flexible: bool) -> None:
        """Choose a back-end.

        Args:
            engine: one of `ipa.engines.registry.ENGINE_NAMES`.
            is_flexible: as `auto` always is: what lies beside the base model runs elsewhere where it must.
        Raises:
            EngineError: the back-end is unknown, not installed or cannot run here.
            RequestError: the bundle was opened with engine plans, and the back-end has none.
        """
        self._bundle = bundle
        self.choice = bundle.resolve_engine(engine)
        if bundle.plans is not None and self.choice.name not in MODULES:
            raise RequestError(
                f"--trust-engines {bundle.plans} is for --engine {' or '.join(MODULES)}, this is {self.choice}"
            )
        self._is_flexible = is_flexible or engine == "auto"
        self._opened: dict[str, Engine] = {}
        self._closed_load_seconds = 0.0

    def __call__(self, name: str) -> Engine:
        """The engine of a component.

        Raises:
            EngineError: it cannot be opened.
        """
        if name not in self._opened:
            self._opened[name] = self._bundle.open_component(name, self._engine_for(name))
        return self._opened[name]

    def __len__(self) -> int:
        """How many are open."""
        return len(self._opened)

    def close(self) -> None:
        """Close every one."""
        while self._opened:
            _, engine = self._opened.popitem()
            self._closed_load_seconds += engine.load_seconds
            engine.close()

    @property
    def load_seconds(self) -> float:
        """What opening and compiling has taken so far."""
        return self._closed_load_seconds + sum(engine.load_seconds for engine in self._opened.values())

    def _engine_for(self, name: str) -> str:
        """The back-end of a component: an adapter or ControlNet that no engine was built for runs where it can."""
        if not self._is_flexible or not name.startswith(("ip_adapter/", "controlnet/")):
            return self.choice.name
        try:
            return resolve_engine(self.choice.name, [self._bundle.graph(name)]).name
        except EngineError:
            return "auto"
