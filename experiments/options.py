"""The flags of a pretraining run, and everything that can be checked before any data is read."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from experiments import commandline
from experiments.bucket import is_url
from experiments.models.config import ACTIVATIONS, REMAT_KEEPS, SIZES, TransformerConfig
from experiments.training import fallback
from experiments.training.optimizer import SCHEDULES, OptimizerConfig
from experiments.training.precision import QUANTIZABLE, Phase, resolve, schedule, written_out
from q8jax import choices, telemetry

FLAGS = flags.FLAGS
TELEMETRY = ("model", *telemetry.KINDS)

# Flags that say how a run is carried out, not what it computes: a resumed run may change them.
MAY_CHANGE = (
    "log_every",
    "telemetry",
    "telemetry_every",
    "checkpoint_every",
    "keep_checkpoints",
    "profile_steps",
    "cache_dir",
    "mesh",
    "require_native",
)
# Flags of a command, not of a run.
_NOT_OF_THE_RUN = (
    *("config", "workdir", "print_plan", "stop_after"),
    *("multihost", "expect_processes", "expect_devices"),
)
# What config.json holds besides flags.
_RESOLVED = ("recipes", "vocab", "data_sha256")

_TEXT, _WHOLE, _REAL, _YES_NO = commandline.TEXT, commandline.WHOLE, commandline.REAL, commandline.YES_NO
_BY_SIZE = "as --model has it"
_GROUPS: dict[str, list[tuple[Any, str, Any, str]]] = {
    "Precision": [
        (
            _TEXT,
            "precision",
            "fp8",
            "A preset, one with overrides (fp8/margin=1), a recipe, a policy or @FILE with one, auto, or list.",
        ),
        (_TEXT, "precision_schedule", "", "Change the precision during the run, as in 0:bf16,50:fp8,-10%:bf16."),
        (flags.DEFINE_list, "quantize", ["blocks"], f"What a preset or recipe covers, of {', '.join(QUANTIZABLE)}."),
        (_YES_NO, "require_native", False, "Refuse a device that would emulate a GEMM in a wider type."),
    ],
    "Model": [
        (_TEXT, "model", "tiny", f"Size, one of {', '.join(SIZES)}; the next flags override its shapes."),
        (_WHOLE, "layers", None, f"Blocks; {_BY_SIZE}."),
        (_WHOLE, "d_model", None, f"Width of the residual stream; {_BY_SIZE}."),
        (_WHOLE, "heads", None, f"Query heads; {_BY_SIZE}."),
        (_WHOLE, "kv_heads", None, f"Key and value heads; as many as --heads where that is given, else {_BY_SIZE}."),
        (_WHOLE, "d_ff", None, f"Hidden width of the feed-forward layer; {_BY_SIZE}."),
        (_TEXT, "activation", None, f"One of {', '.join(ACTIVATIONS)}; {_BY_SIZE}."),
        (_YES_NO, "tied", None, f"Whether the output head is the embedding; {_BY_SIZE}."),
        (_YES_NO, "remat", None, f"Whether the backward pass recomputes each block, to save memory; {_BY_SIZE}."),
        (_TEXT, "remat_keeps", None, f"What --remat does not recompute, one of {', '.join(REMAT_KEEPS)}; {_BY_SIZE}."),
        (_REAL, "rope_theta", None, f"Base of the rotary frequencies; {_BY_SIZE}."),
    ],
    "Data": [
        (_TEXT, "data", "stdlib", "stdlib, markov[:OPTIONS], text:FILES, shards:FOLDER, or a file or glob."),
        (_TEXT, "tokenizer", "auto", "auto, bytes, bpe:SIZE, or a Hugging Face tokenizer.json."),
        (_WHOLE, "batch_size", 16, "Sequences of one step, over all devices and microbatches."),
        (_WHOLE, "seq_len", 256, "Tokens of a sequence."),
    ],
    "Training": [
        (_WHOLE, "steps", 200, "Optimizer steps."),
        (_WHOLE, "seed", 0, "Of initialisation, order of the data and stochastic rounding."),
        (_WHOLE, "accumulate", 1, "Microbatches that one step is split into."),
        (_TEXT, "mesh", "auto", "auto, or sizes of data, fsdp and tensor, as in data:2,fsdp:4."),
        (_REAL, "lr", 3e-3, "Peak learning rate."),
        (_WHOLE, "warmup", None, "Steps of linear warm-up; a tenth of --steps."),
        (_REAL, "final_lr", 0.1, "Learning rate at the end, as a share of the peak."),
        (_TEXT, "schedule", "cosine", f"Of the learning rate, one of {', '.join(SCHEDULES)}."),
        (_REAL, "decay", None, "Share of the steps over which wsd decays; 0.2."),
        (_REAL, "b1", 0.9, "AdamW's decay of the first moment."),
        (_REAL, "b2", 0.95, "AdamW's decay of the second moment."),
        (_REAL, "weight_decay", 0.1, "AdamW's weight decay, of matrices."),
        (_REAL, "clip", 1.0, "Largest global gradient norm."),
        (_REAL, "average", 0.0, "Decay of a moving average of the parameters, evaluated beside them; 0 keeps none."),
        (_REAL, "init_perturbation", 0.0, "Relative noise on the initialisation, to see what chance alone does."),
        (_YES_NO, "deterministic", False, "Bit-for-bit reproducible on a GPU as well, at some cost in speed."),
    ],
    "Run": [
        (_TEXT, "workdir", "", "The run's directory, or gs://BUCKET/FOLDER; runs/MODEL-PRECISION-seedSEED."),
        (_TEXT, "config", "", "Repeat the run whose config.json this is; flags given beside it win."),
        (_YES_NO, "multihost", None, "Join the run's other processes; by itself where the environment tells of them."),
        (_WHOLE, "expect_processes", None, "Refuse to start on another number of processes."),
        (_WHOLE, "expect_devices", None, "Refuse to start on another number of devices, over all processes."),
        (_WHOLE, "log_every", 10, "Steps between lines of metrics."),
        (flags.DEFINE_list, "telemetry", [], f"What to tell of tensors and products, of {', '.join(TELEMETRY)}."),
        (
            _WHOLE,
            "telemetry_every",
            None,
            "Steps between looks; 200, with binades or gemms 600. One comes first.",
        ),
        (_TEXT, "fallback", None, "Layers beyond it go on in 16 bits, as in saturation:0.01,underflow:0.5."),
        (_WHOLE, "eval_every", 100, "Steps between evaluations; one always comes at the end."),
        (_WHOLE, "eval_batches", 16, "Held-out batches of an evaluation."),
        (_WHOLE, "final_eval_batches", None, "Held-out batches of the evaluation at the end; --eval_batches."),
        (_WHOLE, "stop_after", None, "Stop after this step with a checkpoint; the same command without it goes on."),
        (_WHOLE, "checkpoint_every", 100, "Steps between checkpoints; one always comes at the end."),
        (_WHOLE, "keep_checkpoints", 2, "Checkpoints to keep."),
        (_YES_NO, "print_plan", False, "Show every GEMM's recipe, parameters, memory and FLOPs, and stop."),
        (_TEXT, "profile_steps", "", "FIRST:LAST steps to trace with the profiler, into the run's directory."),
        (_TEXT, "cache_dir", "~/.cache/q8jax", "For trained tokenizers, encoded corpora and compiled programs."),
    ],
}
_NAMES = commandline.names(_GROUPS)
_WHOLE_NAMES = [name for rows in _GROUPS.values() for kind, name, _, _ in rows if kind is _WHOLE]
_COUNTS = (
    *("steps", "batch_size", "seq_len", "accumulate"),
    *(
        "log_every",
        "telemetry_every",
        "eval_every",
        "eval_batches",
        "final_eval_batches",
        "checkpoint_every",
        "keep_checkpoints",
    ),
)


def define(chosen: flags.FlagValues = FLAGS) -> None:
    """Defines the flags; call once for each set of them."""
    commandline.define(chosen, _GROUPS)


def parse(argv: list[str], introduction: str = "") -> list[str]:
    """Parses a command line anew, as `commandline.parse` does."""
    return commandline.parse(FLAGS, _GROUPS, argv, introduction)


def usage(introduction: str) -> str:
    """What --help prints: every flag with its default."""
    return commandline.usage(FLAGS, _GROUPS, introduction)


@dataclasses.dataclass(frozen=True)
class Options:
    """A checked pretraining run, the vocabulary apart: that is known once the data is loaded.

    Attributes:
      flags: every flag of the run, by name, resolved.
      model: shapes, with the vocabulary still to be set.
      optimizer: AdamW and its schedule.
      phases: the precision, or its schedule.
      profile: (first, last) step to trace, or None.
      workdir: the run's directory, or its URL.
      stop_after: the step after which to leave, or None.
    """

    flags: dict[str, Any]
    model: TransformerConfig
    optimizer: OptimizerConfig
    phases: tuple[Phase, ...]
    profile: tuple[int, int] | None
    workdir: str
    stop_after: int | None = None

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
    def precision_flag(self) -> str:
        """The flag that says the precision, with its value, to open a message about it."""
        return f"--{'precision_schedule' if self.flags['precision_schedule'] else 'precision'}={self.label}"

    @property
    def may_change(self) -> tuple[str, ...]:
        """Flags that a resumed run may change; with --fallback not what is looked at, on which the run depends."""
        deciding = ("telemetry", "telemetry_every") if self.flags["fallback"] else ()
        return tuple(name for name in MAY_CHANGE if name not in deciding)

    @property
    def microbatch(self) -> int:
        """Rows of one microbatch, over all devices."""
        return self.flags["batch_size"] // self.flags["accumulate"]

    @property
    def cache(self) -> Path:
        return Path(self.flags["cache_dir"]).expanduser()

    def model_with(self, vocab: int) -> TransformerConfig:
        """The shapes with the vocabulary of the data."""
        return dataclasses.replace(self.model, vocab=vocab)

    def config(self, *, mesh: str, tokenizer: str, vocab: int, data_sha256: Mapping[str, str]) -> dict[str, Any]:
        """What config.json holds: every flag that is set, newer ones where they change anything, and every recipe.

        The arguments are what is resolved on devices and data.
        """
        recipes = [{"start": phase.start, "policy": str(phase.policy)} for phase in self.phases]
        resolved = {"mesh": mesh, "tokenizer": tokenizer, "vocab": vocab, "data_sha256": dict(data_sha256)}
        given = {name: value for name, value in self.flags.items() if value not in (None, _BEFORE.get(name))}
        return {**given, "recipes": recipes, **resolved}


def from_flags(config: Mapping[str, Any] | None = None, chosen: flags.FlagValues = FLAGS) -> Options:
    """Checks parsed flags.

    Args:
      config: of a run to repeat; gives the flags that the command line leaves out.
      chosen: the flags.

    Raises:
      ValueError: one sentence that names the flag and the fix.
    """
    values: dict[str, Any] = {name: chosen[name].value for name in _NAMES if name not in _NOT_OF_THE_RUN}
    given = given_flags(chosen)
    if {"precision", "precision_schedule"} <= given and values["precision_schedule"]:
        raise ValueError("--precision and --precision_schedule both say the precision: give one of them.")
    if config is not None:
        values.update(_from_config(config, given, chosen))
    # What a run is of is what the file says now, whatever it says later.
    values["precision"] = written_out(values["precision"])
    if values["final_eval_batches"] is None:
        values["final_eval_batches"] = values["eval_batches"]
    if not 0 <= values["init_perturbation"] < 1:
        raise ValueError(f"--init_perturbation={values['init_perturbation']} must be at least 0 and below 1.")
    if values["telemetry_every"] is None:
        # A look at tensors takes as long as two steps, at all of them as eight. With that of the first step it stays
        # under 3 % of a run as long as the interval.
        values["telemetry_every"] = 600 if {"binades", "gemms"} & set(values["telemetry"]) else 200
    for kind in values["telemetry"]:
        choices.check("--telemetry", kind, TELEMETRY)
    if fallback.parse(values["fallback"]) and "tensors" not in values["telemetry"]:
        raise ValueError(f"--fallback={values['fallback']} looks at tensors: add --telemetry=tensors.")
    if chosen.stop_after is not None:
        _at_least("stop_after", chosen.stop_after, 1)
    for name in _COUNTS:
        _at_least(name, values[name], 1)
    _at_least("seed", values["seed"], 0)
    for name in _WHOLE_NAMES:
        # What JAX can count, and what its keys tell apart.
        most = 2**32 - 1 if name == "seed" else 2**31 - 1
        if values.get(name) is not None and values[name] > most:
            raise ValueError(f"--{name}={values[name]} must be at most {most}.")
    if values["batch_size"] % values["accumulate"]:
        raise ValueError(f"--accumulate={values['accumulate']} must divide --batch_size={values['batch_size']}.")
    if values["warmup"] is None:
        values["warmup"] = values["steps"] // 10
    if values["decay"] is None:
        values["decay"] = OptimizerConfig.decay
    elif "decay" in given and values["schedule"] != "wsd":
        raise ValueError(f"--decay has no effect on --schedule={values['schedule']}: leave it out, or use wsd.")
    model = _model(values)
    values.update({name: getattr(model, name) for name in _SHAPES})
    return Options(
        flags=values,
        model=model,
        optimizer=OptimizerConfig(**{field.name: values[field.name] for field in dataclasses.fields(OptimizerConfig)}),
        phases=_phases(values),
        profile=_profile(values["profile_steps"], values["steps"]),
        workdir=_place(chosen.workdir or "runs/" + _name(values)),
        stop_after=chosen.stop_after,
    )


def fit_batch(devices: int) -> bool:
    """Unless --batch_size says another, makes it as many rows as devices divide in every microbatch.

    Returns:
      Whether that changed it.
    """
    default, each = FLAGS.batch_size, devices * FLAGS.accumulate
    if FLAGS["batch_size"].present or default % each == 0:
        return False
    FLAGS["batch_size"].value = each * -(-default // each)
    return True


def given_flags(chosen: flags.FlagValues = FLAGS) -> set[str]:
    """The names of this program's flags that stand on the command line."""
    return commandline.given(chosen, _GROUPS)


