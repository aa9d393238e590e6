"""The matrix products of a program: what each multiplies, what runs it, how often, under which name."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator

import numpy as np

from q8jax.hlo.costs import custom_call_target, trip_count
from q8jax.hlo.text import CALLS, ArrayType, Instruction, Module


@dataclasses.dataclass(frozen=True)
class Product:
    """One matrix product.

    Attributes:
      instruction: the dot, the convolution or the library call.
      operands: what it multiplies.
      result: what it gives.
      summed: how many products each element of the result is the sum of.
      executed_by: the library or the unit that runs it.
      name: the name stack under which JAX traced it.
      times: how often, in one run of the program.
      flops: of all times together.
    """

    instruction: Instruction
    operands: tuple[ArrayType, ArrayType]
    result: ArrayType
    summed: int
    executed_by: str
    name: str
    times: int
    flops: int

    @property
    def accumulator(self) -> str:
        """The dtype of its sums, in XLA's spelling; a library's is wide whatever its result is."""
        integers = all(re.match(r"[su]\d", operand.dtype) for operand in self.operands)
        if self.executed_by.startswith(("cuBLAS", "cudnn", "MXU")):
            return "s32" if integers else "f32"
        return self.result.dtype


def products(module: Module, platform: str) -> list[Product]:
    """The products of a program, each as often as it stands there.

    Args:
      module: the program.
      platform: 'cpu', 'gpu' or 'tpu'.
    """
    return list(_products(module, platform, module.entry, 1, None))


def _products(
    module: Module, platform: str, computation: str, times: int, fusion: Instruction | None
) -> Iterator[Product]:
    for instruction in module.computations[computation]:
        found = _product(module, platform, instruction, times, fusion)
        if found is not None:
            yield found
        called = instruction.called
        if instruction.opcode == "while":
            yield from _products(module, platform, called["body"][0], times * trip_count(module, instruction), None)
        elif instruction.opcode in ("fusion", "conditional", *CALLS):
            inside = (fusion or instruction) if instruction.opcode == "fusion" else fusion
            for names in called.values():
                for name in names:
                    yield from _products(module, platform, name, times, inside)


def _product(
    module: Module, platform: str, instruction: Instruction, times: int, fusion: Instruction | None
) -> Product | None:
    target = custom_call_target(instruction)
    if instruction.opcode not in ("dot", "convolution", "ragged-dot", "scaled-dot") and not _is_gemm(target):
        return None
    first, second = (module.operand(instruction, i).types[0] for i in (0, 1))
    result = instruction.types[0]
    name = instruction.op_name or (fusion.op_name if fusion else "")
    summed = _summed(instruction, first, second)
    unit = _executed_by(platform, instruction, target, (first, second), fusion)
    return Product(instruction, (first, second), result, summed, unit, name, times, 2 * result.size * summed * times)


def _is_gemm(target: str) -> bool:
    libraries = ("__cublas$gemm", "__cublas$lt$matmul", "__onednn$matmul", "__triton$gemm", "__cudnn$conv")
    return target.startswith(libraries)


def _summed(instruction: Instruction, first: ArrayType, second: ArrayType) -> int:
    """How many products each element of the result is the sum of, on average."""
    if "dim_labels" in instruction.attributes:
        return _summed_by_convolution(instruction, first, second)
    axes = instruction.dimensions("lhs_contracting_dims")
    if instruction.opcode == "custom-call":
        config = instruction.attributes.partition("backend_config=")[2]
        found = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', config)
        axes = tuple(int(axis) for axis in json.loads(found[1])) if found else (len(first.shape) - 1,)
    return math.prod(first.shape[axis] for axis in axes)


def _summed_by_convolution(instruction: Instruction, first: ArrayType, second: ArrayType) -> int:
    """As `_summed`, without padding and holes: with these a TPU's compiler makes one convolution of many products.

    A library's gradients have the attributes of the convolution that they are of.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    entries = dict(entry.split("=") for entry in window[1].split()) if window else {}
    result = instruction.types[0]
    target = custom_call_target(instruction)
    image, kernel, outcome = (
        (result, second, first)
        if "BackwardInput" in target
        else (first, result, second)
        if "BackwardFilter" in target
        else (first, second, result)
    )
    total = kernel.shape[labels[2].index("i")] * outcome.size
    for axis in range(sum(label.isdigit() for label in labels[1])):
        inputs, size, outputs = (
            kind.shape[names.index(str(axis))]
            for kind, names in zip((image, kernel, outcome), (labels[1], labels[2], labels[3]), strict=True)
        )
        option = lambda name, default: entries.get(name, "x".join([default] * (axis + 1))).split("x")[axis]  # noqa: B023
        stride, input_step, kernel_step = (int(option(n, "1")) for n in ("stride", "lhs_dilate", "rhs_dilate"))
        before = int(option("pad", "0_0").split("_")[0])
        at = np.arange(outputs)[:, None] * stride + np.arange(size)[None, :] * kernel_step - before
        met = (at >= 0) & (at <= (inputs - 1) * input_step) & (at % input_step == 0)
        total = total * int(met.sum()) // outputs
    return total // result.size


def _executed_by(
    platform: str,
    instruction: Instruction,
    target: str,
    operands: tuple[ArrayType, ArrayType],
    fusion: Instruction | None,
) -> str:
    if target.startswith("__cublas"):
        library = "cuBLASLt" if "$lt$" in target else "cuBLAS"
        kind = "FP8" if target.endswith("$f8") else "integer" if operands[0].dtype == "s8" else operands[0].dtype
        return f"{library} {kind}"
    if target:
        return target.strip("_").replace("$", " ")
    config = fusion.attributes if fusion is not None else ""
    if platform == "tpu":
        return "MXU convolution" if instruction.opcode == "convolution" else "vector unit"
    if platform == "gpu":
        return "Triton fusion" if "triton" in config else "loop fusion"
    return "YNN fusion" if fusion is not None and "ynn" in fusion.name + config else "CPU dot"
