"""The run directory: one configuration, one process, nothing overwritten."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.runs import RunDir, RunError, files, load_config
from experiments.runs.files import plain, strict_json, write_atomic

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "precision": "fp8",
    "steps": 300,
    "learning_rate": 3e-3,
    "tokenizer": None,
    "mesh": {"data": 4, "model": 2},
    "betas": (0.9, 0.95),
}


def snapshot(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.name != ".lock"}


def refused(path, config=CONFIG, **options):
    """The sentence with which `RunDir.open` refuses, having changed nothing."""
    before = snapshot(path) if Path(path).is_dir() else None
    with pytest.raises(RunError) as info:
        RunDir.open(path, config, **options)
    assert before is None or snapshot(path) == before
    sentence = str(info.value)
    assert "\n" not in sentence
    assert str(path) in sentence
    return sentence


def test_a_new_run_writes_its_config_and_the_same_config_reopens_it(tmp_path):
    path = tmp_path / "deep" / "run"
    with RunDir.open(path, CONFIG) as run:
        assert not run.resumed
        assert run.path == path
        assert run.place == str(path)
        assert run.checkpoints == str(path / "checkpoints")
        stored = json.loads((path / "config.json").read_text())
        assert stored == {**CONFIG, "betas": [0.9, 0.95]} == run.config
        assert list(stored) == sorted(stored)
        assert load_config(path / "config.json") == stored
    written = snapshot(path)
    with RunDir.open(path, stored) as run:  # also the config that --config would give
        assert run.resumed
    with RunDir.open(str(path), dict(reversed(CONFIG.items()))) as run:
        assert run.resumed
    assert snapshot(path) == written


def test_another_configuration_is_refused_with_the_flags_that_differ(tmp_path):
    RunDir.open(tmp_path, CONFIG).close()
    other = {**CONFIG, "precision": "bf16", "mesh": {"data": 8, "model": 2}, "remat": True}
    del other["tokenizer"]
    sentence = refused(tmp_path, other)
    assert "--precision=fp8 (here bf16)" in sentence
    assert "--mesh.data=4 (here 8)" in sentence
    assert "--remat=unset (here true)" in sentence
    assert "mesh.model" not in sentence
    assert "steps" not in sentence
    assert sentence.endswith("; use another --workdir or repeat the flags")
    many = {f"flag{i}": i for i in range(20)}
    assert "and 21 more that differ" in refused(tmp_path, many)


def test_flags_that_do_not_define_the_run_may_change(tmp_path):
    RunDir.open(tmp_path, CONFIG).close()
    longer = {**CONFIG, "steps": 600}
    assert "--steps=300 (here 600)" in refused(tmp_path, longer)
    refused(tmp_path, {**longer, "precision": "int8"}, may_change={"steps"})
    with RunDir.open(tmp_path, longer, may_change={"steps"}) as run:
        assert run.resumed
        assert run.changed == {"steps": ("300", "600")}
        assert load_config(tmp_path / "config.json")["steps"] == 600
        run.write_summary({})
    with RunDir.open(tmp_path, CONFIG, may_change={"steps"}) as run:
        assert run.config["steps"] == 600 and not run.changed
    assert load_config(tmp_path / "config.json")["steps"] == 600


def test_a_disk_that_is_full_is_told_in_a_sentence(tmp_path, monkeypatch):
    with RunDir.open(tmp_path, CONFIG) as run:

        def full(path, value, **options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files, "write_json", full)
        for name, write in (
            ("env.json", lambda: run.record_session({})),
            ("summary.json", lambda: run.write_summary({})),
            ("diverged.json", lambda: run.write_divergence(1, "")),
        ):
            with pytest.raises(RunError, match=rf"{name} cannot be written \(no space left on device\); make room in"):
                write()


def test_data_that_are_others_are_named(tmp_path):
    digests = {"web_train_1.bin": "aa", "web_train_2.bin": "bb", "web_val_1.bin": "cc"}
    RunDir.open(tmp_path, {**CONFIG, "data_sha256": digests}).close()
    others = {"web_train_1.bin": "ab", "web_val_1.bin": "cc", "web_val_2.bin": "dd"}
    sentence = refused(tmp_path, {**CONFIG, "data_sha256": others})
    assert "(web_train_1.bin has changed, web_train_2.bin is gone, web_val_2.bin is new); restore the data" in sentence
    many = {f"web_train_{number}.bin": "ab" for number in range(3, 9)}
    assert "and 4 more); restore the data" in refused(tmp_path, {**CONFIG, "data_sha256": many})
    # A flag that says other data says why.
    assert "--steps=300 (here 5)" in refused(tmp_path, {**CONFIG, "steps": 5, "data_sha256": others})


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    assert "belongs to something else" in refused(tmp_path)
    assert "is a file" in refused(tmp_path / "thesis.tex")
    assert "cannot be used (not a directory)" in refused(tmp_path / "thesis.tex" / "run")
    assert "of object storage only gs://BUCKET/FOLDER is known" in refused("s3://bucket/run")
    assert not Path("s3:").exists()


def test_a_start_that_was_killed_before_it_wrote_its_config_can_be_repeated(tmp_path):
    (tmp_path / ".lock").write_text("1")
    (tmp_path / ".config.json.tmp").write_text('{"prec')
    with RunDir.open(tmp_path, CONFIG) as run:
        assert not run.resumed


def test_a_damaged_config_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"prec')
    assert "is not JSON" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "does not hold flags" in refused(tmp_path)
    RunDir.open(tmp_path / "run", CONFIG).close()


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path):
    code = (
        "import sys; from experiments.runs.rundir import *\n"
        "try: run = RunDir.open(sys.argv[1], {})\n"
        "except RunError as error: print(error, flush=True)\n"
        "else: print('open', flush=True)\n"
        "sys.stdin.read()"
    )
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "run")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        return process

    first, rival = start(), None
    try:
        assert first.stdout.readline() == "open\n"
        in_use = f"--workdir={tmp_path / 'run'} is in use by process {first.pid}; "
        assert in_use in refused(tmp_path / "run", {})
        rival = start()
        assert rival.stdout.readline().startswith(in_use)
        first.kill()  # no clean-up runs
        first.wait()
        with RunDir.open(tmp_path / "run", {}) as run:
            assert run.resumed
            assert "in use" in refused(tmp_path / "run", {})
        RunDir.open(tmp_path / "run", {}).close()
    finally:
        for process in started:
            process.kill()
            process.communicate()


def everything(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in Path(directory).rglob("*")}


@pytest.mark.parametrize("locked_before", [True, False])
def test_who_looks_leaves_no_trace_and_keeps_writers_away(tmp_path, locked_before):
    path = tmp_path / "run"
    with RunDir.open(path, CONFIG), pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        RunDir.look(path, CONFIG)
    if not locked_before:  # as in an archive
        (path / ".lock").unlink()
    before = everything(path)
    with RunDir.look(path, CONFIG) as run, RunDir.look(path, CONFIG):
        assert run.config["precision"] == "fp8" and run.checkpoints == f"{path}/checkpoints"
        run.record_session({})
        run.write_summary({})
        run.write_divergence(1, "")
        if locked_before:
            assert "in use" in refused(path)
    assert everything(path) == before
    with pytest.raises(RunError, match="--steps=300 \\(here 301\\)"):
        RunDir.look(path, {**CONFIG, "steps": 301})
    with pytest.raises(RunError, match="cannot be read"):
        RunDir.look(tmp_path / "absent", CONFIG)
    assert everything(path) == before
    RunDir.open(path, CONFIG).close()


def test_only_the_primary_process_writes(tmp_path):
    with RunDir.open(tmp_path / "run", CONFIG, primary=False) as run:
        run.record_session({})
        run.write_summary({})
    assert not (tmp_path / "run").exists()


def test_sessions_are_appended_and_the_summary_is_strict_json(tmp_path):
    with RunDir.open(tmp_path, CONFIG) as run:
        run.record_session({"start": 1})
        run.record_session({"start": 2})
        run.write_summary({"train_loss": np.float32(0.1), "eval_loss": float("inf"), "mfu": None})
    assert json.loads((tmp_path / "env.json").read_text()) == {"sessions": [{"start": 1}, {"start": 2}]}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"train_loss": float(np.float32(0.1)), "eval_loss": None, "mfu": None}
    assert list(summary) == ["train_loss", "eval_loss", "mfu"]
    assert not list(tmp_path.glob("*.tmp"))


def test_load_config_names_the_flag(tmp_path):
    (tmp_path / "notes").write_text("hello")
    (tmp_path / "list").write_text("[]")
    for path, reason in (
        (tmp_path, f"is a directory; give --config={tmp_path}/config.json"),
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "notes", "is not JSON"),
        (tmp_path / "list", "does not hold flags"),
    ):
        with pytest.raises(RunError) as info:
            load_config(path)
        assert str(info.value).startswith(f"--config={path}")
        assert reason in str(info.value)


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, [b"old"])

    def chunks():
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomic(path, chunks())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_plain_values_keep_their_exact_value():
    third = np.float32(1) / np.float32(3)
    assert json.loads(strict_json({"x": third}))["x"] == float(third)
    assert np.float32(json.loads(strict_json(third))) == third
    assert plain(np.int64(2**40)) == 2**40
    assert plain(np.bool_(True)) is True
    assert plain((1, [None, np.inf, -np.inf, np.nan])) == [1, [None, None, None, None]]
    with pytest.raises(TypeError, match=r"only scalars"):
        plain({"loss": np.zeros(3)})
    with pytest.raises(TypeError, match=r"value.a\[1\] is a set"):
        plain({"a": [0, {1}]})
