"""The noise of a seed equals PyTorch's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ipa.engines.errors import RequestError
from ipa.runtime.noise import TorchGenerator

SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63, 2**64 - 1]
SIZES = [(1,), (), (2,), (15,), (16,), (17,), (31,), (32,), (623,), (625,), (1, 4, 8, 8), (3, 4, 7, 5), (2, 4, 64, 64)]


def torch_generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def assert_same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    """Equal bit for bit where PyTorch runs its AVX2 code; 4e-6, the reach of its other code, elsewhere."""
    expected = theirs.numpy()
    assert ours.dtype == np.float32
    assert ours.shape == expected.shape
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        np.testing.assert_array_equal(ours, expected)
    else:
        np.testing.assert_allclose(ours, expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed_gives_torchs_noise(seed: int) -> None:
    assert_same(
        TorchGenerator(seed).randn((1, 4, 16, 16)), torch.randn((1, 4, 16, 16), generator=torch_generator(seed))
    )


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_size_gives_torchs_noise(shape: tuple[int, ...]) -> None:
    assert_same(TorchGenerator(5).randn(shape), torch.randn(shape, generator=torch_generator(5)))


def test_many_values_are_equal() -> None:
    assert_same(TorchGenerator(3).randn((2**18,)), torch.randn((2**18,), generator=torch_generator(3)))


def test_consecutive_draws_keep_the_state() -> None:
    """Odd small draws leave half a pair behind, which the next small draw uses, also across a large one."""
    ours, theirs = TorchGenerator(11), torch_generator(11)
    for shape in [(3,), (2, 4, 8, 8), (1,), (5,), (17,), (1,), (16,), (2,), (1, 4, 9, 9), (15,)]:
        assert_same(ours.randn(shape), torch.randn(shape, generator=theirs))


def test_several_images_are_one_draw_of_a_batch() -> None:
    """As diffusers draws `num_images_per_prompt` images from one generator."""
    from diffusers.utils.torch_utils import randn_tensor

    shape = (3, 4, 8, 6)
    assert_same(TorchGenerator(9).randn(shape), randn_tensor(shape, generator=torch_generator(9), dtype=torch.float32))


def test_only_the_low_32_bits_of_a_seed_count() -> None:
    np.testing.assert_array_equal(TorchGenerator(0).randn((64,)), TorchGenerator(2**32).randn((64,)))
    assert not np.array_equal(TorchGenerator(0).randn((64,)), TorchGenerator(1).randn((64,)))


def test_an_empty_shape_draws_nothing() -> None:
    generator = TorchGenerator(0)
    assert generator.randn((0, 4)).shape == (0, 4)
    assert_same(generator.randn((16,)), torch.randn(16, generator=torch_generator(0)))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, math.nan, "0", None, True])
def test_a_bad_seed_is_refused(seed: object) -> None:
    with pytest.raises(RequestError, match=r"seed is .* expected a whole number from 0 to 18446744073709551615"):
        TorchGenerator(seed)  # type: ignore[arg-type]
