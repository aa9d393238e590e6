"""Asks of a trained model what each recipe would do to each layer, and so which layer should stay in 16 bits.

    python -m experiments.whatif --config=runs/tiny-bf16-seed0/config.json --recipes=fp8,int8,fp8-unscaled

restores the newest checkpoint of that run and computes the loss of one training batch, every product in BF16. Beside
it, every product that --quantize covers is computed as each of the recipes would, forward and backward, with the
scales that the tensors themselves give. The table is ranked by the worst of a layer's three GEMMs.

With --batches a second table says what each recipe, in all these layers and in each alone, adds to the noise of the
whole model's gradient; where that scatters much more than its mean, one percent is as batches one percent smaller.

    --config=RUN/config.json   the run, a finished one or one that is not running
    --recipes=LIST             presets and recipes, separated by commas (default: fp8,int8)
    --batch=N                  which training batch (default: the next one after the checkpoint)
    --batches=N                how many, from that one on, to see the gradient's noise by (default: 0, do not)
    --out=FILE                 write the numbers as JSON too
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags

from experiments import options
from experiments.bucket import is_url

if TYPE_CHECKING:
    from experiments.runs import Restored
    from experiments.training.gradient_noise import Noise
    from experiments.training.run import Run
    from experiments.training.step import Trainer

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


@dataclasses.dataclass(frozen=True)
class Added:
    """What one recipe adds to the gradient's noise.

    Attributes:
      recipe: as the user wrote it.
      layers: where it is used, one layer, or 'all' that --quantize covers.
      noise: what it adds.
    """

    recipe: str
    layers: str
    noise: Noise


@dataclasses.dataclass(frozen=True)
class GradientNoise:
    """The noise of a gradient over batches.

    Attributes:
      batches: how many.
      scale: its variance as a multiple of the square of its mean; infinite where that is not seen.
      rows: what the recipes add.
    """

    batches: int
    scale: float
    rows: list[Added]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What recipes would do at a checkpoint.

    Attributes:
      step: of the checkpoint.
      rows: their damage, the worst first.
      noise: what they add to the gradient's noise, where it was asked for.
    """

    step: int
    rows: list[Damage]
    noise: GradientNoise | None


def define_flags() -> None:
    """Defines this program's flags beside those of pretrain."""
    flags.DEFINE_list("recipes", ["fp8", "int8"], "What to try.")
    flags.DEFINE_integer("batch", None, "Which training batch.", lower_bound=0)
    flags.DEFINE_integer("batches", 0, "How many to see the gradient's noise by.", lower_bound=0)
    flags.DEFINE_string("out", "", "Write the numbers as JSON too.")


def main(argv: list[str]) -> int:
    """Looks at the run that the flags say; returns the exit code."""
    del argv
    from experiments import runs

    try:
        answer = _answer()
        if FLAGS.out:
            _write(Path(FLAGS.out), Path(FLAGS.workdir).resolve().name, answer)
    except (ValueError, runs.RunError) as error:
        print(f"whatif: {error}", file=sys.stderr)
        return 1
    print(table(answer.rows))
    if answer.noise:
        print(f"\n{noise_table(answer.noise)}")
    return 0


def _answer() -> Answer:
    from experiments import runs, start

    if not FLAGS.config:
        raise ValueError("--config= is needed: give the config.json of a run that has a checkpoint.")
    if FLAGS.workdir:
        raise ValueError("--workdir is that of --config: leave it out.")
    if FLAGS.batches == 1:
        raise ValueError("--batches=1 shows no noise: give two or more, or 0 to leave it out.")
    if is_url(FLAGS.config):
        raise ValueError(f"--config={FLAGS.config} is in a bucket: copy the run here, and give its config.json.")
    FLAGS["workdir"].value = str(Path(FLAGS.config).expanduser().parent)
    recipes = _recipes()
    run = start.checked_run()
    # What may differ from the stored flags stays as it is stored: this looks, and changes nothing.
    stored = runs.load_config(FLAGS.config)
    kept = {name: value for name, value in run.config.items() if name not in options.MAY_CHANGE}
    kept |= {name: stored[name] for name in options.MAY_CHANGE if name in stored}
    with runs.RunDir.look(run.options.workdir, kept) as directory:
        run.know_fallback(directory.path)
        with runs.Checkpoints(directory.checkpoints, tidy=False) as checkpoints:
            restored = checkpoints.latest_good(run.target)
    if restored is None:
        raise runs.RunError(f"--config={FLAGS.config} is of a run without a checkpoint: let it save one first")
    return ask(run, restored, recipes)


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


