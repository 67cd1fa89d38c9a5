"""The engine against the model, one step at a time: hypothesis looks for the shortest history that tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import pytest
from conformance.model import Limits, Model, Status
from frontend import iommu
from frontend.memory import GuestMemory
from frontend.ring import Buffer
from frontend.split import SplitRing
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from viommud.engine import Engine
from viommud.settings import Reserved, Settings
from viommud.vhost_user.device import QueueSetup, Region

PAGE = 4096
ENDPOINTS: dict[int, Sequence[tuple[int, int]]] = {1: [], 2: [], 3: [(3 * PAGE, 4 * PAGE - 1)]}
LIMITS = Limits(domains=2, mappings=6, mappings_per_domain=4)

endpoints = st.sampled_from([1, 2, 3, 4])
domains = st.sampled_from([0, 1, 2])
pages = st.integers(0, 7)
counts = st.integers(1, 4)


class Machine(RuleBasedStateMachine):
    """A driver that does one thing after the other, with the engine's insides looked at after each."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._queue_runs = False

    @initialize(bypass=st.booleans())
    def start(self, bypass: bool) -> None:
        """An engine with one page of rings and requests, and some memory to map."""
        self.memory = self._stack.enter_context(GuestMemory())
        self.engine = self._stack.enter_context(
            Engine(
                Settings(
                    bypass=bypass,
                    max_domains=LIMITS.domains,
                    max_mappings=LIMITS.mappings,
                    max_domain_mappings=LIMITS.mappings_per_domain,
                    spin_us=0,
                )
            )
        )
        for endpoint, regions in ENDPOINTS.items():
            self.engine.add_endpoints(endpoint, endpoint, [Reserved(*region) for region in regions])
        self.engine.set_driver_features(self.engine.offered_features)
        (ram,) = self.memory.rams
        # The engine keeps what it uses; ours goes when the machine ends.
        region = self.engine.map_region(_region(ram.gpa, ram.size), ram.fd)
        self._stack.callback(region.close)
        self.engine.set_memory([region])
        self._stack.callback(self.engine.set_memory, [])
        self.ring = SplitRing(self.memory, 8, event_idx=True)
        self._stack.callback(self.ring.close)
        self.body, self.answer = self.memory.allocate(128), self.memory.allocate(1024)
        self.ram = ram.gpa
        self.model = Model(
            endpoints=ENDPOINTS, memory=[(ram.gpa, ram.gpa + ram.size - 1)], limits=LIMITS, bypass=bypass
        )
        self.start_queue(0)

    def start_queue(self, base: int) -> None:
        """Run the request queue."""
        ring = self.ring
        setup = QueueSetup(
            ring.size, ring.desc, ring.avail, ring.used, True, base, None, ring.kick_fd, ring.call_fd, ring.err_fd
        )
        self.engine.start_queue(0, setup)

    def teardown(self) -> None:
        """The end of a history."""
        self._stack.close()

    def play(self, readable: bytes, writable: int = iommu.TAIL) -> None:
        """One request; its status must be the model's."""
        self.memory.write(self.body, readable)
        self.memory.write(self.answer, b"\xa5" * writable)
        self.ring.submit([Buffer(self.body, len(readable)), Buffer(self.answer, writable, writable=True)])
        (used,) = self.ring.wait()
        expected = self.model.serve(readable, writable)
        if expected is None:
            assert used.length == 0
            assert self.memory.read(self.answer, writable) == b"\xa5" * writable
        else:
            assert used.length == writable
            assert Status(self.memory.read(self.answer + writable - 4, 1)[0]) == expected

    @rule(domain=domains, endpoint=endpoints, flags=st.sampled_from([0, 0, 0, 1, 2]))
    def attach(self, domain: int, endpoint: int, flags: int) -> None:
        """ATTACH."""
        self.play(iommu.attach(domain, endpoint, flags=flags))

    @rule(domain=domains, endpoint=endpoints)
    def detach(self, domain: int, endpoint: int) -> None:
        """DETACH."""
        self.play(iommu.detach(domain, endpoint))

    @rule(domain=domains, page=pages, count=counts, onto=st.integers(-1, 3), flags=st.integers(0, 8))
    def map_pages(self, domain: int, page: int, count: int, onto: int, flags: int) -> None:
        """MAP of whole pages."""
        first, last = page * PAGE, (page + count) * PAGE - 1
        self.play(iommu.map_(domain, first, last, self.ram + onto * PAGE, flags=flags))

    @rule(domain=domains, first=st.integers(0, 1 << 64) | pages, last=st.integers(0, 1 << 64), flags=st.just(3))
    def map_anything(self, domain: int, first: int, last: int, flags: int) -> None:
        """MAP of any two addresses."""
        self.play(iommu.map_(domain, first % (1 << 64), last % (1 << 64), self.ram, flags=flags))

    @rule(domain=domains, page=pages, count=counts, odd=st.sampled_from([0, 0, 0, 1, PAGE - 1]))
    def unmap(self, domain: int, page: int, count: int, odd: int) -> None:
        """UNMAP, mostly of whole pages."""
        self.play(iommu.unmap(domain, page * PAGE + odd, (page + count) * PAGE - 1))

    @rule(domain=domains)
    def unmap_all(self, domain: int) -> None:
        """UNMAP of the whole space."""
        self.play(iommu.unmap(domain, 0, (1 << 64) - 1))

    @rule(endpoint=endpoints, room=st.sampled_from([512, 511, 0, 600]))
    def probe(self, endpoint: int, room: int) -> None:
        """PROBE."""
        self.play(iommu.probe(endpoint), room + iommu.TAIL)

    @rule(data=st.binary(min_size=1, max_size=80), writable=st.integers(1, 40))
    def anything(self, data: bytes, writable: int) -> None:
        """Any bytes."""
        self.play(data, writable)

    @rule(value=st.booleans())
    def write_bypass(self, value: bool) -> None:
        """The driver writes config.bypass."""
        self.engine.bypass = self.model.bypass = value

    @rule(mmio=st.booleans(), bypass_config=st.booleans())
    def features(self, mmio: bool, bypass_config: bool) -> None:
        """Another driver binds; the device is reset on the way."""
        base = self.engine.stop_queue(0)
        self.engine.reset()
        self.model.reset()
        without = (0 if mmio else iommu.F_MMIO) | (0 if bypass_config else iommu.F_BYPASS_CONFIG)
        self.engine.set_driver_features(self.engine.offered_features & ~without)
        self.model.mmio, self.model.bypass_config = mmio, bypass_config
        self.start_queue(base)

    @rule()
    def pause(self) -> None:
        """The machine is stopped and goes on."""
        self.start_queue(self.engine.stop_queue(0))

    @precondition(lambda self: hasattr(self, "engine"))
    @invariant()
    def same_state(self) -> None:
        """Listings, counters and translations."""
        found = {info.id: info for info in self.engine.domains()}
        assert set(found) == set(self.model.domains)
        for number, domain in self.model.domains.items():
            info = found[number]
            assert (info.endpoints, info.bypass) == (len(domain.endpoints), domain.bypass)
            mappings = self.engine.mappings(number)
            expected = sorted(domain.mappings, key=lambda mapping: mapping.first)
            assert [(m.first, m.last, m.phys, m.flags) for m in mappings] == [
                (m.first, m.last, m.phys, m.flags) for m in expected
            ]
            assert info.mappings == len(mappings)
        stats = self.engine.stats()
        assert stats.domains == len(self.model.domains)
        assert stats.endpoints == len(self.model.attached)
        assert stats.mappings == sum(len(domain.mappings) for domain in self.model.domains.values())
        for endpoint in ENDPOINTS:
            for iova in self.model.interesting(self.model.domains):
                for access in (iommu.READ, iommu.WRITE):
                    assert self.engine.translate(endpoint, iova, access) == self.model.translate(endpoint, iova, access)


def _region(gpa: int, size: int) -> Region:
    return Region(gpa, size, gpa, 0)


TestEngine = pytest.mark.timeout(300)(Machine.TestCase)
TestEngine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
