"""study.json: what it holds, how it grows, and what is refused."""

import dataclasses
import json

import pytest
from compare_cases import COMMON, STEPS

from experiments import options, pretrain  # noqa: F401  (pretrain defines the flags)
from experiments.comparing import plan
from experiments.comparing.arms import Protocol
from experiments.comparing.halving import Rung, rungs
from experiments.runs import RunError


def study(precisions=("bf16", "fp8"), seeds=(0, 1), flags=COMMON, metric="eval_loss", points=({},), **protocol):
    options.parse(["compare", *flags])
    given = {name: options.FLAGS[name].value for name in sorted(options.given_flags())}
    settings = {"baseline": "bf16", "controls": [], "noise": False} | protocol
    return plan.of_arms(Protocol(precisions, **settings).arms(list(points)), seeds, given, metric)


def test_a_study_reads_back_as_it_was_written(tmp_path):
    assert plan.Study.load(tmp_path) is None
    written = study(controls=["int8-tensor"], noise=True, points=[{"lr": "1e-3", "quantize": "blocks|head"}])
    written.save(tmp_path)
    assert plan.Study.load(tmp_path) == written
    record = json.loads((tmp_path / "study.json").read_text())
    assert list(record) == ["format", "baseline", "metric", "seeds", "arms", "flags", "margins"]
    assert (record["format"], record["baseline"], record["seeds"]) == (1, "bf16_lr=0.001", [0, 1])
    assert record["flags"] == {"batch_size": 4, "seq_len": 16, "steps": STEPS}
    assert record["margins"] == {"parity": 0.25, "strict": 0.1}
    assert [arm["role"] for arm in record["arms"]] == ["baseline", "candidate", "control", "noise"]


def test_a_study_that_is_the_same_is_not_written_again(tmp_path):
    study().save(tmp_path)
    before = (tmp_path / "study.json").stat()
    study().save(tmp_path)
    assert (tmp_path / "study.json").stat() == before


