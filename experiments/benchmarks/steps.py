"""The training step of experiments.pretrain in several precisions, which take turns at one model.

Parameters and moments are the same in every precision, so they are there once, and a step of any precision goes on from
where the last one was; what a precision keeps for itself, its scaling state, it keeps. The data is random tokens.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import q8jax
from experiments import options
from experiments.benchmarks.contest import contest
from experiments.benchmarks.results import Measurement, Program, kind_of, multiplied
from experiments.job import Job
from experiments.training.plan import products
from experiments.training.step import State
from experiments.training.telemetry import observe
from q8jax.recipe import GEMMS


class Entrant:
    """A precision's compiled step.

    Args:
      job: which step.
      shared: what all precisions have in common, by name; filled and changed here.
      looks: whether each step comes with a look by --telemetry.
    """

    losses: list[jax.Array]

    def __init__(self, job: Job, shared: State, looks: bool = False):
        compiled = lambda function, *arguments: job.placement.lower(function, *arguments).compile()(*arguments)
        trainer = job.trainer
        # A step that fails on the device takes with it what was given to it.
        if not shared or any(leaf.is_deleted() for leaf in jax.tree.leaves(shared)):
            shared.update(compiled(trainer.init))
        self._own = compiled(trainer.phase_state)
        for name in self._own:
            shared.pop(name, None)
        self._shared = shared
        tokens = np.random.default_rng(0).integers(0, trainer.config.vocab, job.tokens.shape, np.int32)
        self._tokens = jax.device_put(tokens, job.placement.batch)
        if trainer.keeps_scales:
            self._own["dots"] = compiled(trainer.calibrate, {**shared, **self._own}, self._tokens)
        lowered = job.lower()
        self._step = lowered.compile()
        report = q8jax.audit(lowered, self._step)
        self.program = Program.of(report, _memory(self._step), flops_by_kind(job, report))
        self.losses = []
        self._look: Callable[..., Any] = lambda state, tokens: None
        if looks:
            look = functools.partial(observe, trainer, tuple(job.options.telemetry))
            self._look = job.placement.lower(look, {**shared, **self._own}, self._tokens).compile()

    def __call__(self) -> Any:
        state = {**self._shared, **self._own}
        seen = self._look(state, self._tokens)
        state, metrics = self._step(state, self._tokens)
        self._own = {name: state.pop(name) for name in self._own}
        self._shared.update(state)
        return metrics, self._shared, seen


def _memory(compiled: jax.stages.Compiled) -> int | None:
    """Bytes that a program needs on each device: arguments, results that take none of their place, and temporaries."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return int(found.argument_size_in_bytes + results + found.temp_size_in_bytes)


def flops_by_kind(job: Job, report: q8jax.Report) -> dict[str, float]:
    """FLOPs of the step on one device, counted from its shapes, by the kind of number that the program multiplies.

    What is computed again for the backward pass, and what attention's mask throws away, is no work.
    """
    found: collections.Counter[str] = collections.Counter()
    options = job.options
    for path, (times, m, k, n) in products(job.trainer.config, options.microbatch, options.seq_len).items():
        causal = 2 if path.endswith(("scores", "values")) else 1
        work = 2 * times * m * k * n * options.accumulate // causal
        for role in GEMMS:
            gemms = [gemm for gemm in report.gemms if (gemm.path, gemm.role) == (path, role)]
            # A layer that signs nothing multiplies as Flax does.
            default = kind_of(job.trainer.phase.compute)
            kinds = {multiplied(gemm, report.device_kind) for gemm in gemms} or {default}
            found[max(kinds, key=_width)] += work
    return {kind: work / job.placement.size for kind, work in found.items()}


def _width(kind: str) -> int:
    return int(kind.lstrip("BFINTP"))


def measure(precisions: Sequence[str], rounds: int, vocab: int | None = None) -> Measurement:
    """Times the training step that the parsed flags describe.

    Args:
      precisions: as `--precision` takes them; the first is what the others are compared with.
      rounds: timed steps of each; with --telemetry each precision takes part once more, with a look at every step.
      vocab: size of the vocabulary; by default as --model has it.

    Raises:
      ValueError: flags that do not describe a step, or a first precision that does not run.
    """
    jobs: dict[str, Job] = {}
    for precision in precisions:
        options.FLAGS["precision"].value = precision
        jobs[precision] = Job.of_flags(jax.devices(), vocab)
    shared: State = {}
    builders: dict[str, Callable[[], Entrant]] = {
        name: functools.partial(Entrant, job, shared) for name, job in jobs.items()
    }
    job = jobs[precisions[0]]
    if job.options.telemetry:
        looking = {f"{name}, looking": functools.partial(Entrant, job, shared, True) for name, job in jobs.items()}
        builders = {name: builder for pair in zip(builders.items(), looking.items()) for name, builder in pair}
    chosen, config = job.options, job.trainer.config
    tokens = chosen.batch_size * chosen.seq_len
    sizes = {
        "parameters": config.params,
        "layers": config.layers,
        "batch": chosen.batch_size,
        "sequence": chosen.seq_len,
        "microbatches": chosen.accumulate,
        "tokens": tokens,
    }
    flops = config.flops_per_token(chosen.seq_len) * tokens
    size = job.placement.size
    return contest(chosen.flags["model"], sizes, flops, builders, precisions[0], rounds, devices=size)
