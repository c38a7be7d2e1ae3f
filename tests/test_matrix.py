"""The int4 and int8 doors on numpy arrays, against their definition in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ferrule
from ferrule import _core

BLOCK = 256
# The most that a weight may be off, of its block's largest: int8 rounds to 1/127; int4 minimises
# squares and may clip the extremes of a group for that.
QUANTIZERS = [(_core.quantize_int4, 0.25), (_core.quantize_int8, 0.51 / 127)]


def blocks(x: np.ndarray) -> list[np.ndarray]:
    return [x[:, i : i + BLOCK] for i in range(0, x.shape[1], BLOCK)]


@settings(max_examples=60)
@given(
    st.integers(1, 70),
    st.integers(1, 600),
    st.integers(0, 9),
    st.floats(1e-6, 1e6),
    st.integers(0, 2**32 - 1),
    st.sampled_from(QUANTIZERS),
)
def test_close_to_the_product(
    n: int, k: int, m: int, scale: float, seed: int, quantizer: tuple[Callable[..., Any], float]
) -> None:
    quantize, most = quantizer
    rng = np.random.default_rng(seed)
    w = (scale * rng.standard_normal((n, k))).astype(np.float32)
    x = rng.standard_normal((m, k)).astype(np.float32)
    q = quantize(w)
    assert q.shape == (n, k)
    kept = q.dequantize()
    assert kept.dtype == np.float32
    for a, b in zip(blocks(w), blocks(kept), strict=True):
        assert (np.abs(a - b) <= most * np.abs(a).max(axis=1, keepdims=True)).all()
    # The product differs from that of the kept weights by the rounding of activations only.
    y = q.matmul(x)
    assert (y.dtype, y.shape) == (np.float32, (m, n))
    exact = x.astype(np.float64) @ kept.astype(np.float64).T
    bound = np.zeros((m, n))
    for a, b in zip(blocks(x), blocks(kept), strict=True):
        half_step = np.abs(a).max(axis=1, keepdims=True) / 127 / 2
        bound += half_step @ np.abs(b).sum(axis=1)[None, :]
    assert (np.abs(y - exact) <= 1.01 * bound + 1e-4 * np.abs(exact) + 1e-30).all()


@pytest.mark.parametrize("quantize", [q for q, _ in QUANTIZERS])
def test_rows_do_not_depend_on_the_batch_threads_or_set(quantize: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((200, 520)).astype(np.float32)
    x = rng.standard_normal((13, 520)).astype(np.float32)
    want = quantize(w, threads=1, isa="scalar").matmul(x)
    for isa in _core.kernel_sets():
        for threads in (1, 3):
            q = quantize(w, threads=threads, isa=isa)
            np.testing.assert_array_equal(q.matmul(x), want)
            np.testing.assert_array_equal(q.matmul(x[4:5]), want[4:5])


@pytest.mark.parametrize(
    ("quantize", "noise"), [(_core.quantize_int4, 7e-3), (_core.quantize_int8, 5e-5)]
)
def test_noise(quantize: Callable[..., Any], noise: float) -> None:
    """Error power of normally distributed weights, of their power."""
    w = np.random.default_rng(2).standard_normal((64, 1024)).astype(np.float32)
    assert ((quantize(w).dequantize() - w) ** 2).mean() / (w**2).mean() < noise


def test_sizes() -> None:
    w = np.ones((1024, 4096), np.float32)
    four, eight = _core.quantize_int4(w), _core.quantize_int8(w)
    assert four.bits_per_weight == pytest.approx(4.5, abs=0.26)
    assert eight.bits_per_weight == pytest.approx(8.125, abs=0.26)
    assert four.nbytes * 8 == four.bits_per_weight * w.size


def test_views_are_read_as_they_look() -> None:
    w = np.random.default_rng(1).standard_normal((64, 128)).astype(np.float32)
    x = np.ones((2, 64), np.float32)
    want = _core.quantize_int8(np.ascontiguousarray(w.T)).matmul(x)
    np.testing.assert_array_equal(_core.quantize_int8(w.T).matmul(x), want)


def test_errors() -> None:
    q = _core.quantize_int8(np.ones((3, 5), np.float32))
    with pytest.raises(ferrule.InvalidParameterError, match="x"):
        q.matmul(np.ones((1, 4), np.float32))
    with pytest.raises(ferrule.InvalidParameterError, match="finite"):
        q.matmul(np.full((1, 5), np.nan, np.float32))
    with pytest.raises(ferrule.InvalidParameterError, match="finite"):
        _core.quantize_int4(np.array([[1, np.inf]], np.float32))
    for shape in [(0, 3), (3, 0)]:
        with pytest.raises(ferrule.InvalidParameterError, match="w"):
            _core.quantize_int4(np.ones(shape, np.float32))
    for bad in (np.ones(3, np.float32), np.ones((2, 2)), [[1.0]]):
        with pytest.raises(TypeError):
            _core.quantize_int8(bad)
    with pytest.raises(ferrule.InvalidParameterError):
        _core.quantize_int8(np.ones((1, 1), np.float32), isa="z80")
