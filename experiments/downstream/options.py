"""The flags of fine-tuning, and everything that can be checked before any data is read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from absl import flags

from experiments import commandline
from experiments.commandline import LIST, REAL, TEXT, WHOLE, YES_NO
from experiments.downstream.optimizer import OPTIMIZERS, Optimizer
from experiments.encoding import TEMPLATES
from experiments.training.optimizer import SCHEDULES
from experiments.training.precision import written_out
from q8jax import choices, qat

PRESETS = ("cnn", "lstm")
# Flags that say how a run is carried out, not what it computes: a resumed run may change them.
MAY_CHANGE = ("log_every", "checkpoint_every", "keep_checkpoints", "cache_dir")
VALUES = flags.FlagValues()
GROUPS: commandline.Groups = {
    "Task": [
        (TEXT, "task", "digits", "A named task, or KIND:FILES, as in csv:reviews.csv,text=review,label=stars."),
        (WHOLE, "length", None, "Most pieces of an input; 128, of --model=lstm 512."),
        (YES_NO, "by_document", False, "Whether sentences of a document share rows, for tagging."),
        (
            YES_NO,
            "casing",
            None,
            "Whether an encoder is told how words are written; where its vocabulary does not tell.",
        ),
        (TEXT, "template", "plain", f"How turns of conversations are told apart, one of {', '.join(TEMPLATES)}."),
    ],
    "Model": [
        (TEXT, "model", "cnn", f"A folder with weights, package:NAME of an installed one, {' or '.join(PRESETS)}."),
    ],
    "Precision": [
        (
            TEXT,
            "precision",
            "fp8",
            "A preset, one with overrides (fp8/margin=1), a recipe, a policy, or @FILE with one.",
        ),
        (LIST, "quantize", ["blocks"], "What a preset or recipe covers: blocks, attention, head; of cnn stem too."),
    ],
    "Quantization-aware training": [
        (
            TEXT,
            "qat",
            "",
            f"Train for the forward product of the precision, gradients wide: {', '.join(qat.QUANTIZED)}.",
        ),
        (TEXT, "ranges", "current", f"Of activations with --qat, one of {', '.join(qat.RANGES)}."),
        (REAL, "range_lr", None, "Peak learning rate of learned ranges; 50 times --lr."),
        (WHOLE, "calibration_batches", 4, "Batches whose amaxes scales that are kept begin with."),
        (WHOLE, "recalibrate_every", None, "Steps after which static ranges are calibrated anew, on the batches then."),
    ],
    "Training": [
        (WHOLE, "epochs", 3, "Times that every example is seen."),
        (WHOLE, "patience", None, "Epochs without a better score on the validation split after which to stop."),
        (WHOLE, "batch_size", 32, "Rows of one step."),
        (TEXT, "optimizer", "adamw", f"One of {', '.join(OPTIMIZERS)}."),
        (REAL, "lr", None, "Peak learning rate; 2e-4, of cnn and lstm 3e-3."),
        (WHOLE, "warmup", None, "Steps of linear warm-up; a tenth of all."),
        (REAL, "final_lr", 0.0, "Learning rate at the end, as a share of the peak."),
        (TEXT, "schedule", "linear", f"Of the learning rate, one of {', '.join(SCHEDULES)}."),
        (REAL, "decay", 0.2, "Share of the steps over which wsd decays."),
        (REAL, "b1", 0.9, "AdamW's decay of the first moment."),
        (REAL, "b2", 0.999, "AdamW's decay of the second moment."),
        (REAL, "momentum", 0.9, "SGD's momentum."),
        (REAL, "weight_decay", 0.01, "Weight decay, of matrices."),
        (REAL, "clip", 1.0, "Largest global gradient norm."),
        (WHOLE, "seed", 0, "Of new parameters, order of the examples and stochastic rounding."),
    ],
    "Distillation": [
        (TEXT, "distill", "", "The folder of a model of the same task, whose logits are learned from too."),
        (REAL, "temperature", 2.0, "That logits of both are divided by."),
        (REAL, "distill_weight", 0.5, "Share of the loss that is the other model's."),
    ],
    "Run": [
        (TEXT, "workdir", "", "The run's directory; runs/TASK-MODEL-PRECISION-seedSEED."),
        (WHOLE, "log_every", 10, "Steps between lines of metrics."),
        (WHOLE, "checkpoint_every", None, "Steps between checkpoints besides those at the ends of epochs."),
        (WHOLE, "keep_checkpoints", 2, "Checkpoints to keep."),
        (TEXT, "cache_dir", "~/.cache/q8jax", "For compiled programs."),
    ],
}
NAMES = commandline.names(GROUPS)
commandline.define(VALUES, GROUPS)
_AT_LEAST_1 = (
    *("length", "epochs", "patience", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"),
    *("calibration_batches", "recalibrate_every"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """A checked run, what depends on its data apart.

    Attributes:
      flags: every flag of the run, by name, resolved but for `warmup`.
      workdir: the run's directory.
    """

    flags: dict[str, Any]
    workdir: Path

    def __getattr__(self, name: str) -> Any:
        try:
            return self.flags[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def is_preset(self) -> bool:
        return self.flags["model"] in PRESETS

    def optimizer(self, steps: int) -> Optimizer:
        """For so many steps.

        Raises:
          ValueError: a value out of its range, naming the flag.
        """
        warmup = steps // 10 if self.flags["warmup"] is None else self.flags["warmup"]
        given = {f.name: self.flags[f.name] for f in dataclasses.fields(Optimizer) if f.name in self.flags}
        return Optimizer(**given | {"steps": steps, "warmup": warmup})


def parse(argv: list[str], introduction: str = "") -> list[str]:
    """Parses a command line anew, as `commandline.parse` does."""
    return commandline.parse(VALUES, GROUPS, argv, introduction)


def from_flags() -> Options:
    """Checks the parsed flags.

    Raises:
      ValueError: one sentence that names the flag and the fix.
    """
    values: dict[str, Any] = {name: VALUES[name].value for name in NAMES}
    workdir = values.pop("workdir")
    values["precision"] = written_out(values["precision"])
    for name in _AT_LEAST_1:
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"--{name}={values[name]} must be at least 1.")
    if not 0 <= values["seed"] < 2**32:
        raise ValueError(f"--seed={values['seed']} must be from 0 to {2**32 - 1}.")
    choices.check("--template", values["template"], TEMPLATES)
    given = commandline.given(VALUES, GROUPS)
    if not values["distill"]:
        for name in ("temperature", "distill_weight"):
            if name in given:
                raise ValueError(f"--{name} has no effect without --distill: leave it out, or name a model.")
    if not 0 < values["temperature"] < float("inf"):
        raise ValueError(f"--temperature={values['temperature']} must be positive and finite.")
    if not 0 < values["distill_weight"] <= 1:
        raise ValueError(f"--distill_weight={values['distill_weight']} must be above 0 and at most 1.")
    _check_qat(values, given)
    of_optimizer = {"adamw": ("b1", "b2"), "sgd": ("momentum",)}
    choices.check("--optimizer", values["optimizer"], OPTIMIZERS)
    for optimizer, names in of_optimizer.items():
        for name in names:
            if optimizer != values["optimizer"] and name in given:
                raise ValueError(f"--{name} has no effect on --optimizer={values['optimizer']}: leave it out.")
    if "decay" in given and values["schedule"] != "wsd":
        raise ValueError(f"--decay has no effect on --schedule={values['schedule']}: leave it out, or use wsd.")
    preset = values["model"] in PRESETS
    if values["lr"] is None:
        values["lr"] = 3e-3 if preset else 2e-4
    if values["range_lr"] is None and values["ranges"] == "learned":
        values["range_lr"] = 50 * values["lr"]
    if values["length"] is None:
        values["length"] = 512 if preset else 128
    options = Options(values, Path(workdir or f"runs/{_name(values)}").expanduser())
    options.optimizer(10**6)
    return options


def _check_qat(values: dict[str, Any], given: set[str]) -> None:
    if values["qat"]:
        choices.check("--qat", values["qat"], qat.QUANTIZED)
    elif "ranges" in given:
        raise ValueError("--ranges has no effect without --qat: leave it out, or add --qat=both.")
    choices.check("--ranges", values["ranges"], qat.RANGES)
    if values["ranges"] != "current" and values["qat"] == "weights":
        raise ValueError("--ranges is of activations, which --qat=weights leaves wide: leave it out, or take both.")
    for name, needed in {"range_lr": "learned", "recalibrate_every": "static"}.items():
        if values[name] is not None and values["ranges"] != needed:
            raise ValueError(f"--{name} has no effect without --ranges={needed}: leave it out.")
    if values["range_lr"] is not None and not 0 < values["range_lr"] < float("inf"):
        raise ValueError(f"--range_lr={values['range_lr']} must be positive and finite.")


def _name(values: dict[str, Any]) -> str:
    parts = [Path(values[name]).name for name in ("task", "model")]
    qat_words = ["qat", values["qat"], values["ranges"]] * bool(values["qat"])
    text = "-".join([*parts, values["precision"], *qat_words, f"seed{values['seed']}"])
    return re.sub(r"[^A-Za-z0-9_.=%-]+", "_", text)[:120]
