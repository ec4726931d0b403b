"""The weights of a published checkpoint: which files of its directory hold them, and the tensors of all of these."""

import re
from pathlib import Path

from bd3lm_jax.checkpoints.published.mapping import require
from bd3lm_jax.checkpoints.published.pickles import open_pickles
from bd3lm_jax.checkpoints.published.tensors import DOWNLOAD_AGAIN, INDEX_FILE, WEIGHTS_FILE, LazyTensor, open_file
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.typed import from_json
from bd3lm_jax.core.untrusted_files import read_text

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
WEIGHTS_PICKLE = re.compile(r"pytorch_model(-[0-9]+-of-[0-9]+)?\.bin")
NUMBERED = re.compile(r"(.+)-[0-9]{5}-of-([0-9]{5})\.safetensors")
# begin the names of other tensors
NON_WEIGHT_PREFIXES = ("adapter", "optimizer", "training", "rng", "scheduler", "consolidated")


def open_directory(directory: Path, allow_pickle: bool) -> tuple[Path, dict[str, LazyTensor]]:
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
    return open_pickles(pickled)


def _other_names(directory: Path) -> tuple[Path, Path]:
    """The file and the index of a directory that has the weights under other names than the usual ones.

    Raises UserError where several files may be meant.
    """
    default_paths = directory / WEIGHTS_FILE, directory / INDEX_FILE
    indices = sorted(directory.glob("*.safetensors.index.json"))
    if indices:
        require(len(indices) == 1, f"{directory} holds several indices of weights ({', '.join(x.name for x in indices)}"
                f"): name one of them {INDEX_FILE}")
        return default_paths[0], indices[0]
    files = [path for path in sorted(directory.glob("*.safetensors")) if not path.name.startswith(NON_WEIGHT_PREFIXES)]
    adapters = [path.name for path in sorted(directory.glob("adapter*.safetensors"))]
    require(files or not adapters, f"{directory} holds an adapter alone ({', '.join(adapters)}): merge it into its "
            "model and save that")
    split = [path.name for path in files if NUMBERED.fullmatch(path.name)]
    require(not split, f"{directory} holds weights in parts ({', '.join(split[:2])}, ...) without {INDEX_FILE}: "
            "download the whole directory")
    require(len(files) < 2, f"{directory} holds several files of weights ({', '.join(x.name for x in files[:4])}) and "
            f"no {WEIGHTS_FILE}: name the one that is meant so")
    return files[0] if files else default_paths[0], default_paths[1]


def _pickled(paths: list[Path]) -> list[Path]:
    """The pickles that hold weights: what trainers leave beside them (training_args.bin, optimizer.pt) holds none."""
    named = [path for path in paths if WEIGHTS_PICKLE.fullmatch(path.name)]
    training = [path for path in paths if path.suffix == ".ckpt"]
    return named or (training if len(training) == 1 else [path for path in paths if path.suffix in PICKLES])


def _open_index(index: Path) -> dict[str, LazyTensor]:
    try:
        places = from_json(read_text(index))["weight_map"]
        files = sorted(set(places.values()))
        if not all(isinstance(file, str) and Path(file).name == file for file in files):
            raise ValueError(f"it names {files[0]!r} and others, expected files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read {index} ({type(error).__name__}: {error}): {DOWNLOAD_AGAIN}; expected a weight_map from "
            "tensors to files") from None
    absent = [file for file in files if not (index.parent / file).is_file()]
    require(not absent, f"{index} names {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not there: "
            "download the whole directory")
    tensors, owner = {}, {}
    for file in files:
        for name, stored in open_file(index.parent / file).items():
            require(name not in tensors, f"{index.parent}: tensor {name} is in two files, {owner.get(name)} and {file}")
            tensors[name], owner[name] = stored, file
    misplaced = [f"{name} ({file})" for name, file in places.items() if owner.get(name) != file]
    require(not misplaced, f"{index} names tensors that are not in their files: {', '.join(misplaced[:6])}")
    return tensors
