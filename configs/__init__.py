"""Configurations of runs: each file is a lab note with `get_config(arg)`, chosen by `--config=FILE.py[:arg]`."""
