"""Training steps of q8jax, of plain Flax and of the incumbents, side by side.

    python -m experiments.benchmark
    python -m experiments.benchmark --target=h100

The first times the step of `experiments.contenders` on this machine. Rounds are interleaved and begin with another
contender each time, so that drift of a shared machine meets all alike; what counts is the ratio to plain Flax bf16,
taken within each round. The second compiles the step for devices that need not be there (see `experiments.audit`), the
batch split over them, and counts: which products run, bytes, kernels, memory, and on TPUs the compiler's own estimate
of cycles. Incumbents need the extra q8jax[incumbents] and are left out without it.
"""

import functools
import sys
import time
import warnings
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import q8jax
from experiments.contenders import CONTENDERS, REFERENCE, Contender, Shapes, Step
from experiments.targets import Target, target
from experiments.training.mesh import Placement

# What the step is where it is timed, and where it is compiled for others: a laptop's work, and a part of a large model.
_HERE = Shapes(layers=4, width=512, hidden=2048, tokens=2048)
_ELSEWHERE = Shapes(layers=2, width=4096, hidden=16384, tokens=8192)


class Training:
    """A compiled training step with its variables."""

    def __init__(self, contender: Contender, shapes: Shapes):
        keys = jax.random.split(jax.random.key(0), 2)
        x, target = (jax.random.normal(key, (shapes.tokens, shapes.width)) for key in keys)
        step = Step(contender, shapes)
        self._batch = x, target
        self._variables = jax.jit(step.calibrate)(jax.jit(step.init)(x), *self._batch)
        self._step = jax.jit(step, donate_argnums=0).lower(self._variables, *self._batch).compile()

    def run(self) -> tuple[float, float]:
        """Takes a step; returns its wall-clock seconds and its loss."""
        start = time.perf_counter()
        value, self._variables = self._step(self._variables, *self._batch)
        jax.block_until_ready(self._variables)
        return time.perf_counter() - start, float(value)


def measure(names: Sequence[str], shapes: Shapes, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and losses of the named contenders, each float64 [contenders, rounds]; a first round is not counted."""
    trainings = [Training(CONTENDERS[name], shapes) for name in names]
    results = np.empty((2, len(names), rounds + 1))
    for i in range(rounds + 1):
        for j in np.roll(np.arange(len(names)), -i):
            results[:, j, i] = trainings[j].run()
    return results[0, :, 1:], results[1, :, 1:]


def table(names: Sequence[str], seconds: np.ndarray, losses: np.ndarray) -> str:
    """A Markdown table of what `measure` returns; ratios are to REFERENCE, which is among the names."""
    ratios = seconds / seconds[list(names).index(REFERENCE)]
    lines = ["| step of | ms, median | ratio to flax bf16, median (quartiles) | last loss |", "|---|---|---|---|"]
    for name, times, ratio, loss in zip(names, seconds, ratios, losses, strict=True):
        low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
        cells = f"{np.median(times) * 1e3:.0f}", f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{loss[-1]:.4f}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compiled_for(contender: Contender, shapes: Shapes, goal: Target, asked: str | None = None) -> q8jax.Report:
    """The audit of a contender's step, compiled for a target whose devices take `shapes.tokens` rows each.

    Args:
      contender, shapes, goal: which step, how large, and for what.
      asked: as `q8jax.audit` takes it.
    """
    placement = Placement(goal.devices)
    rows = shapes.tokens * placement.size
    x = jax.ShapeDtypeStruct((rows, shapes.width), jnp.bfloat16, sharding=placement.rows)
    step = Step(contender, shapes)
    on_devices = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement.replicated)
    variables = jax.tree.map(on_devices, jax.eval_shape(step.init, x))
    lowered = placement.lower(step, variables, x, donate=(0,))
    return q8jax.audit(lowered, lowered.compile(compiler_options=dict(goal.options)), asked=asked)


def table_of_programs(reports: Mapping[str, q8jax.Report]) -> str:
    """A Markdown table of what `compiled_for` returns, by contender; ratios are to REFERENCE, which is among them."""
    heads = "step of", "products", "GB moved", "ratio", "kernels", "GB of temporaries", "10⁶ cycles", "ratio"
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    reference = reports[REFERENCE].costs
    for name, report in reports.items():
        whole = report.costs
        kinds: dict[str, int] = {}
        for gemm in report.gemms:
            kinds[gemm.executed_by] = kinds.get(gemm.executed_by, 0) + gemm.times
        cells = [", ".join(f"{count} {kind}" for kind, count in kinds.items())]
        cells += [f"{whole.bytes / 1e9:.2f}", f"{whole.bytes / reference.bytes:.2f}", str(whole.kernels)]
        cells += ["" if report.temp_bytes is None else f"{report.temp_bytes / 1e9:.2f}"]
        if whole.estimated_cycles is None or not reference.estimated_cycles:
            cells += ["", ""]
        else:
            cells += [
                f"{whole.estimated_cycles / 1e6:.1f}",
                f"{whole.estimated_cycles / reference.estimated_cycles:.2f}",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines this program's flags; not on import, so that programs can share a process and flag names."""
    whole = functools.partial(flags.DEFINE_integer, lower_bound=1, flag_values=values)
    flags.DEFINE_string(
        "target", "", "What to compile for, as in experiments.audit; empty to time.", flag_values=values
    )
    whole("layers", None, f"Residual blocks; {_HERE.layers}, for a target {_ELSEWHERE.layers}.")
    whole("width", None, f"Width of the residual stream; {_HERE.width}, for a target {_ELSEWHERE.width}.")
    whole("hidden", None, f"Hidden width; {_HERE.hidden}, for a target {_ELSEWHERE.hidden}.")
    whole("tokens", None, f"Rows of a device's batch; {_HERE.tokens}, for a target {_ELSEWHERE.tokens}.")
    whole("rounds", 20, "Timed steps of each contender.")
    names = ", ".join(CONTENDERS)
    flags.DEFINE_list("contenders", [], f"Beside {REFERENCE}; all if empty: {names}.", flag_values=values)
    is_known = lambda chosen: set(chosen) <= set(CONTENDERS)
    flags.register_validator("contenders", is_known, f"choose some of {names}.", flag_values=values)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected argument {argv[1]!r}: this program takes flags only.")
    logging.set_verbosity(logging.ERROR)  # JAX logs every backend that is not installed
    warnings.filterwarnings("ignore", module="qwix|aqt")
    values = flags.FLAGS
    chosen = [name for name in CONTENDERS if name in (values.contenders or CONTENDERS) or name == REFERENCE]
    names = [name for name in chosen if CONTENDERS[name].is_installed]
    if missing := [name for name in chosen if name not in names]:
        print(f"Left out, for want of pip install 'q8jax[incumbents]': {', '.join(missing)}.\n")
    usual = _ELSEWHERE if values.target else _HERE
    shapes = Shapes(*(values[name].value or getattr(usual, name) for name in ("layers", "width", "hidden", "tokens")))
    if not values.target:
        print(table(names, *measure(names, shapes, values.rounds)))
        print(f"\n{values.rounds} rounds of {shapes} on {jax.devices()[0].device_kind}, jax {jax.__version__}.")
        return 0
    try:
        goal = target(values.target)
    except ValueError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    print(table_of_programs({name: compiled_for(CONTENDERS[name], shapes, goal) for name in names}))
    devices = f"{len(goal.devices)} × {goal.devices[0].device_kind}"
    print(f"\n{shapes} on each of {devices}, compiled by jax {jax.__version__}; counted for one of them.")
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
