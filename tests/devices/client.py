"""A vfio-user client for tests: what QEMU does towards a device's server, under the test's control.

Synchronous, over a UNIX socket. Requests of the server (DMA_READ, DMA_WRITE) that arrive while the client waits for a
reply are served by `on_dma` in between, as QEMU does.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, GET_IRQ_INFO = 1, 2, 3, 4, 5, 7
SET_IRQS, REGION_READ, REGION_WRITE, DMA_READ, DMA_WRITE, DEVICE_RESET = 8, 9, 10, 11, 12, 13
REPLY, NO_REPLY, ERROR = 0x1, 0x10, 0x20
READABLE, WRITABLE = 1, 2
BAR0, CONFIG = 0, 7
INTX, MSIX = 0, 2
HEADER = struct.Struct("<HHIII")

OnDma = Callable[[int, int, int, bytes], bytes]
"""(command, address, count, data of a DMA_WRITE) -> data of a DMA_READ. OSError: answer with its errno."""


class RefusedError(OSError):
    """The server answered a request with an error; `errno` is the one it gave."""


def nothing_is_reachable(command: int, address: int, count: int, data: bytes) -> bytes:
    """An on_dma that refuses everything."""
    raise OSError(errno.EFAULT, "not mapped")


class MessageMemory:
    """Memory that is served by messages: ranges of IOVA backed by bytearrays."""

    def __init__(self) -> None:
        self.ranges: dict[int, bytearray] = {}
        self.log: list[tuple[int, int, int]] = []
        """(command, address, count) of every request, refused ones too."""

    def add(self, iova: int, size: int) -> bytearray:
        """A new zeroed range."""
        self.ranges[iova] = bytearray(size)
        return self.ranges[iova]

    def __call__(self, command: int, address: int, count: int, data: bytes) -> bytes:
        """Serve one request: an OnDma."""
        self.log.append((command, address, count))
        for iova, memory in self.ranges.items():
            if iova <= address and address + count <= iova + len(memory):
                at = address - iova
                if command == DMA_READ:
                    return bytes(memory[at : at + count])
                memory[at : at + count] = data
                return b""
        raise OSError(errno.EFAULT, "not mapped")


class Client:
    """One connection to a server. Everything raises RefusedError when the server answers with an error."""

    def __init__(self, path: Path | str, on_dma: OnDma = nothing_is_reachable, patience: float = 60.0) -> None:
        """Connect. `patience` is how long a reply may take, in seconds; then TimeoutError."""
        self.on_dma = on_dma
        self._id = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(patience)
        try:
            self._socket.connect(str(path))
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Go away."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ---- messages

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send these bytes, whatever they are."""
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self._socket.sendmsg([data], control)
        if sent < len(data):
            self._socket.sendall(data[sent:])

    def receive_raw(self, size: int) -> bytes:
        """Exactly `size` bytes, or ConnectionResetError at the end of the stream."""
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise ConnectionResetError("the server closed the connection")
            data += part
        return data

    def send(self, command: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> int:
        """Send a request and return its message id."""
        self._id = (self._id + 1) & 0xFFFF
        self.send_raw(HEADER.pack(self._id, command, HEADER.size + len(payload), flags, 0) + payload, fds)
        return self._id

    def request(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a request and return the payload of its reply."""
        return self.reply_to(self.send(command, payload, fds), command)

    def reply_to(self, message_id: int, command: int) -> bytes:
        """Wait for the reply to a request, serving the server's requests meanwhile."""
        while True:
            got = self.serve_one()
            if got is None:
                continue
            got_id, got_command, flags, error, payload = got
            assert (got_id, got_command) == (message_id, command), "a reply to something else"
            if flags & ERROR:
                raise RefusedError(error, os.strerror(error))
            return payload

    def serve_one(self) -> tuple[int, int, int, int, bytes] | None:
        """Receive one message. A request of the server is answered (None); a reply is returned, with its header."""
        message_id, command, size, flags, error = HEADER.unpack(self.receive_raw(HEADER.size))
        payload = self.receive_raw(size - HEADER.size)
        if flags & 0xF == REPLY:
            return message_id, command, flags, error, payload
        address, count = struct.unpack_from("<QQ", payload)
        answer_flags, answer_error, answer = REPLY, 0, payload[:16]
        try:
            answer += self.on_dma(command, address, count, payload[16:])
        except OSError as refusal:
            answer_flags, answer_error, answer = REPLY | ERROR, refusal.errno or errno.EIO, b""
        header = HEADER.pack(message_id, command, HEADER.size + len(answer), answer_flags, answer_error)
        self.send_raw(header + answer)
        return None

    # ---- requests

    def version(self, capabilities: dict[str, object] | None = None) -> dict[str, object]:
        """Agree on version 0.0 and return the server's capabilities."""
        offer = {"max_msg_fds": 16, "max_data_xfer_size": 1 << 20} if capabilities is None else capabilities
        text = json.dumps({"capabilities": offer}).encode() + b"\0"
        reply = self.request(VERSION, struct.pack("<HH", 0, 0) + text)
        assert reply[:4] == bytes(4), "the server does not speak version 0.0"
        assert reply.endswith(b"\0")
        answer: dict[str, object] = json.loads(reply[4:-1])["capabilities"]
        return answer

    def dma_map(self, iova: int, size: int, fd: int | None = None, offset: int = 0, flags: int = 3) -> None:
        """Let the device reach [iova, iova + size); with `fd`, as that window of the file."""
        payload = struct.pack("<IIQQQ", 32, flags, offset, iova, size)
        self.request(DMA_MAP, payload, [] if fd is None else [fd])

    def dma_unmap(self, iova: int, size: int, flags: int = 0) -> None:
        """Take it back."""
        self.request(DMA_UNMAP, struct.pack("<IIQQ", 24, flags, iova, size))

    def device_info(self) -> tuple[int, int, int]:
        """(flags, regions, interrupt indices)."""
        _, flags, regions, irqs = struct.unpack("<IIII", self.request(GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)))
        return flags, regions, irqs

    def region_info(self, index: int) -> tuple[int, int]:
        """(flags, size)."""
        reply = self.request(GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, index, 0, 0, 0))
        _, flags, _, _, size, _ = struct.unpack("<IIIIQQ", reply)
        return flags, size

    def irq_info(self, index: int) -> tuple[int, int]:
        """(flags, count)."""
        reply = self.request(GET_IRQ_INFO, struct.pack("<IIII", 16, 0, index, 0))
        _, flags, _, count = struct.unpack("<IIII", reply)
        return flags, count

    def set_irqs(self, flags: int, index: int, start: int, count: int, fds: Sequence[int] = ()) -> None:
        """SET_IRQS as in linux/vfio.h; no fds with DATA_EVENTFD de-assigns."""
        self.request(SET_IRQS, struct.pack("<IIIII", 20, flags, index, start, count), fds)

    def read(self, offset: int, size: int = 4, region: int = BAR0) -> int:
        """A register, little-endian."""
        reply = self.request(REGION_READ, struct.pack("<QII", offset, region, size))
        return int.from_bytes(reply[16 : 16 + size], "little")

    def write(self, offset: int, value: int, size: int = 4, region: int = BAR0, *, posted: bool = False) -> None:
        """Write a register; posted as QEMU does it, without an answer."""
        payload = struct.pack("<QII", offset, region, size) + value.to_bytes(size, "little")
        if posted:
            self.send(REGION_WRITE, payload, flags=NO_REPLY)
        else:
            self.request(REGION_WRITE, payload)

    def reset(self) -> None:
        """DEVICE_RESET."""
        self.request(DEVICE_RESET)

    def bus_master(self, on: bool = True) -> None:
        """Memory space and bus mastering in COMMAND."""
        self.write(4, 6 if on else 0, 2, CONFIG)


@contextlib.contextmanager
def shared_memory(size: int) -> Iterator[tuple[int, mmap.mmap]]:
    """A zeroed memfd as guest memory: its descriptor and a mapping of it."""
    fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        with mmap.mmap(fd, size) as memory:
            yield fd, memory
    finally:
        os.close(fd)
