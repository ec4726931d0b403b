"""Named tensors in files: safetensors (one file, or several with an index), read only where they are touched.

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

from bd3lm_jax.errors import UserError
from bd3lm_jax.foreign import open_regular, read_text
from bd3lm_jax.published.leaf import require
from bd3lm_jax.typed import from_json

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
WEIGHTS_PICKLE = re.compile(r"pytorch_model(-[0-9]+-of-[0-9]+)?\.bin")
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
          "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
AGAIN = "download it again"
GGUF = ".gguf"
NUMBERED = re.compile(r"(.+)-[0-9]{5}-of-([0-9]{5})\.safetensors")
BESIDE = ("adapter", "optimizer", "training", "rng", "scheduler", "consolidated")  # begin the names of other tensors


class Stored(NamedTuple):
    """A tensor in a file. `read()` gives its values, mapped from the file where its format allows that."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == GGUF


def of_array(x: np.ndarray) -> Stored:
    return Stored(x.shape, x.dtype, lambda: x)


def open_directory(directory: Path, allow_pickle: bool) -> tuple[Path, dict[str, Stored]]:
    """The weights of a directory: the file that names them, and the tensors by their names in it.

    Raises UserError for files that are not there or damaged, a tensor in two files, dtypes that NumPy lacks, and for
    pickled weights unless `allow_pickle`.
    """
    single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if not single.exists() and not index.exists() and directory.is_dir():
        single, index = _other_names(directory)
    if not single.exists() and index.exists():
        return index, _open_index(index)
    pickled = _pickled(sorted(directory.glob("*"))) if directory.is_dir() else []
    if single.exists() or not pickled:
        return single, open_file(single)
    require(allow_pickle, f"{pickled[0]} is pickled, and reading a pickle can run any program that it holds: convert "
            f"it to {WEIGHTS_FILE} where you trust it, or give --allow_pickle, which reads tensors only (needs torch)")
    from bd3lm_jax.published.pickles import open_pickles

    return open_pickles(pickled)


def _other_names(directory: Path) -> tuple[Path, Path]:
    """The file and the index of a directory that has the weights under other names than the usual ones.

    Raises UserError where several files may be meant.
    """
    usual = directory / WEIGHTS_FILE, directory / INDEX_FILE
    indices = sorted(directory.glob("*.safetensors.index.json"))
    if indices:
        require(len(indices) == 1, f"{directory} holds several indices of weights ({', '.join(x.name for x in indices)}"
                f"): name one of them {INDEX_FILE}")
        return usual[0], indices[0]
    files = [path for path in sorted(directory.glob("*.safetensors")) if not path.name.startswith(BESIDE)]
    adapters = [path.name for path in sorted(directory.glob("adapter*.safetensors"))]
    require(files or not adapters, f"{directory} holds an adapter alone ({', '.join(adapters)}): merge it into its "
            "model and save that")
    split = [path.name for path in files if NUMBERED.fullmatch(path.name)]
    require(not split, f"{directory} holds weights in parts ({', '.join(split[:2])}, ...) without {INDEX_FILE}: "
            "download the whole directory")
    require(len(files) < 2, f"{directory} holds several files of weights ({', '.join(x.name for x in files[:4])}) and "
            f"no {WEIGHTS_FILE}: name the one that is meant so")
    return files[0] if files else usual[0], usual[1]


def _pickled(paths: list[Path]) -> list[Path]:
    """The pickles that hold weights: what trainers leave beside them (training_args.bin, optimizer.pt) holds none."""
    named = [path for path in paths if WEIGHTS_PICKLE.fullmatch(path.name)]
    training = [path for path in paths if path.suffix == ".ckpt"]
    return named or (training if len(training) == 1 else [path for path in paths if path.suffix in PICKLES])


def open_file(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file. Its header is checked against its size; values are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path) as file, safe_open(path, framework="numpy"):
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
        content = np.memmap(path, np.uint8, "r")[start:]
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}): {AGAIN}; expected one safetensors file") from None
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    foreign = [f"{name} ({entry['dtype']})" for name, entry in entries.items() if entry["dtype"] not in DTYPES]
    require(not foreign, f"{path}: tensor {', '.join(foreign[:3])} has a dtype that is not supported (quantised "
            f"weights?), expected one of {', '.join(DTYPES)}: take the release of the model that is not quantised")
    return {name: _mapped(content, entry) for name, entry in entries.items()}


def _mapped(content: np.ndarray, entry: dict) -> Stored:
    (start, stop), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]])
    return Stored(shape, dtype, lambda: content[start:stop].view(dtype).reshape(shape))


def _open_index(index: Path) -> dict[str, Stored]:
    try:
        places = from_json(read_text(index))["weight_map"]
        files = sorted(set(places.values()))
        if not all(isinstance(file, str) and Path(file).name == file for file in files):
            raise ValueError(f"it names {files[0]!r} and others, expected files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {index} ({type(error).__name__}: {error}): {AGAIN}; expected a weight_map from "
                        "tensors to files") from None
    absent = [file for file in files if not (index.parent / file).is_file()]
    require(not absent, f"{index} names {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not there: "
            "download the whole directory")
    tensors, owner = {}, {}
    for file in files:
        for name, stored in open_file(index.parent / file).items():
            require(name not in tensors, f"{index.parent}: tensor {name} is in two files, {owner.get(name)} and {file}")
            tensors[name], owner[name] = stored, file
    lost = [f"{name} ({file})" for name, file in places.items() if owner.get(name) != file]
    require(not lost, f"{index} names tensors that are not in their files: {', '.join(lost[:6])}")
    return tensors


def converted(name: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`x` in another dtype. UserError, naming the tensor, if a finite value becomes infinite."""
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        y = x.astype(dtype)
    widens = np.can_cast(x.dtype, dtype) or x.dtype.itemsize < np.dtype(dtype).itemsize
    if not widens and np.isinf(y.astype(np.float32)).any():
        lost = np.isinf(y.astype(np.float32)) & np.isfinite(x)
        require(not lost.any(), f"tensor {name}: {lost.sum()} values overflow in {np.dtype(dtype).name}, the largest "
                f"is {np.abs(x[lost]).max():g}: use float32 or bfloat16")
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
