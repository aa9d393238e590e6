"""Images with labels: `idx:DIR`, the files of MNIST and its kin, and `npz:FILE`, arrays of NumPy.

IDX: a folder with `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, those of `valid` and of `t10k` or `test`
likewise, each as it is or compressed (`.gz`). NPZ: `x_train`, `y_train`, `x_test`, `y_test` and perhaps `x_valid`,
`y_valid`; images are [n, height, width] or with channels last, of bytes or floats, and labels integers from 0.
Nothing in such a file is unpickled.

References:
  LeCun, Cortes and Burges, "The MNIST Database of Handwritten Digits", 1998, file formats.
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.tasks.examples import Images, Task
from experiments.tasks.spec import SPLITS, Spec, check_file
from experiments.tasks.splits import split_task

OPTIONS: dict[str, str] = {}
_IDX_NAMES = {"train": ("train",), "valid": ("valid",), "test": ("t10k", "test")}
_BYTES = 8  # the code of unsigned bytes, and the only kind in use


def load_idx(spec: Spec, classes: Sequence[str] = ()) -> Task[Images]:
    """Reads a folder of IDX files; `classes` are names, digits unless given.

    Raises:
      ValueError: files are missing, or not what is expected.
    """
    if spec.path is None or not os.path.isdir(spec.path):
        raise ValueError(f"{spec.flag}: name the folder of the IDX files, as in {spec.kind}:DIR.")
    examples = {}
    for split, names in _IDX_NAMES.items():
        for name in names:
            files = [_beside(spec.path, f"{name}-{what}") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
            if files[0] and files[1]:
                examples[split] = _images(files[0], files[1], read_idx(files[0], 3), read_idx(files[1], 1))
    if "train" not in examples:
        raise ValueError(
            f"{spec.flag}: {spec.path} has no train-images-idx3-ubyte and train-labels-idx1-ubyte, or .gz."
        )
    return task(spec, examples, classes)


def load_npz(spec: Spec) -> Task[Images]:
    """Reads an archive of arrays.

    Raises:
      ValueError: it is not one, or its arrays are not what is expected.
    """
    if spec.path is None:
        raise ValueError(f"{spec.flag}: name one file, as in npz:FILE, whose arrays are x_train, y_train and so on.")
    check_file(spec.flag, spec.path)
    arrays = _arrays(spec.path)
    examples = {
        split: _images(f"{spec.path}: x_{split}", f"y_{split}", arrays[f"x_{split}"], arrays[f"y_{split}"])
        for split in SPLITS
        if f"x_{split}" in arrays and f"y_{split}" in arrays
    }
    if "train" not in examples:
        raise ValueError(
            f"{spec.path} has {', '.join(arrays) or 'no arrays'}, expected x_train and y_train among them."
        )
    return task(spec, examples)


def task(spec: Spec, examples: Mapping[str, Images], classes: Sequence[str] = ()) -> Task[Images]:
    """The task of images by split, which are of one size."""
    sizes = {split: found.pixels.shape[1:] for split, found in examples.items()}
    if len(set(sizes.values())) > 1 or len({found.pixels.dtype for found in examples.values()}) > 1:
        raise ValueError(f"{spec.flag}: images differ in size or type between the splits, {sizes}.")
    count = 1 + max(int(found.labels.max(initial=0)) for found in examples.values())
    if classes and count > len(classes):
        raise ValueError(f"{spec.flag}: there is a label {count - 1}, where 0 to {len(classes) - 1} are expected.")
    return split_task(spec.data, tuple(classes or map(str, range(count))), examples)


def read_idx(path: str, dimensions: int) -> np.ndarray:
    """The array of an IDX file, uint8 with so many dimensions.

    Raises:
      ValueError: it is not that, or cut short.
    """
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            stored = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}), get it again.") from error
    expected = bytes([0, 0, _BYTES, dimensions])
    if stored[:4] != expected:
        raise ValueError(
            f"{path} begins with {stored[:4].hex()}, expected {expected.hex()}: IDX, bytes in {dimensions} dimensions."
        )
    body = 4 + 4 * dimensions
    shape = np.frombuffer(stored[4:body].ljust(4 * dimensions, b"\0"), ">u4").tolist()
    if len(stored) - body != math.prod(shape):
        raise ValueError(f"{path} has {len(stored) - body} bytes after its head, expected {shape}: get it again.")
    return np.frombuffer(stored, np.uint8, offset=body).reshape(shape)


def _beside(folder: str, name: str) -> str | None:
    paths = (os.path.join(folder, name + suffix) for suffix in ("", ".gz"))
    return next(filter(os.path.isfile, paths), None)


def _arrays(path: str) -> dict[str, np.ndarray]:
    names = [f"{letter}_{split}" for letter, split in itertools.product("xy", SPLITS)]
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is one array, not an archive of several")
        with archive:
            return {name: archive[name] for name in names if name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not an .npz file of plain arrays ({error}), write it with numpy.savez.") from error


def _images(images: str, labels: str, pixels: np.ndarray, classes: np.ndarray) -> Images:
    """Images from arrays, whose names open the messages."""
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim != 4 or pixels.dtype.kind not in "uf" or (pixels.dtype.kind == "u" and pixels.dtype != np.uint8):
        raise ValueError(
            f"{images} is {pixels.dtype} {list(pixels.shape)}, expected bytes or floats [n, height, width(, channels)]."
        )
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32)
        if not np.isfinite(pixels).all():
            raise ValueError(f"{images} has values that are not finite, repair them.")
    if classes.dtype.kind not in "iu" or classes.shape not in ((len(pixels),), (len(pixels), 1)):
        raise ValueError(
            f"{labels} is {classes.dtype} {list(classes.shape)}, expected whole numbers for {len(pixels)} images."
        )
    if classes.size and not 0 <= int(classes.min()) <= int(classes.max()) < 2**16:
        raise ValueError(
            f"{labels} has values from {classes.min()} to {classes.max()}, expected classes counted from 0."
        )
    return Images(pixels, classes.reshape(-1).astype(np.int32))
