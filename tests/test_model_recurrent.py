"""The LSTM tagger against a NumPy LSTM and the unrolled loop, and that it learns in every precision."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from classifying import loss_fn, train
from flax import nnx
from micro import quick_compiles  # noqa: F401

import q8jax
import q8jax.nnx as qnnx
from experiments.models.recurrent import RecurrentConfig, Tagger
from q8jax.policy import Policy
from q8jax.recipe import GEMMS

SMALL = RecurrentConfig(vocab=12, classes=3, d_model=16, hidden=16, layers=1)


def build(policy: str, config: RecurrentConfig = SMALL) -> Tagger:
    dtype = jnp.float32 if "fp32" in policy else jnp.bfloat16
    return Tagger(config, Policy.parse(policy), dtype, rngs=nnx.Rngs(0))


def quantized(recipe: str) -> str:
    return recipe if recipe == "fp32" else f"layers/.*->{recipe};head->bf16"


def tokens_of(step: int, rows: int = 32, length: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and for each whether fewer, as many or more are even before it than are odd after it."""
    tokens = np.random.default_rng(step).integers(0, SMALL.vocab, (rows, length))
    even = np.cumsum(tokens % 2 == 0, axis=1) - (tokens % 2 == 0)
    odd = np.cumsum((tokens % 2)[:, ::-1], axis=1)[:, ::-1] - tokens % 2
    return tokens.astype(np.int32), (1 + np.sign(even - odd)).astype(np.int32)


run = nnx.jit(lambda model, *args: model(*args))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_lstm(x, kernel, bias, recurrent):
    """[T, I] to [T, H], one row and one direction in float64."""
    hidden = recurrent.shape[0]
    h, c, states = np.zeros(hidden), np.zeros(hidden), []
    for at in x:
        take, keep, new, show = np.split(at @ kernel + bias + h @ recurrent, 4)
        c = sigmoid(keep) * c + sigmoid(take) * np.tanh(new)
        h = sigmoid(show) * np.tanh(c)
        states.append(h)
    return np.array(states)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_it_is_the_lstm_of_numpy_also_where_rows_are_padded(bidirectional):
    config = RecurrentConfig(vocab=12, classes=3, d_model=6, hidden=4, layers=2, bidirectional=bidirectional)
    model = build("fp32", config)
    tokens, lengths = tokens_of(0, 3, 7)[0], (7, 4, 1)
    valid = np.arange(7)[None] < np.array(lengths)[:, None]
    found = run(model, tokens, valid)
    assert found.dtype == jnp.float32
    wide = lambda variable: np.asarray(variable[...], np.float64)
    for row, length in enumerate(lengths):
        x = wide(model.embedding.embedding)[tokens[row, :length]]
        for layer in model.layers:
            kernels = np.split(wide(layer.inputs.kernel), config.directions, axis=1)
            biases = np.split(wide(layer.inputs.bias), config.directions)
            both = list(zip(kernels, biases, wide(layer.recurrent.kernel), strict=True))
            states = [numpy_lstm(x, *both[0])]
            states += [numpy_lstm(x[::-1], *own)[::-1] for own in both[1:]]
            x = np.concatenate(states, axis=1)
        wanted = x @ wide(model.head.kernel) + wide(model.head.bias)
        np.testing.assert_allclose(found[row, :length], wanted, atol=1e-5)
    if bidirectional:
        assert np.abs(run(model, tokens)[1, :4] - found[1, :4]).max() > 1e-3


def unrolled(model: Tagger, tokens):
    """The model with a loop in Python over tokens and no `scan`, each direction turned by hand."""
    x = model.embedding(tokens)
    for layer in model.layers:
        gates = layer.inputs(x).reshape(*tokens.shape, 2, -1)
        h = jnp.zeros((2, tokens.shape[0], SMALL.hidden), x.dtype)
        c, forward, backward = h.astype(jnp.float32), [], []
        for t in range(tokens.shape[1]):
            own = jnp.stack([gates[:, t, 0], gates[:, -1 - t, 1]]).astype(jnp.float32)
            take, keep, new, show = jnp.split(own + layer.recurrent(h).astype(jnp.float32), 4, axis=-1)
            c = nnx.sigmoid(keep) * c + nnx.sigmoid(take) * jnp.tanh(new)
            h = (nnx.sigmoid(show) * jnp.tanh(c)).astype(x.dtype)
            forward.append(h[0])
            backward.insert(0, h[1])
        x = jnp.concatenate([jnp.stack(forward, 1), jnp.stack(backward, 1)], axis=-1)
    return model.head(x).astype(jnp.float32)


@pytest.mark.slow
def test_what_a_scan_observes_is_the_largest_of_all_tokens():
    """The scaling state is that of the unrolled loop, in which each token is a use of the layer of its own."""
    models = [build("layers/.*->fp8/history=2/scales=float32;head->bf16") for _ in range(2)]
    losses = [
        lambda model, tokens, labels: loss_fn(model, tokens, labels)[0],
        lambda model, tokens, labels: loss_fn(functools.partial(unrolled, model), tokens, labels)[0],
    ]
    for step in range(2):
        tokens, labels = tokens_of(step, 4, 3)
        for model, loss in zip(models, losses, strict=True):
            _, _, amaxes = qnnx.value_and_grad(loss)(model, tokens, labels)
            qnnx.update_scaling(model, amaxes)
    found, wanted = (
        {path: (state.scale, state.history) for path, state in qnnx.scaling_states(model).items()} for model in models
    )
    chex.assert_trees_all_close(found, wanted, rtol=1e-6)
    assert all((history > 0).all() for _, history in found.values())


@pytest.mark.slow
def test_the_audit_finds_both_products_of_a_layer_and_how_often():
    model = build(quantized("fp8"))
    graphdef, state = nnx.split(model)
    differentiate = qnnx.value_and_grad(loss_fn, has_aux=True)
    step = lambda state, *batch: differentiate(nnx.merge(graphdef, state), *batch)
    report = q8jax.audit(jax.jit(step).lower(state, *tokens_of(0, 4, 5)))
    for path, times in (("layers/0/inputs", 1), ("layers/0/recurrent", 5)):
        for role in GEMMS:
            found = [gemm for gemm in report.gemms if (gemm.path, gemm.role) == (path, role)]
            assert sum(gemm.times for gemm in found) == times, (path, role)
            assert {gemm.asked for gemm in found} == {q8jax.Recipe.parse("fp8").formats(role)}
    assert report.ok


@functools.cache
def trained(recipe: str, steps: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Losses and accuracies, each step's on tokens that it has not seen."""
    return train(build(quantized(recipe)), tokens_of, steps)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp32", "fp8", "int8"])
def test_it_learns(recipe):
    losses, accuracies = trained(recipe)
    assert accuracies[0] < 0.6 and accuracies[-5:].mean() > 0.9, accuracies
    assert np.isfinite(losses).all() and losses[-5:].mean() < 0.5 * losses[0]


@pytest.mark.slow
def test_quantization_is_seen_and_is_small():
    losses = {recipe: trained(recipe)[0] for recipe in ("fp32", "fp8", "int8")}
    for recipe in ("fp8", "int8"):
        first = abs(losses[recipe][0] / losses["fp32"][0] - 1)
        assert 1e-5 < first < 0.02 and (losses[recipe] != losses["fp32"]).all()


def test_sizes_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="layers=0 must be at least 1"):
        RecurrentConfig(vocab=2, classes=2, layers=0)
