"""The audit on this machine's CPU: what it says of our steps, of others', and of broken ones."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from flax.linen import fp8_ops

import q8jax
import q8jax.linen as qlinen
import q8jax.nnx as qnnx
from experiments.models.config import SIZES
from experiments.training.optimizer import OptimizerConfig
from experiments.training.precision import resolve
from experiments.training.step import Trainer
from q8jax.audit import holds_exactly
from q8jax.recipe import GEMMS, Recipe
from q8jax.report import EMULATED, NATIVE, WRONG

PROJECTIONS = ["blocks/attention/qkv", "blocks/attention/out", "blocks/mlp/up", "blocks/mlp/down"]
X = jax.ShapeDtypeStruct((32, 64), jnp.bfloat16)
W = jax.ShapeDtypeStruct((64, 48), jnp.bfloat16)


def report_of(step, *arguments, **kwargs):
    return q8jax.audit(jax.jit(step).lower(*arguments), **kwargs)


def verdicts(report):
    return {(gemm.path, gemm.role): gemm.verdict for gemm in report.gemms}


@pytest.fixture(scope="module", params=[pytest.param(False, marks=pytest.mark.slow), True], ids=["saved", "remat"])
def step_report(request):
    config = dataclasses.replace(SIZES["tiny"], layers=3, remat=request.param)
    trainer = Trainer(config, resolve("fp8"), OptimizerConfig(steps=100), accumulate=2)
    state = jax.eval_shape(trainer.init)
    return request.param, report_of(trainer.step, state, jax.ShapeDtypeStruct((2, 2, 33), jnp.int32))


@pytest.mark.slow
def test_every_projection_of_a_scanned_step_is_found_with_its_formats(step_report):
    remat, report = step_report
    recipe = Recipe.parse("fp8")
    found = {(gemm.path, gemm.role): gemm for gemm in report.gemms}
    for path in PROJECTIONS:
        for role in GEMMS:
            gemm = found[path, role]
            assert gemm.asked == recipe.formats(role)
            assert (gemm.verdict, gemm.accumulator) == (EMULATED, "float32")
            # Three layers, two microbatches; nothing needs the last forward product again.
            again = remat and role == "fwd" and path != "blocks/mlp/down"
            assert gemm.times == 3 * 2 * (1 + again)
    assert report.ok and not report.is_native
    total = sum(gemm.times for gemm in report.gemms if gemm.path in PROJECTIONS)
    assert report.summary().startswith(f"audit on cpu: {total} 8-bit GEMMs with ")
    assert "of the FLOPs, all emulated exactly (float8_e4m3fn as" in report.summary()


def test_flops_are_those_of_the_sizes(step_report):
    _, report = step_report
    tokens, config = 2 * 32, SIZES["tiny"]
    for gemm in report.gemms:
        path = gemm.path.removeprefix("blocks/")
        if path in config.projections:
            inputs, outputs = config.projections[path]
            assert gemm.flops == 2 * tokens * inputs * outputs * gemm.times


def test_integers_of_a_cpu_are_native_where_it_multiplies_them():
    weights = jax.ShapeDtypeStruct((64, 48), jnp.bfloat16)
    report = report_of(lambda x, w: q8jax.einsum("ab,bc->ac", x, w, "int8-row"), X, weights)
    (gemm,) = report.gemms
    assert gemm.operands == ("int8", "int8") and gemm.accumulator == "int32" and gemm.verdict == NATIVE
    assert report.is_native
    assert report.summary() == "audit on cpu: 1 8-bit GEMMs, all native"


@pytest.mark.parametrize("operand", ["e2m1fn", "e2m3fn", "e3m2fn", "e3m4", "int4", "int2", "e5m2fnuz"])
def test_codes_of_every_format_are_found_behind_the_wide_type(operand):
    report = report_of(lambda x, w: q8jax.einsum("ab,bc->ac", x, w, f"fwd={operand},{operand}"), X, W)
    (gemm,) = report.gemms
    assert gemm.asked == (q8jax.get_format(operand).name,) * 2
    assert gemm.verdict in (NATIVE, EMULATED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mxfp8", "fp8-block", "int8-block"])
def test_products_in_tiles_are_known_for_what_was_asked_even_without_a_name(name):
    # XLA:CPU takes short loops apart, and forgets the names of what was in them.
    x, w = jnp.ones((1024, 256), jnp.bfloat16), jnp.ones((256, 384), jnp.bfloat16)
    loss = lambda x, w: jnp.sum(jnp.square(q8jax.einsum("td,df->tf", x, w, name).astype(jnp.float32)))
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, w)
    report = q8jax.audit(lowered, lowered.compile())
    assert report.ok and {gemm.asked for gemm in report.gemms} == {Recipe.parse(name).formats("fwd")}
    assert sum(gemm.flops for gemm in report.gemms) == 3 * 2 * 1024 * 256 * 384


def test_layers_of_linen_are_found_by_path_and_role():
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("up", "down"):
                cls = qlinen.dot_general_cls("fp8")
                x = nn.Dense(64, use_bias=False, dtype=jnp.bfloat16, name=name, dot_general_cls=cls)(x)
            return x

    model = Mlp()
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((32, 64), jnp.bfloat16))
    loss = lambda variables, x: jnp.sum(model.apply(variables, x).astype(jnp.float32))
    report = report_of(qlinen.value_and_grad(loss), variables, X)
    expected = {(f"Mlp/{name}/DotGeneral_0", role) for name in ("up", "down") for role in GEMMS}
    # Nothing asks for the gradient of the input.
    assert set(verdicts(report)) == expected - {("Mlp/up/DotGeneral_0", "dlhs")}
    assert set(verdicts(report).values()) == {EMULATED}


def test_layers_of_an_unscanned_nnx_model_are_found_by_path():
    model = nnx.Sequential(nnx.Linear(64, 48, rngs=nnx.Rngs(0)), nnx.Linear(48, 64, rngs=nnx.Rngs(0)))
    qnnx.quantize_model(model, "fp8")
    graphdef, state = nnx.split(model)
    apply = lambda state, x: qnnx.value_and_grad(lambda m, x: jnp.sum(m(x)))(nnx.merge(graphdef, state), x)[1:]
    report = report_of(apply, state, jax.ShapeDtypeStruct((32, 64), jnp.float32))
    assert {path for path, _ in verdicts(report)} == {"layers/0", "layers/1"}


def test_quantization_that_is_undone_before_the_product_is_not_what_was_asked():
    def fake(x, scale):
        codes = (x / scale).astype(jnp.float8_e4m3fn)
        return codes.astype(jnp.bfloat16) * scale

    step = lambda x, w, scale: fake(x, scale) @ fake(w, scale)
    report = report_of(step, X, W, jax.ShapeDtypeStruct((), jnp.bfloat16))
    (gemm,) = report.gemms
    assert gemm.asked == ("float8_e4m3fn", "float8_e4m3fn")
    assert gemm.verdict == WRONG and "dequantized before the product" in gemm.reasons[0]
    assert not report.ok


def test_flax_quantize_dequantize_runs_wide_on_a_cpu_and_its_direct_dot_on_codes():
    def step(operation):
        layer = nn.Dense(48, use_bias=False, dtype=jnp.bfloat16, dot_general_cls=operation)
        variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((32, 64), jnp.bfloat16))
        return report_of(layer.apply, variables, X)

    with jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        undone, direct = step(fp8_ops.Fp8DotGeneralOp), step(fp8_ops.Fp8DirectDotGeneralOp)
    assert [gemm.asked for gemm in (*undone.gemms, *direct.gemms)] == [("float8_e4m3fn",) * 2] * 2
    assert undone.gemms[0].verdict == WRONG
    assert direct.gemms[0].verdict in (NATIVE, EMULATED)


def test_a_product_that_was_never_quantized_is_not_what_was_asked():
    report = report_of(lambda x, w: x @ w, X, W, asked="fp8")
    (gemm,) = report.gemms
    assert gemm.asked == ("float8_e4m3fn", "float8_e4m3fn") and gemm.verdict == WRONG
    assert "never rounded" in gemm.reasons[0] and "not what was asked" in report.summary()
    assert report_of(lambda x, w: x @ w, X, W).ok


def test_a_rule_that_matches_nothing_is_reported():
    def step(x, w):
        with jax.named_scope("attention"):
            return x @ w

    report = report_of(step, X, W, asked="mlp/.*->fp8;attention->bf16")
    assert report.unmatched == ("mlp/.*",)
    assert not report.ok and "no GEMM matches 'mlp/.*'" in report.summary()


def test_of_a_compiled_step_only_our_own_dots_say_what_was_asked():
    compiled = jax.jit(lambda x, w: (x @ w, q8jax.einsum("ab,bc->ac", x, w, "int8-row"))).lower(X, W).compile()
    asked = {gemm.asked for gemm in q8jax.audit(compiled).gemms}
    assert asked == {None, ("int8", "int8")}


def test_the_object_for_programs_has_the_promised_names():
    report = report_of(lambda x, w: q8jax.einsum("ab,bc->ac", x, w, "int8-row"), X, W)
    found = json.loads(report.to_json())
    assert {"gemms", "bytes", "kernels", "temp_bytes", "collectives", "estimated_cycles"} <= set(found)
    names = {"path", "role", "asked", "operands", "accumulator", "executed_by", "verdict", "flops"}
    assert names <= set(found["gemms"][0])
    assert found["gemms"][0]["flops"] == 2 * 32 * 64 * 48
    assert "int8 × int8" in report.table()


@pytest.mark.parametrize(
    ("narrow", "wide", "holds"),
    [
        ("float8_e4m3fn", "float16", True),
        ("float8_e5m2", "bfloat16", True),
        ("int8", "bfloat16", True),
        ("int16", "bfloat16", False),
        ("float8_e4m3fn", "float8_e5m2", False),
        ("bfloat16", "float16", False),
        ("float16", "float32", True),
        ("int8", "int32", True),
        ("uint8", "int8", False),
    ],
)
def test_what_a_wider_type_holds(narrow, wide, holds):
    assert holds_exactly(narrow, wide) == holds
