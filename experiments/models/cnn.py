"""A small residual convolutional network of plain NNX layers, which a policy then quantizes.

Shapes: B batch, H and W image, C channels. Pre-activation blocks (He et al. 2016, Identity mappings in deep residual
networks, arXiv:1603.05027), the first of each stage at half the resolution, with group normalization (Wu and He 2018,
arXiv:1803.08494): it normalizes each image by itself, so that there is no state beside the scales, and a batch may be
split at will.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import q8jax.nnx as qnnx
from q8jax.policy import Policy


@dataclasses.dataclass(frozen=True)
class CnnConfig:
    """A residual network; as it is, one of 0.29 M parameters for 28 × 28 grey images.

    Attributes:
      channels: of an image.
      classes: number of classes.
      stem: channels of the first convolution, at full resolution.
      widths: channels of each stage, each at half the resolution of what is before it.
      blocks: of each stage.
      groups: that channels are normalized in, a divisor of all the above widths.

    Raises:
      ValueError: a size below 1, or groups that do not divide.
    """

    channels: int = 1
    classes: int = 10
    stem: int = 32
    widths: tuple[int, ...] = (64, 128)
    blocks: int = 1
    groups: int = 8

    def __post_init__(self):
        for name in ("channels", "classes", "stem", "blocks", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for width in (self.stem, *self.widths):
            if width < 1 or width % self.groups:
                raise ValueError(f"groups={self.groups} must divide a width of {width}: choose another.")


def _active(norm: nnx.GroupNorm, x_BxHxWxC: jax.Array) -> jax.Array:
    """Normalized in float32, and what is positive of it."""
    return nnx.relu(norm(x_BxHxWxC.astype(jnp.float32))).astype(x_BxHxWxC.dtype)


class Block(nnx.Module):
    """Two convolutions, and a shortcut around them, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, dtype: Any, *, rngs: nnx.Rngs):
        options = {"use_bias": False, "dtype": dtype, "kernel_init": nnx.initializers.he_normal(), "rngs": rngs}
        self.first_norm = nnx.GroupNorm(inputs, groups, rngs=rngs)
        self.first = nnx.Conv(inputs, outputs, (3, 3), stride, **options)
        self.second_norm = nnx.GroupNorm(outputs, groups, rngs=rngs)
        self.second = nnx.Conv(outputs, outputs, (3, 3), **options)
        projected = stride > 1 or inputs != outputs
        self.shortcut = nnx.Conv(inputs, outputs, (1, 1), stride, **options) if projected else None

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        active = _active(self.first_norm, x_BxHxWxC)
        around = x_BxHxWxC if self.shortcut is None else self.shortcut(active)
        return around + self.second(_active(self.second_norm, self.first(active)))


class Cnn(nnx.Module):
    """The classifier: images to float32 logits.

    Args:
      config: shapes.
      policy: which layer runs in which recipe; paths are 'stem', 'blocks/' number '/' first, second and shortcut, and
        'head'.
      dtype: compute dtype of activations; parameters are float32.
      rngs: for parameters, and stream 'rounding' for stochastic rounding.
    """

    def __init__(self, config: CnnConfig, policy: Policy, dtype: Any, *, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        init = nnx.initializers.he_normal()
        self.stem = nnx.Conv(
            config.channels, config.stem, (3, 3), use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs
        )
        blocks, inputs = [], config.stem
        for width in config.widths:
            for i in range(config.blocks):
                blocks.append(Block(inputs, width, 1 if i else 2, config.groups, dtype, rngs=rngs))
                inputs = width
        self.blocks = nnx.List(blocks)
        self.norm = nnx.GroupNorm(inputs, config.groups, rngs=rngs)
        self.head = nnx.Linear(inputs, config.classes, dtype=dtype, rngs=rngs)
        qnnx.quantize_model(self, policy, rngs=rngs)

    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        """Logits, float32 [B, classes]."""
        x_BxHxWxC = self.stem(images_BxHxWxC.astype(self.dtype))
        for block in self.blocks:
            x_BxHxWxC = block(x_BxHxWxC)
        active = _active(self.norm, x_BxHxWxC)
        pooled_BxC = jnp.mean(active.astype(jnp.float32), axis=(1, 2)).astype(self.dtype)
        return self.head(pooled_BxC).astype(jnp.float32)
