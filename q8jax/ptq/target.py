"""What a tensor is to become: the format of its codes, which entries share a scale, and how the scale is found.

One frozen, hashable value, so that it can be a static argument of `jit`. Weights are [in, out] and inputs
[rows, in], the matrices of the product inputs @ weights.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from q8jax import choices
from q8jax.calibration import SCALE_FORMATS, affine, affine_from_range, bounded_scale, scale_from_amax
from q8jax.formats import Format, get_format, scale_to_e8m0
from q8jax.groups import amax, scale_shape
from q8jax.qarray import QArray, quantize

GRANULARITIES = ("tensor", "channel", "row", "group")


@dataclasses.dataclass(frozen=True)
class Target:
    """How a matrix is quantized.

    Attributes:
      qtype: format of the codes; with a code book, the unsigned format of the indices.
      granularity: 'tensor'; 'channel', one scale per column, an output channel of weights; 'row', one per row, a token
        of inputs; 'group', one per column and `group_size` rows, a piece of the contracting axis of weights.
      group_size: of 'group'.
      is_affine: whether codes have a zero point; integer formats only.
      scale_format: as in `quantize`.
      full_range: whether signed integers use their lowest code.
      codebook: ascending values, scaled so that the largest magnitude stands for amax.

    Raises:
      ValueError: an unknown word, or settings that contradict each other.
    """

    qtype: str
    granularity: str = "tensor"
    group_size: int | None = None
    is_affine: bool = False
    scale_format: str = "float32"
    full_range: bool = False
    codebook: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "qtype", get_format(self.qtype).name)
        choices.check("granularity", self.granularity, GRANULARITIES)
        choices.check("scale_format", self.scale_format, SCALE_FORMATS)
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(f"group_size goes with granularity 'group', and only there, not {self.granularity!r}.")
        if self.is_affine and (self.format.kind != "int" or self.codebook is not None):
            raise ValueError(f"is_affine needs an integer qtype without a codebook, not {self.qtype}.")
        if not (self.is_affine or self.format.signed or self.codebook is not None):
            raise ValueError(f"{self.qtype} has no negative codes: set is_affine.")

    @property
    def format(self) -> Format:
        return get_format(self.qtype)

    @property
    def book(self) -> jax.Array | None:
        return None if self.codebook is None else jnp.asarray(self.codebook, jnp.float32)

    @property
    def axes(self) -> dict[str, Any]:
        """The `channelwise_axes` and `tiled_axes` of `quantize`, for a matrix."""
        if self.granularity == "group":
            return {"channelwise_axes": (1,), "tiled_axes": {0: self.group_size}}
        return {"channelwise_axes": {"tensor": (), "channel": (1,), "row": (0,)}[self.granularity]}

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return scale_shape(shape, **self.axes)

    def quantize(self, x: jax.Array) -> QArray:
        """Rounds a matrix to nearest, with scales from its extremes.

        Raises:
          ValueError: as `q8jax.quantize`, or x is no matrix.
        """
        check_matrix(x)
        calibration = "minmax" if self.is_affine else "absmax"
        options: dict[str, Any] = {
            "calibration": calibration,
            "scale_format": self.scale_format,
            "full_range": self.full_range,
        }
        return quantize(x, self.qtype, codebook=self.book, **self.axes, **options)

    def scales(self, x: jax.Array, shrink: jax.Array | float = 1) -> tuple[jax.Array, jax.Array | None]:
        """Returns scales and zero points for a matrix as `quantize` finds them, of extremes times `shrink`, 0 < · <= 1.

        Scales are float32, also those of 'e8m0'; NaN where the group has a NaN that codes cannot hold.
        """
        shrink = jnp.asarray(shrink, jnp.float32)
        if self.is_affine:
            options: dict[str, Any] = {"margin": 0, "scale_format": self.scale_format, "full_range": self.full_range}
            return affine(x.astype(jnp.float32) * shrink, self.scale_shape(x.shape), self.format, **options)
        keep_nan = self.codebook is not None or not self.format.has_nan
        return self.scale_of_amax(amax(x, keep_nan=keep_nan, **self.axes) * shrink), None

    def scale_of_amax(self, amax: jax.Array) -> jax.Array:
        """Returns the symmetric scales for these amaxes, float32."""
        if self.codebook is not None:
            top = np.float32(1) / np.float32(np.max(np.abs(self.codebook)))
            return bounded_scale(amax, top, 0, self.scale_format)
        return scale_from_amax(amax, self.format, scale_format=self.scale_format, full_range=self.full_range)

    def scales_of_range(self, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns scales and zero points that let codes reach from low <= 0 to high >= 0, float32."""
        if self.is_affine:
            options: dict[str, Any] = {"scale_format": self.scale_format, "full_range": self.full_range}
            return affine_from_range(low, high, self.format, **options)
        return self.scale_of_amax(jnp.maximum(-low, high)), None

    def encode(self, x: jax.Array, scale: jax.Array, zero_point: jax.Array | None = None) -> QArray:
        """Rounds x to nearest with these scales, float32, of any shape that fits it."""
        options: dict[str, Any] = {"scale": scale, "zero_point": zero_point, "full_range": self.full_range}
        return quantize(x, self.qtype, codebook=self.book, **options)

    def assemble(self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> QArray:
        """Puts codes and float32 scales together, in the scale format."""
        stored = scale_to_e8m0(scale) if self.scale_format == "e8m0" else scale
        return QArray(codes, stored, zero_point, self.book, qtype=self.qtype)


def check_matrix(x: jax.Array) -> None:
    """Raises ValueError unless x is a floating-point matrix."""
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"Expected a floating-point matrix, not {x.dtype} of shape {x.shape}: reshape, or vmap.")
