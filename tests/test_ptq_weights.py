"""GPTQ, clipping, activation-aware scaling and bias correction, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptq_oracle import affine_step, correlated, integer_step, obq, round_symmetric

from q8jax import ptq
from q8jax.codebook import normal_float
from q8jax.ptq import Target

NF4 = tuple(np.asarray(normal_float(4)).tolist())
INT4 = Target("int4", "group", 8)
UINT4 = Target("uint4", "group", 8, is_affine=True)
IN, OUT = 32, 12


def weights(seed=0, shape=(IN, OUT)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounded(target, w):
    return jax.jit(target.quantize)(jnp.asarray(w))


def gram_of(x):
    return np.asarray(x, np.float64).T @ np.asarray(x, np.float64)


def error(gram, w, values):
    difference = np.asarray(w, np.float64) - np.asarray(values, np.float64)
    return float(np.sum(difference * (gram @ difference)))


GRAM = gram_of(correlated(96, IN))


def run(w=None, gram=GRAM, target=INT4, **options):
    w = weights() if w is None else w
    return ptq.gptq(jnp.asarray(w), jnp.asarray(gram, jnp.float32), target, **options)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_optimal_brain_quantization_in_order(act_order):
    order = np.argsort(-np.diagonal(GRAM), kind="stable") if act_order else None
    symmetric = obq(
        *(weights(), GRAM, 0.01, lambda w: integer_step(w, 7), lambda w, step: round_symmetric(w, step, 7), 8, order)
    )
    got = run(act_order=act_order)
    assert (got.qtype, got.scale.shape, got.zero_point) == ("int4", (IN // 8, OUT), None)
    np.testing.assert_allclose(got.check().dequantize(), symmetric, atol=2e-5)

    def round_affine(w, parameters):
        step, zero = parameters
        return (np.clip(np.rint(w / step) + zero, 0, 15) - zero) * step

    affine = obq(weights(), GRAM, 0.01, lambda w: affine_step(w, 15), round_affine, 8, order)
    np.testing.assert_allclose(run(target=UINT4, act_order=act_order).check().dequantize(), affine, atol=2e-5)


def test_gptq_in_blocks_is_gptq_row_by_row():
    # 256 rows in two blocks, and a scale of each channel that is found before the first.
    w, gram = weights(1, (256, 4)), gram_of(correlated(600, 256, seed=1, rank=16, noise=0.5))
    step = integer_step(w, 127)
    expected = obq(w, gram, 0.01, lambda _: step, lambda w, step: round_symmetric(w, step, 127), 256)
    got = np.asarray(run(w, gram, Target("int8", "channel")).dequantize())
    # A correction that crosses a tie in float32 alone moves one step, and what follows a little.
    assert np.mean(np.abs(got - expected) < 1e-5) > 0.97
    assert error(gram, w, got) == pytest.approx(error(gram, w, expected), rel=0.02)


@pytest.mark.parametrize(
    "target",
    [
        INT4,
        UINT4,
        Target("e4m3fn", "channel"),
        Target("e2m1fn", "group", 16, scale_format="e8m0"),
        Target("uint4", "group", 8, codebook=NF4),
    ],
    ids=lambda target: f"{target.qtype}-{target.granularity}",
)
def test_gptq_at_least_halves_the_squared_error_of_rounding(target):
    w = weights()
    plain, got = rounded(target, w), run(w, target=target)
    got.check()
    assert got.scale.dtype == plain.scale.dtype and got.scale.shape == plain.scale.shape
    assert 0 < error(GRAM, w, got.dequantize()) < 0.5 * error(GRAM, w, plain.dequantize())


@pytest.mark.parametrize("target", [INT4, UINT4, Target("e4m3fn", "channel")], ids=lambda target: target.qtype)
def test_gptq_of_unrelated_inputs_is_rounding(target):
    w = weights()
    plain = rounded(target, w)
    for act_order in (False, True)[: 1 + target.is_affine]:
        got = run(w, np.diag(np.linspace(1, 9, IN)), target, act_order=act_order)
        np.testing.assert_array_equal(np.asarray(got.dequantize()), np.asarray(plain.dequantize()))


def test_gptq_takes_a_singular_gram_matrix():
    w = weights()
    plain = rounded(INT4, w).dequantize()
    one_row = correlated(1, IN)
    twins = correlated(96, IN)
    twins[:, 1::2] = twins[:, ::2]
    for gram in (gram_of(one_row), gram_of(twins), 1e-20 * GRAM, 1e20 * GRAM):
        for damping in (0.0, 0.01):
            got = run(w, gram, damping=damping).check()
            assert error(gram, w, got.dequantize()) < 0.5 * error(gram, w, plain)
    np.testing.assert_array_equal(run(w, np.zeros((IN, IN))).dequantize(), plain)


def test_gptq_rounds_channels_that_were_never_seen():
    gram = GRAM.copy()
    gram[:8] = gram[:, :8] = 0
    w = weights()
    got, plain = run(w, gram).dequantize(), rounded(INT4, w).dequantize()
    np.testing.assert_array_equal(got[:8], plain[:8])
    assert not np.array_equal(got[8:], plain[8:])


def test_gptq_hides_nothing_that_is_not_finite():
    w = weights()
    clean = np.asarray(run(w).dequantize())
    w[3, 5] = np.nan
    got = np.asarray(run(w).dequantize())
    # The scale of its group is NaN; other columns do not know.
    assert np.isnan(got[:8, 5]).all() and np.isfinite(np.delete(got, 5, axis=1)).all()
    assert np.isfinite(got[8:, 5]).all()
    np.testing.assert_array_equal(np.delete(got, 5, axis=1), np.delete(clean, 5, axis=1))
    w[3, 5] = np.inf
    got = np.asarray(run(w).dequantize())
    assert np.isfinite(got).all() and got[3, 5] == got[:8, 5].max()
    broken = GRAM.copy()
    broken[0, 0] = np.nan
    for target in (INT4, Target("e4m3fn", "channel")):
        assert np.isnan(run(weights(), broken, target).dequantize()).all()


def test_gptq_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="gram of weights"):
        run(gram=GRAM[:4, :4])
    with pytest.raises(ValueError, match="Expected a floating-point matrix"):
        run(w=weights()[0])
    with pytest.raises(ValueError, match="a tile of 5 does not divide axis 0 of size 32"):
        run(target=Target("int4", "group", 5))


def test_gptq_uses_the_scales_that_clipping_found():
    w = weights()
    clipped = ptq.clip(jnp.asarray(w), UINT4)
    got = run(w, target=UINT4, scale=clipped.scale, zero_point=clipped.zero_point)
    np.testing.assert_array_equal(got.scale, clipped.scale)
    assert error(GRAM, w, got.dequantize()) < 0.5 * error(GRAM, w, clipped.dequantize())


@pytest.mark.parametrize("weighted", [False, True])
def test_clipping_is_the_best_of_its_grid(weighted):
    w = weights(2)
    importance = np.linspace(0.1, 4, IN) if weighted else np.ones(IN)
    shrinks = (1.0, 0.9, 0.75, 0.6, 0.5)
    given = jnp.asarray(importance, jnp.float32) if weighted else None
    got = ptq.clip(jnp.asarray(w), INT4, given, shrinks).check()
    expected = np.zeros(w.shape)
    for start in range(0, IN, 8):
        for column in range(OUT):
            part, part_importance = w[start : start + 8, column].astype(np.float64), importance[start : start + 8]
            tried = [round_symmetric(part, np.abs(part).max() * s / 7, 7) for s in shrinks]
            losses = [np.sum(part_importance * (part - values) ** 2) for values in tried]
            expected[start : start + 8, column] = tried[int(np.argmin(losses))]
    np.testing.assert_allclose(got.dequantize(), expected, atol=1e-5)
    assert np.mean(np.asarray(got.scale) < 0.95 * np.asarray(rounded(INT4, w).scale)) > 0.03


def test_clipping_keeps_what_it_cannot_improve():
    w = weights()
    w[:, 0] = 0
    w[1, 1] = np.nan
    for target in (UINT4, Target("e2m1fn", "channel", scale_format="e8m0")):
        plain, got = rounded(target, w), ptq.clip(jnp.asarray(w), target)
        assert got.scale.dtype == plain.scale.dtype
        np.testing.assert_array_equal(got.dequantize()[:, 0], 0)
        np.testing.assert_array_equal(np.isnan(got.dequantize()), np.isnan(plain.dequantize()))
    whole = ptq.clip(jnp.asarray(w), target, shrinks=(1.0,))
    np.testing.assert_array_equal(whole.dequantize(), plain.dequantize())


def test_scaling_factors_are_powers_of_the_mean_magnitude():
    magnitude = np.array([0.5, 0.0, 2.0, 8.0], np.float32)
    got = ptq.scaling_factors(jnp.asarray(magnitude), 0.5)
    np.testing.assert_allclose(got, [0.5, 1, 1, 2], rtol=1e-6)
    np.testing.assert_array_equal(ptq.scaling_factors(jnp.asarray(magnitude), 0), 1)
    np.testing.assert_array_equal(ptq.scaling_factors(jnp.zeros(3, jnp.float32), 1.0), 1)
    rounded = np.asarray(ptq.scaling_factors(jnp.asarray(magnitude), 0.7, power_of_two=True))
    np.testing.assert_array_equal(np.frexp(rounded)[0], 0.5)


def test_scaling_search_finds_the_least_error_of_its_grid():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((200, IN)) * np.where(np.arange(IN) % 8 == 0, 20.0, 1.0)
    w, gram, magnitude = weights(), gram_of(x), np.abs(x).mean(0)
    strengths = (0.0, 0.25, 0.5, 0.75, 1.0)
    arguments = (jnp.asarray(w), jnp.asarray(gram, jnp.float32), jnp.asarray(magnitude, jnp.float32), INT4)
    got = ptq.search_scaling(*arguments, strengths=strengths)
    losses = []
    for strength in strengths:
        s = (magnitude / np.sqrt(magnitude.max() * magnitude.min()))[:, None] ** strength
        groups = (s * w).reshape(-1, 8, OUT)
        values = round_symmetric(groups, integer_step(groups, 7, axis=1), 7).reshape(w.shape) / s
        losses.append(error(gram, w, values))
    assert float(got.strength) == strengths[int(np.argmin(losses))] > 0
    np.testing.assert_allclose([got.error, got.unscaled_error], [min(losses), losses[0]], rtol=1e-3)
    assert float(got.error) < 0.5 * float(got.unscaled_error)
    scaled = rounded(INT4, ptq.smooth_weights(jnp.asarray(w), got.factors)).dequantize() / got.factors[:, None]
    assert error(gram, w, scaled) == pytest.approx(float(got.error), rel=1e-3)


def test_bias_correction_restores_the_mean_output():
    x = correlated(64, IN) + np.float32(1)
    w = weights()
    q = rounded(Target("int2", "channel"), w)
    seen = ptq.inputs.update(ptq.inputs.init(IN), jnp.asarray(x))
    correction = np.asarray(ptq.bias_correction(jnp.asarray(w), q, seen.mean))
    exact, approximate = x.astype(np.float64) @ w, x.astype(np.float64) @ np.asarray(q.dequantize())
    shift = (exact - approximate).mean(0)
    np.testing.assert_allclose(correction, shift, atol=1e-4)
    assert np.abs(shift).max() > 0.1
    np.testing.assert_array_equal(ptq.bias_correction(jnp.asarray(w), jnp.asarray(w), seen.mean), 0)
