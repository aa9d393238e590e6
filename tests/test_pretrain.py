"""The program: what a run leaves on disk, how it goes on, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from micro import quick_compiles  # noqa: F401

import q8jax
from experiments import options, pretrain, runs, start
from experiments.runs.rundir import RunDir
from experiments.training import run as run_module
from experiments.training.run import Run
from experiments.training.step import Trainer

ROOT = Path(__file__).resolve().parents[1]
MICRO = ("--layers=2", "--d_model=32", "--heads=2", "--d_ff=32", "--seq_len=16", "--batch_size=8", "--eval_batches=2")
EVERY_STEP = ("--steps=6", "--log_every=1", "--eval_every=3", "--checkpoint_every=2", "--mesh=data:1")
LOSSES = ("step", "loss", "eval_loss", "gradient_norm", "nonfinite_tensors")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a small run over a text of its own; compiled programs are shared by all tests."""
    folder = tmp_path_factory.mktemp("pretrain")
    words = np.random.default_rng(0).choice(["def", "return", "x", "y", "(", ")", ":", "\n", "+", "="], 20_000)
    (folder / "words.txt").write_text(" ".join(words))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield (*MICRO, f"--data={folder / 'words.txt'}", f"--cache_dir={folder / 'cache'}")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def run(*arguments):
    options.parse(["pretrain", *map(str, arguments)])
    return pretrain.main([])


def losses(workdir):
    return [[line.get(name) for name in LOSSES] for line in runs.read_metrics(workdir)]


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert run(*flags, *EVERY_STEP, f"--workdir={workdir}") == 0
    return workdir


