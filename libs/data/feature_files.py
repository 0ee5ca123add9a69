"""U-ViT's feature files: one .npy file a latent or a text, some of them an object array of two values.

An object array is a pickle, which can hold code. Here it is read with nothing allowed but what rebuilds arrays.
"""

import importlib
import io
import pickle
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import UserError
from ..files import atomic_path, reason

READERS = 8  # files that are read at once, by threads
# numpy reads a header by ast.parse, which in Python 3.11 fails now and then when two threads are in it (SystemError).
_ONE_HEADER = threading.Lock()

# What pickled arrays and numbers refer to; numpy 2 renamed numpy.core to numpy._core.
ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
    (f"numpy.{core}.{module}", name) for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
}


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds arrays, numbers and texts; refuses everything else before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}; refused, since loading it would run code")
        return getattr(importlib.import_module(module.replace("numpy.core", "numpy._core")), name)


def read_feature(path: str | Path, field: str = "data.path") -> np.ndarray | tuple[Any, Any]:
    """The array in a .npy file, or the two values of an object array in it.

    Raises UserError, naming `field`, for a file that is missing, damaged, of another form, or refers to code.
    """
    try:
        with open(path, "rb") as file:
            return _read(file)
    except (OSError, ValueError, EOFError, TypeError, AttributeError, ImportError, IndexError, KeyError,
            pickle.UnpicklingError) as error:
        raise UserError(f"{field}: {path} cannot be read ({getattr(error, 'strerror', None) or reason(error)})"
                        ) from error


def _read(file: BinaryIO) -> np.ndarray | tuple[Any, Any]:
    content = io.BytesIO(file.read())  # one system call a file: they are small, and there are millions
    version = np.lib.format.read_magic(content)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"version {version} of the .npy format")
    with _ONE_HEADER:
        shape, fortran, dtype = read_header[version](content)
    if not dtype.hasobject:
        array = np.frombuffer(content.getbuffer()[content.tell():], dtype)
        if array.size != int(np.prod(shape)):
            raise ValueError("truncated")
        return array.reshape(shape, order="F" if fortran else "C")
    if shape != (2,):
        raise ValueError(f"an object array of shape {shape}, want two values")
    pair = _ArraysOnly(content).load()
    if not isinstance(pair, np.ndarray) or pair.shape != (2,):
        raise ValueError("no object array of two values")
    return pair[0], pair[1]


def write_feature(path: str | Path, *values: Any) -> None:
    """Write one array, or two values as the object array that U-ViT reads; whole or not at all."""
    array = np.asarray(values[0])
    if len(values) == 2:  # numpy from 1.24 makes no array of an array and a number by itself
        array = np.empty(2, object)
        array[:] = values
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=array.dtype.hasobject)
