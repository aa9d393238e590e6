"""What experiments.figures needs for a metrics file of ten million lines and for a study of 200 runs:

    python tests/large_runs.py

Each is made up in a temporary directory, the runs of the study from those of results/tiny, and drawn by the program as
a user calls it. Seconds of the processor are of all its processes, memory is the most that one of them held.

    --lines=N     of the metrics file
    --seeds=N     of the study, which has 25 arms
    --keep=DIR    make the runs there, or take those that a former call left there
"""

import argparse
import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import synthetic_study

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "results" / "tiny"
# Precisions of the study's arms, by what tiny has of them: its telemetry has the formats of these.
ARMS = {
    "bf16": ("bf16",),
    "fp32": ("fp32",),
    "fp8-hybrid": tuple(
        f"fp8-hybrid/margin={margin}/history={history}" for margin in range(4) for history in (1, 16, 64)
    ),
    "fp8": tuple(f"fp8/margin={margin}" for margin in range(4)),
    "int8": ("int8", "int8-row", "int8-block", "int8-switchback", "int8/rounding=stochastic"),
    "fp8-unscaled": ("fp8-unscaled",),
    "int8-tensor": ("int8-tensor",),
}
_CHUNK = 100_000


class Cost(NamedTuple):
    """Of a process: seconds by the clock and of the processor, and the most bytes of memory."""

    wall: float
    cpu: float
    bytes: int


def write_long_run(folder: Path, lines: int) -> Path:
    """Makes a finished run that logged every step and evaluated at every thousandth; returns its directory."""
    synthetic_study.write_run(folder, "bf16", 0, steps=lines, log_every=1)
    rng = np.random.default_rng(0)
    with open(folder / synthetic_study.METRICS, "w") as file:
        for start in range(0, lines, _CHUNK):
            steps = np.arange(start + 1, min(start + _CHUNK, lines) + 1)
            # Digits as of numbers in float32, and a time in float64.
            noise = rng.standard_normal((3, len(steps)), np.float32)
            columns = {
                "gradient_norm": 0.3 + 0.02 * noise[0] ** 2,
                "learning_rate": 3e-3 * (1 - steps / (2 * lines)).astype(np.float32),
                "loss": (1.5 + 4 / (1 + steps / 1000)).astype(np.float32) + 0.05 * noise[1],
                "nonfinite_tensors": np.zeros(len(steps), np.int32),
                "tokens_per_second": 9000 * (1 + 0.02 * noise[2].astype(np.float64)),
                "input_wait": 0.001 * noise[2].astype(np.float64) ** 2,
            }
            names = ["step", *columns]
            for line in zip(steps.tolist(), *(column.tolist() for column in columns.values())):
                record = dict(zip(names, line))
                if line[0] % 1000 == 0 or line[0] == lines:
                    record["eval_loss"] = record["loss"] + 0.02
                file.write(json.dumps(record) + "\n")
    return folder


def write_study(folder: Path, seeds: int) -> Path:
    """Makes a study of 25 arms from runs of results/tiny, their losses moved a little; returns its directory."""
    arms = [(source, precision) for source, precisions in ARMS.items() for precision in precisions]
    role = lambda source: {"bf16": "baseline", "fp8-unscaled": "control", "int8-tensor": "control"}.get(
        source, "candidate"
    )
    plan = json.loads((TINY / "study.json").read_text())
    plan |= {"seeds": list(range(seeds))}
    plan["arms"] = [
        {"name": precision.replace("/", "_"), "role": role(source), "flags": {"precision": precision}}
        for source, precision in arms
    ]
    (folder / "runs").mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(plan))
    for source, precision in arms:
        models = sorted((TINY / "runs").glob(f"{source}-seed2*"))
        for seed in range(seeds):
            _move(
                models[seed % len(models)],
                folder / "runs" / f"{precision.replace('/', '_')}-seed{seed}",
                precision,
                seed,
            )
    return folder


def _move(model: Path, path: Path, precision: str, seed: int) -> None:
    """Makes a run that is another one, but for its precision, its seed and chance."""
    shutil.copytree(model, path)
    own, shared = np.random.default_rng([seed, *precision.encode()]), np.random.default_rng(seed)
    config = json.loads((path / "config.json").read_text()) | {"precision": precision, "seed": seed}
    (path / "config.json").write_text(json.dumps(config))
    factor = 1 + 0.01 * shared.standard_normal() + 0.0005 * own.standard_normal()
    packed = path / "metrics.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(packed.read_bytes()).splitlines()]
    moved = [line | {name: factor * line[name] for name in ("loss", "eval_loss") if name in line} for line in lines]
    packed.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in moved).encode(), mtime=0))
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"eval_loss": factor * summary["eval_loss"]}))


def cost(command: Sequence[str]) -> Cost:
    """What a command costs, run from the repository's root.

    Raises:
      subprocess.CalledProcessError: it fails.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10_000_000)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    load = "import sys, experiments; experiments.load_runs(sys.argv[1])"
    with contextlib.ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root = (given.keep or out).absolute()
        makers = {
            f"{given.lines:,} lines": (write_long_run, given.lines),
            f"{given.seeds * 25} runs": (write_study, given.seeds),
        }
        print("| runs | program | seconds | of the processor | GB of memory |\n|---|---|---|---|---|")
        for i, (name, (write, size)) in enumerate(makers.items()):
            runs = root / name.replace(" ", "-").replace(",", "")
            if not runs.exists():
                write(runs, size)
            commands = {
                "experiments.figures": ["-m", "experiments.figures", f"--runs={runs}", f"--out={out}/figures{i}"],
                "experiments.load_runs": ["-c", load, str(runs)],
            }
            for program, arguments in commands.items():
                found = cost([sys.executable, *arguments])
                print(
                    f"| {name} | {program} | {found.wall:.0f} | {found.cpu:.0f} | {found.bytes / 1e9:.2f} |", flush=True
                )


if __name__ == "__main__":
    main()