def test_metrics_have_a_line_per_logging_interval(finished):
    lines = runs.read_metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    names = {"loss", "nonfinite_tensors", "learning_rate", "tokens_per_second", "input_wait"}
    assert all(names <= set(line) for line in lines)
    # The first batch is there before the step is compiled.
    assert lines[0]["input_wait"] == 0 and all(0 < line["input_wait"] < 1 for line in lines[1:])
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert all(line["nonfinite_tensors"] == 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_summary_has_what_others_rely_on(finished):
    summary, lines = read(finished / "summary.json"), runs.read_metrics(finished)
    names = "precision params tokens train_loss eval_loss eval_gap_bf16 tokens_per_second step_ms compile_seconds"
    assert set(f"{names} peak_memory_bytes flops mfu joules_per_token".split()) <= set(summary)
    assert summary["precision"] == "fp8"
    assert summary["params"] == 2 * 32 * 256 + 2 * (32 * 96 + 32 * 32 + 3 * 32 * 32) + 5 * 32
    assert summary["tokens"] == 6 * 8 * 16
    assert summary["eval_loss"] == lines[-1]["eval_loss"]
    assert 1e-6 < abs(summary["eval_gap_bf16"] / summary["eval_loss"]) < 0.01
    assert summary["train_loss"] == lines[-1]["loss"]
    assert summary["step_ms"] * summary["tokens_per_second"] == pytest.approx(1e3 * 8 * 16)
    assert summary["input_wait"] == pytest.approx(sum(line["input_wait"] for line in lines) / len(lines))
    # Of steps of a millisecond, checkpoints take the greater part.
    assert 0.1 < summary["checkpoint_wait"] < 1
    assert summary["mfu"] is summary["joules_per_token"] is None
    assert summary["compile_seconds"] > 1 and summary["peak_memory_bytes"] > 1e8 and summary["flops"] > 0


def test_a_run_on_disk_is_complete(finished):
    config = read(finished / "config.json")
    assert config["precision"] == "fp8" and config["layers"] == 2 and config["warmup"] == 0
    assert (config["mesh"], config["tokenizer"]) == ("data:1", "bytes")
    assert "e4m3fn:tensor:delayed" in config["recipes"][0]["policy"]
    assert set(config["data_sha256"]) == {"train", "validation"}
    (session,) = read(finished / "env.json")["sessions"]
    assert session["versions"]["jax"] == jax.__version__ and "51,378 bytes" in session["data"]
    assert session["mesh"] == "data:1"
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["4", "6"]
    assert (finished / "checkpoints" / "6" / "digests.json").exists()


@pytest.mark.slow
def test_a_run_stopped_after_a_step_goes_on_as_if_it_had_not_been(flags, finished, tmp_path, capsys):
    assert run(*flags, *EVERY_STEP, "--stop_after=4", f"--workdir={tmp_path}") == 0
    assert "--stop_after=4: saved after step 4" in "".join(capsys.readouterr())
    assert [line["step"] for line in runs.read_metrics(tmp_path) if "eval_loss" in line] == [3, 4]
    assert not (tmp_path / "summary.json").exists()
    for earlier in (3, 4):
        assert run(*flags, *EVERY_STEP, f"--stop_after={earlier}", f"--workdir={tmp_path}") == 0
        assert f"stands after step 4 already, --stop_after={earlier}" in "".join(capsys.readouterr())
        assert not (tmp_path / "summary.json").exists()
    assert run(*flags, *EVERY_STEP, f"--workdir={tmp_path}") == 0
    assert [line[:2] for line in losses(tmp_path)] == [line[:2] for line in losses(finished)]
    assert read(tmp_path / "summary.json")["eval_loss"] == read(finished / "summary.json")["eval_loss"]


@pytest.mark.slow
def test_telemetry_changes_nothing_of_a_run_and_is_the_same_when_resumed(flags, finished, tmp_path):
    telling = ("--telemetry=model,tensors", "--telemetry_every=3")
    once, resumed = tmp_path / "once", tmp_path / "resumed"
    assert run(*flags, *EVERY_STEP, *telling, f"--workdir={once}") == 0
    assert losses(once) == losses(finished)
    assert [line["step"] for line in runs.read_metrics(once, runs.TELEMETRY)] == [1, 3, 6]
    assert [line["step"] for line in runs.read_metrics(once) if "log_z" in line] == [1, 3, 6]
    assert not (finished / "telemetry.jsonl").exists()
    assert run(*flags, *EVERY_STEP, *telling, "--stop_after=4", f"--workdir={resumed}") == 0
    # A line after the last checkpoint, as a killed run leaves it.
    with open(resumed / "telemetry.jsonl", "a") as file:
        file.write('{"step": 5}\n')
    assert run(*flags, *EVERY_STEP, *telling, f"--workdir={resumed}") == 0
    assert (resumed / "telemetry.jsonl").read_bytes() == (once / "telemetry.jsonl").read_bytes()


@pytest.mark.slow
def test_the_compiled_step_is_the_same_with_telemetry_and_without(flags):
    def program(*telling):
        options.parse(["pretrain", *map(str, flags), *EVERY_STEP, *telling])
        run = start.checked_run()
        trainer = run.trainer(run.options.phases[0])
        state = jax.eval_shape(trainer.init)
        return jax.jit(trainer.step, donate_argnums=0).lower(state, run.tokens).compile().as_text()

    assert program() == program("--telemetry=model,tensors,binades,gemms", "--telemetry_every=1")


@pytest.mark.slow
def test_the_average_of_the_parameters_is_evaluated_too(flags, tmp_path):
    averaging = ("--average=0.5", "--init_perturbation=1e-3", "--final_eval_batches=3")
    assert run(*flags, *EVERY_STEP, *averaging, f"--workdir={tmp_path}") == 0
    summary, last = read(tmp_path / "summary.json"), runs.read_metrics(tmp_path)[-1]
    kept = [summary["eval_loss"], summary["eval_loss_average"], last["eval_loss"]]
    assert len(set(kept)) == 3 and max(kept) - min(kept) < 1


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_finished_run_is_left_alone(flags, finished, capsys):
    before = contents(finished)
    assert run(*flags, *EVERY_STEP, f"--workdir={finished}") == 0
    assert "is finished already" in capsys.readouterr().out
    assert contents(finished) == before


def test_a_run_killed_before_its_summary_gets_one(flags, finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "summary.json").unlink()
    assert run(*flags, *EVERY_STEP, f"--workdir={copy}") == 0
    assert (copy / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    for name in ("train_loss", "eval_loss", "eval_gap_bf16", "tokens", "step_ms", "nonfinite_tensors"):
        assert read(copy / "summary.json")[name] == read(finished / "summary.json")[name]


@pytest.mark.slow
def test_config_repeats_a_run_and_compiled_programs_are_read_from_disk(finished, tmp_path, capsys):
    again = tmp_path / "again"
    config = finished / "config.json"
    assert run(f"--config={config}", f"--workdir={again}", "--profile_steps=2:3", "--keep_checkpoints=1") == 0
    assert losses(again) == losses(finished)
    assert read(again / "config.json") | read(config) == read(again / "config.json") | {
        "profile_steps": "",
        "keep_checkpoints": 2,
    }
    assert read(again / "summary.json")["compile_seconds"] < 0.8 * read(finished / "summary.json")["compile_seconds"]
    assert list((again / "profile").rglob("*.xplane.pb"))
    assert f"profile in {again / 'profile'}" in capsys.readouterr().out


def test_a_config_of_other_data_cannot_be_repeated(finished, tmp_path, capsys):
    config = read(finished / "config.json")
    config["data_sha256"]["train"] = "0" * 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path / 'run'}") == 1
    assert re.search("cannot be repeated here: its data_sha256.train was 0000", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_audits_its_step_before_the_first_one(flags, finished, tmp_path, capsys):
    assert run(*flags, *EVERY_STEP, f"--workdir={tmp_path / 'run'}") == 0
    lines = capsys.readouterr().out.splitlines()
    (audit,) = (i for i, line in enumerate(lines) if line.startswith("audit on cpu: 24 8-bit GEMMs with "))
    assert audit < next(i for i, line in enumerate(lines) if line.startswith("step 1/6"))
    assert "all emulated exactly (float8_e4m3fn as " in lines[audit]


def test_the_precision_that_the_device_rewards_is_taken_on_request(flags, tmp_path, capsys):
    assert run(*flags, "--precision=auto", "--print_plan", f"--workdir={tmp_path / 'run'}") == 0
    shown, advice = capsys.readouterr().out, q8jax.recommend("cpu")
    assert shown.startswith(
        f"--precision=auto is {advice.precision}: {advice.reason}\nprecision {advice.precision} from"
    )


@pytest.mark.slow
def test_emulation_is_refused_on_request(flags, finished, tmp_path, capsys):
    assert run(*flags, *EVERY_STEP, "--require_native", f"--workdir={tmp_path / 'run'}") == 1
    assert "--precision=fp8 is emulated on this device" in capsys.readouterr().err
    assert not runs.read_metrics(tmp_path / "run")


@pytest.mark.slow
def test_a_step_that_is_not_what_was_asked_is_not_trained(flags, tmp_path, monkeypatch, capsys):
    audited = q8jax.audit
    monkeypatch.setattr(run_module, "audit", lambda *stages: audited(*stages, asked="blocks/mlp/up->int8;.*->bf16"))
    assert run(*flags, "--steps=1", "--precision=bf16", f"--workdir={tmp_path / 'run'}") == 1
    shown = capsys.readouterr()
    assert re.search("float(32|16) instead of int8", shown.out)
    assert shown.err.startswith("pretrain: --precision=bf16 is not what this device would run")


def stop_at(monkeypatch, step):
    """Sends this process SIGTERM while it takes a step."""
    reached = runs.StopSignal.reached

    def and_stop(self, done):
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return reached(self, done)

    monkeypatch.setattr(runs.StopSignal, "reached", and_stop)


SCHEDULE = "--precision_schedule=0:bf16,2:fp8,-1:bf16"


@pytest.fixture(scope="module")
def scheduled(flags, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("scheduled") / "run"
    assert run(*flags, *EVERY_STEP, SCHEDULE, f"--workdir={workdir}") == 0
    return workdir


@pytest.mark.slow
def test_a_schedule_changes_the_precision(finished, scheduled):
    assert losses(scheduled)[:2] != losses(finished)[:2]
    config, summary = read(scheduled / "config.json"), read(scheduled / "summary.json")
    assert [recipe["start"] for recipe in config["recipes"]] == [0, 2, 5]
    assert summary["precision"] == "0:bf16,2:fp8,-1:bf16"
    # The last phase is BF16, so the run's own evaluation is the one in BF16.
    assert summary["eval_gap_bf16"] == 0
    assert "e4m3fn" not in summary["policy"]


def stopped(command, step, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert run(*command) == pretrain.STOPPED
    assert f"SIGTERM: saved after step {step}; the same command goes on" in capsys.readouterr().out


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(flags, scheduled, tmp_path, monkeypatch, capsys):
    command = (*flags, *EVERY_STEP, SCHEDULE, f"--workdir={tmp_path}")
    stopped(command, 3, monkeypatch, capsys)
    assert not (tmp_path / "summary.json").exists()
    assert run(*command) == 0
    assert f"{tmp_path}: going on after step 3 of 6" in capsys.readouterr().out
    assert losses(tmp_path) == losses(scheduled)
    assert read(tmp_path / "summary.json")["eval_loss"] == read(scheduled / "summary.json")["eval_loss"]
    assert len(read(tmp_path / "env.json")["sessions"]) == 2


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_and_says_so(flags, finished, tmp_path, monkeypatch, capsys):
    command = (*flags, *EVERY_STEP, f"--workdir={tmp_path}")
    stopped((*command, "--mesh=auto"), 3, monkeypatch, capsys)
    assert read(tmp_path / "config.json")["mesh"] == "data:8"
    assert run(*command) == 0
    line = "--mesh was data:8 and is data:1: sums are reordered, so losses need not agree bit for bit"
    assert line in capsys.readouterr().out.splitlines()
    assert read(tmp_path / "config.json") == read(finished / "config.json")
    found, expected = losses(tmp_path), losses(finished)
    assert [line[0] for line in found] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([line[1] for line in found], [line[1] for line in expected], rtol=1e-3)


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_that_of_the_precision_before(
    flags, scheduled, tmp_path, monkeypatch, capsys
):
    """The run then goes on exactly where its precision changes."""
    command = (*flags, *EVERY_STEP, SCHEDULE, f"--workdir={tmp_path}")
    stopped(command, 3, monkeypatch, capsys)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    (tmp_path / "checkpoints" / "3" / "metadata.json").write_text("{}")
    assert run(*command) == 0
    shown = capsys.readouterr()
    assert "checkpoint 3" in shown.err and "going on after step 2 of 6" in shown.out
    assert losses(tmp_path) == losses(scheduled)


@pytest.mark.slow
def test_every_precision_sees_the_same_batches(flags):
    batches = []
    for precision in ("fp32", "int8"):
        options.parse(["pretrain", *flags, f"--precision={precision}"])
        batches.append([start.checked_run().batch(step) for step in (0, 5)])
    np.testing.assert_array_equal(batches[0], batches[1])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run(flags, scheduled, tmp_path, monkeypatch, capsys):
    init = Trainer.init

    def poisoned(self):
        state = init(self)
        kernel = state["params"]["blocks"]["attention"]["out"]["kernel"]
        state["params"]["blocks"]["attention"]["out"]["kernel"] = kernel.at[1, 0, 0].set(jnp.nan)
        return state

    monkeypatch.setattr(Trainer, "init", poisoned)
    assert run(*flags, *EVERY_STEP, "--precision=bf16", f"--workdir={tmp_path}") == pretrain.DIVERGED == 4
    assert capsys.readouterr().err == (
        "pretrain: step 1 is not finite (loss nan, gradient norm nan), first in parameter blocks/attention/out of "
        "block 1; the parameters are as before: lower --lr, or choose another --precision\n"
    )
    assert losses(tmp_path) == []
    divergence = read(tmp_path / "diverged.json")
    assert divergence["step"] == 1 and divergence["reason"].startswith("step 1 is not finite")
    assert not (tmp_path / "summary.json").exists() and not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_a_learning_rate_that_is_too_high_ends_the_run(flags, tmp_path, capsys):
    diverging = ("--precision=fp8/compute=float16", "--lr=1e30", "--steps=12", "--log_every=12", "--eval_every=12")
    assert run(*flags, *diverging, f"--workdir={tmp_path}") == pretrain.DIVERGED
    # The first step warms up from 0; no later one is skipped, for no loss scale helps it.
    sentence = r"pretrain: step 3 is not finite \(loss nan, gradient norm nan\), first in .*: lower --lr, .*\n"
    assert re.fullmatch(sentence, capsys.readouterr().err)


@pytest.mark.slow
def test_what_saturates_between_two_lines_is_counted_by_a_resumed_run_too(flags, tmp_path, monkeypatch, capsys):
    gradients = Trainer.gradients

    def infinite_once(self, model, state, tokens):
        *results, amaxes = gradients(self, model, state, tokens)
        return *results, jax.tree.map(lambda amax: jnp.where(state["step"] == 1, jnp.inf, amax), amaxes)

    monkeypatch.setattr(Trainer, "gradients", infinite_once)
    command = (*flags, *EVERY_STEP, "--log_every=3")
    assert run(*command, f"--workdir={tmp_path / 'whole'}") == 0
    lines = runs.read_metrics(tmp_path / "whole")
    # The three slots of four layers in each of two blocks.
    assert [(line["step"], line["nonfinite_tensors"]) for line in lines] == [(3, 24), (6, 0)]
    assert read(tmp_path / "whole" / "summary.json")["nonfinite_tensors"] == 24
    stopped((*command, f"--workdir={tmp_path / 'parts'}"), 2, monkeypatch, capsys)
    assert run(*command, f"--workdir={tmp_path / 'parts'}") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def launch(*arguments):
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "experiments.pretrain", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


LONG = ("--precision=bf16", "--steps=60", "--log_every=1", "--eval_every=20", "--checkpoint_every=7", "--mesh=data:1")


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(*flags, *LONG, f"--workdir={workdir}") == 0
    return workdir


def kill_after(process, workdir, lines):
    """Kills a process once there are so many lines of metrics."""
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
            break
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(flags, uninterrupted, tmp_path):
    command = (*flags, *LONG, f"--workdir={tmp_path}")
    kill_after(launch(*command), tmp_path, 23)
    process = launch(*command)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0
    assert errors == ""  # no warning of JAX's about devices that are not there
    assert re.search(r"going on after step (7|14|21|28) of 60", output)
    assert re.search(
        r"^step 60/60  loss \d\.\d{4}  eval_loss \d\.\d{4}  [\d,]+ tok/s  0:00:00 left$", output, re.MULTILINE
    )
    assert losses(tmp_path) == losses(uninterrupted)
    summaries = [read(workdir / "summary.json") for workdir in (tmp_path, uninterrupted)]
    assert summaries[0]["eval_loss"] == summaries[1]["eval_loss"]
    assert summaries[1]["eval_gap_bf16"] == 0


@pytest.mark.slow
def test_microbatches_on_several_devices_train_alike(flags, uninterrupted, tmp_path, monkeypatch, capsys):
    command = (*flags, *LONG, "--mesh=data:4", "--accumulate=2", f"--workdir={tmp_path}")
    stopped(command, 3, monkeypatch, capsys)
    found, expected = losses(tmp_path), losses(uninterrupted)[:3]
    assert [line[0] for line in found] == [1, 2, 3]
    np.testing.assert_allclose([line[1] for line in found], [line[1] for line in expected], rtol=1e-3)


REFUSED = [
    (["--precision=fp8-block"], "--precision=fp8-block: .*tile128 .* does not divide its contracting size 32"),
    (["--precision=blocks/mpl/.*->fp8"], "--precision=blocks/mpl/.*->fp8: .*'blocks/mpl/.\\*' matches no layer"),
    (["--precision_schedule=0:bf16,3:int8-block,5:mxfp8/fwd=e4m3fn:tile48,none"], "--precision_schedule=.*tile48"),
    (["--mesh=data:3"], "--mesh=data:3 does not divide the 8 rows of a microbatch .*choose data from 1, 2, 4, 8"),
    (["--mesh=data:16", "--batch_size=16"], "--mesh=data:16 needs 16 devices, but there are 8"),
    (["--mesh=model:2"], "--mesh=model:2 must be auto or sizes of some of data, fsdp, tensor"),
    (["--seq_len=100000"], "--seq_len=100000 needs 100001 tokens in each split"),
    (["--data=stdlibb"], "--data=stdlibb is neither a source .did you mean 'stdlib'"),
    (["--data=text:{tmp}/none*.txt"], "none"),
    (["--data=text:{tmp}/empty.txt"], "empty.txt"),
    (["--tokenizer=bite"], "--tokenizer=bite is unknown .did you mean 'bytes'"),
    (["--tokenizer={tmp}/none.json"], "--tokenizer=.*no such file"),
    (["--config={tmp}/none.json"], "--config=.*none.json does not exist; give the config.json of a run"),
    (["--config={tmp}/empty.txt"], "--config=.*empty.txt.*not JSON"),
    (["--config={tmp}"], "--config=.* is a directory"),
    (["--workdir={tmp}"], "is not empty and holds no config.json"),
    (["--workdir={tmp}/empty.txt"], "is a file; give a directory"),
    (["--workdir={tmp}/empty.txt/below"], "--workdir=.*cannot be used .not a directory."),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[arguments[0] for arguments, _ in REFUSED])
def test_what_cannot_run_is_refused_before_anything_is_compiled(
    flags, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "compile", lambda *_: pytest.fail("compiled"))
    (tmp_path / "empty.txt").touch()
    # What is wrong in every precision is found sooner in a simple one.
    if not arguments[0].startswith("--precision"):
        arguments = ["--precision=bf16", *arguments]
    assert run(*flags, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)) == 1
    shown = capsys.readouterr().err
    assert re.search(message, shown)
    assert shown.startswith("pretrain: ") and shown.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["empty.txt"]


def test_a_run_of_another_configuration_is_refused(flags, finished, capsys):
    before = contents(finished)
    assert run(*flags, *EVERY_STEP, "--seed=1", "--precision=int8", f"--workdir={finished}") == 1
    shown = capsys.readouterr().err
    assert "holds a run with --precision=fp8 (here int8)" in shown and "--seed=0 (here 1)" in shown
    assert shown.count("\n") == 1
    assert contents(finished) == before


def test_a_run_in_use_is_refused(flags, finished, capsys):
    config = read(finished / "config.json")
    with RunDir.open(finished, config):
        assert run(*flags, *EVERY_STEP, f"--workdir={finished}") == 1
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err


def test_a_plan_of_any_size_takes_seconds_and_no_memory(flags, monkeypatch, capsys):
    monkeypatch.setattr(Run, "compile", lambda *_: pytest.fail("compiled"))
    data = flags[-2:]
    started = time.process_time()
    assert run("--model=8b", "--accumulate=4", "--print_plan", *data) == 0
    assert time.process_time() - started < 20
    shown = capsys.readouterr().out
    for gemm in (
        r"blocks/attention/qkv +fwd +32× +1024×4096 · 4096×6144 +e4m3fn:tensor:delayed × e4m3fn:tensor:delayed",
        r"blocks/mlp/down +drhs +32× +14336×1024 · 1024×4096 +e4m3fn:tensor:delayed × e4m3fn:tensor:delayed",
        r"head +dlhs +1× +1024×256 · 256×4096 +bfloat16 × bfloat16",
    ):
        assert re.search(f"^{gemm}$", shown, re.MULTILINE), gemm
    assert re.search(r"^parameters +6,981,685,248$", shown, re.MULTILINE)
    assert re.search(r"^estimated memory +11\d\.\d GB", shown, re.MULTILINE)


def test_list_shows_every_preset_with_recipe_and_source(capsys):
    assert run("--precision=list") == 0
    shown = capsys.readouterr().out
    for name, preset in q8jax.PRECISIONS.items():
        assert f"{name}\n    {preset.summary}\n    {preset.source}\n    {preset.recipe}" in shown


@pytest.mark.slow
def test_deterministic_asks_xla_for_it(flags, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    assert run(*flags, "--deterministic", "--print_plan") == 0
    assert os.environ["XLA_FLAGS"].endswith(" --xla_gpu_deterministic_ops=true")
