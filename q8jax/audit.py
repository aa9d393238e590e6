"""Proof of what a compiled step multiplies: every GEMM, what was asked of it, and what runs.

`dot_general` and `einsum` leave their role and formats in the names that JAX gives to operations, and XLA carries these
names through its passes. So the compiled program itself tells which of its products is which layer's, and what the
recipe wanted. Of products that are not ours it is told by the program before XLA's passes: an operand that comes from a
tensor of 8 bits was meant to be multiplied in 8 bits.

A product whose operands have a wider type than was asked is followed back through the program. If all that reaches it
passes through values of so few bits, unscaled, it multiplies the bare codes, and the result is that of the 8-bit GEMM.
If not, the quantization was erased, undone before the dot, or never there.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from q8jax.devices import get_device
from q8jax.formats import FORMATS, bits_of, get_format
from q8jax.hlo.costs import costs
from q8jax.hlo.dataflow import sources
from q8jax.hlo.products import Product, products
from q8jax.hlo.roofline import roofline
from q8jax.hlo.text import ArrayType, Module, parse
from q8jax.naming import marked_role, path_of
from q8jax.policy import Policy
from q8jax.recipe import GEMMS, Recipe
from q8jax.report import EMULATED, NATIVE, WRONG, Gemm, Report

_XLA_NAMES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def audit(
    step: jax.stages.Lowered | jax.stages.Compiled,
    compiled: jax.stages.Compiled | None = None,
    *,
    asked: Policy | Recipe | str | None = None,
) -> Report:
    """Reports what a step multiplies on the device that it is compiled for, which need not be there.

    Args:
      step: `jax.jit(step).lower(...)`, which is compiled here unless `compiled` is given; or what is compiled. Of a
        step that is only compiled, nothing is known of what was asked but from q8jax's own dots.
      compiled: the same step compiled.
      asked: what should run: a recipe, or a policy whose patterns are matched with the GEMMs' paths; it overrides what
        the program itself tells. For steps that are quantized by other means.

    Raises:
      ValueError: a policy or recipe that is none.
    """
    lowered = step if isinstance(step, jax.stages.Lowered) else None
    if compiled is None:
        compiled = step.compile() if isinstance(step, jax.stages.Lowered) else step
    device = _device(compiled)
    module = parse(compiled.as_text() or "")
    run = products(module, device.platform)
    before = _Asked(parse(lowered.as_text(dialect="hlo", debug_info=True)), device.platform) if lowered else None
    known = [_identify(product, role, before) for product, role in zip(run, _roles(run), strict=True)]
    unmatched: tuple[str, ...] = ()
    if asked is not None:
        policy = _policy(asked)
        paths = {path for path, _, _ in known}
        unmatched = tuple(pattern for pattern, _ in policy.rules if not any(re.fullmatch(pattern, p) for p in paths))
        known = [(path, role, _asked_by(policy, path, role) or formats) for path, role, formats in known]
    gemms = [
        _gemm(module, product, *identity, device.device_kind) for product, identity in zip(run, known, strict=True)
    ]
    chip, memory = get_device(device.device_kind), compiled.memory_analysis()
    return Report(
        device.device_kind,
        tuple(_joined(gemms)),
        costs(module),
        None if memory is None else int(memory.temp_size_in_bytes),
        None if memory is None else _resident(memory),
        None if chip is None else roofline(module, run, chip),
        unmatched,
    )


def _resident(memory: Any) -> int:
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    program = memory.generated_code_size_in_bytes
    return int(memory.argument_size_in_bytes + results + memory.temp_size_in_bytes + program)


def _device(compiled: jax.stages.Compiled) -> jax.Device:
    for sharding in jax.tree.leaves((compiled.input_shardings, compiled.output_shardings)):
        return min(sharding.device_set, key=lambda device: device.id)
    return jax.devices()[0]


def _policy(asked: Policy | Recipe | str) -> Policy:
    if isinstance(asked, Recipe):
        return Policy(((".*", asked),))
    return Policy.parse(asked) if isinstance(asked, str) else asked


def _asked_by(policy: Policy, path: str, role: str) -> tuple[str, str] | None:
    recipe = policy.recipe_for(path)
    return None if recipe is None else recipe.formats(role)


def _is_backward(name: str) -> bool:
    return "transpose(" in name


def _roles(found: Sequence[Product]) -> list[str]:
    """The role of each product: as it is marked, or by what it sums over and what comes out."""
    forward = [p for p in found if not _is_backward(p.name)]
    roles = []
    for product in found:
        marked = marked_role(product.name)
        if marked:
            roles.append(marked[0])
        elif not _is_backward(product.name) or "rematted_computation" in product.name:
            roles.append(GEMMS[0])
        else:
            shared = lambda one: _shared_names(path_of(one.name), path_of(product.name))  # noqa: B023
            twin = max(forward, key=shared, default=None)
            shape = sorted(n for n in product.result.shape if n > 1)
            of_rhs = twin is not None and shape == sorted(n for n in twin.operands[1].shape if n > 1)
            of_lhs = twin is not None and shape == sorted(n for n in twin.operands[0].shape if n > 1)
            if of_rhs and of_lhs:
                # Square: a weight's gradient is the one that JAX transposes.
                of_lhs = not product.name.endswith("transpose")
            roles.append("dlhs" if of_lhs or not of_rhs else "drhs")
    return roles


def _shared_names(one: str, other: str) -> int:
    return (collections.Counter(one.split("/")) & collections.Counter(other.split("/"))).total()


class _Asked:
    """What the program before XLA's passes asks of products that carry no mark, or have lost it with their name."""

    def __init__(self, module: Module, platform: str):
        found = products(module, platform)
        self._marked, self._unmarked = [], []
        for product, role in zip(found, _roles(found), strict=True):
            if marked := marked_role(product.name):
                self._marked.append((product, *marked))
            else:
                formats = self._format(module, product, 0), self._format(module, product, 1)
                self._unmarked.append((product, role, formats))

    @staticmethod
    def _format(module: Module, product: Product, position: int) -> str:
        found = sources(module, module.operand(product.instruction, position), bits=8)
        if found.are_codes and len(found.narrow) == 1:
            return _format_of(next(iter(found.narrow)))
        return _format_of(product.operands[position].dtype)

    def __call__(self, product: Product) -> tuple[str, str, tuple[str, str]] | None:
        """Path, role and formats of the product that is most alike."""
        likeness = lambda candidate: _likeness(candidate[0], product)
        # XLA:CPU names nothing that it takes out of a loop.
        candidates = self._unmarked if product.name else [*self._marked, *self._unmarked]
        twin, role, formats = max(candidates, key=likeness, default=(product, "", ("", "")))
        return (path_of(twin.name) or path_of(product.name), role, formats) if role else None


