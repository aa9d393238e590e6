"""Which runs are drawn, as which arms, and what is said of the others."""

import fcntl
import json
import shutil

import pytest
import synthetic_study

from experiments.plots import roofline, sensitivity
from experiments.plots.study import common_steps, load
from experiments.plots.style import VENUES


@pytest.fixture
def study(tmp_path):
    return synthetic_study.write(tmp_path / "study", telemetry=())


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_study_has_the_arms_of_its_plan(study):
    found = load(str(study))
    assert [arm.name for arm in found.arms] == list(synthetic_study.ARMS)
    assert [arm.role for arm in found.arms] == ["baseline", *["candidate"] * 3, "control", "noise"]
    assert not found.missing and found.is_timed
    control = found.arms[4]
    # What diverged is counted and drawn, but has no final loss to compare.
    assert list(control.runs) == [0, 1, 2, 3] and list(control.diverged) == [2] and len(found.pairs(control)) == 3
    assert control.label == "fp8-unscaled (3 of 4 seeds)" and found.arms[0].label == "bf16 (4 seeds)"
    assert found.comparison["fp8-unscaled"]["diverged"] == 1 and found.comparison["fp8"]["verdict"] == "parity"
    assert found.title == "bf16, fp32, fp8, int8: 918,656 parameters, 1,228,800 tokens"


def test_a_partial_study_says_what_is_missing(study):
    runs = study / "runs"
    shutil.rmtree(runs / "int8-seed3")
    (runs / "fp8-seed1" / "summary.json").unlink()
    (runs / "fp8-seed2" / "summary.json").unlink()
    with open(runs / "fp8-seed2" / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = load(str(study))
    assert list(found.arms[2].runs) == [0, 3] and list(found.arms[3].runs) == [0, 1, 2]
    text = " ".join(found.missing)
    assert "fp8-seed1 was stopped, after step 300 of 300" in text and "fp8-seed2 is still running" in text
    assert "int8 has not been run with seed 3" in text


def test_without_a_baseline_a_study_is_drawn_and_not_compared(study):
    for path in (study / "runs").glob("bf16-seed*"):
        shutil.rmtree(path)
    found = load(str(study))
    assert not found.comparison and not any(found.pairs(arm) for arm in found.arms)
    assert "No run of bf16, the baseline, has ended: nothing is compared with it." in found.missing


def test_directories_without_a_plan_are_grouped_by_precision(study):
    (study / "study.json").unlink()
    found = load(str(study / "runs"))
    assert [(arm.name, arm.role) for arm in found.arms] == [
        ("bf16", "baseline"),
        ("bf16-perturbed", "noise"),
        ("fp32", "candidate"),
        ("fp8", "candidate"),
        ("fp8-unscaled", "control"),
        ("int8", "candidate"),
    ]
    assert found.comparison["fp8"]["seeds"] == 4
    some = load(f"{study}/runs/*-seed0")
    assert [len(arm.runs) for arm in some.arms] == [1] * 6
    assert some.comparison["int8"]["verdict"] == "not enough evidence"


def test_what_is_known_of_timings_holds_for_runs_without_their_study_too(study):
    known = load(str(study))
    timed = {arm.name for arm in known.arms if known.has_timing(arm)}
    (study / "study.json").unlink()
    found = load(str(study / "runs"))
    assert found.is_timed and {arm.name for arm in found.arms if found.has_timing(arm)} == timed
    (study / "attempts.jsonl").unlink()
    found = load(str(study / "runs"))
    assert not found.is_timed and all(map(found.has_timing, found.arms))


def test_a_final_loss_that_is_not_finite_is_a_divergence_in_pictures_too(study):
    path = study / "runs/fp8-seed1/summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eval_loss": None}))
    for source in (study, study / "runs"):
        found = load(str(source))
        (fp8,) = [arm for arm in found.arms if arm.name == "fp8"]
        assert sorted(fp8.finished) == [0, 2, 3] and sorted(fp8.diverged) == [1]
        assert found.comparison["fp8"]["diverged"] == 1


def test_runs_of_one_precision_with_other_recipes_are_not_one_arm(study):
    path = study / "runs/fp8-seed1/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "recipes": [{"start": 0, "policy": "fp8/margin=1"}]}))
    with pytest.raises(ValueError, match="are both of --precision=fp8, but with other recipes: leave one"):
        load(str(study / "runs"))


