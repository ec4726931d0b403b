"""Constraints on the text that is written: expressions and JSON schemas as automata over bytes and tokens."""
