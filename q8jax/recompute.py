"""What an activation function makes is computed again in the backward pass, not kept for it.

A product keeps codes of its left operand, so the 16-bit tensor itself is needed no more, but JAX still keeps what the
derivative of the function before the product needs: of gelu an array as large as its argument, written in the forward
and read in the backward pass. `recomputing` finds such functions by the products that they lead to: the elementwise
operations of which nothing is used but by products. Their arguments, most of them results of other products, are kept
anyway, and from these they are computed again.

On GPUs alone: elsewhere XLA finds the same operations twice and does them once, as it would without. Only of a loop the
backward pass is a loop of its own, which computes them again on every device.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax import lax

Array = jax.Array

# Names that products give to arrays.
_MULTIPLIED, _OBSERVED, _SCALED = "q8jax_multiplied", "q8jax_observed", "q8jax_scaled"

# Elementwise operations, by what XLA thinks of doing them twice. No comparisons: masks are small, and need no
# derivative.
_FREE = {
    *("broadcast_in_dim", "convert_element_type", "expand_dims", "pcast", "pvary", "reshape", "reshard", "slice"),
    *("split", "squeeze"),
}
_CHEAP = {
    *("abs", "add", "clamp", "copy", "div", "integer_pow", "max", "min", "mul", "neg", "rsqrt", "select_n", "sign"),
    *("sqrt", "square", "sub"),
}
_EXPENSIVE = {"cos", "erf", "erfc", "exp", "exp2", "expm1", "log", "log1p", "logistic", "pow", "sin", "tanh"}
_CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr"}


@functools.cache
def _named(name: str) -> Callable[[Array], Array]:
    """The identity, as a call of this name: unlike `checkpoint_name` nothing that the policy of a checkpoint sees."""

    def same(x: Array) -> Array:
        return x

    same.__name__ = name
    return jax.jit(same)


def operand(lhs: Array) -> tuple[Array, Array]:
    """The left operand of a product, as it is to be multiplied and as it is to be observed."""
    return _named(_MULTIPLIED)(lhs), _named(_OBSERVED)(lhs)


def scaled(result: Array) -> Array:
    """The result of a product whose scales the library applies that multiplies."""
    return _named(_SCALED)(result)


def recomputing(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of pytrees of arrays, which on a GPU keeps less for its backward pass.

    Values and gradients are those of `fun`, but for the order in which cotangents of an argument that is used elsewhere
    too are added, and for what a GPU rounds otherwise in other kernels; differentiate in reverse mode only. The
    `value_and_grad` of q8jax.nnx and q8jax.linen do this to the loss. It looks into what is jitted, and not into loops,
    branches, `jax.checkpoint`, `jax.shard_map` and products on explicit meshes: wrap the function that these take.
    """

    @functools.wraps(fun)
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
    cones = _cones(jaxpr)
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), args, strict=True))
    made: dict[tuple[_Cone, str], Array] = {}
    steps = _steps(jaxpr, cones)
    for position, step in enumerate(steps):
        if isinstance(step, list):
            own = {var: None for eqn in step for var in eqn.outvars}
            later = (var for other in steps[position + 1 :] for var in _needed(other, cones))
            used = {*_variables(jaxpr.outvars), *later}
            inputs = [var for var in dict.fromkeys(_needed(step, cones)) if var not in own]
            outputs = [var for var in own if var in used]
            results = _part(jaxpr, step, inputs, outputs)(*(values[var] for var in inputs))
        elif step.outvars[0] in cones:
            outputs, name = step.outvars, step.params["name"]
            cone = cones[outputs[0]]
            if (cone, name) not in made:
                compute = cone.multiplied if name == _MULTIPLIED else cone.observed
                made[cone, name] = compute(*(values[leaf] for leaf in cone.leaves))
            results = [made[cone, name]]
        else:
            inner = step.params["jaxpr"]
            operands = [_read(values, atom) for atom in step.invars]
            outputs, results = step.outvars, _evaluate(inner.jaxpr, (*inner.consts, *operands))
        values.update(zip(outputs, results, strict=True))
    return [_read(values, atom) for atom in jaxpr.outvars]


def _read(values: dict[Any, Array], atom: Any) -> Any:
    return atom.val if isinstance(atom, jex.Literal) else values[atom]


def _steps(jaxpr: jex.Jaxpr, cones: dict[jex.Var, _Cone]) -> list[Any]:
    """The operations in order: by themselves those that name the array of a cone, and calls that have such within, the
    others in lists; unused ones left out."""
    live = set(_variables(jaxpr.outvars))
    steps: list[Any] = []
    for eqn in reversed(jaxpr.eqns):
        if live.isdisjoint(eqn.outvars) and not eqn.effects:
            continue
        apart = not cones.keys().isdisjoint(eqn.outvars) or _has_names(eqn)
        if apart or not steps or not isinstance(steps[-1], list):
            steps.append(eqn if apart else [])
        if not apart:
            steps[-1].append(eqn)
        live.update(_needed(eqn if apart else [eqn], cones))
    return [step[::-1] if isinstance(step, list) else step for step in reversed(steps)]


