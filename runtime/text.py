"""From prompts to what the UNet is told of the text, for the negative and the positive half."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipa.engines.bundle import Bundle
from ipa.engines.engine import Engine
from ipa.engines.spec import SDXL
from ipa.runtime.kept import Kept
from ipa.runtime.request import Request
from ipa.runtime.tokenizer import Tokenizer

Array = NDArray[Any]
_STATES = "encoder_hidden_states"
OpenEngine = Callable[[str], Engine]  # by component


class Text:
    """Encodes the prompts of requests with the text encoders of one bundle."""

    def __init__(self, bundle: Bundle, engine: OpenEngine, kept: Kept) -> None:
        """Open the tokenizers.

        Args:
            engine: opens a component; called only for what is not kept.
            kept: of earlier requests.
        Raises:
            BundleError: a tokenizer is broken.
        """
        self._manifest, self._engine, self._kept = bundle.manifest, engine, kept
        self._tokenizers = [
            Tokenizer.open(bundle.file(record), bundle.manifest.text_tokens) for record in bundle.manifest.tokenizers
        ]

    @property
    def components(self) -> list[str]:
        """What `encode` runs."""
        return [*(["text_encoder", "text_encoder_2"][: len(self._tokenizers)]), "text_kv"]

    def encode(self, request: Request) -> tuple[Mapping[str, Array], list[str]]:
        """Inputs of the UNet and warnings.

        Args:
            request: resolved.
        Returns:
            `text_kv` (2, text_tokens, kv), of Stable Diffusion XL also `text_embeds` (2, text_embed_width) and
            `time_ids` (1, 6); negative half first, one row where both are alike.
        """
        texts = {"negative prompt": request.negative_prompt, "prompt": request.prompt}
        encodings = {name: self._tokenizers[0].encode(text) for name, text in texts.items()}
        warnings = [
            f"the {name} is longer than {self._manifest.text_tokens - 2} tokens; this was cut off: {encoding.cut!r}"
            for name, encoding in encodings.items()
            if encoding.cut
        ]
        if request.negative_prompt and not request.has_guidance:
            warnings.append(f"the negative prompt has no effect at guidance scale {request.guidance_scale}")
        text = self._conditions(request)
        del text[_STATES]
        return text, warnings

    def for_controls(self, request: Request) -> Mapping[str, Array]:
        """What ControlNets take: `encoder_hidden_states` (2, text_tokens, text_width) in place of `text_kv`."""
        text = self._conditions(request)
        del text["text_kv"]
        return text

    def _conditions(self, request: Request) -> dict[str, Array]:
        """All that is made of the prompts, which is kept, and SDXL's sizes."""
        texts = request.negative_prompt, request.prompt
        input_ids = np.array([[one.encode(text).ids for text in texts] for one in self._tokenizers])
        is_zero = self._manifest.force_zeros_for_empty_prompt and not request.negative_prompt
        key = ("text", input_ids.tobytes(), is_zero)
        text = dict(self._kept.get(key, lambda: self._encoded(input_ids, is_zero)))
        if self._manifest.family == SDXL:
            text["time_ids"] = np.array([request.time_ids], np.float32)
        return text

    def _encoded(self, input_ids: NDArray[np.int64], is_zero: bool) -> Mapping[str, Array]:
        """What the encoders make of ids (encoders, 2, text_tokens).

        Args:
            is_zero: take zeros in place of what the negative prompt is encoded to.
        """
        outputs = [
            self._engine(component)(input_ids=ids) for component, ids in zip(self.components, input_ids, strict=False)
        ]
        states = np.concatenate([output[_STATES] for output in outputs], axis=-1)
        text = {name: outputs[-1][name].copy() for name in ("text_embeds",) if name in outputs[-1]}
        if is_zero:
            for array in (states, *text.values()):
                array[0] = 0
        return {**self._engine("text_kv")(encoder_hidden_states=states), **text, _STATES: states}
