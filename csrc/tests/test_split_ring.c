/*
 * The split ring: buffers in and out for every size and past the wrap of its indices, notifications, indirect tables
 * in every form, everything that breaks it and with which reason, where it stops and starts again, what it logs.
 */
#include <errno.h>

#include "driver.h"
#include "virtqueue.h"

#define FEATURES (VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC)

struct fixture {
    struct guest guest;
    struct guest_memory *memory;
    struct driver driver;
    struct virtqueue vq;
    struct chain chain;
    uint64_t buffer; /* 64 KiB to point descriptors at */
};

static void set_up_sized(struct fixture *f, uint32_t size, uint64_t features, uint64_t bytes)
{
    struct viommu_ring ring;

    guest_init(&f->guest, bytes);
    CHECK_EQ(guest_memory_new(&f->guest.region, 1, &f->memory), 0);
    driver_init(&f->driver, &f->guest, size, false);
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

/* The ring as the driver sees it is broken for this reason, and stays so; nothing was given back. */
static void check_broken(struct fixture *f, unsigned reason)
{
    uint8_t before[6 + 8 * 16], *used = guest_at(&f->guest, f->driver.used);
    size_t bytes = 6 + 8ull * f->driver.size;

    CHECK(bytes <= sizeof(before));
    memcpy(before, used, bytes);
    CHECK_EQ(virtqueue_take(&f->vq, &f->chain), -EPROTO);
    CHECK_EQ(f->vq.broken, reason);
    CHECK(!virtqueue_available(&f->vq));
    CHECK_EQ(virtqueue_take(&f->vq, &f->chain), -EPROTO);
    CHECK_EQ(f->vq.broken, reason);
    CHECK(!virtqueue_publish(&f->vq));
    CHECK(memcmp(before, used, bytes) == 0);
}

/* rule: R-Q-USED-1 */
/* Every size from 1 to 1024, full and empty by turns, past the wrap of the 16-bit indices: nothing lost or mixed up. */
static void test_sizes_and_wrap(void)
{
    for (uint32_t size = 1; size <= VIOMMU_MAX_QUEUE_SIZE; size *= 2) {
        struct fixture f;
        uint64_t state = size;
        uint32_t sent = 0, got = 0;

        set_up(&f, size, FEATURES);
        while (got < 70000) {
            uint32_t burst = (uint32_t)(check_random(&state) % size) + 1, id, len;
            uint16_t ids[VIOMMU_MAX_QUEUE_SIZE];

            for (uint32_t i = 0; i < burst; i++, sent++) {
                uint64_t at = f.buffer + 8 * (sent % size);
                struct piece piece = {at, 8, (sent & 1) != 0};

                le64_put(guest_at(&f.guest, at), sent);
                ids[i] = driver_add(&f.driver, &piece, 1);
            }
            for (uint32_t i = 0; i < burst; i++) {
                uint32_t number = sent - burst + i;
                uint8_t bytes[8];

                CHECK(virtqueue_available(&f.vq));
                CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
                CHECK_EQ(f.chain.id, ids[i]);
                CHECK_EQ(f.chain.readable + f.chain.writable, 1);
                CHECK_EQ(f.chain.writable, number & 1);
                if (f.chain.readable != 0) {
                    CHECK_EQ(chain_read(f.memory, &f.chain, bytes, 8), 0);
                    CHECK_EQ(le64_get(bytes), number);
                }
                virtqueue_give(&f.vq, &f.chain, number);
                CHECK(!driver_used(&f.driver, &id, &len)); /* not before it is published */
            }
            CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 0);
            CHECK(virtqueue_publish(&f.vq));
            CHECK(!virtqueue_publish(&f.vq)); /* nothing new */
            for (uint32_t i = 0; i < burst; i++, got++) {
                CHECK(driver_used(&f.driver, &id, &len));
                CHECK_EQ(id, ids[i]);
                CHECK_EQ(len, got);
            }
            CHECK_EQ(virtqueue_base(&f.vq), (uint16_t)sent);
        }
        tear_down(&f);
    }
}