def ask(run: Run, restored: Restored, recipes: dict[str, Any]) -> Answer:
    """What each recipe would do at a checkpoint of a run.

    Raises:
      ValueError: a tile does not divide an axis.
    """
    import jax
    import numpy as np

    from experiments.training.precision import naming, resolve
    from experiments.training.telemetry import observe
    from q8jax import telemetry

    plain = run.trainer_of(resolve("bf16"))
    state = plain.enter(restored.tree, plain.phase_state())
    first = restored.step if FLAGS.batch is None else FLAGS.batch
    tokens = run.place(run.batch(first))
    rows, asked = [], {}
    for name, recipe in recipes.items():
        with naming(f"--recipes={name}"):
            covered = run.trainer_of(resolve(name, tuple(run.options.quantize))).recipes()
            asked[name] = {layer: own for layer, own in covered.items() if own == recipe}
            watched = asked[name]
            function = jax.jit(
                lambda state, tokens, watched=watched: observe(plain, ("gemms",), state, tokens, watched)
            )
            dots = jax.device_get(function(state, tokens)["dots"])
        for layer, probe in dots.items():
            found = telemetry.summary(probe)
            errors = [np.atleast_1d(found[role]["error"]).tolist() for role in ("fwd", "dlhs", "drhs")]
            changes = np.atleast_1d(found["fwd"]["loss_change"]).tolist()
            rows += [Damage(layer, depth, name, *row) for depth, row in enumerate(zip(*errors, changes, strict=True))]
    noise = _noise(run, plain, state, first, asked) if FLAGS.batches else None
    return Answer(restored.step, sorted(rows, key=lambda row: -row.error), noise)


def _noise(run: Run, plain: Trainer, state: dict[str, Any], first: int, asked: dict[str, Any]) -> GradientNoise:
    from experiments.training import gradient_noise
    from experiments.training.precision import Phase
    from q8jax.policy import Policy
    from q8jax.recipe import Recipe

    others = {}
    for name, recipes in asked.items():
        for layers in (tuple(recipes), *((layer,) for layer in recipes if len(recipes) > 1)):
            compute = next(iter(recipes.values())).compute
            rules = [(re.escape(layer), recipes[layer]) for layer in layers]
            policy = Policy((*rules, (".*", Recipe(compute=compute))))
            others[name, layers] = run.trainer_of(Phase(0, name, policy, compute))
    batches = (run.place(run.batch(first + index)) for index in range(FLAGS.batches))
    scale, found = gradient_noise.measure(plain, others, state, batches)
    rows = [
        Added(name, "all" if layers == tuple(asked[name]) else layers[0], noise)
        for (name, layers), noise in found.items()
    ]
    return GradientNoise(FLAGS.batches, scale, rows)


def table(rows: Sequence[Damage]) -> str:
    """The rows for a person, and what they come to by layer."""
    from q8jax.report import aligned

    lines: list[Sequence[str]] = [("layer", "depth", "recipe", "fwd", "dlhs", "drhs", "loss change")]
    for row in rows:
        errors = (f"{100 * error:.2f} %" for error in (row.fwd, row.dlhs, row.drhs))
        lines.append([row.layer, str(row.depth), row.recipe, *errors, f"{row.loss_change:+.2e}"])
    advice = []
    for recipe in dict.fromkeys(row.recipe for row in rows):
        worst = next(row for row in rows if row.recipe == recipe)
        advice.append(f"{recipe} costs {worst.layer} most, at depth {worst.depth}: it is the first to keep in 16 bits.")
    return "\n".join([*aligned(lines), "", *advice])


def noise_table(noise: GradientNoise) -> str:
    """The gradient's noise for a person."""
    from q8jax.report import aligned

    lines: list[Sequence[str]] = [("recipe", "in", "noise added", "bias", "loss change")]
    for row in noise.rows:
        added = row.noise
        lines.append(
            [
                row.recipe,
                row.layers,
                f"{100 * added.noise:.3f} ± {100 * added.noise_error:.3f} %",
                f"{100 * added.bias:.2f} %",
                f"{added.loss_change:+.1e} ± {added.loss_change_error:.0e}",
            ]
        )
    scatter = f"The gradient scatters by {noise.scale:.3g} times the square of its mean, over {noise.batches} batches."
    return "\n".join([scatter, *aligned(lines)])


def _write(path: Path, run: str, answer: Answer) -> None:
    from experiments.runs.files import write_json

    entries: dict[str, Any] = {"run": run, "checkpoint": answer.step}
    entries["rows"] = [{**dataclasses.asdict(row), "error": row.error} for row in answer.rows]
    if answer.noise:
        rows = [{"recipe": row.recipe, "in": row.layers, **dataclasses.asdict(row.noise)} for row in answer.noise.rows]
        entries["noise"] = {"batches": answer.noise.batches, "scale": answer.noise.scale, "rows": rows}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, entries, sort_keys=False)
    except OSError as error:
        raise ValueError(f"--out={path} cannot be written ({error.strerror}): give another.") from error


if __name__ == "__main__":
    options.define()
    define_flags()
    app.run(main, flags_parser=lambda argv: options.parse(argv, __doc__ or ""))
