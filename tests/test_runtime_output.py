"""Where pictures go, and that they get there whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ipa.engines.errors import RequestError
from ipa.runtime.output import check_writable, output_paths, write_png


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- names ----------------------------------------------------------------------------------------


def test_one_image_and_a_file_name_is_exactly_that_file(tmp_path: Path) -> None:
    for name in ("x.png", "X.PNG", "a b.c.png"):
        assert output_paths(tmp_path / name, 1, seed=7) == [tmp_path / name]


def test_several_images_and_a_file_name_are_numbered(tmp_path: Path) -> None:
    assert output_paths(tmp_path / "x.png", 3, seed=7) == [tmp_path / f"x-{i}.png" for i in range(3)]


def test_a_new_name_without_picture_suffix_becomes_a_folder(tmp_path: Path) -> None:
    for name in ("out", "out.v2"):
        assert output_paths(tmp_path / name, 2, seed=0) == [tmp_path / name / "0-0.png", tmp_path / name / "0-1.png"]
        assert (tmp_path / name).is_dir()


def test_files_in_a_folder_are_never_replaced(tmp_path: Path, image: Image.Image) -> None:
    taken = [*output_paths(tmp_path, 2, seed=5), tmp_path / "5-3.png"]
    for path in taken:
        write_png(image, path, None)
    assert output_paths(tmp_path, 1, seed=5) == [tmp_path / "5-2.png"]
    assert output_paths(tmp_path, 2, seed=5) == [tmp_path / "5-4.png", tmp_path / "5-5.png"]
    assert output_paths(tmp_path, 1, seed=6) == [tmp_path / "6-0.png"]


def test_an_existing_folder_named_like_a_picture_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    assert output_paths(tmp_path / "x.png", 1, seed=1) == [tmp_path / "x.png" / "1-0.png"]


@pytest.mark.parametrize("name", ["x.jpg", "x.JPEG", "x.webp", "x.tiff"])
def test_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    for call in (lambda: check_writable(tmp_path / name), lambda: output_paths(tmp_path / name, 1, 0)):
        with pytest.raises(RequestError, match=r"written as PNG; name it x\.png"):
            call()
    assert files(tmp_path) == []


def test_a_file_where_a_folder_is_meant_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("keep")
    for call in (lambda: check_writable(tmp_path / "notes"), lambda: output_paths(tmp_path / "notes", 1, 0)):
        with pytest.raises(RequestError, match="not a folder"):
            call()
    assert (tmp_path / "notes").read_text() == "keep"


# --- before the work ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.png", "new", "."])
def test_check_leaves_nothing(tmp_path: Path, name: str) -> None:
    check_writable(tmp_path / name)
    assert files(tmp_path) == []


def test_check_refuses_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="too long"):
        check_writable(tmp_path / ("n" * 300 + ".png"))


@pytest.mark.parametrize("name", ["missing/x.png", "missing/new", "file/x.png", "file/new"])
def test_check_refuses_a_missing_parent(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="there is no folder") as caught:
        check_writable(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def deny(*_: Any, **__: Any) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("name", ["x.png", "new", "."])
def test_check_refuses_a_folder_without_permission(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Mocked: permissions do not stop root, who runs tests in containers.
    monkeypatch.setattr(Path, "touch", deny)
    with pytest.raises(RequestError, match="Permission denied"):
        check_writable(tmp_path / name)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not stop root")
def test_check_refuses_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RequestError, match="Permission denied"):
        check_writable(tmp_path / "x.png")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_check_refuses_a_file_system_that_takes_no_files() -> None:
    with pytest.raises(RequestError, match="cannot write to folder /proc"):
        check_writable(Path("/proc/x.png"))


# --- writing --------------------------------------------------------------------------------------


def test_picture_and_text_are_written(tmp_path: Path, image: Image.Image) -> None:
    info = PngInfo()
    info.add_text("parameters", "hello")
    for path, text in ((tmp_path / "a.png", info), (tmp_path / "b.png", None)):
        write_png(image, path, text)
        with Image.open(path) as written:
            assert written.format == "PNG" and written.info.get("parameters") == (text and "hello")
            np.testing.assert_array_equal(np.asarray(written), np.asarray(image))
    assert files(tmp_path) == ["a.png", "b.png"]


def test_file_has_the_usual_permissions(tmp_path: Path, image: Image.Image) -> None:
    (tmp_path / "plain").touch()
    write_png(image, tmp_path / "x.png", None)
    assert stat.S_IMODE((tmp_path / "x.png").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["save", "fsync", "replace"])
def test_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"old")

    def fail(*arguments: Any, **_: Any) -> None:
        if where == "save":
            arguments[1].write(b"half a picture")
        raise error

    target = {"save": (Image.Image, "save"), "fsync": (os, "fsync"), "replace": (Path, "replace")}[where]
    monkeypatch.setattr(*target, fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RequestError
    with pytest.raises(expected) as caught:
        write_png(image, path, None)
    if expected is RequestError:
        assert str(path) in str(caught.value) and "No space left" in str(caught.value)
    assert path.read_bytes() == b"old" and files(tmp_path) == ["x.png"]


def test_paths_that_cannot_be_written_are_refused(tmp_path: Path, image: Image.Image) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("missing/x.png", "file/x.png", "folder", "n" * 300 + ".png"):
        with pytest.raises(RequestError) as caught:
            write_png(image, tmp_path / name, None)
        assert str(tmp_path / name) in str(caught.value)
    assert files(tmp_path) == ["file", "folder"]
