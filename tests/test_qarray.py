"""The class QArray: transforms, checks of what it is made of, sizes, and options that are refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantize_cases import data, jitted

from q8jax.codebook import normal_float
from q8jax.formats import FORMATS
from q8jax.groups import granularity
from q8jax.qarray import QArray, quantize


def test_qarray_passes_through_transforms():
    x = jnp.asarray(data((5, 8, 16)))
    by_row = functools.partial(quantize, qtype="uint8", calibration="minmax", channelwise_axes=(0,))
    q = jax.jit(jax.vmap(by_row))(x)
    assert (q.shape, q.scale.shape, q.zero_point.shape) == ((5, 8, 16), (5, 8, 1), (5, 8, 1))
    assert q.qtype == "uint8"
    _, scanned = jax.lax.scan(lambda c, part: (c, part.dequantize()), None, q)
    np.testing.assert_array_equal(scanned, jax.jit(QArray.dequantize)(q))
    np.testing.assert_array_equal(scanned, jax.jit(jax.vmap(QArray.dequantize))(q))
    shapes = jax.eval_shape(by_row, x)
    assert shapes.zero_point.dtype == jnp.int32


def test_qarray_is_a_pytree_of_its_arrays_with_a_static_qtype():
    q = jitted(data(), "e4m3fn")
    assert len(jax.tree.leaves(q)) == 2
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == [".qvalue", ".scale"]
    # Leaves that are no arrays, as in tree_map over shardings or names.
    words = jax.tree.map(lambda leaf: str(leaf.dtype), q)
    assert (words.qvalue, words.scale, words.qtype) == ("float8_e4m3fn", "float32", "float8_e4m3fn")
    other = jitted(data(), "e5m2")
    assert jax.tree.structure(q) != jax.tree.structure(other)


def test_constructor_checks_shapes_and_dtypes():
    codes, scale = jnp.zeros((4, 6), jnp.int8), jnp.ones((4, 1), jnp.float32)
    zero_point = jnp.zeros((4, 1), jnp.int32)
    assert QArray(codes, scale, zero_point, qtype="int8").ndim == 2
    assert QArray(jnp.zeros(3, jnp.uint8), jnp.ones(1, jnp.float32), qtype="e2m3fn").qtype == "float6_e2m3fn"
    book = normal_float(4)
    for message, arguments in {
        "qvalue of a float8_e4m3fn QArray must be float8_e4m3fn, not int8": (codes, scale, None, None, "e4m3fn"),
        "scale must be float32 or float8_e8m0fnu, not bfloat16": (
            codes,
            scale.astype(jnp.bfloat16),
            None,
            None,
            "int8",
        ),
        r"scale of shape \(4,\) does not fit values of shape \(4, 6\)": (codes, scale[:, 0], None, None, "int8"),
        r"scale of shape \(3, 1\) does not fit": (codes, scale[:3], None, None, "int8"),
        "zero_point must be int32 with the shape of scale": (codes, scale, zero_point[:1], None, "int8"),
        "zero_point must be int32": (codes, scale, zero_point.astype(jnp.int8), None, "int8"),
        "zero_point needs an integer qtype": (codes.astype(jnp.float8_e5m2), scale, zero_point, None, "e5m2"),
        "needs an unsigned qtype that counts them": (codes, scale, None, book, "int8"),
        "A codebook of 256 values needs": (codes.astype(jnp.uint4), scale, None, jnp.zeros(256, jnp.float32), "uint4"),
        "A codebook must be float32 of rank 1": (codes.astype(jnp.uint8), scale, None, book[None], "uint8"),
        "A codebook places its own zero": (codes.astype(jnp.uint8), scale, zero_point, book, "uint8"),
    }.items():
        with pytest.raises(ValueError, match=message):
            QArray(*arguments[:4], qtype=arguments[4])


def test_check_refuses_unhealthy_scales():
    def with_scale(value, qtype="int8"):
        codes = jnp.zeros((2, 2), FORMATS[qtype].dtype)
        return QArray(codes, jnp.array([[1], [value]], jnp.float32), qtype=qtype)

    with_scale(0.5).check()
    with_scale(np.nan).check()
    for value in (0, -1, np.inf):
        with pytest.raises(ValueError, match="scale must be finite and > 0"):
            with_scale(value).check()
    with pytest.raises(ValueError, match="scale must be finite and > 0, but one is nan"):
        with_scale(np.nan, "float8_e5m2").check()


def test_check_refuses_zero_points_that_are_no_codes_and_unsorted_code_books():
    codes, scale = jnp.zeros((2, 2), jnp.uint8), jnp.ones((2, 1), jnp.float32)

    def with_zero_point(value, qtype="uint8"):
        zero_point = jnp.array([[0], [value]], jnp.int32)
        return QArray(codes.astype(qtype), scale, zero_point, qtype=qtype)

    for value, qtype in ((255, "uint8"), (-128, "int8")):
        with_zero_point(value, qtype).check()
    for value, qtype in ((1280, "uint8"), (-1, "uint8"), (128, "int8")):
        with pytest.raises(ValueError, match=f"zero_point must be a code of {qtype}, from .* but one is {value}"):
            with_zero_point(value, qtype).check()

    with_book = lambda *values: QArray(codes, scale, codebook=jnp.array(values, jnp.float32), qtype="uint8")
    with_book(-1, 0, 0, 2).check()
    for values in ((2, 1), (0, np.nan, 1), (-np.inf, 0)):
        with pytest.raises(ValueError, match="A codebook must ascend from value to value, all of them finite"):
            with_book(*values).check()


def test_given_scales_and_zero_points_may_be_numbers():
    x = jnp.asarray(data((3, 4)))
    for number, array in ((2, jnp.float32(2)), (0.25, jnp.float32(0.25))):
        found, wanted = (quantize(x, "uint8", scale=s, zero_point=z) for s, z in ((number, 7), (array, jnp.int32(7))))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        assert found.scale.dtype == jnp.float32 and found.zero_point.dtype == jnp.int32


def test_nbytes_counts_packed_codes():
    x = data()
    assert jitted(x, "int8").nbytes == 48 * 64 + 4
    assert jitted(x, "int4", **granularity("row", 2)).nbytes == 48 * 64 // 2 + 48 * 4
    assert jitted(x, "e2m3fn", **granularity("tile", 2, 32), scale_format="e8m0").nbytes == 48 * 64 * 6 // 8 + 96
    assert jitted(x, "uint8", calibration="minmax").nbytes == 48 * 64 + 8


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("Unknown calibration 'absmaks' .did you mean 'absmax'", {"calibration": "absmaks"}),
        ("Unknown scale_format 'power_of_2' .did you mean 'power_of_two'", {"scale_format": "power_of_2"}),
        ("Unknown rounding 'nearest'", {"rounding": "nearest"}),
        ("rounding='stochastic' needs key=", {"rounding": "stochastic"}),
        ("rounding='stochastic' needs key=", {"rounding": "stochastic", "calibration": "minmax"}),
        ("a tile of 5 does not divide axis 1 of size 64: choose from 8, 16, 32, 64, or pad", {"tiled_axes": {1: 5}}),
        ("a tile of 0 does not divide axis 1", {"tiled_axes": {1: 0}}),
        ("name axis 2 of rank 2: choose from -2 to 1", {"channelwise_axes": (2,)}),
        ("name axis -1 twice", {"channelwise_axes": (1, -1)}),
        ("name axis 0 twice", {"channelwise_axes": (0,), "tiled_axes": {0: 8}}),
        ("Unknown format 'int9'", {"qtype": "int9"}),
        ("float8_e8m0fnu holds scales, not values", {"qtype": "e8m0fnu"}),
        ("uint8 has no negative codes: use calibration='minmax'", {"qtype": "uint8"}),
        ("calibration='minmax' needs an integer qtype, not float8_e5m2", {"qtype": "e5m2", "calibration": "minmax"}),
        ("scale= is used as it is", {"scale": jnp.ones(()), "margin": 1}),
        ("scale= is used as it is", {"scale": jnp.ones(()), "scale_format": "e8m0"}),
        (r"scale of shape \(7, 1\) does not fit", {"scale": jnp.ones((7, 1))}),
        ("zero_point= needs scale= too", {"zero_point": jnp.int32(0)}),
        ("codebook= takes calibration='absmax'", {"qtype": "uint8", "codebook": normal_float(4), "full_range": True}),
        ("A codebook of 32 values needs an unsigned qtype", {"qtype": "uint4", "codebook": normal_float(5)}),
        ("A codebook must ascend", {"qtype": "uint4", "codebook": normal_float(4)[::-1]}),
    ],
)
def test_contradictory_options_are_refused(message, options):
    with pytest.raises(ValueError, match=message):
        quantize(jnp.asarray(data()), **{"qtype": "int8", **options})


def test_unknown_granularities_and_low_ranks_are_refused():
    with pytest.raises(ValueError, match=r"Unknown granularity 'rows' \(did you mean 'row'"):
        granularity("rows", 2)
    with pytest.raises(ValueError, match="Granularity 'block' needs rank 2 or more, not 1"):
        granularity("block", 1)
