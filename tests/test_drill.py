"""The fault drill: that it sees a loss where there is one, and the drill itself in small."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import drill
from experiments.drills import judging, storage
from experiments.drills.lab import SHARD_TOKENS, VOCAB, Lab
from experiments.drills.outcomes import Outcome, table
from experiments.drills.sessions import Session, seconds_lost
from experiments.runs import Checkpoints, MetricsWriter
from experiments.runs.files import write_json

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A finished run of five steps."""
    run = tmp_path_factory.mktemp("reference") / "run"
    run.mkdir()
    with MetricsWriter(run, None) as metrics:
        for step in range(1, 6):
            metrics.write(step, {"loss": np.float32(1 / step), "tokens_per_second": 100.0 * step})
    state = {
        "params": {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "empty": jnp.zeros((0, 3))},
        "dots": {"scale": jnp.ones((), jnp.bfloat16), "codes": jnp.ones(4, jnp.float8_e4m3fn)},
    }
    save(run, state)
    write_json(run / "summary.json", {"eval_loss": 0.25, "tokens_per_second": 300.0})
    return run


def save(run, state):
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(5, state)
        checkpoints.wait()


@pytest.fixture
def run(reference, tmp_path):
    """One that ended alike."""
    return shutil.copytree(reference, tmp_path / "run")


def test_a_run_that_ended_alike_at_another_speed_has_lost_nothing(reference, run):
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"tokens_per_second": 200.0', '"tokens_per_second": 7.0'))
    write_json(run / "summary.json", {"eval_loss": 0.25, "tokens_per_second": 7.0})
    assert judging.losses(reference, run) == []


def edit(name, change):
    def spoil(run):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(change(lines)))

    return spoil


def other_bit(run):
    _, leaves = judging.last_state(run)
    leaves["params.w"].view(np.uint32)[1, 2] ^= 1
    save(run, leaves)


def fewer_leaves(run):
    _, leaves = judging.last_state(run)
    save(run, {name: leaf for name, leaf in leaves.items() if name != "dots.scale"})


