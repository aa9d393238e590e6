"""A comparison as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

_HEADER = ("", "seeds", "diverged", "loss", "nats", "%", "95 % interval", "upper 95 %", "tokens/s", "spikes", "verdict")


def table(comparison: Mapping[str, Any]) -> str:
    """A row per precision, what chance alone does, and what is missing, as lines."""
    from q8jax.report import aligned

    entries = comparison["precisions"]
    rows = [_HEADER, *(_row(name, entry) for name, entry in entries.items())]
    lines = [f"{comparison['metric']} compared by seed with that of {comparison['baseline']}", "", *aligned(rows), ""]
    if any(entry["tokens_per_second"] and not entry["timing_valid"] for entry in entries.values()):
        lines.append("* not known to have had the machine to itself, in one go: no timing to rely on.")
    return "\n".join([*lines, *_noise(comparison["noise"]), *comparison["missing"]]).rstrip()


def _row(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    speed, interval = entry["tokens_per_second"], entry["ci95"]
    return (
        name,
        str(entry["seeds"]),
        str(entry["diverged"]),
        _number(entry["loss"], ".4f"),
        _number(entry["delta_nats"], "+.4f"),
        _number(entry["delta_percent"], "+.3f"),
        "-" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}",
        _number(entry["upper95"], "+.3f"),
        _number(speed, ",.0f") + "*" * (speed is not None and not entry["timing_valid"]),
        str(entry["spikes"]),
        verdict(entry),
    )


def verdict(entry: Mapping[str, Any]) -> str:
    """The verdict of an entry of comparison.json with what has to be said beside it; its role where there is none."""
    if entry["verdict"] is None:
        return entry["role"]
    if (done := len(entry["judged"])) < entry["planned"]:
        return f"{entry['verdict']} so far, with {done} of {entry['planned']} seeds"
    added = ", with seeds that were added after a look" if entry["extended"] else ""
    late = ", planned after a look at others on these seeds" if entry["late"] else ""
    return _explained(entry) + added + late


def _explained(entry: Mapping[str, Any]) -> str:
    verdict = entry["verdict"]
    if entry["role"] == "control":
        return f"{verdict}, as it must be" if entry["fails"] else f"{verdict}, but must be worse"
    if entry["seeds_needed"] is not None:
        return f"{verdict}: {entry['seeds_needed']:,} seeds would settle it"
    if verdict == "not enough evidence" and entry["sd_percent"] and not entry["diverged"]:
        return f"{verdict}, nor would there be with 10,000 seeds"
    if entry["seeds_needed_strict"] is not None:
        return f"{verdict}; strict parity would take {entry['seeds_needed_strict']:,} seeds"
    return verdict


def _noise(noise: Mapping[str, Any]) -> list[str]:
    paired, unpaired = noise["paired"], noise["unpaired"]
    lines = []
    if paired is not None:
        lines.append(f"Chance alone, paired ({paired['arm']}): {_spread(paired)}.")
    if unpaired is not None:
        lines.append(f"Chance alone, from seed to seed: {_spread(unpaired)}.")
    if noise["gain"] is not None:
        lines.append(f"To see no more than that, it would take {noise['gain']:,.3g} times as many seeds without pairs.")
    return lines


def _spread(floor: Mapping[str, Any]) -> str:
    low, high = floor["sd_percent_ci95"]
    return f"standard deviation {floor['sd_percent']:.3f} % ({low:.3f} to {high:.3f}), {floor['seeds']} seeds"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
