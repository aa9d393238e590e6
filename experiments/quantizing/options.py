"""The flags of quantize, and everything that can be checked before a model is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

from experiments import commandline
from experiments.commandline import LIST, REAL, TEXT, WHOLE, YES_NO
from experiments.quantizing.kernels import METHODS, Method
from experiments.quantizing.pipeline import CALIBRATIONS, Calibration
from experiments.quantizing.schemes import INPUTS, PRESETS, WEIGHTS
from experiments.quantizing.search import Budget
from q8jax import choices
from q8jax.recipe import Operand
from q8jax.stored import STORED_SCALES

VALUES = flags.FlagValues()
GROUPS: commandline.Groups = {
    "Model and data": [
        (TEXT, "model", "", "A folder with a model, package:NAME of an installed one, or the directory of a run."),
        (TEXT, "task", "", "To calibrate on and to measure with: a named task, or KIND:FILES, as text:book.txt."),
        (WHOLE, "length", None, "Most pieces of an input; as the model has it."),
        (WHOLE, "batch_size", 32, "Rows of a batch."),
        (WHOLE, "batches", 8, "Batches of the training split to calibrate on."),
        (WHOLE, "examples", None, "How many examples of the test split to measure with; all."),
    ],
    "What": [
        (TEXT, "precision", "w8a8", f"A recipe, a policy, @FILE with one, or of {', '.join(PRESETS)}."),
        (LIST, "quantize", ["blocks"], "What a preset or recipe covers: blocks, head; of cnn stem too."),
        (TEXT, "embeddings", "", "What tables of embeddings become, as in int8:row or int4:tile32; '' to leave them."),
        (TEXT, "weights", "symmetric", f"Codes of weights, one of {', '.join(WEIGHTS)}."),
        (TEXT, "inputs", "symmetric", f"Codes of inputs, one of {', '.join(INPUTS)}."),
        (TEXT, "scales", "float32", f"In which scales of weights are kept, one of {', '.join(STORED_SCALES)}."),
        (TEXT, "compute", "", "Dtype of what is not quantized; as the model has it."),
    ],
    "How": [
        (TEXT, "calibration", "absmax", f"Of static scales, one of {', '.join(CALIBRATIONS)}."),
        (REAL, "percent", 99.99, "Of values that percentile keeps."),
        (TEXT, "method", "round", f"Of weights, joined by +: {', '.join(METHODS)}."),
        (REAL, "outlier_share", 0.01, "Of input channels that outliers keeps apart."),
        (YES_NO, "act_order", False, "Whether gptq takes rows by falling magnitude of inputs."),
    ],
    "Search": [
        (TEXT, "budget", "", "Find a policy that meets it: size:SHARE of float32, or loss:DAMAGE to the score."),
        (TEXT, "candidates", "w8+w4", "What layers may become in a search, joined by +, beside what they are."),
        (TEXT, "save_policy", "", "The file for the policy that was found."),
    ],
    "Results": [
        (TEXT, "out", "", "The folder for the quantized model and its report; '' to measure alone."),
        (TEXT, "target", "local", "What to audit products for, as in audit: local, h100, v5e:2x2, …"),
        (YES_NO, "speed", True, "Whether latency and throughput are measured."),
    ],
}
NAMES = commandline.names(GROUPS)
commandline.define(VALUES, GROUPS)
_AT_LEAST_1 = ("length", "batch_size", "batches", "examples")


@dataclasses.dataclass(frozen=True)
class Options:
    """Checked flags.

    Attributes:
      flags: every flag, by name.
      method, calibration: as they say.
      embeddings: what tables become, or None.
      budget: of a search, or None.
    """

    flags: dict[str, Any]
    method: Method
    calibration: Calibration
    embeddings: Operand | None
    budget: Budget | None

    def __getattr__(self, name: str) -> Any:
        try:
            return self.flags[name]
        except KeyError:
            raise AttributeError(name) from None


def parse(argv: list[str], introduction: str = "") -> list[str]:
    """Parses a command line anew, as `commandline.parse` does."""
    return commandline.parse(VALUES, GROUPS, argv, introduction)


def from_flags() -> Options:
    """Checks the parsed flags.

    Raises:
      ValueError: one sentence that names the flag and the fix.
    """
    values: dict[str, Any] = {name: VALUES[name].value for name in NAMES}
    given = commandline.given(VALUES, GROUPS)
    for name in ("model", "task"):
        if not values[name]:
            raise ValueError(f"--{name}= is needed: --help says what it can be.")
    for name in _AT_LEAST_1:
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"--{name}={values[name]} must be at least 1.")
    for name, words in (("weights", WEIGHTS), ("inputs", INPUTS), ("scales", STORED_SCALES)):
        choices.check(f"--{name}", values[name], words)
    if values["compute"]:
        choices.check("--compute", values["compute"], ("float32", "bfloat16", "float16"))
    if not 0 < values["percent"] <= 100:
        raise ValueError(f"--percent={values['percent']} must be more than 0 and at most 100.")
    if not 0 < values["outlier_share"] < 1:
        raise ValueError(f"--outlier_share={values['outlier_share']} must be more than 0 and less than 1.")
    method = Method(tuple(values["method"].split("+")), values["outlier_share"], values["act_order"])
    for name, user, is_used in (
        ("percent", "--calibration=percentile", values["calibration"] == "percentile"),
        ("outlier_share", "outliers in --method", "outliers" in method.names),
        ("act_order", "gptq in --method", "gptq" in method.names),
        ("candidates", "--budget", bool(values["budget"])),
        ("save_policy", "--budget", bool(values["budget"])),
    ):
        if name in given and not is_used:
            raise ValueError(f"--{name} has no effect without {user}: leave it out, or add that.")
    if values["budget"] and "precision" in given:
        raise ValueError("--budget finds the precision of each layer among --candidates: leave --precision out.")
    budget = Budget.parse(values["budget"]) if values["budget"] else None
    return Options(
        values, method, Calibration(values["calibration"], values["percent"]), _table(values["embeddings"]), budget
    )


def _table(text: str) -> Operand | None:
    if not text:
        return None
    try:
        operand = Operand.parse(text)
    except ValueError as error:
        raise ValueError(f"--embeddings={text}: {error}") from None
    if operand is None or operand.granularity == "tensor" or operand.is_block:
        raise ValueError(f"--embeddings={text}: each row of a table has its own scales, write row or tileK.")
    return operand


def folder_of(options: Options) -> Path | None:
    return Path(options.out).expanduser() if options.out else None