def test_runs_go_seed_by_seed_and_have_independent_arguments(tmp_path):
    runs = study(seeds=[3, 5]).runs(tmp_path)
    assert [run.name for run in runs] == ["bf16-seed3", "fp8-seed3", "bf16-seed5", "fp8-seed5"]
    assert runs[1].arguments == (
        *("--batch_size=4", "--seq_len=16", f"--steps={STEPS}", "--precision=fp8", "--seed=3"),
        f"--workdir={tmp_path}/runs/fp8-seed3",
    )
    assert (runs[1].config["seed"], runs[1].config["precision"], runs[1].steps) == (3, "fp8", STEPS)
    assert "e4m3fn" in runs[1].config["recipes"][0]["policy"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flags": ("--steps=0",)}, "^--steps=0 must be at least 1"),
        ({"precisions": ["fp9"]}, "^--precisions=fp9: Unknown precision 'fp9'"),
        ({"precisions": ["bf16"], "controls": ["int9"]}, "^--controls=int9: Unknown precision"),
        ({"precisions": ["fp8"], "baseline": "bf17"}, "^--baseline=bf17: Unknown precision"),
        ({"precisions": ["fp8"], "points": [{"history": "0"}]}, "^--precisions=fp8/history=0: history=0 must be"),
        ({"seeds": [2**32]}, "^--seed=4294967296 must be at most"),
        (
            {"precisions": ["fp8"], "points": [{"batch_size": "3"}], "flags": ("--accumulate=2",)},
            "^--accumulate=2 must",
        ),
    ],
)
def test_every_arm_is_checked_as_pretrain_checks_it(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        study(**settings).runs(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_study_grows_by_seeds_and_arms(tmp_path):
    study(noise=True).save(tmp_path)
    grown = study(["bf16", "int8"], [1, 2]).joined(plan.Study.load(tmp_path), tmp_path)
    assert grown.seeds == (0, 1, 2)
    own = {"fp8": (0, 1), "bf16-perturbed": (0, 1), "int8": (1, 2)}
    assert {arm.name: arm.seeds for arm in grown.arms if arm.seeds} == own
    grown.save(tmp_path)
    assert plan.Study.load(tmp_path) == grown
    everywhere = study(["bf16", "fp8", "int8"], [0, 1, 2], noise=True).joined(grown, tmp_path)
    assert not [arm for arm in everywhere.arms if arm.seeds]
    assert [arm.name for arm in grown.arms] == ["bf16", "fp8", "bf16-perturbed", "int8"]
    # Spelt otherwise, or said where it is the default, or of no matter to the result.
    again = study(flags=(*COMMON, "--lr=0.003", "--log_every=5", "--cache_dir=x")).joined(study(), tmp_path)
    assert again.flags["cache_dir"] == "x"


def test_an_arm_that_comes_after_a_look_is_marked_and_stays_so(tmp_path):
    study().save(tmp_path)
    assert not any(arm.late for arm in study(["bf16", "int8"]).joined(plan.Study.load(tmp_path), tmp_path).arms)
    look = {"arm": "fp8", "recipe": "fp8", "seeds": [1], "planned": 2}
    (tmp_path / "record.jsonl").write_text(json.dumps(look) + "\n")
    joined = lambda seeds: study(["bf16", "fp8", "int8"], seeds).joined(plan.Study.load(tmp_path), tmp_path)
    assert not any(arm.late for arm in joined([2, 3]).arms)
    late = joined([1, 2])
    assert [arm.name for arm in late.arms if arm.late] == ["int8"]
    late.save(tmp_path)
    assert [arm.name for arm in joined([4]).arms if arm.late] == ["int8"]


def test_points_of_a_sweep_are_marked():
    points = [{"history": "1"}, {"history": "16"}]
    assert [arm.name for arm in study(points=points).arms if arm.swept] == ["fp8_history=1", "fp8_history=16"]
    assert not any(arm.swept for arm in study().arms)


def test_an_arm_that_is_there_becomes_a_point_of_a_sweep(tmp_path):
    alone, points = [{"history": "1"}], [{"history": "1"}, {"history": "16"}]
    for first, then in ((alone, points), (points, alone)):
        joined = study(points=then).joined(study(points=first), tmp_path)
        assert [arm.name for arm in joined.arms if arm.swept] == ["fp8_history=1", "fp8_history=16"]


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"flags": (*COMMON, "--lr=1e-2")}, "--lr=0.003 .here 0.01."),
        ({"flags": ("--steps=10", *COMMON[1:])}, "--steps=9 .here 10."),
        ({"metric": "eval_loss_average"}, "--metric=eval_loss "),
        ({"baseline": "fp32"}, "--baseline=bf16 .here fp32."),
        # What was a flag of all is swept: the arms that are there would change.
        ({"flags": (*COMMON, "--nodeterministic", "--clip=2")}, "--clip=1.0 .here 2.0."),
    ],
)
def test_another_study_in_the_same_place_is_refused(tmp_path, settings, flag):
    with pytest.raises(ValueError, match=f"^--out={tmp_path} holds a study with {flag}"):
        study(**settings).joined(study(), tmp_path)


def test_an_arm_does_not_change_its_role(tmp_path):
    with pytest.raises(ValueError, match="holds an arm fp8 that is a candidate with --precision=fp8, here a control"):
        study(["bf16"], controls=["fp8"]).joined(study(), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "study.json is not JSON"),
        ("[]", "study.json is no study of this version"),
        ('{"format": 2}', "is no study of this version; restore it, or give another --out"),
        ('{"format": 1, "baseline": "bf16"}', "is no study of this version"),
        (None, "study.json cannot be read"),
    ],
)
def test_an_unreadable_study_is_refused_and_left(tmp_path, text, message):
    path = tmp_path / "study.json"
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(RunError, match=message):
        plan.Study.load(tmp_path)
    assert path.exists()


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="^--out=.* is there and holds no study.json; give a new or empty directory"):
        plan.Study.load(tmp_path)
    with pytest.raises(RunError, match="is there and holds no study.json"):
        plan.Study.load(tmp_path / "thesis.tex")
    (tmp_path / "thesis.tex").rename(tmp_path / ".lock")
    assert plan.Study.load(tmp_path) is None


def test_a_full_disk_is_a_sentence(tmp_path):
    with pytest.raises(RunError, match=r"study.json cannot be written \(no such file or directory\); make room"):
        study().save(tmp_path / "gone")


def stored(run, **changes):
    run.path.mkdir(parents=True)
    resolved = {"mesh": "data:8", "vocab": 256, "tokenizer": "bytes", "log_every": 3}
    (run.path / "config.json").write_text(json.dumps({**run.config, **resolved, **changes}))


