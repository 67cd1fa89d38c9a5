"""Unit tests of the control sockets."""
