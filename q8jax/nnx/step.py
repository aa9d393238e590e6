"""What a training step does with a quantized model: differentiate it, and update its scaling state."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from q8jax import scaling
from q8jax.nnx.dots import KernelCodes, Scale, dots_of
from q8jax.recompute import recomputing
from q8jax.scaling import ScalingState


def scaling_states(model: nnx.Module) -> dict[str, ScalingState]:
    """The scaling state of every quantized dot, by path."""
    return {"/".join(map(str, path)): module.state for path, module in dots_of(model).items()}


def value_and_grad(
    loss_fn: Callable[..., Any], *, has_aux: bool = False, devices: int | None = None
) -> Callable[..., tuple[Any, Any, Any]]:
    """Differentiates a loss with respect to a model's parameters, and observes its amaxes.

    Args:
      loss_fn: function of (model, *args), args being pytrees of arrays, that returns a scalar, or (scalar, aux).
      has_aux: whether it returns aux.
      devices: of a mesh whose axes are automatic, to observe amaxes on each apart: those of the whole step then travel
        in one reduction, `q8jax.scaling.over_devices`, and not one for each tensor. The dots' `shardings` say what is
        where.

    Returns:
      A function of (model, *args) that returns (loss, grads, amaxes), or ((loss, aux), grads, amaxes): `grads` is the
      nnx.State of the nnx.Param's gradients, `amaxes` that of the Scale's observed amaxes, all uses of a layer
      combined by max. Other state that the loss changes is updated in the model. It compiles itself, once for each
      `loss_fn`, and may be called inside jit as well.
    """

    def wrapped(model, *args):
        graphdef, params, scales, rest = nnx.split(model, nnx.Param, Scale, ...)
        static = loss_fn, has_aux, devices
        value, changed, grads, amaxes = _value_and_grad(static, graphdef, params, scales, rest, args)
        nnx.update(model, changed)
        return value, grads, amaxes

    return wrapped


@functools.partial(jax.jit, static_argnums=(0, 1))
def _value_and_grad(static, graphdef, params, scales, rest, args):
    loss_fn, has_aux, devices = static
    if devices is not None:
        scales = jax.tree.map(functools.partial(scaling.for_devices, devices=devices), scales)

    def pure(params, scales):
        model = nnx.merge(graphdef, params, jax.tree.map(scaling.observing, scales), rest, copy=True)
        before = {path: _value(leaf) for path, leaf in _other_state(model)}
        result = loss_fn(model, *args)
        loss, aux = result if has_aux else (result, None)
        # NNX lets a model be updated only where it was made, so what stayed as it was is left out: a scan over
        # microbatches can then close over the model.
        changed = {path: leaf for path, leaf in _other_state(model) if _value(leaf) is not before.get(path)}
        return loss, (aux, nnx.from_flat_state(changed))

    differentiated = jax.value_and_grad(recomputing(pure), argnums=(0, 1), has_aux=True)
    with scaling.explained():
        (loss, (aux, changed)), (grads, amaxes) = differentiated(params, scales)
    return ((loss, aux) if has_aux else loss), changed, grads, amaxes


def _other_state(model: nnx.Module) -> Any:
    return nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Any(nnx.Param, Scale, KernelCodes))))


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def update_scaling(model: nnx.Module, amaxes: nnx.State) -> None:
    """Turns the amaxes of one step into the model's next scaling state, in place, for all layers at once.

    Args:
      model: the model.
      amaxes: as `value_and_grad` returned them; of several microbatches, joined by `q8jax.scaling.combine`.
    """
    observed = dict(nnx.to_flat_state(amaxes))
    stateful = {path: module for path, module in dots_of(model).items() if module.recipe.slots}
    found = [observed[*path, "scale"][...] for path in stateful]
    following = scaling.update([module.state for module in stateful.values()], found)
    for module, state in zip(stateful.values(), following, strict=True):
        module.follow(state)


def fold_rounding_keys(model: nnx.Module, number: int | jax.Array) -> nnx.Module:
    """A twin of a model, or of a layer, that rounds stochastically by keys into which a number is folded.

    Args:
      model: stays as it is; the twin shares all its variables but the keys.
      number: of the microbatch, or of the call, within the step; an int32 scalar may be traced.
    """
    graphdef, state = nnx.split(model)
    twin = nnx.merge(graphdef, state)
    for module in dots_of(twin).values():
        if module.recipe.needs_key:
            module.rounding_key = module.rounding_key.replace(module.folded_key_data(number))
    return twin


def calibrate(model: nnx.Module, loss_fn: Callable[..., Any], *args: Any, has_aux: bool = False) -> None:
    """Warm start: sets the scales from one forward and backward pass in which every scale is the tensor's own.

    Args:
      model: the model; its scaling state changes in place, as in one step, and learned ranges begin anew with it;
        nothing else changes.
      loss_fn, has_aux: as for `value_and_grad`.
      *args: the first global batch.
    """
    twin = nnx.clone(model)
    with calibrating(twin):
        _, _, amaxes = value_and_grad(loss_fn, has_aux=has_aux)(twin, *args)
    with calibrating(model):
        update_scaling(model, amaxes)


@contextlib.contextmanager
def calibrating(model: nnx.Module) -> Iterator[None]:
    """Context in which a model's dots scale each tensor by its own amax, whatever their recipe says."""
    modules = dots_of(model).values()
    for module in modules:
        module.calibrating = True
    try:
        yield
    finally:
        for module in modules:
            module.calibrating = False