def test_a_run_on_disk_is_compared_with_what_it_would_be_now(tmp_path):
    same, longer, other = study(["bf16", "fp8"], [0, 1]).runs(tmp_path)[:3]
    assert same.differences() == {}
    stored(same)
    assert same.differences() == {}
    stored(longer, steps=10, lr=0.1)
    assert longer.differences() == {"steps": ("10", str(STEPS)), "lr": ("0.1", "0.003")}
    stored(other, recipes=[{"start": 0, "policy": ".*->fp8"}])
    assert list(other.differences()) == ["recipes"]
    # Written before there was a flag of that name.
    newer = dataclasses.replace(same, config={**same.config, "telemetry": "off"})
    assert newer.differences() == {}


def test_rungs_are_shares_of_the_steps(tmp_path):
    arms = study(["fp8", "int8"]).arms
    assert rungs(0, arms) == []
    assert rungs(3, arms) == [Rung(3, 2), Rung(3, 1)]
    run = study().runs(tmp_path)[0]
    assert [rung.step(run) for rung in rungs(3, arms)] == [1, 3]
    assert str(Rung(3, 2)) == "the first 1/9 of the steps"
    for factor, few, message in (
        (1, arms, "must be at least 2"),
        (-2, arms, "at least 2"),
        (3, arms[:2], "sweep something"),
    ):
        with pytest.raises(ValueError, match=f"^--halving={factor} .*{message}"):
            rungs(factor, few)


def write(run, *metrics, diverged=False):
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if diverged:
        (run.path / "diverged.json").write_text('{"step": 3, "reason": ""}')


def test_a_rung_keeps_the_best_and_what_they_are_compared_with(tmp_path):
    many = study(["fp8", "int8"], points=[{"lr": "1"}, {"lr": "2"}, {"lr": "3"}], controls=["int8-tensor"], noise=True)
    runs, rung = many.runs(tmp_path), Rung(3, 1)
    losses = {"fp8_lr=1.0": 5, "int8_lr=1.0": 3.5, "fp8_lr=2.0": 2, "int8_lr=2.0": 3, "fp8_lr=3.0": 4, "int8_lr=3.0": 1}
    for run in runs:
        loss = losses.get(run.arm, 0) + run.seed
        assert not rung.has(run)
        write(run, {"step": 2, "loss": 9}, {"step": 3, "loss": 9, "eval_loss": loss}, {"step": 4, "loss": -9})
        assert rung.has(run)
    found = rung.losses(runs)
    assert {name: found[name] for name in losses} == {name: loss + 0.5 for name, loss in losses.items()}
    assert [arm.name for arm in rung.kept(many.arms, found)] == [
        *("bf16_lr=2.0", "fp8_lr=2.0", "int8-tensor_lr=2.0", "bf16-perturbed_lr=2.0"),
        *("bf16_lr=3.0", "int8_lr=3.0", "int8-tensor_lr=3.0", "bf16-perturbed_lr=3.0"),
    ]


def test_a_run_that_diverged_or_failed_before_a_rung_is_the_worst_there(tmp_path):
    few = study(["fp8", "int8", "int8-row"])
    runs, rung = few.runs(tmp_path), Rung(3, 1)
    for run in runs:
        write(run, {"step": 3, "loss": 1.0, "eval_loss": 1.0 if run.arm != "int8-row" else 100.0})
    write(runs[1], {"step": 2, "loss": 0.1}, diverged=True)
    assert rung.has(runs[1])
    (runs[2].path / "metrics.jsonl").unlink()
    assert not rung.has(runs[2])
    losses = rung.losses(runs)
    assert list(losses)[:2] == ["bf16", "int8-row"] and set(list(losses.values())[2:]) == {float("inf")}
    assert [arm.name for arm in rung.kept(few.arms, losses)] == ["bf16", "int8-row"]


def test_where_a_run_did_not_stop_at_a_rung_training_losses_are_compared(tmp_path):
    runs, rung = study(seeds=[0]).runs(tmp_path), Rung(3, 1)
    write(runs[0], {"step": 3, "loss": 2.0, "eval_loss": 1.0})
    write(runs[1], {"step": 2, "loss": 1.5}, {"step": 4, "loss": 0.5, "eval_loss": 9})
    assert rung.losses(runs) == {"fp8": 1.5, "bf16": 2.0}
