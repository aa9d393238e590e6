import fcntl
import gzip
import json
import math

import numpy as np
import pytest

from experiments.comparing import curves, results
from experiments.comparing.arms import Arm
from experiments.comparing.plan import Study
from experiments.comparing.record import StudyError

STEPS, TOKENS = 40, 8 * 16  # of a run, and of a step
CONFIG = {
    "batch_size": 8,
    "seq_len": 16,
    "steps": STEPS,
    "lr": 0.003,
    "data": "markov",
    "tokenizer": "given",
    "vocab": 64,
    "data_sha256": {"train": "aaaa", "validation": "bbbb"},
    "precision_schedule": "",
    "init_perturbation": 0.0,
    "mesh": "data:1",
    "log_every": 10,
}
ARMS = [
    {"name": "bf16", "role": "baseline", "flags": {"precision": "bf16"}},
    {"name": "fp8", "role": "candidate", "flags": {"precision": "fp8"}, "baseline": "bf16"},
    {"name": "int8", "role": "candidate", "flags": {"precision": "int8"}},
    {"name": "int8-tensor", "role": "control", "flags": {"precision": "int8-tensor"}},
    {"name": "bf16-perturbed", "role": "noise", "flags": {"precision": "bf16", "init_perturbation": 1e-5}},
]
LOSSES = {
    "bf16": [2.0, 4.0, 5.0],
    "fp8": [2.001, 4.002, 5.0025],  # 0.05 % above
    "int8": [2.002, 4.008, 5.015],  # 0.1, 0.2 and 0.3 % above
    "int8-tensor": [math.inf, 4.4, math.inf],
    "bf16-perturbed": [2.0002, 4.0, 4.9995],  # 0.01, 0 and −0.01 %
}
# As statistics.py has them, which is tested apart.
T2 = lambda p: (2 * p - 1) / math.sqrt(2 * p * (1 - p))
CHI2_2 = lambda p: -2 * math.log(1 - p)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_study(path, arms=ARMS, seeds=(0, 1, 2), **changes):
    margins = {"parity": 0.25, "strict": 0.1}
    plan = {"format": 1, "baseline": "bf16", "metric": "eval_loss", "seeds": list(seeds), "arms": arms, "flags": {}}
    write(path / "study.json", {**plan, "margins": margins, **changes})


def write_run(
    study, arm, seed, loss, *, curve=None, speed=1000.0, policy=None, started="2026-01-01", sessions=1, **config
):
    """A run with a line every second step and an evaluation every tenth; diverged if its loss is infinite.

    Args:
      study: the directory.
      arm, seed: which run.
      loss: final, in the summary.
      curve: held-out losses at steps 10, 20, 30 and 40.
      speed: tokens per second.
      policy: the recipe; the arm's name.
      started: when, of its first session.
      sessions: how many.
      config: what is otherwise than in CONFIG.
    """
    path = study / "runs" / f"{arm}-seed{seed}"
    flags = next((found["flags"] for found in ARMS if found["name"] == arm), {})
    recipes = [{"start": 0, "policy": policy or arm}]
    write(path / "config.json", {**CONFIG, **flags, "seed": seed, "recipes": recipes, **config})
    write(path / "env.json", {"sessions": [{"start_time": f"{started}T0{i}:00:00+00:00"} for i in range(sessions)]})
    steps = range(2, STEPS + 1 if math.isfinite(loss) else 25, 2)
    lines = [{"step": step, "loss": 3 + (step % 4) / 100} for step in steps]
    for line in lines:
        if line["step"] % 10 == 0:
            line["eval_loss"] = (curve or [7, 6.5, 6, 5.5])[line["step"] // 10 - 1]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if math.isfinite(loss):
        summary = {"eval_loss": loss, "eval_gap_bf16": 0.01 * seed, "tokens_per_second": speed}
        write(path / "summary.json", {**summary, "peak_memory_bytes": 1000 + seed})
    else:
        write(path / "diverged.json", {"step": 25, "reason": "step 25 is not finite"})
    return path


def write_attempts(study, *changes):
    """One for each run that is there, as if all had the machine to themselves; then further ones."""
    lines = [{"run": path.name, "outcome": "finished", "jobs": 1, "others": 0.0} for path in study.glob("runs/*")]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, *changes])
    (study / "attempts.jsonl").write_text(text)


