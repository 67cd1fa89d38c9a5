"""`viommud run`: start QEMU with the devices of the host and be its IOMMU.

What the user would have to write is added to QEMU's command line: an iommufd, a vfio-pci device for each endpoint that
is a device of the host, and the vhost-user device, in this order: QEMU makes devices in the order of the command line,
and when it makes the last, the others have been bound.  QEMU inherits the descriptors.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack

from viommud import config_space
from viommud.config import Config
from viommud.daemon import END_SIGNALS, serve_front_end
from viommud.device_setup import DeviceSetup, plan
from viommud.errors import UsageError
from viommud.host.devices import HostDevices, acquire, passed_descriptors
from viommud.log import configure
from viommud.options import Options
from viommud.sockets import VhostSocket
from viommud.topology import qemu_args
from viommud.topology.model import Ids, Topology
from viommud.topology.place import PciPlace, rid_text

IOMMUFD = "viommud-iommufd"
CHARDEV = "viommud-socket"
_ROOT_BUS = "pcie.0"
_PR_SET_PDEATHSIG = 1
_PATIENCE = 10.0
"""Seconds for QEMU to end when it is told to."""


def planned(config: Config) -> tuple[DeviceSetup, Topology]:
    """What a configuration amounts to, with the places of all devices.

    :raises UsageError: it has no [topology], or an impossible one.
    """
    setup = plan(config)
    if config.topology is None or not setup.named:
        raise UsageError(
            "`viommud run` puts devices into the guest: it needs [topology] and each [[endpoint]]",
            hint='at least machine = "virt" and iommu = "00:01.0"',
        )
    return setup, Topology.build(config.topology, [Ids(entry.first, entry.last) for entry in setup.endpoints])


def extra_arguments(topology: Topology, setup: DeviceSetup, host: HostDevices | None, front_end: int) -> list[str]:
    """What is added to QEMU's command line.

    :param front_end: descriptor of the connected vhost-user socket.
    :raises UsageError: a device is not at a place that QEMU can put it.
    """
    words = []
    if host is not None and host.iommufd is not None:
        words += ["-object", f"iommufd,id={IOMMUFD},fd={host.iommufd}"]
        for endpoint, fd in sorted(host.devices.items()):
            # QEMU 11.1 ends with a segmentation fault on fd= without id=.
            name = f"endpoint{endpoint:x}"
            where = _address(topology.find(endpoint), f"endpoint {endpoint:#x}")
            words += ["-device", f"vfio-pci,id={name},iommufd={IOMMUFD},fd={fd},{where}"]
    where = _address(topology.iommu, "the IOMMU")
    return [
        *words,
        *("-chardev", f"socket,id={CHARDEV},fd={front_end}"),
        "-device",
        f"vhost-user-test-device-pci,{where},chardev={CHARDEV},virtio-id={qemu_args.VIRTIO_ID_IOMMU}"
        f",num_vqs={qemu_args.QUEUES},vq_size={qemu_args.QUEUE_SIZE}"
        f",config_size={config_space.size(setup.settings) + len(setup.topology)}",
    ]


def _address(place: object, what: str) -> str:
    if not isinstance(place, PciPlace):
        raise UsageError(f"{what}: `viommud run` puts devices at PCI functions only")
    if place.segment or place.rid >> 8:
        raise UsageError(f"{what}: {place} is not on bus 00 of segment 0, where QEMU puts what it is told to put there")
    return f"bus={_ROOT_BUS},addr={rid_text(place.rid).partition(':')[2]}"


def run(options: Options, setup: DeviceSetup, topology: Topology, command: Sequence[str]) -> int:
    """Start QEMU and serve it until it ends; returns QEMU's exit status, or 128 and the signal's number.

    :raises UsageError: a device cannot be had, or QEMU not be started.
    """
    log = configure(options.log_level, options.log_format)
    signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    with ExitStack() as stack:
        host = acquire(setup, passed_descriptors(dict(options.pass_fd)), may_open=True)
        if host is not None:
            stack.enter_context(host)
            setup = host.narrow(setup)
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        with theirs:
            words = [*command, *extra_arguments(topology, setup, host, theirs.fileno())]
            log.info("starting", command=words)
            qemu = _start(words, [theirs.fileno(), *(host.descriptors() if host else [])])
        stack.callback(_end, qemu)
        front_end = VhostSocket(ours, listening=False, described="QEMU, started by this process")
        status = serve_front_end(setup, front_end, log, host, options, on_signal=qemu.terminate)
        try:
            ended = qemu.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            log.error("qemu-hangs", pid=qemu.pid, hint="it closed its connection and does not end; it is killed")
            return 1
        log.info("qemu-ended", status=ended)
        return status or (ended if ended >= 0 else 128 - ended)


def _start(command: Sequence[str], descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
    # Everything of ours is closed on exec; what we inherited for QEMU, it inherits too.
    for fd in descriptors:
        os.set_inheritable(fd, True)
    libc, parent = ctypes.CDLL(None), os.getpid()

    def prepare() -> None:
        # QEMU goes on without its back-end, and would keep devices and memory that nobody looks after any more.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)

    try:
        return subprocess.Popen(command, close_fds=False, preexec_fn=prepare)
    except OSError as error:
        raise UsageError(f"{command[0]} cannot be started: {error.strerror}") from error
    finally:
        for fd in descriptors:
            os.set_inheritable(fd, False)


def _end(qemu: subprocess.Popen[bytes]) -> None:
    if qemu.poll() is None:
        qemu.kill()
        qemu.wait()
