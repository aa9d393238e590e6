"""The window that a kernel slides over the spatial axes of an array, and what it sees there.

Along each axis, position y sees at index k of the kernel the entry y · stride + k · dilation - low of the array, which
has zeros before and after it and base_dilation - 1 of them between its entries.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Window:
    """All of it static, one entry for each spatial axis.

    Attributes:
      size: of the kernel.
      strides: between positions.
      padding: (low, high), zeros before and after; negative ones cut.
      base_dilation: entries of the array are so far apart.
      dilation: entries of the kernel are so far apart.
      is_reversed: whether the kernel lies there back to front, as in the gradient of a convolution.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    base_dilation: tuple[int, ...]
    dilation: tuple[int, ...]
    is_reversed: bool = False

    @property
    def reach(self) -> tuple[int, ...]:
        """How many entries the kernel spans, holes included."""
        return tuple((size - 1) * step + 1 for size, step in zip(self.size, self.dilation))

    def positions(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """How many positions the window has on an array of these sizes.

        Raises:
          ValueError: the kernel is larger than the padded array.
        """
        spans = [
            self._spread(size, axis) + sum(self.padding[axis]) - self.reach[axis] for axis, size in enumerate(sizes)
        ]
        if min(spans, default=0) < 0:
            raise ValueError(
                f"A kernel that spans {self.reach} has no place on spatial axes of sizes {tuple(sizes)} with padding "
                f"{self.padding}: pad more, or choose a smaller kernel."
            )
        return tuple(span // stride + 1 for span, stride in zip(spans, self.strides))

    def _spread(self, size: int, axis: int) -> int:
        return (size - 1) * self.base_dilation[axis] + 1

    def transposed(self, sizes: Sequence[int]) -> "Window":
        """The window on the result's gradient that gives the gradient of an array of these sizes."""
        padding = []
        for axis, (size, outputs) in enumerate(zip(sizes, self.positions(sizes), strict=True)):
            low = self.reach[axis] - 1 - self.padding[axis][0]
            high = self._spread(size, axis) + self.reach[axis] - 1 - ((outputs - 1) * self.strides[axis] + 1) - low
            padding.append((low, high))
        return dataclasses.replace(
            self,
            strides=self.base_dilation,
            padding=tuple(padding),
            base_dilation=self.strides,
            is_reversed=not self.is_reversed,
        )

    def on_result(self, sizes: Sequence[int]) -> "Window":
        """The window of the result's gradient on an array of these sizes that gives the kernel's gradient."""
        outputs = self.positions(sizes)
        spans = [(count - 1) * stride + 1 for count, stride in zip(outputs, self.strides)]
        padding = []
        for axis, size in enumerate(sizes):
            low = self.padding[axis][0]
            padding.append((low, self.reach[axis] - 1 + spans[axis] - self._spread(size, axis) - low))
        return Window(outputs, self.dilation, tuple(padding), self.base_dilation, self.strides)

    def unfold(self, x: jax.Array, spatial: int, at: int) -> jax.Array:
        """Copies what each position sees.

        Args:
          x: any array; zeros in all formats of codes are zero bits.
          spatial: the first of its spatial axes.
          at: where the axes of the kernel are inserted into the result.

        Returns:
          x with positions in the place of its spatial axes, and the axes of the kernel.
        """
        axes = range(spatial, spatial + len(self.size))
        sizes = x.shape[spatial : axes.stop]
        positions = self.positions(sizes)
        config = [(0, 0, 0)] * x.ndim
        config[spatial : axes.stop] = [(*pad, step - 1) for pad, step in zip(self.padding, self.base_dilation)]
        padded = lax.pad(x, np.zeros((), x.dtype), config) if any(map(any, config)) else x
        seen = []
        for index in itertools.product(*map(range, self.size)):
            start, limit, strides = [0] * x.ndim, list(padded.shape), [1] * x.ndim
            for i, axis in enumerate(axes):
                own = self.size[i] - 1 - index[i] if self.is_reversed else index[i]
                start[axis] = own * self.dilation[i]
                limit[axis] = start[axis] + (positions[i] - 1) * self.strides[i] + 1
                strides[axis] = self.strides[i]
            seen.append(lax.slice(padded, start, limit, strides))
        stacked = jnp.stack(seen, at) if len(seen) > 1 else lax.expand_dims(seen[0], (at,))
        assert stacked.shape[at] == math.prod(self.size)
        return stacked.reshape(*stacked.shape[:at], *self.size, *stacked.shape[at + 1 :])
