"""`manifest.json`: what a bundle holds, as typed records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ipa.engines.errors import BundleError
from ipa.engines.kv_layout import KVLayout
from ipa.engines.spec import ComponentSpec

FORMAT = "ipa-bundle"
FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
# How the negative half of an adapter's input is made: the feature itself is zeros, or it is the image encoder's of a
# picture whose normalised pixels are zeros.
ZERO_FEATURE, ZERO_PIXELS = "zeros", "zero-pixels"


@dataclass(frozen=True)
class FileRecord:
    """One file: path relative to the bundle with `/`, size in bytes, sha256 in hexadecimal."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class ComponentRecord:
    """One graph.

    Attributes:
        files: `model.onnx`, then its external data.
        variants: by engine, a graph for that engine in place of `model.onnx`: same tensors, same external data.
    """

    files: tuple[FileRecord, ...]
    dtype: str
    spec: ComponentSpec
    variants: Mapping[str, FileRecord] = field(default_factory=dict)

    @property
    def graphs(self) -> tuple[FileRecord, ...]:
        """`model.onnx` and its variants."""
        return (*self.files[:1], *self.variants.values())

    @property
    def sha256(self) -> str:
        """Over the hashes of `files`: changes with the graph and with any weight."""
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()


@dataclass(frozen=True)
class AdapterRecord:
    """One IP-Adapter's graph and how its input is made."""

    component: ComponentRecord
    kind: str  # "base", "plus" or "full-face"
    tokens: int  # tokens per reference image
    feature: str  # the image encoder's output that the graph takes
    negative: str  # `ZERO_FEATURE` or `ZERO_PIXELS`
    source_sha256: str  # of the adapter file the graph was made from


@dataclass(frozen=True)
class ControlNetRecord:
    """One ControlNet's graph.

    Attributes:
        source: the folder's name or the Hub id that it was made of.
        is_global: it says what is in a picture, not where (diffusers' `global_pool_conditions`): its residuals have
            no place, and it counts for the positive half alone, as in guess mode.
    """

    component: ComponentRecord
    source: str
    is_global: bool = False


@dataclass(frozen=True)
class VaeRecord:
    """How latents and the VAE's own space differ."""

    scaling_factor: float
    downscale: int  # pixels per latent: 8


@dataclass(frozen=True)
class SourceRecord:
    """Where weights came from: a file's name and sha256; a folder or Hub id has no hash."""

    name: str
    sha256: str = ""


@dataclass(frozen=True)
class LoraRecord:
    """A LoRA that was added into the weights: the file's name and hash, and the weight it was added with."""

    name: str
    sha256: str
    scale: float


@dataclass(frozen=True)
class TextualInversionRecord:
    """A word that the text encoders learned: `vectors` tokens `token`, `token_1`, ... made of the file `name`."""

    token: str
    vectors: int
    name: str
    sha256: str


@dataclass(frozen=True)
class ImageProcessorRecord:
    """CLIP preprocessing: resize the shortest edge to `size` (bicubic), crop the centre, normalise."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Defaults:
    """What a request gets when it does not say: picked at export to suit the model."""

    height: int
    width: int
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    ip_adapter_scale: float = 1.0
    adapter: str = ""  # empty: the bundle has no adapter


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime knows about a bundle."""

    family: str
    created_by: Mapping[str, str]
    kv_layout: KVLayout
    components: Mapping[str, ComponentRecord]
    adapters: Mapping[str, AdapterRecord]
    tokenizer: FileRecord
    scheduler: FileRecord
    text_tokens: int
    vae: VaeRecord
    image_processor: ImageProcessorRecord
    defaults: Defaults
    validation: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, SourceRecord] = field(default_factory=dict)  # `checkpoint`, `vae`: where given apart
    loras: tuple[LoraRecord, ...] = ()
    textual_inversions: tuple[TextualInversionRecord, ...] = ()
    clip_skip: int = 0  # layers of the text encoders that were left out, from the last
    controlnets: Mapping[str, ControlNetRecord] = field(default_factory=dict)
    tokenizer_2: FileRecord | None = None  # of `text_encoder_2`, where there is one
    force_zeros_for_empty_prompt: bool = False  # what an empty negative prompt is encoded to (Stable Diffusion XL)

    def graphs(self) -> dict[str, ComponentRecord]:
        """Every graph by its component's name: those of the spec table, `ip_adapter/NAME` and `controlnet/NAME`."""
        adapters = {f"ip_adapter/{name}": adapter.component for name, adapter in self.adapters.items()}
        controlnets = {f"controlnet/{name}": control.component for name, control in self.controlnets.items()}
        return {**self.components, **adapters, **controlnets}

    def files(self) -> tuple[FileRecord, ...]:
        """Every file of the bundle but the manifest itself."""
        files = (file for graph in self.graphs().values() for file in (*graph.files, *graph.variants.values()))
        return (*self.tokenizers, self.scheduler, *files)

    @property
    def tokenizers(self) -> tuple[FileRecord, ...]:
        """One for each text encoder."""
        return (self.tokenizer,) if self.tokenizer_2 is None else (self.tokenizer, self.tokenizer_2)

    def with_adapter(self, name: str, adapter: AdapterRecord) -> Manifest:
        """This manifest with one more (or one replaced) adapter; the first one becomes the default.

        Validation figures are not those of the adapter that replaces another: they go.
        """
        defaults = self.defaults if self.defaults.adapter else replace(self.defaults, adapter=name)
        validation = {} if name in self.adapters else self.validation
        return replace(self, adapters={**self.adapters, name: adapter}, defaults=defaults, validation=validation)

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse the file's text.

        Raises:
            BundleError: not JSON, another format, a newer version, or a record that does not fit.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{FILE_NAME} is not JSON ({error}); export the bundle again") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(f"{FILE_NAME} is not an {FORMAT} manifest; `ipa-export onnx` writes bundles")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            advice = "upgrade with `pip install -U ipa-runtime`" if newer else "export it again with `ipa-export onnx`"
            raise BundleError(
                f"{FILE_NAME} has format version {version}, this ipa-runtime reads {FORMAT_VERSION}; {advice}"
            )
        try:
            manifest: Manifest = _parse(cls, data, "manifest")
        except ValueError as error:
            raise BundleError(f"{FILE_NAME}: {error}; export the bundle again") from error
        return manifest


def _parse(kind: Any, value: Any, where: str) -> Any:
    """`value` (from JSON) as the annotated type `kind`; a `ValueError` names the place that does not fit."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {type(value).__name__}, expected an object")
        hints = get_type_hints(kind)
        known = {item.name for item in fields(kind) if item.name in value}
        try:
            return kind(**{name: _parse(hints[name], value[name], f"{where}.{name}") for name in known})
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from error
    if origin is UnionType and arguments[1] is NoneType:  # `X | None`
        return None if value is None else _parse(arguments[0], value, where)
    if origin is tuple:
        if not isinstance(value, list) or (arguments[-1] is not ... and len(value) != len(arguments)):
            raise ValueError(f"{where} is not a list of the right length")
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return tuple(
            _parse(item_kind, item, f"{where}[{i}]")
            for i, (item_kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is Mapping:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {type(value).__name__}, expected an object")
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is Any or (kind is bool and isinstance(value, bool)):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind):
        raise ValueError(f"{where} is {value!r}")
    return value