def _has_names(eqn: Any) -> bool:
    """Whether it is a call of what has a product within."""
    if eqn.primitive.name != "jit":
        return False
    return any(inner.params.get("name") == _MULTIPLIED or _has_names(inner) for inner in _inner(eqn))


def _needed(step: Any, cones: dict[jex.Var, _Cone]) -> list[jex.Var]:
    """The variables that a step reads."""
    if not isinstance(step, list) and step.outvars[0] in cones:
        return list(cones[step.outvars[0]].leaves)
    return [var for eqn in (step if isinstance(step, list) else [step]) for var in _variables(eqn.invars)]


def _variables(atoms: Iterable[Any]) -> list[jex.Var]:
    return [atom for atom in atoms if not isinstance(atom, jex.Literal)]


def _part(whole: jex.Jaxpr, eqns: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> Callable:
    """The function from some variables of a program to others that these of its operations make."""
    # Effects are those of the operations, which have them as they are run.
    parts = {"constvars": [], "invars": list(inputs), "outvars": list(outputs), "eqns": list(eqns)}
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(whole.replace(effects=frozenset(), **parts), []))


def _cones(jaxpr: jex.Jaxpr) -> dict[jex.Var, _Cone]:
    """What is worth computing again, by the names that products gave to it."""
    named = {i: eqn for i, eqn in enumerate(jaxpr.eqns) if eqn.params.get("name") in (_MULTIPLIED, _OBSERVED)}
    if not named:
        return {}
    makers = {var: (i, eqn) for i, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    users: dict[Any, set[int]] = {var: {-1} for var in _variables(jaxpr.outvars)}
    for i, eqn in enumerate(jaxpr.eqns):
        for var in _variables(eqn.invars):
            users.setdefault(var, set()).add(i)
    # What is used otherwise too is written anyway.
    targets = [var for eqn in named.values() for var in _variables(eqn.invars) if users[var] <= named.keys()]
    found = {var: _cone(jaxpr, var, makers, users) for var in dict.fromkeys(targets)}
    by_name = {eqn.outvars[0]: found.get(var) for eqn in named.values() for var in _variables(eqn.invars)}
    return {var: cone for var, cone in by_name.items() if cone is not None}


def _cone(
    jaxpr: jex.Jaxpr, target: Any, makers: dict[jex.Var, tuple[int, Any]], users: dict[jex.Var, set[int]]
) -> _Cone | None:
    """The cone of an array, or None if its operations are not worth it."""
    inside: dict[int, Any] = {}
    leaves: dict[Any, None] = {}
    pending = {target: None}
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
    large = [leaf for leaf in leaves if _is_large(leaf, target)]
    kept = {var for var in _kept(eqns) if _is_large(var, target)}
    if not _is_expensive(eqns) or _bytes(kept) <= _bytes(large):
        return None
    names = [makers[leaf][1].params.get("name") for leaf in large if leaf in makers]
    return _Cone(_part(jaxpr, eqns, tuple(leaves), (target,)), tuple(leaves), _SCALED in names)


def _is_large(var: Any, target: Any) -> bool:
    return 2 * var.aval.size > target.aval.size


def _bytes(variables: Iterable[Any]) -> int:
    return sum(var.aval.size * var.aval.dtype.itemsize for var in variables)


def _inner(eqn: Any) -> Sequence[Any]:
    """The operations of a call."""
    name = eqn.primitive.name
    return eqn.params[_CALLS[name]].jaxpr.eqns if name in _CALLS else ()


def _is_elementwise(eqn: Any) -> bool:
    name = eqn.primitive.name
    if eqn.params.get("name") in (_MULTIPLIED, _OBSERVED, _SCALED):
        return False
    return name in _FREE | _CHEAP | _EXPENSIVE or (name in _CALLS and all(map(_is_elementwise, _inner(eqn))))


def _is_expensive(eqns: Iterable[Any]) -> bool:
    return any(eqn.primitive.name in _EXPENSIVE or _is_expensive(_inner(eqn)) for eqn in eqns)


def _kept(eqns: Iterable[Any]) -> set[Any]:
    """About what JAX would keep of these operations for their derivatives."""
    kept: set[Any] = set()
    for eqn in eqns:
        name, operands = eqn.primitive.name, _variables(eqn.invars)
        if name in _EXPENSIVE:
            kept.update(eqn.outvars)
        elif name in ("integer_pow", "square") or (name in ("mul", "div") and len(operands) == 2):
            kept.update(operands)
        kept |= _kept(_inner(eqn))
    return kept
