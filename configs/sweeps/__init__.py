"""Experiments: configs whose `sweep()` is the point, each with what it found in its docstring."""
