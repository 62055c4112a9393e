"""The spec table and the packing of keys and values."""

from __future__ import annotations

import numpy as np
import pytest

from ipa.engines.engine import check_inputs
from ipa.engines.errors import EngineError
from ipa.engines.kv_layout import KVLayer, KVLayout
from ipa.engines.packed_kv import scale_values
from ipa.engines.spec import COMPONENTS, SPECS, Dimensions, adapter_spec
from ipa.runtime.conditioning import guidance_batch

SD15_WIDTHS = (320, 320, 640, 640, *(1280,) * 5, *(640,) * 3, *(320,) * 3, 1280)
SD15 = Dimensions(77, 768, 24960, 224, 1024, 257, 1280, 4, 4)


def test_the_packed_axis_of_sd15() -> None:
    layout = KVLayout(tuple(KVLayer(str(i), width) for i, width in enumerate(SD15_WIDTHS)))
    assert layout.size == SD15.kv == 2 * 12480
    slices = list(layout.value_slices())
    assert slices[:2] == [slice(320, 640), slice(960, 1280)]
    assert slices[-1] == slice(24960 - 1280, 24960)


def test_only_free_axes_stay_names() -> None:
    assert set(SPECS) == set(COMPONENTS)
    free = {"batch", "tokens", "latent_height", "latent_width", "height", "width"}
    for spec in [*SPECS.values(), adapter_spec("image_embeds"), adapter_spec("hidden_states")]:
        resolved = spec.resolved(SD15.sizes(), "float16")
        for tensor in (*resolved.inputs, *resolved.outputs):
            assert {axis for axis in tensor.axes if isinstance(axis, str)} <= free
            assert tensor.dtype in ("float16", "float32", "int64")


def test_inputs_must_agree_on_the_batch() -> None:
    spec = SPECS["unet"].resolved({**SD15.sizes(), "kv": 6, "text_tokens": 3}, "float32")
    inputs = {
        "sample": np.zeros((2, 4, 8, 8), np.float32),
        "timestep": np.zeros((), np.float32),
        "text_kv": np.zeros((2, 3, 6), np.float32),
        "image_kv": np.zeros((1, 5, 6), np.float32),
    }
    with pytest.raises(EngineError, match=r"'image_kv' is float32\(1, 5, 6\).* with batch = 2"):
        check_inputs("unet", spec, inputs)
    check_inputs("unet", spec, {**inputs, "image_kv": np.zeros((2, 5, 6), np.float32)})


def test_scaling_touches_values_alone_and_keeps_the_dtype() -> None:
    layout = KVLayout((KVLayer("a", 2), KVLayer("b", 1)))
    image_kv = np.arange(1, 13, dtype=np.float16).reshape(1, 2, 6)
    scaled = scale_values(image_kv, layout, 0.5)
    assert scaled.dtype == np.float16
    np.testing.assert_array_equal(scaled / image_kv, [[[1, 1, 0.5, 0.5, 1, 0.5]] * 2])
    assert not scale_values(image_kv, layout, 0.0)[..., [2, 3, 5]].any()


def test_the_negative_half_comes_first() -> None:
    halves = np.array([[-1.0], [1.0]])
    np.testing.assert_array_equal(guidance_batch([halves], [2], True), [[-1], [-1], [1], [1]])
    np.testing.assert_array_equal(guidance_batch([halves], [2], False), [[1], [1]])
    np.testing.assert_array_equal(guidance_batch([halves[:1]], [1], True), [[-1], [-1]])
    two = guidance_batch([halves, 2 * halves], [1, 2], True)
    np.testing.assert_array_equal(two, [[-1], [-2], [-2], [1], [2], [2]])
