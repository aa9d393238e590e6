"""Recipes and data that the tests of the dot share, and its three GEMMs as one function."""

import functools

import dot_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np

from q8jax import PRECISIONS, Gemm, Operand, Recipe, dot_general

MATMUL = (((1,), (0,)), ((), ()))
DENSE = (((2,), (0,)), ((), ()))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def uniform(first: Operand | None, second: Operand | None, grad: Operand | None, **options) -> Recipe:
    """A recipe that quantizes lhs, rhs and grad alike in every GEMM."""
    return Recipe(Gemm(first, second), Gemm(grad, second), Gemm(first, grad), **options)


# Compiles twice as fast; what is timed and trained with is also tested as users compile it.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def gemms(recipe: Recipe, dimension_numbers=DENSE, jit=quick_jit):
    """A function of (lhs, rhs, grad, scale, key) that gives (out, dlhs, drhs)."""
    return _gemms(recipe, dimension_numbers, jit)


@functools.cache
def _gemms(recipe, dimension_numbers, jit):
    def three(lhs, rhs, grad, scale=None, key=None):
        dot = lambda lhs, rhs: dot_general(lhs, rhs, dimension_numbers, recipe, scale, key=key)
        out, vjp = jax.vjp(dot, lhs, rhs)
        return (out, *vjp(grad))

    return jit(three)


def plain(function):
    return function


def stacked(recipe: Recipe, scales: dict) -> jax.Array:
    return jnp.array([scales[slot.tensor, slot.qtype] for slot in recipe.slots], jnp.float32)


def assert_close(found, wanted: oracle.Product, what: str = "") -> None:
    """Equal but for the order of float32 sums, which `slack` bounds; NaN and Inf in their places."""
    found, value = np.asarray(found, np.float64), wanted.value.astype(np.float64)
    assert found.shape == value.shape
    np.testing.assert_array_equal(np.where(np.isfinite(found), 0, found), np.where(np.isfinite(value), 0, value), what)
    finite = np.isfinite(value)
    excess = np.abs(found[finite] - value[finite]) - wanted.slack[finite]
    assert excess.max(initial=0) <= 0, f"{what}: {excess.max()} off"


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """lhs [2, 32, 96], rhs [96, 64] and grad [2, 32, 64] for DENSE."""
    return normal(0, 2, 32, 96), normal(1, 96, 64), normal(2, 2, 32, 64)


# Every preset, and formats and settings that no preset has.
RECIPES = {
    **{name: precision.recipe for name, precision in PRECISIONS.items()},
    "fp8-block": Recipe.parse(str(PRECISIONS["fp8-block"].recipe).replace("128", "32")),
    "fp6": uniform(*map(Operand, ("e2m3fn", "e2m3fn", "e3m2fn"))),
    "fp4": uniform(*(Operand("e2m1fn", "tile32"),) * 3, scales="e8m0"),
    "int4": uniform(*(Operand("int4", "row"),) * 3),
    "int2": uniform(*(Operand("int2", "row"),) * 3),
    "fnuz": uniform(*map(Operand, ("e4m3fnuz", "e4m3b11fnuz", "e5m2fnuz"))),
    "ieee": uniform(*map(Operand, ("e4m3", "e3m4", "e5m2")), margin=3),
    "int8 × fp8": uniform(Operand("int8", "row"), Operand("e4m3fn"), Operand("e5m2")),
    "block × row": uniform(*(Operand("int8", word) for word in ("block32", "row", "tile16"))),
    "tiles of 16 × 24": Recipe(Gemm(Operand("int8", "tile16"), Operand("e4m3fn", "tile24"))),
    "weight-only": Recipe(Gemm(None, Operand("int8", "row")), Gemm(None, Operand("int8", "row"))),
    "weight-only int4 tiles": Recipe(Gemm(None, Operand("int4", "tile32")), compute="float32"),
    "activation-only": uniform(Operand("e4m3fn"), None, None, scales="power_of_two"),
    "forward-only": Recipe(Gemm(Operand("int8"), Operand("int8")), compute="float16"),
    "gradient-only": Recipe(dlhs=Gemm(Operand("e5m2"), None), drhs=Gemm(None, Operand("e5m2")), compute="float32"),
    "static": uniform(*(Operand("int8", scaling="static"),) * 3),
}
