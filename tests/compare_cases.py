"""A program that stands in for pretrain: it leaves the files of a run in milliseconds, and fails in every way."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from experiments import compare, options, pretrain  # noqa: F401  (pretrain defines the flags that compare shares)
from experiments.training.precision import resolve

ROOT = Path(__file__).resolve().parents[1]
STEPS = 9
COMMON = (f"--steps={STEPS}", "--batch_size=4", "--seq_len=16")
SMALL = ("--precisions=fp8", "--controls=", "--nonoise")
PRECISIONS = ("fp32", "bf16", "fp8", "int8", "fp8-unscaled", "int8-tensor")

# settings.json: policies and final losses by precision; by run, what each of its starts does, then it finishes.
_FAKE = """
    import fcntl, json, os, pathlib, signal, sys, time

    folder = pathlib.Path(__file__).parent
    settings = json.loads((folder / "settings.json").read_text())
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
    run, precision = pathlib.Path(flags["workdir"]), flags["precision"]
    seed, steps = int(flags["seed"]), int(flags["steps"])
    goal = int(flags.get("stop_after", steps))

    run.mkdir(parents=True, exist_ok=True)
    lock = open(run / ".lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"pretrain: --workdir={run.absolute()} is in use")
    lock.truncate(0)
    print(os.getpid(), end="", file=lock, flush=True)
    with open(folder / "starts.txt", "a") as starts:
        print(run.name, goal, os.getpid(), *os.sched_getaffinity(0), file=starts)
    number = sum(line.split()[0] == run.name for line in (folder / "starts.txt").read_text().splitlines())
    behaviours = settings["behaviours"].get(run.name, [])
    behaviour = behaviours[number - 1] if number <= len(behaviours) else "finish"

    def typed(text):
        try:
            return json.loads(text)
        except ValueError:
            return text

    config = {name: typed(text) for name, text in flags.items() if name not in ("workdir", "stop_after")}
    config["recipes"] = [{"start": 0, "policy": settings["policies"].get(precision, precision)}]
    (run / "config.json").write_text(json.dumps(config))
    session = {"start_time": "2026-01-01T00:00:00+00:00", "argv": sys.argv}
    (run / "env.json").write_text(json.dumps({"sessions": [session]}))
    metrics = run / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    base = settings["losses"].get(precision, 2.0) + 0.1 * seed

    def take(step):
        loss = base + (steps - step)
        line = {"step": step, "loss": loss, "eval_loss": loss, "tokens_per_second": 100.0, "gradient_norm": 1.0}
        with open(metrics, "a") as file:
            print(json.dumps(line), file=file)

    def leave(*_):
        print("SIGTERM: saved")
        sys.exit(75)

    if behaviour == "fail":
        sys.exit(f"pretrain: {run.absolute()} has no room on the disk")
    if behaviour == "diverge":
        take(done + 1)
        (run / "diverged.json").write_text(json.dumps({"step": done + 2, "reason": "step 2 is not finite"}))
        sys.exit(4)
    if behaviour == "kill":
        take(done + 1)
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour in ("hang", "deaf"):
        signal.signal(signal.SIGTERM, leave if behaviour == "hang" else signal.SIG_IGN)
        take(done + 1)
        (folder / "hangs").touch()
        while True:
            signal.pause()
    if behaviour == "slow":
        take(done + 1)
        done += 1
        (folder / "hangs").touch()
        while not (folder / "go").exists():
            time.sleep(0.02)
    for step in range(done + 1, goal + 1):
        take(step)
    if goal == steps:
        summary = {"precision": precision, "eval_loss": base, "tokens": 64 * steps, "tokens_per_second": 100.0}
        (run / "summary.json").write_text(json.dumps({**summary, "peak_memory_bytes": 1000, "policy": ""}))
    print("done")
"""

# Runs compare in a process of its own, with that program.
_DRIVER = """
    import sys
    from absl import app
    from experiments import compare, options

    compare.PROGRAM = (sys.executable, "-S", sys.argv.pop(1))
    options.define()
    compare.define_flags()
    app.run(compare.main, flags_parser=compare.parse)
"""


class Fake:
    """The program in a folder of its own.

    Args:
      folder: for it and its notes.
      behaviours: by run, what each start does: fail, diverge, kill, hang (until SIGTERM), deaf, slow (until `go`).
      losses: by precision; 2 where not given.
    """

    def __init__(self, folder, behaviours=None, losses=None):
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self.policies = {name: str(resolve(name).policy) for name in PRECISIONS}
        self._settings = {
            "policies": self.policies,
            "behaviours": behaviours or {},
            "losses": losses or {},
        }
        self._save()
        (folder / "fake.py").write_text(textwrap.dedent(_FAKE))
        (folder / "driver.py").write_text(textwrap.dedent(_DRIVER))

    def _save(self):
        (self._folder / "settings.json").write_text(json.dumps(self._settings))

    @property
    def program(self):
        return (sys.executable, "-S", str(self._folder / "fake.py"))

    def change(self, **settings):
        self._settings |= settings
        self._save()

    def starts(self):
        """[run, step to reach, process id, cores...] of every start so far."""
        notes = self._folder / "starts.txt"
        return [line.split() for line in notes.read_text().splitlines()] if notes.exists() else []

    def started(self):
        return [start[0] for start in self.starts()]

    def go(self):
        (self._folder / "go").touch()

    def await_hanging(self):
        wait_for((self._folder / "hangs").exists)
        (self._folder / "hangs").unlink()

    def compare(self, *arguments):
        """Starts compare in a process of its own."""
        command = [sys.executable, "-W", "error", str(self._folder / "driver.py"), str(self._folder / "fake.py")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, *map(str, (*COMMON, *arguments))], env=environment, **pipes)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def flags_of_the_program():
    """Other programs of this process have flags of the same names."""
    others = {name: options.FLAGS[name] for name in compare._NAMES if name in options.FLAGS}
    for name in others:
        delattr(options.FLAGS, name)
    compare.define_flags()
    yield
    for name in compare._NAMES:
        delattr(options.FLAGS, name)
    for name, flag in others.items():
        options.FLAGS[name] = flag


@pytest.fixture(name="fake")
def fake_pretrain(tmp_path, monkeypatch):
    """What compare starts instead of pretrain."""
    fake = Fake(tmp_path / "fake", losses={"fp8": 2.0001, "fp8-unscaled": 2.3, "int8-tensor": 2.1})
    monkeypatch.setattr(compare, "PROGRAM", fake.program)
    return fake


def run(*arguments):
    compare.parse(["compare", *COMMON, *map(str, arguments)])
    return compare.main([])


def read(path):
    return json.loads(path.read_text())
