"""Named tensors in safetensors files, read only where they are touched.

The one user of the package safetensors.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from bd3lm_jax.checkpoints.published.mapping import require
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.untrusted_files import open_regular

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
          "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
DOWNLOAD_AGAIN = "download it again"
GGUF = ".gguf"


class LazyTensor(NamedTuple):
    """A tensor in a file. `read()` gives its values, mapped from the file where its format allows that."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == GGUF


def lazy_tensor_of(x: np.ndarray) -> LazyTensor:
    return LazyTensor(x.shape, x.dtype, lambda: x)


def open_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file. Its header is checked against its size; values are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path) as file, safe_open(path, framework="numpy"):
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
        content = np.memmap(path, np.uint8, "r")[start:]
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}): {DOWNLOAD_AGAIN}; expected one safetensors file") from None
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    untrusted_files = [f"{name} ({entry['dtype']})" for name, entry in entries.items() if entry["dtype"] not in DTYPES]
    require(
        not untrusted_files,
        f"{path}: tensor {', '.join(untrusted_files[:3])} has a dtype that is not supported (quantised "
        f"weights?), expected one of {', '.join(DTYPES)}: take the release of the model that is not quantised")
    return {name: _mapped(content, entry) for name, entry in entries.items()}


def _mapped(content: np.ndarray, entry: dict) -> LazyTensor:
    (start, stop), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]])
    return LazyTensor(shape, dtype, lambda: content[start:stop].view(dtype).reshape(shape))


def cast_or_raise(name: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`x` in another dtype. UserError, naming the tensor, if a finite value becomes infinite."""
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        y = x.astype(dtype)
    widens = np.can_cast(x.dtype, dtype) or x.dtype.itemsize < np.dtype(dtype).itemsize
    if not widens and np.isinf(y.astype(np.float32)).any():
        misplaced = np.isinf(y.astype(np.float32)) & np.isfinite(x)
        require(
            not misplaced.any(),
            f"tensor {name}: {misplaced.sum()} values overflow in {np.dtype(dtype).name}, the largest "
            f"is {np.abs(x[misplaced]).max():g}: use float32 or bfloat16")
    return y


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file as the libraries of published models expect it. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file({name: np.asarray(x, order="C") for name, x in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
