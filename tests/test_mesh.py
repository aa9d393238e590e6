"""Meshes: the same training whatever the devices, and what travels between them."""

import collections
import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
from chips import chips
from micro import SHAPES, make_tokens, make_trainer, quick_compiles  # noqa: F401

from experiments.models import shardings
from experiments.models.config import SIZES, TransformerConfig
from experiments.runs import Checkpoints
from experiments.training.mesh import Placement
from experiments.training.telemetry import observe
from q8jax import telemetry

CONFIG = TransformerConfig(**SHAPES)
LENGTH = 16
MIXED = "data:2,fsdp:2,tensor:2"
OTHERS = "fsdp:8", "fsdp:4,tensor:2"
MESHES = (MIXED, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in OTHERS))


@functools.cache
def after(mesh, precision, steps=1, **options):
    """The state and the metrics after some steps on a mesh."""
    placement = Placement.parse(mesh, 8 // options.get("accumulate", 1))
    where = placement.of_model(mesh, CONFIG, LENGTH)
    trainer = make_trainer(precision, shardings=where, **options)
    state = placement.lower(trainer.init).compile()()
    shape = (options.get("accumulate", 1), -1, LENGTH + 1)
    for index in range(steps):
        batch = make_tokens(index).reshape(shape)
        tokens = placement.place(batch, batch.shape[1])
        if index == 0:
            if trainer.keeps_scales:
                dots = placement.lower(trainer.calibrate, state, tokens).compile()(state, tokens)
                state = {**state, "dots": dots}
            step = placement.lower(trainer.step, state, tokens, donate=(0,)).compile()
        state, metrics = step(state, tokens)
    return state, metrics, step.as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "mesh"),
    [
        ("fp8/compute=float32", MIXED),
        *(
            pytest.param("fp8/compute=float32", mesh, marks=pytest.mark.slow)
            for mesh in ("data:8", "tensor:2", *OTHERS)
        ),
        pytest.param("fp32", MIXED, marks=pytest.mark.slow),
    ],
)
def test_every_mesh_gives_the_loss_and_the_scaling_state_of_one_device(precision, mesh):
    state, metrics, _ = after(mesh, precision)
    alone, expected, _ = after("data:1", precision)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    # Sums in another order may round a value to the code beside it.
    close = 1e-6 if precision == "fp32" else 1e-4
    np.testing.assert_allclose(metrics["gradient_norm"], expected["gradient_norm"], rtol=close)
    assert jax.tree.structure(state["dots"]) == jax.tree.structure(alone["dots"])
    for found, wanted in zip(jax.tree.leaves(state["dots"]), jax.tree.leaves(alone["dots"]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    for found, wanted in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(alone["params"]), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives_in_the_dtypes_of_the_default_run():
    """In bfloat16 a sum in another order is another value, so there is a bound instead of equality."""
    state, metrics, _ = after(MIXED, "fp8")
    alone, expected, _ = after("data:1", "fp8")
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=2e-4)
    np.testing.assert_allclose(metrics["gradient_norm"], expected["gradient_norm"], rtol=1e-2)
    for found, wanted in zip(jax.tree.leaves(state["dots"]), jax.tree.leaves(alone["dots"]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp:8", MIXED])
def test_integers_with_a_scale_for_each_row_differ_by_single_codes(mesh):
    """A row's amax that is one rounding off moves the codes of the row, and so a few of them to their neighbours."""
    _, metrics, _ = after(mesh, "int8/compute=float32")
    _, expected, _ = after("data:1", "int8/compute=float32")
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], expected["gradient_norm"], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"remat": True}, {"accumulate": 2}], ids=str)
def test_remat_and_microbatches_change_nothing_on_a_mesh(options):
    found, metrics, _ = after(MIXED, "fp8/compute=float32", **options)
    alone, expected, _ = after("data:1", "fp8/compute=float32", **options)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found["dots"]), jax.tree.leaves(alone["dots"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp:4,tensor:2"])
def test_what_one_mesh_has_saved_another_goes_on_from(mesh, tmp_path):
    precision = "fp8/compute=float32"
    saved, *_ = after(MIXED, precision)
    _, expected, _ = after(MIXED, precision, steps=2)
    placement = Placement.parse(mesh, 8)
    trainer = make_trainer(precision, shardings=placement.of_model(mesh, CONFIG, LENGTH))
    target = placement.shapes(jax.eval_shape(trainer.init))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved)
        checkpoints.wait()
        state = checkpoints.latest_good(target).tree
    assert jax.tree.structure(state) == jax.tree.structure(saved)
    for found, wanted, before in zip(*map(jax.tree.leaves, (state, target, saved)), strict=True):
        assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)
        np.testing.assert_array_equal(found, before)
    batch = make_tokens(1).reshape(1, -1, LENGTH + 1)
    tokens = placement.place(batch, batch.shape[1])
    _, metrics = placement.lower(trainer.step, state, tokens, donate=(0,)).compile()(state, tokens)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)


