"""What --precision, --precision_schedule and --quantize mean."""

import pytest
from micro import make_trainer

import q8jax
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
