"""One run of `ipa-run`: from options to written files. The record it leaves makes the pictures again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ipa.engines.errors import EngineError, RequestError
from ipa.engines.registry import Choice
from ipa.runtime.demo import demo_bundle
from ipa.runtime.denoise import Step
from ipa.runtime.metadata import read_request
from ipa.runtime.output import check_file_writable, check_writable, output_paths
from ipa.runtime.pipeline import Pipeline, Result
from ipa.runtime.prompt_fields import PromptFields, has_pictures, laid_over, prompts_of
from ipa.runtime.record import file_hashes, origin, write_pictures
from ipa.runtime.request import Request
from ipa.runtime.request_record import recorded_fields, request_from, request_record


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
    models: Mapping[str, str] = field(default_factory=dict)  # those that made it, by sha256
    trust_engines: Path | None = None  # folder of engine plans in place of the user's cache
    save_embeds: Path | None = None  # where the features of the image prompt go

    @classmethod
    def plan(
        cls,
        given: Mapping[str, Any],
        prompts: Sequence[PromptFields] = (),
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
            given: fields of `Request` that the user named, image prompts apart.
            prompts: image prompts, by the fields that the user named.
            bundle, engine, output, trust_engines, save_embeds: as on the command line.
            source: a PNG of ours whose request the given fields and image prompts override.
        Raises:
            RequestError: a field, the source or the output does not fit.
        """
        recorded: Mapping[str, Any] = read_request(Path(source)) if source is not None else {}
        try:
            fields = recorded_fields(recorded)
            before = [prompt for prompt in prompts_of(fields) if has_pictures(prompt) or prompt.get("adapter")]
        except RequestError as error:
            raise RequestError(f"{source}: {error}") from error
        if "num_images" in given or "seed" in given:
            fields.pop("only", None)
        request = request_from({**fields, **given}, laid_over(before, prompts))
        warnings = [] if source is None else _changed_files(request, recorded, given, prompts, source)
        folder = bundle if bundle is not None else recorded.get("bundle")
        target = Path(output) if output is not None else Path()
        check_writable(target)
        if save_embeds is not None:
            if len(request.all_image_prompts) != 1:
                raise RequestError(
                    f"--save-image-embeds keeps one image prompt, this has {len(request.all_image_prompts)}"
                )
            check_file_writable(Path(save_embeds))
        return cls(
            request,
            None if folder is None else Path(str(folder)),
            engine or "auto",
            target,
            recorded.get("engine") if engine is None else None,
            tuple(warnings),
            _strings(recorded.get("models")) if bundle is None else {},
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
            # Before the run, so that a file that goes away meanwhile costs no picture.
            about, engine = origin(pipeline, self.request, self.bundle), pipeline.choice
            try:
                result = pipeline.run(self.request, progress)
            finally:
                if bar is not None:
                    bar.close()
            assert result.request.seed is not None
            paths = output_paths(self.output, len(result.images), result.request.seed)
            write_pictures(result, paths, about if has_metadata else None)
            if self.save_embeds is not None:
                self._save_embeds(self.save_embeds, pipeline, result.request)
        warnings = [*self.warnings, *warnings, *result.warnings]
        changed = [name for name, now in about["models"].items() if self.models.get(name, now) != now]
        if changed:
            warnings.append(
                f"the bundle's {', '.join(changed)} {'is' if len(changed) == 1 else 'are'} not what made the picture; "
                "the result will differ"
            )
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
            return Pipeline.open(folder, engine=self.recorded_engine, is_flexible=True, **options), []
        except EngineError as error:
            warning = f"the picture was made with the engine '{self.recorded_engine}': {error}; small differences"
            return Pipeline.open(folder, engine=self.engine, **options), [warning]


def _changed_files(
    request: Request,
    recorded: Mapping[str, Any],
    given: Mapping[str, Any],
    prompts: Sequence[PromptFields],
    source: str,
) -> list[str]:
    """Warnings of files that the record names and that are other ones now; not of those that the user named again."""
    hashes = _strings(recorded.get("files"))
    named = {str(value) for value in (given.get("init_image"), given.get("mask_image"))}
    named |= {str(control.image) for control in given.get("controls", ())}
    for prompt in prompts:
        named |= {str(value) for value in (*prompt.get("images", ()), *prompt.get("masks", ()), prompt.get("embeds"))}
    return [
        f"{path} is not the file that {source} was made with; the result will differ"
        for path, now in file_hashes(request).items()
        if path not in named and hashes.get(path, now) != now
    ]


def _strings(record: object) -> Mapping[str, str]:
    """A JSON object of texts; nothing where a picture's record has something else there."""
    found = record.items() if isinstance(record, Mapping) else ()
    return {str(name): value for name, value in found if isinstance(value, str)}
