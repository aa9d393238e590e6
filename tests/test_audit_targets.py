"""What XLA makes of our steps, and of others', for GPUs and TPUs that are not there: see `absent_devices`."""

import dataclasses
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_devices import compiled_for_one, get_target, miss, report_for
from flax import linen as nn
from flax import nnx
from jax import lax

import q8jax
import q8jax.linen as qlinen
import q8jax.nnx as qnnx
from experiments.benchmarks import gemms
from experiments.benchmarks.contenders import CONTENDERS, REFERENCE
from experiments.benchmarks.layers import Shapes, compiled_for
from experiments.models.config import SIZES
from experiments.projecting.projection import project
from experiments.training.mesh import Placement
from experiments.training.optimizer import OptimizerConfig
from experiments.training.precision import resolve
from experiments.training.step import Trainer
from q8jax.recipe import GEMMS, Recipe
from q8jax.report import EMULATED, NATIVE, WRONG

pytestmark = [
    pytest.mark.targets,
    pytest.mark.filterwarnings("ignore"),  # of libraries that these tests compile
]
PROJECTIONS = ["blocks/attention/qkv", "blocks/attention/out", "blocks/mlp/up", "blocks/mlp/down"]


def operands(report, paths, roles=GEMMS):
    return {
        (path, role): {gemm.operands for gemm in report.gemms if (gemm.path, gemm.role) == (path, role)}
        for path in paths
        for role in roles
    }


@pytest.mark.parametrize(
    ("name", "precision", "verdict", "unit"),
    [
        ("h100", "fp8", NATIVE, "cuBLASLt FP8"),
        ("h100", "int8", NATIVE, "cuBLASLt integer"),
        ("h100", "fp8-e3m4", EMULATED, "cuBLASLt bf16"),
        ("b200", "fp8", NATIVE, "cuBLASLt FP8"),
        ("a100", "fp8", EMULATED, "cuBLASLt bf16"),
        ("tpu7x:2x2x1", "fp8", NATIVE, "MXU convolution"),
        ("v5e:2x2", "int8", NATIVE, "MXU convolution"),
        ("v6e:2x2", "fp8", EMULATED, "MXU convolution"),
    ],
)
def test_every_projection_of_a_scanned_step_multiplies_what_was_asked(name, precision, verdict, unit):
    # The compiler for TPU7x of libtpu 0.0.42 crashes on a step of this width that is smaller, or with remat.
    crashes = name.startswith("tpu7x")
    config = dataclasses.replace(SIZES["tiny"], layers=2, remat=not crashes)
    trainer = Trainer(config, resolve(precision), OptimizerConfig(steps=100))
    tokens = jax.ShapeDtypeStruct((1, 16, 257) if crashes else (1, 4, 65), jnp.int32)
    report = report_for(name, trainer.step, jax.eval_shape(trainer.init), tokens)
    recipe = Recipe.parse(precision)
    for path in PROJECTIONS:
        for role in GEMMS:
            found = [gemm for gemm in report.gemms if (gemm.path, gemm.role) == (path, role)]
            assert found, (path, role)
            for gemm in found:
                assert (gemm.asked, gemm.verdict, gemm.executed_by) == (recipe.formats(role), verdict, unit)
                if verdict == NATIVE:
                    assert sorted(gemm.operands) == sorted(recipe.formats(role))
    assert report.ok
    assert (report.costs.estimated_cycles is None) == (not name.startswith(("v", "tpu")))


@pytest.mark.parametrize(("name", "layers"), [("h100", 4), ("h100", 32), ("tpu7x:2x2x1", 4)])
def test_delayed_scaling_costs_at_most_twelve_kernels_at_any_depth(name, layers):
    recipe = q8jax.PRECISIONS["fp8"].recipe
    size = "1b" if name == "h100" else "124m"  # which compiles for a TPU in half the time
    config = dataclasses.replace(SIZES[size], layers=layers, remat=True, vocab=32000)
    tokens = jax.ShapeDtypeStruct((1, 4, 2049), jnp.int32)
    reports = []
    for precision in (str(recipe), str(recipe).replace("delayed", "static")):
        trainer = Trainer(config, resolve(precision), OptimizerConfig(steps=100))
        report = report_for(name, trainer.step, jax.eval_shape(trainer.init), tokens)
        assert report.is_native
        fp8 = [gemm for gemm in report.gemms if gemm.asked in (recipe.formats(role) for role in GEMMS)]
        assert {gemm.verdict for gemm in fp8} == {NATIVE} and sum(gemm.times for gemm in fp8) == 15 * layers
        reports.append(report)
    delayed, static = (report.costs.distinct_calls for report in reports)
    assert 0 < delayed - static <= 12
    if name == "h100":
        assert all(report.costs.distinct_calls == report.costs.distinct_kernels for report in reports)


