"""Runs one command of a file, the one whose turn it is in an array of Slurm or an indexed job of Kubernetes.

    python -m launch.task commands.txt

replaces itself by line number SLURM_ARRAY_TASK_ID, or JOB_COMPLETION_INDEX, of the file, counted from 0.
"""

import os
import sys

from launch import commands

_INDICES = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")


def command(file: str, environment: dict[str, str]) -> list[str]:
    """The command whose turn it is.

    Raises:
      LaunchError: the environment does not say which, or the file has it not.
    """
    found = commands.read(file)
    index = next((environment[name] for name in _INDICES if environment.get(name)), "")
    if not index.isdigit() or int(index) >= len(found):
        raise commands.LaunchError(
            f"{' or '.join(_INDICES)} must be the number of one of the {len(found)} commands in {file}, not {index!r}"
        )
    return found[int(index)]


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        return commands.refuse(commands.LaunchError("give one file of commands: python -m launch.task FILE"))
    try:
        chosen = command(argv[1], dict(os.environ))
        os.execvp(chosen[0], chosen)
    except commands.LaunchError as error:
        return commands.refuse(error)
    except OSError as error:
        return commands.refuse(commands.LaunchError(f"{chosen[0]} cannot be run ({error.strerror})"))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