/* rule: H4 */
/* What cannot be a ring: sizes, alignment, addresses in no region, bases that do not fit 16 bits. */
static void test_init_refused(void)
{
    static const uint32_t sizes[] = {0, 3, 5, 1000, 1025, 2048, 32768, 65536, UINT32_MAX};
    struct fixture f;
    struct viommu_ring ring, good;

    set_up(&f, 8, FEATURES);
    good = driver_ring(&f.driver);
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        ring = good;
        ring.size = sizes[i];
        CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EINVAL);
    }
    ring = good, ring.desc += 8;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EINVAL);
    ring = good, ring.avail += 1;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EINVAL);
    ring = good, ring.used += 2;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EINVAL);
    ring = good, ring.base = 65536;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EINVAL);
    ring = good, ring.desc = GUEST_GPA + f.guest.size - 8 * 16 + 16;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EFAULT);
    ring = good, ring.avail = GUEST_GPA + f.guest.size - (6 + 16) + 2;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EFAULT);
    ring = good, ring.used = GUEST_GPA + f.guest.size - (6 + 64) + 2;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EFAULT);
    ring = good, ring.used = GUEST_GPA - 4;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EFAULT);
    ring = good, ring.desc = UINT64_MAX & ~15ull;
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EFAULT);
    ring = good, ring.gpa = false; /* the front-end's addresses are others */
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), -EFAULT);
    ring.desc = (uint64_t)(uintptr_t)guest_at(&f.guest, good.desc);
    ring.avail = (uint64_t)(uintptr_t)guest_at(&f.guest, good.avail);
    ring.used = (uint64_t)(uintptr_t)guest_at(&f.guest, good.used);
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), 0);
    tear_down(&f);
}

/* rule: R-Q-FRAME */
/* However a buffer is cut into descriptors, one byte each or none at all, its bytes are the same. */
static void test_framing(void)
{
    struct fixture f;
    struct piece pieces[64];
    uint8_t out[20], in[20];
    uint32_t id, len;

    for (unsigned i = 0; i < sizeof(out); i++)
        out[i] = (uint8_t)(i + 1);
    set_up(&f, 64, FEATURES);
    for (unsigned i = 0; i < 20; i++) { /* with an empty descriptor after every other byte */
        pieces[i] = (struct piece){f.buffer + 100 * i, i % 2 == 0, false};
        pieces[20 + i] = (struct piece){f.buffer + 3000 + 100 * i, i % 2 == 0, true};
        if (i % 2 == 0)
            *guest_at(&f.guest, pieces[i].gpa) = out[i / 2];
        *guest_at(&f.guest, pieces[20 + i].gpa) = 0xa5;
        pieces[40] = (struct piece){0xdead0000, 0, true}; /* an empty one may point anywhere */
    }
    (void)driver_add(&f.driver, pieces, 41);
    CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
    CHECK(f.chain.readable == 20 && f.chain.writable == 21);
    CHECK(f.chain.readable_bytes == 10 && f.chain.writable_bytes == 10);
    CHECK_EQ(chain_read(f.memory, &f.chain, in, 10), 0);
    CHECK(memcmp(in, out, 10) == 0);
    CHECK_EQ(chain_read(f.memory, &f.chain, in, 11), -EFAULT);
    CHECK_EQ(chain_read(f.memory, &f.chain, in, 0), 0);
    CHECK_EQ(chain_write(f.memory, &f.chain, 6, out, 4), 0);
    CHECK_EQ(chain_zero(f.memory, &f.chain, 0, 6), 0);
    CHECK_EQ(chain_write(f.memory, &f.chain, 10, out, 0), 0);
    CHECK_EQ(chain_zero(f.memory, &f.chain, 10, 1), -EFAULT);
    for (unsigned i = 0; i < 10; i++)
        CHECK_EQ(*guest_at(&f.guest, pieces[20 + 2 * i].gpa), i < 6 ? 0 : out[i - 6]);
    CHECK_EQ(chain_write(f.memory, &f.chain, 7, out, 4), -EFAULT); /* one byte too many */
    virtqueue_give(&f.vq, &f.chain, 10);
    CHECK(virtqueue_publish(&f.vq));
    CHECK(driver_used(&f.driver, &id, &len) && len == 10);
    tear_down(&f);
}

