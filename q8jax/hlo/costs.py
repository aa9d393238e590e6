"""What a compiled program costs: bytes moved, kernels, copies, collectives, the compiler's own estimate of cycles.

Counted through everything that the program calls: loops as often as they turn, of a conditional the branch that moves
most, and command buffers. Every backend and every program is counted by these same rules:

- A kernel is an instruction that the device runs by itself: a fusion, a library call, a collective, a lone operation.
  What only renames memory is free. A copy is counted apart from the kernels, because a device has engines for it.
- A kernel moves its operands and its results once, as far as they are in the device's main memory. Of an operand that
  it only slices, as a scanned layer does of its stack, it moves the slice; of a result that it updates in place, the
  update. The workspace of a library call is not counted.
"""

import dataclasses
import re
from collections.abc import Iterator

from q8jax.hlo.collectives import Collective, collectives
from q8jax.hlo.text import CALLS, ArrayType, Instruction, Module, words

_FREE = words(
    "parameter constant tuple get-tuple-element bitcast after-all add-dependency opt-barrier partition-id "
    "replica-id domain async-update async-done"
)
_BOOKKEEPING = words(
    "Sharding SPMDFullToShardShape SPMDShardToFullShape AllocateBuffer annotate_device_placement "
    "PrepareAsyncCallStart PrepareAsyncCallDone"
)
# Cost models give some instructions a sentinel near 2^63.
_MOST_CYCLES = 2**60


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one run of a program on one device.

    Attributes:
      bytes: moved to and from the device's main memory.
      kernels: launched.
      distinct_kernels: the same, loop bodies counted once.
      distinct_calls: fusions and library calls among these; what else a TPU runs by itself mostly renames scalars.
      copies: of buffers, not among the kernels.
      estimated_cycles: the compiler's own, where it gives them.
      collectives: by operation, dtype and group.
    """

    bytes: int
    kernels: int
    distinct_kernels: int
    distinct_calls: int
    copies: int
    estimated_cycles: int | None
    collectives: tuple[Collective, ...]


def trip_count(module: Module, loop: Instruction) -> int:
    """How often a `while` turns; 1 if the program does not say."""
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if found:
        return int(found[1])
    condition = module.computations[loop.called["condition"][0]]
    bounds = [int(i.arguments) for i in condition if i.opcode == "constant" and i.arguments.isdigit()]
    return bounds[0] if len(bounds) == 1 else 1


def executed(module: Module) -> Iterator[tuple[Instruction, int]]:
    """Every instruction that the device runs by itself, and how often; loops and calls are opened, fusions are not."""
    yield from _executed(module, module.entry, 1)


def _executed(module: Module, computation: str, times: int) -> Iterator[tuple[Instruction, int]]:
    for instruction in module.computations[computation]:
        called = instruction.called
        if instruction.opcode == "while":
            turns = times * trip_count(module, instruction)
            yield from _executed(module, called["condition"][0], turns)
            yield from _executed(module, called["body"][0], turns)
        elif instruction.opcode == "conditional":
            branches = called.get("branch_computations") or called["true_computation"] + called["false_computation"]
            yield from max((list(_executed(module, name, times)) for name in branches), key=lambda b: _moved(module, b))
        elif instruction.opcode in CALLS:
            for name in called.get("to_apply", ()) + called.get("calls", ()) + called.get("called_computations", ()):
                yield from _executed(module, name, times)
        elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
            yield instruction, times


def _moved(module: Module, branch: list[tuple[Instruction, int]]) -> int:
    return sum(bytes_of(module, instruction) * times for instruction, times in branch)


def costs(module: Module) -> Costs:
    """Counts a compiled program."""
    moved = kernels = distinct = calls = copies = cycles = 0
    estimated = False
    instructions = list(executed(module))
    for instruction, times in instructions:
        if custom_call_target(instruction) in _BOOKKEEPING:
            continue
        moved += bytes_of(module, instruction) * times
        if instruction.opcode in ("copy", "copy-start"):
            copies += times
        else:
            kernels += times
            distinct += 1
            calls += instruction.opcode in ("fusion", "custom-call")
        for count in re.findall(r'"estimated_cycles":"(\d+)"', instruction.attributes):
            if int(count) < _MOST_CYCLES:
                cycles += int(count) * times
                estimated = True
    return Costs(
        moved,
        kernels,
        distinct,
        calls,
        copies,
        cycles if estimated else None,
        collectives(module, instructions),
    )


def custom_call_target(instruction: Instruction) -> str:
    """Of a custom call; '' of any other instruction."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def bytes_of(module: Module, instruction: Instruction) -> int:
    """Bytes that one kernel moves."""
    if instruction.opcode == "fusion":
        return _bytes_of_fusion(module, instruction)
    operands = list(module.operands(instruction))
    if instruction.opcode in ("dynamic-slice", "slice", "gather", "slice-start"):
        return 2 * _bytes(instruction.types[:1])
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _bytes(operands[1].types)
    if instruction.opcode == "copy-start":
        return _bytes(instruction.types[:2])
    results = instruction.types
    if custom_call_target(instruction).startswith("__cublas"):
        results = tuple(t for i, t in enumerate(results) if i == 0 or t.dtype != "s8")
    elif instruction.opcode.endswith("-start"):
        results = results[-1:]
    return _bytes(results) + sum(_bytes(operand.types) for operand in operands)


def _bytes(types: tuple[ArrayType, ...]) -> int:
    return sum(t.bytes for t in types if t.memory_space == 0)


def _bytes_of_fusion(module: Module, fusion: Instruction) -> int:
    body = fusion.called["calls"][0]
    total = 0
    for number, parameter in module.parameters(body).items():
        types = module.operand(fusion, number).types
        if sum(t.memory_space == 0 for t in types):
            total += min(_bytes(types), _bytes_read(module, parameter))
    root = module.root(body)
    results = list(module.operands(root)) if root.opcode == "tuple" else [root]
    if len(results) != len(fusion.types):
        return total + _bytes(fusion.types)
    for result, kind in zip(results, fusion.types, strict=True):
        update = _behind(module, result)
        written = module.operand(update, 1).types if update.opcode == "dynamic-update-slice" else (kind,)
        total += sum(t.bytes for t in written) if kind.memory_space == 0 else 0
    return total


def _bytes_read(module: Module, value: Instruction) -> int:
    """Bytes of a fusion's parameter that its users take."""
    total = 0
    for user in module.users.get((value.computation, value.name), ()):
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += _bytes(user.types)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        elif user.opcode in ("bitcast", "reshape", "convert", "copy") and not user.is_root:
            total += min(_bytes(value.types), _bytes_read(module, user) * value.types[0].bits // user.types[0].bits)
        else:
            return sum(t.bytes for t in value.types)
    return total


def _behind(module: Module, value: Instruction) -> Instruction:
    """What a chain of renamings renames."""
    while value.opcode in ("bitcast", "reshape", "copy"):
        value = module.operand(value, 0)
    return value
