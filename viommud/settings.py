"""What an engine is made with: the device as offered to the guest, and the limits on what a guest can make us keep."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag


class Feature(IntFlag):
    """Feature bits of the device and of its queues (virtio 1.3 sections 5.13.3 and 6)."""

    INPUT_RANGE = 1 << 0
    DOMAIN_RANGE = 1 << 1
    MAP_UNMAP = 1 << 2
    BYPASS = 1 << 3
    PROBE = 1 << 4
    MMIO = 1 << 5
    BYPASS_CONFIG = 1 << 6
    RING_INDIRECT_DESC = 1 << 28
    RING_EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35


FEATURE_TOPOLOGY = 1 << 6
"""TOPOLOGY of the drafts of 2019 and 2020: the bit that became BYPASS_CONFIG."""


class Personality(IntEnum):
    """The age of the drivers served; nothing on the wire tells, so it is the user's choice."""

    V1_X = 0
    V0_9 = 1
    V0_5 = 2


class ReservedKind(IntEnum):
    """Subtypes of the RESV_MEM property."""

    RESERVED = 0
    MSI = 1


@dataclass(frozen=True, slots=True)
class Reserved:
    """A range of IOVAs, both ends included, that an endpoint cannot have mapped."""

    first: int
    last: int
    kind: ReservedKind = ReservedKind.RESERVED


DEFAULT_FEATURES = (
    Feature.INPUT_RANGE
    | Feature.DOMAIN_RANGE
    | Feature.MAP_UNMAP
    | Feature.PROBE
    | Feature.MMIO
    | Feature.BYPASS_CONFIG
    | Feature.RING_INDIRECT_DESC
    | Feature.RING_EVENT_IDX
    | Feature.VERSION_1
)


@dataclass(frozen=True, slots=True)
class Settings:
    """One engine's settings; mirrors struct viommu_settings of csrc/viommu.h, where each is explained."""

    features: Feature = DEFAULT_FEATURES
    page_size_mask: int = (1 << 64) - 4096
    input_first: int = 0
    input_last: int = (1 << 64) - 1
    domain_first: int = 0
    domain_last: int = (1 << 32) - 1
    probe_size: int = 512
    personality: Personality = Personality.V1_X
    bypass: bool = True
    max_endpoints: int = 1024
    max_domains: int = 4096
    max_faults: int = 256
    max_mappings: int = 1 << 20
    max_domain_mappings: int = 1 << 20
    fault_wait_ms: int = 1000
    fault_burst: int = 32
    fault_rate: int = 100
    spin_us: int = 500
    time_every: int = 16
