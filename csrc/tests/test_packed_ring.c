/*
 * The packed ring: chains of every length in rings of any size, over many laps; batches that show all at once;
 * notifications by flag and by position; indirect tables; everything that breaks it; stopping and going on; the log.
 */
#include <errno.h>

#include "driver.h"
#include "virtqueue.h"

#define FEATURES (VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_F_RING_PACKED)

struct fixture {
    struct guest guest;
    struct guest_memory *memory;
    struct driver driver;
    struct virtqueue vq;
    struct chain chain;
    uint64_t buffer;
};

static void set_up_sized(struct fixture *f, uint32_t size, uint64_t features, uint64_t bytes)
{
    struct viommu_ring ring;

    guest_init(&f->guest, bytes);
    CHECK_EQ(guest_memory_new(&f->guest.region, 1, &f->memory), 0);
    driver_init(&f->driver, &f->guest, size, true);
    f->buffer = guest_alloc(&f->guest, 65536, 4096);
    ring = driver_ring(&f->driver);
    CHECK_EQ(virtqueue_init(&f->vq, &ring, features, f->memory, NULL), 0);
}

static void set_up(struct fixture *f, uint32_t size, uint64_t features)
{
    set_up_sized(f, size, features, 1u << 20);
}

static void tear_down(struct fixture *f)
{
    guest_memory_free(f->memory);
    guest_fini(&f->guest);
}

static void check_broken(struct fixture *f, unsigned reason)
{
    uint8_t before[16 * 8];

    CHECK_EQ(f->driver.size, 8);
    memcpy(before, driver_slot(&f->driver, 0), sizeof(before));
    CHECK_EQ(virtqueue_take(&f->vq, &f->chain), -EPROTO);
    CHECK_EQ(f->vq.broken, reason);
    CHECK(!virtqueue_available(&f->vq));
    CHECK_EQ(virtqueue_take(&f->vq, &f->chain), -EPROTO);
    CHECK(!virtqueue_publish(&f->vq));
    CHECK(memcmp(before, driver_slot(&f->driver, 0), sizeof(before)) == 0);
    CHECK_EQ(virtqueue_base(&f->vq), 0x80008000u);
}

/* Offer, serve and collect in random bursts of random chains until enough were served. */
static void play(struct fixture *f, uint32_t total, uint64_t features, uint64_t seed)
{
    uint64_t state = seed;
    uint32_t sent = 0, got = 0, size = f->driver.size;

    while (got < total) {
        uint32_t burst = 0, id, len, first = sent;
        uint16_t ids[VIOMMU_MAX_QUEUE_SIZE];
        uint32_t room = f->driver.free;

        while (burst < size && room != 0 && (burst == 0 || check_random(&state) % 8 != 0)) {
            struct piece pieces[4];
            unsigned count = (unsigned)(check_random(&state) % (room < 4 ? room : 4)) + 1;

            for (unsigned i = 0; i < count; i++)
                pieces[i] = (struct piece){f->buffer + 16 * (sent % 1024) + 4 * i, 4, i == 3};
            le32_put(guest_at(&f->guest, pieces[0].gpa), sent);
            ids[burst++] = driver_add(&f->driver, pieces, count);
            room = f->driver.free;
            sent++;
        }
        if (check_random(&state) % 4 == 0) { /* stop and go on, requests waiting */
            struct viommu_ring ring = driver_ring(&f->driver);

            ring.base = virtqueue_base(&f->vq);
            CHECK_EQ(virtqueue_init(&f->vq, &ring, features, f->memory, NULL), 0);
        }
        for (uint32_t i = 0; i < burst; i++) {
            uint8_t bytes[4];

            CHECK(virtqueue_available(&f->vq));
            CHECK_EQ(virtqueue_take(&f->vq, &f->chain), 1);
            CHECK_EQ(f->chain.id, ids[i]);
            CHECK_EQ(f->chain.slots, f->driver.count[ids[i]]);
            CHECK_EQ(chain_read(f->memory, &f->chain, bytes, 4), 0);
            CHECK_EQ(le32_get(bytes), first + i);
            virtqueue_give(&f->vq, &f->chain, first + i);
            CHECK(i != 0 || !driver_used(&f->driver, &id, &len)); /* the first shows last */
        }
        CHECK_EQ(virtqueue_take(&f->vq, &f->chain), 0);
        CHECK(!virtqueue_available(&f->vq));
        (void)virtqueue_publish(&f->vq);
        CHECK(!virtqueue_publish(&f->vq));
        for (uint32_t i = 0; i < burst; i++, got++) {
            CHECK(driver_used(&f->driver, &id, &len));
            CHECK_EQ(id, ids[i]);
            CHECK_EQ(len, got);
        }
        CHECK(!driver_used(&f->driver, &id, &len));
    }
}

