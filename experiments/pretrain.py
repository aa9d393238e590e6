"""Pretrains a language model: python -m experiments.pretrain --precision=fp8

With nothing else said, a transformer of under a million parameters learns the source of Python's own standard library,
byte by byte, for a few minutes on a laptop, its projections running as FP8 matrix products. --precision=fp32, bf16 or
int8 changes the arithmetic and nothing else: same initialisation, same batches. The run stands in --workdir, and the
same command goes on where it was stopped.
"""

import os
import sys
from typing import TYPE_CHECKING

from absl import app, flags

from experiments import options

if TYPE_CHECKING:
    from experiments.training.run import Run

DIVERGED = 4  # the exit code of a run whose loss or gradient is not finite
STOPPED = os.EX_TEMPFAIL  # 75: told to stop by a signal, saved, and to be started again

options.define()
FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    """Runs the parsed flags; returns the exit code: 0, STOPPED, or with a sentence on standard error 1 or DIVERGED."""
    del argv
    from experiments import runs, start
    from experiments.training.errors import DivergedError, TrainingError

    try:
        if FLAGS.precision == "list":
            _show(precision_table())
            return 0
        run = start.checked_run()
        if FLAGS.print_plan:
            if run.is_first:
                _show(_plan(run))
            return 0
    except (ValueError, runs.RunError) as error:
        return _refuse(error)
    run.say("\n".join(run.description()))
    try:
        summary = run.execute()
    except DivergedError as error:
        _refuse(error)
        return DIVERGED
    except (TrainingError, runs.RunError) as error:
        return _refuse(error)
    if run.interrupted:
        return STOPPED
    if summary is not None:
        where = f"{run.options.workdir}/summary.json"
        run.say(f"held-out loss {summary['eval_loss']:.4f} nats per token; all is in {where}")
    return 0


def _refuse(error: Exception) -> int:
    print(f"pretrain: {error}", file=sys.stderr)
    return 1


def _show(text: str) -> None:
    """Prints to a reader that may stop reading, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit


def _plan(run: "Run") -> str:
    from experiments.training.plan import describe

    chosen = run.options
    size = chosen.microbatch, chosen.seq_len, run.devices
    return "\n\n".join(describe(run.trainer(phase), *size) for phase in chosen.phases)


def precision_table() -> str:
    """Every preset with its recipe and source."""
    from q8jax.presets import PRECISIONS

    return "\n\n".join(
        f"{name}\n    {row.summary}\n    {row.source}\n    {row.recipe}" for name, row in PRECISIONS.items()
    )


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: options.parse(argv, __doc__ or ""))