@functools.cache
def seen(mesh, precision):
    """What telemetry sees of the second step on a mesh."""
    placement = Placement.parse(mesh, 8)
    trainer = make_trainer(precision, shardings=placement.of_model(mesh, CONFIG, LENGTH))
    state, *_ = after(mesh, precision)
    batch = make_tokens(1)
    tokens = placement.place(batch[:, placement.local_rows(8)], 8)
    function = functools.partial(observe, trainer, ("model", *telemetry.KINDS))
    return jax.device_get(placement.lower(function, state, tokens).compile()(state, tokens))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp:8", MIXED])
def test_telemetry_sees_on_every_mesh_what_it_sees_on_one_device(mesh):
    found, alone = (seen(where, "fp8/compute=float32") for where in (mesh, "data:1"))
    assert found["dots"].keys() == alone["dots"].keys() > {"blocks/attention/qkv", "blocks/mlp/down"}
    for layer, probe in alone["dots"].items():
        ours, wanted = found["dots"][layer], telemetry.summary(probe)
        # How many values there are, are not zero, are clipped and vanish, and in which binades they lie.
        np.testing.assert_array_equal(ours.sums[..., :4], probe.sums[..., :4])
        np.testing.assert_array_equal(ours.binades, probe.binades)
        np.testing.assert_allclose(ours.tops, probe.tops, rtol=1e-6)
        ours = telemetry.summary(ours)
        for tensor in ("lhs", "rhs", "grad"):
            np.testing.assert_allclose(ours[tensor]["sqnr"], wanted[tensor]["sqnr"], atol=1e-3)
            np.testing.assert_allclose(ours[tensor]["kurtosis"], wanted[tensor]["kurtosis"], rtol=1e-4)
        for gemm in ("fwd", "dlhs", "drhs"):
            np.testing.assert_allclose(ours[gemm]["error"], wanted[gemm]["error"], rtol=1e-4)
            np.testing.assert_allclose(ours[gemm]["cosine"], wanted[gemm]["cosine"], rtol=1e-6)
            np.testing.assert_allclose(ours[gemm]["bias"], wanted[gemm]["bias"], atol=1e-5)
        np.testing.assert_allclose(ours["fwd"]["loss_change"], wanted["fwd"]["loss_change"], atol=1e-6)
    assert found["model"].keys() == alone["model"].keys()
    for name, value in alone["model"].items():
        np.testing.assert_allclose(found["model"][name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_parameters_and_what_the_optimizer_keeps_of_them_are_split():
    state, *_ = after(MIXED, "fp8/compute=float32")
    up = state["params"]["blocks"]["mlp"]["up"]["kernel"]
    layers, width, halves, hidden = up.shape
    assert up.addressable_shards[0].data.shape == (layers, width // 2, halves, hidden // 2)
    split = [leaf for leaf in jax.tree.leaves(state["optimizer"]) if leaf.shape == up.shape]
    assert len(split) == 2 and all(leaf.sharding == up.sharding for leaf in split)
    whole = [leaf for leaf in jax.tree.leaves(state["params"]) if leaf.sharding.is_fully_replicated]
    assert all(leaf.ndim <= 2 and leaf.shape[-1] == width for leaf in whole) and len(whole) == 3  # the norms
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state["dots"]))


def gathers(program, smallest):
    """How often each array of so many elements is gathered, by dtype and shape."""
    found = collections.Counter()
    for dtype, written in re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", program):
        shape = tuple(int(size) for size in written.split(",") if size)
        if math.prod(shape) >= smallest:
            found["codes" if dtype in ("u8", "s8") else "wide", shape] += 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp:8", MIXED])
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_what_is_gathered_for_8_bit_products_are_codes(precision, mesh):
    """Kernels, and along `tensor` what the blocks multiply; wide are only those of embedding and head, as in BF16."""
    parts = 1 if mesh == "fsdp:8" else 2
    width, heads = CONFIG.d_model, CONFIG.heads // CONFIG.kv_heads + 2
    kernels = [
        (width, CONFIG.kv_heads // parts * heads * CONFIG.head_dim),
        (width // parts, width),
        (width, 2, CONFIG.d_ff // parts),
        (CONFIG.d_ff // parts, width),
    ]
    # The inputs of qkv and up, and the gradients of out and down.
    tensors = [(2, LENGTH, width)] * 4 if parts > 1 else []
    smallest = min(map(math.prod, kernels))
    narrow, wide = (gathers(after(mesh, name)[2], smallest) for name in (precision, "bf16"))
    of_blocks = collections.Counter(("wide", shape) for shape in kernels + tensors)
    assert {kind for kind, _ in wide} == {"wide"}
    assert wide - narrow == of_blocks and not any(kind == "wide" for kind, _ in narrow - wide)
    assert all(narrow["codes", shape] >= times for (_, shape), times in of_blocks.items())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp:8", MIXED])
def test_integers_that_devices_have_summed_travel_in_the_dtype_of_the_result(mesh):
    program = after(mesh, "int8")[2]
    added = re.findall(r"= ([^=]*?) (?:all-reduce|reduce-scatter)(?:-start)?\(", program)
    shapes = [
        (dtype, [int(n) for n in dims.split(",") if n])
        for some in added
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", some)
    ]
    # The amaxes of rows and columns travel as integers.
    largest = max(math.prod(dims) for dtype, dims in shapes if dtype == "s32")
    assert largest <= max(CONFIG.d_model, 2 * CONFIG.d_ff, 3 * CONFIG.d_model)


@pytest.mark.parametrize("mesh", [pytest.param("fsdp:8", marks=pytest.mark.slow), MIXED])
def test_the_amaxes_of_a_step_travel_in_one_reduction_of_float32(mesh):
    program = after(mesh, "fp8")[2]
    slots = 3 * 4 * CONFIG.layers
    reduced = re.findall(r"= (\(?[^=]*?) all-reduce(?:-start)?\(", program)
    assert sum(f"f32[{slots}]" in shapes for shapes in reduced) == 1
    # Nor do they travel otherwise: what there is of integers are tokens and their places, of truths nothing.
    others = re.findall(r"= (\(?[^=]*?) (?:all-gather|all-reduce|all-to-all|reduce-scatter)(?:-start)?\(", program)
    assert not [shapes for shapes in others if "pred[" in shapes]
    assert not [shapes for shapes in reduced if "s32[" in shapes]


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        ("data", "--mesh=data must be auto or sizes of some of data, fsdp, tensor, as in data:2,fsdp:2,tensor:2."),
        ("data:2,data:2", "--mesh=data:2,data:2 must be auto or sizes"),
        ("expert:2", "--mesh=expert:2 must be auto or sizes"),
        ("fsdp:16", "--mesh=fsdp:16 needs 16 devices, but there are 8: lower it or use auto."),
        ("data:2,fsdp:3", "--mesh=data:2,fsdp:3 does not divide the 8 rows of a microbatch"),
        ("tensor:4", "--mesh=tensor:4 splits kv_heads=2 over tensor:4, which does not divide it: choose a divisor."),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_sentence(mesh, sentence):
    with pytest.raises(ValueError) as error:
        Placement.parse(mesh, 8).of_model(mesh, CONFIG, LENGTH)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mesh", "shown"), [("data:1", "data:1"), ("tensor:2,fsdp:2", "fsdp:2,tensor:2"), ("auto", "data:8")]
)
def test_a_mesh_is_shown_as_it_is_asked_for(mesh, shown):
    assert str(Placement.parse(mesh, 8)) == shown


def test_every_parameter_of_more_than_one_axis_has_a_place():
    mesh = Placement.parse("data:2,fsdp:2,tensor:2", 8).mesh
    for options in ({}, {"tied": True}, {"activation": "gelu"}):
        params = jax.eval_shape(make_trainer("bf16", **options).init)["params"]
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
            names = "/".join(key.key for key in path)
            spec = shardings.parameter(mesh, names, leaf.ndim).spec
            assert ("norm" in names) == (not any(spec)), names
            assert len(spec) in (0, leaf.ndim)


@pytest.mark.parametrize(
    ("kind", "count", "slices", "rows", "model", "shown"),
    [
        ("NVIDIA H100 80GB HBM3", 8, 1, 8, "124m", "data:8"),
        ("NVIDIA H100 80GB HBM3", 8, 1, 8, "8b", "data:2,fsdp:4"),
        ("NVIDIA H100 80GB HBM3", 8, 1, 4, "1b", "data:4"),
        ("TPU v5 lite", 16, 2, 16, "1b", "data:8,fsdp:2"),
        ("TPU v5 lite", 16, 2, 16, "8b", "data:2,fsdp:8"),
        ("cpu", 8, 1, 8, "8b", "data:8"),
    ],
)
def test_auto_splits_parameters_among_as_few_devices_of_a_slice_as_hold_them(kind, count, slices, rows, model, shown):
    assert str(Placement.parse("auto", rows, chips(kind, count, slices), SIZES[model])) == shown


@pytest.mark.parametrize(
    ("mesh", "rows", "chosen"),
    [
        ("auto", 8, [0, 1, 8, 9, 16, 17, 24, 25]),
        ("auto", 64, list(range(32))),
        ("auto", 4, [0, 8, 16, 24]),
        ("fsdp:4,tensor:2", 4, [0, 1, 8, 9, 16, 17, 24, 25]),
        ("auto", 6, "--mesh=auto finds no part of the 6 rows of a microbatch .* for each of 4 processes: make them a"),
        ("fsdp:2", 4, "--mesh=fsdp:2 takes 2 of 32 devices, which are not as many of each of 4 processes: give sizes"),
    ],
)
def test_every_process_has_as_many_devices(mesh, rows, chosen):
    devices = tuple(dataclasses.replace(chip, process_index=chip.id // 8) for chip in chips("a GPU", 32))
    if isinstance(chosen, str):
        with pytest.raises(ValueError, match=chosen):
            Placement.parse(mesh, rows, devices)
    else:
        assert sorted(device.id for device in Placement.parse(mesh, rows, devices).devices) == chosen
