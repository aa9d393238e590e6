"""Recipes: the one string form, what it refuses, and the table of presets."""

import dataclasses
import pickle
import re

import numpy as np
import pytest

from q8jax import PRECISIONS, Gemm, Operand, Recipe
from q8jax.recipe import ACCUMULATIONS, AMAX_CHOICES, COMPUTE_DTYPES, GEMM_FORMATS, GEMMS, SCALE_FORMATS, SCALINGS
from q8jax.rounding import ROUNDINGS


def random_recipe(random: np.random.Generator) -> Recipe:
    def operand() -> Operand | None:
        if random.random() < 0.3:
            return None
        granularity = str(random.choice(["tensor", "tensor", "row", "tile32", "block16"]))
        scaling = str(random.choice(SCALINGS)) if granularity == "tensor" else "current"
        return Operand(str(random.choice(GEMM_FORMATS)), granularity, scaling, str(random.choice(ROUNDINGS)))

    recipe = Recipe(*(Gemm(operand(), operand()) for _ in range(3)))
    options: dict[str, object] = {"compute": str(random.choice(COMPUTE_DTYPES))}
    if any(operand.scaling != "unit" for operand in recipe.operands):
        options["margin"] = int(random.integers(0, 17))
        options["scales"] = str(random.choice(SCALE_FORMATS))
    gemms = (recipe.fwd, recipe.dlhs, recipe.drhs)
    if any(all(o and o.format.kind == "float" for o in gemm) for gemm in gemms):
        options["accumulation"] = str(random.choice(ACCUMULATIONS))
    if any(operand.scaling == "delayed" for operand in recipe.operands):
        options["history"] = int(random.integers(1, 2000))
        options["amax"] = str(random.choice(AMAX_CHOICES))
    return dataclasses.replace(recipe, **options)


def test_the_string_form_round_trips():
    random = np.random.default_rng(0)
    recipes = [random_recipe(random) for _ in range(500)]
    recipes += [precision.recipe for precision in PRECISIONS.values()]
    for recipe in recipes:
        assert Recipe.parse(str(recipe)) == recipe
        assert eval(repr(recipe), {"Recipe": lambda text: Recipe.parse(text)}) == recipe
        assert pickle.loads(pickle.dumps(recipe)) == recipe
        assert hash(Recipe.parse(str(recipe))) == hash(recipe)
    assert len({str(recipe) for recipe in recipes}) == len(set(recipes)) > 400


def test_presets_are_what_design_and_users_expect():
    asked_for = "fp32 bf16 fp16 fp8 fp8-current fp8-row fp8-block fp8-e3m4 int8 int8-block"
    assert {*asked_for.split(), "int8-tensor", "int8-switchback"} <= set(PRECISIONS)
    for name, precision in PRECISIONS.items():
        assert Recipe.parse(name) == precision.recipe
        assert len(precision.summary) > 40 and precision.summary.endswith(".")
        assert re.search(r"arXiv:\d{4}\.\d{5}|IEEE|torchao", precision.source)
        formats = {operand.qtype for operand in precision.recipe.operands}
        if name.startswith("int8"):
            assert formats == {"int8"}
        elif "fp8" in name:
            assert formats and all(qtype.startswith("float8") for qtype in formats)
        else:
            assert not precision.recipe.is_quantized
    # fp8 and int8 run all three GEMMs in 8 bits.
    for name in ("fp8", "int8"):
        assert len(Recipe.parse(name).operands) == 6
    delayed = {name for name, p in PRECISIONS.items() if p.recipe.keeps_state}
    assert delayed == {"fp8", "fp8-hybrid", "fp8-e3m4", "int8"}
    with pytest.raises(TypeError):
        PRECISIONS["fp8"] = PRECISIONS["bf16"]


def test_a_preset_with_overrides_changes_just_these():
    fp8 = Recipe.parse("fp8")
    assert Recipe.parse("fp8/margin=1/history=64/drhs=none,none") == dataclasses.replace(
        fp8, margin=1, history=64, drhs=Gemm()
    )
    only_weights = Recipe.parse("fwd=none,int8:row")
    assert only_weights == Recipe(fwd=Gemm(None, Operand("int8", "row", "current")))
    assert Recipe.parse("fp8/compute=float32").compute == "float32"
    # Long and short names are one format.
    assert Operand("float8_e4m3fn") == Operand("e4m3fn") != Operand("e4m3")


def test_slots_are_the_quantized_tensors_by_format():
    names = lambda recipe: [(slot.tensor, slot.qtype) for slot in Recipe.parse(recipe).slots]
    assert names("bf16") == []
    both = [("lhs", "float8_e4m3fn"), ("rhs", "float8_e4m3fn"), ("grad", "float8_e5m2")]
    assert names("fp8-hybrid") == both
    assert names("fp8-hybrid/drhs=e5m2,e5m2") == [both[0], ("lhs", "float8_e5m2"), *both[1:]]
    assert names("dlhs=e4m3fn,none/drhs=none,int8") == [("grad", "float8_e4m3fn"), ("grad", "int8")]