/* rule: R-P-1 */
/* rule: R-P-2 */
/* rule: R-P-3 */
/* rule: R-P-4 */
/* Rings of any size, many laps, stopped and started on the way: every chain comes back once, whole and in order. */
static void test_sizes_and_laps(void)
{
    static const uint32_t sizes[] = {1, 2, 3, 4, 5, 7, 8, 13, 64, 100, 255, 256, 1000, 1024};

    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        struct fixture f;

        set_up(&f, sizes[i], FEATURES);
        play(&f, 70000, FEATURES, i + 1);
        tear_down(&f);
    }
}

/* rule: R-P-2 */
/* Nothing of a batch but its length and ID shows before its first descriptor does, whose flags are written last. */
static void test_batch_shows_at_once(void)
{
    struct fixture f;
    uint32_t id, len;

    set_up(&f, 8, FEATURES);
    for (unsigned i = 0; i < 3; i++)
        (void)driver_add(&f.driver, &(struct piece){f.buffer + 4 * i, 4, true}, 1);
    for (unsigned i = 0; i < 3; i++) {
        CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
        virtqueue_give(&f.vq, &f.chain, 4);
        CHECK_EQ(le16_get(driver_slot(&f.driver, 0) + 14) & DRIVER_USED, 0);
    }
    CHECK(virtqueue_publish(&f.vq));
    for (unsigned i = 0; i < 3; i++)
        CHECK(driver_used(&f.driver, &id, &len) && len == 4);
    tear_down(&f);
}

/* rule: R-P-3 */
/* The buffer ID is the one of the last descriptor in a list; the device leaves the addresses alone. */
static void test_id_of_last(void)
{
    struct fixture f;

    set_up(&f, 8, FEATURES);
    driver_descriptor(&f.driver, 1, f.buffer + 4, 4, 0xbeef, DRIVER_WRITE | DRIVER_AVAIL);
    driver_descriptor(&f.driver, 0, f.buffer, 4, 0x1111, DRIVER_NEXT | DRIVER_AVAIL);
    CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
    CHECK_EQ(f.chain.id, 0xbeef);
    CHECK_EQ(f.chain.slots, 2);
    virtqueue_give(&f.vq, &f.chain, 4);
    CHECK(virtqueue_publish(&f.vq));
    CHECK_EQ(le16_get(driver_slot(&f.driver, 0) + 12), 0xbeef);
    CHECK_EQ(le16_get(driver_slot(&f.driver, 0) + 14), DRIVER_WRITE | DRIVER_AVAIL | DRIVER_USED);
    CHECK_EQ(le64_get(driver_slot(&f.driver, 0)), f.buffer);
    CHECK_EQ(le64_get(driver_slot(&f.driver, 1)), f.buffer + 4);
    CHECK_EQ(virtqueue_base(&f.vq), 0x80028002u);
    tear_down(&f);
}

/* rule: R-P-4 */
/* A used length of 0 is a used descriptor without WRITE. */
static void test_nothing_written(void)
{
    struct fixture f;

    set_up(&f, 8, FEATURES);
    (void)driver_add(&f.driver, &(struct piece){f.buffer, 4, true}, 1);
    CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
    virtqueue_give(&f.vq, &f.chain, 0);
    (void)virtqueue_publish(&f.vq);
    CHECK_EQ(le16_get(driver_slot(&f.driver, 0) + 14), DRIVER_AVAIL | DRIVER_USED);
    CHECK_EQ(le32_get(driver_slot(&f.driver, 0) + 8), 0);
    tear_down(&f);
}

