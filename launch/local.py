"""Starts several processes on this machine, which find each other on loopback, each with CPU devices of its own.

    python -m launch.local --processes=2 --devices=4 -- python -m experiments.pretrain --precision=fp8

is what a run on two hosts with four accelerators each is, as far as one machine can show it. Every process runs the
command with JAX's own variables for a cluster in its environment. Its lines come out with its number in front. When one
fails, the others have --grace seconds to end by themselves before they are stopped, and the exit code is that of the
first that failed. Ctrl-C and SIGTERM are passed on.

    --processes=N   how many (default: 2)
    --devices=M     CPU devices of each (default: 1)
    --grace=S       seconds to end in, once one has failed or was told to end (default: 120)
    --dry_run       print what would run, and stop
"""

import contextlib
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from absl import app, flags

from launch import commands

FLAGS = flags.FLAGS
_HOST = "127.0.0.1"
_POLL_SECONDS = 0.1
_LAST_WORDS_SECONDS = 5.0
_DEVICE_COUNT = "--xla_force_host_platform_device_count"


def define_flags() -> None:
    flags.DEFINE_integer("processes", 2, "How many.", lower_bound=1)
    flags.DEFINE_integer("devices", 1, "CPU devices of each.", lower_bound=1)
    flags.DEFINE_integer("grace", 120, "Seconds to end in once one has failed.", lower_bound=0)
    flags.DEFINE_bool("dry_run", False, "Print what would run, and stop.")


def environments(processes: int, devices: int, port: int, inherited: str = "") -> list[dict[str, str]]:
    """What each process has in its environment beside what it inherits.

    Args:
      processes: how many.
      devices: of each.
      port: on which the first process listens, on loopback.
      inherited: XLA_FLAGS as they are; all but their number of devices stay.
    """
    kept = [flag for flag in inherited.split() if not flag.startswith(_DEVICE_COUNT)]
    shared = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*kept, f"{_DEVICE_COUNT}={devices}"]),
        "JAX_COORDINATOR_ADDRESS": f"{_HOST}:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"{_HOST}:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "PYTHONUNBUFFERED": "1",
    }
    return [shared | {"JAX_PROCESS_ID": str(index)} for index in range(processes)]


def run(command: Sequence[str], environments: Sequence[Mapping[str, str]], grace: float) -> int:
    """Runs a command once in each environment, and waits for all.

    SIGINT and SIGTERM are passed on; a second one ends all processes at once.

    Returns:
      0, or the exit code of the first process that failed; of one that a signal ended, or that had to be killed, 128
      and the signal's number.

    Raises:
      OSError: the command cannot be run.
    """
    lock = threading.Lock()
    started: list[subprocess.Popen[bytes]] = []
    readers: list[threading.Thread] = []
    caught: list[signal.Signals] = []
    former = {
        number: signal.signal(number, lambda number, _: caught.append(signal.Signals(number)))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    failed, passed_on, deadline = 0, 0, math.inf
    try:
        for index, environment in enumerate(environments):
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what a terminal sends comes once, from here
            )
            started.append(process)
            assert process.stdout is not None
            readers.append(threading.Thread(target=_relay, args=(index, process.stdout, lock), daemon=True))
            readers[-1].start()
        while True:
            codes = [process.poll() for process in started]
            failed = failed or next((code for code in codes if code), 0)
            if None not in codes:
                break
            if len(caught) > passed_on:
                passed_on = len(caught)
                _signal(started, caught[0])
            if failed or caught:
                deadline = min(deadline, time.monotonic() + grace)
            if len(caught) > 1 or time.monotonic() > deadline:
                failed = failed or -signal.SIGKILL
                break
            time.sleep(_POLL_SECONDS)
        return failed if failed >= 0 else 128 - failed
    finally:
        _signal(started, signal.SIGKILL)
        for process in started:
            process.wait()
        for reader in readers:
            reader.join(_LAST_WORDS_SECONDS)
        for number, handler in former.items():
            signal.signal(number, handler)


def _signal(processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        # What it has started may outlive it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def _relay(index: int, lines: BinaryIO, lock: threading.Lock) -> None:
    for line in lines:
        with lock:
            sys.stdout.buffer.write(f"[{index}] ".encode() + line.rstrip(b"\n") + b"\n")
            sys.stdout.buffer.flush()


def free_port() -> int:
    """A port on loopback that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        return listener.getsockname()[1]


def main(argv: list[str]) -> int:
    """Runs what stands behind '--'; returns the exit code."""
    command = argv[1:]
    if not command:
        print("local: no command is given: write it after --, as in -- python -m experiments.pretrain", file=sys.stderr)
        return 2
    if "=" in command[0]:
        # env, which the dry run shows, would take it for a variable.
        print(f"local: {command[0]} is no program: write env before it, or a program after --", file=sys.stderr)
        return 2
    own = environments(FLAGS.processes, FLAGS.devices, free_port(), os.environ.get("XLA_FLAGS", ""))
    if FLAGS.dry_run:
        for environment in own:
            print(shlex.join(["env", *(f"{name}={value}" for name, value in environment.items()), *command]))
        return 0
    try:
        return run(command, own, FLAGS.grace)
    except OSError as error:
        print(f"local: {command[0]} cannot be run ({error.strerror}): give a program after --", file=sys.stderr)
        return 127


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=commands.parse)
