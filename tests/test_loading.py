"""Run directories as they are read: what comes out, and what is said of damage."""

import fcntl
import gzip
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import synthetic_study
from synthetic_study import config

from experiments import load_runs, loading
from experiments.loading import LoadError, find_runs, read_run


@pytest.fixture
def run(tmp_path):
    return synthetic_study.write_run(tmp_path / "fp8-seed0", "fp8", 0, telemetry=True)


def rewrite(path, change):
    """Replaces the lines of a file by what `change` makes of them."""
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def pack(path):
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()


def test_metrics_come_by_column(run):
    record = read_run(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert record.metrics["step"].dtype == np.int64
    assert record.metrics["step"].tolist() == [line["step"] for line in lines] == list(range(10, 301, 10))
    assert record.metrics["loss"].tolist() == [line["loss"] for line in lines]
    # What few lines have is NaN in the others.
    np.testing.assert_array_equal(record.metrics["eval_loss"], [line.get("eval_loss", np.nan) for line in lines])
    assert record.tokens[-1] == record.summary["tokens"]
    assert (record.name, record.precision, record.seed, record.outcome) == ("fp8-seed0", "fp8", 0, "finished")
    assert record.sessions[0]["versions"]["jax"] == "0.10.2"
    assert [line["step"] for line in record.telemetry] == list(range(20, 301, 20))


def test_nulls_are_nan_and_what_is_no_number_is_kept(run):
    def change(lines):
        first = json.loads(lines[0]) | {"loss": None, "fell_back": ["blocks/mlp/up"]}
        return [json.dumps(first) + "\n", *lines[1:]]

    rewrite(run / "metrics.jsonl", change)
    metrics = read_run(run).metrics
    assert np.isnan(metrics["loss"][0]) and np.isfinite(metrics["loss"][1:]).all()
    assert metrics["fell_back"][0] == ["blocks/mlp/up"] and metrics["fell_back"][1] is None


def test_files_larger_than_a_chunk_read_alike(run, monkeypatch):
    whole = read_run(run).metrics
    monkeypatch.setattr(loading, "_CHUNK", 700)
    filled = []
    full = np.full
    monkeypatch.setattr(np, "full", lambda *arguments: filled.append(arguments) or full(*arguments))
    chunked = read_run(run).metrics
    # What is missing before a column begins is filled in once, or reading would take the square of the lines.
    assert 1 <= len(filled) <= len(whole)
    assert whole.keys() == chunked.keys()
    for name, column in whole.items():
        np.testing.assert_array_equal(column, chunked[name])


def test_archived_runs_read_alike(run):
    before = read_run(run)
    for name in ("metrics.jsonl", "telemetry.jsonl"):
        pack(run / name)
    after = read_run(run)
    np.testing.assert_equal(after.metrics, before.metrics)
    assert after.telemetry == before.telemetry and after.telemetry


def test_outcomes(run, tmp_path):
    (run / "summary.json").unlink()
    assert read_run(run).outcome == "unfinished"
    with open(run / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_run(run).outcome == "running"
    assert read_run(run).outcome == "unfinished"
    diverged = read_run(synthetic_study.write_run(tmp_path / synthetic_study.DIVERGED, "fp8-unscaled", 2))
    assert diverged.outcome == "diverged" and diverged.diverged["step"] == 147 and diverged.metrics["step"][-1] == 140
    # A run that just began has no metrics yet.
    (run / "metrics.jsonl").unlink()
    assert read_run(run).metrics["step"].shape == (0,)


def test_half_a_last_line_is_left_out_while_the_run_goes_on(run):
    rewrite(run / "metrics.jsonl", lambda lines: [*lines[:7], lines[7][:30]])
    with pytest.raises(LoadError, match=r"line 8 of .*/fp8-seed0/metrics\.jsonl ends in the middle: restore it"):
        read_run(run)
    (run / "summary.json").unlink()
    assert read_run(run).metrics["step"].tolist() == list(range(10, 71, 10))


DAMAGES = {
    "half a line in the middle": (lambda lines: [*lines[:4], lines[4][:30] + "\n", *lines[5:]], "line 5 of .*damaged"),
    # Joined, these two halves would be one whole line.
    "a line broken in two": (
        lambda lines: [*lines[:4], '{"step": 50, "loss": [1\n', "2]}\n", *lines[5:]],
        "line 5 of .*damaged",
    ),
    "no object": (lambda lines: [*lines[:4], "17\n", *lines[5:]], "line 5 of .*damaged"),
    "no step": (lambda lines: [*lines[:4], '{"loss": 1.5}\n', *lines[5:]], "line 5 of .*damaged"),
    "an empty line": (lambda lines: [*lines[:4], "\n", *lines[5:]], "line 5 of .*damaged"),
    "a step twice": (lambda lines: [*lines[:4], lines[3], *lines[4:]], "line 5 of .*goes back to step 40"),
    "lines lost at the end": (lambda lines: lines[:-1], "truncated, it ends at step 290 of a finished run of 300"),
    "nothing": (lambda lines: [], "truncated, it ends at step 0 of"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_with_file_and_line(run, damage):
    change, message = DAMAGES[damage]
    rewrite(run / "metrics.jsonl", change)
    with pytest.raises(LoadError, match=message) as caught:
        read_run(run)
    assert str(run / "metrics.jsonl") in str(caught.value)


def test_telemetry_that_ends_early_is_named(run):
    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "telemetry": ["tensors"], "telemetry_every": 20}))
    assert read_run(run).telemetry[-1]["step"] == 300
    rewrite(run / "telemetry.jsonl", lambda lines: lines[:-1])
    with pytest.raises(LoadError, match="telemetry.jsonl is truncated, it ends at step 280 of 300: restore it"):
        _ = read_run(run).telemetry


def test_damage_in_an_archive_is_named(run):
    for name in ("metrics.jsonl", "telemetry.jsonl"):
        pack(run / name)
    packed = run / "telemetry.jsonl.gz"
    packed.write_bytes(packed.read_bytes()[:2000])
    with pytest.raises(LoadError, match=r"telemetry\.jsonl\.gz cannot be read"):
        read_run(run).telemetry  # noqa: B018
    (run / "metrics.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(LoadError, match=r"metrics\.jsonl\.gz cannot be read"):
        read_run(run)


def test_what_is_missing_is_named(run, tmp_path):
    with pytest.raises(LoadError, match="nowhere is no directory"):
        read_run(tmp_path / "nowhere")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(LoadError, match=r"is finished, but has no metrics\.jsonl"):
        read_run(run)
    (run / "summary.json").write_text("{")
    with pytest.raises(LoadError, match=r"summary\.json is damaged .*: restore it"):
        read_run(run)
    (run / "config.json").write_text('{"architectures": []}')
    with pytest.raises(LoadError, match=r"config\.json does not say precision"):
        read_run(run)
    (run / "config.json").unlink()
    with pytest.raises(LoadError, match=r"holds no config\.json: give the directory of a run"):
        read_run(run)


def test_runs_are_found_under_a_directory_or_by_a_glob(tmp_path):
    wanted = [tmp_path / "runs" / name for name in ("b-seed0", "deeper/a-seed1")]
    for path in wanted:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config(precision="fp8", seed=0)))
        # A checkpoint may have a file of that name too.
        (path / "checkpoints" / "100").mkdir(parents=True)
        (path / "checkpoints" / "100" / "config.json").write_text("{}")
    assert find_runs(tmp_path) == find_runs(f"{tmp_path}/ru*") == find_runs(f"{tmp_path}/**") == wanted
    assert find_runs(tmp_path / "runs" / "b-seed0") == find_runs(f"{tmp_path}/runs/b*") == wanted[:1]
    with pytest.raises(LoadError, match="does not exist: give a directory of runs, or a glob"):
        find_runs(tmp_path / "x*")
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(LoadError, match=r"holds no run, that is a directory with a config\.json"):
        find_runs(tmp_path)


