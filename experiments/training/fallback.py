"""Layers that fall back to 16 bits in training, because too much of a tensor saturates or vanishes: `--fallback`.

The blocks are one stack, so a layer falls back at every depth when it passes a bound at one.

What fell, and after which step, stands in `fallback.json` beside the checkpoints, so that a resumed run is the same.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.runs.files import read_json, write_of_run
from experiments.training.precision import Phase
from experiments.training.step import State, Trainer
from q8jax import choices
from q8jax.policy import Policy
from q8jax.recipe import Recipe

FALLBACK = "fallback.json"
BOUNDED = ("saturation", "underflow")


def parse(text: str | None) -> dict[str, float]:
    """The bounds in a `--fallback`, such as 'saturation:0.01,underflow:0.5'; none of None.

    Raises:
      ValueError: what is bounded is not known, given twice, or no share.
    """
    bounds: dict[str, float] = {}
    for entry in text.split(",") if text else []:
        name, _, share = entry.partition(":")
        choices.check("entry of --fallback", name, BOUNDED)
        if name in bounds or not 0 <= _number(share) <= 1:
            raise ValueError(f"--fallback={text} must give each share once, from 0 to 1, as in saturation:0.01.")
        bounds[name] = float(share)
    return bounds


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class Fallback:
    """Which layers of a run have fallen back.

    Attributes:
      layers: the steps after which they did, by path.
    """

    def __init__(self, directory: Path, bounds: Mapping[str, float], primary: bool = True):
        """Reads what has fallen.

        Args:
          directory: of the run.
          bounds: as `parse` has them.
          primary: False on every process of a multi-process run but the first: nothing is written.
        """
        self._path = directory / FALLBACK
        self._primary = primary
        self._bounds = bounds
        self.layers: dict[str, int] = read_json(self._path) if self._path.exists() else {}

    def resume(self, step: int) -> None:
        """Forgets what fell after a step, on the disk too, for a run that goes on from there."""
        kept = {layer: after for layer, after in self.layers.items() if after <= step}
        if kept != self.layers:
            self.layers = kept
            self._write()

    def judge(self, step: int, dots: Mapping[str, Any], formats: Mapping[str, Any]) -> list[str]:
        """The layers that fall back after a step, in sentences; they are on the disk.

        Args:
          step: that was looked at.
          dots, formats: of its line of telemetry.
        """
        reasons = []
        for layer, tensors in dots.items():
            passed = [
                (share, name, tensor, depth)
                for name in self._bounds
                for tensor, qtype in formats[layer].items()
                if qtype is not None
                for depth, share in enumerate(tensors[tensor][name])
                if share is not None and share > self._bounds[name]
            ]
            if passed:
                share, name, tensor, depth = max(passed)
                self.layers[layer] = step
                reasons.append(
                    f"{layer} falls back to 16 bits at every depth after step {step}: {name} of {tensor} is "
                    f"{share:.3g} at depth {depth}"
                )
        if reasons:
            self._write()
        return reasons

    def _write(self) -> None:
        if self._primary:
            write_of_run(self._path, self.layers)

    def narrowed(self, phase: Phase, recipes: Mapping[str, Recipe], step: int) -> Phase:
        """The phase in which what fell by a step computes in 16 bits.

        Args:
          phase: as the user asked for it.
          recipes: of its layers.
          step: that has been taken.
        """
        fallen = {layer: Recipe(compute=phase.compute) for layer, after in self.layers.items() if after <= step}
        fallen = {layer: plain for layer, plain in fallen.items() if layer in recipes}
        if not fallen:
            return phase
        rules = tuple((re.escape(layer), recipe) for layer, recipe in {**recipes, **fallen}.items())
        return dataclasses.replace(phase, policy=Policy(rules))


def carried(trainer: Trainer, state: State) -> State:
    """The state with which a trainer goes on that has less scaling state than the one before it."""
    return {**state, "dots": _within(jax.eval_shape(trainer.phase_state)["dots"], state["dots"])}


def _within(template: Any, values: Any) -> Any:
    if isinstance(template, Mapping):
        return {name: _within(part, values[name]) for name, part in template.items()}
    return values
