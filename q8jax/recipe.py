"""One frozen `Recipe` says everything about the arithmetic of one dot.

Three GEMMs, two operands each:

    fwd(lhs, rhs)    the product itself
    dlhs(grad, rhs)  the gradient of lhs
    drhs(lhs, grad)  the gradient of rhs

An operand is `none` (it stays in the compute dtype) or `qtype:granularity:scaling[:rounding]`.
Full, weight-only, activation-only and partial quantization are settings of the six operands, not
other code.

The one string form is what flags, config.json and repr show, and
`Recipe.parse(str(recipe)) == recipe`:

    fwd=e4m3fn:tensor:delayed,e4m3fn:tensor:delayed/dlhs=e5m2:tensor:delayed,e4m3fn:tensor:...

A string may start with the name of a preset, whose settings the rest overrides:
`fp8/margin=1/drhs=none,none`.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any, ClassVar

from q8jax import choices
from q8jax.calibration import SCALE_FORMATS
from q8jax.formats import FORMATS, Format, get_format
from q8jax.rounding import ROUNDINGS

GEMMS = ("fwd", "dlhs", "drhs")
TENSORS = ("lhs", "rhs", "grad")
GEMM_TENSORS = {"fwd": ("lhs", "rhs"), "dlhs": ("grad", "rhs"), "drhs": ("lhs", "grad")}
GRANULARITIES = ("tensor", "row", "tileK", "blockK")
SCALINGS = ("delayed", "current", "static", "unit")
AMAX_CHOICES = ("max", "recent", "average")
BACKWARDS = ("operands", "codes")
ACCUMULATIONS = ("fast", "mixed", "accurate")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
# Short names, by which strings show them.
GEMM_FORMATS = (
    *("e4m3fn", "e5m2", "e3m4", "e4m3", "e4m3b11fnuz", "e4m3fnuz", "e5m2fnuz"),
    *("e2m3fn", "e3m2fn", "e2m1fn", "int8", "int4", "int2"),
)


def _short(name: str) -> str:
    return re.sub("^float[0-9]_", "", name)


@dataclasses.dataclass(frozen=True)
class Operand:
    """How one operand of one GEMM is quantized.

    Attributes:
      qtype: a signed format of at most 8 bits, by its ml_dtypes name or short name.
      granularity: 'tensor'; 'row', one scale per vector along the contracting axes (a token of
        activations, an output channel of weights); 'tileK', 1×K tiles along the contracting axis;
        'blockK', K×K blocks.
      scaling: 'delayed', from earlier steps' amax; 'current', from the tensor itself; 'static', as
        calibrated; 'unit', a scale of 1 whatever the tensor.
      rounding: 'nearest_even', 'nearest_away', 'truncate' or 'stochastic'.

    Raises:
      ValueError: an unknown word, or scaling other than current of anything but the whole tensor.
    """

    qtype: str
    granularity: str = "tensor"
    scaling: str = "current"
    rounding: str = "nearest_even"

    def __post_init__(self) -> None:
        if self.qtype not in (*FORMATS, *map(_short, FORMATS)):
            choices.check("operand format", self.qtype, GEMM_FORMATS)
        object.__setattr__(self, "qtype", get_format(self.qtype).name)
        if _short(self.qtype) not in GEMM_FORMATS:
            raise ValueError(
                f"{self.qtype} cannot be an operand of a GEMM or hold a gradient: choose a signed "
                f"format of at most 8 bits, one of {', '.join(GEMM_FORMATS)}."
            )
        if not re.fullmatch("(tile|block)[1-9][0-9]*", self.granularity):
            choices.check("granularity", self.granularity, GRANULARITIES)
        if self.granularity in ("tileK", "blockK"):
            example = self.granularity.replace("K", "32")
            raise ValueError(f"Granularity {self.granularity!r} needs a number for K: write say {example}.")
        choices.check("scaling", self.scaling, SCALINGS)
        choices.check("rounding", self.rounding, ROUNDINGS)
        if self.scaling != "current" and self.granularity != "tensor":
            raise ValueError(
                f"{self.scaling.capitalize()} scaling has one scale per tensor, so it cannot have "
                f"granularity {self.granularity!r}: choose granularity tensor, or scaling current."
            )

    @property
    def format(self) -> Format:
        return get_format(self.qtype)

    @property
    def keeps_scale(self) -> bool:
        """Whether its scale comes from the scaling state."""
        return self.scaling in ("delayed", "static")

    @property
    def tile(self) -> int | None:
        """K of 'tileK' and 'blockK', else None."""
        digits = self.granularity.removeprefix("tile").removeprefix("block")
        return int(digits) if digits.isdigit() else None

    @property
    def is_block(self) -> bool:
        return self.granularity.startswith("block")

    def __str__(self) -> str:
        words = [_short(self.qtype), self.granularity, self.scaling]
        return ":".join(words + [self.rounding] * (self.rounding != "nearest_even"))

    @classmethod
    def parse(cls, text: str) -> "Operand | None":
        """Inverse of str; 'none' gives None; missing words take their defaults.

        Raises:
          ValueError: a misspelt or surplus word.
        """
        if text == "none":
            return None
        words = text.split(":")
        if len(words) > 4:
            raise ValueError(f"Operand {text!r} has more than four words: write qtype:granularity:scaling:rounding.")
        return cls(*words)


@dataclasses.dataclass(frozen=True)
class Gemm:
    """The operands of one GEMM, in the order of GEMM_TENSORS; None stays in the compute dtype."""

    first: Operand | None = None
    second: Operand | None = None

    def __post_init__(self) -> None:
        for operand in self:
            if not (operand is None or isinstance(operand, Operand)):
                raise ValueError(f"Operand {operand!r} must be an Operand or None.")

    def __iter__(self) -> Iterator[Operand | None]:
        return iter((self.first, self.second))

    def __str__(self) -> str:
        return ",".join("none" if operand is None else str(operand) for operand in self)

    @classmethod
    def parse(cls, text: str) -> "Gemm":
        """Inverse of str.

        Raises:
          ValueError: not two operands, or a misspelt one.
        """
        operands = text.split(",")
        if len(operands) != 2:
            raise ValueError(
                f"GEMM {text!r} must have two operands, separated by one comma: write for example none,none."
            )
        return cls(*map(Operand.parse, operands))


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor in one format: what one scale of the scaling state is for.

    Attributes:
      tensor: 'lhs', 'rhs' or 'grad'.
      qtype: name of the format.
      is_static: whether the scale stays as it was calibrated; static operands share no scale with others.
    """

    tensor: str
    qtype: str
    is_static: bool = False

    @classmethod
    def of(cls, tensor: str, operand: Operand) -> "Slot":
        """The slot of a tensor that is quantized as an operand."""
        return cls(tensor, operand.qtype, operand.scaling == "static")

    @property
    def format(self) -> Format:
        return get_format(self.qtype)