/* rule: R-P-5 */
/* Indirect tables: entries in sequence, flags other than WRITE without meaning, WRITE on the reference ignored. */
static void test_indirect(void)
{
    struct fixture f;
    struct piece pieces[8];
    uint64_t table;

    set_up(&f, 8, FEATURES);
    table = guest_alloc(&f.guest, 1024, 16) + 5;
    for (unsigned i = 0; i < 8; i++)
        pieces[i] = (struct piece){f.buffer + 16 * i, i + 1, i >= 5};
    (void)driver_add_indirect(&f.driver, table, pieces, 8);
    CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
    CHECK(f.chain.slots == 1 && f.chain.id == 0);
    CHECK(f.chain.readable == 5 && f.chain.readable_bytes == 15);
    CHECK(f.chain.writable == 3 && f.chain.writable_bytes == 21);

    for (unsigned i = 0; i < 8; i++) { /* NEXT, INDIRECT and the rest */
        uint8_t *at = guest_at(&f.guest, table + 16 * i);

        le16_put(at + 14, (uint16_t)((i >= 5 ? DRIVER_WRITE : 0u) | 0xfffdu));
    }
    (void)driver_chain(&f.driver, &(struct piece){table, 64, true}, 1, DRIVER_INDIRECT);
    CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
    CHECK(f.chain.readable == 4 && f.chain.readable_bytes == 10);
    tear_down(&f);
}

struct bad {
    const char *what;
    unsigned reason;
    void (*make)(struct fixture *f);
};

static void descriptor(struct fixture *f, uint32_t index, uint64_t addr, uint32_t len, unsigned flags)
{
    driver_descriptor(&f->driver, index, addr, len, index, flags | DRIVER_AVAIL);
}

static void bad_missing(struct fixture *f)
{
    descriptor(f, 0, f->buffer, 4, DRIVER_NEXT);
}

static void bad_missing_used(struct fixture *f)
{
    descriptor(f, 1, f->buffer, 4, DRIVER_USED);
    descriptor(f, 0, f->buffer, 4, DRIVER_NEXT);
}

static void bad_loop(struct fixture *f)
{
    for (unsigned i = 0; i < 8; i++)
        descriptor(f, i, f->buffer, 1, DRIVER_NEXT);
}

static void bad_order(struct fixture *f)
{
    descriptor(f, 0, f->buffer, 4, DRIVER_NEXT | DRIVER_WRITE);
    descriptor(f, 1, f->buffer, 4, 0);
}

static void bad_address(struct fixture *f)
{
    descriptor(f, 0, GUEST_GPA + f->guest.size - 4, 5, 0);
}

static void bad_address_wrap(struct fixture *f)
{
    descriptor(f, 0, UINT64_MAX, 2, DRIVER_WRITE);
}

static void bad_table_unfeatured(struct fixture *f)
{
    f->vq.indirect = false;
    descriptor(f, 0, f->buffer, 16, DRIVER_INDIRECT);
}

static void bad_table_empty(struct fixture *f)
{
    descriptor(f, 0, f->buffer, 0, DRIVER_INDIRECT);
}

static void bad_table_length(struct fixture *f)
{
    descriptor(f, 0, f->buffer, 24, DRIVER_INDIRECT);
}

static void bad_table_next(struct fixture *f)
{
    descriptor(f, 1, f->buffer, 4, 0);
    descriptor(f, 0, f->buffer, 16, DRIVER_INDIRECT | DRIVER_NEXT);
}

static void bad_table_in_list(struct fixture *f)
{
    descriptor(f, 1, f->buffer, 16, DRIVER_INDIRECT);
    descriptor(f, 0, f->buffer, 4, DRIVER_NEXT);
}

static void bad_table_address(struct fixture *f)
{
    descriptor(f, 0, GUEST_GPA - 16, 32, DRIVER_INDIRECT);
}

static void bad_table_entry(struct fixture *f)
{
    le64_put(guest_at(&f->guest, f->buffer), 0x1000);
    le32_put(guest_at(&f->guest, f->buffer) + 8, 1);
    descriptor(f, 0, f->buffer, 16, DRIVER_INDIRECT);
}

static void bad_table_long(struct fixture *f)
{
    descriptor(f, 0, f->buffer, 9 * 16, DRIVER_INDIRECT); /* nine empty entries */
}

