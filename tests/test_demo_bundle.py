"""The embedded default: small, whole, and it does what the README shows."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ipa.engines.bundle import Bundle
from ipa.engines.errors import BundleError
from ipa.runtime import Pipeline, demo
from ipa.runtime.cli import main
from ipa.trainer.demo.evaluate import held_out_pairs, score
from ipa.trainer.demo.judge import SHIPPED, load_judge

LIMIT = 16_000_000  # bytes in git
PAIRS = 8


def test_the_bundle_is_whole_and_small() -> None:
    bundle = Bundle.open(demo.demo_bundle())
    held = [path for path in demo.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in held) <= LIMIT
    assert bundle.manifest.defaults.adapter in bundle.manifest.adapters
    assert bundle.manifest.validation  # `ipa-export validate` wrote its figures


def test_ipa_run_without_a_bundle_draws_with_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "x.png"
    arguments = ["--image", demo.REFERENCE, "--prompt", "a star", "--steps", "4", "--seed", "7", "--output", target]
    monkeypatch.setattr(sys, "argv", ["ipa-run", *map(str, arguments)])
    main()
    assert capsys.readouterr().out == f"{target}\n"
    assert Image.open(target).size == (128, 128)


def test_an_installation_without_the_bundle_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "BUNDLE", tmp_path / "nowhere")
    with pytest.raises(BundleError, match="name one with `--bundle BUNDLE`"):
        demo.demo_bundle()


def test_text_gives_the_shape_and_the_image_the_colours() -> None:
    """Most of the first held-out pairs come out right; the README's rates are over 64 of them."""
    pairs = held_out_pairs(PAIRS)
    with Pipeline.open(demo.demo_bundle()) as pipe:

        def draw(scale: float) -> list[Image.Image]:
            return [
                pipe(pair.prompt, image=pair.reference, ip_adapter_scale=scale, seed=i, scheduler="ddim")[0]
                for i, pair in enumerate(pairs)
            ]

        with_image, without = draw(1.0), draw(0.0)
    judge = load_judge(SHIPPED)
    followed, ignored = score(with_image, pairs, judge), score(without, pairs, judge)
    assert followed.shape >= 0.6
    assert followed.foreground >= 0.6
    assert followed.background >= 0.6
    assert ignored.both <= 0.3  # without the image, the colours can only be guessed
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(with_image, without, strict=True))
