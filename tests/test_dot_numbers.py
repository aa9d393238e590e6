"""Every legal dimension_numbers, and what the others are told."""

import functools
import math

import dot_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dot_cases import assert_close, gemms, plain, quick_jit, uniform
from jax import lax

from q8jax import PRECISIONS, Operand, dot_general
from q8jax.contraction import Contraction, contractions


def _legal_numbers(seed: int = 0):
    """(numbers, lhs shape, rhs shape) for 0 to 2 batch, contracting and free axes, shuffled."""
    random = np.random.default_rng(seed)
    sizes = {"b": (2, 3), "c": (4, 6), "l": (6, 2), "r": (2, 4)}
    cases = []
    for count in np.ndindex(3, 3, 3, 3):
        groups = {kind: [(kind, i) for i in range(n)] for kind, n in zip("bclr", count)}
        sides = [groups["b"] + groups["c"] + groups[own] for own in "lr"]
        for axes in (*sides, groups["b"], groups["c"]):
            random.shuffle(axes)
        pairs = [tuple(tuple(s.index(axis) for axis in groups[kind]) for s in sides) for kind in "cb"]
        cases.append((tuple(pairs), *(tuple(sizes[k][i] for k, i in side) for side in sides)))
    return cases


EMPTY = [
    ((((1,), (0,)), ((), ())), (0, 4), (4, 2)),
    ((((1,), (0,)), ((), ())), (2, 0), (0, 4)),
    ((((1,), (0,)), ((), ())), (2, 4), (4, 0)),
    ((((2,), (1,)), ((0,), (0,))), (0, 2, 4), (0, 4, 6)),
]


def _whole_numbers(case, seed: int = 0) -> list[np.ndarray]:
    numbers, lhs_shape, rhs_shape = case
    random = np.random.default_rng(seed)
    lhs, rhs = (random.integers(-3, 4, shape).astype(np.float32) for shape in (lhs_shape, rhs_shape))
    out = jax.eval_shape(functools.partial(lax.dot_general, dimension_numbers=numbers), lhs, rhs)
    return [lhs, rhs, random.integers(-3, 4, out.shape).astype(np.float32)]


def _run(contraction: Contraction, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The dot that a Contraction says, in NumPy."""
    a, b = contraction.first, contraction.second
    left = first.transpose(a.batch + a.free + a.contracting)
    right = second.transpose(b.batch + b.free + b.contracting)
    shape = contraction.dot_shape(first.shape, second.shape)
    batch, length = left.shape[: len(a.batch)], left.shape[len(a.kept) :]
    assert (batch, length) == (right.shape[: len(b.batch)], right.shape[len(b.kept) :])
    size = math.prod(batch), -1, math.prod(length)
    sizes = [math.prod(x.shape[i] for i in s.free) for x, s in ((first, a), (second, b))]
    flat = [x.reshape(size[0], n, size[2]) for x, n in zip((left, right), sizes)]
    return np.einsum("bmk,bnk->bmn", *flat).reshape(shape).transpose(contraction.permutation)


@pytest.mark.parametrize("seed", range(3))
def test_contractions_are_right_for_every_count_of_axes(seed):
    cases = _legal_numbers(seed) + EMPTY
    assert len({case[0] for case in cases}) > 60
    for case in cases:
        lhs, rhs, grad = _whole_numbers(case, seed)
        numbers = case[0]
        found = contractions(lhs.shape, rhs.shape, numbers)
        assert found["fwd"].dimension_numbers == numbers
        assert _run(found["fwd"], lhs, rhs).shape == grad.shape
        # A gradient is linear in grad and adjoint to the dot: <dot(x, rhs), grad> = <x, dlhs>.
        for _ in range(2):
            x, y = _whole_numbers(case, seed + 10)[:2]
            dlhs, drhs = _run(found["dlhs"], grad, rhs), _run(found["drhs"], lhs, grad)
            assert (dlhs.shape, drhs.shape) == (lhs.shape, rhs.shape)
            assert np.sum(_run(found["fwd"], x, rhs) * grad) == np.sum(x * dlhs)
            assert np.sum(_run(found["fwd"], lhs, y) * grad) == np.sum(y * drhs)


def test_dimension_numbers_agree_with_lax_and_its_gradients():
    cases = _legal_numbers()[2::6] + EMPTY
    results = []

    @quick_jit
    def both(arrays):
        for case, (lhs, rhs, grad) in zip(cases, arrays, strict=True):
            dot = functools.partial(lax.dot_general, dimension_numbers=case[0])
            out, vjp = jax.vjp(dot, lhs, rhs)
            ours = gemms(PRECISIONS["fp32"].recipe, case[0], plain)(lhs, rhs, grad)
            results.append((ours, (out, *vjp(grad))))
        return results

    for ours, expected in both([_whole_numbers(case) for case in cases]):
        jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["tensor", "row", "tile2", "block2"])
def test_dimension_numbers_of_quantized_dots_agree_with_numpy(granularity):
    cases = _legal_numbers(1)
    if granularity in ("tile2", "block2"):
        cases = [case for case in cases if _sizes_are_even(case)]
    cases = cases[1 :: len(cases) // 3] + EMPTY[1:2]
    recipe = uniform(*(Operand("int8", granularity),) * 3)

    @quick_jit
    def ours(arrays):
        return [gemms(recipe, case[0], plain)(*own) for case, own in zip(cases, arrays, strict=True)]

    arrays = [_whole_numbers(case) for case in cases]
    for case, found, own in zip(cases, ours(arrays), arrays, strict=True):
        for gemm, wanted in zip(found, oracle.dot(*own, case[0], recipe), strict=True):
            assert_close(gemm, wanted)


def _sizes_are_even(case) -> bool:
    """Whether tiles of 2 divide what they may run along, in the dot and in its gradients."""
    _, lhs, rhs = case
    fwd = contractions(lhs, rhs, case[0])["fwd"]
    groups = (lhs, fwd.first.contracting), (lhs, fwd.first.free), (rhs, fwd.second.free)
    return all(math.prod(shape[i] for i in axes) % 2 == 0 for shape, axes in groups)


@pytest.mark.parametrize(
    "numbers",
    [
        (((-1,), (0,)), ((), ())),
        (((1,), (0, 1)), ((), ())),
        (((2,), (0,)), ((), ())),
        (((1,), (1,)), ((), ())),
        (((1, 1), (0, 0)), ((), ())),
        (((1,), (0,)), ((1,), (0,))),
    ],
)
def test_illegal_dimension_numbers_raise(numbers):
    with pytest.raises(TypeError):
        lax.dot_general(jnp.ones((2, 3)), jnp.ones((3, 4)), numbers)
    with pytest.raises(ValueError, match=r"dimension_numbers .* do not fit .* \(2, 3\) and \(3, 4\)"):
        dot_general(jnp.ones((2, 3)), jnp.ones((3, 4)), numbers, "int8-row")
