"""Runs whose directory is in a bucket: checkpoints through Orbax, the other files, and whole runs that are killed."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import fake_gcs
import jax.numpy as jnp
import numpy as np
import pytest
from micro import QUICK_COMPILES, quick_compiles  # noqa: F401

from experiments import load_runs
from experiments.runs import CheckpointError, Checkpoints, MetricsWriter, RunDir, RunError, lease, load_config
from experiments.runs.lease import LOCK
from experiments.runs.steps import StepObjects

ROOT = Path(__file__).resolve().parents[1]
RUN = "some/run"
URL = f"gs://{fake_gcs.BUCKET}/{RUN}"
CONFIG = {"precision": "fp8", "steps": 300}


@pytest.fixture
def gcs():
    server = fake_gcs.shared()
    server.clear()
    return server


def state(step):
    return {"w": jnp.arange(12, dtype=jnp.float32).reshape(3, 4) + jnp.float32(step)}


def save(steps, **options):
    with Checkpoints(f"{URL}/checkpoints", **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"seen": step})
        checkpoints.wait()


def restore():
    warnings = []
    with Checkpoints(f"{URL}/checkpoints", warn=warnings.append) as checkpoints:
        return checkpoints.latest_good(state(0)), warnings


def folders(gcs):
    return sorted({name.split("/")[0] for name in gcs.names(f"{RUN}/checkpoints/")})


def flip(gcs, name):
    data = bytearray(gcs.read(name))
    data[len(data) // 2] ^= 0x10
    gcs.put(name, data)


@pytest.mark.slow
def test_checkpoints_are_written_verified_and_kept_as_in_a_directory(gcs):
    assert restore() == (None, [])
    save([5, 10, 100])
    assert folders(gcs) == ["10", "100"]
    prefix = f"{RUN}/checkpoints/100/"
    listed = json.loads(gcs.read(f"{prefix}digests.json"))["files"]
    assert sorted(listed) == [name for name in gcs.names(prefix) if name != "digests.json"]
    for name, entry in listed.items():
        data = gcs.read(prefix + name)
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    restored, warnings = restore()
    assert (restored.step, restored.metadata, warnings) == (100, {"seen": 100}, [])
    np.testing.assert_array_equal(restored.tree["w"], state(100)["w"])

    arrays = max((n for n in listed if n.startswith("state/")), key=lambda n: listed[n]["bytes"])
    flip(gcs, prefix + arrays)
    restored, (warning,) = restore()
    assert restored.step == 10 and folders(gcs) == ["10", "100.corrupt"]
    assert f"the SHA-256 of {arrays} differs); it is now 100.corrupt, and the run goes on from step 10" in warning
    save([100])  # again, where something else was
    flip(gcs, f"{prefix}metadata.json")
    assert restore()[0].step == 10 and folders(gcs) == ["10", "100.corrupt", "100.corrupt2"]


@pytest.mark.slow
def test_what_a_killed_process_left_is_rubbish(gcs):
    save([1, 2])
    del gcs.objects[f"{RUN}/checkpoints/2/digests.json"]  # killed before it was complete, or while it was deleted
    restored, warnings = restore()
    assert (restored.step, warnings, folders(gcs)) == (1, [], ["1"])
    save([2])
    assert restore()[0].step == 2


def raising(errors):
    """What raises the one error that is in a list."""

    def call():
        if errors:
            raise errors[0]

    return call


@pytest.mark.slow
def test_a_save_that_fails_is_told_and_the_older_checkpoints_stay(gcs):
    warnings, errors = [], []
    with Checkpoints(f"{URL}/checkpoints", warn=warnings.append, before=raising(errors)) as checkpoints:
        checkpoints.save(1, state(1))
        checkpoints.wait()
        errors.append(OSError("the bucket cannot be reached"))
        checkpoints.save(2, state(2))
        with pytest.raises(CheckpointError, match=r"step 2 could not be written .*reached; step 1 is the newest"):
            checkpoints.wait()
        assert len(warnings) == 1 and checkpoints.steps() == [1]
        errors.clear()
        checkpoints.save(2, state(2))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]


@pytest.mark.slow
def test_a_checkpoint_whose_predecessor_cannot_be_deleted_stays(gcs, monkeypatch):
    save([1])
    monkeypatch.setattr(StepObjects, "remove", lambda *_: raising([OSError("refused")])())
    with Checkpoints(f"{URL}/checkpoints", keep=1, warn=lambda text: None) as checkpoints:
        checkpoints.save(2, state(2))
        with pytest.raises(CheckpointError, match="refused; step 2 is the newest"):
            checkpoints.wait()
    assert restore()[0].step == 2


@pytest.mark.slow
@pytest.mark.parametrize("when", ["check", "before"])
def test_who_has_lost_the_run_changes_nothing_and_ends(gcs, when):
    save([1])
    gcs.put(f"{RUN}/checkpoints/2/state/x", b"of the run that goes on")
    errors = []
    checkpoints = Checkpoints(f"{URL}/checkpoints", **{when: raising(errors)})
    errors.append(RunError("taken over"))
    with pytest.raises(RunError, match="taken over"):
        checkpoints.save(3 if when == "before" else 2, state(2))
        checkpoints.wait()
    assert checkpoints.steps() == [1]
    assert gcs.read(f"{RUN}/checkpoints/2/state/x") == b"of the run that goes on"
    with pytest.raises(RunError, match="taken over") if when == "before" else contextlib.nullcontext():
        checkpoints.close()


def test_the_files_of_a_run_are_there_for_the_next_start_and_for_readers(gcs):
    with RunDir.open(f"{URL}/", CONFIG) as run:
        assert (run.place, run.checkpoints, run.resumed) == (URL, f"{URL}/checkpoints", False)
        assert gcs.names(f"{RUN}/") == [LOCK, "config.json"]
        run.record_session({"start": 1})
        with MetricsWriter(run.path, None) as metrics:
            metrics.write(1, {"loss": 1.0})
            metrics.sync()
            run.push()
            metrics.write(2, {"loss": 0.5})
        run.write_divergence(2, "nan")
        scratch = run.path
    assert not scratch.exists() and LOCK not in gcs.names(f"{RUN}/")
    assert len([name for name in gcs.names(f"{RUN}/tensorboard/") if name.startswith("events.")]) == 1
    assert load_config(f"{URL}/config.json") == CONFIG
    with RunDir.open(URL, {**CONFIG, "steps": 600}, may_change={"steps"}) as run:
        assert run.resumed and run.changed == {"steps": ("300", "600")}
        run.record_session({"start": 2})
        with MetricsWriter(run.path, 1) as metrics:
            metrics.write(2, {"loss": 0.25})
        run.write_summary({"eval_loss": 0.25})
    assert gcs.read(f"{RUN}/metrics.jsonl") == b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.25}\n'
    assert json.loads(gcs.read(f"{RUN}/env.json"))["sessions"] == [{"start": 1}, {"start": 2}]
    assert "diverged.json" not in gcs.names(f"{RUN}/")
    with RunDir.open(URL, {**CONFIG, "steps": 600}, primary=False) as run:
        assert run.summary() == {"eval_loss": 0.25}
        run.push()


def test_a_place_that_is_anothers_is_refused_and_nothing_there_is_changed(gcs, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.05)

    def refused(config=CONFIG, url=URL):
        before = gcs.names()
        with pytest.raises(RunError) as info:
            RunDir.open(url, config)
        assert gcs.names() == before and "\n" not in str(info.value) and f"--workdir={url}" in str(info.value)
        return str(info.value)

    with RunDir.open(URL, CONFIG):
        assert re.search(r"is in use by process \d+ on .*; wait for it to end", refused())
    assert "holds a run with --precision=fp8 (here bf16)" in refused({**CONFIG, "precision": "bf16"})
    gcs.put("thesis/chapter.tex", b"x")
    assert "belongs to something else" in refused(url=f"gs://{fake_gcs.BUCKET}/thesis")
    assert "The specified bucket does not exist" in refused(url="gs://absent/run")
    with pytest.raises(RunError, match=r"--config=gs://.* cannot be read|does not hold flags"):
        load_config(f"gs://{fake_gcs.BUCKET}/nothing/config.json")


FLAGS = ("--precision=fp8", "--layers=1", "--d_model=32", "--heads=2", "--d_ff=32", "--seq_len=16", "--batch_size=8")
DATA = ("--data=markov:order=1,vocab=16,tokens=5000", "--eval_batches=2", "--log_every=1")
PRETRAIN = (sys.executable, "-u", "-m", "experiments.pretrain", *FLAGS, *DATA)


@pytest.fixture
def pretrain(gcs):
    """Starts pretrain with the bucket in its environment; what is left of it at the end is killed."""
    started = []

    def start(*flags, command=PRETRAIN, **environment):
        started.append(
            subprocess.Popen(
                [*command, *flags],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                env={**os.environ, "XLA_FLAGS": "", **QUICK_COMPILES, **gcs.environment, **environment},
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(process):
    shown, _ = process.communicate(timeout=1800)
    return process.returncode, shown


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}")


@pytest.mark.slow
def test_a_bucket_out_of_reach_is_one_sentence_before_anything_is_compiled(gcs, pretrain, tmp_path):
    nowhere = {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:1", "TENSORSTORE_GCS_HTTP_URL": "http://127.0.0.1:1"}
    code, shown = finish(pretrain(f"--workdir={URL}", f"--cache_dir={tmp_path}", **nowhere))
    assert code == 1 and shown.splitlines()[-1].startswith(
        f"pretrain: --workdir={URL} cannot be used (the bucket cannot"
    )
    assert "Traceback" not in shown and "audit on" not in shown


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_from_the_bucket_with_the_losses_of_a_local_one(gcs, pretrain, tmp_path):
    common = ("--steps=50", "--checkpoint_every=10", "--eval_every=25", f"--cache_dir={tmp_path / 'cache'}")
    code, shown = finish(pretrain(*common, f"--workdir={tmp_path / 'local'}"))
    assert code == 0, shown
    process = pretrain(*common, f"--workdir={URL}")
    wait_for(process, "step 40/")
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    assert LOCK in gcs.names(f"{RUN}/")
    newest = max(int(name) for name in folders(gcs) if f"{RUN}/checkpoints/{name}/digests.json" in gcs.objects)
    assert newest >= 20
    flip(gcs, f"{RUN}/checkpoints/{newest}/metadata.json")
    code, shown = finish(pretrain(*common, f"--workdir={URL}"))
    assert code == 0, shown
    assert "waiting whether process" in shown and f"it is now {newest}.corrupt" in shown
    assert f"{URL}: going on after step {newest - 10} of 50" in shown
    names = gcs.names(f"{RUN}/")
    assert LOCK not in names and {"config.json", "env.json", "summary.json", "metrics.jsonl"} <= set(names)
    local = [json.loads(line) for line in (tmp_path / "local/metrics.jsonl").read_text().splitlines()]
    there = [json.loads(line) for line in gcs.read(f"{RUN}/metrics.jsonl").splitlines()]
    assert len(there) == 50
    assert [line["loss"] for line in there] == [line["loss"] for line in local]
    here = json.loads((tmp_path / "local/summary.json").read_text())
    assert json.loads(gcs.read(f"{RUN}/summary.json"))["eval_loss"] == here["eval_loss"]
    runs = load_runs(URL)
    assert set(runs["run"]) == {"run"} and len(runs) == 50 and set(runs["outcome"]) == {"finished"}


@pytest.mark.slow
def test_a_second_run_is_refused_until_the_first_has_been_told_to_stop(gcs, pretrain, tmp_path):
    flags = ("--steps=100000", "--log_every=10", f"--cache_dir={tmp_path}", f"--workdir={URL}")
    process = pretrain(*flags)
    wait_for(process, "step 10/")
    code, shown = finish(pretrain(*flags))
    assert code == 1 and f"--workdir={URL} is in use by process {process.pid} on " in shown
    process.send_signal(signal.SIGTERM)
    code, shown = finish(process)
    step = int(re.search(r"SIGTERM: saved after step (\d+); the same command goes on", shown)[1])
    assert code == 75 and str(step) in folders(gcs) and LOCK not in gcs.names(f"{RUN}/")
    code, shown = finish(pretrain(*flags, f"--stop_after={step + 1}"))
    assert code == 0 and f"going on after step {step} of" in shown and "waiting" not in shown


@pytest.mark.slow
def test_two_processes_save_to_the_bucket_and_one_goes_on(gcs, pretrain, tmp_path):
    common = ("--precision=fp8", "--steps=6", "--mesh=fsdp:2", f"--cache_dir={tmp_path}", f"--workdir={URL}")
    local = (sys.executable, "-m", "launch.local", "--processes=2", "--devices=1", "--", *PRETRAIN)
    code, shown = finish(pretrain(*common, "--stop_after=3", command=local))
    assert code == 0, shown
    assert folders(gcs) == ["3"] and LOCK not in gcs.names(f"{RUN}/")
    flags = "--xla_force_host_platform_device_count=2"
    code, shown = finish(pretrain(*common, XLA_FLAGS=flags))
    assert code == 0 and "going on after step 3 of 6" in shown, shown
