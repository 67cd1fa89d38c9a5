"""A vhost-user front-end for tests: guest memory, rings and requests, with no code of the daemon in it.

Everything on the wire is written down here a second time, so that an error in the daemon's tables is not repeated by
the test that should find it.  Every layer lets a test send what is broken: raw bytes and descriptors on the socket,
raw descriptors in the rings, raw requests in the buffers.

`wire` and `client` speak the protocol, `memory` is the guest's RAM, `split` and `packed` are the driver's side of the
rings, `iommu` builds virtio-iommu requests, and `guest` puts them together.
"""
