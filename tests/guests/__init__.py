"""Tests with Linux guests: a kernel and its own driver in front of viommud."""
