"""Products of codes that are there already, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dot_cases import MATMUL, normal, quick_jit

from q8jax import codebook, dot_general, einsum, quantize
from q8jax.codes import code_sums
from q8jax.qarray import QArray
from q8jax.stored import STORED_SCALES, Stored, round_scale

K, N, ROWS, GROUP = 96, 40, 24, 16
CHANNEL = {"channelwise_axes": (1,)}
GROUPS = {"channelwise_axes": (1,), "tiled_axes": {0: GROUP}}
EXACT = {"scale_format": "power_of_two"}


@functools.cache
def weights() -> jax.Array:
    return jnp.asarray(normal(1, K, N))


@functools.cache
def inputs() -> jax.Array:
    return jnp.asarray(normal(0, ROWS, K) + np.float32(0.5))


def two_levels() -> QArray:
    scale = round_scale(quantize(weights(), "e2m1fn", **GROUPS).scale, "e4m3")
    return quantize(weights(), "e2m1fn", scale=scale)


def binary() -> QArray:
    scale = jnp.mean(jnp.abs(weights()), 0, keepdims=True)
    return quantize(weights(), "uint4", scale=scale, codebook=jnp.array([-1, 1], jnp.float32))


RIGHT = {
    name: functools.cache(make)
    for name, make in {
        "int8 channel": lambda: quantize(weights(), "int8", **CHANNEL),
        "int8 tensor": lambda: quantize(weights(), "int8", **EXACT),
        "int8 affine": lambda: quantize(weights(), "int8", calibration="minmax", **CHANNEL, **EXACT),
        "uint8 affine": lambda: quantize(weights(), "uint8", calibration="minmax", **CHANNEL, **EXACT),
        "uint8 affine groups": lambda: quantize(weights(), "uint8", calibration="minmax", **GROUPS),
        "int4 channel": lambda: quantize(weights(), "int4", **CHANNEL, **EXACT),
        "int4 groups": lambda: quantize(weights(), "int4", **GROUPS),
        "uint4 affine groups": lambda: quantize(weights(), "uint4", calibration="minmax", **GROUPS),
        "int2 channel": lambda: quantize(weights(), "int2", **CHANNEL, **EXACT),
        "e4m3 channel": lambda: quantize(weights(), "e4m3fn", **CHANNEL),
        "e5m2 tensor": lambda: quantize(weights(), "e5m2"),
        "e3m4 groups": lambda: quantize(weights(), "e3m4", **GROUPS),
        "fp4 two levels": two_levels,
        "fp4 e8m0": lambda: quantize(weights(), "e2m1fn", scale_format="e8m0", **GROUPS),
        "nf4 groups": lambda: quantize(weights(), "uint4", codebook=codebook.normal_float(), **GROUPS),
        "fitted": lambda: quantize(weights(), "uint4", codebook=codebook.fit_codebook(weights(), 3)[0], scale=1),
        "binary": binary,
    }.items()
}
FLOAT32 = "compute=float32"
LEFT = {
    "wide": ("fwd=none,none/" + FLOAT32, None),
    "int8 by row": ("fwd=int8:row,none/scales=power_of_two/" + FLOAT32, None),
    "e4m3": ("fwd=e4m3fn:tensor,none/" + FLOAT32, None),
    "int8 in tiles": ("fwd=int8:tile16,none/" + FLOAT32, None),
    "int8 static": ("fwd=int8:tensor:static,none/" + FLOAT32, jnp.array([0.03125], jnp.float32)),
}


def rounded(x: jax.Array, recipe: str) -> jax.Array:
    """What the recipe makes of a left operand, by `quantize`."""
    word = recipe.split("=")[1].split(",")[0].split(":")
    if word[0] == "none":
        return x
    options = {"row": {"channelwise_axes": (0,)}, "tile16": {"channelwise_axes": (0,), "tiled_axes": {1: 16}}}
    if "static" in word:
        return quantize(x, word[0], scale=0.03125).dequantize()
    scales = {"scale_format": "power_of_two"} if "power_of_two" in recipe else {}
    return quantize(x, word[0], **options.get(word[1], {}), **scales).dequantize()


def check(found, left, right, *, exact: bool = False) -> None:
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    wanted = left @ right
    if exact:
        np.testing.assert_array_equal(found, wanted.astype(np.float32))
    else:
        # Of float32 sums of K + 3 roundings.
        slack = (K + 3) * 2.0**-24 * (np.abs(left) @ np.abs(right))
        assert np.all(np.abs(np.asarray(found, np.float64) - wanted) <= slack)


# Each right operand with one left one; the rest take longer.
PAIRS = [(("wide", "int8 by row")[i % 2], right) for i, right in enumerate(RIGHT)]
LONG_PAIRS = [
    *((("int8 by row", "wide")[i % 2], right) for i, right in enumerate(RIGHT)),
    *(
        ("e4m3", right)
        for right in ("int8 channel", "e4m3 channel", "e3m4 groups", "fp4 two levels", "uint8 affine groups")
    ),
    *(("int8 in tiles", right) for right in ("int8 channel", "nf4 groups", "uint8 affine groups")),
    *(("int8 static", right) for right in ("int8 tensor", "uint8 affine", "int4 groups")),
]
PAIRS += [pytest.param(*pair, marks=pytest.mark.slow) for pair in LONG_PAIRS]


@pytest.mark.parametrize("left, right", PAIRS)
def test_each_pair_multiplies_its_values(left, right):
    recipe, scale = LEFT[left]
    codes = RIGHT[right]()
    found = quick_jit(lambda x, codes: dot_general(x, codes, MATMUL, recipe, scale))(inputs(), codes)
    exact = left in ("int8 by row", "int8 static") and right in (
        "int8 tensor",
        "int8 affine",
        "uint8 affine",
        "int4 channel",
        "int2 channel",
    )
    check(found, rounded(inputs(), recipe), codes.dequantize(), exact=exact)
    # Not by accident the product of what was never rounded.
    plain = np.asarray(inputs()) @ np.asarray(weights())
    assert np.linalg.norm(found - plain) > 1e-3 * np.linalg.norm(plain)


@pytest.mark.parametrize(
    "qtype, right",
    [("int8", name) for name in RIGHT if name.startswith(("int8", "uint"))] + [("uint8", "int4 channel")],
)
def test_a_left_operand_has_a_zero_point(qtype, right):
    codes, x = RIGHT[right](), quantize(inputs(), qtype, calibration="minmax", **EXACT)
    assert int(jnp.max(jnp.abs(x.zero_point))) > 0
    dot = lambda x, codes: dot_general(x, codes, MATMUL, "fp32")
    found = quick_jit(dot)(x, codes)
    exact = right in ("int8 tensor", "int8 affine", "uint8 affine", "int4 channel", "int2 channel")
    check(found, x.dequantize(), codes.dequantize(), exact=exact)
    stored = Stored.of(codes).with_sums()
    assert (stored.sums is None) == ("groups" in right)
    np.testing.assert_array_equal(quick_jit(dot)(x, stored), found)
    if stored.sums is not None:
        wide = np.asarray(codes.qvalue).astype(np.int64)
        if codes.qtype == "uint8":
            wide -= 128
        np.testing.assert_array_equal(code_sums(codes), wide.sum(0, keepdims=True))


@pytest.mark.parametrize("right", [name for name in RIGHT if name[:5] not in ("int8 ", "e4m3 ", "e5m2 ")])
def test_stored_is_the_same_array_and_gives_the_same_products(right):
    codes = RIGHT[right]()
    scales = {"fp4 two levels": "e4m3", "fp4 e8m0": "e8m0"}.get(right, "float32")
    stored = Stored.of(codes, scales=scales)
    back = stored.array
    assert back.qtype == codes.qtype and stored.shape == codes.shape
    for name in ("qvalue", "scale", "zero_point", "codebook"):
        one, other = getattr(back, name), getattr(codes, name)
        assert (one is None) == (other is None)
        if one is not None and name != "scale":
            assert one.dtype == other.dtype
        if one is not None:
            np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(jnp.float32))
    dot = quick_jit(lambda x, codes: dot_general(x, codes, MATMUL, LEFT["int8 by row"][0]))
    np.testing.assert_array_equal(dot(inputs(), stored), dot(inputs(), codes))


def test_stored_takes_the_bytes_that_it_should():
    bits = lambda name, **options: Stored.of(RIGHT[name](), **options).nbytes * 8 / (K * N)
    assert bits("int8 channel") == 8 + 32 / K
    assert bits("int4 channel") == 4 + 32 / K
    assert bits("uint4 affine groups") == 4 + (32 + 4) / GROUP
    assert bits("fp4 e8m0", scales="e8m0") == 4 + 8 / GROUP
    assert bits("fp4 two levels", scales="e4m3") == 4 + 8 / GROUP + 32 / (K * N)
    assert bits("fitted") == 4 + 2 * 32 * 4 / (K * N) + 32 / (K * N)
    assert bits("binary") == pytest.approx(1 + 32 / K + 2 * 32 / (K * N))


def test_training_and_stored_codes_give_the_same_bits():
    # As the forward pass of training with delayed scaling would, had it these scales.
    recipe = "fp8/compute=float32"
    scale = jnp.array([2.0**-6, 2.0**-7, 1.0], jnp.float32)
    trained = jax.jit(lambda x, w: dot_general(x, w, MATMUL, recipe, scale))(inputs(), weights())
    codes = Stored.of(quantize(weights(), "e4m3fn", scale=2.0**-7))
    frozen = "fwd=e4m3fn:tensor:static,e4m3fn:tensor:static/scales=power_of_two/compute=float32"
    given = jax.jit(lambda x, w: dot_general(x, w, MATMUL, frozen, scale[:2]))(inputs(), codes)
    np.testing.assert_array_equal(given, trained)


def test_axes_may_be_any():
    x, w = jnp.asarray(normal(2, 2, 5, 4, 6)), jnp.asarray(normal(3, 4, 6, 3, 8))
    codes = quantize(w, "int8", channelwise_axes=(2, 3))
    dot = quick_jit(functools.partial(einsum, recipe="fwd=int8:row,none/compute=float32"), static_argnums=0)
    found = dot("btnh,nhkd->btkd", x, codes)
    values = quantize(x, "int8", channelwise_axes=(0, 1)).dequantize()
    np.testing.assert_allclose(found, np.einsum("btnh,nhkd->btkd", values, codes.dequantize()), rtol=0, atol=2e-5)
    tiled = quantize(w, "int8", channelwise_axes=(0, 2, 3), tiled_axes={1: 3})
    found = dot("btnh,nhkd->btkd", x, tiled)
    np.testing.assert_allclose(found, np.einsum("btnh,nhkd->btkd", values, tiled.dequantize()), rtol=0, atol=2e-5)
    batched = quantize(jnp.asarray(normal(4, 2, 4, 7)), "int4", channelwise_axes=(0, 2))
    found = einsum("btnh,bnm->bthm", x, batched, "fwd=none,none/compute=float32")
    np.testing.assert_allclose(found, np.einsum("btnh,bnm->bthm", x, batched.dequantize()), rtol=0, atol=2e-5)


def test_codes_of_eight_bits_meet_as_such():
    recipe = "fwd=int8:row,none/compute=float32"
    text = jax.jit(lambda x, w: dot_general(x, w, MATMUL, recipe)).lower(inputs(), RIGHT["int8 channel"]()).compile()
    (line,) = [line for line in text.as_text().splitlines() if " dot(" in line or "__onednn" in line]
    assert line.split("=")[1].split("[")[0].strip() == "s32"


def test_what_cannot_be_is_said():
    codes = RIGHT["int8 channel"]()
    with pytest.raises(ValueError, match="is not differentiable"):
        jax.grad(lambda x: jnp.sum(dot_general(x, codes, MATMUL, "bf16")))(inputs())
    with pytest.raises(ValueError, match="along several contracting axes"):
        w = quantize(jnp.ones((4, 6, 3), jnp.float32), "int8", channelwise_axes=(2,), tiled_axes={1: 3})
        dot_general(jnp.ones((2, 4, 6), jnp.float32), w, (((1, 2), (0, 1)), ((), ())), "int8-row")
    with pytest.raises(ValueError, match="A zero point needs integers"):
        dot_general(inputs(), RIGHT["uint8 affine"](), MATMUL, LEFT["e4m3"][0])
    with pytest.raises(ValueError, match="does not divide"):
        dot_general(inputs(), codes, MATMUL, "fwd=int8:tile36,none")
    with pytest.raises(ValueError, match="none that e4m3 holds"):
        Stored.of(RIGHT["int4 groups"](), scales="e4m3")
    with pytest.raises(ValueError, match="at most 8 bits"):
        Stored.of(quantize(weights(), "int16"))


@pytest.mark.parametrize("stored_as", STORED_SCALES)
def test_scales_are_rounded_to_what_is_stored(stored_as):
    scale = jnp.exp(jnp.asarray(normal(5, 6, N)))
    rounded_scale = round_scale(scale, stored_as)
    worst = {"float32": 0, "bfloat16": 2.0**-8, "e8m0": 1.0, "e4m3": 2.0**-4}[stored_as]
    off = np.abs(np.asarray(rounded_scale / scale) - 1)
    assert off.max() <= worst and (off.max() > worst / 2 or stored_as == "float32")
    codes = quantize(jnp.repeat(scale, GROUP, 0), "int4", scale=rounded_scale)
    stored = Stored.of(codes, scales=stored_as)
    np.testing.assert_array_equal(stored.array.scale, rounded_scale)
    assert stored.scale.dtype.itemsize == {"float32": 4, "bfloat16": 2}.get(stored_as, 1)


def test_rows_of_a_table_are_looked_up_as_codes():
    table = jnp.asarray(normal(6, 50, 32))
    for array in (
        quantize(table, "int8", channelwise_axes=(0,)),
        quantize(table, "uint4", channelwise_axes=(0,), tiled_axes={1: 8}, calibration="minmax"),
    ):
        stored = Stored.of(array, axis=-1)
        wanted = np.asarray(array.dequantize())
        ids = jnp.array([[3, 49, 0], [7, 3, 3]])
        np.testing.assert_array_equal(jax.jit(lambda s, i: s.rows(i))(stored, ids), wanted[np.asarray(ids)])
    with pytest.raises(ValueError, match="scales for each row"):
        Stored.of(RIGHT["int8 channel"]()).rows(ids)