/* Buffers that lie across two adjacent regions, as an indirect table may, work like any other. */
static void test_across_regions(void)
{
    int fd = memfd_create("guest", MFD_CLOEXEC);
    struct viommu_region *regions[2];
    struct fixture f;
    struct viommu_ring ring;
    uint8_t in[8];
    const uint64_t border = GUEST_GPA + (1u << 20);

    set_up(&f, 8, FEATURES);
    CHECK(ftruncate(fd, 8192) == 0);
    regions[0] = f.guest.region;
    CHECK_EQ(viommu_region_map(border, 8192, 0x1000, 0, fd, &regions[1]), 0);
    guest_memory_free(f.memory);
    CHECK_EQ(guest_memory_new(regions, 2, &f.memory), 0);
    viommu_region_free(regions[1]);
    ring = driver_ring(&f.driver);
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES, f.memory, NULL), 0);

    memcpy(f.guest.ram + (1u << 20) - 4, "abcd", 4);
    CHECK(pwrite(fd, "efgh", 4, 0) == 4);
    (void)driver_add(&f.driver, &(struct piece){border - 4, 8, false}, 1);
    CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
    CHECK_EQ(chain_read(f.memory, &f.chain, in, 8), 0);
    CHECK(memcmp(in, "abcdefgh", 8) == 0);

    { /* a table whose second entry is cut in two by the border */
        uint8_t table[32] = {0};

        le64_put(table, border - 4);
        le32_put(table + 8, 4);
        le16_put(table + 12, DRIVER_NEXT);
        le16_put(table + 14, 1);
        le64_put(table + 16, border);
        le32_put(table + 24, 4);
        memcpy(f.guest.ram + (1u << 20) - 24, table, 24);
        CHECK(pwrite(fd, table + 24, 8, 0) == 8);
        (void)driver_chain(&f.driver, &(struct piece){border - 24, 32, false}, 1, DRIVER_INDIRECT);
        CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
        CHECK_EQ(f.chain.readable, 2);
        CHECK_EQ(f.chain.readable_bytes, 8);
        CHECK(f.chain.buffers[1].gpa == border && f.chain.buffers[1].length == 4);
    }
    tear_down(&f);
    (void)close(fd);
}

/* rule: R-Q-IND-1 */
/* rule: R-Q-IND-2 */
/* Indirect tables: alone, with WRITE set on the reference, after direct descriptors, out of order, larger than used. */
static void test_indirect(void)
{
    struct fixture f;
    struct piece pieces[3] = {{0, 4, false}, {0, 6, true}, {0, 8, true}};
    uint64_t table;

    set_up(&f, 8, FEATURES);
    table = guest_alloc(&f.guest, 8192 * 16, 1) + 3; /* no alignment is asked of a table */
    for (unsigned i = 0; i < 3; i++)
        pieces[i].gpa = f.buffer + 64 * i;

    (void)driver_add_indirect(&f.driver, table, pieces, 3);
    CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
    CHECK(f.chain.readable_bytes == 4 && f.chain.writable_bytes == 14 && f.chain.writable == 2);

    /* WRITE on the reference means nothing */
    driver_table(&f.driver, table, pieces, 3);
    (void)driver_chain(&f.driver, &(struct piece){table, 48, true}, 1, DRIVER_INDIRECT);
    CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
    CHECK(f.chain.readable_bytes == 4 && f.chain.writable_bytes == 14);

    /* direct first */
    driver_descriptor(&f.driver, 5, f.buffer + 512, 12, DRIVER_NEXT, 6);
    driver_descriptor(&f.driver, 6, table, 48, DRIVER_INDIRECT, 0);
    driver_offer(&f.driver, 5);
    CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
    CHECK_EQ(f.chain.id, 5);
    CHECK(f.chain.readable == 2 && f.chain.readable_bytes == 16 && f.chain.writable_bytes == 14);

    /* entries linked from the end of a large table to its middle */
    le64_put(guest_at(&f.guest, table), f.buffer);
    le32_put(guest_at(&f.guest, table + 8), 5);
    le16_put(guest_at(&f.guest, table + 12), DRIVER_NEXT);
    le16_put(guest_at(&f.guest, table + 14), 8191);
    le64_put(guest_at(&f.guest, table + 8190 * 16 + 0), 0); /* never looked at */
    {
        uint8_t *last = f.guest.ram + (table - GUEST_GPA) + 8191 * 16;

        if (table + 8192 * 16 > GUEST_GPA + f.guest.size)
            abort();
        le64_put(last, f.buffer + 8);
        le32_put(last + 8, 7);
        le16_put(last + 12, DRIVER_WRITE);
        le16_put(last + 14, 0xffff); /* no NEXT: no meaning */
    }
    driver_descriptor(&f.driver, 4, table, 8192 * 16, DRIVER_INDIRECT, 0xffff);
    driver_offer(&f.driver, 4);
    CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
    CHECK(f.chain.readable_bytes == 5 && f.chain.writable_bytes == 7);

    /* as many entries as the ring has are allowed, by any route */
    {
        struct piece many[8];

        for (unsigned i = 0; i < 8; i++)
            many[i] = (struct piece){f.buffer + i, 1, i >= 4};
        driver_table(&f.driver, table, many, 8);
        driver_descriptor(&f.driver, 4, table, 8 * 16, DRIVER_INDIRECT, 0);
        driver_offer(&f.driver, 4);
        CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
        CHECK(f.chain.readable == 4 && f.chain.writable == 4);
    }
    tear_down(&f);
}

