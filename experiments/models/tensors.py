"""Tensors in safetensors files, found, read and written; nothing in such a file is ever run.

A model is one file, or several beside a `model.safetensors.index.json` that says which tensor is in which.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from experiments.runs.files import replacing

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
      file: where it is.
      name: its name there.
      dtype: as safetensors writes it, as in 'F32' and 'BF16'.
      shape: sizes.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Its values; bfloat16 in the dtype of ml_dtypes.

        Raises:
          ValueError: the file is no longer what it was.
        """
        with _opened(self.file) as file:
            return file.get_tensor(self.name)


def find(path: Path) -> dict[str, Tensor]:
    """The tensors of a model, by name.

    Args:
      path: a .safetensors file, an index of several, or a folder that holds `FILE` or `INDEX`.

    Raises:
      ValueError: a file is absent, is not in the format, is damaged, or holds other tensors than the index says.
    """
    if path.is_dir():
        file = next((path / name for name in (FILE, INDEX) if (path / name).exists()), None)
        if file is None:
            raise ValueError(f"{path} holds neither {FILE} nor {INDEX}: give weights as safetensors, not as a pickle.")
        path = file
    return _of_index(path) if path.name.endswith(".index.json") else _of_file(path)


def metadata(path: Path) -> dict[str, str]:
    """What the header of a .safetensors file says besides its tensors.

    Raises:
      ValueError: the file cannot be read.
    """
    with _opened(path) as file:
        return file.metadata() or {}


def write(path: Path, values: Mapping[str, np.ndarray], header: Mapping[str, str] | None = None) -> None:
    """Replaces a .safetensors file, whole or not at all.

    Args:
      path: of the file.
      values: its tensors, by name.
      header: what else its header is to say.

    Raises:
      ValueError: the file cannot be written.
    """
    contiguous = {name: np.asarray(value, order="C") for name, value in values.items()}
    try:
        with replacing(path) as temporary:
            # Without a format the Transformers library refuses the file.
            safetensors.numpy.save_file(contiguous, temporary, metadata={"format": "pt", **(header or {})})
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be written ({_brief(error)}): choose another folder, or make room.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: the file is absent, or holds none.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check the path.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({_brief(error)}): restore it.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: restore it.")
    return value


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({_brief(error)}): check the path.") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one ({_brief(error)}): restore it.") from error


def _of_file(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: Tensor(path, name, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


def _of_index(path: Path) -> dict[str, Tensor]:
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{path} has no weight_map from tensors to files: restore it.")
    files = sorted(set(places.values()))
    for file in files:
        # A name that leads out of the folder is not one of the model's files.
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{path} names {file!r}, which is no .safetensors file beside it: restore it.")
    found: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _of_file(path.with_name(file)).items():
            if places.get(name) != file:
                raise ValueError(f"{tensor.file} holds {name!r}, which {path} does not say: restore both.")
            found[name] = tensor
    for name in sorted(places.keys() - found.keys()):
        raise ValueError(f"{path.with_name(places[name])} does not hold {name!r}, which {path} says: restore both.")
    return found


def _brief(error: Exception) -> str:
    """What an error says, on one line, however long it is."""
    return " ".join(str(error).split())[:200]