@pytest.fixture
def study(tmp_path):
    write_study(tmp_path)
    for arm, losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            write_run(tmp_path, arm, seed, loss)
    write_attempts(tmp_path)
    return tmp_path


def test_what_a_study_has_found(study):
    found = results.evaluate(study)
    assert list(found) == ["baseline", "metric", "margins", "noise", "precisions", "missing"]
    assert list(found["precisions"]) == [arm["name"] for arm in ARMS] and found["missing"] == []
    int8 = found["precisions"]["int8"]
    contract = {"delta_nats", "delta_percent", "ci90", "ci95", "upper95", "seeds", "diverged", "verdict"}
    assert all(contract <= entry.keys() for entry in found["precisions"].values())
    assert int8["delta_nats"] == pytest.approx(0.025 / 3) and int8["delta_percent"] == pytest.approx(0.2)
    error = 0.1 / math.sqrt(3)
    assert int8["ci90"] == pytest.approx([0.2 - T2(0.95) * error, 0.2 + T2(0.95) * error])
    assert int8["ci95"] == pytest.approx([0.2 - T2(0.975) * error, 0.2 + T2(0.975) * error])
    assert int8["upper95"] == int8["ci90"][1]
    assert (int8["seeds"], int8["diverged"], int8["verdict"]) == (3, 0, "not enough evidence")
    assert int8["seeds_needed"] > 3 and int8["judged"] == [0, 1, 2] and int8["recipe"] == "int8"
    assert found["precisions"]["fp8"]["verdict"] == "strict parity"
    assert "fails" not in int8


def test_every_number_has_its_run(study):
    run = results.evaluate(study)["precisions"]["int8"]["runs"]["1"]
    assert (run["run"], run["baseline_run"], run["outcome"]) == ("int8-seed1", "bf16-seed1", "finished")
    assert (run["loss"], run["tokens_per_second"], run["peak_memory_bytes"]) == (4.008, 1000.0, 1001)
    assert run["delta_nats"] == pytest.approx(0.008) and run["delta_percent"] == pytest.approx(0.2)
    assert run["eval_gap_bf16"] == 0.01 and run["diverged_at"] is None and run["timing_valid"] is True


def test_a_control_that_diverges_fails_and_counts(study):
    control = results.evaluate(study)["precisions"]["int8-tensor"]
    # Two divergences of three are no evidence yet; five of five are.
    assert control["fails"] is False and control["verdict"] == "not enough evidence"
    assert (control["seeds"], control["diverged"]) == (1, 2)
    assert control["delta_percent"] == pytest.approx(10.0) and control["ci90"] is None
    run = control["runs"]["0"]
    assert (run["outcome"], run["diverged_at"], run["loss"], run["delta_nats"]) == ("diverged", 25, None, None)
    write_study(study, seeds=range(5))
    for seed in (3, 4):
        write_run(study, "bf16", seed, 2.0)
        write_run(study, "int8-tensor", seed, math.inf)
    control = results.evaluate(study)["precisions"]["int8-tensor"]
    assert control["fails"] is True and control["verdict"] == "worse" and control["diverged"] == 4
    write_study(study)
    for seed in range(3):
        write_run(study, "int8-tensor", seed, LOSSES["bf16"][seed])
        (study / f"runs/int8-tensor-seed{seed}/diverged.json").unlink(missing_ok=True)
    assert results.evaluate(study)["precisions"]["int8-tensor"]["fails"] is False


def test_a_final_loss_that_is_not_finite_is_a_divergence(study):
    path = study / "runs/fp8-seed1/summary.json"
    write(path, {**json.loads(path.read_text()), "eval_loss": None})
    fp8 = results.evaluate(study)["precisions"]["fp8"]
    assert (fp8["seeds"], fp8["diverged"], fp8["verdict"]) == (2, 1, "not enough evidence")
    assert (fp8["runs"]["1"]["outcome"], fp8["runs"]["1"]["diverged_at"]) == ("diverged", STEPS)


