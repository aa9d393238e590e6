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

options.define()
FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    """Runs the parsed flags; returns the exit code: 0, or with one sentence on standard error 1, or 4 if it diverged."""
    del argv
    from experiments import runs
    from experiments.training.errors import DivergedError, TrainingError

    try:
        if FLAGS.precision == "list":
            _show(precision_table())
            return 0
        run = checked_run()
        if FLAGS.print_plan:
            _show(_plan(run))
            return 0
    except (ValueError, runs.RunError) as error:
        return _refuse(error)
    print("\n".join(run.description()), flush=True)
    try:
        summary = run.execute()
    except DivergedError as error:
        _refuse(error)
        return DIVERGED
    except (TrainingError, runs.RunError) as error:
        return _refuse(error)
    if summary is not None:
        print(f"held-out loss {summary['eval_loss']:.4f} nats per token; all is in {run.options.workdir}/summary.json")
    return 0


def _refuse(error: Exception) -> int:
    print(f"pretrain: {error}", file=sys.stderr)
    return 1


def checked_run() -> "Run":
    from experiments.runs.rundir import config_differences, load_config

    config = load_config(FLAGS.config) if FLAGS.config else None
    if FLAGS.precision == "auto":
        FLAGS["precision"].value = _recommended()
    chosen = options.from_flags(config)
    _prepare_xla(deterministic=chosen.deterministic)

    import jax

    from experiments import data
    from experiments.training.mesh import Placement
    from experiments.training.run import Run

    jax.config.update("jax_compilation_cache_dir", str(chosen.cache / "xla"))
    # The audit reads the names in a program, so programs that differ in names are two; lines of source are left out.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    jax.config.update("jax_traceback_in_locations_limit", 0)
    placement = Placement.parse(chosen.mesh, chosen.microbatch)
    run = Run(chosen, data.load(chosen.data, chosen.tokenizer, chosen.cache), placement)
    if config is not None and options.repeats_config():
        for name, (then, now) in config_differences(config, run.config, options.MAY_CHANGE).items():
            raise ValueError(
                f"--config={FLAGS.config} cannot be repeated here: its {name} was {then}, and would be {now}."
            )
    return run


def _recommended() -> str:
    """The precision that the device here rewards; says why."""
    _prepare_xla(deterministic=FLAGS.deterministic)

    import jax

    from q8jax import recommend

    advice = recommend(jax.devices()[0].device_kind)
    print(f"--precision=auto is {advice.precision}: {advice.reason}", flush=True)
    return advice.precision


def _prepare_xla(*, deterministic: bool) -> None:
    """Sets what XLA reads when the first device is asked for."""
    flag = "--xla_gpu_deterministic_ops=true"
    if deterministic and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"


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
