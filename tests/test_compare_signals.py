"""The program experiments.compare stopped, killed and started twice, with a program in place of pretrain."""

import os
import signal

import pytest
from compare_cases import SMALL, fake_pretrain, flags_of_the_program, lines, read, run, wait_for  # noqa: F401

from experiments.comparing import ondisk


def wait_for_start(fake, study, name):
    wait_for(lambda: (study / "runs" / name / "metrics.jsonl").exists())
    fake.await_hanging()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_same_command_goes_on(fake, tmp_path, number):
    fake.change(behaviours={"bf16-seed0": ["hang"]})
    out = tmp_path / "study"
    process = fake.compare(*SMALL, "--seeds=1", f"--out={out}")
    wait_for_start(fake, out, "bf16-seed0")
    # While it runs nobody else may.
    assert run(*SMALL, "--seeds=1", f"--out={out}") == 1
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"{number.name}: 1 run told to save and stop" in output
    assert errors == f"compare: {number.name}: all is saved; the same command goes on\n"
    assert fake.started() == ["bf16-seed0"] and lines(out / "attempts.jsonl")[0]["outcome"] == "interrupted"
    assert run(*SMALL, "--seeds=1", f"--out={out}") == 0
    assert fake.started() == ["bf16-seed0", "bf16-seed0", "fp8-seed0"]


def test_a_second_interrupt_does_not_wait(fake, tmp_path):
    fake.change(behaviours={"bf16-seed0": ["deaf"]})
    out = tmp_path / "study"
    process = fake.compare(*SMALL, "--seeds=1", f"--out={out}")
    wait_for_start(fake, out, "bf16-seed0")
    process.send_signal(signal.SIGINT)
    for line in process.stdout:
        if "told to save" in line:
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT
    process.communicate()
    (attempt,) = lines(out / "attempts.jsonl")
    assert (attempt["outcome"], attempt["exit"]) == ("interrupted", -signal.SIGKILL)


def test_a_second_study_in_the_same_place_is_refused(fake, tmp_path, capsys):
    with ondisk.claimed(tmp_path / "study"):
        assert run(*SMALL, f"--out={tmp_path / 'study'}") == 1
    assert f"study is in use by process {os.getpid()}; wait for it to end" in capsys.readouterr().err
    assert not fake.starts()


@pytest.mark.slow
def test_killed_at_once_it_goes_on_and_no_run_is_run_twice(fake, tmp_path):
    fake.change(behaviours={"bf16-seed0": ["finish"], "fp8-seed0": ["slow"]})
    out = tmp_path / "study"
    process = fake.compare(*SMALL, "--seeds=2", f"--out={out}")
    wait_for_start(fake, out, "fp8-seed0")
    process.kill()
    process.communicate()
    # Its run lives on; the next compare waits for it and starts nothing beside it.
    second = fake.compare(*SMALL, "--seeds=2", f"--out={out}")
    orphan = fake.starts()[-1][2]
    for line in second.stdout:
        if "in use by" in line:
            assert line == f"fp8-seed0: in use by process {orphan}, looked at again later\n"
            break
    assert fake.started() == ["bf16-seed0", "fp8-seed0"]
    fake.go()
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert fake.started() == ["bf16-seed0", "fp8-seed0", "bf16-seed1", "fp8-seed1"]
    assert read(out / "comparison.json")["precisions"]["fp8"]["seeds"] == 2
