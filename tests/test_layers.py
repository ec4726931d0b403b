"""The layers of the library, read from its source: no circles, and no import from a layer further down the list.

Imports inside functions and under TYPE_CHECKING count as any other.
"""

import ast
from pathlib import Path

import pytest
from places import ROOT

LAYERS = ("version", "core", "parallel", "attention", "diffusion", "models", "scoring", "data", "unused_keys", "config",
          "checkpoints", "likelihood", "generation", "lm", "training", "train", "planning", "evaluation", "harness",
          "experiments", "__init__")


def module_files(root: Path) -> dict[str, Path]:
    """Every module of the library below `root` by its full name."""
    files = {}
    for path in sorted((root / "bd3lm_jax").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def import_graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """The modules of the library that each one imports, wherever the import stands."""
    graph = {}
    for module, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {full if (full := f"{node.module}.{alias.name}") in files else node.module
                          for alias in node.names}
        graph[module] = {name for name in names if name in files and name != module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that reach each other."""
    reached = {}
    for module in graph:
        found, left = set(), [module]
        while left:
            new = graph[left.pop()] - found
            found |= new
            left += new
        reached[module] = found
    groups = {frozenset(other for other in reached[module] if module in reached[other]) for module in graph}
    return [set(group) for group in groups if group]


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


FILES = module_files(ROOT)
GRAPH = import_graph(FILES)


def test_no_module_imports_itself_by_way_of_others():
    assert circles(GRAPH) == []


def test_nothing_is_imported_from_a_later_layer():
    rank = {name: index for index, name in enumerate(LAYERS)}
    upward = [f"{module} -> {name}" for module, names in GRAPH.items() for name in names
              if rank[layer(name)] > rank[layer(module)]]
    assert upward == []


@pytest.mark.parametrize("source, expected", [
    ({"a": "import bd3lm_jax.b", "b": ""}, []),
    ({"a": "def f():\n    from bd3lm_jax import b", "b": "from bd3lm_jax.a import f"},
     [{"bd3lm_jax.a", "bd3lm_jax.b"}]),
    ({"a": "if TYPE_CHECKING:\n    from bd3lm_jax.b import X", "b": "from bd3lm_jax.c import Y",
      "c": "import bd3lm_jax.a"}, [{"bd3lm_jax.a", "bd3lm_jax.b", "bd3lm_jax.c"}]),
])
def test_circles_are_seen_wherever_the_import_stands(tmp_path, source, expected):
    (tmp_path / "bd3lm_jax").mkdir()
    for name, text in source.items():
        (tmp_path / "bd3lm_jax" / f"{name}.py").write_text(text)
    assert circles(import_graph(module_files(tmp_path))) == expected