static void bad_table_huge(struct fixture *f)
{
    descriptor(f, 0, f->buffer, 4096 * 16, DRIVER_INDIRECT);
}

static void bad_table_order(struct fixture *f)
{
    le16_put(guest_at(&f->guest, f->buffer) + 14, DRIVER_WRITE);
    descriptor(f, 0, f->buffer, 32, DRIVER_INDIRECT);
}

static const struct bad bads[] = {
    {"a list whose second descriptor is not there", VIOMMU_BROKEN_AVAIL, bad_missing},
    {"a list whose second descriptor is used", VIOMMU_BROKEN_AVAIL, bad_missing_used},
    {"a list longer than the ring", VIOMMU_BROKEN_LOOP, bad_loop},
    {"readable after writable", VIOMMU_BROKEN_ORDER, bad_order},
    {"one byte after memory", VIOMMU_BROKEN_ADDRESS, bad_address},
    {"past the top of the address space", VIOMMU_BROKEN_ADDRESS, bad_address_wrap},
    {"a table without the feature", VIOMMU_BROKEN_INDIRECT, bad_table_unfeatured},
    {"an empty table", VIOMMU_BROKEN_INDIRECT, bad_table_empty},
    {"a table of 24 bytes", VIOMMU_BROKEN_INDIRECT, bad_table_length},
    {"a table and NEXT", VIOMMU_BROKEN_INDIRECT, bad_table_next},
    {"a table in a list", VIOMMU_BROKEN_INDIRECT, bad_table_in_list},
    {"a table half outside memory", VIOMMU_BROKEN_ADDRESS, bad_table_address},
    {"a table's entry outside memory", VIOMMU_BROKEN_ADDRESS, bad_table_entry},
    {"a table longer than the ring", VIOMMU_BROKEN_LOOP, bad_table_long},
    {"a table of 4096 entries", VIOMMU_BROKEN_LOOP, bad_table_huge},
    {"readable after writable in a table", VIOMMU_BROKEN_ORDER, bad_table_order},
};

/* rule: H7 */
/* Every way to break a packed ring has its reason, takes nothing, and lasts. */
static void test_broken(void)
{
    for (size_t i = 0; i < sizeof(bads) / sizeof(bads[0]); i++) {
        struct fixture f;

        printf("  %s\n", bads[i].what);
        set_up(&f, 8, FEATURES);
        bads[i].make(&f);
        check_broken(&f, bads[i].reason);
        tear_down(&f);
    }
}

/* rule: H7 */
/* More than 4 GiB in one list. */
static void test_four_gigabytes(void)
{
    struct fixture f;

    set_up_sized(&f, 8, FEATURES, 3ull << 30);
    descriptor(&f, 1, GUEST_GPA, (1u << 31) + 1, DRIVER_WRITE);
    descriptor(&f, 0, GUEST_GPA, 1u << 31, DRIVER_NEXT);
    check_broken(&f, VIOMMU_BROKEN_LENGTH);
    tear_down(&f);
}

/* rule: H4 */
/* What cannot be a packed ring: sizes, alignment, holes, and positions outside the ring. */
static void test_init_refused(void)
{
    struct fixture f;
    struct viommu_ring ring, good;

    set_up(&f, 8, FEATURES);
    good = driver_ring(&f.driver);
    ring = good, ring.size = 0;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EINVAL);
    ring = good, ring.size = VIOMMU_MAX_QUEUE_SIZE + 1;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EINVAL);
    ring = good, ring.desc += 8;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EINVAL);
    ring = good, ring.avail += 2;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EINVAL);
    ring = good, ring.used += 2;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EINVAL);
    ring = good, ring.base = 8;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EINVAL);
    ring = good, ring.base = 8u << 16;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EINVAL);
    ring = good, ring.base = UINT32_MAX;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EINVAL);
    ring = good, ring.desc = GUEST_GPA + f.guest.size - 112;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EFAULT);
    ring = good, ring.avail = GUEST_GPA + f.guest.size;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EFAULT);
    ring = good, ring.used = 0;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EFAULT);
    ring = good, ring.base = 0x00070007;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), 0);
    CHECK_EQ(virtqueue_base(&f.vq), 0x00070007);
    tear_down(&f);
}