/* One bad ring: how to make it, and what it is called. */
struct bad {
    const char *what;
    unsigned reason;
    void (*make)(struct fixture *f);
};

static void descriptor(struct fixture *f, uint32_t index, uint64_t offset, uint32_t len, unsigned flags, unsigned next)
{
    driver_descriptor(&f->driver, index, f->buffer + offset, len, flags, next);
}

static void bad_ahead(struct fixture *f)
{
    shared16_put(guest_at(&f->guest, f->driver.avail) + 2, 9, __ATOMIC_RELEASE);
}

static void bad_backwards(struct fixture *f)
{
    shared16_put(guest_at(&f->guest, f->driver.avail) + 2, 0xffff, __ATOMIC_RELEASE);
}

static void bad_head(struct fixture *f)
{
    driver_offer(&f->driver, 8);
}

static void bad_head_far(struct fixture *f)
{
    driver_offer(&f->driver, 0xffff);
}

static void bad_next(struct fixture *f)
{
    descriptor(f, 0, 0, 4, DRIVER_NEXT, 8);
    driver_offer(&f->driver, 0);
}

static void bad_next_far(struct fixture *f)
{
    descriptor(f, 0, 0, 4, DRIVER_NEXT, 0xffff);
    driver_offer(&f->driver, 0);
}

static void bad_self_loop(struct fixture *f)
{
    descriptor(f, 3, 0, 4, DRIVER_NEXT, 3);
    driver_offer(&f->driver, 3);
}

static void bad_long_loop(struct fixture *f)
{
    for (unsigned i = 0; i < 8; i++)
        descriptor(f, i, i, 1, DRIVER_NEXT | DRIVER_WRITE, (i + 1) % 8);
    driver_offer(&f->driver, 0);
}

static void bad_empty_loop(struct fixture *f)
{
    descriptor(f, 0, 0, 0, DRIVER_NEXT, 1);
    descriptor(f, 1, 0, 0, DRIVER_NEXT, 0);
    driver_offer(&f->driver, 0);
}

static void bad_order(struct fixture *f)
{
    descriptor(f, 0, 0, 4, DRIVER_NEXT | DRIVER_WRITE, 1);
    descriptor(f, 1, 8, 4, 0, 0);
    driver_offer(&f->driver, 0);
}

static void bad_order_empty(struct fixture *f)
{
    descriptor(f, 0, 0, 0, DRIVER_NEXT | DRIVER_WRITE, 1);
    descriptor(f, 1, 8, 0, 0, 0);
    driver_offer(&f->driver, 0);
}

static void bad_hole(struct fixture *f)
{
    driver_descriptor(&f->driver, 0, GUEST_GPA - 1, 1, 0, 0);
    driver_offer(&f->driver, 0);
}

static void bad_end(struct fixture *f)
{
    driver_descriptor(&f->driver, 0, GUEST_GPA + f->guest.size - 4, 5, DRIVER_WRITE, 0);
    driver_offer(&f->driver, 0);
}

static void bad_wrap(struct fixture *f)
{
    driver_descriptor(&f->driver, 0, UINT64_MAX - 3, 8, 0, 0);
    driver_offer(&f->driver, 0);
}

static void bad_huge(struct fixture *f)
{
    driver_descriptor(&f->driver, 0, GUEST_GPA, UINT32_MAX, 0, 0);
    driver_offer(&f->driver, 0);
}

