"""Shows what a training step really multiplies, on this machine or on one that is not there.

    python -m experiments.audit --precision=fp8 --model=1b --remat --target=h100

compiles the training step of experiments.pretrain, with the same flags, for a target: local, cpu, a100, h100, h200,
b200 (h100:8 for eight of them), or a TPU slice such as v5e:2x2, v5p:8x8x8 or tpu7x:4x4x4. It prints every GEMM by layer
and role, what was asked, what the compiled program multiplies, and what the whole program costs. The exit code is 3 if
something is not what was asked.

    --target=NAME   what to compile for (default: local)
    --json          print an object for programs instead of a table
    --vocab=N       size of the vocabulary (default: as --model has it, 256)
"""

import sys
from typing import TYPE_CHECKING

from absl import app, flags

from experiments import options
from experiments.targets import target

if TYPE_CHECKING:
    import q8jax

NOT_AS_ASKED = 3
FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines this program's flags beside those of pretrain."""
    flags.DEFINE_string("target", "local", "What to compile for.")
    flags.DEFINE_bool("json", False, "Print an object instead of a table.")
    flags.DEFINE_integer("vocab", None, "Size of the vocabulary.", lower_bound=1)


def main(argv: list[str]) -> int:
    """Audits what the flags say; returns the exit code."""
    del argv
    try:
        title, report = _report()
    except ValueError as error:
        print(f"audit: {error}", file=sys.stderr)
        return 1
    print(report.to_json() if FLAGS.json else f"{title}\n\n{report.table()}", flush=True)
    return 0 if report.ok else NOT_AS_ASKED


def _report() -> "tuple[str, q8jax.Report]":
    import jax

    import q8jax
    from experiments.job import Job

    if FLAGS.precision_schedule:
        raise ValueError("--precision_schedule has more than one step to audit: give one --precision at a time.")
    goal = target(FLAGS.target)
    if FLAGS.precision == "auto":
        FLAGS["precision"].value = q8jax.recommend(goal.devices[0].device_kind).precision
    job = Job.of_flags(goal.devices, FLAGS.vocab)
    lowered = job.lower()
    try:
        compiled = lowered.compile(compiler_options=dict(goal.options))
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--target={FLAGS.target} cannot run this: {reason} Choose another or a smaller step."
        ) from error
    devices = f"{job.placement.size} × {goal.devices[0].device_kind}"
    title = f"{job.trainer.phase.name} on {devices}, batch {job.options.batch_size} × {job.options.seq_len}"
    return title, q8jax.audit(lowered, compiled)


if __name__ == "__main__":
    options.define()
    define_flags()
    app.run(main, flags_parser=lambda argv: options.parse(argv, __doc__ or ""))
