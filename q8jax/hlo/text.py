"""HLO text as a graph of instructions.

`jax.stages.Lowered.as_text(dialect="hlo", debug_info=True)` gives the program before XLA's passes, and
`jax.stages.Compiled.as_text()` the one that runs. Both are read here as jax 0.10 and 0.12 print them for every backend.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Opcodes of instructions that run another computation, once; the last two begin it, on a TPU on its sparse cores.
CALLS = ("call", "async-start", "call-start")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s(?:\(.*\)\s+->.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation|called_computations)="
    r"(?:\{([^{}]*)\}|%?([\w.\-]+))"
)
_PARTITIONS = re.compile(r"^HloModule .*\bnum_partitions=(\d+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


def words(text: str) -> frozenset[str]:
    """The words of a text, for tables of opcodes."""
    return frozenset(text.split())


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """An array as XLA names it.

    Attributes:
      dtype: in XLA's spelling, such as 'bf16' or 'f8e4m3fn'.
      shape: sizes.
      memory_space: 0 for the device's main memory; others are on the chip.
    """

    dtype: str
    shape: tuple[int, ...]
    memory_space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """Of one element as it is stored; 0 for a token."""
        if self.dtype in ("pred", "token"):
            return 8 if self.dtype == "pred" else 0
        found = re.match(r"[a-z]+(\d+)", self.dtype)
        assert found is not None
        return int(found[1])

    @property
    def bytes(self) -> int:
        return -(-self.size * self.bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in its computation.
      computation: the one it is in.
      types: of its result, a tuple's flattened.
      opcode: 'dot', 'fusion', ...
      operands: names in the same computation.
      arguments: what stands in its parentheses: a constant's value, a parameter's number.
      attributes: what follows them.
      is_root: whether it is its computation's result.
    """

    name: str
    computation: str
    types: tuple[ArrayType, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Names of the computations it calls, by attribute."""
        found = {}
        for attribute, several, one in _CALLED.findall(self.attributes):
            found[attribute] = tuple(name.strip().lstrip("%") for name in (several or one).split(","))
        return found

    @property
    def op_name(self) -> str:
        """The name stack under which JAX traced it; '' if the compiler made it."""
        found = _OP_NAME.search(self.attributes)
        return found[1].replace('\\"', '"') if found else ""

    @property
    def index(self) -> int:
        """Of a get-tuple-element, which; of a parameter, its number."""
        if self.opcode == "parameter":
            return int(self.arguments)
        found = re.search(r"\bindex=(\d+)", self.attributes)
        assert found is not None
        return int(found[1])

    def dimensions(self, attribute: str) -> tuple[int, ...]:
        """An attribute that is a set of axes, `lhs_contracting_dims={1}` for example."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(axis) for axis in found[1].split(",") if axis) if found else ()


class Module:
    """A program.

    Attributes:
      computations: instructions of each, in order, by name.
      entry: name of the one that is run.
      partitions: devices that it runs on.
    """

    def __init__(self, computations: dict[str, tuple[Instruction, ...]], entry: str, partitions: int = 1):
        self.computations = computations
        self.entry = entry
        self.partitions = partitions
        self._by_name = {name: {i.name: i for i in body} for name, body in computations.items()}

    def operand(self, instruction: Instruction, position: int) -> Instruction:
        """The instruction that makes an operand."""
        return self._by_name[instruction.computation][instruction.operands[position]]

    def operands(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions that make its operands."""
        return (self.operand(instruction, i) for i in range(len(instruction.operands)))

    def root(self, computation: str) -> Instruction:
        return next(i for i in self.computations[computation] if i.is_root)

    def parameters(self, computation: str) -> dict[int, Instruction]:
        """A computation's parameters by number."""
        return {i.index: i for i in self.computations[computation] if i.opcode == "parameter"}

    @functools.cached_property
    def callers(self) -> dict[str, tuple[Instruction, ...]]:
        """The instructions that call each computation."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.computations}
        for body in self.computations.values():
            for instruction in body:
                for names in instruction.called.values():
                    for name in names:
                        found[name].append(instruction)
        return {name: tuple(callers) for name, callers in found.items()}

    @functools.cached_property
    def users(self) -> dict[tuple[str, str], tuple[Instruction, ...]]:
        """The instructions that take each, by (computation, name)."""
        found: dict[tuple[str, str], list[Instruction]] = {}
        for body in self.computations.values():
            for instruction in body:
                for name in dict.fromkeys(instruction.operands):
                    found.setdefault((instruction.computation, name), []).append(instruction)
        return {key: tuple(users) for key, users in found.items()}


def parse(text: str) -> Module:
    """Reads a program.

    Raises:
      ValueError: text that is not HLO.
    """
    computations: dict[str, list[Instruction]] = {}
    entry = current = None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is None:
            head = _HEAD.match(line)
            if head:
                current = head[2]
                computations[current] = []
                entry = current if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            computations[current].append(_instruction(current, found[2], found[3], is_root=bool(found[1])))
    if entry is None:
        raise ValueError('This is not HLO text: take compiled.as_text(), or lowered.as_text(dialect="hlo").')
    partitions = _PARTITIONS.search(text)
    bodies = {name: tuple(body) for name, body in computations.items()}
    return Module(bodies, entry, int(partitions[1]) if partitions else 1)


def _instruction(computation: str, name: str, text: str, *, is_root: bool) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    result, rest = text[:end], text[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    arguments, attributes = rest[: end - 1], rest[end:]
    operands: tuple[str, ...] = ()
    if opcode not in ("constant", "parameter"):
        parts = (part.split()[-1] for part in _split(arguments) if part.split())
        operands = tuple(part.lstrip("%") for part in parts)
    return Instruction(name, computation, types_of(result), opcode, operands, arguments, attributes, is_root)


def types_of(text: str) -> tuple[ArrayType, ...]:
    """The array types that a piece of HLO text names, tuples flattened."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        shape = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        found.append(ArrayType(dtype, shape, int(space[1]) if space else 0))
    return tuple(found)


def _closing(text: str) -> int:
    """The index after the parenthesis that closes the one at the start."""
    depth = 0
    for i, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return i + 1
    return len(text)


def _split(text: str) -> list[str]:
    """Splits at the commas that are in no bracket; comments are dropped."""
    text = re.sub(r"/\*.*?\*/", "", text)
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]
