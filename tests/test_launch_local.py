"""Several processes on one machine."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from launch import local

PROGRAM = [sys.executable, "-m", "launch.local"]


def start(*arguments, **options):
    own = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
    return subprocess.Popen([*PROGRAM, *arguments], **own)


def run(*arguments):
    process = start(*arguments)
    shown, _ = process.communicate(timeout=60)
    return process.returncode, shown


def python(code, *arguments):
    return ("--", sys.executable, "-c", code, *arguments)


def test_each_process_learns_its_number_and_where_the_first_one_is(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=9  --xla_dump_to=x")
    code = "import os, sys; print(sys.argv[1:], *(os.environ[n] for n in ('JAX_PROCESS_ID', 'JAX_NUM_PROCESSES',"
    code += " 'JAX_COORDINATOR_ADDRESS', 'XLA_FLAGS', 'JAX_PLATFORMS')), sep='|')"
    words = ["a b", "c;d", "$HOME", "it's", '"', "--devices=9"]
    returned, shown = run("--processes=3", "--devices=4", *python(code, *words))
    assert returned == 0
    lines = sorted(line.split("|") for line in shown.splitlines())
    assert [line[0] for line in lines] == [f"[{index}] {words}" for index in range(3)]
    assert [line[1] for line in lines] == ["0", "1", "2"]
    (address,) = {line[3] for line in lines}
    assert address.startswith("127.0.0.1:")
    flags = "--xla_dump_to=x --xla_force_host_platform_device_count=4"
    assert {tuple(line[2:3] + line[4:]) for line in lines} == {("3", flags, "cpu")}


def test_a_dry_run_prints_what_would_run(monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    code = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    arguments = ("--processes=2", "--devices=3", *python(code, "a b; c", "A=B", "it's"))
    returned, shown = run("--dry_run", *arguments)
    assert returned == 0 and shown.count("\n") == 2
    printed = [json.loads(subprocess.check_output(line, shell=True)) for line in shown.splitlines()]
    started = [json.loads(line[4:]) for line in sorted(run(*arguments)[1].splitlines())]
    for (words, environment), (others, other) in zip(printed, started, strict=True):
        assert words == others == ["a b; c", "A=B", "it's"]
        differing = {name for name in environment | other if environment.get(name) != other.get(name)}
        # The port is free when it is looked for; the rest is the shell's.
        assert differing <= {"JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS", "_", "SHLVL", "PWD", "OLDPWD"}


def test_one_failure_ends_all():
    code = "import os, sys, time; sys.exit(7) if os.environ['JAX_PROCESS_ID'] == '1' else time.sleep(50)"
    started = time.monotonic()
    assert run("--processes=3", "--grace=1", *python(code))[0] == 7
    assert time.monotonic() - started < 30


def test_a_signal_that_ends_a_process_is_in_the_exit_code():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGABRT)"
    assert run("--processes=1", *python(code))[0] == 128 + signal.SIGABRT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_the_processes_end_as_they_like(number):
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(int(sys.argv[1]), lambda *_: sys.exit(print('saved') or 0))\n"
        "print('ready', flush=True)\n"
        "time.sleep(50)"
    )
    process = start("--processes=2", *python(code, str(int(number))))
    ready = [process.stdout.readline() for _ in range(2)]
    os.kill(process.pid, number)
    shown, _ = process.communicate(timeout=30)
    assert sorted(ready) == ["[0] ready\n", "[1] ready\n"] and sorted(shown.splitlines()) == ["[0] saved", "[1] saved"]
    assert process.returncode == 0


def test_who_does_not_end_is_killed_and_that_is_no_success():
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(50)"
    )
    process = start("--processes=2", "--grace=1", *python(code))
    for _ in range(2):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "local: no command is given: write it after --"),
        (("--", "A=B", "a b;c"), 2, "local: A=B is no program: write env before it"),
        (("--dry_run", "--", "A=B", "a b;c"), 2, "local: A=B is no program: write env before it"),
        (("--", "/does/not/exist"), 127, "local: /does/not/exist cannot be run (No such file or directory)"),
        (("--processes=0", "--", "true"), 2, "--processes=0: 0 is not a positive integer: --help lists the flags"),
        (("--proceses=2", "--", "true"), 2, "flag 'proceses' (did you mean --processes?): --help lists the flags"),
    ],
)
def test_what_cannot_run_is_refused(arguments, code, sentence):
    returned, shown = run(*arguments)
    assert returned == code and sentence in shown and shown.count("\n") == 1


def test_environments_differ_in_the_number_alone():
    first, second = local.environments(2, 1, 1234)
    assert {name for name in first if first[name] != second[name]} == {"JAX_PROCESS_ID"}
