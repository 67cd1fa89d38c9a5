"""Instruments of an engine, for those who look at it and steer it: beside `engine`, the one module that touches cffi.

Nothing here costs a request more than a predictable branch while it is not used.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from viommud._core import ffi, lib

INJECTIONS_MAX: int = lib.VIOMMU_INJECTIONS
DELAY_MAX_NS: int = lib.VIOMMU_INJECT_DELAY_MAX
TIME_BUCKETS: int = lib.VIOMMU_TIME_BUCKETS
RECORDED_PAGE = 4096
"""Entries taken from a recording at once."""


class Action(IntEnum):
    """What is done to a request that meets an injection; see csrc/viommu.h."""

    DELAY = lib.VIOMMU_INJECT_DELAY
    STATUS = lib.VIOMMU_INJECT_STATUS
    DROP = lib.VIOMMU_INJECT_DROP
    HANG = lib.VIOMMU_INJECT_HANG


@dataclass(frozen=True, slots=True)
class Injection:
    """The next `count` requests that match are treated like this; fields as in struct viommu_injection."""

    action: Action
    count: int = 1
    type: int = 0
    """Request type; 0: any."""
    endpoint: int | None = None
    domain: int | None = None
    status: int = 0
    delay_ns: int = 0


@dataclass(frozen=True, slots=True)
class ServiceTimes:
    """Service times of the batches that were timed, each request counted with the whole of its batch."""

    counts: tuple[int, ...]
    """By bucket; bucket_start() says where each begins."""
    sum_ns: int

    @property
    def total(self) -> int:
        """Requests timed."""
        return sum(self.counts)

    def __sub__(self, earlier: ServiceTimes) -> ServiceTimes:
        """What was added since."""
        counts = tuple(now - then for now, then in zip(self.counts, earlier.counts, strict=True))
        return ServiceTimes(counts, self.sum_ns - earlier.sum_ns)

    def below(self, ns: int) -> int:
        """Requests that took less than ns, which must be where a bucket begins."""
        return sum(count for bucket, count in enumerate(self.counts) if bucket_start(bucket) < ns)

    def percentile(self, part: float) -> int | None:
        """Nanoseconds that this part (0 to 1) of the requests did not exceed, to the end of a bucket; None: no data."""
        wanted = part * self.total
        if not self.total:
            return None
        seen = 0
        for bucket, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                return bucket_start(bucket + 1)
        raise AssertionError("the counts are their own sum")


def bucket_start(bucket: int) -> int:
    """The least nanoseconds that a bucket counts."""
    return bucket if bucket < 4 else (4 + bucket % 4) << (bucket // 4 - 1)


class RecordedKind(IntEnum):
    """Entries of a recording that are not requests."""

    RESET = lib.VIOMMU_RECORDED_RESET
    BYPASS = lib.VIOMMU_RECORDED_BYPASS
    FEATURES = lib.VIOMMU_RECORDED_FEATURES
    MEMORY = lib.VIOMMU_RECORDED_MEMORY


RECORDED_BYTES: int = ffi.sizeof("struct viommu_recorded")


def _check(rc: int) -> None:
    if rc != 0:
        raise OSError(-rc, os.strerror(-rc))


class Instruments:
    """What can be seen and steered of one engine while it serves."""

    def __init__(self, handle: Any) -> None:
        self._engine = handle

    def close(self) -> None:
        """The engine is about to go."""
        self._engine = None

    def service_times(self) -> ServiceTimes:
        """Service times so far, read without stopping the worker."""
        counts, total = ffi.new("uint64_t[]", TIME_BUCKETS), ffi.new("uint64_t *")
        lib.viommu_engine_service_times(self._engine, counts, total)
        return ServiceTimes(tuple(counts), int(total[0]))

    @property
    def paused(self) -> bool:
        """Is no request served?"""
        return bool(lib.viommu_engine_paused(self._engine))

    @paused.setter
    def paused(self, value: bool) -> None:
        lib.viommu_engine_pause(self._engine, value)

    def set_limits(self, *, endpoints: int, domains: int, mappings: int, mappings_per_domain: int) -> None:
        """Limits anew; what exists stays, even above them."""
        _check(lib.viommu_engine_set_limits(self._engine, endpoints, domains, mappings, mappings_per_domain))

    def inject(self, injection: Injection) -> None:
        """Arm a rule; the first armed that matches a request is the one that counts.

        :raises ValueError: it says nothing sensible.
        :raises OverflowError: INJECTIONS_MAX are armed.
        """
        raw = ffi.new("struct viommu_injection *")
        raw.action, raw.type, raw.count = int(injection.action), injection.type, injection.count
        raw.status, raw.delay_ns = injection.status, injection.delay_ns
        raw.match_endpoint, raw.endpoint = injection.endpoint is not None, injection.endpoint or 0
        raw.match_domain, raw.domain = injection.domain is not None, injection.domain or 0
        rc = lib.viommu_engine_inject(self._engine, raw)
        if rc == -errno.EINVAL:
            raise ValueError("an injection that says nothing sensible")
        if rc == -errno.ENOSPC:
            raise OverflowError(f"{INJECTIONS_MAX} injections are armed, and no more can be")

    def injections(self) -> list[Injection]:
        """Those still armed, with what is left of their counts, oldest first."""
        raw = ffi.new("struct viommu_injection[]", INJECTIONS_MAX)
        count = lib.viommu_engine_injections(self._engine, raw, INJECTIONS_MAX)
        return [
            Injection(
                Action(r.action),
                r.count,
                r.type,
                r.endpoint if r.match_endpoint else None,
                r.domain if r.match_domain else None,
                r.status,
                r.delay_ns,
            )
            for r in raw[0:count]
        ]

    def clear_injections(self) -> None:
        """Disarm all, and answer what a delay holds back."""
        lib.viommu_engine_clear_injections(self._engine)

    def start_recording(self) -> None:
        """Record requests from now on.

        :raises OSError: EALREADY, or there is no memory for it.
        """
        _check(lib.viommu_engine_record(self._engine, True))

    def stop_recording(self) -> None:
        """Record no more; what was not taken is lost."""
        _check(lib.viommu_engine_record(self._engine, False))

    def take_recorded(self) -> tuple[bytes, int]:
        """Entries in the layout of struct viommu_recorded, oldest first, and how many were lost after them so far."""
        raw, lost = ffi.new("struct viommu_recorded[]", RECORDED_PAGE), ffi.new("uint64_t *")
        count = lib.viommu_engine_take_recorded(self._engine, raw, RECORDED_PAGE, lost)
        return bytes(ffi.buffer(raw, count * RECORDED_BYTES)), int(lost[0])

    def play(self, entries: bytes) -> Sequence[int]:
        """Play recorded entries to an engine that no front-end uses; what each is answered with now.

        :raises ValueError: nothing can have recorded this.
        :raises OSError: the host lacks something.
        """
        count, rest = divmod(len(entries), RECORDED_BYTES)
        if rest:
            raise ValueError("recorded entries are cut off")
        statuses = ffi.new("uint8_t[]", max(count, 1))
        raw = ffi.new("struct viommu_recorded[]", max(count, 1))
        ffi.memmove(raw, entries, len(entries))
        rc = lib.viommu_engine_play(self._engine, raw, count, statuses)
        if rc == -errno.EINVAL:
            raise ValueError("an entry that nothing can have recorded")
        _check(rc)
        return bytes(ffi.buffer(statuses, count))
