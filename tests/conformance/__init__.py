"""The rules of the virtio specification, one by one, and what shows that each of them holds.

`rules.toml` is the register of the rules.  The tests here play a driver over a real vhost-user connection, against the
real engine, and look at every byte that comes back.  `registry`, `results` and `table` are behind scripts/conformance.
"""
