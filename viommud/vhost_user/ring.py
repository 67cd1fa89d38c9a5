"""One ring as the front-end has configured it so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from viommud.vhost_user.device import QueueSetup
from viommud.vhost_user.errors import Refused
from viommud.vhost_user.fds import OwnedFd
from viommud.vhost_user.memory import MemorySnapshot
from viommud.vhost_user.payloads import VRING_F_LOG, VringAddr

SHARE_ON = "guest RAM must be shared memory: give QEMU's memory backend share=on"


@dataclass(frozen=True, slots=True)
class RingFormat:
    """What split and packed rings differ in for the control plane."""

    name: str
    initial_base: int
    """Base of a ring that has never run."""
    area_alignment: tuple[int, int, int]
    """Of descriptor table, driver area (available ring) and device area (used ring); VIRTIO 1.3, 2.7 and 2.8.10."""

    def check_size(self, size: int) -> str | None:
        """What is wrong with a ring size, apart from being too large."""
        return None if size > 0 else "it is empty"

    def check_base(self, base: int, size: int) -> str | None:
        """What is wrong with a base for a ring of that size."""
        raise NotImplementedError


class SplitFormat(RingFormat):
    """Split virtqueues."""

    __slots__ = ()

    def check_size(self, size: int) -> str | None:
        """A power of two: indices wrap at 65536 and are reduced modulo the size."""
        return None if size > 0 and size & (size - 1) == 0 else "it is not a power of two"

    def check_base(self, base: int, size: int) -> str | None:
        """A free-running 16-bit index."""
        return None if base <= 0xFFFF else "it has more than 16 bits"


class PackedFormat(RingFormat):
    """Packed virtqueues; a base is two positions, each 15 bits of slot and one wrap counter."""

    __slots__ = ()

    def check_base(self, base: int, size: int) -> str | None:
        """Both slots lie in the ring."""
        for position in (base, base >> 16):
            if position & 0x7FFF >= size:
                return f"slot {position & 0x7FFF} is not in a ring of {size}"
        return None


SPLIT = SplitFormat("split", initial_base=0, area_alignment=(16, 2, 4))
PACKED = PackedFormat("packed", initial_base=0x8000_8000, area_alignment=(16, 4, 4))


@dataclass(slots=True)
class Ring:
    """The pieces a front-end sends one by one, and whether the device runs them."""

    index: int
    size: int | None = None
    addr: VringAddr | None = None
    base: int | None = None
    kick: OwnedFd | None = None
    call: OwnedFd | None = None
    err: OwnedFd | None = None
    enabled: bool = False
    """By SET_VRING_ENABLE; without PROTOCOL_FEATURES every ring counts as enabled."""
    running: bool = False
    has_run: bool = False
    """Since the device was last reset."""
    returned: int | None = None
    """What the last GET_VRING_BASE answered, while the ring has not run since."""
    base_is_new: bool = field(default=False)
    """SET_VRING_BASE came after that GET_VRING_BASE."""

    @property
    def complete(self) -> bool:
        """Could the ring run, as far as pieces go?"""
        return self.size is not None and self.addr is not None and self.kick is not None

    @property
    def log_addr(self) -> int | None:
        """Where writes to the used ring are logged."""
        return self.addr.log if self.addr is not None and self.addr.flags & VRING_F_LOG else None

    def setup(self, kind: RingFormat, memory: MemorySnapshot, *, max_size: int, addresses_are_gpa: bool) -> QueueSetup:
        """Everything a device needs to run this complete ring.

        :raises Refused: a piece is not possible for this ring format or this memory.
        """
        if self.size is None or self.addr is None or self.kick is None:
            raise Refused(f"ring {self.index} is not fully configured")
        base = kind.initial_base if self.base is None else self.base
        wrong = kind.check_size(self.size) or (None if self.size <= max_size else f"at most {max_size} are served")
        if wrong:
            raise Refused(f"ring {self.index}: {kind.name} ring size {self.size}: {wrong}")
        wrong = kind.check_base(base, self.size)
        if wrong:
            raise Refused(f"ring {self.index}: {kind.name} ring base {base:#x}: {wrong}")
        areas = (
            ("descriptor table", self.addr.desc),
            ("available ring", self.addr.avail),
            ("used ring", self.addr.used),
        )
        for (name, address), alignment in zip(areas, kind.area_alignment, strict=True):
            if address % alignment:
                raise Refused(f"ring {self.index}: {name} at {address:#x} is not aligned to {alignment}")
            if not memory.has_user_address(address):
                raise Refused(f"ring {self.index}: {name} at {address:#x} is in no memory region", hint=SHARE_ON)
        return QueueSetup(
            size=self.size,
            desc=self.addr.desc,
            avail=self.addr.avail,
            used=self.addr.used,
            addresses_are_gpa=addresses_are_gpa,
            base=base,
            log_addr=self.log_addr,
            kick_fd=self.kick.fileno(),
            call_fd=self.call.fileno() if self.call else None,
            err_fd=self.err.fileno() if self.err else None,
        )

    def drop_kick(self) -> None:
        """The ring cannot run again until a new kick arrives."""
        if self.kick is not None:
            self.kick.close()
            self.kick = None

    def forget(self) -> None:
        """Back to a ring nobody has configured; the driver's and the front-end's eventfds stay."""
        self.drop_kick()
        self.size = self.addr = self.base = None
        self.enabled = False
        self.forget_history()

    def forget_history(self) -> None:
        """The device has been reset: nothing the ring did before counts."""
        self.has_run = False
        self.returned = None
        self.base_is_new = False

    def close(self) -> None:
        """Close every descriptor."""
        self.drop_kick()
        for fd in (self.call, self.err):
            if fd is not None:
                fd.close()
        self.call = self.err = None
