"""From a model and its calibration batches to the frozen model, and what was decided on the way."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import q8jax.nnx as qnnx
from experiments.quantizing.kernels import Kernel, Method, codes_of, inputs_of
from experiments.quantizing.recording import Seen, depth_of, record
from experiments.quantizing.schemes import Scheme
from q8jax import choices, ptq
from q8jax.nnx.dots import OPERATIONS
from q8jax.nnx.frozen import embeddings_of, freeze_embedding
from q8jax.nnx.layers import kernel_shape, layers_of
from q8jax.policy import Policy
from q8jax.ptq import Calibrator, Target
from q8jax.qarray import QArray
from q8jax.recipe import Operand, Recipe
from q8jax.stored import Stored, round_scale

CALIBRATIONS = ("absmax", "min-max", "moving-average", "percentile", "mse", "entropy")
Run = Callable[[nnx.Module, Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How ranges of inputs are found.

    Attributes:
      name: of CALIBRATIONS; absmax and min-max are one for symmetric codes.
      percent: of percentile.
    """

    name: str = "absmax"
    percent: float = 99.99

    def __post_init__(self) -> None:
        choices.check("--calibration", self.name, CALIBRATIONS)

    def of(self, target: Target) -> Calibrator:
        """Raises ValueError for one that the target has no use for."""
        if self.name == "percentile":
            return ptq.percentile(target, self.percent)
        made = {"moving-average": ptq.moving_average, "mse": ptq.mean_squared_error, "entropy": ptq.entropy}
        return made.get(self.name, ptq.min_max)(target)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
      schemes: of layers with a kernel, by path.
      products: recipes of those without one.
      method: for their kernels.
      calibration: for inputs with static scales.
      embeddings: what tables of embeddings become; None if they stay.
      embedding_scales: in which their scales are kept.
    """

    schemes: Mapping[str, Scheme]
    products: Mapping[str, Recipe]
    method: Method
    calibration: Calibration
    embeddings: Operand | None = None
    embedding_scales: str = "float32"
    affine_embeddings: bool = False

    @property
    def needs_batches(self) -> bool:
        return self.method.needs_inputs or any(scheme.is_static for scheme in self.schemes.values())


@dataclasses.dataclass(frozen=True)
class Decided:
    """What became of one layer, or of one of a stack.

    Attributes:
      path, depth: which.
      kernel: the decision.
      scale: of its inputs, if static.
    """

    path: str
    depth: int
    kernel: Kernel
    scale: float | None


def quantize_for_inference(
    model: nnx.Module, plan: Plan, run: Run, batches: Sequence[Mapping[str, np.ndarray]], tell: Callable[[str], None]
) -> list[Decided]:
    """Freezes a model in place, as a plan says.

    Args:
      model: in its compute dtype, unquantized.
      plan: what is to be done.
      run: calls the model with a batch.
      batches: to calibrate by.
      tell: is told of progress.

    Raises:
      ValueError: naming the layer, what it cannot become.
    """
    layers = layers_of(model)
    calibrators = {}
    for path, scheme in plan.schemes.items():
        try:
            plan.method.check(scheme)
            if scheme.is_static:
                assert scheme.inputs is not None
                calibrators[path] = plan.calibration.of(scheme.inputs)
        except ValueError as error:
            raise ValueError(f"Layer {path!r}: {error}") from None
    seen: dict[tuple[str, int], Seen] = {}
    options: dict[str, Any] = {"calibrators": calibrators, "batch_count": len(batches)}
    if plan.needs_batches:
        tell(f"calibrating {len(plan.schemes)} layers on {len(batches)} batches")
        sums = plan.method.needs_inputs
        seen = record(run, model, batches, plan.schemes, inverses={}, sums=sums, **options)
    matrices = {path: _matrices(layers[path]) for path in plan.schemes}
    firsts: dict[tuple[str, int], Kernel] = {}
    for path, scheme in plan.schemes.items():
        for depth, w in enumerate(matrices[path]):
            firsts[path, depth] = inputs_of(w, seen.get((path, depth)), scheme, plan.method)
    inverses = {key: first.inverse for key, first in firsts.items() if first.inverse is not None}
    moved = {path for path, _ in inverses if path in calibrators}
    if moved:
        tell("calibrating anew what is smoothed")
        options["calibrators"] = {path: calibrators[path] for path in moved}
        again = record(run, model, batches, moved, inverses=inverses, sums=False, **options)
        for key, found in again.items():
            seen[key].ranges = found.ranges
    decided = []
    for path, scheme in plan.schemes.items():
        tell(f"quantizing {path}")
        each = []
        for depth, w in enumerate(matrices[path]):
            key = path, depth
            kernel = codes_of(w, firsts[key], seen.get(key), scheme, plan.method)
            scales = calibrators[path].finish(seen[key].ranges) if path in calibrators else None
            each.append((kernel, scales))
            decided.append(Decided(path, depth, kernel, None if scales is None else float(scales[0])))
        try:
            _freeze(layers[path], path, scheme, each)
        except ValueError as error:
            raise ValueError(f"Layer {path!r}: {error}") from None
    if plan.products:
        qnnx.quantize_model(model, Policy(tuple((re.escape(path), recipe) for path, recipe in plan.products.items())))
    if plan.embeddings is not None:
        for path, table in embeddings_of(model).items():
            freeze_embedding(model, path, _stored_table(table.embedding[...], plan))
    return decided


def _matrices(layer: Any) -> list[jax.Array]:
    """The kernel of each layer of a stack, float32 [in, out]."""
    matrix = qnnx.kernel_matrix(layer).astype(jnp.float32)
    return list(matrix.reshape(depth_of(layer), *matrix.shape[-2:]))


def _freeze(layer: Any, path: str, scheme: Scheme, each: list[tuple[Kernel, Any]]) -> None:
    stack = layer.kernel[...].ndim > len(kernel_shape(layer) or ())
    join = (lambda parts: jnp.stack(parts)) if stack else (lambda parts: parts[0])
    kernels = [kernel for kernel, _ in each]
    if scheme.weights is None:
        return _keep_kernel(layer, path, scheme, join, each)
    stored = [Stored.of(_codes(kernel), scales=scheme.scales) for kernel in kernels]
    codes = jax.tree.map(lambda *leaves: join(list(leaves)), *stored)
    has_inverse = any(kernel.inverse is not None for kernel in kernels)
    ones = jnp.ones(codes.shape[-2], jnp.float32)
    extras: dict[str, Any] = {}
    if has_inverse:
        extras["inverse"] = join([ones if kernel.inverse is None else kernel.inverse for kernel in kernels])
    if kernels[0].outliers is not None:
        extras["outliers"] = join([kernel.outliers for kernel in kernels])
        extras["outlier_kernel"] = join([kernel.outlier_kernel for kernel in kernels])
    if scheme.is_static:
        assert scheme.inputs is not None
        scales = [found[0] for _, found in each]
        if scheme.inputs.is_affine:
            extras |= {"scale": join(scales), "zero_point": join([found[1] for _, found in each])}
        else:
            extras["scale"] = join([_slots(scale, scheme) for scale in scales])
    if scheme.inputs is not None and scheme.inputs.is_affine:
        extras["affine"] = "int8"
    if any(kernel.bias is not None for kernel in kernels):
        if layer.bias is None:
            raise ValueError("--method=bias has no bias to correct here: leave it out, or leave this layer out.")
        bias = layer.bias[...]
        layer.bias.set_value(bias + join([kernel.bias for kernel in kernels]).reshape(bias.shape).astype(bias.dtype))
    qnnx.freeze_layer(layer, codes, scheme.recipe, qnnx.Extras(**extras), path=path)


def _keep_kernel(layer: Any, path: str, scheme: Scheme, join: Any, each: list[tuple[Kernel, Any]]) -> None:
    """Quantizes the inputs of a layer alone."""
    kernels = [kernel for kernel, _ in each]
    if scheme.inputs is None or scheme.inputs.is_affine or any(kernel.inverse is not None for kernel in kernels):
        raise ValueError("Where weights stay, inputs are symmetric, and all their channels alike.")
    shape = layer.kernel[...].shape
    for name in [name for name in OPERATIONS if name in vars(layer)]:
        stack = shape[: len(shape) - len(kernel_shape(layer) or ())]
        operation = OPERATIONS[name](scheme.recipe, stack=stack, path=path)
        if scheme.is_static:
            operation.scale.set_value(join([_slots(found[0], scheme) for _, found in each]))
        setattr(layer, name, nnx.data(operation))


def _slots(scale: jax.Array, scheme: Scheme) -> jax.Array:
    """The scale vector of the recipe's slots, of which that of inputs alone is read."""
    return jnp.stack([scale if slot.tensor == "lhs" else jnp.float32(1) for slot in scheme.recipe.slots])


