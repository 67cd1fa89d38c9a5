"""Fuzzers of Python code; scripts/fuzz runs them."""