def test_the_baseline_is_listed_and_compared_with_nothing(study):
    baseline = results.evaluate(study)["precisions"]["bf16"]
    assert (baseline["seeds"], baseline["diverged"], baseline["verdict"]) == (3, 0, None)
    assert baseline["loss"] == pytest.approx(11 / 3) and baseline["delta_percent"] is None


def test_noise_by_hand(study):
    noise = results.evaluate(study)["noise"]
    paired, unpaired = noise["paired"], noise["unpaired"]
    # Differences of 0.2, 0 and −0.5 thousandths of a nat: mean −0.1, squares about it 0.09, 0.01 and 0.16.
    assert paired["arm"] == "bf16-perturbed" and paired["seeds"] == unpaired["seeds"] == 3
    assert paired["delta_nats"] == pytest.approx(-1e-4) and paired["sd_nats"] == pytest.approx(1e-3 * math.sqrt(0.13))
    assert paired["sd_percent"] == pytest.approx(0.01)
    assert paired["sd_percent_ci95"] == pytest.approx([0.01 * math.sqrt(2 / CHI2_2(p)) for p in (0.975, 0.025)])
    # 2, 4 and 5: squares about the mean of 11 / 3 sum up to 14 / 3.
    assert unpaired["sd_nats"] == pytest.approx(math.sqrt(7 / 3))
    assert unpaired["sd_percent"] == pytest.approx(100 * math.sqrt(7 / 3) / (11 / 3))
    assert noise["gain"] == pytest.approx(2 * (7 / 3) / 0.13e-6)


def test_holm_is_over_the_candidates_alone(study):
    entries = results.evaluate(study)["precisions"]
    fp8, int8 = (entries[name]["noninferiority"]["parity"] for name in ("fp8", "int8"))
    assert fp8["p_holm"] == 2 * fp8["p"] and int8["p_holm"] == int8["p"]
    assert entries["int8-tensor"]["noninferiority"]["parity"]["p_holm"] is None
    assert entries["bf16"]["noninferiority"] is None


def test_a_point_of_a_sweep_is_at_parity_only_if_it_is_as_one_of_several(study):
    marked = [{**arm, "swept": arm["role"] == "candidate"} for arm in ARMS]
    for offsets, verdicts in (
        ([0.02, 0.1, 0.18], ("parity", "not enough evidence")),
        ([0.08, 0.1, 0.12], ("parity", "parity")),
        ([0.0, 0.01, 0.02], ("strict parity", "strict parity")),
    ):
        for seed, offset in enumerate(offsets):
            write_run(study, "fp8", seed, LOSSES["bf16"][seed] * 1.003)
            write_run(study, "int8", seed, LOSSES["bf16"][seed] * (1 + offset / 100))
        for arms, verdict in zip((ARMS, marked), verdicts, strict=True):
            write_study(study, arms=arms)
            entry = results.evaluate(study)["precisions"]["int8"]
            assert entry["verdict"] == verdict and entry["swept"] == (arms is marked)


def test_candidates_of_one_preset_are_a_sweep(study):
    arms = [{**arm, "flags": {"precision": "fp8/margin=1"}} if arm["name"] == "int8" else arm for arm in ARMS]
    for seed in range(3):
        path = study / "runs" / f"int8-seed{seed}" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "precision": "fp8/margin=1"}))
    write_study(study, arms=arms)
    found = results.evaluate(study)["precisions"]
    assert [name for name, entry in found.items() if entry["swept"]] == ["fp8", "int8"]


