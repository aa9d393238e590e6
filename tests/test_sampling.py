"""What is drawn from logits, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import quick_compiles  # noqa: F401

from experiments.generating.sampling import Sampling, request_keys, sample, token_keys

VOCAB, DRAWS = 12, 4000
LOGITS = np.random.default_rng(3).normal(size=VOCAB).astype(np.float32) * 2
KEYS = request_keys(0, jnp.arange(DRAWS, dtype=jnp.uint32))


def expected(temperature, top_k, top_p):
    """Probabilities of the tokens, float64 [V]."""
    order = np.argsort(-LOGITS, kind="stable")
    kept = order[:top_k] if top_k else order
    shares = np.exp(np.float64(LOGITS[kept]) / temperature)
    shares /= shares.sum()
    number = next(n for n in range(1, len(kept) + 1) if shares[:n].sum() >= top_p - 1e-12)
    found = np.zeros(VOCAB)
    found[kept[:number]] = shares[:number] / shares[:number].sum()
    return found


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (0.7, 0, 0.8), (1.5, 6, 0.6), (1.0, 0, 1e-6), (1.0, 99, 1.0)],
)
def test_tokens_are_drawn_as_often_as_in_numpy(temperature, top_k, top_p):
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (DRAWS, VOCAB))
    found = np.asarray(jax.jit(sample, static_argnums=2)(logits, KEYS, Sampling(temperature, top_k, top_p)))
    assert found.dtype == np.int32
    shares = expected(temperature, top_k, top_p)
    counts = np.bincount(found, minlength=VOCAB)
    assert not counts[shares == 0].any()
    # Five standard deviations of a binomial.
    np.testing.assert_array_less(
        np.abs(counts - DRAWS * shares), 5 * np.sqrt(DRAWS * shares * (1 - shares)) + 1e-3 + (shares == 0)
    )


def test_at_temperature_zero_the_most_likely_token_is_taken():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, VOCAB)), jnp.float32)
    greedy = sample(logits, KEYS[:5], Sampling(temperature=0, top_k=4, top_p=0.5))
    np.testing.assert_array_equal(greedy, np.argmax(logits, axis=1))


def test_a_row_draws_by_its_own_key_alone():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, VOCAB)), jnp.float32)
    sampling = Sampling(top_p=0.9)
    first = sample(logits, KEYS[:3], sampling)
    other = sample(logits.at[1].set(0), KEYS[jnp.array([0, 9, 2])], sampling)
    np.testing.assert_array_equal(first[jnp.array([0, 2])], other[jnp.array([0, 2])])
    drawn = [tuple(np.asarray(sample(logits, token_keys(KEYS[:3], jnp.int32(n)), sampling))) for n in range(20)]
    assert len(set(drawn)) > 5


def test_keys_of_requests_differ_and_come_back_with_the_seed():
    data = lambda seed, requests: np.asarray(jax.random.key_data(request_keys(seed, jnp.array(requests, jnp.uint32))))
    np.testing.assert_array_equal(data(0, [4, 7])[1], data(0, [7])[0])
    assert len({tuple(row) for row in (*data(0, range(8)), *data(1, range(8)))}) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "--temperature=-1.0 must be finite and at least 0"),
        ({"temperature": float("nan")}, "--temperature=nan must be finite"),
        ({"top_k": -1}, "--top_k=-1 must be at least 1, or 0 for all"),
        ({"top_p": 0.0}, "--top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "--top_p=1.5 must be above 0 and at most 1"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
