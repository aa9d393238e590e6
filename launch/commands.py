"""Commands as lists of words, never as shell text: shown as they are run, and run as they are shown."""

import dataclasses
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags


@dataclasses.dataclass(frozen=True)
class Command:
    """A program to run.

    Attributes:
      argv: the program and its arguments.
      stdin: what it reads, None if nothing.
    """

    argv: tuple[str, ...]
    stdin: str | None = None

    def __str__(self) -> str:
        """For a shell: the command, and what it reads as a here-document."""
        line = shlex.join(self.argv)
        return line if self.stdin is None else f"{line} <<'END'\n{self.stdin.rstrip()}\nEND"


class LaunchError(Exception):
    """A command that cannot be built or did not succeed; the text is one sentence that names the fix."""


def read(file: str) -> list[list[str]]:
    """The commands in a file, a line each.

    Raises:
      LaunchError: it cannot be read, a line is not a command, or there is none.
    """
    try:
        lines = [line for line in Path(file).read_text().splitlines() if line.strip()]
        found = [shlex.split(line) for line in lines]
    except OSError as error:
        raise LaunchError(f"--array={file} cannot be read ({error.strerror}): give a file of commands") from error
    except ValueError as error:
        raise LaunchError(f"--array={file} holds a line that is no command ({error}): mend it") from error
    if not found:
        raise LaunchError(f"--array={file} holds no command: fill it with compare --print_commands")
    return found


def run(command: Command) -> None:
    """Runs a command to its end.

    Raises:
      LaunchError: the program is not there, or returns something else than 0.
    """
    done = _ran(command, None)
    if done.returncode:
        raise LaunchError(f"{shlex.join(command.argv)} returned {done.returncode}, and says why above")


def ask(command: Command) -> subprocess.CompletedProcess[str]:
    """Runs a command whose failure is an answer too, and shows nothing of what it prints.

    Raises:
      LaunchError: the program is not there.
    """
    return _ran(command, subprocess.PIPE)


def _ran(command: Command, output: int | None) -> subprocess.CompletedProcess[str]:
    reads = {"stdin": subprocess.DEVNULL} if command.stdin is None else {"input": command.stdin}
    try:
        return subprocess.run(command.argv, stdout=output, stderr=output, text=True, **reads)
    except OSError as error:
        raise LaunchError(
            f"{command.argv[0]} cannot be run ({error.strerror}): install it, or look with --dry_run at what would run"
        ) from error


def carry_out(commands: list[Command], *, dry_run: bool) -> int:
    """Prints the commands, or runs one after the other up to the first that fails; returns the exit code."""
    for command in commands:
        if dry_run:
            print(command)
            continue
        try:
            run(command)
        except LaunchError as error:
            return refuse(error)
    return 0


def check_options(flag: str, given: Sequence[str]) -> None:
    """Looks at what a flag hands on to another program.

    Raises:
      LaunchError: one is no option, which that program would take for something else.
    """
    for option in given:
        if not re.match(r"--?\w", option):
            raise LaunchError(f"--{flag}={option} is no option: write it with its hyphens, as in --{flag}=--NAME=VALUE")


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; ends the program with a sentence where one does not parse. Returns what is left."""
    try:
        left = flags.FLAGS(argv)
        if flags.FLAGS.dry_run:
            # What it prints may go to `head`. Without --dry_run a pipe that breaks must not leave VMs behind.
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        return left
    except flags.Error as error:
        sentence = re.sub(r"\. Did you mean: (.+) \?$", r" (did you mean --\1?)", str(error)).rstrip(".")
        refuse(LaunchError(f"{sentence}: --help lists the flags"))
        sys.exit(2)


def refuse(error: Exception) -> int:
    """Prints why a program does not go on; returns its exit code."""
    print(f"launch: {error}", file=sys.stderr)
    return 1
