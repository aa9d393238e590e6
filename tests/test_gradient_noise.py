"""What a recipe adds to the noise of a gradient, against NumPy."""

import jax
import numpy as np
import pytest
from flax import nnx
from micro import make_tokens, make_trainer, quick_compiles  # noqa: F401

from experiments.training import gradient_noise

STEPS = 2


@pytest.fixture(scope="module")
def trained():
    plain = make_trainer("bf16")
    state = jax.jit(plain.init)()
    step = jax.jit(plain.step)
    for tokens in map(make_tokens, range(STEPS)):
        state, _ = step(state, tokens)
    return plain, state


def gradients_of(own, state, batches):
    """Of each batch the loss, and the gradient weighted as AdamW weighs its first moment, one flat float64 vector."""
    state = own.enter(state, own.phase_state())

    @jax.jit
    def gradients(tokens):
        calibrated = {**state, "dots": own.calibrate(state, tokens)} if own.keeps_scales else state
        loss, found, _ = own.gradients(own.model(calibrated), calibrated, tokens)
        return loss, nnx.to_pure_dict(found)

    (moments,) = (
        x.nu for x in jax.tree.leaves(state["optimizer"], is_leaf=lambda x: hasattr(x, "nu")) if hasattr(x, "nu")
    )
    for tokens in batches:
        loss, found = gradients(tokens)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(moments), strict=True)
        vectors = [np.ravel(np.float64(g) / (np.sqrt(np.float64(v)) + 1e-8)) for g, v in pairs]
        yield float(loss), np.concatenate(vectors)


@pytest.mark.slow
def test_noise_is_the_variance_over_batches(trained):
    plain, state = trained
    fp8 = make_trainer("fp8")
    chosen = [make_tokens(index) for index in range(10, 15)]
    scale, found = gradient_noise.measure(plain, {"fp8": fp8, "same": plain}, state, chosen)
    base = list(gradients_of(plain, state, chosen))
    other = list(gradients_of(fp8, state, chosen))
    variance = lambda vectors: np.sum(np.var(vectors, axis=0, ddof=1))
    g = np.stack([vector for _, vector in base])
    d = np.stack([vector for _, vector in other]) - g
    signal = np.sum(g.mean(0) ** 2) - variance(g) / len(g)
    assert scale == pytest.approx(variance(g) / signal, rel=1e-3)
    noise = found["fp8"]
    assert noise.noise == pytest.approx(variance(d) / variance(g), rel=1e-3) and 1e-4 < noise.noise < 0.3
    assert noise.bias == pytest.approx(
        max(np.sum(d.mean(0) ** 2) - variance(d) / len(d), 0) / signal, rel=1e-2, abs=1e-5
    )
    changes = [after - before for (after, _), (before, _) in zip(other, base, strict=True)]
    assert noise.loss_change == pytest.approx(np.mean(changes), rel=1e-3, abs=1e-7)
    assert noise.loss_change_error == pytest.approx(np.std(changes, ddof=1) / 5**0.5, rel=1e-3, abs=1e-7)
    # The error of a ratio of means, by leaving out one batch at a time.
    index = np.arange(len(g))
    left_out = [np.mean(np.sum(d[index != i] ** 2, 1)) / np.mean(np.sum(g[index != i] ** 2, 1)) for i in index]
    jackknife = np.sqrt(4 / 5 * np.sum(np.square(np.subtract(left_out, np.mean(left_out)))))
    assert noise.noise_error == pytest.approx(jackknife, rel=0.25)
    assert found["same"] == gradient_noise.Noise(0.0, 0.0, 0.0, 0.0, 0.0)


def test_a_mean_that_the_batches_do_not_show_is_not_made_up():
    scatter = gradient_noise._Scatter()
    for sign in (1, -1):
        scatter.see(np.float32(0), {"w": np.float32([sign, 0])})
    assert scatter.variance == 2 and scatter.mean_squared == -1