@dataclasses.dataclass(frozen=True, repr=False)
class Recipe:
    """The arithmetic of one dot and of its two gradients.

    Invariants: hashable and immutable, so it is a static argument of jit; equal recipes have equal
    strings; no option is set that has no effect.

    Attributes:
      fwd: operands (lhs, rhs).
      dlhs: operands (grad, rhs).
      drhs: operands (lhs, grad).
      compute: dtype of operands that are not quantized, and of the model's activations.
      history: H, the number of past steps whose amaxes make a delayed scale, at most 65536.
      amax: 'max' of the history, the most 'recent' one in it, or the 'average' of those in it, a moving one.
      margin: bits of headroom: scales are 2**margin times what the amax needs.
      scales: 'float32', or rounded up to a 'power_of_two' or to 'e8m0', the same kept in 8 bits.
      accumulation: of FP8 products, where a GPU can choose: 'accurate', in full float32 precision; 'fast', in Hopper's
        tensor cores, which keep fewer bits of their sums (arXiv:2412.19437, section 3.3.2); 'mixed', fast in fwd alone.
      backward: what dlhs and drhs take of a tensor that fwd alone quantizes: the 'operands' of the dot as they are, or
        what the 'codes' of fwd mean, so that gradients are those of the product that was computed, rounding taken for
        the identity (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).

    Raises:
      ValueError: a misspelt option, a margin or history out of range, or an option without effect
        on these operands.
    """

    fwd: Gemm = Gemm()
    dlhs: Gemm = Gemm()
    drhs: Gemm = Gemm()
    compute: str = "bfloat16"
    history: int = 16
    amax: str = "max"
    margin: int = 0
    scales: str = "float32"
    accumulation: str = "mixed"
    backward: str = "operands"

    _INTEGERS: ClassVar[tuple[str, ...]] = ("history", "margin")
    _OF_HISTORY: ClassVar[tuple[str, ...]] = ("history", "amax")
    _OF_SCALES: ClassVar[tuple[str, ...]] = ("margin", "scales")

    def __post_init__(self) -> None:
        for name in GEMMS:
            if not isinstance(getattr(self, name), Gemm):
                raise ValueError(f"{name} must be a Gemm: Recipe.parse takes strings.")
        choices.check("compute dtype", self.compute, COMPUTE_DTYPES)
        choices.check("amax choice", self.amax, AMAX_CHOICES)
        choices.check("scale format", self.scales, SCALE_FORMATS)
        choices.check("accumulation", self.accumulation, ACCUMULATIONS)
        if not isinstance(self.history, int) or not 1 <= self.history <= 65536:
            raise ValueError(f"history={self.history} must be a whole number of steps from 1 to 65536.")
        if not isinstance(self.margin, int) or not 0 <= self.margin <= 16:
            raise ValueError(f"margin={self.margin} must be a whole number of bits from 0 to 16.")
        if not any(operand.scaling == "delayed" for operand in self.operands):
            self._refuse(self._OF_HISTORY, "delayed operand")
        if all(operand.scaling == "unit" for operand in self.operands):
            self._refuse(self._OF_SCALES, "quantized operand that is scaled")
        if not any(all(o and o.format.kind == "float" for o in getattr(self, name)) for name in GEMMS):
            self._refuse(("accumulation",), "GEMM of two floating-point formats")
        choices.check("backward", self.backward, BACKWARDS)
        through = [
            fwd for fwd, own in zip(self.fwd, (self.drhs.first, self.dlhs.second), strict=True) if fwd and not own
        ]
        if not through:
            self._refuse(("backward",), "tensor that fwd alone quantizes")
        if self.backward == "codes" and any(operand.tile for operand in through):
            raise ValueError("backward=codes takes no tiles: choose granularity tensor or row.")

    def _refuse(self, names: tuple[str, ...], needed: str) -> None:
        for field in dataclasses.fields(self):
            if field.name in names and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)} has no effect without a {needed}: leave it out."
                )

    @property
    def _entries(self) -> Iterator[tuple[str, Operand]]:
        """The quantized operands with their tensors, GEMM by GEMM."""
        return (
            (tensor, operand)
            for gemm in GEMMS
            for tensor, operand in zip(GEMM_TENSORS[gemm], getattr(self, gemm), strict=True)
            if operand is not None
        )

    @functools.cached_property
    def slots(self) -> tuple[Slot, ...]:
        """What is quantized, in the order of the scaling state."""
        slots = {Slot.of(tensor, operand) for tensor, operand in self._entries}
        return tuple(sorted(slots, key=lambda slot: (TENSORS.index(slot.tensor), slot.qtype, slot.is_static)))

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The quantized operands of the three GEMMs."""
        return tuple(operand for _, operand in self._entries)

    def formats(self, gemm: str) -> tuple[str, str]:
        """The names of the formats that a GEMM, 'fwd', 'dlhs' or 'drhs', is to multiply."""
        first, second = (operand.format.name if operand else self.compute for operand in getattr(self, gemm))
        return first, second

    def accumulates_fast(self, gemm: str) -> bool:
        """Whether a GEMM, 'fwd', 'dlhs' or 'drhs', may sum with fewer bits than float32 has."""
        return self.accumulation == "fast" or (self.accumulation == "mixed" and gemm == "fwd")

    @property
    def is_quantized(self) -> bool:
        return bool(self.operands)

    @property
    def needs_key(self) -> bool:
        """Whether any operand is rounded stochastically."""
        return any(operand.rounding == "stochastic" for operand in self.operands)

    @property
    def keeps_state(self) -> bool:
        """Whether any scale comes from the scaling state."""
        return any(operand.keeps_scale for operand in self.operands)

    def __str__(self) -> str:
        fields = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        # Younger than the strings of many runs, which stay as they are.
        fields = [(name, value) for name, value in fields if (name, value) != ("backward", "operands")]
        return "/".join(f"{name}={value}" for name, value in fields)

    def __repr__(self) -> str:
        return f"Recipe({str(self)!r})"

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """Makes a recipe of its string form, of a preset, or of a preset with overrides.

        Raises:
          ValueError: an unknown preset or field, a field given twice, or a value that the field
            cannot take.
        """
        first, *rest = text.split("/")
        if "=" in first:
            base, fields = cls(), [first, *rest]
        else:
            from q8jax.presets import PRECISIONS  # the table is made of recipes, so it imports this

            choices.check("precision", first, PRECISIONS)
            base, fields = PRECISIONS[first].recipe, rest
        changes: dict[str, Any] = {}
        for field in fields:
            name, _, value = field.partition("=")
            choices.check("recipe field", name, [f.name for f in dataclasses.fields(cls)])
            if name in changes:
                raise ValueError(f"Recipe field {name!r} is given twice in {text!r}: keep one.")
            if name in GEMMS:
                changes[name] = Gemm.parse(value)
            elif name in cls._INTEGERS:
                if not re.fullmatch(r"-?[0-9]+", value):
                    raise ValueError(f"Recipe field {name}={value!r} must be a whole number.")
                changes[name] = int(value)
            else:
                changes[name] = value
        return dataclasses.replace(base, **changes)