/* rule: R-Q-NOTE-2 */
/* By position: a notification exactly when the wanted descriptor is among those used, for every position and lap. */
static void test_notify_by_position(void)
{
    static const uint32_t sizes[] = {1, 2, 3, 8, 100};

    for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
        struct fixture f;
        uint32_t size = sizes[s];
        uint64_t at = 0, state = 5; /* at: slots used, counted without end */

        set_up(&f, size, FEATURES | VIRTIO_RING_F_EVENT_IDX);
        for (unsigned round = 0; round < 20000; round++) {
            uint64_t from = at;
            uint32_t position = (uint32_t)(check_random(&state) % size), id, len;
            bool wrap = check_random(&state) % 2 != 0, inside = false;
            uint32_t slots = (uint32_t)(check_random(&state) % size) + 1;
            unsigned chains = 0;
            uint8_t *event = guest_at(&f.guest, f.driver.avail);

            le16_put(event, (uint16_t)(position | (wrap ? 0x8000u : 0u)));
            le16_put(event + 2, 2);
            while (at < from + slots) {
                struct piece pieces[3] = {{f.buffer, 4, true}, {f.buffer, 4, true}, {f.buffer, 4, true}};
                uint32_t left = (uint32_t)(from + slots - at);
                unsigned count = (unsigned)(check_random(&state) % (left < 3 ? left : 3)) + 1;

                (void)driver_add(&f.driver, pieces, count);
                CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
                virtqueue_give(&f.vq, &f.chain, 4);
                at += count;
                chains++;
            }
            for (uint64_t i = from; i < at; i++)
                inside = inside || (i % size == position && (i / size % 2 == 0) == wrap);
            CHECK_EQ(virtqueue_publish(&f.vq), inside);
            while (chains-- > 0)
                CHECK(driver_used(&f.driver, &id, &len));
        }
        tear_down(&f);
    }
}

/* rule: R-Q-NOTE-1 */
/* By flag: enabled, disabled; "by position" without EVENT_IDX and the reserved value ask for a notification too many
 * rather than one too few, as does a position outside the ring. */
static void test_notify_by_flag(void)
{
    static const struct {
        uint16_t position;
        uint16_t flags;
        bool event_idx;
        bool notify;
    } cases[] = {
        {0, 0, false, true},      {0, 1, false, false},      {5, 2, false, true},  {0, 3, false, true},
        {0, 0, true, true},       {0, 1, true, false},       {0, 3, true, true},   {8, 2, true, true},
        {0x7fff, 2, true, true},  {0, 0xfffc, false, true},  {0, 0xfffd, true, false},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct fixture f;
        uint8_t *event;

        set_up(&f, 8, FEATURES | (cases[i].event_idx ? VIRTIO_RING_F_EVENT_IDX : 0));
        event = guest_at(&f.guest, f.driver.avail);
        le16_put(event, cases[i].position);
        le16_put(event + 2, cases[i].flags);
        (void)driver_add(&f.driver, &(struct piece){f.buffer, 4, true}, 1);
        CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
        virtqueue_give(&f.vq, &f.chain, 4);
        CHECK_EQ(virtqueue_publish(&f.vq), cases[i].notify);
        tear_down(&f);
    }
}

/* Asking for kicks: disabled, enabled, and at the next position with its lap when EVENT_IDX is there. */
static void test_want_kick(void)
{
    for (unsigned event_idx = 0; event_idx < 2; event_idx++) {
        struct fixture f;
        const uint8_t *event;

        set_up(&f, 3, FEATURES | (event_idx ? VIRTIO_RING_F_EVENT_IDX : 0));
        event = guest_at(&f.guest, f.driver.used);
        for (unsigned i = 0; i < 12; i++) {
            uint32_t id, len;

            virtqueue_want_kick(&f.vq, false);
            CHECK_EQ(le16_get(event + 2), 1);
            virtqueue_want_kick(&f.vq, true);
            CHECK_EQ(le16_get(event + 2), event_idx ? 2 : 0);
            if (event_idx)
                CHECK_EQ(le16_get(event), i % 3 | (i / 3 % 2 == 0 ? 0x8000u : 0u));
            (void)driver_add(&f.driver, &(struct piece){f.buffer, 4, true}, 1);
            CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
            virtqueue_give(&f.vq, &f.chain, 4);
            (void)virtqueue_publish(&f.vq);
            CHECK(driver_used(&f.driver, &id, &len));
        }
        tear_down(&f);
    }
}