def _codes(kernel: Kernel) -> QArray:
    assert kernel.codes is not None
    return kernel.codes


def _stored_table(table: jax.Array, plan: Plan) -> Stored:
    """Codes of a table of embeddings, with scales for each row, or for groups of it."""
    operand = plan.embeddings
    assert operand is not None
    group: dict[str, Any] = {"group_size": operand.tile} if operand.tile else {}
    qtype = {"int8": "uint8", "int4": "uint4"}[operand.qtype] if plan.affine_embeddings else operand.qtype
    target = Target(qtype, "group" if operand.tile else "channel", is_affine=plan.affine_embeddings, **group)
    # A row is to a table what a column, an output channel, is to a kernel.
    columns = table.astype(jnp.float32).T
    scale, zero_point = target.scales(columns)
    if operand.format.bits <= 4:
        # So few codes reach farther than is good for most of them.
        found = ptq.clip(columns, target)
        scale, zero_point = found.scale.astype(jnp.float32), found.zero_point
    scale = round_scale(scale, plan.embedding_scales)
    codes = target.encode(columns, scale, zero_point)
    turned = lambda x: None if x is None else x.T
    return Stored.of(
        QArray(codes.qvalue.T, codes.scale.T, turned(codes.zero_point), qtype=codes.qtype),
        axis=-1,
        scales=plan.embedding_scales,
    )
