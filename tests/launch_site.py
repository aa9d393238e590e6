"""A site whose programs record what launchers call them with."""

import json
import os
import shlex
import subprocess
import sys

HOSTILE = [
    "python",
    "-m",
    "experiments.pretrain",
    "--workdir=a b;c",
    '--data=it\'s "$HOME" $(rm -rf x) `y` \\',
    "é",
    "",
]
FAKE = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
folder = Path(os.environ["FAKE"])
with open(folder / "calls.jsonl", "a") as file:
    print(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]), file=file)
if not sys.stdin.isatty() and "kubectl" in sys.argv[0]:
    (folder / "stdin").write_text(sys.stdin.read())
words = " ".join(sys.argv[1:])
script = json.loads((folder / "script.json").read_text()) if (folder / "script.json").exists() else []
for index, (pattern, outputs) in enumerate(script):
    if pattern in words and outputs:
        code, text = outputs.pop(0)
        (folder / "script.json").write_text(json.dumps(script))
        print(text, file=sys.stderr if code else sys.stdout)
        sys.exit(code)
"""


class Site:
    """Programs that record their calls, and answer as a test has it."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("gcloud", "kubectl", "sbatch", "srun", "scontrol"):
            path = folder / name
            path.write_text(FAKE)
            path.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "FAKE": str(folder),
            "HOME": str(folder),
        }

    def answer(self, **outputs):
        """For each pattern (written with _ for a blank) the exit codes and texts of the calls that have it."""
        script = [(pattern.replace("_", " ").replace("  ", "-"), texts) for pattern, texts in outputs.items()]
        (self.folder / "script.json").write_text(json.dumps(script))

    def run(self, module, *arguments):
        command = [sys.executable, "-m", f"launch.{module}", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True)

    def refuses(self, module, arguments, sentence):
        """Checks that a program says this in one line, and calls nobody."""
        done = self.run(module, *arguments)
        assert done.returncode == 1 and sentence in done.stderr
        assert done.stderr.startswith("launch: ") and done.stderr.count("\n") == 1 and not self.calls

    @property
    def calls(self):
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def shown(done):
    """The commands that a dry run printed, as words, and the here-document of the last."""
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    if not lines[0].endswith("<<'END'"):
        return [shlex.split(line) for line in lines], ""
    return [shlex.split(lines[0].removesuffix(" <<'END'"))], "\n".join(lines[1:-1])
