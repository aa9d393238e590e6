"""Where the values of an operand come from, through fusions, calls and loops.

The question that is asked of a wide operand of a dot: does everything that reaches it pass through values of few bits,
and is nothing done to these but to write them in a wider type? Then the dot multiplies the bare codes.
"""

import dataclasses

from q8jax.hlo.text import CALLS, Instruction, Module, words

# What gives no tensor's values but numbers known to the compiler.
_KNOWN = frozenset(["constant", "iota"])
# What moves the values of its first operand, or writes them in another type.
_MOVES = words(
    "bitcast bitcast-convert convert reshape transpose copy slice dynamic-slice gather pad reverse broadcast "
    "opt-barrier copy-start copy-done slice-start slice-done all-gather all-gather-start all-gather-done "
    "all-to-all collective-permute collective-permute-start collective-permute-done not"
)
# What decoding is made of.
_COMPUTES = words(
    "add subtract multiply divide minimum maximum and or xor shift-left shift-right-logical "
    "shift-right-arithmetic compare select clamp concatenate dynamic-update-slice"
)
_SCALES = frozenset(["multiply", "divide"])


@dataclasses.dataclass
class Sources:
    """What reaches a value.

    Attributes:
      narrow: dtypes of few bits that all that comes this way passes through, in XLA's spelling.
      wide: dtypes of tensors that reach it without.
      scaled: whether the values are multiplied, after that, by what is known only at run time.
    """

    narrow: set[str] = dataclasses.field(default_factory=set)
    wide: set[str] = dataclasses.field(default_factory=set)
    scaled: bool = False

    @property
    def are_codes(self) -> bool:
        return bool(self.narrow) and not self.wide


def sources(module: Module, value: Instruction, bits: int, element: int = 0) -> Sources:
    """Follows the values of an instruction back to where they were narrow, or to where they were computed.

    Args:
      module: the program.
      value: the instruction.
      bits: how many count as few.
      element: which of its results.
    """
    search = _Search(module, bits)
    search.visit(value, element)
    return search.found


class _Search:
    def __init__(self, module: Module, bits: int):
        self._module = module
        self._bits = bits
        self.found = Sources()

    def visit(self, value: Instruction, element: int) -> None:
        seen = set()
        pending = [(value, element)]
        while pending:
            node, element = pending.pop()
            key = node.computation, node.name, element
            if key in seen:
                continue
            seen.add(key)
            kind = node.types[element] if element < len(node.types) else node.types[0]
            if kind.dtype not in ("pred", "token") and kind.bits <= self._bits:
                self.found.narrow.add(kind.dtype)
                continue
            before = self._before(node, element)
            if before is None:
                self.found.wide.add(kind.dtype)
            else:
                pending.extend(before)

    def _before(self, node: Instruction, element: int) -> list[tuple[Instruction, int]] | None:
        """What a value is made from; None if it is computed here, or comes from outside."""
        module = self._module
        if node.opcode in _KNOWN:
            return []
        if node.opcode == "get-tuple-element":
            return [(module.operand(node, 0), node.index)]
        if node.opcode == "tuple":
            return [(module.operand(node, element), 0)]
        if node.opcode == "fusion" or node.opcode in CALLS:
            called = [name for names in node.called.values() for name in names]
            return [self._result(called[0], element)]
        if node.opcode in ("async-done", "async-update", "call-done"):
            return [(module.operand(node, 0), element)]
        if node.opcode == "conditional":
            return [self._result(name, element) for names in node.called.values() for name in names]
        if node.opcode == "while":
            return [(module.operand(node, 0), element), self._result(node.called["body"][0], element)]
        if node.opcode == "parameter":
            return self._outside(node, element)
        if node.opcode in _MOVES:
            return [(module.operand(node, 0), element if len(node.types) > 1 else 0)]
        if node.opcode in _COMPUTES:
            return self._operands(node)
        return None

    def _operands(self, node: Instruction) -> list[tuple[Instruction, int]]:
        """The operands that are tensors; a factor that is spread over a tensor is a scale."""
        tensors = []
        for operand in self._module.operands(node):
            if node.opcode == "select" and operand.types[0].dtype == "pred" and operand.types[0].size == 1:
                continue
            spread = self._spread(operand)
            if spread is None or spread.types[0].size == node.types[0].size:
                tensors.append((operand, 0))
            elif node.opcode in _SCALES and not self._is_known(spread):
                self.found.scaled = True
            elif not self._is_known(spread) and node.opcode not in ("dynamic-update-slice", "clamp"):
                tensors.append((operand, 0))
        return tensors

    def _spread(self, node: Instruction) -> Instruction | None:
        """The smaller tensor that a value repeats, if it does."""
        while node.opcode in ("bitcast", "reshape", "convert", "copy", "transpose", "broadcast"):
            if node.opcode == "broadcast":
                return self._module.operand(node, 0)
            node = self._module.operand(node, 0)
        return node if node.types[0].size == 1 else None

    def _is_known(self, node: Instruction) -> bool:
        while node.opcode in ("bitcast", "reshape", "convert", "copy", "transpose", "broadcast"):
            node = self._module.operand(node, 0)
        if node.opcode == "parameter":
            outside = self._outside(node, 0)
            return outside is not None and all(self._is_known(value) for value, _ in outside)
        return node.opcode in _KNOWN

    def _result(self, computation: str, element: int) -> tuple[Instruction, int]:
        root = self._module.root(computation)
        return (self._module.operand(root, element), 0) if root.opcode == "tuple" else (root, element)

    def _outside(self, parameter: Instruction, element: int) -> list[tuple[Instruction, int]] | None:
        """What callers put into a parameter."""
        module, computation = self._module, parameter.computation
        callers = module.callers[computation]
        if computation == module.entry or not callers:
            return None
        found = []
        for caller in callers:
            if caller.opcode == "while":
                found.append((module.operand(caller, 0), element))
                found.append(self._result(caller.called["body"][0], element))
            elif caller.opcode == "conditional":
                branch = [name for names in caller.called.values() for name in names].index(computation)
                found.append((module.operand(caller, branch + 1), element))
            else:
                found.append((module.operand(caller, parameter.index), element))
        return found
