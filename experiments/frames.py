"""Runs as a DataFrame:

    from experiments import load_runs

    load_runs("runs/*")                     # a row per logged step
    load_runs("study", per="run")           # a row per run: how it ended, and what it was asked to do
    load_runs("study", per="telemetry")     # a row per telemetry step, layer, depth and tensor

Nothing of JAX is imported, so runs can be looked at where it is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from experiments.bucket import fetched
from experiments.loading import RunRecord, distinct_names, find_runs, read_run

if TYPE_CHECKING:
    import pandas as pd


def load_runs(pattern: str | os.PathLike[str], per: Literal["step", "run", "telemetry"] = "step") -> pd.DataFrame:
    """All runs that a path or glob names.

    Args:
      pattern: a run directory, a directory of some (a study's, for instance), a glob, or gs://BUCKET/FOLDER.
      per: what makes a row.

    Returns:
      A table whose first columns are run (the name of its directory, with parents where several share one), precision,
      seed and outcome ("finished", "diverged", "running" or "unfinished"). Then, by `per`:
        "step": step, tokens, and the metrics of each line of `metrics.jsonl`;
        "run": what `summary.json` holds, then every flag as "config.FLAG";
        "telemetry": step, layer, depth, tensor ("x", "w", "g", or a GEMM: "fwd", "dlhs", "drhs") and its statistics.
      Missing values are NaN.

    Raises:
      LoadError: there is no run, or a file is missing, damaged or truncated.
      BucketError: the bucket cannot be read.
    """
    columns = {"step": _per_step, "run": _per_run, "telemetry": _per_telemetry}
    if per not in columns:
        raise ValueError(f"per={per!r} is none of {', '.join(columns)}.")
    with fetched(os.fspath(pattern)) as here:
        return _table(here, columns[per], per)


def _table(pattern: str, columns: Callable[[RunRecord], Any], per: str) -> pd.DataFrame:
    import pandas as pd

    paths = find_runs(pattern)
    first: list[dict[str, Any]] = []
    frames = []
    for name, path in zip(distinct_names(paths), paths, strict=True):
        run = read_run(path)
        # The columns of a large run are there once, and not copied for its table.
        frames.append(pd.DataFrame(columns(run), copy=False))
        first.append({"run": name, "precision": run.precision, "seed": run.seed, "outcome": run.outcome})
    # Of a run without telemetry there are no rows, and no columns either.
    kept = [i for i, frame in enumerate(frames) if len(frame)] or [0]
    of_row = np.repeat(np.arange(len(kept)), [len(frames[i]) for i in kept])
    table = pd.concat([frames[i] for i in kept], ignore_index=True)
    for at, column in enumerate(first[0]):
        # As categories, of which a row has a byte: names by themselves are larger than numbers.
        kind = None if column == "seed" or per == "run" else "category"
        values = pd.Series([first[i][column] for i in kept], dtype=kind).array
        table.insert(at, column, values.take(of_row))
    return table.astype(dict.fromkeys((n for n in ("layer", "tensor") if n in table), "category"))


def _per_step(run: RunRecord) -> dict[str, Any]:
    step, rest = run.metrics["step"], {name: v for name, v in run.metrics.items() if name != "step"}
    return {"step": step, "tokens": run.tokens, **rest}


def _per_run(run: RunRecord) -> list[dict[str, Any]]:
    facts = {name: value for name, value in (run.summary or {}).items() if name != "precision"}
    diverged_at = None if run.diverged is None else run.diverged["step"]
    flags = {f"config.{name}": value for name, value in run.config.items()}
    return [{**facts, "diverged_at": diverged_at, **flags}]


def _per_telemetry(run: RunRecord) -> list[dict[str, Any]]:
    rows = []
    for record in run.telemetry:
        for layer, tensors in record["dots"].items():
            for tensor, statistics in tensors.items():
                for depth, values in enumerate(zip(*statistics.values(), strict=True)):
                    at = {"step": record["step"], "layer": layer, "depth": depth, "tensor": tensor}
                    rows.append({**at, **dict(zip(statistics, values, strict=True))})
    return rows
