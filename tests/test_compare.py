"""The program experiments.compare, mostly with a program in place of pretrain."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from compare_cases import ROOT, SMALL, STEPS, fake_pretrain, flags_of_the_program, lines, read, run  # noqa: F401
from micro import QUICK_COMPILES

from experiments.comparing.archive import archive
from experiments.runs import RunError
from experiments.training.precision import resolve


def test_a_study_is_run_evaluated_and_shown(fake, tmp_path, capsys):
    out = tmp_path / "study"
    assert run("--seeds=3", f"--out={out}") == 0
    arms = ["fp32", "bf16", "fp8", "int8", "fp8-unscaled", "int8-tensor", "bf16-perturbed"]
    assert fake.started() == [f"{arm}-seed{seed}" for seed in range(3) for arm in arms]
    comparison = read(out / "comparison.json")
    assert list(comparison["precisions"]) == arms
    assert comparison["precisions"]["fp8"]["seeds"] == 3
    assert comparison["precisions"]["fp8"]["delta_nats"] == pytest.approx(1e-4)
    assert comparison["missing"] == []
    text = capsys.readouterr().out
    assert "bf16-perturbed-seed2: finished, loss 2.2000" in text
    assert re.search(r"^int8-tensor .*worse", text, re.MULTILINE)
    # The same command has nothing left to do.
    assert run("--seeds=3", f"--out={out}") == 0
    assert len(fake.started()) == 21 and "fp8-unscaled" in capsys.readouterr().out
    assert read(out / "comparison.json") == comparison


def test_seeds_and_precisions_are_added_to_a_study(fake, tmp_path):
    out = tmp_path / "study"
    assert run(*SMALL, "--seeds=2", f"--out={out}") == 0
    assert run("--precisions=int8", "--controls=", "--nonoise", "--seeds=1:3", f"--out={out}", "--log_every=3") == 0
    assert fake.started()[4:] == ["int8-seed1", "bf16-seed2", "int8-seed2"]
    record = read(out / "study.json")
    assert record["seeds"] == [0, 1, 2] and [arm["name"] for arm in record["arms"]] == ["bf16", "fp8", "int8"]
    assert read(out / "comparison.json")["precisions"]["int8"]["seeds"] == 2
    assert run(*SMALL, "--seeds=2", f"--out={out}", "--lr=1") == 1


def test_failures_are_named_at_the_end(fake, tmp_path, capsys):
    fake.change(behaviours={"fp8-seed0": ["fail"], "bf16-seed1": ["diverge"]})
    out = tmp_path / "study"
    assert run(*SMALL, "--seeds=2", f"--out={out}") == 1
    error = capsys.readouterr().err
    assert error == (
        "compare: 1 of the runs failed: fp8-seed0 (./runs/fp8-seed0 has no room on the disk). "
        f"{out}/logs has what they said; the same command tries them again.\n"
    )
    assert read(out / "comparison.json")["precisions"]["bf16"]["diverged"] == 1
    assert run(*SMALL, "--seeds=2", f"--out={out}") == 0
    assert fake.started()[4:] == ["fp8-seed0"]
    assert [line["outcome"] for line in lines(out / "attempts.jsonl")] == [
        "finished",
        "failed",
        "diverged",
        "finished",
        "finished",
    ]


def test_without_a_baseline_nothing_is_compared(fake, tmp_path, capsys):
    fake.change(behaviours={"bf16-seed0": ["fail"]})
    assert run(*SMALL, "--seeds=1", f"--out={tmp_path / 'study'}") == 1
    assert "Nothing is compared: no run of bf16, the baseline" in capsys.readouterr().out


def test_the_printed_commands_are_what_the_queue_runs(fake, tmp_path, capsys):
    arguments = (
        "--precisions=fp8,fp32",
        "--precisions=.*->int8",
        "--controls=",
        "--seeds=1",
        f"--out={tmp_path / 'a study'}",
    )
    assert run(*arguments, "--print_commands") == 0
    commands = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "a study").exists()
    assert len(commands) == 5 and sum("'--precision=.*->int8'" in command for command in commands) == 1
    fake.change(policies={**fake.policies, ".*->int8": str(resolve(".*->int8").policy)})
    for command in commands:
        assert shlex.split(command)[0] == sys.executable or not os.path.isabs(shlex.split(command)[0])
        subprocess.run(command, shell=True, check=True, cwd=os.getcwd())
    started = fake.started()
    assert run(*arguments) == 0
    assert fake.started() == started
    assert read(tmp_path / "a study" / "comparison.json")["precisions"]["fp8"]["seeds"] == 1


def test_halving_lets_the_best_go_on(fake, tmp_path, capsys):
    losses = {f"fp8/margin={margin}": 2 + margin for margin in range(4)}
    policies = {name: str(resolve(name).policy) for name in losses}
    fake.change(losses=losses, policies={**fake.policies, **policies})
    arguments = (*SMALL, "--grid=margin=0,1,2,3", "--halving=2", "--seeds=2", f"--out={tmp_path / 'study'}")
    assert run(*arguments, "--print_commands") == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 10 and all(command.endswith(" --stop_after=2") for command in commands)
    assert run(*arguments) == 0
    starts = [(start[0], int(start[1])) for start in fake.starts()]
    for goal, margins in ((2, range(4)), (4, range(2)), (STEPS, range(1))):
        arms = ["bf16", *(f"fp8_margin={margin}" for margin in margins)]
        assert [run for run, to in starts if to == goal] == [f"{arm}-seed{seed}" for seed in range(2) for arm in arms]
    assert len(starts) == 10 + 6 + 4
    assert run(*arguments) == 0 and len(fake.starts()) == 20
    assert run(*arguments, "--print_commands") == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if "--workdir" in line]) == 4


def test_a_changed_recipe_needs_fresh_seeds(fake, tmp_path, capsys):
    out = tmp_path / "study"
    fake.change(policies={**fake.policies, "fp8": ".*->an earlier recipe"})
    assert run(*SMALL, "--seeds=2", f"--out={out}") == 0
    before = len(fake.starts())
    capsys.readouterr()
    fake.change(policies=fake.policies)
    for more in ((), ("--print_commands",)):
        assert run(*SMALL, "--seeds=3", f"--out={out}", *more) == 1
        error = capsys.readouterr().err
        assert error.startswith("compare: fp8 was judged with another recipe on seeds 0, 1") and "--seeds=2:5" in error
    assert len(fake.starts()) == before
    assert run(*SMALL, "--seeds=2:5", f"--out={out}") == 0
    assert read(out / "comparison.json")["precisions"]["fp8"]["seeds"] == 3


def test_what_was_run_otherwise_is_not_taken_for_finished(fake, tmp_path, capsys):
    out = tmp_path / "study"
    assert run(*SMALL, "--seeds=1", f"--out={out}") == 0
    (out / "record.jsonl").unlink()
    config = out / "runs" / "fp8-seed0" / "config.json"
    config.write_text(json.dumps(read(config) | {"recipes": [{"start": 0, "policy": "other"}]}))
    assert run(*SMALL, "--seeds=1", f"--out={out}") == 1
    assert re.search(
        "fp8-seed0 was run with another recipe .*: give it fresh seeds, as in --seeds=1:2", capsys.readouterr().err
    )
    config.write_text(json.dumps(read(config) | {"batch_size": 5}))
    assert run(*SMALL, "--seeds=1", f"--out={out}") == 1
    assert "fp8-seed0 was run with --batch_size=5 (here 4): give another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed=1",), "--seed is what a study decides: give --seeds instead"),
        (("--precision=fp8",), "--precision is what a study decides: give --precisions instead"),
        (("--workdir=x",), "give --out instead"),
        (("--stop_after=3",), "--stop_after has no place in a study"),
        (("--print_plan",), "--print_plan has no place"),
        (("--precisions=fp9",), "--precisions=fp9: Unknown precision 'fp9'"),
        (("--lr=1", "--decay=0.5"), "--decay has no effect"),
        (("--metric=eval_loss_average",), "--metric=eval_loss_average needs averaged parameters: give --average"),
        (("--jobs=0",), "--jobs=0 must be at least 1"),
        (("--halving=3", *SMALL), "--halving=3 has 1 candidate to choose from"),
        (("--grid=stepps=1",), "Unknown flag or recipe field in --grid or --zip 'stepps' .did you mean 'steps'"),
    ],
)
def test_everything_is_checked_before_anything_runs(fake, tmp_path, capsys, arguments, message):
    assert run(f"--out={tmp_path / 'study'}", *arguments) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "study").exists() and not fake.starts()


def test_a_flag_that_does_not_parse_ends_the_program(capsys):
    for argument, message in (("--steps=many", "--steps=many must be a whole number"), ("--step=1", "--help lists")):
        with pytest.raises(SystemExit) as exit:
            run(argument)
        assert exit.value.code == 2 and message in capsys.readouterr().err


def test_an_archive_holds_what_is_committed_and_is_the_same_each_time(fake, tmp_path, monkeypatch, capsys):
    fake.change(behaviours={"fp8-seed0": ["diverge"], "fp8-seed1": ["fail"]})
    out, target = tmp_path / "study", tmp_path / "results"
    assert run(*SMALL, "--seeds=2", f"--out={out}", f"--archive={target}", "--data=x") == 1
    files = {str(path.relative_to(target)): path for path in target.rglob("*") if path.is_file()}
    ended = {f"runs/{name}" for name in ("bf16-seed0", "bf16-seed1", "fp8-seed0")}
    assert set(files) == {
        *("study.json", "attempts.jsonl", "record.jsonl", "comparison.json", "runs/fp8-seed0/diverged.json"),
        *(f"{run}/{name}" for run in ended for name in ("config.json", "env.json", "metrics.jsonl.gz")),
        *(f"runs/bf16-seed{seed}/summary.json" for seed in range(2)),
    }
    metrics = files["runs/bf16-seed0/metrics.jsonl.gz"]
    assert gzip.decompress(metrics.read_bytes()) == (out / "runs" / "bf16-seed0" / "metrics.jsonl").read_bytes()
    assert read(files["runs/bf16-seed0/config.json"]) == read(out / "runs" / "bf16-seed0" / "config.json")
    assert "--workdir=./runs/bf16-seed0" in read(files["runs/bf16-seed0/env.json"])["sessions"][0]["argv"]
    before = {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in files.items()}
    capsys.readouterr()
    archive(out, target)
    assert {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in files.items()} == before
    # What was made while the clock was behind is copied, too.
    made = out / "runs/bf16-seed0/metrics.jsonl"
    whole = made.read_bytes()
    made.write_bytes(whole[:-1] + b" \n")
    os.utime(made, (1, 1))
    archive(out, target)
    assert gzip.decompress(metrics.read_bytes()) == made.read_bytes()
    made.write_bytes(whole)
    archive(out, target)
    archive(target, tmp_path / "copy")  # of a study that was restored from its archive
    assert {name: (tmp_path / "copy" / name).read_bytes() for name in files} == {n: b for n, (b, _) in before.items()}
    archive(out, tmp_path / "again")
    assert {name: (tmp_path / "again" / name).read_bytes() for name in files} == {n: b for n, (b, _) in before.items()}


def test_an_archive_tells_of_paths_of_this_machine(fake, tmp_path, capsys):
    out, target = tmp_path / "study", tmp_path / "results"
    assert run(*SMALL, "--seeds=1", f"--out={out}", f"--archive={target}", "--data=/srv/corpus/a.txt") == 0
    text = capsys.readouterr().out
    assert re.search(r"^0\.\d+ MB are in ", text, re.MULTILINE)
    assert "It names paths of this machine, which flags had: /srv/corpus/a.txt" in text
    assert str(out) not in "".join(path.read_text() for path in target.rglob("*.json*") if path.suffix != ".gz")
    for place, message in ((out, "is the study itself"), (tmp_path / "fake", "is not empty and holds no study.json")):
        with pytest.raises(RunError, match=message):
            archive(out, place)


REAL = (
    *("--model=tiny", "--layers=1", "--d_model=32", "--heads=2", "--d_ff=32", "--batch_size=2", "--seq_len=8"),
    *("--data=markov:order=1,vocab=16,tokens=2000", "--steps=4", "--eval_batches=1", "--checkpoint_every=2"),
)


def compare_for_real(*arguments):
    command = [sys.executable, "-m", "experiments.compare", *REAL, *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **QUICK_COMPILES}
    # However quick it was, a compiled program is kept.
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_pretrain_is_started_with_flags_that_it_takes(tmp_path):
    out = tmp_path / "study"
    done = compare_for_real(
        "--precisions=bf16", "--controls=", "--nonoise", "--seeds=1", f"--out={out}", f"--cache_dir={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"bf16-seed0: finished, loss \d\.\d{4}, in 0:00:\d\d; 1 of 1 runs done$", done.stdout, re.MULTILINE
    )
    (attempt,) = lines(out / "attempts.jsonl")
    assert attempt["outcome"] == "finished"
    assert (
        read(out / "comparison.json")["precisions"]["bf16"]["loss"]
        == read(out / "runs/bf16-seed0/summary.json")["eval_loss"]
    )


@pytest.mark.slow
def test_a_real_study_halves_shares_compiled_programs_and_counts_what_diverges(tmp_path):
    common = ("--controls=", "--nonoise", f"--cache_dir={tmp_path / 'cache'}")
    out = tmp_path / "study"
    halved = compare_for_real("--precisions=fp8,fp32", "--halving=2", "--seeds=1", "--jobs=2", f"--out={out}", *common)
    assert halved.returncode == 0, halved.stderr
    ended = {path.parent.name for path in out.glob("runs/*/summary.json")}
    assert "bf16-seed0" in ended and len(ended) == 2
    for path in out.glob("runs/*/metrics.jsonl"):
        reached = [line["step"] for line in lines(path) if "eval_loss" in line]
        assert reached == ([1, 2, 4] if path.parent.name in ended else [1])

    more = compare_for_real("--precisions=fp8", "--seeds=2", "--jobs=2", f"--out={out}", *common)
    assert more.returncode == 0, more.stderr
    assert read(out / "comparison.json")["precisions"]["fp8"]["seeds"] == 2
    # The step of the second seed is that of the first; only the initialisation is compiled anew.
    step, init = (list((tmp_path / "cache").glob(f"xla-*/jit_{name}-*-cache")) for name in ("step", "init"))
    assert len(step) == 3 and len(init) > len(step)

    wild = compare_for_real(
        "--precisions=fp8", "--seeds=1", "--lr=1e30", "--clip=1e30", f"--out={tmp_path / 'wild'}", *common
    )
    assert wild.returncode == 0, wild.stderr
    assert read(tmp_path / "wild" / "comparison.json")["precisions"]["fp8"]["diverged"] == 1
