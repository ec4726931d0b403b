"""What the mathematics may import."""

import ast
import sys
from pathlib import Path

import bd3lm_jax.diffusion


def test_import_walls():
    """Only jax, flax, numpy, chex, errors, the state of a run and itself: no network, configuration, optimiser."""
    imported = set()
    for file in Path(bd3lm_jax.diffusion.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    ours = {name for name in imported if name.startswith("bd3lm_jax")}
    allowed = {"bd3lm_jax.core.errors", "bd3lm_jax.core.state"}
    assert all(name in allowed or name.startswith("bd3lm_jax.diffusion") for name in ours)
    others = {name.split(".")[0] for name in imported - ours} - sys.stdlib_module_names
    assert others <= {"jax", "flax", "numpy", "chex"}
