"""Training in 8 bits against 16, of q8jax, plain Flax and the incumbents: products, a layer, the whole step.

    python -m experiments.benchmark                  # the training step of an MLP, every contender's
    python -m experiments.benchmark --target=h100    # the same, compiled for what need not be there, and counted
    python -m experiments.benchmark --level=gemm     # the GEMMs of a layer, quantization included, and square ones
    python -m experiments.benchmark --level=step --model=1b --remat    # the step of experiments.pretrain, by precision
    python -m experiments.benchmark --level=scaling  # the same on 1, 2, 4, … devices, which share the work

Contenders take turns, and each round begins with another one, so that drift of a shared machine meets all alike; what
counts is the ratio to the reference, taken within each round. Each contender's program is audited, and the table says
what it multiplied. Incumbents need the extra q8jax[incumbents] and are left out without it.

    --level=LEVEL       gemm, layer, step or scaling (default: layer)
    --rounds=N          timed runs of each contender (default: 20)
    --out=DIR           write benchmark.md, benchmark.json and roofline.svg and .png there

Of gemm and layer:
    --contenders=A,B    beside flax bf16 (default: all that fit the level)
    --tokens=N --width=N --hidden=N    of the layer (default: by level and device)
Of gemm:
    --sizes=N,M         of the square products; --sizes= leaves them out (default: by device)
Of layer:
    --layers=N          residual blocks
    --target=NAME       what to compile for, as in experiments.audit, instead of timing
Of step and scaling, which also have pretrain's flags of the model, the batch and the optimizer:
    --precisions=A,B    as pretrain's --precision (default: bf16,fp8,int8); a step in others is compared with the first
    --vocab=N           size of the vocabulary (default: as --model has it, 256)
Of scaling, which needs several devices (on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8):
    --axes=A,B          of the mesh, each of which takes all devices by itself (default: data,fsdp)
"""

import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from experiments import options
from experiments.benchmarks import gemms, layers, roofline, scaling, steps
from experiments.benchmarks.contenders import CONTENDERS, REFERENCE
from experiments.benchmarks.results import Measurement, Results, check_folder
from experiments.benchmarks.tables import markdown
from experiments.runs.environment import environment
from experiments.targets import target
from q8jax.devices import get_device

FLAGS = flags.FLAGS

# What is measured where nothing else is said: a laptop's work, and that of large models.
_LAYER = {"layers": 4, "width": 512, "hidden": 2048, "tokens": 2048}
_LAYER_ELSEWHERE = {"layers": 2, "width": 4096, "hidden": 16384, "tokens": 8192}
_GEMM = {"tokens": 512, "width": 256, "hidden": 1024}
_GEMM_OF_TRANSFORMER_ENGINE = {"tokens": 15872, "width": 4096, "hidden": 16384}
_SIZES = ["128", "256", "512", "1024"]
_SIZES_OF_ACCELERATORS = ["256", "512", "1024", "2048", "4096", "8192"]

# Flags that not every level has.
_OF_LEVEL = {
    "gemm": ("contenders", "tokens", "width", "hidden", "sizes"),
    "layer": ("contenders", "tokens", "width", "hidden", "layers", "target"),
    "step": ("precisions", "vocab"),
    "scaling": ("precisions", "vocab", "axes"),
}
_OF_PRETRAIN = ("step", "scaling")
_CONTENDERS = {
    "gemm": [name for name in CONTENDERS if "fp32" not in name] + list(gemms.PREQUANTIZED),
    "layer": [name for name in CONTENDERS if name not in ("q8jax fp8-current", "q8jax fp8-row", "q8jax fp8-block")],
}


def define_flags() -> None:
    """Defines this program's flags beside those of pretrain, with which it shares --layers."""
    flags.DEFINE_enum("level", "layer", list(_OF_LEVEL), "What to measure.")
    flags.DEFINE_integer("rounds", 20, "Timed runs of each contender.", lower_bound=1)
    flags.DEFINE_string("out", "", "Folder to write results to.")
    flags.DEFINE_list("contenders", [], "Beside the reference; all if empty.")
    for name, text in (("tokens", "Rows."), ("width", "Of the residual stream."), ("hidden", "Hidden width.")):
        flags.DEFINE_integer(name, None, text, lower_bound=1)
    flags.DEFINE_list("sizes", None, "Of the square products.")
    flags.DEFINE_string("target", "", "What to compile for; empty to time.")
    flags.DEFINE_list("precisions", ["bf16", "fp8", "int8"], "Of the step.")
    flags.DEFINE_list("axes", ["data", "fsdp"], "Of the mesh.")
    flags.DEFINE_integer("vocab", None, "Size of the vocabulary.", lower_bound=1)


def main(argv: list[str]) -> int:
    """Measures what the flags say; returns the exit code."""
    del argv
    warnings.filterwarnings("ignore", module="qwix|aqt")
    out = Path(FLAGS.out).expanduser() if FLAGS.out else None
    try:
        _check_flags()
        if out is not None:
            check_folder(out)
            roofline.check_installed()
        results = _LEVELS[FLAGS.level](out is not None)
    except ValueError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    text = markdown(results)
    print(text, end="", flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "benchmark.json").write_text(results.to_json())
        (out / "benchmark.md").write_text(text)
        if results.roofs is not None:
            roofline.draw(results, out)
    return 0


