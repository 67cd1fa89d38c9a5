"""The control sockets: varlink, read-only on one socket, steering on another."""
