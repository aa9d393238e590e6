"""Shows what a training step really multiplies and takes, on this machine or on one that is not there.

    python -m experiments.audit --precision=fp8 --model=1b --remat --target=h100

compiles the training step of experiments.pretrain, with the same flags, for a target: local, cpu, a100, h100, h200,
b200 (h100:8 for eight of them), or a TPU slice such as v5e:2x2, v5p:8x8x8 or tpu7x:4x4x4 (v5e:16x16:2 for two slices).
It prints every GEMM by layer and role, what was asked, what the compiled program multiplies, what the whole program
costs, whether it fits, and the least time that the data sheets allow. The exit code is 3 if something is not what was
asked.

    --target=NAME   what to compile for (default: local)
    --search        find the largest batch that fits, and the --remat with which it trains most tokens a second
    --json          print an object for programs instead of a table
    --vocab=N       size of the vocabulary (default: as --model has it, 256)
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from absl import app, flags

from experiments import options
from experiments.targets import Target, target

if TYPE_CHECKING:
    import q8jax
    from experiments.job import Job
    from experiments.projecting.projection import Projection

NOT_AS_ASKED = 3
FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Audited:
    """A step that was compiled for a target."""

    job: Job
    report: q8jax.Report
    projection: Projection | None

    @property
    def title(self) -> str:
        """What was compiled for what."""
        job = self.job
        kind = job.placement.devices[0].device_kind
        where = f" as {job.placement}" if job.placement.size > 1 else ""
        devices = f"{job.placement.size} × {kind}{where}"
        return f"{job.trainer.phase.name} on {devices}, batch {job.options.batch_size} × {job.options.seq_len}"

    def table(self) -> str:
        """For a person."""
        lines = self.projection.lines() if self.projection else {}
        projected = [f"{name:<18}{line}" for name, line in lines.items()]
        return "\n".join([self.title, "", self.report.table(), *projected])

    def to_json(self) -> dict[str, Any]:
        projection = self.projection.to_json() if self.projection else None
        return {"title": self.title, **json.loads(self.report.to_json()), "projection": projection}


def define_flags() -> None:
    """Defines this program's flags beside those of pretrain."""
    flags.DEFINE_string("target", "local", "What to compile for.")
    flags.DEFINE_bool("search", False, "Find the largest batch that fits.")
    flags.DEFINE_bool("json", False, "Print an object instead of a table.")
    flags.DEFINE_integer("vocab", None, "Size of the vocabulary.", lower_bound=1)


def main(argv: list[str]) -> int:
    """Audits what the flags say; returns the exit code."""
    del argv
    try:
        audited = _audited()
    except ValueError as error:
        print(f"audit: {error}", file=sys.stderr)
        return 1
    print(json.dumps(audited.to_json(), indent=1) if FLAGS.json else audited.table(), flush=True)
    return 0 if audited.report.ok else NOT_AS_ASKED


def _audited() -> Audited:
    import q8jax

    if FLAGS.precision_schedule:
        raise ValueError("--precision_schedule has more than one step to audit: give one --precision at a time.")
    goal = target(FLAGS.target)
    if FLAGS.precision == "auto":
        FLAGS["precision"].value = q8jax.recommend(goal.devices[0].device_kind).precision
    if FLAGS.search:
        _choose(goal)
    try:
        return _compiled(goal)
    except _NoRoom as error:
        raise ValueError(
            f"--target={FLAGS.target} cannot run this: {error} Choose another or a smaller step."
        ) from error


class _NoRoom(Exception):
    """The compiler refuses a step; its reason."""


def _compiled(goal: Target) -> Audited:
    import jax

    import q8jax
    from experiments.job import Job
    from experiments.projecting.projection import project

    job = Job.of_flags(goal.devices, FLAGS.vocab)
    lowered = job.lower()
    try:
        compiled = lowered.compile(compiler_options=dict(goal.options))
    except jax.errors.JaxRuntimeError as error:
        raise _NoRoom(str(error).splitlines()[0]) from error
    report = q8jax.audit(lowered, compiled)
    tokens = job.options.batch_size * job.options.seq_len
    flops = job.trainer.config.flops_per_token(job.options.seq_len) * tokens
    return Audited(job, report, project(report, job.placement.devices, flops, tokens))


def _choose(goal: Target) -> None:
    """Sets --batch_size and --remat to what trains the most tokens a second of all that fits."""
    from experiments.projecting.search import search
    from experiments.training.mesh import Placement
    from q8jax.devices import get_device

    if get_device(goal.devices[0].device_kind) is None:
        raise ValueError(f"--search needs a target whose memory is known, not --target={FLAGS.target}: choose a chip.")
    if FLAGS["batch_size"].present or FLAGS.remat is not None or FLAGS.remat_keeps is not None:
        raise ValueError("--search chooses --batch_size, --remat and --remat_keeps: leave them out.")
    parts = Placement.parse(FLAGS.mesh, len(goal.devices), goal.devices).parts

    def attempt(remat: bool, keeps: str, rows: int) -> Projection | None:
        _set(batch_size=rows * parts * FLAGS.accumulate, remat=remat, remat_keeps=keeps)
        try:
            found = _compiled(goal).projection
        except _NoRoom:
            found = None
        fits = "does not fit" if found is None or not found.fits else f"{found.resident / 2**30:.2f} GiB"
        print(f"search: {_settings()}: {fits}", file=sys.stderr, flush=True)
        return found

    fits = list(search(attempt))
    if not fits:
        raise ValueError(f"--target={FLAGS.target} holds not one row of this: choose another, or more --mesh=fsdp.")
    best = max(fits, key=lambda fit: fit.tokens_per_second)
    _set(batch_size=best.rows * parts * FLAGS.accumulate, remat=best.remat, remat_keeps=best.keeps)
    print(f"search: chosen is {_settings()}", file=sys.stderr, flush=True)


def _set(**values: Any) -> None:
    for name, value in values.items():
        FLAGS[name].value = value
        FLAGS[name].present = 1


def _settings() -> str:
    keeps = f" --remat_keeps={FLAGS.remat_keeps}" if FLAGS.remat else ""
    return f"--batch_size={FLAGS.batch_size} --{'' if FLAGS.remat else 'no'}remat{keeps}"


if __name__ == "__main__":
    options.define()
    define_flags()
    app.run(main, flags_parser=lambda argv: options.parse(argv, __doc__ or ""))