def _check_flags() -> None:
    """Raises ValueError for a flag that the level has no use for."""
    level = FLAGS.level
    of_others = {name for names in _OF_LEVEL.values() for name in names} - set(_OF_LEVEL[level])
    unused = {name for name in of_others if FLAGS[name].present}
    if level not in _OF_PRETRAIN:
        unused |= options.given_flags() - set(_OF_LEVEL[level])
    elif {"precision", "precision_schedule"} & options.given_flags():
        raise ValueError("--precision is one: give --precisions, as in --precisions=bf16,fp8.")
    elif not FLAGS.precisions:
        raise ValueError("--precisions names none: give at least one, as in --precisions=bf16,fp8.")
    else:
        unused.discard("layers")
    if level == "scaling":
        unused |= options.given_flags() & {"mesh", "telemetry"}
    if unused:
        raise ValueError(f"--{min(unused)} has no effect at --level={level}: leave it out.")


def _names(notes: list[str]) -> list[str]:
    """The contenders to measure; notes those that are not installed."""
    known = _CONTENDERS[FLAGS.level]
    extra = [name for name in CONTENDERS if name not in known]
    for name in FLAGS.contenders:
        if name not in (*known, *extra):
            raise ValueError(f"--contenders={name} is none at --level={FLAGS.level}: choose of {', '.join(known)}.")
    wanted = {REFERENCE, *(FLAGS.contenders or known)}
    chosen = [name for name in (*known, *extra) if name in wanted]
    missing = [name for name in chosen if name in CONTENDERS and not CONTENDERS[name].is_installed]
    if missing:
        notes.append(f"Left out, for want of pip install 'q8jax[incumbents]': {', '.join(missing)}.")
    return [name for name in chosen if name not in missing]


def _sizes(defaults: dict[str, int]) -> dict[str, int]:
    return {name: FLAGS[name].value or default for name, default in defaults.items()}


def _results(
    measurements: list[Measurement], notes: list[str], *, draws: bool, sweep: Sequence[Measurement] = ()
) -> Results:
    """Of what ran here; notes what it was."""
    device = jax.devices()[0]
    roofs = roofline.roofs_of(device) if draws else None
    kind = device.device_kind
    return Results(FLAGS.level, kind, FLAGS.rounds, _environment(), measurements, list(sweep), notes, roofs)


def _environment() -> dict[str, Any]:
    command = shlex.join(["python", "-m", "experiments.benchmark", *sys.argv[1:]])
    return {"command": command} | {n: value for n, value in environment().items() if n not in ("argv", "git")}


def _gemm(draws: bool) -> Results:
    notes: list[str] = []
    names = _names(notes)
    kind = jax.devices()[0].device_kind
    is_known = get_device(kind) is not None
    usual = _GEMM_OF_TRANSFORMER_ENGINE if is_known else _GEMM
    sizes = _sizes(usual)
    if not is_known and sizes == usual:
        large = " ".join(f"--{name}={value}" for name, value in _GEMM_OF_TRANSFORMER_ENGINE.items())
        notes.append(f"These are small sizes, because {kind} is no known accelerator; Transformer Engine's: {large}.")
    squares = (_SIZES_OF_ACCELERATORS if is_known else _SIZES) if FLAGS.sizes is None else FLAGS.sizes
    if not all(size.isdigit() and int(size) for size in squares):
        raise ValueError(f"--sizes={','.join(squares)} must be whole numbers above 0, as in --sizes=256,512.")
    measure = lambda product: gemms.measure(names, product, FLAGS.rounds)
    measurements = [measure(product) for product in gemms.of_a_layer(sizes["tokens"], sizes["width"], sizes["hidden"])]
    sweep = [measure(gemms.square(size)) for size in sorted(map(int, squares))]
    notes.append("Activations and incoming gradients are bfloat16, weights and their gradients float32.")
    return _results(measurements, notes, draws=draws, sweep=sweep)


def _layer(draws: bool) -> Results:
    notes: list[str] = []
    names = _names(notes)
    shapes = layers.Shapes(**_sizes(_LAYER_ELSEWHERE if FLAGS.target else _LAYER))
    notes.append("Of " + ", ".join(f"{name} {value}" for name, value in vars(shapes).items()) + " on each device.")
    if not FLAGS.target:
        return _results([layers.measure(names, shapes, FLAGS.rounds)], notes, draws=draws)
    goal = target(FLAGS.target)
    counted = layers.count(names, shapes, goal)
    return Results("layer", goal.devices[0].device_kind, 0, _environment(), [counted], notes=notes)


def _step(draws: bool) -> Results:
    found = steps.measure(FLAGS.precisions, FLAGS.rounds, FLAGS.vocab)
    notes = [", ".join(f"{name} {value:,}" for name, value in found.sizes.items()) + "."]
    memory = "Memory is what the compiled step needs on each device: arguments, results and temporaries."
    # The allocator's peak is that of the process, and the precisions share one.
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if known := [peak for peak in peaks if peak is not None]:
        memory += f" The allocator's peak, over all precisions, was {max(known) / 1e9:.3g} GB."
    notes.append(memory)
    return _results([found], notes, draws=draws)


def _scaling(draws: bool) -> Results:
    measurements = [scaling.measure(name, FLAGS.axes, FLAGS.rounds, FLAGS.vocab) for name in FLAGS.precisions]
    notes = [", ".join(f"{name} {value:,}" for name, value in measurements[0].sizes.items()) + " on every mesh."]
    if jax.default_backend() == "cpu":
        notes.append(
            "Host devices share the cores that one device has to itself: 1 would be perfect, and what is above is what "
            "partitioning costs."
        )
    # What the processor could do at best is the same for all of them.
    return _results(measurements, notes, draws=False)


_LEVELS: dict[str, Callable[[bool], Results]] = {"gemm": _gemm, "layer": _layer, "step": _step, "scaling": _scaling}


if __name__ == "__main__":
    options.define()
    define_flags()
    app.run(main, flags_parser=lambda argv: options.parse(argv, __doc__ or ""))
