"""Maxima of tensors whose last reduction is put off: NaN and Inf are kept, whatever the shapes."""

import chex
import jax
import jax.numpy as jnp
import pytest

from q8jax import maxima

TENSORS = {
    "matrix": (jnp.float32([[1, -3], [2, 0]]), 3.0),
    "vector": (jnp.bfloat16([-5, 4]), 5.0),
    "scalar": (jnp.float32(-2), 2.0),
    "empty": (jnp.zeros((0, 3)), 0.0),
    "no columns": (jnp.zeros((3, 0)), 0.0),
    "NaN": (jnp.float32([[4, 1], [jnp.nan, jnp.inf]]), jnp.nan),
    "Inf": (jnp.float32([[[-jnp.inf, 5]], [[1, 1]]]), jnp.inf),
}
EXPECTED = jnp.float32([largest for _, largest in TENSORS.values()])


def test_those_of_tensors_of_all_shapes_are_joined():
    tensors = [x for x, _ in TENSORS.values()]
    finish = jax.jit(lambda find: maxima.joined([find(x) for x in tensors]), static_argnums=0)
    chex.assert_trees_all_equal(finish(maxima.amax), EXPECTED)
    chex.assert_trees_all_equal(finish(maxima.amax_of_rows), EXPECTED)
    assert maxima.joined([]).shape == (0,)


@pytest.mark.parametrize("name", ["matrix", "NaN"])
def test_each_example_of_a_batch_has_its_own(name):
    x, _ = TENSORS[name]
    found = jax.jit(jax.vmap(lambda row: maxima.joined([maxima.amax_of_rows(row)])))(x)
    chex.assert_trees_all_equal(found, jnp.max(jnp.abs(x), axis=1, keepdims=True))