def _likeness(one: Product, other: Product) -> tuple[int, int]:
    """How much of their names two products share, then of their sizes.

    A product may have the name of what it is fused with, and before XLA's passes lacks the part of the name that stands
    for what it is called from. On several devices sizes are those of one.
    """
    shapes = [collections.Counter(p.result.shape) for p in (one, other)]
    names = _shared_names(one.name.rpartition("/")[0], other.name.rpartition("/")[0])
    return names, 3 * (one.summed == other.summed) + (shapes[0] & shapes[1]).total()


def _identify(product: Product, role: str, before: _Asked | None) -> tuple[str, str, tuple[str, str] | None]:
    """Path, role and asked formats of a product."""
    path = path_of(product.name)
    marked = marked_role(product.name)
    if marked:
        return path, role, marked[1]
    told = before(product) if before is not None else None
    return (path, role, None) if told is None else told


def _gemm(
    module: Module, product: Product, path: str, role: str, asked: tuple[str, str] | None, device_kind: str
) -> Gemm:
    operands = tuple(_format_of(operand.dtype) for operand in product.operands)
    verdict, reasons = (NATIVE, ()) if asked is None else _verdict(module, product, asked, device_kind)
    return Gemm(
        path,
        role,
        asked,
        (operands[0], operands[1]),
        _format_of(product.accumulator),
        product.executed_by,
        verdict,
        reasons,
        product.times,
        product.flops,
    )


