"""What the flags of a study come to: entries, seeds, points of sweeps, arms."""

import pytest

from experiments import options, pretrain  # noqa: F401  (pretrain defines the flags)
from experiments.comparing import sweeps
from experiments.comparing.arms import Arm, Protocol, argument


@pytest.mark.parametrize(
    ("texts", "entries"),
    [
        (["fp32,bf16,fp8,int8"], ["fp32", "bf16", "fp8", "int8"]),
        (["fp8/margin=1/history=64,bf16"], ["fp8/margin=1/history=64", "bf16"]),
        (["bf16,bf16, fp8,"], ["bf16", "fp8"]),
        # A preset's name may be an operand as well.
        (["fp8/fwd=int8,int8,bf16"], ["fp8/fwd=int8,int8", "bf16"]),
        (["fp8/fwd=e5m2:tensor:delayed,none/margin=1,int8/drhs=none,none"],
         ["fp8/fwd=e5m2:tensor:delayed,none/margin=1", "int8/drhs=none,none"]),
        (["bf16", ".*mlp.{2,3}->fp8;.*->bf16/fwd=none,none", "int8"],
         ["bf16", ".*mlp.{2,3}->fp8;.*->bf16/fwd=none,none", "int8"]),
        (["0:bf16,50%:fp8", "fp8"], ["0:bf16,50%:fp8", "fp8"]),
        ([""], []),
    ],
)  # fmt: skip
def test_precisions_are_split_where_an_entry_ends(texts, entries):
    assert sweeps.precisions(texts) == entries


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("3", [0, 1, 2]), ("8:11", [8, 9, 10]), ("0,3,5", [0, 3, 5]), ("5,0:2", [0, 1, 5]), ("4,", None), ("-1", None),
     ("0", None), ("3:3", None), ("1e3", None), ("", None)],
)  # fmt: skip
def test_seeds_are_a_number_a_range_or_a_list(text, seeds):
    if seeds is None:
        with pytest.raises(ValueError, match=f"--seeds={text} "):
            sweeps.seeds(text)
    else:
        assert sweeps.seeds(text) == seeds


def test_grids_are_combined_and_zips_go_together():
    assert sweeps.points([], []) == [{}]
    points = sweeps.points(["lr=1,2"], ["steps=10,20", "warmup=1,2"])
    assert points == [
        {"lr": lr, "steps": steps, "warmup": warmup} for lr in "12" for steps, warmup in (("10", "1"), ("20", "2"))
    ]
    assert sweeps.points([], ["steps=10,10", "warmup=1,2"])[1] == {"steps": "10", "warmup": "2"}


def test_values_with_commas_are_separated_by_bars():
    assert sweeps.points(["fwd=none,none|int8,int8", "quantize=blocks|blocks,head"], [])[-1] == {
        "fwd": "int8,int8",
        "quantize": "blocks,head",
    }
    assert sweeps.points(["fwd=none,none"], []) == [{"fwd": "none,none"}]


@pytest.mark.parametrize(
    ("grids", "zips", "message"),
    [
        (["lr"], [], "^--grid=lr must be NAME=VALUE,VALUE"),
        (["lr=1,,2"], [], "^--grid=lr=1,,2 must be"),
        (["lr=1", "lr=2"], [], "^--grid=lr is swept twice"),
        (["lr=1"], ["lr=2"], "lr is swept twice"),
        ([], ["lr=1,2", "steps=1"], "^--zip takes its values together, but lr has 2, steps has 1"),
    ],
)
def test_a_misspelt_sweep_is_refused(grids, zips, message):
    with pytest.raises(ValueError, match=message):
        sweeps.points(grids, zips)


def arms(precisions=("fp32", "bf16", "fp8"), baseline="bf16", controls=(), noise=False, *, grid=(), zip=(), given=()):
    options.parse(["compare", *given])
    return Protocol(precisions, baseline, controls, noise).arms(sweeps.points(grid, zip))


def test_the_protocol_adds_controls_and_noise():
    assert arms(controls=["fp8-unscaled", "int8-tensor"], noise=True) == [
        Arm("fp32", "candidate", {"precision": "fp32"}, "bf16"),
        Arm("bf16", "baseline", {"precision": "bf16"}, None),
        Arm("fp8", "candidate", {"precision": "fp8"}, "bf16"),
        Arm("fp8-unscaled", "control", {"precision": "fp8-unscaled"}, "bf16"),
        Arm("int8-tensor", "control", {"precision": "int8-tensor"}, "bf16"),
        Arm("bf16-perturbed", "noise", {"precision": "bf16", "init_perturbation": 1e-5}, "bf16"),
    ]