static void table_of(struct fixture *f, uint32_t len, unsigned flags, unsigned entry_flags, unsigned entry_next)
{
    uint8_t *at = guest_at(&f->guest, f->buffer + 4096);

    le64_put(at, f->buffer);
    le32_put(at + 8, 4);
    le16_put(at + 12, (uint16_t)entry_flags);
    le16_put(at + 14, (uint16_t)entry_next);
    memcpy(at + 16, at, 16);
    descriptor(f, 0, 4096, len, DRIVER_INDIRECT | flags, 1);
    descriptor(f, 1, 0, 4, 0, 0);
    driver_offer(&f->driver, 0);
}

static void bad_table_empty(struct fixture *f)
{
    table_of(f, 0, 0, 0, 0);
}

static void bad_table_length(struct fixture *f)
{
    table_of(f, 17, 0, 0, 0);
}

static void bad_table_short(struct fixture *f)
{
    table_of(f, 15, 0, 0, 0);
}

static void bad_table_next(struct fixture *f)
{
    table_of(f, 16, DRIVER_NEXT, 0, 0);
}

static void bad_table_nested(struct fixture *f)
{
    table_of(f, 32, 0, DRIVER_INDIRECT, 0);
}

static void bad_table_index(struct fixture *f)
{
    table_of(f, 32, 0, DRIVER_NEXT, 2);
}

static void bad_table_loop(struct fixture *f)
{
    table_of(f, 32, 0, DRIVER_NEXT, 1);
}

static void bad_table_unfeatured(struct fixture *f)
{
    f->vq.indirect = false;
    table_of(f, 16, 0, 0, 0);
}

static void bad_table_address(struct fixture *f)
{
    driver_descriptor(&f->driver, 0, GUEST_GPA + f->guest.size - 16, 32, DRIVER_INDIRECT, 0);
    driver_offer(&f->driver, 0);
}

static void bad_table_order(struct fixture *f)
{
    table_of(f, 16, 0, 0, 0);
    f->driver.avail_idx--;
    descriptor(f, 2, 128, 4, DRIVER_WRITE | DRIVER_NEXT, 0);
    driver_offer(&f->driver, 2);
}

static void bad_table_entry(struct fixture *f)
{
    table_of(f, 16, 0, 0, 0);
    le64_put(guest_at(&f->guest, f->buffer + 4096), GUEST_GPA - 4);
}

static void bad_table_long(struct fixture *f)
{
    struct piece many[9];

    for (unsigned i = 0; i < 9; i++)
        many[i] = (struct piece){f->buffer + i, 1, false};
    (void)driver_add_indirect(&f->driver, f->buffer + 4096, many, 9);
}

static void bad_direct_and_table_long(struct fixture *f)
{
    struct piece many[8];

    for (unsigned i = 0; i < 8; i++)
        many[i] = (struct piece){f->buffer + i, 1, false};
    driver_table(&f->driver, f->buffer + 4096, many, 8);
    descriptor(f, 0, 64, 1, DRIVER_NEXT, 1);
    descriptor(f, 1, 4096, 8 * 16, DRIVER_INDIRECT, 0);
    driver_offer(&f->driver, 0);
}

