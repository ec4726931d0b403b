"""Commands: `python -m launch COMMAND`; strings in, one library call out."""