@pytest.mark.parametrize("scanned", [False, True], ids=["unscanned", "scanned"])
@pytest.mark.parametrize("name", ["h100", "v5e:2x2"])
def test_every_layer_of_linen_multiplies_integers_or_fp8(name, scanned):
    precision, kind = ("fp8", "float8_e4m3fn") if name == "h100" else ("int8", "int8")
    cls = qlinen.dot_general_cls(precision)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            for layer in ("up", "down"):
                x = nn.gelu(nn.Dense(256, use_bias=False, dtype=jnp.bfloat16, name=layer, dot_general_cls=cls)(x))
            return x, None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nn.remat(Block, prevent_cse=not scanned)
            if scanned:
                axes = {"params": 0, qlinen.OVERWRITE_WITH_GRADIENT: 0}
                scan = nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=2)
                return scan(name="blocks")(x, None)[0]
            for i in range(2):
                x, _ = block(name=f"block{i}")(x, None)
            return x

    model, x = Model(), jax.ShapeDtypeStruct((128, 256), jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    loss = lambda variables, x: jnp.sum(model.apply(variables, x).astype(jnp.float32))
    report = report_for(name, qlinen.value_and_grad(loss), variables, x)
    assert report.is_native
    wanted = Recipe.parse(precision)
    layers = {(gemm.path.split("/")[-2], gemm.role) for gemm in report.gemms}
    assert layers >= {(layer, role) for layer in ("up", "down") for role in ("fwd", "drhs")} | {("down", "dlhs")}
    for gemm in report.gemms:
        assert kind in gemm.operands and sorted(gemm.operands) == sorted(wanted.formats(gemm.role))


def test_every_layer_of_an_unscanned_nnx_model_multiplies_fp8():
    model = nnx.Sequential(*(nnx.Linear(256, 256, dtype=jnp.bfloat16, rngs=nnx.Rngs(i)) for i in range(3)))
    qnnx.quantize_model(model, "fp8")
    graphdef, state = nnx.split(model)

    def step(state, x):
        loss = lambda model, x: jnp.sum(model(x).astype(jnp.float32))
        return qnnx.value_and_grad(loss)(nnx.merge(graphdef, state), x)[1:]

    report = report_for("h100", step, state, jax.ShapeDtypeStruct((128, 256), jnp.bfloat16))
    assert report.is_native
    assert {gemm.path for gemm in report.gemms} == {f"layers/{i}" for i in range(3)}


@pytest.mark.parametrize(
    ("how", "accurate"), [("fast", set()), ("mixed", {"dlhs", "drhs"}), ("accurate", {"fwd", "dlhs", "drhs"})]
)
def test_a_gpu_accumulates_as_the_recipe_says(how, accurate):
    def step(x, w):
        loss = lambda x, w: jnp.sum(q8jax.einsum("td,df->tf", x, w, f"fp8-current/accumulation={how}") ** 2)
        return jax.value_and_grad(loss, argnums=(0, 1))(x, w)

    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 512), (512, 384)))
    _, compiled = compiled_for_one("h100", step, x, w)
    precision = r"q8jax:(\w+):.*\"operand_precision\":\[\"(\w+)\""
    found = dict(re.findall(precision, "\n".join(re.findall(r".*__cublas\$lt\$matmul\$f8.*", compiled.as_text()))))
    assert found == {role: "HIGHEST" if role in accurate else "DEFAULT" for role in GEMMS}


def incumbent(name, **kwargs):
    """The audit of a training step of experiments.benchmark, made small, on an H100."""
    goal = get_target("h100")
    if not CONTENDERS[name].is_installed:
        miss("pip install 'q8jax[incumbents]'")
    shapes = Shapes(layers=2, width=256, hidden=1024, tokens=512)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compiled_for(CONTENDERS[name], shapes, goal, **kwargs)