static const struct bad bads[] = {
    {"available index a ring and one ahead", VIOMMU_BROKEN_AVAIL, bad_ahead},
    {"available index goes backwards", VIOMMU_BROKEN_AVAIL, bad_backwards},
    {"head is the ring size", VIOMMU_BROKEN_HEAD, bad_head},
    {"head is 65535", VIOMMU_BROKEN_HEAD, bad_head_far},
    {"next is the ring size", VIOMMU_BROKEN_HEAD, bad_next},
    {"next is 65535", VIOMMU_BROKEN_HEAD, bad_next_far},
    {"a descriptor that follows itself", VIOMMU_BROKEN_LOOP, bad_self_loop},
    {"all descriptors in a circle", VIOMMU_BROKEN_LOOP, bad_long_loop},
    {"a circle of empty descriptors", VIOMMU_BROKEN_LOOP, bad_empty_loop},
    {"readable after writable", VIOMMU_BROKEN_ORDER, bad_order},
    {"the same with no bytes", VIOMMU_BROKEN_ORDER, bad_order_empty},
    {"one byte before memory", VIOMMU_BROKEN_ADDRESS, bad_hole},
    {"one byte after memory", VIOMMU_BROKEN_ADDRESS, bad_end},
    {"past the top of the address space", VIOMMU_BROKEN_ADDRESS, bad_wrap},
    {"a length of 2^32 - 1", VIOMMU_BROKEN_ADDRESS, bad_huge},
    {"an empty table", VIOMMU_BROKEN_INDIRECT, bad_table_empty},
    {"a table of 17 bytes", VIOMMU_BROKEN_INDIRECT, bad_table_length},
    {"a table of 15 bytes", VIOMMU_BROKEN_INDIRECT, bad_table_short},
    {"a table and NEXT", VIOMMU_BROKEN_INDIRECT, bad_table_next},
    {"a table in a table", VIOMMU_BROKEN_INDIRECT, bad_table_nested},
    {"a table's next is its size", VIOMMU_BROKEN_HEAD, bad_table_index},
    {"a table's entry follows itself", VIOMMU_BROKEN_LOOP, bad_table_loop},
    {"a table without the feature", VIOMMU_BROKEN_INDIRECT, bad_table_unfeatured},
    {"a table half outside memory", VIOMMU_BROKEN_ADDRESS, bad_table_address},
    {"a table's readable entry after a writable descriptor", VIOMMU_BROKEN_ORDER, bad_table_order},
    {"a table's entry outside memory", VIOMMU_BROKEN_ADDRESS, bad_table_entry},
    {"a table's chain longer than the ring", VIOMMU_BROKEN_LOOP, bad_table_long},
    {"a chain longer than the ring with a table's help", VIOMMU_BROKEN_LOOP, bad_direct_and_table_long},
};

/* rule: H7 */
/* Every way to break a ring has its reason, takes nothing, and lasts. */
static void test_broken(void)
{
    for (size_t i = 0; i < sizeof(bads) / sizeof(bads[0]); i++) {
        struct fixture f;

        printf("  %s\n", bads[i].what);
        set_up(&f, 8, FEATURES);
        bads[i].make(&f);
        check_broken(&f, bads[i].reason);
        CHECK_EQ(virtqueue_base(&f.vq), 0);
        tear_down(&f);
    }
}

/* What was given before the ring broke can still be shown to the driver. */
static void test_broken_after_good(void)
{
    struct fixture f;
    uint32_t id, len;

    set_up(&f, 8, FEATURES);
    (void)driver_add(&f.driver, &(struct piece){f.buffer, 4, true}, 1);
    CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
    virtqueue_give(&f.vq, &f.chain, 4);
    driver_offer(&f.driver, 99);
    CHECK_EQ(virtqueue_take(&f.vq, &f.chain), -EPROTO);
    CHECK(virtqueue_publish(&f.vq));
    CHECK(driver_used(&f.driver, &id, &len) && id == 0 && len == 4);
    CHECK_EQ(virtqueue_base(&f.vq), 1);
    tear_down(&f);
}

/* Exactly 4 GiB may be in one chain, and not a byte more. */
static void test_four_gigabytes(void)
{
    for (uint32_t more = 0; more < 2; more++) {
        struct fixture f;

        set_up_sized(&f, 8, FEATURES, 3ull << 30);
        driver_descriptor(&f.driver, 0, GUEST_GPA, 1u << 31, DRIVER_NEXT, 1);
        driver_descriptor(&f.driver, 1, GUEST_GPA, (1u << 31) + more, DRIVER_WRITE, 0);
        driver_offer(&f.driver, 0);
        if (more == 0) {
            CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
            CHECK_EQ(f.chain.readable_bytes + f.chain.writable_bytes, 1ll << 32);
        } else {
            check_broken(&f, VIOMMU_BROKEN_LENGTH);
        }
        tear_down(&f);
    }
}

/* rule: R-Q-NOTE-1 */
/* Without EVENT_IDX the driver's flag alone decides; used_event is not looked at. */
static void test_notify_by_flag(void)
{
    struct fixture f;

    set_up(&f, 8, FEATURES);
    for (unsigned flags = 0; flags < 4; flags++) {
        uint8_t *avail = guest_at(&f.guest, f.driver.avail);

        shared16_put(avail, (uint16_t)flags, __ATOMIC_RELAXED);
        shared16_put(avail + 4 + 2 * 8, (uint16_t)(f.driver.used_idx + 77), __ATOMIC_RELAXED);
        (void)driver_add(&f.driver, &(struct piece){f.buffer, 4, true}, 1);
        CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
        virtqueue_give(&f.vq, &f.chain, 4);
        CHECK_EQ(virtqueue_publish(&f.vq), (flags & 1) == 0);
    }
    tear_down(&f);
}

