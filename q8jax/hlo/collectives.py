"""What a compiled program sends between devices.

Every collective is counted by what one device sends when its group forms a ring, which no algorithm that uses each link
once does with less (Thakur et al. 2005, Optimization of collective communication operations in MPICH). So an
all-reduce counts twice what a reduce-scatter of the same tensor does, and backends that spell one thing differently are
comparable: a TPU puts a collective into a fusion, in pieces that run beside other work, and writes a reduce-scatter as
an all-reduce of which a slice is kept. Between slices of TPUs the hosts communicate: the program of each slice sends to
its own host what is to be, for example, summed, and says so beside the `send`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from q8jax.hlo.text import Instruction, Module, words

# Bytes that one of n devices sends, each with so many bytes of operands.
_SENT: dict[str, Callable[[int, int], int]] = {
    "all-reduce": lambda size, n: 2 * size * (n - 1) // n,
    "all-gather": lambda size, n: size * (n - 1),
    "reduce-scatter": lambda size, n: size * (n - 1) // n,
    "all-to-all": lambda size, n: size * (n - 1) // n,
    "ragged-all-to-all": lambda size, n: size * (n - 1) // n,
    "collective-permute": lambda size, n: size,
    "collective-broadcast": lambda size, n: size,
}
# What hosts do between slices, by its name there, where that is another.
_OF_HOSTS = {"one-to-one": "collective-permute"}
_RENAMING = words("get-tuple-element bitcast")
_CHAIN = re.compile(r'\bchain_id="([^"]*)"')
_LISTED = re.compile(r"\breplica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"\breplica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}")
_PAIRS = re.compile(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_BETWEEN_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}.*_xla_megascale_transfer_type="(\w+)"')
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication between devices.

    Attributes:
      op: 'all-reduce', 'all-gather', ...
      dtype: of what is sent, in XLA's spelling.
      bytes: that one device sends, all times together.
      times: in one run of the program.
      group: positions in the mesh of the devices that take part with the first.
    """

    op: str
    dtype: str
    bytes: int
    times: int
    group: tuple[int, ...]


def collectives(module: Module, executed: Iterable[tuple[Instruction, int]]) -> tuple[Collective, ...]:
    """Those of a program, alike ones together.

    Args:
      module: the program.
      executed: its instructions that run by themselves, and how often.
    """
    found: dict[tuple[str, str, tuple[int, ...]], list[tuple[int, int]]] = {}
    chains = set()
    for caller, times in executed:
        for instruction in _within(module, caller):
            op = _operation(module, instruction)
            if op not in _SENT:
                continue
            chain = _CHAIN.search(instruction.attributes)
            if chain:
                piece = caller.computation, chain[1]
                if piece in chains:
                    continue
                chains.add(piece)
            group = _group(instruction.attributes, module.partitions)
            types = [t for operand in module.operands(instruction) for t in operand.types]
            for dtype in dict.fromkeys(t.dtype for t in types if t.dtype != "token"):
                size = sum(t.bytes for t in types if t.dtype == dtype)
                sent = _SENT[op](size, len(group))
                found.setdefault((op, dtype, group), []).append((sent * times, times))
    return tuple(
        Collective(op, dtype, sum(sent for sent, _ in each), sum(times for _, times in each), group)
        for (op, dtype, group), each in found.items()
    )


def _within(module: Module, instruction: Instruction) -> Iterator[Instruction]:
    """The instruction, or what is fused into it."""
    if instruction.opcode != "fusion":
        yield instruction
        return
    for inner in module.computations[instruction.called["calls"][0]]:
        yield from _within(module, inner)


def _operation(module: Module, instruction: Instruction) -> str:
    """The opcode of what an instruction does, begins, or is part of."""
    op = instruction.opcode.removesuffix("-start")
    if op == "send" and (between := _BETWEEN_SLICES.search(instruction.attributes)):
        named = between[2].lower().replace("_", "-")
        return _OF_HOSTS.get(named, named)
    if op == "all-reduce" and instruction.computation != module.entry and _is_sliced(module, instruction):
        return "reduce-scatter"
    return op


def _is_sliced(module: Module, value: Instruction) -> bool:
    """Whether each device keeps only its part, within one fusion."""
    callers = module.callers[value.computation]
    users = module.users.get((value.computation, value.name), ())
    if not users or not all(caller.opcode == "fusion" for caller in callers):
        return False
    return all(
        user.opcode == "dynamic-slice" or (user.opcode in _RENAMING and _is_sliced(module, user)) for user in users
    )


def _group(attributes: str, partitions: int) -> tuple[int, ...]:
    """The devices that communicate with the first one, itself included; all, where nothing else can be read."""
    if between := _BETWEEN_SLICES.search(attributes):
        return tuple(partitions * each for each in range(len(_numbers(between[1]))))
    if pairs := _PAIRS.search(attributes):
        return _connected([_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])])
    if listed := _LISTED.search(attributes):
        return _numbers(listed[1])
    if iota := _IOTA.search(attributes):
        return tuple(map(int, _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))[0]))
    if mesh := _MESH.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        written = mesh[2] or f"[{math.prod(sizes.values())}]"
        order = _ORDER.fullmatch(written)
        ids = _iota(*order.groups()) if order else np.array(_numbers(written))
        along = tuple(slice(None) if name in re.findall(r"'([^']*)'", mesh[3]) else 0 for name in sizes)
        return tuple(map(int, ids.reshape(tuple(sizes.values()))[along].reshape(-1)))
    return tuple(range(partitions))


def _connected(pairs: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The devices that the first one sends to or has something from, directly or through others."""
    found, left = set(pairs[0] if pairs else ()), pairs[1:]
    while near := [pair for pair in left if found & set(pair)]:
        found |= {device for pair in near for device in pair}
        left = [pair for pair in left if pair not in near]
    return tuple(sorted(found))


def _iota(shape: str, axes: str | None) -> np.ndarray:
    """Numbers counted up in this shape, its axes then exchanged."""
    counted = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return counted.transpose(_numbers(axes)) if axes else counted


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