def repeats_config() -> bool:
    """Whether the command line leaves what --config computes as it is."""
    return given_flags() <= {*MAY_CHANGE, *_NOT_OF_THE_RUN}


# What a run did before there was such a flag, and so does without it: older runs are the same runs still.
_BEFORE = {"remat_keeps": "nothing"}
# The others are of the data, or of published models alone.
_SHAPES = [field.name for field in dataclasses.fields(TransformerConfig) if field.name in _NAMES]
# A flag on the command line makes these of the config obsolete.
_SUPERSEDES = {
    "precision": ["precision_schedule"],
    "model": _SHAPES,
    "heads": ["kv_heads"],
    "steps": ["warmup", "profile_steps"],
    "schedule": ["decay"],
    "telemetry": ["telemetry_every"],
    "eval_batches": ["final_eval_batches"],
    "batch_size": ["mesh"],
    "accumulate": ["mesh"],
}
# What --tokenizer=auto comes to; other data may bring another.
_AUTOMATIC_TOKENIZERS = ("bytes", "given")


def _from_config(config: Mapping[str, Any], given: set[str], chosen: flags.FlagValues) -> dict[str, Any]:
    flag = f"--config={chosen.config}"
    if "precision" not in config:
        raise ValueError(f"{flag} does not hold the flags of a run: give the config.json of one.")
    superseded = {name for by in given for name in _SUPERSEDES.get(by, [])}
    if "data" in given and config.get("tokenizer") in _AUTOMATIC_TOKENIZERS:
        superseded.add("tokenizer")
    values = {}
    for name, value in config.items():
        if name in _RESOLVED or name in given or name in superseded:
            continue
        choices.check(f"entry in {flag}", name, _NAMES)
        try:
            values[name] = chosen[name].parser.parse(value)
        except (TypeError, ValueError):
            kind = commandline.KINDS.get(chosen[name].flag_type(), "text")
            raise ValueError(f"{flag} gives {name} the value {value!r}, which must be {kind}: repair it.") from None
    return values


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"--{name}={value} must be at least {least}.")


