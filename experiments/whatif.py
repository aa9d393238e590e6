"""Asks of a trained model what each recipe would do to each layer, and so which layer should stay in 16 bits.

    python -m experiments.whatif --config=runs/tiny-bf16-seed0/config.json --recipes=fp8,int8,fp8-unscaled

restores the newest checkpoint of that run and computes the loss of one training batch, every product in BF16. Beside
it, every product that --quantize covers is computed as each of the recipes would, forward and backward, with the
scales that the tensors themselves give. The table is ranked by the worst of a layer's three GEMMs.

    --config=RUN/config.json   the run, a finished one or one that is not running
    --recipes=LIST             presets and recipes, separated by commas (default: fp8,int8)
    --batch=N                  which training batch (default: the next one after the checkpoint)
    --out=FILE                 write the numbers as JSON too
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags

from experiments import options

if TYPE_CHECKING:
    from experiments.runs import RunDir
    from experiments.training.run import Run

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Damage:
    """What one recipe would do to one layer.

    Attributes:
      layer: its path.
      depth: its place in the stack, 0 where it is none.
      recipe: as the user wrote it.
      fwd, dlhs, drhs: relative errors of the three GEMMs against float32.
      loss_change: what the forward error changes the loss by, to first order, in nats per token.
    """

    layer: str
    depth: int
    recipe: str
    fwd: float
    dlhs: float
    drhs: float
    loss_change: float

    @property
    def error(self) -> float:
        """Of the worst of the three; infinite where one is not known."""
        errors = self.fwd, self.dlhs, self.drhs
        return math.inf if any(map(math.isnan, errors)) else max(errors)


def define_flags() -> None:
    """Defines this program's flags beside those of pretrain."""
    flags.DEFINE_list("recipes", ["fp8", "int8"], "What to try.")
    flags.DEFINE_integer("batch", None, "Which training batch.", lower_bound=0)
    flags.DEFINE_string("out", "", "Write the numbers as JSON too.")


def main(argv: list[str]) -> int:
    """Looks at the run that the flags say; returns the exit code."""
    del argv
    from experiments import runs

    try:
        step, rows = _damages()
        if FLAGS.out:
            _write(Path(FLAGS.out), Path(FLAGS.workdir).resolve().name, step, rows)
    except (ValueError, runs.RunError) as error:
        print(f"whatif: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    return 0


def _damages() -> tuple[int, list[Damage]]:
    from experiments import runs, start

    if not FLAGS.config:
        raise ValueError("--config= is needed: give the config.json of a run that has a checkpoint.")
    if FLAGS.workdir:
        raise ValueError("--workdir is that of --config: leave it out.")
    FLAGS["workdir"].value = str(Path(FLAGS.config).expanduser().parent)
    recipes = _recipes()
    run = start.checked_run()
    # What may differ from the stored flags stays as it is stored: this looks, and changes nothing.
    stored = runs.load_config(FLAGS.config)
    kept = {name: value for name, value in run.config.items() if name not in options.MAY_CHANGE}
    kept |= {name: stored[name] for name in options.MAY_CHANGE if name in stored}
    with runs.RunDir.open(run.options.workdir, kept) as directory:
        return look(run, directory, recipes)


def _recipes() -> dict[str, Any]:
    from experiments.comparing import sweeps
    from experiments.training.precision import naming
    from q8jax.recipe import Recipe

    names = sweeps.precisions([",".join(FLAGS.recipes)])
    if not names:
        raise ValueError("--recipes= names nothing to try: give presets, as in --recipes=fp8,int8.")
    recipes = {}
    for name in names:
        with naming(f"--recipes={name}"):
            recipes[name] = Recipe.parse(name)
    for name, recipe in recipes.items():
        if not recipe.is_quantized:
            raise ValueError(f"--recipes={name} quantizes nothing: leave it out.")
    return recipes


def look(run: Run, directory: RunDir, recipes: dict[str, Any]) -> tuple[int, list[Damage]]:
    """The step of a run's newest checkpoint, and what each recipe would do there, the worst first.

    Raises:
      runs.RunError: there is no good checkpoint.
      ValueError: a tile does not divide an axis.
    """
    import jax
    import numpy as np

    from experiments import runs
    from experiments.training.precision import naming, resolve
    from experiments.training.telemetry import observe
    from q8jax import telemetry

    run.know_fallback(directory.path)
    with runs.Checkpoints(directory.checkpoints) as kept:
        restored = kept.latest_good(run.target)
    if restored is None:
        raise runs.RunError(f"--config={FLAGS.config} is of a run without a checkpoint: let it save one first")
    plain = run.trainer_of(resolve("bf16"))
    state = plain.enter(restored.tree, plain.phase_state())
    tokens = run.place(run.batch(restored.step if FLAGS.batch is None else FLAGS.batch))
    rows = []
    for name, recipe in recipes.items():
        with naming(f"--recipes={name}"):
            covered = run.trainer_of(resolve(name, tuple(run.options.quantize))).recipes()
            asked = {layer: own for layer, own in covered.items() if own == recipe}
            function = jax.jit(lambda state, tokens, asked=asked: observe(plain, ("gemms",), state, tokens, asked))
            dots = jax.device_get(function(state, tokens)["dots"])
        for layer, probe in dots.items():
            found = telemetry.summary(probe)
            errors = [np.atleast_1d(found[role]["error"]).tolist() for role in ("fwd", "dlhs", "drhs")]
            changes = np.atleast_1d(found["fwd"]["loss_change"]).tolist()
            rows += [Damage(layer, depth, name, *row) for depth, row in enumerate(zip(*errors, changes, strict=True))]
    return restored.step, sorted(rows, key=lambda row: -row.error)


def table(rows: Sequence[Damage]) -> str:
    """The rows for a person, and what they come to by layer."""
    from q8jax.audit import aligned

    lines: list[Sequence[str]] = [("layer", "depth", "recipe", "fwd", "dlhs", "drhs", "loss change")]
    for row in rows:
        errors = (f"{100 * error:.2f} %" for error in (row.fwd, row.dlhs, row.drhs))
        lines.append([row.layer, str(row.depth), row.recipe, *errors, f"{row.loss_change:+.2e}"])
    advice = []
    for recipe in dict.fromkeys(row.recipe for row in rows):
        worst = next(row for row in rows if row.recipe == recipe)
        advice.append(f"{recipe} costs {worst.layer} most, at depth {worst.depth}: it is the first to keep in 16 bits.")
    return "\n".join([*aligned(lines), "", *advice])


def _write(path: Path, run: str, step: int, rows: Sequence[Damage]) -> None:
    from experiments.runs.files import write_json

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [{**dataclasses.asdict(row), "error": row.error} for row in rows]
        write_json(path, {"run": run, "checkpoint": step, "rows": entries}, sort_keys=False)
    except OSError as error:
        raise ValueError(f"--out={path} cannot be written ({error.strerror}): give another.") from error


if __name__ == "__main__":
    options.define()
    define_flags()
    app.run(main, flags_parser=lambda argv: options.parse(argv, __doc__ or ""))
