"""The loss against NumPy, and what it keeps for its gradient."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from experiments.training.cross_entropy import cross_entropy

DTYPES = pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])


def drawn(dtype, rows=(3, 5), vocab=37, seed=0):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(*rows, vocab)) * 8).astype(dtype)
    return jnp.asarray(logits), jnp.asarray(rng.integers(0, vocab, rows), jnp.int32)


def value_and_gradient(loss, logits, labels):
    return jax.jit(jax.value_and_grad(lambda x: jnp.sum(loss(x, labels) * jnp.float32(0.25))))(logits)


@DTYPES
def test_loss_and_gradient_are_those_of_numpy(dtype):
    logits, labels = drawn(dtype)
    wide, chosen = np.asarray(logits, np.float64), np.asarray(labels)
    e = np.exp(wide - wide.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    one_hot = np.arange(wide.shape[-1]) == chosen[..., None]
    loss = cross_entropy(logits, labels)
    assert loss.shape == labels.shape and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, -np.log(p[one_hot]).reshape(chosen.shape), rtol=2e-6, atol=2e-6)
    total, gradient = value_and_gradient(cross_entropy, logits, labels)
    assert gradient.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(gradient, np.float64), 0.25 * (p - one_hot), rtol=eps + 4e-6, atol=1e-7)
    np.testing.assert_allclose(total, -0.25 * np.log(p[one_hot]).sum(), rtol=1e-6)


@pytest.mark.slow
@DTYPES
def test_it_is_what_automatic_differentiation_gives(dtype):
    def plain(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)

    for seed in range(5):
        logits, labels = drawn(dtype, (16, 8), 256, seed)
        loss, gradient = value_and_gradient(cross_entropy, logits, labels)
        wanted, derived = value_and_gradient(plain, logits, labels)
        np.testing.assert_array_equal(loss, wanted)
        np.testing.assert_allclose(
            np.asarray(gradient, np.float32), np.asarray(derived, np.float32), rtol=float(jnp.finfo(dtype).eps) * 2
        )


def test_rows_that_are_not_finite_stay_so():
    logits, labels = drawn(np.float32, (4,), 8)
    logits = logits.at[0, 1].set(jnp.nan).at[1, 2].set(jnp.inf).at[2].set(-jnp.inf).at[3, 3].set(-jnp.inf)
    labels = labels.at[3].set(0)
    loss, (gradient,) = (
        cross_entropy(logits, labels),
        jax.grad(lambda x: jnp.sum(cross_entropy(x, labels)), (0,))(logits),
    )
    assert np.isnan(loss[0]) and not np.isfinite(loss[1]) and not np.isfinite(loss[2]) and np.isfinite(loss[3])
    assert np.isnan(gradient[0]).any() and np.isfinite(gradient[3]).all() and gradient[3, 3] == 0


def test_it_keeps_the_logits_and_two_numbers_a_row():
    logits, labels = drawn(ml_dtypes.bfloat16)
    kept = jax.tree.leaves(jax.vjp(lambda x: cross_entropy(x, labels), logits)[1])
    assert sum(leaf.nbytes for leaf in kept) <= logits.nbytes + 3 * 4 * labels.size


def test_it_can_be_mapped():
    logits, labels = drawn(np.float32)
    np.testing.assert_array_equal(jax.vmap(cross_entropy)(logits, labels), cross_entropy(logits, labels))
    each = jax.vmap(jax.grad(lambda x, y: jnp.sum(cross_entropy(x, y))))(logits, labels)
    whole = jax.grad(lambda x: jnp.sum(cross_entropy(x, labels)))(logits)
    np.testing.assert_allclose(each, whole, rtol=1e-6)