/* rule: R-Q-NOTE-2 */
/* With EVENT_IDX: a notification exactly when used_event lies in the batch, for every distance and across the wrap. */
static void test_notify_by_index(void)
{
    struct fixture f;
    uint16_t index = 0;
    uint64_t state = 3;

    set_up(&f, 16, FEATURES | VIRTIO_RING_F_EVENT_IDX);
    shared16_put(guest_at(&f.guest, f.driver.avail), 1, __ATOMIC_RELAXED); /* the flag means nothing */
    for (unsigned round = 0; round < 20000; round++) {
        uint16_t batch = (uint16_t)(check_random(&state) % 16 + 1), wanted;
        bool inside = false;

        switch (check_random(&state) % 4) {
        case 0:
            wanted = (uint16_t)check_random(&state);
            break;
        case 1:
            wanted = index; /* the first entry of the batch */
            break;
        case 2:
            wanted = (uint16_t)(index + batch - 1); /* the last */
            break;
        default:
            wanted = (uint16_t)(index + check_random(&state) % 20 - 2);
            break;
        }
        shared16_put(guest_at(&f.guest, f.driver.avail) + 4 + 2 * 16, wanted, __ATOMIC_RELAXED);
        for (uint16_t i = 0; i < batch; i++) {
            uint32_t id, len;

            inside = inside || (uint16_t)(index + i) == wanted;
            (void)driver_add(&f.driver, &(struct piece){f.buffer, 4, true}, 1);
            CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
            virtqueue_give(&f.vq, &f.chain, 0);
            if (i + 1 < batch)
                CHECK(!driver_used(&f.driver, &id, &len));
        }
        CHECK_EQ(virtqueue_publish(&f.vq), inside);
        for (uint16_t i = 0; i < batch; i++) {
            uint32_t id, len;

            CHECK(driver_used(&f.driver, &id, &len) && len == 0);
        }
        index = (uint16_t)(index + batch);
    }
    tear_down(&f);
}

/* rule: R-Q-NOTE-3 */
/* Asking for kicks: by flag without EVENT_IDX; with it by index, the flag staying 0. */
static void test_want_kick(void)
{
    struct fixture f;
    const uint8_t *used;

    set_up(&f, 8, FEATURES);
    used = guest_at(&f.guest, f.driver.used);
    virtqueue_want_kick(&f.vq, false);
    CHECK_EQ(le16_get(used), 1);
    virtqueue_want_kick(&f.vq, true);
    CHECK_EQ(le16_get(used), 0);
    CHECK_EQ(le16_get(used + 4 + 64), 0);
    tear_down(&f);
    set_up(&f, 8, FEATURES | VIRTIO_RING_F_EVENT_IDX);
    used = guest_at(&f.guest, f.driver.used);
    for (unsigned i = 0; i < 70000; i++) {
        uint32_t id, len;

        virtqueue_want_kick(&f.vq, true);
        CHECK_EQ(le16_get(used + 4 + 64), (uint16_t)i);
        (void)driver_add(&f.driver, &(struct piece){f.buffer, 4, true}, 1);
        CHECK(driver_wants_kick(&f.driver, (uint16_t)i, true));
        CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
        virtqueue_want_kick(&f.vq, false);
        CHECK_EQ(le16_get(used), 0);
        virtqueue_give(&f.vq, &f.chain, 4);
        (void)virtqueue_publish(&f.vq);
        CHECK(driver_used(&f.driver, &id, &len));
    }
    tear_down(&f);
}

