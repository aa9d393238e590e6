"""What --precision, --precision_schedule and --quantize mean, and what devices make of it."""

import types

import jax.numpy as jnp
import pytest
from micro import make_trainer

import q8jax
from experiments.training import native
from experiments.training.native import substitutions
from experiments.training.precision import phase_at, resolve, schedule
from q8jax.policy import Policy

PRESETS = sorted(q8jax.PRECISIONS)
PROJECTIONS = ["blocks/attention/qkv", "blocks/attention/out", "blocks/mlp/up", "blocks/mlp/down"]
PRODUCTS = ["blocks/attention/scores", "blocks/attention/values"]
FULL_RECIPE = "fwd=int8:row:current,int8:row:current/dlhs=e5m2:tensor:current,none/drhs=none,none/compute=float32"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_covers_the_blocks_projections_and_nothing_else(preset):
    phase = resolve(preset)
    recipe = q8jax.PRECISIONS[preset].recipe
    assert phase.compute == recipe.compute
    assert Policy.parse(str(phase.policy)) == phase.policy
    for path in PROJECTIONS:
        assert phase.policy.recipe_for(path) == recipe
    for path in [*PRODUCTS, "head"]:
        assert not phase.policy.recipe_for(path).is_quantized
        assert phase.policy.recipe_for(path).compute == recipe.compute


@pytest.mark.parametrize(
    ("quantize", "tied", "covered"),
    [
        (("blocks",), False, PROJECTIONS),
        (("blocks",), True, PROJECTIONS),
        (("head",), False, ["head"]),
        (("head",), True, ["head"]),
        (("attention",), True, PRODUCTS),
        (("blocks", "attention"), True, [*PROJECTIONS, *PRODUCTS]),
        (("head", "attention", "blocks"), False, [*PROJECTIONS, *PRODUCTS, "head"]),
    ],
)
def test_quantize_moves_the_line(quantize, tied, covered):
    trainer = make_trainer("fp8", quantize=quantize, tied=tied)
    recipes = trainer.recipes()
    assert set(recipes) == {*PROJECTIONS, *PRODUCTS, "head"}
    assert {path for path, recipe in recipes.items() if recipe.is_quantized} == set(covered)


def test_a_policy_names_its_layers_itself():
    trainer = make_trainer("blocks/mlp/up->fp8;blocks/mlp/.*->int8-tensor")
    recipes = trainer.recipes()
    assert set(recipes) == {"blocks/mlp/up", "blocks/mlp/down"}
    assert recipes["blocks/mlp/up"] == q8jax.PRECISIONS["fp8"].recipe
    assert recipes["blocks/mlp/down"] == q8jax.PRECISIONS["int8-tensor"].recipe


def test_overrides_and_whole_recipes():
    assert resolve("fp8/margin=1").policy.recipe_for(PROJECTIONS[0]).margin == 1
    phase = resolve(FULL_RECIPE)
    assert phase.compute == "float32"
    assert phase.policy.recipe_for("blocks/mlp/up").dlhs.second is None


@pytest.mark.parametrize(
    ("precision", "quantize", "message"),
    [
        ("fp9", ("blocks",), "^--precision=fp9: Unknown precision 'fp9' .did you mean 'fp8'.*int8-switchback"),
        ("fp8/marjin=1", ("blocks",), "^--precision=fp8/marjin=1: .*did you mean 'margin'"),
        ("blocks/.*->fp8;.*->fp32", ("blocks",), "compute in bfloat16 and float32.*same compute="),
        ("blocks/.*->fp8", ("head",), "leave --quantize out"),
        ("fp8", ("blocks", "heads"), "--quantize=blocks,heads must list some of blocks, head, attention"),
        ("fp8", (), "--quantize= must list some of"),
    ],
)
def test_misspelt_precisions_are_refused(precision, quantize, message):
    with pytest.raises(ValueError, match=message):
        resolve(precision, quantize)


def test_a_schedule_counts_steps_and_percentages_from_either_end():
    phases = schedule("0:bf16,20%:fp8,200:int8,-10%:bf16,-1:fp32", 250)
    assert [phase.start for phase in phases] == [0, 50, 200, 225, 249]
    assert [phase.name for phase in phases] == ["bf16", "fp8", "int8", "bf16", "fp32"]
    assert [phase.compute for phase in phases][-2:] == ["bfloat16", "float32"]
    at = [phase_at(phases, step).name for step in (0, 49, 50, 199, 200, 248, 249)]
    assert at == ["bf16", "bf16", "fp8", "fp8", "int8", "bf16", "fp32"]


def test_a_schedule_counts_whole_steps_of_a_long_run():
    phases = schedule("0:bf16,200:fp8,-10%:bf16", 1000)
    assert [(phase.start, phase.name) for phase in phases] == [(0, "bf16"), (200, "fp8"), (900, "bf16")]


