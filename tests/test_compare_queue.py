"""The queue, with a program in place of pretrain that fails in every way."""

import fcntl
import io
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
from compare_cases import COMMON, STEPS, Fake, lines, wait_for
from rich.console import Console

from experiments import options, pretrain  # noqa: F401  (pretrain defines the flags)
from experiments.comparing import ondisk, plan
from experiments.comparing.arms import Protocol
from experiments.comparing.display import Display
from experiments.comparing.pace import Pace
from experiments.comparing.queue import Queue
from experiments.comparing.slots import Slot, slots
from experiments.comparing.tasks import Task
from experiments.runs import RunError, StopSignal


class Stage:
    """A study of bf16 and fp8 with a queue, which works as often as it is told."""

    def __init__(self, tmp_path, behaviours=None, *, seeds=2, jobs=1, terminal=False):
        self.fake = Fake(tmp_path / "fake", behaviours)
        self.out = tmp_path / "study"
        self.out.mkdir(exist_ok=True)
        self.ended = []
        self.text = io.StringIO()
        self._jobs = jobs
        self._console = Console(file=self.text, force_terminal=terminal, width=100, height=30, highlight=False)
        options.parse(["compare", *COMMON])
        flags = {name: options.FLAGS[name].value for name in sorted(options.given_flags())}
        arms = Protocol(["bf16", "fp8"], "bf16", [], noise=False).arms([{}])
        self.runs = plan.of_arms(arms, range(seeds), flags, "eval_loss").runs(self.out)

    def work(self, goal=STEPS, stop=None):
        with Display("study", self._jobs, "eval_loss", self._console) as display:
            queue = Queue(
                self.out,
                slots(self._jobs),
                self.fake.program,
                "abc",
                stop or StopSignal(),
                display,
                lambda: self.ended.append(self.states()),
                pause=0.02,
            )
            tasks = queue.work({run.name: goal for run in self.runs}, self.runs)
        return {task.run.name: task.state for task in tasks}

    def states(self):
        return sum(ondisk.outcome(run.path) is not None for run in self.runs)

    def attempts(self):
        return lines(self.out / "attempts.jsonl")

    def outcomes(self):
        return [(attempt["run"], attempt["outcome"]) for attempt in self.attempts()]


@pytest.fixture
def stage(tmp_path):
    return lambda *arguments, **settings: Stage(tmp_path, *arguments, **settings)


RUNS = ["bf16-seed0", "fp8-seed0", "bf16-seed1", "fp8-seed1"]


def test_runs_go_seed_by_seed_and_are_not_run_again(stage):
    study = stage()
    assert study.work() == dict.fromkeys(RUNS, "finished")
    assert study.fake.started() == RUNS
    assert study.ended == [1, 2, 3, 4]
    first = study.attempts()[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first.pop("started"))
    assert first.pop("seconds") > 0 and 0 <= first.pop("others") <= 1
    expected = {"run": "bf16-seed0", "exit": 0, "outcome": "finished", "reason": "", "jobs": 1, "revision": "abc"}
    assert first == expected
    assert study.work() == dict.fromkeys(RUNS, "finished")
    assert study.fake.started() == RUNS and len(study.attempts()) == 4


def test_a_failure_is_recorded_and_the_study_goes_on(stage):
    study = stage({"fp8-seed0": ["fail"]})
    assert study.work() == dict.fromkeys(RUNS, "finished") | {"fp8-seed0": "failed"}
    failed = study.attempts()[1]
    assert (failed["run"], failed["exit"], failed["outcome"]) == ("fp8-seed0", 1, "failed")
    assert failed["reason"] == "./runs/fp8-seed0 has no room on the disk"
    assert study.ended == [1, 2, 3]
    # The next command tries it again, and its log keeps both.
    assert study.work() == dict.fromkeys(RUNS, "finished")
    log = (study.out / "logs" / "fp8-seed0.log").read_text()
    assert log.count("$ ") == 2 and "no room" in log and log.endswith("done\n")
    assert "--workdir=" in log.splitlines()[0]


def test_a_diverged_run_is_an_outcome(stage):
    study = stage({"fp8-seed0": ["diverge"]})
    assert study.work()["fp8-seed0"] == "diverged"
    attempt = study.attempts()[1]
    assert (attempt["exit"], attempt["outcome"], attempt["reason"]) == (4, "diverged", "step 2 is not finite")
    assert study.work()["fp8-seed0"] == "diverged"
    assert study.fake.started() == RUNS


