"""QEMU and Linux guests for tests, the demonstration and benchmarks.

`archive` and `assets` fetch QEMU, kernels and busybox; `programs`, `modules` and `initramfs` make a guest's initial RAM
disk; `devicetree` makes its device tree; `machine` is a QEMU command line, `qemu` the process, `qmp` its control
channel, and `guest` a Linux guest with a shell to run things in.  `qtest`, `pci`, `virtio` and `iommu` drive the same
QEMU without any guest.
"""