def test_pairs_of_runs_begin_with_the_same_parameters(study):
    def begin(arm, seed, digest):
        path = study / "runs" / f"{arm}-seed{seed}" / "env.json"
        sessions = json.loads(path.read_text())["sessions"]
        write(path, {"sessions": [{**sessions[0], "initialisation": digest}, *sessions[1:]]})

    for arm in ("bf16", "fp8"):
        begin(arm, 1, "00c0ffee")
    with pytest.raises(StudyError, match=r"int8-seed1 began with other parameters \(not said\) than .*\(00c0ffee\)"):
        results.evaluate(study)
    for arm in LOSSES:
        begin(arm, 1, "00c0ffee")
    assert results.evaluate(study)["precisions"]["int8"]["seeds"] == 3
    begin("fp8", 1, "deadbeef")
    with pytest.raises(StudyError, match=r"fp8-seed1 began with other parameters \(deadbeef\)"):
        results.evaluate(study)


def test_tokens_and_seconds_to_the_baselines_loss(study):
    for seed in range(3):
        write_run(study, "bf16", seed, LOSSES["bf16"][seed], curve=[7, 6, 5.5, 5.0])
    # It is within 0.25 % of 5.0 after part of the way from step 20 to 30, at once, and never.
    for seed, curve in enumerate([[6, 5.2, 4.6, 4.0], [4.9, 4, 4, 4], [6, 6, 6, 5.1]]):
        write_run(study, "fp8", seed, LOSSES["fp8"][seed], curve=curve, speed=[100.0, 200.0, 400.0][seed])
    fp8 = results.evaluate(study)["precisions"]["fp8"]
    steps = [20 + 10 * (5.2 - 5.0125) / 0.6, 10, None]
    for seed, step in enumerate(steps):
        tokens = None if step is None else pytest.approx(step * TOKENS)
        assert fp8["runs"][str(seed)]["tokens_to_baseline"] == tokens
    assert fp8["tokens_to_baseline"] == pytest.approx(steps[0] * TOKENS) and fp8["reached_baseline"] == 2
    assert fp8["seconds_to_baseline"] == pytest.approx(steps[0] * TOKENS / 100)
    assert fp8["tokens_per_second"] == 200.0 and fp8["peak_memory_bytes"] == 1001
    assert fp8["eval_gap_bf16"] == pytest.approx(0.01)
    assert results.evaluate(study)["precisions"]["bf16"]["tokens_to_baseline"] == pytest.approx(39.75 * TOKENS)
    write_run(study, "fp8", 1, LOSSES["fp8"][1], curve=[6, 6, 6, 5.1])
    fp8 = results.evaluate(study)["precisions"]["fp8"]
    assert fp8["tokens_to_baseline"] is fp8["seconds_to_baseline"] is None and fp8["reached_baseline"] == 1


@pytest.mark.parametrize("attempt", [{"jobs": 2, "others": 0.0}, {"jobs": 1, "others": 0.2}])
def test_a_run_beside_other_work_is_not_timed(study, attempt):
    write_attempts(study, {"run": "fp8-seed1", "outcome": "finished", **attempt})
    entries = results.evaluate(study)["precisions"]
    assert entries["int8"]["timing_valid"] is True and entries["fp8"]["timing_valid"] is False
    assert [entries["fp8"]["runs"][seed]["timing_valid"] for seed in "012"] == [True, False, True]
    assert entries["fp8"]["tokens_per_second"] == 1000.0


def test_a_run_in_two_sessions_or_started_by_other_means_is_not_timed(study):
    write_run(study, "fp8", 1, 4.002, sessions=2)
    assert results.evaluate(study)["precisions"]["fp8"]["timing_valid"] is False
    (study / "attempts.jsonl").unlink()
    assert results.evaluate(study)["precisions"]["int8"]["timing_valid"] is False


def test_spikes_stand_out_of_the_lines_before():
    losses = np.array([3.0, 3.1] * 20)  # the median is 3.05 and the deviation 0.05
    assert curves.spikes(losses) == 0
    losses[20] = 3.05 + 8 * 0.05 - 0.01
    assert curves.spikes(losses) == 0
    losses[20:22] = 3.05 + 8 * 0.05 + 0.01
    losses[30] = 9.0
    losses[35] = np.nan
    assert curves.spikes(losses) == 2
    losses[:16] = [9.0] * 4 + [3.0, 3.1] * 6  # by which nothing is judged, and which judge little else
    assert curves.spikes(losses) == 2
    assert curves.spikes(losses[:16]) == curves.spikes(np.zeros(0)) == 0
    noise = np.random.default_rng(0).standard_normal(20_000)
    assert 5 < curves.spikes(noise) < 40