def test_a_schedule_takes_recipes_and_policies_with_commas_of_their_own():
    policy = "blocks/mlp/.*->fp8;.*->bf16"
    phases = schedule(f"0:{FULL_RECIPE},5:{policy},7.5%:fp8/margin=2", 100)
    assert [phase.start for phase in phases] == [0, 5, 8]
    assert phases[0].policy.recipe_for("blocks/mlp/up") == q8jax.Recipe.parse(FULL_RECIPE)
    assert phases[1].policy == Policy.parse(policy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:bf16,50", "'0:bf16,50'|Unknown precision 'bf16,50'"),
        ("bf16", "'bf16' must be start:precision"),
        ("0:bf16,1.5:fp8", "'1.5:fp8' must start at a whole step or a percentage"),
        ("10:bf16", r"start at steps \[10\]: begin at 0"),
        ("0:bf16,50:fp8,40:bf16", r"\[0, 50, 40\]: begin at 0, rise"),
        ("0:bf16,0:fp8", r"\[0, 0\]: begin at 0, rise"),
        ("0:bf16,100:fp8", r"stay below --steps=100"),
        ("0:bf16,-200:fp8", r"\[0, -100\]: begin at 0, rise"),
        ("0:bf16,5:fp88", "Unknown precision 'fp88' .did you mean 'fp8'"),
    ],
)
def test_schedules_that_cannot_be_are_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        schedule(text, 100)
    assert str(caught.value).startswith(f"--precision_schedule={text}: ")


def device(platform, kind, capability=None):
    extra = {} if capability is None else {"compute_capability": capability}
    return types.SimpleNamespace(platform=platform, device_kind=kind, **extra)


H100, A100, T4 = (device("gpu", f"NVIDIA {name}", cc) for name, cc in (("H100", "9.0"), ("A100", "8.0"), ("T4", "7.5")))
RADEON = device("gpu", "AMD Instinct MI300X", "gfx942")
V6E, V7 = device("tpu", "TPU v6 lite"), device("tpu", "TPU7x")


@pytest.mark.parametrize(
    ("precision", "where", "dtypes"),
    [
        ("fp8", H100, []),
        ("fp8", A100, ["bfloat16"]),
        ("fp8", T4, ["bfloat16", "float32"]),
        ("fp8", V6E, ["bfloat16"]),
        ("fp8", V7, []),
        ("fp8", RADEON, ["a wider type of XLA's choice"]),
        ("bf16", RADEON, []),
        ("fp8-e3m4", H100, ["bfloat16"]),
        ("fp8-e3m4", V7, ["bfloat16"]),
        ("int8", A100, []),
        ("int8", V6E, []),
        ("int8", V7, ["a wider type of XLA's choice"]),
        ("int8/fwd=int4:row,int4:row", A100, ["int8"]),
        ("int8/fwd=int8:row,none", H100, ["bfloat16"]),
        ("int8/fwd=int8:row,none/compute=float32", V6E, ["bfloat16 in six passes"]),
        ("fp32", H100, []),
        ("fp32", V6E, ["bfloat16 in six passes"]),
        ("fp16", V6E, ["a wider type of XLA's choice"]),
        ("bf16", V6E, []),
    ],
)
def test_what_a_device_runs_instead_is_said(precision, where, dtypes):
    lines = substitutions([resolve(precision)], where)
    end = ", which holds the same values"
    assert [line.removesuffix(end).rpartition(" as ")[2] for line in lines] == dtypes
    assert all(line.endswith(end) for line in lines)
    assert all(line.startswith(where.device_kind) for line in lines)


@pytest.mark.parametrize("wide, codes", [("float32", "float16"), ("bfloat16", "bfloat16")])
def test_a_cpu_multiplies_the_codes_in_a_wide_type(monkeypatch, wide, codes):
    monkeypatch.setattr(native, "cpu_dtype", lambda kind: jnp.dtype(codes if kind == "float" else wide))
    cpu = device("cpu", "cpu")
    lines = substitutions([resolve("fp8")], cpu)
    assert lines[0].startswith("this CPU multiplies e4m3fn × e4m3fn, e5m2 × e4m3fn, e4m3fn × e5m2")
    assert lines[0].endswith(f" as {codes}, which holds the same values")
    assert [line.endswith(" as float32, which holds the same values") for line in lines[1:]] == [True] * (
        wide == "float32"
    )
    (line,) = substitutions([resolve("int8/compute=float32")], cpu)
    assert line.endswith(f" as int8 or {wide}, by their layout, which holds the same values")
    assert substitutions([resolve("fp32")], cpu) == []
    assert len(substitutions([resolve("fp16")], cpu)) == 1


def test_every_kind_of_gemm_of_a_schedule_is_said_once():
    phases = schedule("0:bf16,2:fp8,5:int8,8:fp8-e3m4,9:bf16", 10)
    lines = substitutions(phases, A100)
    assert lines == [
        "NVIDIA A100 multiplies e4m3fn × e4m3fn, e5m2 × e4m3fn, e4m3fn × e5m2, e3m4 × e3m4, e5m2 × e3m4, "
        "e3m4 × e5m2 as bfloat16, which holds the same values"
    ]
