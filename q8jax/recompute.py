"""What an activation function makes is computed again in the backward pass, not kept for it.

A product keeps codes of its left operand, so the 16-bit tensor itself is needed no more, but JAX still keeps what the
derivative of the function before the product needs: of gelu an array as large as its argument, written in the forward
and read in the backward pass. `recomputing` finds such functions by the products that they lead to: the elementwise
operations of which nothing is used but by one product. Their arguments, which are results of other products, are kept
anyway, and from these they are computed again.

On GPUs alone: elsewhere XLA finds the same operations twice and does them once, as it would without.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

# Names that products give to arrays.
_MULTIPLIED, _OBSERVED, _SCALED = "q8jax:multiplied", "q8jax:observed", "q8jax:scaled"

# Elementwise operations, by what XLA thinks of doing them twice.
_FREE = {"broadcast_in_dim", "convert_element_type", "expand_dims", "reshape", "slice", "split", "squeeze"}
_CHEAP = {
    *("abs", "add", "and", "clamp", "copy", "div", "eq", "ge", "gt", "integer_pow", "le", "lt", "max", "min", "mul"),
    *("ne", "neg", "not", "or", "rsqrt", "select_n", "sign", "sqrt", "square", "sub"),
}
_EXPENSIVE = {"cos", "erf", "erfc", "exp", "exp2", "expm1", "log", "log1p", "logistic", "pow", "sin", "tanh"}
_CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr"}


def operand(lhs: Array) -> tuple[Array, Array]:
    """The left operand of a product, as it is to be multiplied and as it is to be observed."""
    return checkpoint_name(lhs, _MULTIPLIED), checkpoint_name(lhs, _OBSERVED)


def scaled(result: Array) -> Array:
    """The result of a product whose scales the library applies that multiplies."""
    return checkpoint_name(result, _SCALED)


def recomputing(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of pytrees of arrays, which on a GPU keeps less for its backward pass.

    Values and gradients are those of `fun`; differentiate them in reverse mode only. The `value_and_grad` of q8jax.nnx
    and q8jax.linen do this to the loss; what they do not look into is the body of a loop, so wrap that of a scan over
    layers, unless it is rematerialized as a whole.
    """

    def wrapped(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
        results = _evaluate(closed.jaxpr, (*closed.consts, *jax.tree.leaves(args)))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return wrapped


@dataclasses.dataclass(frozen=True, eq=False)
class _Cone:
    """The elementwise operations that lead to an array, of which nothing is used but within.

    Attributes:
      program: from the values of the leaves to the array.
      leaves: variables of the surrounding program.
      apart: whether a GPU should compute it in a kernel of its own, not in that of a product before.
    """

    program: Callable[..., list[Array]]
    leaves: tuple[jex.Var, ...]
    apart: bool

    def __call__(self, *leaves: Array) -> Array:
        (result,) = self.program(*leaves)
        return result

    def multiplied(self, *leaves: Array) -> Array:
        return _recomputed(self, *leaves)

    def observed(self, *leaves: Array) -> Array:
        """Computed apart once more, because XLA would rather write the array than compute it for two kernels."""
        return self(*_read_again(lax.stop_gradient(leaves), 2))


def _recomputed_forward(cone: _Cone, *leaves: Array) -> tuple[Array, tuple[Array, ...]]:
    return cone(*(_read_again(leaves, 1) if cone.apart else leaves)), leaves


def _recomputed_backward(cone: _Cone, leaves: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    return jax.vjp(cone, *_read_again(leaves, 3))[1](gradient)


_recomputed = jax.custom_vjp(lambda cone, *leaves: cone(*leaves), nondiff_argnums=(0,))
_recomputed.defvjp(_recomputed_forward, _recomputed_backward)


def _read_again(arrays: Sequence[Array], which: int) -> Sequence[Array]:
    """The same arrays, from which XLA:GPU computes anew what it has computed from them, for each number once."""

    def barriers(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        # As many as the number, since two barriers of the same arrays are the same to XLA.
        return functools.reduce(lambda arrays, _: lax.optimization_barrier(arrays), range(which), arrays)

    return lax.platform_dependent(tuple(arrays), cuda=barriers, rocm=barriers, default=lambda same: same)


def _evaluate(jaxpr: jex.Jaxpr, args: Sequence[Array]) -> list[Array]:
    """The results of a program for its constants and arguments."""
    cones = {} if jaxpr.effects else _cones(jaxpr)
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), args, strict=True))
    steps = _steps(jaxpr, cones)
    for position, step in enumerate(steps):
        if isinstance(step, jex.JaxprEqn):
            cone = cones[step.outvars[0]]
            compute = cone.multiplied if step.params["name"] == _MULTIPLIED else cone.observed
            values[step.outvars[0]] = compute(*(values[leaf] for leaf in cone.leaves))
            continue
        made = {var: None for eqn in step for var in eqn.outvars}
        used = {*_variables(jaxpr.outvars), *(var for later in steps[position + 1 :] for var in _needed(later, cones))}
        inputs = [var for var in dict.fromkeys(_needed(step, cones)) if var not in made]
        outputs = [var for var in made if var in used]
        results = _part(jaxpr, step, inputs, outputs)(*(values[var] for var in inputs))
        values.update(zip(outputs, results, strict=True))
    return [atom.val if isinstance(atom, jex.Literal) else values[atom] for atom in jaxpr.outvars]


