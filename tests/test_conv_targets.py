"""What XLA makes of convolutions for GPUs and TPUs that are not there: see `absent_devices`."""

import jax
import jax.numpy as jnp
import pytest
from absent_devices import report_for

import q8jax
from q8jax.recipe import GEMMS, Recipe
from q8jax.report import EMULATED, NATIVE

pytestmark = [
    pytest.mark.targets,
    pytest.mark.filterwarnings("ignore"),  # of libraries that these tests compile
]
SHAPES = [(16, 14, 14, 64), (3, 3, 64, 128), (16, 7, 7, 128)]
STRIDED = {"window_strides": (2, 2), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def products_of(recipe: Recipe):
    def three(lhs, rhs, grad, scale):
        conv = lambda lhs, rhs: q8jax.conv_general_dilated(lhs, rhs, recipe=recipe, scale=scale, **STRIDED)
        out, vjp = jax.vjp(conv, lhs, rhs)
        return (out, *vjp(grad))

    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in SHAPES]
    return three, *arrays, jax.ShapeDtypeStruct((len(recipe.slots),), jnp.float32)


@pytest.mark.parametrize(
    ("name", "precision", "verdict", "unit"),
    [
        ("h100", "fp8", NATIVE, "cuBLASLt FP8"),
        ("h100", "int8-row", NATIVE, "cuBLASLt integer"),
        ("h100", "fp8-e3m4", EMULATED, "cudnn"),
        ("a100", "fp8", EMULATED, "cuBLASLt bf16"),
        ("v5e:2x2", "int8-row", NATIVE, "MXU convolution"),
        ("tpu7x:2x2x1", "fp8", NATIVE, "MXU convolution"),
    ],
)
def test_all_three_products_multiply_what_was_asked(name, precision, verdict, unit):
    recipe = Recipe.parse(precision)
    report = report_for(name, *products_of(recipe))
    assert {gemm.role for gemm in report.gemms} == set(GEMMS) and report.ok
    for gemm in report.gemms:
        assert gemm.asked == recipe.formats(gemm.role)
        assert gemm.executed_by.startswith(unit) and gemm.accumulator in ("float32", "int32")
    # XLA may multiply one product of several in E4M3 as it is where another is of two formats.
    assert verdict in {gemm.verdict for gemm in report.gemms}
    if verdict == NATIVE:
        assert report.is_native


def test_a_tpu_copies_no_patches():
    report = report_for("v5e:2x2", *products_of(Recipe.parse("int8-row")))
    lhs, rhs, out = (2 * 16 * 14 * 14 * 64, 2 * 3 * 3 * 64 * 128, 2 * 16 * 7 * 7 * 128)
    assert report.costs.bytes < 5 * (lhs + rhs + out)