@pytest.mark.parametrize(
    ("name", "asked", "units"),
    [
        ("flax bf16", "bfloat16", {"cuBLASLt bf16": 11}),
        ("flax fp8", "float8_e4m3fn", {"cuBLASLt FP8": 11}),
        ("qwix fp8", "float8_e4m3fn", {"cuBLASLt FP8": 11}),
        ("qwix int8", "int8", {"cuBLASLt integer": 11}),
        ("aqt int8", "int8", {"cuBLASLt integer": 7, "cuBLASLt bf16": 4}),
    ],
)
def test_what_other_libraries_run_is_reported(name, asked, units):
    report = incumbent(name)
    found = {}
    for gemm in report.gemms:
        found[gemm.executed_by] = found.get(gemm.executed_by, 0) + gemm.times
    assert found == units
    assert report.ok and any(asked in gemm.asked for gemm in report.gemms)


def test_against_a_recipe_four_of_aqts_products_are_not_what_was_asked():
    report = incumbent("aqt int8", asked="int8")
    wrong = [gemm for gemm in report.gemms if gemm.verdict == WRONG]
    assert sum(gemm.times for gemm in wrong) == 4 and {gemm.role for gemm in wrong} == {"drhs"}
    assert "bfloat16 instead of int8" in report.summary()


def test_the_bound_of_the_benchmarks_products_is_nothing_but_fp8_gemms():
    product, qtype = gemms.Product("x", 256, 512, 1024), gemms.PREQUANTIZED["pre-quantized fp8"]
    shapes = (256, 512), (512, 1024), (256, 1024)
    tensors = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    codes = jax.eval_shape(functools.partial(gemms.codes_of, qtype), *tensors)
    report = report_for("h100", gemms.multiply_codes, codes)
    assert report.is_native and [gemm.executed_by for gemm in report.gemms] == ["cuBLASLt FP8"] * 3
    assert sum(gemm.flops for gemm in report.gemms) == product.flops
    # Codes are read by two GEMMs each, results are written by one; beside that there are scales.
    least = sum((2 + 2) * rows * columns for rows, columns in shapes)
    assert least <= report.costs.bytes < 1.001 * least


def test_a_gpu_erases_fake_quantization_and_the_audit_sees_it():
    fake = lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.bfloat16)
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 512), (512, 384)))
    report = report_for("h100", lambda x, w: fake(x) @ w, x, w)
    (gemm,) = report.gemms
    assert gemm.asked == ("float8_e4m3fn", "bfloat16") and gemm.operands == ("bfloat16", "bfloat16")
    assert gemm.verdict == WRONG and "never rounded" in gemm.reasons[0]


@pytest.mark.parametrize(
    ("name", "cost", "most"),
    [("h100", "bytes", 1.45), ("v5e:2x2", "estimated_cycles", 0.75), ("v6e:2x2", "estimated_cycles", 0.92)],
)
def test_a_step_in_int8_costs_at_most_this_much_of_one_in_bfloat16(name, cost, most):
    goal = get_target(name)
    shapes = Shapes(layers=2, width=4096, hidden=16384, tokens=8192)
    ours, reference = (compiled_for(CONTENDERS[of], shapes, goal) for of in ("q8jax int8", REFERENCE))
    assert {gemm.verdict for gemm in ours.gemms} == {NATIVE} and sum(gemm.times for gemm in ours.gemms) == 11
    assert getattr(ours.costs, cost) <= most * getattr(reference.costs, cost)


@pytest.mark.parametrize("name", ["q8jax fp8", "q8jax int8"])
def test_several_gpus_send_each_other_gradients_and_scales_but_no_codes(name):
    shapes = Shapes(layers=2, width=256, hidden=1024, tokens=512)
    report = compiled_for(CONTENDERS[name], shapes, get_target("h100:2"))
    assert report.is_native and sum(gemm.times for gemm in report.gemms) == 11
    assert {collective.op for collective in report.costs.collectives} <= {"all-reduce", "collective-permute"}
    assert sum(collective.bytes for collective in report.costs.collectives) < 1.1 * 4 * shapes.layers * 2 * 256 * 1024