def _steps(jaxpr: jex.Jaxpr, cones: dict[jex.Var, "_Cone"]) -> list[Any]:
    """The operations in order: those that name the array of a cone alone, the others in lists; unused ones left out."""
    live = set(_variables(jaxpr.outvars))
    steps: list[Any] = []
    for eqn in reversed(jaxpr.eqns):
        if not live.intersection(eqn.outvars) and not eqn.effects:
            continue
        is_named = not cones.keys().isdisjoint(eqn.outvars)
        if is_named or not steps or not isinstance(steps[-1], list):
            steps.append(eqn if is_named else [])
        if not is_named:
            steps[-1].append(eqn)
        live.update(_needed(eqn if is_named else [eqn], cones))
    return [step[::-1] if isinstance(step, list) else step for step in reversed(steps)]


def _needed(step: Any, cones: dict[jex.Var, "_Cone"]) -> list[jex.Var]:
    """The variables that a step reads."""
    if isinstance(step, jex.JaxprEqn):
        return list(cones[step.outvars[0]].leaves)
    return [var for eqn in step for var in _variables(eqn.invars)]


def _variables(atoms: Iterable[Any]) -> list[jex.Var]:
    return [atom for atom in atoms if not isinstance(atom, jex.Literal)]


def _part(whole: jex.Jaxpr, eqns: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> Callable:
    """The function from some variables of a program to others that these of its operations make."""
    effects = frozenset[Any]().union(*(eqn.effects for eqn in eqns))
    part = whole.replace(constvars=[], invars=list(inputs), outvars=list(outputs), eqns=list(eqns), effects=effects)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(part, []))


def _cones(jaxpr: jex.Jaxpr) -> dict[jex.Var, _Cone]:
    """What is worth computing again, by the names that products gave to it."""
    makers = {var: (i, eqn) for i, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    users: dict[Any, set[int]] = {var: {-1} for var in _variables(jaxpr.outvars)}
    for i, eqn in enumerate(jaxpr.eqns):
        for var in _variables(eqn.invars):
            users.setdefault(var, set()).add(i)
    named = [eqn for eqn in jaxpr.eqns if eqn.params.get("name") in (_MULTIPLIED, _OBSERVED)]
    found = {eqn.outvars[0]: _cone(jaxpr, eqn.invars[0], makers, users) for eqn in named}
    return {var: cone for var, cone in found.items() if cone is not None}


def _cone(
    jaxpr: jex.Jaxpr, target: Any, makers: dict[jex.Var, tuple[int, Any]], users: dict[jex.Var, set[int]]
) -> _Cone | None:
    """The cone of an array, or None if its operations are not worth it."""
    inside: dict[int, Any] = {}
    leaves: dict[Any, None] = {}
    pending = dict.fromkeys(_variables([target]))
    while pending:
        # The last one made first: when its turn comes, all that use it have had theirs.
        var = max(pending, key=lambda var: makers[var][0] if var in makers else -1)
        del pending[var]
        i, eqn = makers.get(var, (-1, None))
        within = var is target or users[var] <= inside.keys()
        if eqn is not None and _is_elementwise(eqn) and (within or eqn.primitive.name in _FREE):
            inside[i] = eqn
            pending.update(dict.fromkeys(_variables(eqn.invars)))
        else:
            leaves[var] = None
    eqns = [inside[i] for i in sorted(inside)]
    large = [leaf for leaf in leaves if 2 * leaf.aval.size > target.aval.size]
    if not _is_expensive(eqns) or len(_kept(eqns, target.aval.size)) <= len(large):
        return None
    names = [makers[leaf][1].params.get("name") for leaf in large if leaf in makers]
    return _Cone(_part(jaxpr, eqns, tuple(leaves), (target,)), tuple(leaves), _SCALED in names)


def _inner(eqn: Any) -> Sequence[Any]:
    """The operations of a call."""
    name = eqn.primitive.name
    return eqn.params[_CALLS[name]].jaxpr.eqns if name in _CALLS else ()


def _is_elementwise(eqn: Any) -> bool:
    name = eqn.primitive.name
    return name in _FREE | _CHEAP | _EXPENSIVE or (name in _CALLS and all(map(_is_elementwise, _inner(eqn))))


def _is_expensive(eqns: Iterable[Any]) -> bool:
    return any(eqn.primitive.name in _EXPENSIVE or _is_expensive(_inner(eqn)) for eqn in eqns)


def _kept(eqns: Iterable[Any], size: int) -> set[Any]:
    """About what JAX would keep of these operations: arrays of at least half a size, for their derivatives."""
    kept: set[Any] = set()
    for eqn in eqns:
        name, operands = eqn.primitive.name, _variables(eqn.invars)
        if name in _EXPENSIVE:
            kept.update(eqn.outvars)
        elif name in ("integer_pow", "square") or (name in ("mul", "div") and len(operands) == 2):
            kept.update(operands)
        kept |= _kept(_inner(eqn), size)
    return {var for var in kept if 2 * var.aval.size > size}
