"""A process that builds a directory and never ends: argv[1] is where, its first line the name."""

BUILD = """
import sys, time
from pathlib import Path
from bd3lm_jax.core import workspace
with workspace.directory(Path(sys.argv[1]), "builds") as made:
    print(made.name, flush=True)
    time.sleep(600)
"""
