"""What a model's layers are given, batch by batch.

While a model runs under `jit`, each layer hands its inputs to the host, also from within a scan over stacked layers,
and what is wanted of them is updated there: sums, ranges, a sample. So one pass over the batches serves all layers, and
of no batch more is kept than that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import io_callback

from q8jax import ptq
from q8jax.contraction import contractions, to_matrices
from q8jax.einsum import as_dot
from q8jax.nnx.layers import kernel_shape, layers_of

SAMPLE = 512


@dataclasses.dataclass
class Seen:
    """What is kept of one layer's inputs, or of one of a stack.

    Attributes:
      inputs: sums; None where no method needs them.
      ranges: of the calibrator; None where scales are not static.
      sample: float32 [rows, in], rows of every batch.
      low, high: float32 [in], the range of each channel, zero included.
    """

    inputs: ptq.Inputs | None
    ranges: Any
    sample: list[np.ndarray]
    low: np.ndarray
    high: np.ndarray

    @property
    def rows(self) -> jax.Array:
        return jnp.asarray(np.concatenate(self.sample))


def depth_of(layer: Any) -> int:
    """How many layers a stack is; 1 of one that is none."""
    return int(np.prod(layer.kernel[...].shape[: layer.kernel[...].ndim - len(kernel_shape(layer) or ())]))


@contextlib.contextmanager
def _handing_over(model: nnx.Module, paths: Iterable[str], take: Callable[[str, np.ndarray], None]) -> Iterator[None]:
    """Context in which these layers give their inputs, [..., in], to `take`."""
    layers = layers_of(model)
    before = []
    for path in paths:
        layer = layers[path]
        name = "einsum_op" if isinstance(layer, nnx.Einsum) else "dot_general"
        if isinstance(layer, nnx.Conv):
            name = "conv_general_dilated"
        original = getattr(layer, name)
        before.append((layer, name, original))
        setattr(layer, name, nnx.static(_Handing(layer, original, functools.partial(take, path))))
    try:
        yield
    finally:
        for layer, name, original in before:
            setattr(layer, name, nnx.data(original) if isinstance(original, nnx.Module) else nnx.static(original))


class _Handing:
    """A product that hands its left operand over before it multiplies."""

    def __init__(self, layer: Any, product: Any, take: Callable[[np.ndarray], None]):
        self._product, self._take = product, take
        self._shape, self._is_product = kernel_shape(layer) or (), not isinstance(layer, nnx.Conv)

    def __call__(self, *args: Any, **options: Any) -> jax.Array:
        rows = self._rows(*args) if self._is_product else args[0]
        io_callback(self._take, None, rows.astype(jnp.float32), ordered=True)
        return self._product(*args, **options)

    def _rows(self, *args: Any) -> jax.Array:
        """The left operand of a product as [..., in], in the order of the kernel's matrix."""
        if isinstance(args[0], str):
            subscripts, lhs = args[:2]
            plan = as_dot(subscripts, lhs.shape, self._shape)
            lhs = jnp.sum(lhs, plan.lhs_summed) if plan.lhs_summed else lhs
            numbers = plan.dimension_numbers
        else:
            lhs, _, numbers = args[:3]
        axes = contractions(lhs.shape, self._shape, numbers)["fwd"].first
        if axes.batch:
            return to_matrices(lhs, (axes.batch, axes.free, axes.contracting))
        rows = jnp.transpose(lhs, (*axes.free, *axes.contracting))
        return rows.reshape(*rows.shape[: len(axes.free)], -1)


def record(
    run: Callable[[nnx.Module, Mapping[str, Any]], Any],
    model: nnx.Module,
    batches: Iterable[Mapping[str, np.ndarray]],
    paths: Iterable[str],
    *,
    calibrators: Mapping[str, ptq.Calibrator],
    inverses: Mapping[tuple[str, int], jax.Array],
    sums: bool,
    batch_count: int,
) -> dict[tuple[str, int], Seen]:
    """Runs a model over batches, and returns what its layers were given, by path and depth.

    Args:
      run: calls the model with a batch.
      model: as it is to be quantized.
      batches: rows with `mask`, [B, T], where inputs have tokens.
      paths: of layers.
      calibrators: by path, of those whose scales are static.
      inverses: what inputs of a layer are multiplied with before they are calibrated.
      sums: whether sums are kept.
      batch_count: how many batches there are, of which each gives its part of the sample.
    """
    paths = list(paths)
    layers = layers_of(model)
    depths = {path: depth_of(layers[path]) for path in paths}
    found: dict[tuple[str, int], Seen] = {}
    calls: dict[str, list[np.ndarray]] = {path: [] for path in paths}
    rng = np.random.default_rng(0)

    with _handing_over(model, paths, lambda path, x: calls[path].append(np.asarray(x))):
        graphdef, state = nnx.split(model)
        forward = jax.jit(lambda state, batch: run(nnx.merge(graphdef, state), batch))
        for batch in batches:
            jax.block_until_ready(forward(state, batch))
            jax.effects_barrier()
            for path, given in calls.items():
                for call, x in enumerate(given):
                    key = path, call % depths[path]
                    if key not in found:
                        zeros = np.zeros((2, x.shape[-1]), np.float32)
                        of_ranges = calibrators[path].init() if path in calibrators else None
                        found[key] = Seen(ptq.inputs.init(x.shape[-1]) if sums else None, of_ranges, [], *zeros)
                    rows = _rows(x, batch.get("mask"))
                    _add(found[key], rows, calibrators.get(path), inverses.get(key))
                    kept = np.flatnonzero(np.isfinite(rows[:, 0]))
                    count = min(len(kept), -(-SAMPLE // batch_count))
                    found[key].sample.append(rows[np.sort(rng.choice(kept, count, replace=False))])
                given.clear()
    return found


def _rows(x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """[rows, in]; those of padding are NaN, which nothing counts."""
    if mask is not None and x.shape[:2] == mask.shape:
        x = np.where(np.asarray(mask)[..., None].reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, np.float32(np.nan))
    return x.reshape(-1, x.shape[-1])


def _add(seen: Seen, rows: np.ndarray, calibrator: ptq.Calibrator | None, inverse: jax.Array | None) -> None:
    finite = rows[np.isfinite(rows).all(1)]
    seen.low = np.minimum(seen.low, finite.min(0, initial=0))
    seen.high = np.maximum(seen.high, finite.max(0, initial=0))
    if seen.inputs is not None:
        seen.inputs = _summed(seen.inputs, rows)
    if calibrator is not None:
        x = jnp.asarray(rows) if inverse is None else jnp.asarray(rows) * inverse[None]
        seen.ranges = calibrator.update(seen.ranges, x)


_summed = jax.jit(ptq.inputs.update)