/* A ring nobody has served does not look used, with or without requests waiting; one answer shows. */
static void test_looks_used(void)
{
    for (unsigned length = 0; length <= 4; length += 4) {
        struct fixture f;

        set_up(&f, 8, FEATURES);
        CHECK(!virtqueue_looks_used(&f.vq));
        (void)driver_add(&f.driver, &(struct piece){f.buffer, 4, true}, 1);
        CHECK(!virtqueue_looks_used(&f.vq));
        CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
        virtqueue_give(&f.vq, &f.chain, length);
        (void)virtqueue_publish(&f.vq);
        CHECK(virtqueue_looks_used(&f.vq));
        tear_down(&f);
    }
}

static bool dirty(const struct dirty_log *log, uint64_t gpa)
{
    return (log->bitmap[gpa / 4096 / 8] & 1u << gpa / 4096 % 8) != 0;
}

/*
 * Everything the device writes is logged where it lies, after it was written: used descriptors (the first of a batch
 * when the batch shows) and the wish for kicks. The address that comes with the ring is that of the device's event
 * area, and says nothing of the descriptors.
 */
static void test_log(void)
{
    struct fixture f;
    struct viommu_ring ring;
    struct dirty_log log;
    const uint64_t bytes = (GUEST_GPA + (1u << 20)) / 4096 / 8;
    int fd = memfd_create("log", MFD_CLOEXEC);
    uint64_t second;

    guest_init(&f.guest, 1u << 20);
    CHECK_EQ(guest_memory_new(&f.guest.region, 1, &f.memory), 0);
    (void)guest_alloc(&f.guest, 4096, 4096);
    driver_init(&f.driver, &f.guest, 512, true); /* descriptors on two pages */
    (void)guest_alloc(&f.guest, 4096, 4096);
    f.driver.used = guest_alloc(&f.guest, 4, 4096);
    f.buffer = guest_alloc(&f.guest, 4096, 4096);
    CHECK(ftruncate(fd, (off_t)bytes) == 0);
    CHECK_EQ(dirty_log_map(fd, bytes, 0, &log), 0);
    f.memory->log = &log;
    ring = driver_ring(&f.driver);
    ring.logged = true;
    ring.log_addr = f.driver.used;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES | VIRTIO_RING_F_EVENT_IDX, f.memory, NULL), 0);
    second = f.driver.desc + 256 * 16;

    for (unsigned want = 0; want < 2; want++) {
        virtqueue_want_kick(&f.vq, want != 0);
        CHECK(dirty(&log, f.driver.used));
        CHECK(!dirty(&log, f.driver.desc));
        memset(log.map.start, 0, bytes);
    }
    for (unsigned i = 0; i < 512; i++) {
        uint32_t id, len;

        (void)driver_add(&f.driver, &(struct piece){f.buffer, 4, true}, 1);
        CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
        virtqueue_give(&f.vq, &f.chain, 4);
        memset(log.map.start, 0, bytes); /* someone has taken the log meanwhile */
        (void)virtqueue_publish(&f.vq);
        CHECK_EQ(dirty(&log, f.driver.desc), i < 256);
        CHECK_EQ(dirty(&log, second), i >= 256);
        CHECK(!dirty(&log, f.driver.used));
        CHECK(driver_used(&f.driver, &id, &len));
    }
    f.memory->log = NULL;
    dirty_log_unmap(&log);
    (void)close(fd);
    tear_down(&f);
}

int main(void)
{
    RUN(test_sizes_and_laps);
    RUN(test_batch_shows_at_once);
    RUN(test_id_of_last);
    RUN(test_nothing_written);
    RUN(test_indirect);
    RUN(test_broken);
    RUN(test_four_gigabytes);
    RUN(test_init_refused);
    RUN(test_notify_by_position);
    RUN(test_notify_by_flag);
    RUN(test_want_kick);
    RUN(test_looks_used);
    RUN(test_log);
    return 0;
}
