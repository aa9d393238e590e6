"""The roofline of a device, and where the contenders are under it (Williams, Waterman and Patterson 2009).

Of a program that moves B bytes for products of W FLOP, W/B is the intensity: no program is faster than the device's
peak, nor than its memory lets it be, W/B times the bandwidth. B is what the compiled program moves, so two contenders
differ in intensity where one of them reads and writes more for the same products.
"""

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks.results import Results, Roofs, peak
from experiments.benchmarks.timing import timed
from q8jax.devices import get_device

_REPEATS = 5
_COPIED_BYTES = 2**28
_MARKERS = "osD^vP*X"


def check_installed() -> None:
    """Raises ValueError where what draws is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--out draws the roofline, which needs another extra: pip install 'q8jax[figures]'.")


def roofs_of(device: jax.Device) -> Roofs:
    """From the data sheet where the device has an entry in q8jax.devices, else measured."""
    kind = device.device_kind
    entry = get_device(kind)
    if entry is not None:
        peaks = {name: found for name in ("BF16", "FP8", "INT8") if (found := peak(name, kind)) is not None}
        return Roofs(peaks, entry.bandwidth, "data sheet")
    return measured_roofs(2048 if device.platform == "cpu" else 8192, _COPIED_BYTES)


def measured_roofs(size: int, copied: int) -> Roofs:
    """The best of a few large products in 16 and 32 bits, and of a few passes over an array.

    Args:
      size: of the square products.
      copied: bytes of the array.
    """
    peaks = {}
    for kind, dtype in (("FP32", jnp.float32), ("BF16", jnp.bfloat16)):
        x = jax.random.normal(jax.random.key(0), (size, size), dtype)
        product = jax.jit(lambda x: lax.dot(x, x, preferred_element_type=jnp.float32))
        peaks[kind] = 2 * size**3 / _best(product, x)
    copy = jax.jit(jnp.negative)
    bandwidth = 2 * copied / _best(copy, jnp.zeros(copied // 4, jnp.float32))
    return Roofs(peaks, bandwidth, f"measured: products of {size}³, and a pass over {copied >> 20} MiB")


def _best(function: Callable, x: jax.Array) -> float:
    jax.block_until_ready(function(x))
    return min(timed(lambda: function(x)) for _ in range(_REPEATS))


def draw(results: Results, folder: Path) -> None:
    """Writes roofline.svg and roofline.png."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    roofs = results.roofs
    assert roofs is not None
    figure: Any = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for m in results.measurements for name in m.seconds))
    points = [(m.intensity(name), m.rate(name)) for m in results.measurements for name in m.seconds]
    ridges = [height / roofs.bandwidth for height in roofs.peaks.values()]
    at = [intensity for intensity, _ in points] + ridges
    intensities = np.geomspace(min(at) / 2, max(at) * 2, 200)
    for kind, height in roofs.peaks.items():
        axes.plot(intensities, np.minimum(intensities * roofs.bandwidth, height), color="0.5", lw=1)
        axes.annotate(kind, (intensities[-1], height), ha="right", va="bottom", color="0.3")
    # Past ten colours, hollow.
    fills = ["full" if i < 10 else "none" for i in range(len(names))]
    looks: dict[str, dict[str, Any]]
    looks = {name: {"color": f"C{i % 10}", "fillstyle": fill} for i, (name, fill) in enumerate(zip(names, fills))}
    markers = dict(zip((m.work for m in results.measurements), itertools.cycle(_MARKERS)))
    for measurement in results.measurements:
        for name in measurement.seconds:
            where = measurement.intensity(name), measurement.rate(name)
            axes.plot(*where, markers[measurement.work], **looks[name])
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP for each byte that the compiled program moves",
        ylabel="FLOP/s of one device",
        title=f"--level={results.level} on {results.device_kind}; roofs: {roofs.source}",
    )
    axes.grid(True, which="both", alpha=0.2)
    keys = [Line2D([], [], marker="o", ls="", label=name, **look) for name, look in looks.items()]
    keys += [Line2D([], [], marker=marker, ls="", color="0.3", label=work) for work, marker in markers.items()]
    figure.legend(handles=keys, loc="outside right upper", fontsize="small")
    figure.savefig(folder / "roofline.svg", metadata={"Date": None})
    figure.savefig(folder / "roofline.png", dpi=120)
