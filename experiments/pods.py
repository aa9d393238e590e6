"""Compiles the steps of whole pods, and tabulates what they take: python -m experiments.pods --out=DIR

Every row is one run of experiments.audit, whose flags are kept beside what it found in DIR/pods.jsonl. A row that is
there already is not compiled again, so the command goes on where it was stopped.

    --out=DIR       where the rows are
    --only=REGEX    of rows whose flags match, as in --only='target=v5e.*model=1b'
    --jobs=N        compile N at once, with about 5 GB of memory each (default: 1)
"""

import concurrent.futures
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.projecting import table
from experiments.runs.environment import revision_text

FLAGS = flags.FLAGS
_LIBRARIES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    """Defines this program's flags."""
    flags.DEFINE_string("out", None, "Where the rows are.", values, required=True)
    flags.DEFINE_string("only", "", "Of rows whose flags match.", values)
    flags.DEFINE_integer("jobs", 1, "Compile so many at once.", 1, flag_values=values)


def main(argv: list[str]) -> int:
    """Compiles what is missing; returns the exit code."""
    del argv
    out = Path(FLAGS.out)
    try:
        only = re.compile(FLAGS.only)
    except re.error as error:
        print(f"pods: --only={FLAGS.only} is not a regular expression ({error}): change it.", file=sys.stderr)
        return 1
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"pods: --out={out} cannot be made ({error.strerror}): choose another.", file=sys.stderr)
        return 1
    steps = table.read(out)
    there = {tuple(step["flags"]) for step in steps}
    wanted = [pod.flags(precision) for pod in table.PODS for precision in table.PRECISIONS]
    missing = [row for row in wanted if row not in there and only.search(" ".join(row))]
    failed, revision = 0, revision_text(Path(__file__).resolve())
    with concurrent.futures.ThreadPoolExecutor(FLAGS.jobs) as pool:
        rows = {pool.submit(_audited, row): row for row in missing}
        for done in concurrent.futures.as_completed(rows):
            row, found = rows[done], done.result()
            if isinstance(found, str):
                failed += 1
                print(f"pods: {' '.join(row)}: {found}", file=sys.stderr, flush=True)
                continue
            steps.append(table.kept(row, found, _versions(), revision))
            try:
                table.write(out, steps)
            except OSError as error:
                pool.shutdown(wait=False, cancel_futures=True)
                print(f"pods: --out={out} cannot be written ({error.strerror}): make room.", file=sys.stderr)
                return 1
            print(f"pods: {' '.join(row)}: done", file=sys.stderr, flush=True)
    from q8jax.report import aligned

    print("\n".join(aligned(table.rows(steps))))
    return 1 if failed else 0


def _audited(row: tuple[str, ...]) -> dict[str, Any] | str:
    """What the audit found, or why it found nothing."""
    command = [sys.executable, "-m", "experiments.audit", "--json", *row]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:
        sentences = [line for line in done.stderr.splitlines() if line.startswith("audit: ")]
        return sentences[-1] if sentences else f"the audit ended with {done.returncode}"


def _versions() -> dict[str, str]:
    installed = {}
    for name in _LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


if __name__ == "__main__":
    define_flags()
    app.run(main)
