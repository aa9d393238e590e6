"""What a model is before and after: how good, how large, how fast, and what it really multiplies."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.downstream.evaluation import evaluate
from experiments.downstream.heads import Report
from experiments.quantizing.sources import Source
from experiments.scoring.intervals import mean
from q8jax.report import Report as Audit

_ROUNDS = 15


@dataclasses.dataclass(frozen=True)
class Quality:
    """How good a model is.

    Attributes:
      metric: what `value` is.
      value: the score.
      low, high: of its interval of confidence 0.95; `value` both where there is none.
      worst: of a cosine the least one; None of other metrics.
      embeddings: float32 [rows, D], of a sentence embedder; None of others.
      text: tables for a person.
    """

    metric: str
    value: float
    low: float
    high: float
    worst: float | None = None
    embeddings: np.ndarray | None = None
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a batch is.

    Attributes:
      rows, length: of the batch.
      seconds: [rounds], of both models turn by turn.
    """

    rows: int
    length: int
    seconds: np.ndarray

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def quality(source: Source, model: nnx.Module, reference: Quality | None = None) -> Quality:
    """Scores a model; of a sentence embedder against the embeddings of the reference."""
    if source.purpose.task != "sentence-embedding":
        return _of(evaluate(source.head, model, source.test, source.batches))
    graphdef, state = nnx.split(model)
    embed = jax.jit(lambda state, batch: source.head.logits(nnx.merge(graphdef, state), batch)[0])
    outputs = [np.asarray(embed(state, source.head.of(batch))) for batch in source.batches.once()]
    found = np.stack(source.batches.in_order(outputs))
    cosines = np.sum(found * (found if reference is None else reference.embeddings), axis=1)
    estimate = mean(np.clip(cosines, 0, 1))
    return Quality("cosine to float", float(cosines.mean()), estimate.low, estimate.high, float(cosines.min()), found)


def _of(report: Report) -> Quality:
    """The score by which a report compares models, with its interval where it has one."""
    for name, scores in report.scores.items():
        if name == "perplexity":
            return Quality(name, scores["value"], scores["low"], scores["high"], text=report.text)
        accuracy = scores.get("accuracy")
        # Of words and texts with one class each, micro F1 is their accuracy.
        if accuracy and report.metric in ("accuracy", f"micro F1 of {name}"):
            return Quality(report.metric, report.value, accuracy["low"], accuracy["high"], text=report.text)
    return Quality(report.metric, report.value, report.value, report.value, text=report.text)


def memory(model: nnx.Module) -> int:
    """Bytes of a model's weights and scales."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model)))


def on_disk(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def compiled(source: Source, model: nnx.Module, rows: int) -> tuple[Any, Any]:
    """The lowered forward pass of a batch of so many rows, as a function of (state, batch), and that batch."""
    graphdef, state = nnx.split(model)
    batch = {
        name: np.resize(x, (rows, *x.shape[1:])) for name, x in source.head.of(next(source.batches.once())).items()
    }
    forward = jax.jit(lambda state, batch: source.head.logits(nnx.merge(graphdef, state), batch))
    return forward.lower(state, batch), (state, batch)


def speeds(source: Source, models: dict[str, nnx.Module], rows: int) -> dict[str, Speed]:
    """Times of the same batch, the models taking turns, so that drift of the machine meets all alike."""
    programs = {}
    for name, model in models.items():
        lowered, arguments = compiled(source, model, rows)
        programs[name] = lowered.compile(), arguments
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(_ROUNDS + 1):
        for name, (program, arguments) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if turn:
                seconds[name].append(time.perf_counter() - start)
    length = next((x.shape[1] for x in programs[name][1][1].values() if x.ndim == 2), 1)
    return {name: Speed(rows, length, np.array(times)) for name, times in seconds.items()}


def audited(source: Source, model: nnx.Module, rows: int, where: str) -> Audit:
    """What a forward pass of so many rows multiplies on a target, which need not be there.

    Raises:
      ValueError: an unknown target.
    """
    from experiments.targets import target
    from q8jax.audit import audit

    if where == "local":
        return audit(compiled(source, model, rows)[0])
    chosen = target(where)
    graphdef, state = nnx.split(model)
    _, (_, batch) = compiled(source, model, rows)
    sharding = jax.sharding.SingleDeviceSharding(chosen.devices[0])
    run = lambda state, batch: source.head.logits(nnx.merge(graphdef, state), batch)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (state, batch))
    lowered = jax.jit(run, out_shardings=sharding).lower(*abstract)
    return audit(lowered, lowered.compile(dict(chosen.options)))
