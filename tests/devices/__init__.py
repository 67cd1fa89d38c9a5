"""Devices in processes of their own: vfio-user servers in C, how to build and run them, and a client for tests."""
