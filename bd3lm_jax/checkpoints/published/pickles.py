"""Pickled weights of PyTorch, for those who trust a file enough: tensors alone are read, no other object is made."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bd3lm_jax.checkpoints.published.mapping import require
from bd3lm_jax.checkpoints.published.read import EMA
from bd3lm_jax.checkpoints.published.tensors import LazyTensor, lazy_tensor_of
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.untrusted_files import open_regular

NESTED = ("state_dict", "model")  # where a training checkpoint keeps the tensors of its network
BUFFERS = ("rotary_emb.inv_freq", "sampling_eps_min", "sampling_eps_max")  # tensors that no optimiser averages


def open_pickles(paths: Sequence[Path]) -> tuple[Path, dict[str, LazyTensor]]:
    """The first path, and the tensors of all files. Averages (`ema`, with `shadow_params` in the order of the
    parameters, as the training code of MDLM and BD3-LM saves them) get names that begin with "ema."."""
    tensors, owner = {}, {}
    for path in paths:
        for name, value in _tensors(path, _load(path)).items():
            require(name not in tensors, f"{path.parent}: tensor {name} is in two files, {owner.get(name)} and "
                    f"{path.name}")
            tensors[name], owner[name] = value, path.name
    return paths[0], {name: lazy_tensor_of(value) for name, value in tensors.items()}


def _load(path: Path) -> dict:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{path} is pickled, and reading it needs torch: pip install torch, or convert it to "
                        "model.safetensors") from None
    try:
        open_regular(path).close()
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many kinds; all of them mean: not read
        first = f"{error}\n".splitlines()[0].partition(". ")[0]  # what follows tells how to run the pickle after all
        raise UserError(f"cannot read {path} ({type(error).__name__}: {first}): damaged, or it holds other objects "
                        "than tensors; save its state dict alone, as model.safetensors") from None


def _tensors(path: Path, content: dict) -> dict[str, np.ndarray]:
    require(isinstance(content, dict), f"{path} holds a {type(content).__name__}, expected a dict of tensors by name")
    inner = next((content[key] for key in NESTED if isinstance(content.get(key), dict)), content)
    found = {name: _array(value) for name, value in inner.items() if hasattr(value, "numpy")}
    average = content.get("ema")
    if isinstance(average, dict) and "shadow_params" in average:
        names = [name for name in found if not name.endswith(BUFFERS)]
        values = [_array(value) for value in average["shadow_params"]]
        fits = [found[name].shape for name in names] == [value.shape for value in values]
        require(fits, f"{path}: its average has {len(values)} tensors that are not those of the {len(names)} "
                "parameters, in their order")
        found |= {EMA + name: value for name, value in zip(names, values)}
    return found


def _array(tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
