"""Runs of several processes, on loopback."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from micro import QUICK_COMPILES

from experiments import processes

SHAPES = ("--layers=2", "--d_model=32", "--heads=2", "--d_ff=32", "--seq_len=16", "--batch_size=8", "--eval_batches=2")
PRETRAIN = (sys.executable, "-m", "experiments.pretrain", *SHAPES, "--data=markov:order=1,vocab=16,tokens=5000")
ROOT = Path(__file__).resolve().parents[1]


def launch(count, devices, *flags, within=()):
    local = [sys.executable, "-m", "launch.local", f"--processes={count}", f"--devices={devices}", "--"]
    return subprocess.Popen(
        [*local, *within, *PRETRAIN, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **QUICK_COMPILES},
    )


def finish(process):
    shown, _ = process.communicate(timeout=1200)
    return process.returncode, shown


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, "JAX_COORDINATOR_ADDRESS"),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "JAX_NUM_PROCESSES"),
        ({"JAX_COORDINATOR_ADDRESS": "", "JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES"),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, "MEGASCALE_COORDINATOR_ADDRESS"),
    ],
)
def test_the_environment_tells_of_other_processes(environment, found):
    assert processes.cluster(environment) == found


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight(tmp_path):
    batch, runs = ("--batch_size=16", "--accumulate=2"), {}
    for count, devices in ((1, 8), (2, 4)):
        workdir = tmp_path / f"{count}x{devices}"
        flags = ("--precision=fp8", "--steps=4", "--log_every=1", "--telemetry=model,tensors", *batch)
        expected = (f"--expect_processes={count}", "--expect_devices=8", f"--cache_dir={tmp_path / 'cache'}")
        code, shown = finish(launch(count, devices, *flags, *expected, f"--workdir={workdir}"))
        assert code == 0, shown
        runs[count] = workdir, shown
    (alone, _), (both, shown) = runs[1], runs[2]
    assert "on 8 × cpu of 2 processes" in shown and "[1] step" not in shown and "[1] model" not in shown
    lines = metrics(alone), metrics(both)
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4]
    for one, other in zip(*lines, strict=True):
        for name in {"loss", "gradient_norm", "residual_amax"} & one.keys():
            np.testing.assert_allclose(other[name], one[name], rtol=1e-6)
    seen = [json.loads((workdir / "telemetry.jsonl").read_text().splitlines()[-1]) for workdir in (alone, both)]
    scales = [
        [value for dot in line["dots"].values() for tensor in dot.values() for value in tensor["scale"]]
        for line in seen
    ]
    assert scales[0] == scales[1] and len(scales[0]) == 24
    (session,) = json.loads((both / "env.json").read_text())["sessions"]
    assert session["devices"]["processes"] == 2
    # What two processes saved, one goes on from.
    more = ("--precision=fp8", "--steps=4", "--log_every=1", "--telemetry=model,tensors", *batch)
    (both / "summary.json").unlink()
    code, shown = finish(launch(1, 8, *more, f"--cache_dir={tmp_path / 'cache'}", f"--workdir={both}"))
    assert code == 0 and "going on after step 4 of 4" in shown


@pytest.mark.slow
def test_another_number_of_processes_or_a_coordinator_that_is_not_there_is_an_error(tmp_path):
    code, shown = finish(launch(1, 2, "--expect_devices=4", f"--workdir={tmp_path / 'run'}"))
    assert code == 1 and "[0] pretrain: --expect_devices=4, but there are 2: correct the flag" in shown
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COORD")}
    alone = subprocess.run(
        [*PRETRAIN, "--multihost", f"--workdir={tmp_path / 'run'}"], env=environment, capture_output=True, text=True
    )
    assert alone.returncode == 1 and alone.stderr.startswith("pretrain: --multihost asks for several processes, which")
    assert alone.stderr.count("\n") == 1
    half = subprocess.run(
        [*PRETRAIN, f"--workdir={tmp_path / 'run'}"],
        env={**environment, "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2"},
        capture_output=True,
        text=True,
    )
    assert half.returncode == 1 and "the environment has no JAX_PROCESS_ID" in half.stderr
    own = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    with pytest.raises(ValueError, match="the environment has no JAX_COORDINATOR_ADDRESS"):
        processes._own_arguments(own)
    assert not (tmp_path / "run").exists()
    joining = "from experiments import processes; processes.join(None, timeout=5)"
    own["JAX_COORDINATOR_ADDRESS"] = "127.0.0.1:1"
    nobody = subprocess.run(
        [sys.executable, "-c", joining], env={**environment, **own}, cwd=ROOT, capture_output=True, text=True
    )
    assert nobody.returncode != 0


@pytest.mark.slow
def test_several_processes_share_a_batch_that_is_large_enough_and_one_of_them_says_so(tmp_path):
    local = [sys.executable, "-m", "launch.local", "--processes=3", "--devices=2", "--", *PRETRAIN]
    command = [part for part in local if not part.startswith("--batch_size")]
    told = subprocess.run(
        [*command, "--print_plan", f"--workdir={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert "--batch_size is 18, for 6 devices" in told.stdout and "[0] " in told.stdout
    assert not any(f"[{other}] " in told.stdout for other in (1, 2))


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}")


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_where_one_cannot_save_all_end(tmp_path, index):
    # Of so many blocks of 512 bytes each file of one process.
    within = ("sh", "-c", f'if [ "$JAX_PROCESS_ID" = {index} ]; then ulimit -f 64; fi; exec "$@"', "sh")
    flags = ("--mesh=fsdp:2", "--d_model=128", "--steps=20", "--checkpoint_every=2", f"--workdir={tmp_path / 'run'}")
    began = time.monotonic()
    code, shown = finish(launch(2, 1, *flags, within=within))
    assert code not in (0, 75) and f"[{index}] pretrain: the checkpoint of step 2 could not be written" in shown
    assert not any(path.name.isdigit() for path in (tmp_path / "run/checkpoints").iterdir())
    assert time.monotonic() - began < 240


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step(tmp_path):
    process = launch(2, 1, "--steps=100000", "--log_every=10", f"--workdir={tmp_path / 'run'}")
    wait_for(process, "step 10/")
    os.kill(children(process.pid)[1], signal.SIGTERM)
    code, shown = finish(process)
    assert code == 75
    step = int(re.search(r"\[0\] SIGTERM: saved after step (\d+); the same command goes on", shown)[1])
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [str(step)]
    more = ("--steps=100000", "--log_every=10", f"--workdir={tmp_path / 'run'}", f"--stop_after={step + 2}")
    code, shown = finish(launch(2, 1, *more))
    assert code == 0 and f"going on after step {step} of 100000" in shown
    assert f"--stop_after={step + 2}: saved after step {step + 2}" in shown


@pytest.mark.slow
def test_a_run_goes_on_with_other_meshes_and_other_numbers_of_processes(tmp_path):
    flags = ("--precision=fp8/compute=float32", "--steps=6", "--log_every=1", f"--cache_dir={tmp_path / 'cache'}")
    code, shown = finish(launch(1, 4, *flags, "--mesh=fsdp:2,tensor:2", f"--workdir={tmp_path / 'whole'}"))
    assert code == 0, shown
    starts = ((2, 2, "fsdp:2,tensor:2", 2), (1, 4, "data:2,tensor:2", 4), (1, 1, "data:1", 6))
    for count, devices, mesh, last in starts:
        stop = () if last == 6 else (f"--stop_after={last}",)
        code, shown = finish(launch(count, devices, *flags, *stop, f"--mesh={mesh}", f"--workdir={tmp_path / 'moved'}"))
        assert code == 0 and (last == 2 or f"going on after step {last - 2} of 6" in shown), shown
    lines = metrics(tmp_path / "whole"), metrics(tmp_path / "moved")
    assert [line["step"] for line in lines[1]] == list(range(1, 7))
    for one, other in zip(*lines, strict=True):
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-4)


@pytest.mark.slow
def test_a_directory_in_use_is_refused_by_all_at_once(tmp_path):
    first = launch(1, 2, "--steps=100000", "--log_every=10", f"--workdir={tmp_path / 'run'}")
    wait_for(first, "step 10/")
    code, shown = finish(launch(2, 1, "--steps=100000", "--log_every=10", f"--workdir={tmp_path / 'run'}"))
    first.terminate()
    finish(first)
    assert code == 1 and "and the first process says why" in shown and "in use" in shown