def flipped(run):
    storage.flip(max((run / "checkpoints/5/state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (edit("metrics.jsonl", lambda lines: lines[:2] + lines[3:]), "the line of step 3 is {'step': 4"),
        (edit("metrics.jsonl", lambda lines: lines[:-1]), "step 5 is missing"),
        (edit("metrics.jsonl", lambda lines: [*lines, '{"step": 6}\n']), "step 6 is one too many"),
        (edit("metrics.jsonl", lambda lines: [line.replace("0.25", "0.25000003") for line in lines]), "line of step 4"),
        (edit("metrics.jsonl", lambda lines: [line.replace("100.0", "-3.0") for line in lines]), "step 1 took -3.0"),
        (edit("metrics.jsonl", lambda lines: ["{\n"]), "line 1 of .*metrics.jsonl is damaged"),
        (edit("summary.json", lambda lines: [line.replace("0.25", "0.26") for line in lines]), "summary is .*0.26"),
        (lambda run: (run / "summary.json").unlink(), "summary.json cannot be read"),
        (other_bit, "^params.w of checkpoint 5 differ"),
        (fewer_leaves, "^dots.scale of checkpoint 5 differ"),
        (flipped, "no checkpoint .* is good .*SHA-256"),
        (lambda run: (run / "checkpoints/5").rename(run / "checkpoints/4"), "is of step 4 and was of 5"),
        (lambda run: shutil.rmtree(run / "checkpoints/5"), "has no checkpoint"),
    ],
)
def test_whatever_is_lost_is_seen(reference, run, spoil, says):
    spoil(run)
    (problem,) = judging.losses(reference, run)
    assert re.search(says, problem), problem


def python(code):
    return Session([sys.executable, "-c", code], {}, ROOT)


def test_how_a_start_ended_is_judged_by_its_code_and_its_words():
    session = python("print('pretrain: shard 7 is gone'); raise SystemExit(1)").wait()
    assert judging.answer(session, 1, "pretrain: ", "shard 7") == []
    assert session.said("shard 7") == "pretrain: shard 7 is gone"
    (problem,) = judging.answer(session, 0)
    assert problem == "it ended with exit code 1 where 0 was due, and said last: pretrain: shard 7 is gone"
    assert judging.answer(session, 1, "shard 8") == ["it did not say 'shard 8'"]
    assert "it ended in a traceback" in judging.answer(python("1 / 0").wait(), 1)


def test_what_a_start_did_is_seen_while_it_runs_and_a_kill_ends_it():
    session = python(
        "import time\n"
        "for number in '', '[0] ', '[1] ': print(f'{number}step {len(number) + 1}/9  loss 1', flush=True)\n"
        "time.sleep(60)"
    )
    assert session.until(lambda: len(session.steps) == 3)
    assert [step for _, step in session.steps] == [1, 5, 5]
    assert session.kill().code == -9 and session.seconds < 50
    assert not python("").until(lambda: False)


class Told:
    """A session of which all is known."""

    def __init__(self, started, ended, steps):
        self.started, self.ended, self.steps = started, ended, steps

    @property
    def reached(self):
        return self.steps[-1][1] if self.steps else 0


def test_what_is_lost_is_the_time_until_a_run_is_further_than_it_was():
    sessions = [
        Told(0, 10, [(8, 1), (9, 2)]),
        Told(20, 26, []),  # killed while it started
        Told(30, 40, [(33, 1), (34, 2), (35, 3), (36, 4)]),
        Told(50, 61, [(57, 4)]),  # already at its end
    ]
    assert seconds_lost(sessions) == [6, 5, 11]


def test_the_table_says_what_was_lost():
    outcomes = [
        Outcome("kill -9", 3, "going on", [], [1.0, 2.0, 9.0]),
        Outcome("clock", 1, "", ["step 3 is missing", "a|b"], ()),
    ]
    assert table(outcomes).splitlines()[2:] == [
        "| kill -9 | 3 | going on | yes | 2.0 (9.0) |",
        "| clock | 1 | nothing | no: step 3 is missing; a¦b | 0 |",
    ]


def test_the_document_shows_the_whole_drill_and_nothing_was_lost():
    stored = json.loads((ROOT / "results" / "drill" / "drill.json").read_text())
    outcomes = [Outcome(**fault) for fault in stored["faults"]]
    assert len(outcomes) == len(drill.FAULTS) and outcomes[0].times == 50
    assert not any(outcome.problems for outcome in outcomes)
    assert table(outcomes) in (ROOT / "results" / "README.md").read_text()


def test_the_drill_has_data_that_pretrain_reads(tmp_path):
    from experiments import data

    lab = Lab(tmp_path, 0, print)
    found = data.load(f"shards:{tmp_path / 'shards'},vocab={VOCAB}", "auto", tmp_path)
    assert len(found.train) == sum(SHARD_TOKENS["train"]) and len(found.validation) == sum(SHARD_TOKENS["val"])
    assert [Path(part.path) for part in found.train.parts] == lab.shards["train"]


def program(*arguments, timeout=60):
    command = [sys.executable, "-m", "experiments.drill", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def test_what_cannot_be_drilled_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"--faults 'kil' \(did you mean 'kill'\?\)"):
        drill.named(["clock", "kil"])
    assert drill.named(["clock", "kill"]) == ["kill", "clock"] and drill.named(["all"]) == list(drill.FAULTS)
    (tmp_path / "thesis.tex").write_text("x")
    done = program(f"--out={tmp_path}")
    assert (done.returncode, done.stderr) == (1, f"drill: --out={tmp_path} is there already; give a new directory\n")


@pytest.mark.slow
def test_nothing_is_lost_to_any_fault(tmp_path):
    done = program(f"--out={tmp_path / 'drill'}", "--kills=4", timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "drill/drill.json").read_text())
    assert len(report["faults"]) == len(drill.FAULTS)
    kills = report["faults"][0]
    assert kills["times"] == len(kills["seconds"]) == len(kills["details"]) == 4
    assert any(death["in_a_save"] for death in kills["details"])
    for fault in report["faults"]:
        assert fault["said"] and not fault["problems"], fault
    assert str(tmp_path) not in json.dumps(report["faults"])