def test_a_killed_run_is_taken_up_again_but_not_for_ever(stage):
    study = stage({"bf16-seed0": ["kill"], "fp8-seed0": ["kill", "kill", "kill", "kill"]})
    assert study.work() == dict.fromkeys(RUNS, "finished") | {"fp8-seed0": "failed"}
    assert study.outcomes() == [
        ("bf16-seed0", "interrupted"),
        ("bf16-seed0", "finished"),
        *[("fp8-seed0", "interrupted")] * 2,
        ("fp8-seed0", "failed"),
        ("bf16-seed1", "finished"),
        ("fp8-seed1", "finished"),
    ]
    assert study.attempts()[0]["reason"] == "stopped by SIGKILL" and study.attempts()[0]["exit"] == -signal.SIGKILL
    assert [line["step"] for line in ondisk.lines(study.runs[0].path)] == [*range(1, STEPS + 1)]


def test_runs_pause_at_a_goal_and_go_on_from_there(stage):
    study = stage()
    assert study.work(goal=3) == dict.fromkeys(RUNS, "paused")
    assert [start[1] for start in study.fake.starts()] == ["3"] * 4
    assert study.ended == [] and ondisk.position(study.runs[0].path)[0] == 3
    assert study.attempts()[0]["reason"] == "stopped after step 3, as planned"
    assert study.work(goal=3) == dict.fromkeys(RUNS, "paused")
    assert len(study.fake.starts()) == 4
    assert study.work() == dict.fromkeys(RUNS, "finished")
    assert len(ondisk.lines(study.runs[0].path)) == STEPS


def test_a_signal_is_passed_on_and_nothing_more_is_started(stage):
    study = stage({"bf16-seed0": ["hang"], "fp8-seed0": ["hang"]}, jobs=2)
    stop = StopSignal()

    def press():
        wait_for(lambda: len(study.fake.starts()) == 2 and all(ondisk.position(run.path)[0] for run in study.runs[:2]))
        stop.requested = "SIGTERM"

    thread = threading.Thread(target=press)
    thread.start()
    states = study.work(stop=stop)
    thread.join()
    assert states == dict.fromkeys(RUNS, "waiting")
    assert sorted(study.outcomes()) == [("bf16-seed0", "interrupted"), ("fp8-seed0", "interrupted")]
    assert "SIGTERM: saved" in (study.out / "logs" / "fp8-seed0.log").read_text()
    assert study.work() == dict.fromkeys(RUNS, "finished")
    assert all(attempt["jobs"] == 2 for attempt in study.attempts())


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes cannot be bound to cores here")
def test_runs_at_once_share_the_cores(stage):
    cores = os.sched_getaffinity(0)
    study = stage(jobs=2)
    assert set(study.work().values()) == {"finished"}
    shares = [frozenset(map(int, start[3:])) for start in study.fake.starts()]
    assert all(share < cores or len(cores) == 1 for share in shares)
    assert len(set(shares)) == min(2, len(cores))
    assert os.sched_getaffinity(0) == cores


def test_slots_divide_the_cores_and_take_a_gpu_each(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert slots(1) == [Slot(None, {})]
    assert [sorted(slot.cores) for slot in slots(3)] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert [sorted(slot.cores) for slot in slots(9)] == [[i % 8] for i in range(9)]
    for jobs in (0, -1):
        with pytest.raises(ValueError, match=f"^--jobs={jobs} must be at least 1"):
            slots(jobs)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [dict(slot.environment) for slot in slots(2)] == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "35"]
    with pytest.raises(ValueError, match="^--jobs=3 is more than there are GPUs, 2"):
        slots(3)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with pytest.raises(ValueError, match="^--jobs=2 cannot be, for one process takes a whole TPU"):
        slots(2)
    assert slots(1)


def hold(run, seconds=60):
    """A process that has the lock of a run."""
    run.mkdir(parents=True, exist_ok=True)
    code = f"""if True:
        import fcntl, os, time
        lock = open({str(run / ".lock")!r}, "a")
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(os.getpid(), end="", file=lock, flush=True)
        print("held", flush=True)
        time.sleep({seconds})
    """
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
    with process.stdout:
        process.stdout.readline()
    return process


def test_a_run_that_another_process_has_is_waited_for(stage, monkeypatch):
    monkeypatch.setattr("experiments.comparing.queue._LOOK_AGAIN", 0.05)
    study = stage(jobs=2)
    holder = hold(study.runs[0].path)

    def release():
        # What is held here counts as one of two jobs.
        wait_for(lambda: len(study.fake.starts()) == 3)
        holder.kill()
        holder.wait()

    thread = threading.Thread(target=release)
    thread.start()
    assert study.work() == dict.fromkeys(RUNS, "finished")
    thread.join()
    assert study.fake.started() == [*RUNS[1:], RUNS[0]]
    assert f"bf16-seed0: in use by process {holder.pid}" in study.text.getvalue()