def test_the_baseline_is_there_whether_listed_or_not_and_a_control_is_no_candidate():
    assert [(arm.name, arm.role) for arm in arms(["fp8", "int8-tensor"], controls=["int8-tensor"])] == [
        ("bf16", "baseline"),
        ("fp8", "candidate"),
        ("int8-tensor", "control"),
    ]


def test_fields_of_recipes_are_swept_where_they_have_an_effect():
    found = arms(["fp32", "bf16", "fp8", "int8-row"], grid=["history=1,16", "margin=0,1"])
    assert [arm.flags["precision"] for arm in found] == [
        "fp32", "bf16", "fp8/history=1/margin=0", "int8-row/margin=0", "fp8/history=1/margin=1", "int8-row/margin=1",
        "fp8/history=16/margin=0", "fp8/history=16/margin=1",
    ]  # fmt: skip
    assert found[2].name == "fp8_history=1_margin=0"
    assert {arm.baseline for arm in found} == {None, "bf16"}


def test_gemms_formats_and_layers_are_swept():
    found = arms(["fp8"], grid=["drhs=none,none|int8:row,int8:row", "quantize=blocks|head"])
    assert [(arm.flags["precision"], arm.flags["quantize"]) for arm in found[1:]] == [
        (f"fp8/drhs={operands}", [part])
        for operands in ("none,none", "int8:row,int8:row")
        for part in ("blocks", "head")
    ]


def test_what_is_no_matter_of_precision_is_swept_for_every_role():
    found = arms(["fp8"], controls=["int8-tensor"], noise=True, zip=["lr=1e-3,3e-3", "steps=10,20"])
    assert [arm.name for arm in found[:4]] == [
        "bf16_lr=0.001_steps=10",
        "fp8_lr=0.001_steps=10",
        "int8-tensor_lr=0.001_steps=10",
        "bf16-perturbed_lr=0.001_steps=10",
    ]
    assert [arm.baseline for arm in found] == [
        None,
        *["bf16_lr=0.001_steps=10"] * 3,
        None,
        *["bf16_lr=0.003_steps=20"] * 3,
    ]
    assert found[5].flags == {"precision": "fp8", "lr": 0.003, "steps": 20}


def test_names_of_arms_are_those_of_files_and_differ():
    precisions = [
        "fp8/fwd=e5m2:tensor:delayed,none",
        "fp8/fwd=e5m2:tensor:current,none",
        ".*->fp8",
        ".*mlp.*->fp8;.*->bf16",
        "fp8" + "/margin=1/history=64/fwd=none,none/dlhs=none,none/amax=recent/scales=float32/accumulation=fast",
    ]
    names = [arm.name for arm in arms(precisions)[1:]]
    assert len(set(names)) == len(precisions)
    assert all(name[0].isalnum() and len(name) < 100 and not set(name) & set("/:,;*>' ") for name in names)
    assert names == [arm.name for arm in arms(precisions)[1:]]


def test_a_schedule_is_an_arm_too():
    assert arms(["0:bf16,50%:fp8"])[1].flags == {"precision_schedule": "0:bf16,50%:fp8"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": ["histry=1"]}, "Unknown flag or recipe field in --grid or --zip 'histry' .did you mean 'history'"),
        ({"grid": ["precision=fp8"]}, "^--precision is not swept: give its values in --precisions"),
        ({"grid": ["seed=1"]}, "give its values in --seeds"),
        ({"grid": ["stop_after=1"]}, "Unknown flag"),
        ({"grid": ["lr=fast"]}, "^--lr is swept over 'fast'"),
        ({"grid": ["lr=1"], "given": ["--lr=2"]}, "^--lr is swept as well as given"),
        ({"grid": ["history=1"], "precisions": ["fp32"]}, "^history is swept, but has no effect on any"),
        ({"grid": ["history=1"], "precisions": [".*->fp8"]}, "cannot be put into --precisions=.*->fp8"),
        ({"grid": ["history=1"], "precisions": ["fp9"]}, "^--precisions=fp9: Unknown precision 'fp9'"),
    ],
)
def test_a_sweep_without_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        arms(**settings)


def test_flags_are_written_as_they_are_read():
    given = ["--quantize=blocks,head", "--nodeterministic", "--remat", "--lr=1e-05", "--steps=3", "--data=a b.txt"]
    options.parse(["compare", *given])
    settings = {name: options.FLAGS[name].value for name in options.given_flags()}
    assert {argument(name, setting) for name, setting in settings.items()} == set(given)