/* Stopped anywhere, the ring goes on from its base as if nothing had happened, in memory and in notifications. */
static void test_stop_and_start(void)
{
    struct fixture f;
    uint64_t state = 11;

    set_up(&f, 8, FEATURES | VIRTIO_RING_F_EVENT_IDX);
    for (uint32_t i = 0; i < 70000; i++) {
        uint32_t id, len;

        shared16_put(guest_at(&f.guest, f.driver.avail) + 4 + 2 * 8, (uint16_t)i, __ATOMIC_RELAXED);
        (void)driver_add(&f.driver, &(struct piece){f.buffer, 4, true}, 1);
        if (check_random(&state) % 3 == 0) { /* with a request waiting */
            struct viommu_ring ring = driver_ring(&f.driver);

            ring.base = virtqueue_base(&f.vq);
            CHECK_EQ(ring.base, (uint16_t)i);
            CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES | VIRTIO_RING_F_EVENT_IDX, f.memory, NULL), 0);
        }
        CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
        virtqueue_give(&f.vq, &f.chain, i);
        CHECK(virtqueue_publish(&f.vq));
        CHECK(driver_used(&f.driver, &id, &len) && len == i);
    }
    tear_down(&f);
}

/* A ring nobody has served does not look used; one answered request shows, also when it was the smallest. */
static void test_looks_used(void)
{
    struct fixture f;

    set_up(&f, 8, FEATURES);
    CHECK(!virtqueue_looks_used(&f.vq));
    (void)driver_add(&f.driver, &(struct piece){f.buffer, 4, true}, 1);
    CHECK(!virtqueue_looks_used(&f.vq));
    CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
    virtqueue_give(&f.vq, &f.chain, 4);
    (void)virtqueue_publish(&f.vq);
    CHECK(virtqueue_looks_used(&f.vq));
    tear_down(&f);
}

/* Writes to the used ring are logged at the address given for it: entry, index, and the wish for kicks. */
static void test_log(void)
{
    struct fixture f;
    struct viommu_ring ring;
    struct dirty_log log;
    int fd = memfd_create("log", MFD_CLOEXEC);
    uint8_t bits[16];

    set_up(&f, 512, FEATURES | VIRTIO_RING_F_EVENT_IDX);
    CHECK(ftruncate(fd, 16) == 0);
    CHECK_EQ(dirty_log_map(fd, 16, 0, &log), 0);
    f.memory->log = &log;
    ring = driver_ring(&f.driver);
    ring.logged = true;
    ring.log_addr = 0x10000 - 12; /* page 15: index and first entry; page 16: all other entries, and avail_event */
    CHECK_EQ(virtqueue_init(&f.vq, &ring, FEATURES | VIRTIO_RING_F_EVENT_IDX, f.memory, NULL), 0);
    virtqueue_want_kick(&f.vq, true);
    CHECK(pread(fd, bits, 16, 0) == 16 && bits[1] == 0 && bits[2] == 1);
    memset(log.map.start, 0, 16);
    (void)driver_add(&f.driver, &(struct piece){f.buffer, 4, true}, 1);
    (void)driver_add(&f.driver, &(struct piece){f.buffer, 4, true}, 1);
    CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
    virtqueue_give(&f.vq, &f.chain, 4);
    CHECK(pread(fd, bits, 16, 0) == 16 && bits[1] == 0x80 && bits[2] == 0);
    memset(log.map.start, 0, 16);
    (void)virtqueue_publish(&f.vq);
    CHECK(pread(fd, bits, 16, 0) == 16 && bits[1] == 0x80 && bits[2] == 0);
    memset(log.map.start, 0, 16);
    CHECK_EQ(virtqueue_take(&f.vq, &f.chain), 1);
    virtqueue_give(&f.vq, &f.chain, 4);
    CHECK(pread(fd, bits, 16, 0) == 16 && bits[1] == 0 && bits[2] == 1);
    f.vq.logged = false;
    memset(log.map.start, 0, 16);
    (void)virtqueue_publish(&f.vq);
    CHECK(pread(fd, bits, 16, 0) == 16 && bits[1] == 0 && bits[2] == 0);
    f.memory->log = NULL;
    dirty_log_unmap(&log);
    (void)close(fd);
    tear_down(&f);
}

int main(void)
{
    RUN(test_sizes_and_wrap);
    RUN(test_init_refused);
    RUN(test_framing);
    RUN(test_across_regions);
    RUN(test_indirect);
    RUN(test_broken);
    RUN(test_broken_after_good);
    RUN(test_four_gigabytes);
    RUN(test_notify_by_flag);
    RUN(test_notify_by_index);
    RUN(test_want_kick);
    RUN(test_stop_and_start);
    RUN(test_looks_used);
    RUN(test_log);
    return 0;
}