@pytest.mark.parametrize("stretch", [1, 16, 1000, 19_984, 19_985])
def test_spikes_are_the_same_in_stretches(stretch, monkeypatch):
    losses = np.random.default_rng(1).standard_normal(20_000)
    losses[3 * 1000 + 16 - 2 : 3 * 1000 + 16 + 2] = 99.0  # over the border of a stretch
    whole = curves.spikes(losses)
    monkeypatch.setattr(curves, "_STRETCH", stretch)
    assert curves.spikes(losses) == whole > 1


def test_spikes_of_an_arm_are_summed_up(study):
    path = study / "runs/fp8-seed2/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[17]["loss"] = 8.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fp8 = results.evaluate(study)["precisions"]["fp8"]
    assert fp8["spikes"] == 1 and [fp8["runs"][seed]["spikes"] for seed in "012"] == [0, 0, 1]


def test_the_file_is_what_was_evaluated_and_always_the_same(study):
    found = results.write(study)
    first = (study / "comparison.json").read_bytes()
    assert json.loads(first) == found == results.evaluate(study)
    results.write(study)
    assert (study / "comparison.json").read_bytes() == first


def test_an_archived_study_gives_the_same(study):
    found = results.write(study)
    for path in study.glob("runs/*/metrics.jsonl"):
        path.with_name("metrics.jsonl.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        path.unlink()
    assert results.evaluate(study) == found


def read_record(study):
    return [json.loads(line) for line in (study / "record.jsonl").read_text().splitlines()]


def test_the_record_has_every_result_once(study):
    found = results.write(study)["precisions"]
    record = read_record(study)
    assert [line["arm"] for line in record] == ["fp8", "int8", "int8-tensor", "bf16-perturbed"]
    names = ["time", "arm", "recipe", "seeds", "planned", "delta_percent", "upper95", "verdict", "revision"]
    assert list(record[0]) == names
    assert record[0]["recipe"] == "fp8" and record[0]["seeds"] == [0, 1, 2]
    assert all(record[1][name] == found["int8"][name] for name in ("delta_percent", "upper95", "verdict"))
    results.write(study)
    assert read_record(study) == record
    write_study(study, seeds=range(4))
    write_run(study, "bf16", 3, 2.0)
    write_run(study, "int8", 3, 2.0)
    results.write(study)
    assert read_record(study)[:4] == record
    added = {line["arm"]: (line["seeds"], line["planned"]) for line in read_record(study)[4:]}
    assert added["int8"] == ([0, 1, 2, 3], 4) and added["fp8"] == ([0, 1, 2], 4)


def test_seeds_that_are_added_after_a_look_are_told_of(study):
    assert not results.write(study)["precisions"]["int8"]["extended"]
    write_study(study, seeds=range(4))
    write_run(study, "bf16", 3, 2.0)
    write_run(study, "int8", 3, 2.0)
    found = results.evaluate(study)
    assert found["precisions"]["int8"]["extended"] and found["precisions"]["int8"]["planned"] == 4
    rows = {line.split()[0]: line for line in results.table(found).splitlines()[3:8]}
    assert rows["int8"].endswith("with seeds that were added after a look")
    assert rows["fp8"].endswith("strict parity so far, with 3 of 4 seeds")
    # So is who looks before all that were planned have ended.
    records = [{**record, "seeds": [0, 1]} for record in read_record(study)]
    (study / "record.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert results.evaluate(study)["precisions"]["int8"]["extended"]
    # A plan that was for four from the start is another matter.
    (study / "record.jsonl").unlink()
    assert not results.evaluate(study)["precisions"]["int8"]["extended"]


def test_each_arm_may_have_seeds_of_its_own(study):
    arms = [{**arm, "seeds": [0, 1, 2]} if arm["name"] == "fp8" else arm for arm in ARMS]
    write_study(study, arms, seeds=range(4))
    found = results.evaluate(study)
    assert (found["precisions"]["fp8"]["planned"], found["precisions"]["int8"]["planned"]) == (3, 4)
    assert not [line for line in found["missing"] if line.startswith("fp8 ")]
    assert "int8 has not been run with seed 3." in found["missing"]


def test_a_changed_recipe_is_refused_on_seeds_that_have_been_looked_at(study):
    assert results.refused(study, "fp8", "fp8/margin=1", [0, 1, 2]) is None
    results.write(study)
    assert results.refused(study, "fp8", "fp8", [0, 1, 2, 3]) is None
    assert results.refused(study, "fp8", "fp8/margin=1", [3, 4]) is None
    assert results.refused(study, "other", "fp8/margin=1", [0]) is None
    assert results.refused(study, "fp8_margin=1", "fp8/margin=1", [0], ["fp8"]).startswith(
        "fp8_margin=1 is a change of fp8, which was judged with another recipe on seed 0, as "
    )
    assert results.refused(study, "fp8_margin=1", "fp8/margin=1", [3], ["fp8"]) is None
    sentence = results.refused(study, "fp8", "fp8/margin=1", [2, 1, 5])
    assert sentence == (
        f"fp8 was judged with another recipe on seeds 1, 2, as {study / 'record.jsonl'} tells: give fresh ones, as in "
        "--seeds=3:6."
    )


def test_a_changed_recipe_is_judged_on_its_fresh_seeds_alone(study):
    results.write(study)
    write_study(study, seeds=range(6))
    for seed in (3, 4, 5):
        write_run(study, "bf16", seed, 2.0)
        write_run(study, "fp8", seed, 2.1, policy="fp8/margin=1", started="2026-02-01")
    found = results.write(study)
    fp8 = found["precisions"]["fp8"]
    assert fp8["judged"] == [3, 4, 5] and fp8["recipe"] == "fp8/margin=1" and fp8["verdict"] == "worse"
    assert fp8["superseded"] == ["fp8-seed0", "fp8-seed1", "fp8-seed2"]
    assert (
        "fp8-seed0, fp8-seed1, fp8-seed2 were run with an earlier recipe than fp8-seed5, and not judged."
        in found["missing"]
    )
    assert [line["recipe"] for line in read_record(study) if line["arm"] == "fp8"] == ["fp8", "fp8/margin=1"]
    # Nor on seeds that were looked at before, whoever ran it there.
    write_run(study, "fp8", 0, 2.0, policy="fp8/margin=1", started="2026-03-01")
    found = results.evaluate(study)
    assert found["precisions"]["fp8"]["judged"] == [3, 4, 5]
    assert (
        "fp8-seed0 was run on seeds on which another recipe of that name was judged before, and not judged."
        in found["missing"]
    )


def test_the_plan_is_read_as_it_is_written(tmp_path):
    arms = (Arm("bf16", "baseline", {"precision": "bf16"}, None), Arm("fp8", "candidate", {"precision": "fp8"}, "bf16"))
    Study("bf16", "eval_loss", (0,), arms, {"steps": STEPS}).save(tmp_path)
    write_run(tmp_path, "bf16", 0, 2.0)
    write_run(tmp_path, "fp8", 0, 2.0)
    assert results.evaluate(tmp_path)["precisions"]["fp8"]["seeds"] == 1


def test_a_partial_study_is_evaluated_for_what_is_there(tmp_path):
    write_study(tmp_path, seeds=range(4))
    for seed in range(3):
        write_run(tmp_path, "bf16", seed, 2.0)
        write_run(tmp_path, "fp8", seed, 2.0 + 0.0001 * seed)
    write_run(tmp_path, "fp8", 3, 2.0)  # whose baseline is not there yet
    (write_run(tmp_path, "int8", 0, 2.0) / "summary.json").unlink()
    (write_run(tmp_path, "int8", 1, 2.0) / "summary.json").unlink()
    (write_run(tmp_path, "int8-tensor", 0, 2.0) / "summary.json").unlink()
    attempts = [{"run": "int8-seed1", "outcome": "failed", "reason": "no memory."}]
    attempts.append({"run": "int8-seed2", "outcome": "failed", "reason": "no disk"})
    write_attempts(tmp_path, *attempts)
    with open(tmp_path / "runs/int8-seed0/.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = results.evaluate(tmp_path)
    fp8, int8 = found["precisions"]["fp8"], found["precisions"]["int8"]
    assert (fp8["seeds"], fp8["judged"], fp8["verdict"]) == (3, [0, 1, 2], "strict parity")
    assert fp8["runs"]["3"]["baseline_run"] is None and fp8["runs"]["3"]["delta_nats"] is None
    assert (int8["seeds"], int8["recipe"], int8["verdict"]) == (0, None, "not enough evidence")
    # What has not been run yet has shown nothing.
    assert fp8["noninferiority"]["parity"]["p_holm"] == 2 * fp8["noninferiority"]["parity"]["p"]
    assert found["noise"]["paired"] is None and found["noise"]["gain"] is None
    assert found["missing"] == [
        "bf16 has not been run with seed 3.",
        "int8-seed0 is still running, after step 40 of 40.",
        "int8-seed1 failed (no memory), after step 40 of 40.",
        "int8-seed2 failed (no disk).",
        "int8 has not been run with seed 3.",
        "int8-tensor-seed0 was stopped, after step 40 of 40.",
        "int8-tensor has not been run with seeds 1, 2, 3.",
        "bf16-perturbed has not been run with seeds 0, 1, 2, 3.",
    ]
    assert all(line["arm"] == "fp8" for line in (results.write(tmp_path), read_record(tmp_path))[1])


def test_every_arm_of_a_sweep_has_its_own_baseline(tmp_path):
    arms = []
    for lr in (0.001, 0.01):
        flags = {"precision": "bf16", "lr": lr}
        arms.append({"name": f"bf16_lr={lr}", "role": "baseline", "flags": flags})
        flags = {"precision": "fp8", "lr": lr}
        arms.append({"name": f"fp8_lr={lr}", "role": "candidate", "flags": flags, "baseline": f"bf16_lr={lr}"})
        for seed in (0, 1):
            for precision, loss in (("bf16", 100 * lr), ("fp8", 101 * lr)):
                name = f"{precision}_lr={lr}"
                write_run(tmp_path, name, seed, loss, policy=precision, precision=precision, lr=lr)
    write_study(tmp_path, arms, (0, 1), baseline="bf16_lr=0.001")
    found = results.evaluate(tmp_path)
    for lr in (0.001, 0.01):
        entry = found["precisions"][f"fp8_lr={lr}"]
        assert entry["delta_percent"] == pytest.approx(1.0) and entry["baseline"] == f"bf16_lr={lr}"
    assert found["noise"]["unpaired"]["sd_nats"] == 0.0
    other = {"data_sha256": {"train": "cccc", "validation": "bbbb"}}
    for name, precision in (("bf16_lr=0.01", "bf16"), ("fp8_lr=0.01", "fp8")):
        for seed in (0, 1):
            write_run(tmp_path, name, seed, 1.0, policy=precision, precision=precision, lr=0.01, **other)
    with pytest.raises(results.StudyError, match=r"--data \(data_sha256.train\) is aaaa in one and cccc in the other"):
        results.evaluate(tmp_path)


@pytest.mark.parametrize(
    ("arm", "config", "sentence"),
    [
        ("fp8", {"lr": 0.01}, "fp8-seed0 and RUNS/fp8-seed1 cannot be compared, --lr is 0.003 in one and 0.01 in the"),
        ("fp8", {"steps": 80}, "--steps is 40 in one and 80"),
        ("bf16", {"data_sha256": {"train": "cccc", "validation": "bbbb"}}, r"--data \(data_sha256.train\) is aaaa in"),
        ("bf16", {"vocab": 65}, r"--tokenizer \(vocab\) is 64 in one and 65 in the other"),
        ("int8", {"precision": "fp8"}, "int8-seed1 was run with --precision=fp8 .in study.json int8.: run it again"),
        ("int8", {"seed": 7}, "int8-seed1 was run with --seed=7 .in study.json 1.: run it again"),
    ],
)
def test_mixed_runs_are_refused_with_the_flag_and_both_runs(study, arm, config, sentence):
    path = study / f"runs/{arm}-seed1"
    write(path / "config.json", {**json.loads((path / "config.json").read_text()), **config})
    if "steps" in config:  # which its metrics are to reach
        text = (path / "metrics.jsonl").read_text()
        (path / "metrics.jsonl").write_text(text + '{"step": 80, "loss": 1.0}\n')
    with pytest.raises(results.StudyError, match=sentence.replace("RUNS", str(study / "runs"))) as error:
        results.evaluate(study)
    assert isinstance(error.value, ValueError) and str(error.value).endswith(".") and "\n" not in str(error.value)


def test_an_arm_is_refused_that_differs_from_its_baseline_in_more_than_planned(study):
    for seed in range(3):
        write_run(study, "fp8", seed, 2.0, lr=0.01)
    match = "bf16-seed0 and .*fp8-seed0 cannot be compared, --lr is 0.003 in one and 0.01 in the other"
    with pytest.raises(results.StudyError, match=match):
        results.evaluate(study)


def test_flags_that_change_no_result_may_differ(study):
    write_run(study, "fp8", 1, LOSSES["fp8"][1], log_every=20, mesh="data:2", cache_dir="elsewhere")
    assert results.evaluate(study)["precisions"]["fp8"]["seeds"] == 3


def no_baseline(study):
    for path in study.glob("runs/bf16-seed*/summary.json"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda s: (s / "study.json").unlink(), "holds no study.json: give the --out of a study."),
        (lambda s: (s / "study.json").write_text("{"), "study.json is damaged"),
        (lambda s: (s / "study.json").write_text("[]"), "is no study as this version writes it"),
        (lambda s: write_study(s, format=2), "is no study as this version writes it"),
        (lambda s: write_study(s, baseline="fp8"), "is no study as this version writes it"),
        (lambda s: write_study(s, metric="eval_loss_average"), "has no eval_loss_average: give another --metric."),
        (no_baseline, "no run of bf16, the baseline of .*, has ended: run it first."),
        (lambda s: (s / "attempts.jsonl").write_text("1\n"), "line 1 of .*attempts.jsonl is damaged"),
        (lambda s: (s / "runs/fp8-seed0/summary.json").write_text("{"), "fp8-seed0/summary.json is damaged"),
        (lambda s: (s / "runs/fp8-seed0/metrics.jsonl").unlink(), "fp8-seed0 is finished, but has no metrics.jsonl"),
    ],
)
def test_what_is_no_study_or_damaged_is_a_sentence(study, damage, sentence):
    damage(study)
    with pytest.raises(ValueError, match=sentence) as error:
        results.write(study)
    assert "\n" not in str(error.value) and not (study / "comparison.json").exists()


def test_table(study):
    write_attempts(study, {"run": "int8-seed0", "outcome": "finished", "jobs": 2, "others": 0.0})
    lines = results.table(results.evaluate(study)).splitlines()
    assert lines[0] == "eval_loss compared by seed with that of bf16"
    rows = {line.split()[0]: line for line in lines[3:8]}
    assert list(rows) == [arm["name"] for arm in ARMS]
    assert rows["bf16"].endswith("baseline") and "3.6667" in rows["bf16"]
    assert rows["fp8"].endswith("strict parity") and "+0.050 to +0.050" in rows["fp8"]
    assert "1,000*" in rows["int8"] and "1,000 " in rows["fp8"]
    assert rows["int8"].endswith("not enough evidence: 113 seeds would settle it")
    assert rows["int8-tensor"].endswith("not enough evidence, but must be worse")
    assert len({line.find("verdict") for line in lines[2:3]} | {rows["fp8"].find("strict")}) == 1
    text = "\n".join(lines)
    assert "* not known to have had the machine to itself" in text
    assert "Chance alone, paired (bf16-perturbed): standard deviation 0.010 % (0.005 to 0.063), 3 seeds." in text