def _verdict(module: Module, product: Product, asked: tuple[str, str], device_kind: str) -> tuple[str, tuple[str, ...]]:
    # The compiler may exchange a product's operands.
    either_way = [_verdict_of(module, product, pair) for pair in (asked, asked[::-1])]
    verdict, reasons = min(either_way, key=lambda found: (NATIVE, EMULATED, WRONG).index(found[0]))
    if verdict == NATIVE and (instead := _emulation(product.operands, device_kind)):
        return EMULATED, instead
    return verdict, reasons


def _verdict_of(module: Module, product: Product, asked: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    reasons: dict[str, None] = {}
    for position, (name, operand) in enumerate(zip(asked, product.operands, strict=True)):
        runs = _format_of(operand.dtype)
        if runs == name:
            continue
        # Codes of fewer bits may be kept in bytes.
        found = sources(module, module.operand(product.instruction, position), max(8, bits_of(name)))
        containers = {_format_of(dtype) for dtype in found.narrow}
        if not found.are_codes:
            return WRONG, (f"{runs} instead of {name}, which it was never rounded to",)
        if not containers <= {name, "uint8", "int8"}:
            return WRONG, (f"{runs} of {', '.join(sorted(containers))} instead of {name}",)
        if found.scaled:
            return WRONG, (f"{runs} instead of {name}, which is dequantized before the product",)
        if not holds_exactly(name, runs):
            return WRONG, (f"{runs} instead of {name}, which it cannot hold",)
        reasons[f"{name} as {runs}"] = None
    return (EMULATED, tuple(reasons)) if reasons else (NATIVE, ())


def _emulation(operands: tuple[ArrayType, ArrayType], device_kind: str) -> tuple[str, ...]:
    """What a TPU does to operands that its matrix unit does not multiply; nothing if it does."""
    device = get_device(device_kind)
    if device is None or not device_kind.startswith("TPU"):
        return ()
    missing = ("float8",) * (device.fp8 is None) + ("int", "uint") * (device.int8 is None)
    names = dict.fromkeys(_format_of(operand.dtype) for operand in operands)
    return tuple(f"{name} in a wider type inside the unit" for name in names if name.startswith(missing))


@functools.cache
def holds_exactly(name: str, wide: str) -> bool:
    """Whether every value of a format is one of a wider dtype too."""
    narrow = get_format(name)
    if wide == "int32":
        return narrow.kind == "int"
    if wide not in FORMATS or narrow.kind == "scale":
        return False
    held = get_format(wide)
    if held.kind == "int":
        return narrow.kind == "int" and narrow.max <= held.max and narrow.min >= held.min
    digits = narrow.mantissa_bits + (narrow.kind == "float")
    smallest = min(held.smallest_subnormal, held.smallest_normal)
    return digits <= held.mantissa_bits + 1 and narrow.max <= held.max and narrow.smallest_subnormal >= smallest


def _format_of(dtype: str) -> str:
    """The name of an XLA dtype among ours."""
    if dtype in _XLA_NAMES:
        return _XLA_NAMES[dtype]
    if dtype.startswith("f"):
        return f"float{dtype[1]}_{dtype[2:]}"
    return re.sub(r"^s(\d+)$", r"int\1", re.sub(r"^u(\d+)$", r"uint\1", dtype))


def _joined(gemms: Iterable[Gemm]) -> list[Gemm]:
    """Those that differ in nothing but their number as one."""
    found: dict[Gemm, list[Gemm]] = {}
    for gemm in gemms:
        found.setdefault(dataclasses.replace(gemm, times=0, flops=0), []).append(gemm)
    return [
        dataclasses.replace(key, times=sum(g.times for g in group), flops=sum(g.flops for g in group))
        for key, group in found.items()
    ]
