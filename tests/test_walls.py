"""The walls of the house: who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest
from places import ROOT

LIBRARY = sorted((ROOT / "bd3lm_jax").rglob("*.py"))
CORE = {"attention", "models", "diffusion", "generation/sampling"}
CORE_NEEDS = {"jax", "flax", "numpy", "optax", "chex", "bd3lm_jax"}
STANDARD = {"collections", "concurrent", "dataclasses", "difflib", "functools", "itertools", "logging", "math", "types",
            "typing"}
ONLY_IN = {"orbax": {"checkpoint.py", "orbax_managers.py"}, "safetensors": {"tensors.py"}, "ml_collections": set(),
           "matplotlib": {"plots.py"}, "tensorflow_datasets": {"corpora.py"}, "gguf": {"gguf.py"},
           "torch": {"torch_side.py", "pickles.py"}, "rich": {"log.py", "animate.py"}, "huggingface_hub": {"hf.py"},
           "fsspec": {"remote.py"}}


def imports(path: Path, top_only: bool) -> set[str]:
    """Full names of what a file imports, anywhere or at the top level only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package(path: Path) -> str:
    return path.parent.relative_to(ROOT / "bd3lm_jax").as_posix()


@pytest.mark.parametrize("path", [path for path in LIBRARY if package(path) in CORE], ids=str)
def test_core_needs_few_packages(path):
    assert {name.split(".")[0] for name in imports(path, top_only=False)} <= CORE_NEEDS | STANDARD


@pytest.mark.parametrize("foreign, files", ONLY_IN.items())
def test_one_file_a_foreign_package(foreign, files):
    users = {path.name for path in LIBRARY if any(name.split(".")[0] == foreign for name in imports(path, False))}
    assert users == files


def test_presets_import_nothing_of_ours_but_common():
    for path in set((ROOT / "configs").glob("*.py")) - {ROOT / "configs" / "common.py"}:
        names = imports(path, top_only=False)
        ours = {name for name in names if name.split(".")[0] in ("bd3lm_jax", "launch", "configs")}
        assert ours <= {"configs.common"}, path


def test_files_are_short():
    for path in LIBRARY:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
