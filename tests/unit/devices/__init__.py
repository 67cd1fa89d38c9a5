"""The vfio-user devices of the tests, tested themselves."""