def test_names_that_two_directories_share_are_told_apart(tmp_path):
    for precision in ("bf16", "fp8"):
        synthetic_study.write_run(tmp_path / precision / "seed0", precision, 0)
    assert [run.name for run in load(str(tmp_path)).runs] == ["bf16/seed0", "fp8/seed0"]


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("lr", {"lr": 0.001}),
        ("schedule", {"schedule": "wsd"}),
        ("batch_size", {"batch_size": 32}),
        ("data", {"data_sha256": {"train": "c" * 64, "validation": "b" * 64}}),
    ],
)
def test_mixed_directories_are_refused(study, flag, changes):
    edit(study / "runs" / "int8-seed2" / "config.json", **changes)
    with pytest.raises(ValueError, match=rf"int8-seed\d and .*int8-seed2 .*--{flag}\b"):
        load(str(study))
    with pytest.raises(ValueError, match=rf"-seed0 and .*int8-seed2 are not comparable, --{flag} is .* in one and"):
        load(str(study / "runs"))


def test_what_is_drawn_stands_in_the_record(study):
    load(str(study))
    record = [json.loads(line) for line in (study / "record.jsonl").read_text().splitlines()]
    assert {line["arm"] for line in record} == set(synthetic_study.ARMS) - {"bf16"}
    load(str(study))
    assert len((study / "record.jsonl").read_text().splitlines()) == len(record)


def test_runs_that_began_with_other_parameters_are_refused(study):
    path = study / "runs" / "int8-seed2" / "env.json"
    sessions = json.loads(path.read_text())["sessions"]
    edit(path, sessions=[{**session, "initialisation": "abc"} for session in sessions])
    for source in (study, study / "runs"):
        with pytest.raises(
            ValueError, match=r"int8-seed2 began with other parameters \(abc\) than .*-seed2 \(not said"
        ):
            load(str(source))


def test_a_run_that_is_there_twice_is_refused(study):
    shutil.copytree(study / "runs" / "fp8-seed2", study / "runs" / "copy")
    with pytest.raises(ValueError, match=r"copy and .*fp8-seed2 are both of --precision=fp8 --seed=2: leave one"):
        load(str(study / "runs"))


def test_where_no_run_has_ended_there_is_nothing_to_draw(tmp_path):
    run = synthetic_study.write_run(tmp_path / "runs" / "fp8-seed0", "fp8", 0)
    (run / "summary.json").unlink()
    with open(run / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="no run under .* has ended: fp8-seed0 is still running, after step 300"):
            load(str(tmp_path))
    with pytest.raises(ValueError, match="has ended: fp8-seed0 was stopped after step 300 of 300"):
        load(str(tmp_path))


def test_a_damaged_plan_is_named(study):
    (study / "study.json").write_text('{"arms": ')
    with pytest.raises(ValueError, match=r"study\.json is no plan of a study .*: restore it"):
        load(str(study))


def test_runs_that_shared_the_machine_have_no_time(study):
    lines = [json.loads(line) for line in (study / "attempts.jsonl").read_text().splitlines()]
    shared = [line | {"jobs": 2 if line["run"].startswith("fp8-seed") else 1} for line in lines]
    (study / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shared))
    found = load(str(study))
    assert [arm.name for arm in found.arms if not found.has_timing(arm)] == ["fp8"]


def test_runs_that_all_diverged_have_a_time(study):
    for path in (study / "runs").glob("fp8-unscaled-seed*/summary.json"):
        path.unlink()
        path.with_name("diverged.json").write_text(json.dumps({"step": 300, "reason": "the loss is nan"}))
    found = load(str(study))
    assert not found.arms[4].finished and found.has_timing(found.arms[4])


def test_curves_meet_at_the_steps_that_all_runs_have(study):
    runs = list(load(str(study)).arms[0].runs.values())
    assert common_steps(runs, "eval_loss").tolist() == [50, 100, 150, 200, 250, 300]
    runs[1].metrics["eval_loss"][-1] = float("nan")
    assert common_steps(runs, "eval_loss").tolist() == [50, 100, 150, 200, 250]
    assert common_steps(runs, "log_z").tolist() == common_steps([], "loss").tolist() == []


def test_what_else_is_drawn_is_found_beside_the_runs(study):
    (study / "benchmark").mkdir()
    for path in (study / "benchmark" / "benchmark.json", study / "runs" / "bf16-seed0" / "whatif.json"):
        path.write_text("{}")
    assert list(load(str(study)).others) == ["runs/bf16-seed0/whatif.json", "benchmark/benchmark.json"]
    with pytest.raises(ValueError, match=r"whatif\.json is damaged .*: make it again, or remove it"):
        list(sensitivity.draw(load(str(study)), VENUES["icml"]))
    with pytest.raises(ValueError, match=r"benchmark\.json is damaged .*: make it again, or remove it"):
        list(roofline.draw(load(str(study)), VENUES["icml"]))
