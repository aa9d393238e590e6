"""The flags of a pretraining run, and everything that can be checked before the first compile."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from absl import flags

from experiments.models.config import ACTIVATIONS, SIZES, TransformerConfig
from experiments.training.optimizer import SCHEDULES, OptimizerConfig
from experiments.training.precision import QUANTIZABLE, Phase, resolve, schedule
from q8jax import choices

FLAGS = flags.FLAGS

# Flags that say how a run is carried out, not what it computes: a resumed run may change them.
MAY_CHANGE = ("log_every", "checkpoint_every", "keep_checkpoints", "profile_steps", "cache_dir")
# Flags of a command, not of a run.
_NOT_OF_THE_RUN = ("config", "workdir", "print_plan")


def define() -> None:
    """Defines the flags; call once."""
    text, number, real, yes_no = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_bool
    text("precision", "fp8", "A preset, a preset with overrides (fp8/margin=1), a recipe or a policy; 'list' shows them.")
    text("precision_schedule", "", "Change precision during the run, as in 0:bf16,200:fp8,-10%:bf16; overrides --precision.")
    flags.DEFINE_list("quantize", ["blocks"], f"What the precision covers, some of {', '.join(QUANTIZABLE)}.")
    text("model", "tiny", f"Size: {', '.join(SIZES)}. The next flags override its dimensions.")
    for name in ("layers", "d_model", "heads", "kv_heads", "d_ff"):
        number(name, None, f"Overrides the model's {name}.")
    flags.DEFINE_string("activation", None, f"Feed-forward activation: {', '.join(ACTIVATIONS)}.")
    flags.DEFINE_bool("tied", None, "Whether the output head is the embedding.")
    flags.DEFINE_bool("remat", None, "Recompute blocks in the backward pass to save memory.")
    flags.DEFINE_float("rope_theta", None, "Base of the rotary frequencies.")
    text("data", "stdlib", "stdlib, markov[:OPTIONS], text:FILES, shards:FOLDER, or a file or glob.")
    text("tokenizer", "auto", "auto, bytes, bpe:SIZE, or a Hugging Face tokenizer.json.")
    number("steps", 250, "Optimizer steps.")
    number("batch_size", 16, "Sequences in one step, over all devices and microbatches.")
    number("seq_len", 256, "Tokens of a sequence.")
    number("accumulate", 1, "Microbatches that one step is split into.")
    number("seed", 0, "Of initialisation, data order and stochastic rounding.")
    text("mesh", "auto", "auto, or data:N to split the batch over N devices.")
    real("lr", 3e-3, "Peak learning rate.")
    number("warmup", None, "Steps of linear warm-up; by default a tenth of the run.")
    real("final_lr", 0.1, "Learning rate at the end, as a share of the peak.")
    text("schedule", "cosine", f"Learning-rate schedule: {', '.join(SCHEDULES)}.")
    real("decay", 0.2, "Share of the steps over which wsd decays.")
    real("b1", 0.9, "AdamW's decay of the first moment.")
    real("b2", 0.95, "AdamW's decay of the second moment.")
    real("weight_decay", 0.1, "AdamW's weight decay.")
    real("clip", 1.0, "Largest global gradient norm.")
    number("log_every", 10, "Steps between lines of metrics.")
    number("eval_every", 100, "Steps between evaluations; one always comes at the end.")
    number("eval_batches", 16, "Held-out batches of an evaluation.")
    number("checkpoint_every", 100, "Steps between checkpoints; one always comes at the end.")
    number("keep_checkpoints", 2, "Checkpoints to keep.")
    text("workdir", "", "The run's directory; by default runs/MODEL-PRECISION-SEED.")
    text("config", "", "Take the flags of a run from its config.json; flags given beside it win.")
    yes_no("print_plan", False, "Show every GEMM's recipe, parameters, memory and FLOPs, and stop.")
    text("profile_steps", "", "FIRST:LAST steps to trace with the profiler, into the run's directory.")
    yes_no("deterministic", False, "Bit-for-bit reproducible on a GPU as well, at some cost in speed.")
    text("cache_dir", "~/.cache/q8jax", "Tokenizers, encoded corpora and compiled programs are kept here.")


@dataclasses.dataclass(frozen=True)
class Options:
    """A checked pretraining run, the vocabulary apart: that is known once the data is loaded.

    Attributes:
      flags: every flag of the run, by name.
      model: shapes, with the vocabulary still to be set.
      optimizer: AdamW and its schedule.
      phases: the precision, or its schedule.
      profile: (first, last) step to trace, or None.
      workdir: the run's directory.
    """

    flags: dict[str, Any]
    model: TransformerConfig
    optimizer: OptimizerConfig
    phases: tuple[Phase, ...]
    profile: tuple[int, int] | None
    workdir: Path

    def __getattr__(self, name: str) -> Any:
        try:
            return self.flags[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def label(self) -> str:
        """The precision as the user wrote it."""
        return self.flags["precision_schedule"] or self.flags["precision"]

    @property
    def cache(self) -> Path:
        return Path(self.flags["cache_dir"]).expanduser()

    def model_with(self, vocab: int) -> TransformerConfig:
        """The shapes with the vocabulary of the data."""
        return dataclasses.replace(self.model, vocab=vocab)

    def config(self, **resolved: Any) -> dict[str, Any]:
        """What config.json holds: every flag, the resolved shapes and recipes, and what is given here."""
        recipes = [{"start": phase.start, "policy": str(phase.policy)} for phase in self.phases]
        return {**self.flags, "recipes": recipes, "shapes": dataclasses.asdict(self.model), **resolved}


def from_flags() -> Options:
    """Checks the parsed flags.

    Raises:
      ValueError: one sentence that names the flag and the fix.
    """
    values = {name: FLAGS[name].value for name in _own_flags() if name not in _NOT_OF_THE_RUN}
    for name in ("steps", "batch_size", "seq_len", "accumulate", "log_every", "eval_every", "eval_batches"):
        _at_least(name, values[name], 1)
    for name in ("checkpoint_every", "keep_checkpoints"):
        _at_least(name, values[name], 1)
    _at_least("seed", values["seed"], 0)
    if values["batch_size"] % values["accumulate"]:
        raise ValueError(f"--accumulate={values['accumulate']} must divide --batch_size={values['batch_size']}.")
    if values["warmup"] is None:
        values["warmup"] = values["steps"] // 10
    model = _model(values)
    quantize = tuple(values["quantize"])
    if values["precision_schedule"]:
        phases = schedule(values["precision_schedule"], values["steps"], quantize, tied=model.tied)
    else:
        phases = (resolve(values["precision"], quantize, tied=model.tied),)
    names = [field.name for field in dataclasses.fields(OptimizerConfig)]
    return Options(
        flags=values,
        model=model,
        optimizer=OptimizerConfig(**{name: values[name] for name in names}),
        phases=phases,
        profile=_profile(values["profile_steps"], values["steps"]),
        workdir=Path(FLAGS.workdir or "runs/" + _name(values)).expanduser(),
    )


def apply_config(config: dict[str, Any]) -> None:
    """Gives every flag that the command line leaves out its value from a run's config.json."""
    for name in _own_flags():
        if name in config and not FLAGS[name].present:
            FLAGS[name].value = config[name]


def _own_flags() -> list[str]:
    module = next(m for m, own in FLAGS.flags_by_module_dict().items() if any(f.name == "precision_schedule" for f in own))
    return [flag.name for flag in FLAGS.flags_by_module_dict()[module]]


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"--{name}={value} must be at least {least}.")


def _model(values: dict[str, Any]) -> TransformerConfig:
    choices.check("--model", values["model"], SIZES)
    size = SIZES[values["model"]]
    fields = [field.name for field in dataclasses.fields(TransformerConfig) if field.name != "vocab"]
    changes = {name: values[name] for name in fields if values[name] is not None}
    if changes.get("heads") and "kv_heads" not in changes:
        changes["kv_heads"] = changes["heads"]
    return dataclasses.replace(size, **changes)


def _profile(text: str, steps: int) -> tuple[int, int] | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= steps:
        raise ValueError(f"--profile_steps={text} must be FIRST:LAST with 1 <= FIRST <= LAST <= --steps={steps}.")
    return int(match[1]), int(match[2])


def _name(values: dict[str, Any]) -> str:
    precision = values["precision_schedule"] or values["precision"]
    return re.sub(r"[^A-Za-z0-9_.=%-]+", "_", f"{values['model']}-{precision}-seed{values['seed']}")[:120]