def test_static_operands_have_slots_of_their_own():
    names = lambda recipe: [(slot.tensor, slot.is_static) for slot in Recipe.parse(recipe).slots]
    forward = "fwd=e4m3fn:tensor:static,e4m3fn:tensor:static"
    both = [("lhs", False), ("lhs", True), ("rhs", False), ("rhs", True), ("grad", False)]
    assert names(f"fp8/{forward}") == names(f"fp8-current/{forward}") == both
    assert names(f"fp8/{forward}/drhs=none,none") == both[1:]
    assert names(forward) == [both[1], both[3]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"Unknown precision ''"),
        ("fp9", r"Unknown precision 'fp9' \(did you mean 'fp8'\?\): choose one of fp32, bf16"),
        ("FP8", r"Unknown precision 'FP8'"),
        ("fp8/margn=1", r"Unknown recipe field 'margn' \(did you mean 'margin'\?\).*fwd, dlhs"),
        ("fp8/margin=1/margin=2", r"'margin' is given twice"),
        ("fp8/margin", r"margin='' must be a whole number"),
        ("fp8/margin=1.5", r"margin='1.5' must be a whole number"),
        ("fp8/margin=-1", r"margin=-1 must be .* 0 to 16"),
        ("fp8/margin=17", r"margin=17 must be .* 0 to 16"),
        ("fp8/history=0", r"history=0 must be .* from 1 to 65536"),
        ("fp8/history=99999999", r"history=99999999 must be .* from 1 to 65536"),
        ("fp8/amax=maxx", r"Unknown amax choice 'maxx' \(did you mean 'max'\?\).*max, recent"),
        ("fp8/compute=bfloat15", r"Unknown compute dtype 'bfloat15' \(did you mean 'bfloat16'\?\)"),
        ("fp8/compute=float64", r"Unknown compute dtype 'float64'.*float32, bfloat16, float16"),
        ("fp8/scales=power", r"Unknown scale format 'power'.*float32, power_of_two, e8m0"),
        ("fp8/accumulation=exact", r"Unknown accumulation 'exact'.*fast, mixed, accurate"),
        ("fp8/fwd=none", r"GEMM 'none' must have two operands"),
        ("fp8/fwd=none,none,none", r"must have two operands"),
        ("fp8/fwd=e4m3f,none", r"Unknown operand format 'e4m3f' \(did you mean 'e4m3fn'\?\)"),
        ("fp8/fwd=e4m3fn:tensr,none", r"Unknown granularity 'tensr' \(did you mean 'tensor'\?\)"),
        ("fp8/fwd=e4m3fn:tile,none", r"Unknown granularity 'tile'.*tileK, blockK"),
        ("fp8/fwd=e4m3fn:tile0,none", r"Unknown granularity 'tile0'"),
        ("fp8/fwd=e4m3fn:blockK,none", r"needs a number for K: write say block32"),
        ("fp8/fwd=int8:row:curent,none", r"Unknown scaling 'curent' \(did you mean 'current'\?\)"),
        ("fp8/fwd=int8:row:current:nearest,none", r"Unknown rounding 'nearest'.*nearest_even"),
        ("fp8/fwd=int8:row:current:truncate:x,none", r"more than four words"),
        ("fp8/fwd=int8:row:delayed,none", r"Delayed scaling has one scale per tensor.*'row'"),
        ("fp8/fwd=int8:tile32:static,none", r"Static scaling has one scale per tensor.*'tile32'"),
        # Formats that cannot hold a gradient, or an activation.
        ("fp8/dlhs=uint8,e4m3fn", r"uint8 cannot be an operand of a GEMM or hold a gradient"),
        ("fp8/dlhs=e8m0fnu,none", r"float8_e8m0fnu cannot be .* hold a gradient"),
        ("fp8/dlhs=bfloat16,none", r"bfloat16 cannot be .* at most 8 bits"),
        ("fp8/fwd=int16,none", r"int16 cannot be .* at most 8 bits"),
        # Options that would be accepted and ignored.
        ("bf16/margin=1", r"margin=1 has no effect without a quantized operand"),
        ("fp32/scales=e8m0", r"scales=e8m0 has no effect without a quantized operand"),
        ("int8/accumulation=fast", r"accumulation=fast has no effect without a GEMM of two floating-point formats"),
        ("int8-row/history=4", r"history=4 has no effect without a delayed operand"),
        ("fp8-current/amax=recent", r"amax=recent has no effect without a delayed operand"),
        ("fwd=int8:tensor:static,none/history=64", r"history=64 has no effect without a delayed operand"),
    ],
)
def test_misspelt_options_raise_one_sentence(text, message):
    with pytest.raises(ValueError, match=message) as error:
        Recipe.parse(text)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_accumulation_is_chosen_for_each_gemm():
    fast = {
        how: [Recipe.parse(f"fp8/accumulation={how}").accumulates_fast(gemm) for gemm in GEMMS] for how in ACCUMULATIONS
    }
    assert fast == {"fast": [True] * 3, "mixed": [True, False, False], "accurate": [False] * 3}


def test_construction_checks_what_parsing_checks():
    for make, message in (
        (lambda: Recipe(fwd="e4m3fn,e4m3fn"), "fwd must be a Gemm"),
        (lambda: Gemm("e4m3fn", None), "must be an Operand or None"),
        (lambda: Recipe(history=2.0), "history=2.0 must be a whole number"),
        (lambda: Operand("e4m3fn", rounding="up"), "Unknown rounding 'up'"),
        (lambda: dataclasses.replace(Recipe.parse("int8"), margin=-1), "margin=-1"),
        (lambda: dataclasses.replace(Operand("int8", "row"), scaling="delayed"), "Delayed scaling has one scale"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe.parse("fp8").margin = 1
