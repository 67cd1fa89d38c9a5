"""Which features the session offers by itself, and the virtio bits that vhost-user uses for its own ends."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from viommud.vhost_user.messages import ProtocolFeature
from viommud.vhost_user.payloads import F_LOG_ALL, F_PROTOCOL_FEATURES

OFFERED_PROTOCOL_FEATURES: Mapping[ProtocolFeature, str] = MappingProxyType(
    {
        ProtocolFeature.MQ: "vhost-user.rst: back-ends should always implement it",
        ProtocolFeature.LOG_SHMFD: "dirty logging; QMP calc-dirty-rate uses it even where migration is blocked",
        ProtocolFeature.REPLY_ACK: "a refusal reaches the front-end",
        ProtocolFeature.BACKEND_REQ: "configuration change notices",
        ProtocolFeature.CONFIG: "QEMU refuses a device with configuration space without it",
        ProtocolFeature.INFLIGHT_SHMFD: "front-ends that reconnect need it; QEMU's generic device does not use it",
        ProtocolFeature.RESET_DEVICE: "other front-ends announce a device reset",
        ProtocolFeature.CONFIGURE_MEM_SLOTS: "more than 8 regions; QEMU's memory devices ask for 509 slots",
        ProtocolFeature.STATUS: "DEVICE_NEEDS_RESET becomes visible; what the front-end sets is advisory",
        ProtocolFeature.GPA_ADDRESSES: "no second address space to keep and to check",
    }
)
"""What is offered, and why.  Never: INBAND_NOTIFICATIONS and XEN_MMAP, which QEMU accepts without implementing them."""
OFFERED_PROTOCOL_MASK = sum(feature.mask for feature in OFFERED_PROTOCOL_FEATURES)


VHOST_USER_BITS = 1 << F_LOG_ALL | 1 << F_PROTOCOL_FEATURES
"""Virtio feature bits that the driver and the device never see."""
F_RING_PACKED = 34
