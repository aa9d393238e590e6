"""Where the transformer's arrays are on a mesh: one table from the names of their axes to axes of the mesh.

The mesh has three axes. `data` and `fsdp` both split the batch; `fsdp` also splits every parameter, which is gathered
for the layer that it is needed in: a kernel along its rows, because a TPU pads columns to a multiple of 128. `tensor`
splits heads, hidden units and the vocabulary, and between the layers the tokens of a sequence (Korthikanti et al. 2022,
Reducing activation recomputation in large transformer models, arXiv:2205.05198).
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.models.config import TransformerConfig
from q8jax.shardings import DotShardings

AXES = ("data", "fsdp", "tensor")
_MESH_AXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "batch": ("data", "fsdp"),
        "tokens": ("tensor",),
        "embed": (),
        "heads": ("tensor",),
        "hidden": ("tensor",),
        "vocab": ("tensor",),
        "rows of embed": ("fsdp",),
        "rows of heads": ("tensor", "fsdp"),
        "rows of hidden": ("tensor", "fsdp"),
        "": (),
    }
)
# The axes of each layer's inputs, and of its outputs; the gate and the hidden units have one of their own.
_DOTS = MappingProxyType(
    {
        "blocks/attention/qkv": ("embed", ("heads",)),
        "blocks/attention/out": ("heads", ("embed",)),
        "blocks/mlp/up": ("embed", ("", "hidden")),
        "blocks/mlp/down": ("hidden", ("embed",)),
        "head": ("embed", ("vocab",)),
    }
)
_PARAMETERS = MappingProxyType(
    {f"{path}/kernel": (f"rows of {inputs}", *outputs) for path, (inputs, outputs) in _DOTS.items()}
    | {"embedding/embedding": ("vocab", "rows of embed")}
)


@dataclasses.dataclass(frozen=True)
class ModelShardings:
    """Where a transformer's arrays are; where nothing is said, the compiler chooses.

    Attributes:
      stream: the residual stream [B, T, D] between layers.
      dots: for the paths of layers what their dots multiply.
      devices: of the mesh; None where there is none.
    """

    stream: NamedSharding | None = None
    dots: tuple[tuple[str, DotShardings], ...] = ()
    devices: int | None = None

    @property
    def makes_codes_twice(self) -> bool:
        """Whether a rematerialized pass makes a layer's codes again, while those of all layers are not kept.

        Rematerialization is to spare memory, and where each device has a part of every kernel making codes takes little
        time. A TPU is the exception: its compiler keeps more in float32 for making them than the codes take.
        """
        return self.stream is not None and self.stream.mesh.devices.flat[0].platform != "tpu"

    @classmethod
    def of(cls, mesh: Mesh) -> "ModelShardings":
        """What the mesh asks of a transformer; one device asks for nothing."""
        if mesh.size == 1:
            return cls()
        between = place(mesh, ("batch", "tokens", ""))
        dots = []
        for path, (inputs, outputs) in _DOTS.items():
            lhs, grad = ("batch", "", inputs), ("batch", "", *outputs)
            dots.append(
                (
                    path,
                    DotShardings(
                        lhs=place(mesh, lhs),
                        rhs=place(mesh, (inputs, *outputs)),
                        grad=place(mesh, grad),
                        fwd=between if "embed" in outputs else place(mesh, grad),
                        dlhs=between if inputs == "embed" else place(mesh, lhs),
                        drhs=place(mesh, _PARAMETERS[f"{path}/kernel"]),
                    ),
                )
            )
        return cls(between, tuple(dots), mesh.size)


WHOLE = ModelShardings()


def place(mesh: Mesh, axes: tuple[str, ...]) -> NamedSharding:
    """The sharding of an array whose axes have these names."""
    present = [tuple(name for name in _MESH_AXES[axis] if mesh.shape[name] > 1) for axis in axes]
    return NamedSharding(mesh, PartitionSpec(*(names or None for names in present)))


def parameter(mesh: Mesh, path: str, ndim: int) -> NamedSharding:
    """The sharding of a parameter, or of what the optimizer keeps of it, by the end of its path."""
    for end, axes in _PARAMETERS.items():
        if path == end or path.endswith(f"/{end}"):
            return place(mesh, (*("",) * (ndim - len(axes)), *axes))
    return place(mesh, ())


def check(mesh: Mesh, text: str, config: TransformerConfig, seq_len: int) -> None:
    """Checks that a mesh divides a transformer.

    Args:
      mesh: that was asked for.
      text: the value of --mesh.
      config: shapes.
      seq_len: tokens of a sequence.

    Raises:
      ValueError: it does not, naming what it is to divide.
    """
    divided = {
        ("tensor",): {"kv_heads": config.kv_heads, "vocab": config.vocab, "seq_len": seq_len},
        ("tensor", "fsdp"): {"d_model": config.d_model, "d_ff": config.d_ff},
    }
    for axes, sizes in divided.items():
        over = ",".join(f"{axis}:{mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)
        for name, size in sizes.items():
            if size % math.prod(mesh.shape[axis] for axis in axes):
                raise ValueError(
                    f"--mesh={text} splits {name}={size} over {over}, which does not divide it: choose a divisor."
                )