def _model(values: dict[str, Any]) -> TransformerConfig:
    choices.check("--model", values["model"], SIZES)
    changes = {name: values[name] for name in _SHAPES if values[name] is not None}
    if "heads" in changes and "kv_heads" not in changes:
        changes["kv_heads"] = changes["heads"]
    return dataclasses.replace(SIZES[values["model"]], **changes)


def _phases(values: dict[str, Any]) -> tuple[Phase, ...]:
    quantize = tuple(values["quantize"])
    if values["precision_schedule"]:
        return schedule(values["precision_schedule"], values["steps"], quantize)
    return (resolve(values["precision"], quantize),)


def _profile(text: str, steps: int) -> tuple[int, int] | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= steps:
        raise ValueError(f"--profile_steps={text} must be FIRST:LAST with 1 <= FIRST <= LAST <= --steps={steps}.")
    return int(match[1]), int(match[2])


def _place(workdir: str) -> str:
    return workdir.rstrip("/") if is_url(workdir) else str(Path(workdir).expanduser())


def _name(values: dict[str, Any]) -> str:
    precision = values["precision_schedule"] or values["precision"]
    return re.sub(r"[^A-Za-z0-9_.=%-]+", "_", f"{values['model']}-{precision}-seed{values['seed']}")[:120]
