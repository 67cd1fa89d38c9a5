"""Tests with a stock QEMU and no guest: the daemon behind QEMU's generic device, register by register."""
