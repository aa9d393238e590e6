"""How fast a chip could run a compiled program at best, by its data sheet.

Kernels run one after the other, and each takes as long as its products at the peak of their format, or its bytes at the
bandwidth of main memory, whichever is longer (Williams et al. 2009, Roofline: an insightful visual performance model
for multicore architectures). What no data sheet tells is left out: launches, latencies, arithmetic that is no product,
and what is sent between devices.
"""

import collections
import dataclasses

from q8jax.devices import Device
from q8jax.hlo.costs import bytes_of, executed
from q8jax.hlo.products import Product
from q8jax.hlo.text import ArrayType, Instruction, Module


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Least times of one run on one device, in seconds.

    Attributes:
      products: of all products at their peaks.
      memory: of all bytes at main memory's bandwidth.
      kernels: of one kernel after the other, each as long as the longer of its two.
    """

    products: float
    memory: float
    kernels: float


def roofline(module: Module, products: list[Product], device: Device) -> Roofline:
    """That of a program.

    Args:
      module: the program.
      products: its matrix products.
      device: that it runs on.
    """
    multiplying: collections.defaultdict[tuple[str, str], float] = collections.defaultdict(float)
    for product in products:
        kernel = _kernel(module, product.instruction)
        multiplying[kernel.computation, kernel.name] += product.flops / _peak(device, product.operands)
    memory = kernels = 0.0
    for instruction, times in executed(module):
        moving = bytes_of(module, instruction) * times / device.bandwidth
        memory += moving
        kernels += max(moving, multiplying.get((instruction.computation, instruction.name), 0.0))
    return Roofline(sum(multiplying.values()), memory, kernels)


def _kernel(module: Module, instruction: Instruction) -> Instruction:
    """What runs by itself and has the instruction in it."""
    callers = module.callers[instruction.computation]
    fused = callers and callers[0].opcode == "fusion"
    return _kernel(module, callers[0]) if fused else instruction


def _peak(device: Device, operands: tuple[ArrayType, ArrayType]) -> float:
    """Operations a second; in float32 half of what it does in 16 bits."""
    names = [operand.dtype for operand in operands]
    if all(name.startswith("f8") for name in names):
        return device.fp8 or device.bf16
    if all(name.startswith(("s", "u")) for name in names):
        return device.int8 or device.bf16
    return device.bf16 / 2 if any(name in ("f32", "f64") for name in names) else device.bf16
