"""The handshake of vfio-user, by bytes and over sockets."""