def test_costs_count_loops_as_often_as_they_turn():
    w = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)

    def layers(count):
        body = lambda x, _: (jnp.tanh(x @ x), None)
        return report_for("h100", lambda w: lax.scan(body, w, None, length=count)[0], w)

    few, many = layers(10), layers(30)
    assert [sum(gemm.times for gemm in report.gemms) for report in (few, many)] == [10, 30]
    assert few.costs.distinct_kernels == many.costs.distinct_kernels
    np.testing.assert_allclose(many.costs.bytes / few.costs.bytes, 3, rtol=0.1)
    assert few.gemms[0].flops == 10 * 2 * 256**3


def test_an_fp8_step_moves_less_than_one_in_bfloat16_and_takes_less_memory():
    shapes = Shapes(layers=2, width=4096, hidden=16384, tokens=8192)
    reference, fp8 = (
        compiled_for(CONTENDERS[name], shapes, get_target("h100"), asked)
        for name, asked in (("flax bf16", None), ("q8jax fp8", "fp8"))
    )
    assert len(fp8.gemms) == 11 and {gemm.verdict for gemm in fp8.gemms} == {NATIVE}
    assert fp8.costs.kernels <= 55
    # 1.02 of the bytes and 0.83 of the memory if gelu's derivative kept an array of its own.
    assert fp8.costs.bytes <= 0.98 * reference.costs.bytes
    assert fp8.temp_bytes <= 0.65 * reference.temp_bytes


@pytest.mark.parametrize(("name", "narrow"), [("v5e:2x2", ["fp8"]), ("h100:4", ["fp8", "int8"])])
def test_fsdp_gathers_codes_and_sends_less_than_bfloat16_and_a_step_is_projected(name, narrow):
    goal = get_target(name)
    config = dataclasses.replace(SIZES["124m"], layers=2, remat=True)
    sent = {}
    for precision in ("bf16", *narrow):
        placement = Placement(goal.devices, fsdp=4)
        where = placement.of_model("fsdp:4", config, 1024)
        trainer = Trainer(config, resolve(precision), OptimizerConfig(steps=100), shardings=where)
        tokens = jax.ShapeDtypeStruct((1, 4, 1025), jnp.int32, sharding=placement.batch)
        lowered = placement.lower_step(trainer, tokens)
        report = q8jax.audit(lowered, lowered.compile(compiler_options=dict(goal.options)))
        by_kind = {(c.op, c.dtype): c.bytes for c in report.costs.collectives}
        sent[precision] = sum(by_kind.values())
        # Three in four of a block's weights come from elsewhere, for the forward pass and for the backward; to compute
        # the block again, all but the last are gathered anew, unless the compiler keeps them.
        sizes = {path: rows * columns for path, (rows, columns) in config.projections.items()}
        once = 0.75 * config.layers * sum(sizes.values())
        if precision != "bf16":
            codes = {"fp8": "u8", "int8": "s8"}[precision]
            assert 2 <= by_kind["all-gather", codes] / once <= 3 - sizes["mlp/down"] / sum(sizes.values())
        found = project(report, placement.devices, config.flops_per_token(1024) * 4096, 4096)
        assert found.fits and 0 < found.products <= found.kernels <= found.fastest <= found.slowest
        assert found.network > 0 and 0 < found.utilization[0] < 1
    assert max(sent[precision] for precision in narrow) < 0.85 * sent["bf16"]


def test_what_slices_send_each_other_through_their_hosts_is_counted():
    goal = get_target("v5e:2x2:2")
    mesh = jax.sharding.Mesh(np.array(goal.devices).reshape(2, 4), ("slice", "chip"))
    place = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    x = jax.ShapeDtypeStruct((2, 4, 512, 128), jnp.float32, sharding=place("slice"))
    lowered = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=place()).lower(x)
    (found,) = q8jax.audit(lowered, lowered.compile(compiler_options=dict(goal.options))).costs.collectives
    assert (found.op, found.dtype, found.group, found.times) == ("all-reduce", "f32", (0, 4), 1)
    # A ring of two sends each half twice.
    assert found.bytes == 4 * 512 * 128 * 4
