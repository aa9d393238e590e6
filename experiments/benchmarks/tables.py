"""The Markdown of a benchmark's results."""

from collections.abc import Callable, Iterable, Sequence

from experiments.benchmarks.contenders import OWN_REFERENCE
from experiments.benchmarks.results import Measurement, Results, pays_from, total

Cell = Callable[[str], str]


def markdown(results: Results) -> str:
    """Tables for a person, with what they were made on and by."""
    parts = _TABLES[results.level](results) if results.rounds else [_programs(results.measurements[0])]
    parts += [_failures([*results.measurements, *results.sweep]), *results.notes, _made(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _gemms(results: Results) -> list[str]:
    whole = total("all", results.measurements)
    columns = _times(whole) | {f"{part.work}, ratio": _ratio(part) for part in results.measurements}
    columns |= _work(whole, results.device_kind)
    shapes = "; ".join(f"{m.work} {m.sizes['inputs']} → {m.sizes['outputs']}" for m in results.measurements)
    title = f"The {3 * len(results.measurements)} GEMMs of a layer on {whole.sizes['tokens']} tokens: {shapes}."
    parts = [title, _table("GEMMs of", columns, whole.seconds)]
    if not results.sweep:
        return parts
    # The largest is what most contenders do.
    names = list(dict.fromkeys(name for m in reversed(results.sweep) for name in m.seconds))
    columns = {part.work: _ratio(part) for part in results.sweep}
    columns["pays from"] = lambda name: _pays(results.sweep, name)
    reference = results.sweep[0].reference
    title = (
        f"Square products, forward and backward: time against {reference} by size, medians. A contender pays from the "
        "size on which the upper quartile of its ratios stays below 1."
    )
    return [*parts, title, _table("products of", columns, names)]


def _ratio(found: Measurement) -> Cell:
    return lambda name: f"{found.ratio(name).middle:.2f}" if name in found.seconds else "–"


def _pays(sweep: Sequence[Measurement], name: str) -> str:
    if name == sweep[0].reference:
        return ""
    return pays_from(sweep, name) or f"never, from {sweep[0].work} to {sweep[-1].work}"


def _layers(results: Results) -> list[str]:
    (found,) = results.measurements
    loss = lambda name: "not finite" if (last := found.losses[name][-1]) is None else f"{last:.4f}"
    columns = _times(found) | {"last loss": loss}
    columns |= _work(found, results.device_kind)
    return [_table("step of", columns, found.seconds)]


def _steps(results: Results) -> list[str]:
    (found,) = results.measurements
    columns = _times(found) | {"tokens/s": lambda name: f"{found.sizes['tokens'] / found.median(name):,.0f}"}
    columns |= {"GB of memory": lambda name: _significant(found.programs[name].memory_bytes)}
    columns |= _work(found, results.device_kind)
    return [_table("step in", columns, found.seconds)]


def _scaling(results: Results) -> list[str]:
    columns: dict[str, Cell] = {}
    for found in results.measurements:
        columns |= _of_mesh(found)
    names = dict.fromkeys(name for found in results.measurements for name in found.seconds)
    return [_table("step on", columns, names)]


def _of_mesh(found: Measurement) -> dict[str, Cell]:
    """Empty cells for what is there in another precision alone."""
    cells: dict[str, Cell] = {
        "ms, median": lambda name: _three_digits(found.median(name) * 1e3),
        f"ratio to {found.reference}, median (quartiles)": lambda name: str(found.ratio(name)),
        "GB of memory": lambda name: _significant(found.programs[name].memory_bytes),
    }
    where_there = lambda cell: lambda name: cell(name) if name in found.seconds else "–"
    return {f"{found.work}: {title}": where_there(cell) for title, cell in cells.items()}


_TABLES = {"gemm": _gemms, "layer": _layers, "step": _steps, "scaling": _scaling}


def _programs(found: Measurement) -> str:
    """Of what was compiled and not run."""
    programs = found.programs
    reference = programs[found.reference]

    def cycles(name: str) -> str:
        count = programs[name].estimated_cycles
        return "" if count is None else f"{count / 1e6:.1f}"

    def cycles_ratio(name: str) -> str:
        count = programs[name].estimated_cycles
        return "" if count is None or not reference.estimated_cycles else f"{count / reference.estimated_cycles:.2f}"

    units = lambda name: ", ".join(f"{count} {unit}" for unit, count in programs[name].units.items())
    columns: dict[str, Cell] = {
        "products": units,
        "multiplied": lambda name: str(programs[name]),
        "GB moved": lambda name: _giga(programs[name].bytes),
        "ratio": lambda name: f"{programs[name].bytes / reference.bytes:.2f}",
        "kernels": lambda name: str(programs[name].kernels),
        "GB of temporaries": lambda name: _giga(programs[name].temp_bytes),
        "10⁶ cycles": cycles,
        "cycles, ratio": cycles_ratio,
    }
    return _table("step of", columns, programs)


def _times(found: Measurement) -> dict[str, Cell]:
    """First against our own products in 16 bits, which have all of q8jax but the quantization."""
    columns: dict[str, Cell] = {"ms, median": lambda name: _three_digits(found.median(name) * 1e3)}
    for reference in dict.fromkeys((OWN_REFERENCE, found.reference)):
        if reference in found.seconds:
            ratio = lambda name, reference=reference: str(found.ratio(name, reference))
            columns[f"ratio to {reference}, median (quartiles)"] = ratio
    return columns


def _work(found: Measurement, device_kind: str) -> dict[str, Cell]:
    def share(name: str) -> str:
        part = found.share_of_peak(name, device_kind)
        return "–" if part is None else f"{part:.0%}"

    return {
        "TFLOP/s": lambda name: _three_digits(found.rate(name) / 1e12),
        "of the chip's peak": share,
        "FLOP/byte": lambda name: f"{found.intensity(name):.0f}",
        "multiplied": lambda name: str(found.programs[name]),
    }


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _table(corner: str, columns: dict[str, Cell], names: Iterable[str]) -> str:
    lines = [f"| {corner} | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    lines += [f"| {name} | {' | '.join(cell(name) for cell in columns.values())} |" for name in names]
    return "\n".join(lines)


def _giga(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f}"


def _significant(count: int | None) -> str:
    return "–" if count is None else _three_digits(count / 1e9)


def _failures(measurements: Iterable[Measurement]) -> str:
    lines = [
        f"- {name} does not run ({found.work}): {reason}"
        for found in measurements
        for name, reason in found.failures.items()
    ]
    return "\n".join(lines)


def _made(results: Results) -> str:
    """By which command, on what."""
    environment = results.environment
    devices, cpu, versions = (environment[name] for name in ("devices", "cpu", "versions"))
    count = max((m.devices for m in (*results.measurements, *results.sweep)), default=1)
    where = f"{count} × {results.device_kind}"
    if devices["platform"] == "cpu" and results.rounds:
        where += f" ({cpu['model']}, {cpu['cores']} cores)"
    how = f"{results.rounds} rounds" if results.rounds else "compiled, not run, counted for one device,"
    return f"`{environment['command']}`: {how} on {where}, jax {versions['jax']}."