def test_load_runs_gives_a_row_per_step(tmp_path):
    synthetic_study.write(tmp_path / "s", arms=("bf16", "fp8"), seeds=(0, 1), telemetry=("fp8",))
    frame = load_runs(tmp_path / "s")
    assert frame.columns[:6].tolist() == ["run", "precision", "seed", "outcome", "step", "tokens"]
    assert len(frame) == 4 * 30 and frame["loss"].dtype == float
    last = frame.dropna(subset="eval_loss").groupby(["precision", "seed"], observed=True)["eval_loss"].last()
    expected = read_run(tmp_path / "s" / "runs" / "fp8-seed1").metrics["eval_loss"][-1]
    assert last["fp8", 1] == expected
    # Only some runs have telemetry of the model.
    assert frame.loc[frame["precision"] == "bf16", "log_z"].isna().all()


def test_load_runs_gives_a_row_per_run(tmp_path):
    for name in ("a", "b"):
        synthetic_study.write_run(tmp_path / name / "fp8-seed0", "fp8", 0, lr=0.001)
    synthetic_study.write_run(tmp_path / "b" / synthetic_study.DIVERGED, "fp8-unscaled", 2)
    frame = load_runs(tmp_path, per="run").set_index("run")
    # A name that two directories have is not enough.
    assert frame.index.tolist() == ["a/fp8-seed0", "b/fp8-seed0", f"b/{synthetic_study.DIVERGED}"]
    assert frame["outcome"].tolist() == ["finished", "finished", "diverged"]
    assert frame.loc["a/fp8-seed0", "config.lr"] == 0.001 and frame.loc["a/fp8-seed0", "params"] == 918656
    assert np.isnan(frame["eval_loss"].iloc[2]) and frame["diverged_at"].iloc[2] == 147


def test_load_runs_gives_a_row_per_tensor(tmp_path):
    synthetic_study.write(tmp_path / "s", arms=("bf16", "fp8"), seeds=(0,), telemetry=("fp8",))
    frame = load_runs(tmp_path / "s", per="telemetry")
    assert set(frame["precision"]) == {"fp8"} and len(frame) == 15 * 4 * 4 * 6
    found = frame.query("step == 40 and layer == 'blocks/mlp/up' and depth == 2 and tensor == 'g'")
    record = read_run(tmp_path / "s" / "runs" / "fp8-seed0").telemetry[1]["dots"]["blocks/mlp/up"]["g"]
    assert found["sqnr"].tolist() == [record["sqnr"][2]] and found["cosine"].isna().all()
    with pytest.raises(ValueError, match="per='layer' is none of step, run, telemetry"):
        load_runs(tmp_path / "s", per="layer")


def test_reading_imports_nothing_of_jax(run):
    script = (
        "import sys\nfrom experiments import load_runs\n"
        f"assert len(load_runs({str(run)!r})) == 30 and len(load_runs({str(run)!r}, per='telemetry'))\n"
        "assert not {'jax', 'q8jax', 'flax'} & set(sys.modules)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, cwd=root)
