"""Runs the command of a job file on a worker, and again for as long as it was told to stop before it was done.

    python -m launch.worker launch/job.json

A program that begins with `python` is run by the Python that runs this.
"""

import json
import os
import subprocess
import sys


def main(argv: list[str]) -> int:
    with open(argv[1]) as file:
        command = json.load(file)
    if command[0] in ("python", "python3"):
        command[0] = sys.executable
    try:
        while (code := subprocess.run(command).returncode) == os.EX_TEMPFAIL:
            pass
    except OSError as error:
        print(f"worker: {command[0]} cannot be run ({error.strerror}): give a program after --", file=sys.stderr)
        return 127
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
