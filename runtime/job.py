"""One run of `ipa-run`: from options to written files. The record it leaves makes the pictures again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ipa.engines.errors import EngineError, RequestError
from ipa.engines.registry import Choice
from ipa.runtime.control_image import ControlImage
from ipa.runtime.demo import demo_bundle
from ipa.runtime.denoise import Step
from ipa.runtime.image_prompt import ImagePrompt
from ipa.runtime.metadata import read_request
from ipa.runtime.output import check_writable, output_paths
from ipa.runtime.pipeline import Pipeline, Result
from ipa.runtime.record import image_hashes, origin, request_record, write_pictures
from ipa.runtime.request import Request

_REQUEST_FIELDS = frozenset(Request.__dataclass_fields__)
_IMAGE_FIELDS = frozenset({"image", "adapter", "ip_adapter_scale", "image_prompts"})


@dataclass(frozen=True)
class Report:
    """What a job did."""

    paths: list[Path]
    result: Result
    engine: Choice
    bundle: str
    warnings: list[str]

    def record(self) -> dict[str, Any]:
        """Everything, for `--format json`."""
        return {
            "images": [str(path) for path in self.paths],
            "request": request_record(self.result.request),
            "bundle": self.bundle,
            "engine": self.engine.name,
            "engine_reason": self.engine.reason,
            "warnings": self.warnings,
            "seconds": self.result.seconds,
            "steps_per_second": self.result.steps_per_second,
        }

    def timings(self) -> str:
        """One line per stage."""
        lines = [f"{stage:12} {seconds:8.3f} s" for stage, seconds in self.result.seconds.items()]
        lines.append(f"{'total':12} {sum(self.result.seconds.values()):8.3f} s")
        lines.append(f"{self.result.unet_calls} UNet calls, {self.result.steps_per_second:.2f} step/s, {self.engine}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Job:
    """A checked request, and where to run and write it."""

    request: Request
    bundle: Path | None  # None: the demo bundle
    engine: str
    output: Path
    recorded_engine: str | None = None  # that made the picture this job makes again; used where it can run
    warnings: tuple[str, ...] = ()
    unet_sha256: str | None = None  # of the UNet that made the picture this job makes again
    trust_engines: Path | None = None  # folder of engine plans in place of the user's cache
    save_embeds: Path | None = None  # where the features of the image prompt go

    @classmethod
    def plan(
        cls,
        given: Mapping[str, Any],
        *,
        bundle: str | None,
        engine: str | None,
        output: str | None,
        source: str | None,
        trust_engines: str | None = None,
        save_embeds: str | None = None,
    ) -> Self:
        """Check everything that can be checked before a model is opened.

        Args:
            given: fields of `Request` that the user named.
            bundle, engine, output, trust_engines, save_embeds: as on the command line.
            source: a PNG of ours whose request the given fields override.
        Raises:
            RequestError: a field, the source or the output does not fit.
        """
        recorded: Mapping[str, Any] = read_request(Path(source)) if source is not None else {}
        fields = {name: value for name, value in recorded.items() if name in _REQUEST_FIELDS}
        if "num_images" in given or "seed" in given:
            fields.pop("only", None)
        if fields.get("image_prompts") and not _IMAGE_FIELDS.isdisjoint(given):
            if "image" not in given and "image_prompts" not in given:
                raise RequestError(f"{source} has several image prompts, which change as a whole: give --image again")
            del fields["image_prompts"]
        if "image_prompts" in given:
            fields = {name: value for name, value in fields.items() if name not in _IMAGE_FIELDS}
        elif "image_prompts" in fields:
            prompts = fields["image_prompts"]
            if not isinstance(prompts, list):
                raise RequestError(f"{source}: image_prompts is {prompts!r}, expected a list; give --image yourself")
            fields["image_prompts"] = tuple(map(ImagePrompt.from_record, prompts))
        if "controls" in fields and "controls" not in given:
            fields["controls"] = ControlImage.from_records(fields["controls"])
        request = Request(**{**fields, **given})
        if not request.prompt and not request.has_image and not request.controls:
            raise RequestError("nothing to draw from: give --prompt, --image or both")
        warnings = [
            f"{name} is not the image that {source} was made with; the result will differ"
            for name in _changed_images(request, recorded, given)
        ]
        folder = bundle if bundle is not None else recorded.get("bundle")
        target = Path(output) if output is not None else Path()
        check_writable(target)
        if save_embeds is not None and len(request.all_image_prompts) != 1:
            raise RequestError(f"--save-image-embeds keeps one image prompt, this has {len(request.all_image_prompts)}")
        return cls(
            request,
            None if folder is None else Path(str(folder)),
            engine or "auto",
            target,
            recorded.get("engine") if engine is None else None,
            tuple(warnings),
            recorded.get("unet_sha256") if bundle is None else None,
            None if trust_engines is None else Path(trust_engines),
            None if save_embeds is None else Path(save_embeds),
        )

    def run(
        self, *, has_metadata: bool, show: Callable[[int], Any], check: Callable[[], None] = lambda: None
    ) -> Report:
        """Make the pictures and write them.

        Args:
            has_metadata: whether the files carry their request.
            show: given the number of steps, a progress bar as tqdm's.
            check: called after each step; raises to stop.
        """
        bar = None

        def progress(step: Step) -> None:
            nonlocal bar
            bar = bar if bar is not None else show(step.count)
            bar.update()
            check()

        opened, warnings = self._open()
        with opened as pipeline:
            try:
                result = pipeline.run(self.request, progress)
            finally:
                if bar is not None:
                    bar.close()
            if self.save_embeds is not None:
                self._save_embeds(self.save_embeds, pipeline, result.request)
            about, engine = origin(pipeline, self.request, self.bundle), pipeline.choice
        warnings = [*self.warnings, *warnings, *result.warnings]
        if self.unet_sha256 not in (None, about["unet_sha256"]):
            warnings.append("the bundle's UNet is not the one that made the picture; the result will differ")
        assert result.request.seed is not None
        paths = output_paths(self.output, len(result.images), result.request.seed)
        write_pictures(result, paths, about if has_metadata else None)
        return Report(paths, result, engine, str(self.bundle or "demo"), warnings)

    def _save_embeds(self, path: Path, pipeline: Pipeline, request: Request) -> None:
        from ipa.runtime.image_embeds import write_embeds

        (prompt,) = request.all_image_prompts
        feature = pipeline.bundle.adapter(str(prompt.adapter)).feature
        write_embeds(path, pipeline.image_embeds(prompt), feature, pipeline.bundle)

    def _open(self) -> tuple[Pipeline, list[str]]:
        """The pipeline, in the engine that was asked for or that made the picture before; and what to warn of."""
        folder = self.bundle or demo_bundle()
        options: dict[str, Any] = {"keep_engines": False, "trust_engines": self.trust_engines}
        if self.recorded_engine is None:
            return Pipeline.open(folder, engine=self.engine, **options), []
        try:
            return Pipeline.open(folder, engine=self.recorded_engine, **options), []
        except EngineError as error:
            warning = f"the picture was made with the engine '{self.recorded_engine}': {error}; small differences"
            return Pipeline.open(folder, engine=self.engine, **options), [warning]


def _changed_images(request: Request, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """The pictures that are taken from the record and are other ones now."""
    own = {name for name in ("image", "init_image", "mask_image", "controls") if name in given}
    own |= {"image"} if "image_prompts" in given else set()
    hashes = image_hashes(request)
    names = [key.removesuffix("_sha256") for key, now in hashes.items() if key in recorded and recorded[key] != now]
    pictures = {name: getattr(request, name, None) or "an image" for name in names if name not in own}
    if "controls" in pictures:
        pictures["controls"] = "a control image"
    return [str(picture) for picture in pictures.values()]