def test_a_run_that_was_taken_in_between_is_no_failure(stage, monkeypatch):
    monkeypatch.setattr("experiments.comparing.queue._LOOK_AGAIN", 0.05)
    study = stage(jobs=2)
    holders, popen = [], subprocess.Popen

    def popen_late(*arguments, **settings):
        monkeypatch.setattr(subprocess, "Popen", popen)
        holders.append(hold(study.runs[0].path, 2))
        return popen(*arguments, **settings)

    monkeypatch.setattr(subprocess, "Popen", popen_late)
    assert study.work() == dict.fromkeys(RUNS, "finished")
    assert study.outcomes().count(("bf16-seed0", "interrupted")) == 1
    assert ("bf16-seed0", "failed") not in study.outcomes()
    holders[0].wait()


def test_a_full_disk_stops_the_study_with_a_sentence(stage):
    study = stage({"bf16-seed0": ["hang"], "fp8-seed0": ["slow"]}, jobs=2)
    (study.out / "attempts.jsonl").mkdir()

    def end():
        wait_for(lambda: ondisk.position(study.runs[0].path)[0] == 1)
        study.fake.go()

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(RunError, match=r"attempts.jsonl cannot be written \(is a directory\); make room"):
        study.work()
    thread.join()
    # The run beside it was told to save.
    assert "SIGTERM: saved" in (study.out / "logs" / "bf16-seed0.log").read_text()


def test_half_a_line_is_cut_off(tmp_path):
    path = tmp_path / "attempts.jsonl"
    path.write_text('{"run": 1}\n{"run"')
    ondisk.append(path, {"run": 2})
    ondisk.append(path, {"run": 3})
    assert [line["run"] for line in lines(path)] == [1, 2, 3]


def test_a_directory_is_claimed_once(tmp_path):
    with ondisk.claimed(tmp_path / "new"):
        with (
            pytest.raises(RunError, match=f"is in use by process {os.getpid()}; wait"),
            ondisk.claimed(tmp_path / "new"),
        ):
            pass
        assert ondisk.holder(tmp_path / "new").is_here
    assert ondisk.holder(tmp_path / "new") is None
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"), ondisk.claimed(tmp_path / "file"):
        pass


def test_looking_at_a_lock_does_not_take_it_away(tmp_path):
    (tmp_path / ".lock").touch()
    with open(tmp_path / ".lock", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert ondisk.holder(tmp_path) is None


def test_plain_lines_tell_what_happens(stage):
    study = stage({"fp8-seed0": ["fail"], "bf16-seed1": ["diverge"]})
    study.work()
    text = re.sub(r"\d:\d\d:\d\d", "T", study.text.getvalue())
    assert text.splitlines() == [
        "bf16-seed0: started",
        "bf16-seed0: finished, loss 2.0000, in T; 1 of 4 runs done, T left",
        "fp8-seed0: started",
        "fp8-seed0: failed, ./runs/fp8-seed0 has no room on the disk, in T; 1 of 4 runs done, 1 failed, T left",
        "bf16-seed1: started",
        "bf16-seed1: diverged, step 2 is not finite, in T; 2 of 4 runs done, 1 diverged, 1 failed, T left",
        "fp8-seed1: started",
        "fp8-seed1: finished, loss 2.1000, in T; 3 of 4 runs done, 1 diverged, 1 failed",
    ]


def test_a_terminal_shows_a_table_of_arms(stage, monkeypatch):
    monkeypatch.setattr("experiments.comparing.display._REFRESH", 0)
    study = stage({"fp8-seed0": ["fail"]}, terminal=True)
    study.work()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", study.text.getvalue())
    last = text.split("study: ")[-1]
    assert last.startswith("3 of 4 runs done, 1 failed")
    assert re.search(r"bf16 +2/2", last) and re.search(r"fp8 +1/2 +1", last)
    assert re.search(r"fp8 +0/2 +seed 0: 0/9", text)


def test_the_pace_is_that_of_each_arm(stage):
    bf16, fp8, *others = (Task(run, STEPS) for run in stage().runs)
    pace = Pace(jobs=1)
    assert pace.left([bf16, fp8], now=0) is None
    bf16.step, bf16.state = STEPS, "finished"
    pace.add(bf16, 9.0)
    assert pace.left([bf16], now=0) == 0
    assert pace.left([bf16, *others], now=0) == pytest.approx(18)
    # A running one tells its own pace, from where it was taken up.
    fp8.state, fp8.began, fp8.step, fp8.since = "running", 1, 3, 0.0
    assert pace.left([bf16, fp8, *others], now=8.0) == pytest.approx(6 * 4 + 9 + 9 * 4)
    assert Pace(jobs=2).left([fp8], now=8.0) == pytest.approx(6 * 4)
