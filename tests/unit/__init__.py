"""Tests of single modules: no QEMU, no guest."""
