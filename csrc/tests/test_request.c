/*
 * Requests on the wire: every layout of every personality at every length, cut into descriptors in several ways,
 * into poisoned buffers: what is answered is answered whole, what is not is left as it was. Then the rules of each
 * request, one by one.
 */
#include "request.h"

#include <errno.h>

#include "guest.h"
#include "le.h"
#include "settings.h"

#define POISON 0xa5
#define ENDPOINT 10u      /* 10-12 without reserved regions, 20 with two */
#define ABSENT 99u

/* How a buffer is cut into descriptors. */
enum cut { CUT_WHOLE, CUT_BYTES, CUT_HEAD_AND_TAIL, CUTS };

struct fixture {
    struct viommu_settings settings;
    struct viommu_stats stats;
    struct iommu iommu;
    struct guest guest;
    struct guest_memory *memory;
    struct chain chain;
    struct request_outcome outcome;
    enum cut cut;
    uint8_t out[70000]; /* the writable part after the last request */
};

static const struct viommu_reserved regions[] = {{0x8000000, 0x80fffff, 1}, {0xfee00000, 0xfeefffff, 0}};

static void set_up_with(struct fixture *f, const struct viommu_settings *settings, uint64_t accepted)
{
    memset(&f->stats, 0, sizeof(f->stats));
    f->settings = *settings;
    f->cut = CUT_WHOLE;
    CHECK_EQ(iommu_init(&f->iommu, settings, &f->stats), 0);
    CHECK_EQ(iommu_add_endpoints(&f->iommu, 10, 12, NULL, 0, stage2_none()), 0);
    CHECK_EQ(iommu_add_endpoints(&f->iommu, 20, 20, regions, settings->probe_size >= 48 ? 2 : 0, stage2_none()), 0);
    iommu_set_features(&f->iommu, accepted);
    guest_init(&f->guest, 1u << 20);
    CHECK_EQ(guest_memory_new(&f->guest.region, 1, &f->memory), 0);
    f->iommu.memory = f->memory;
}

/* Every feature but the one that refuses mappings of nothing. */
static void set_up(struct fixture *f)
{
    struct viommu_settings settings = test_settings();

    set_up_with(f, &settings, settings.features & ~VIRTIO_IOMMU_F_MMIO);
}

static void tear_down(struct fixture *f)
{
    iommu_fini(&f->iommu);
    guest_memory_free(f->memory);
    guest_fini(&f->guest);
}

static void cut(struct fixture *f, uint64_t gpa, size_t length, bool writable)
{
    size_t at = 0;

    while (at < length) {
        unsigned count = (unsigned)f->chain.readable + f->chain.writable;
        size_t part = length - at;

        CHECK(count < VIOMMU_MAX_QUEUE_SIZE);
        if (f->cut == CUT_BYTES && length - at < 400)
            part = 1;
        else if (f->cut == CUT_HEAD_AND_TAIL)
            part = at == 0 && length > 4 ? (writable ? length - 4 : 4) : length - at;
        f->chain.buffers[count] = (struct buffer){gpa + at, (uint32_t)part};
        if (writable)
            f->chain.writable++;
        else
            f->chain.readable++;
        at += part;
    }
    if (writable)
        f->chain.writable_bytes = length;
    else
        f->chain.readable_bytes = length;
}

/*
 * Serve one request of so many readable bytes with so much room. Returns the used length, having checked that exactly
 * those bytes were written.
 */
static int64_t serve(struct fixture *f, const uint8_t *in, size_t readable, size_t writable)
{
    uint8_t *from = f->guest.ram + 0x1000, *to = f->guest.ram + 0x10000;
    uint8_t sent[4096];
    int64_t used;

    CHECK(readable <= sizeof(sent) && writable + 64 <= sizeof(f->out));
    memset(from, POISON, 4096);
    if (readable != 0)
        memcpy(from, in, readable);
    memcpy(sent, from, sizeof(sent));
    memset(to, POISON, writable + 64);
    memset(&f->chain, 0, offsetof(struct chain, buffers));
    cut(f, GUEST_GPA + 0x1000, readable, false);
    cut(f, GUEST_GPA + 0x10000, writable, true);
    memset(&f->outcome, POISON, sizeof(f->outcome));
    used = request_serve(&f->iommu, f->memory, &f->chain, &f->outcome);
    memcpy(f->out, to, writable + 64);
    CHECK(memcmp(sent, from, sizeof(sent)) == 0);
    CHECK(used == 0 || used == (int64_t)writable);
    for (size_t i = used == 0 ? 0 : writable; i < writable + 64; i++)
        CHECK_EQ(f->out[i], POISON);
    CHECK_EQ(used == 0, f->outcome.status == VIOMMU_STATUS_UNANSWERED);
    if (used != 0) { /* the tail is where it belongs */
        CHECK_EQ(f->out[writable - 4], f->outcome.status);
        CHECK(f->out[writable - 3] == 0 && f->out[writable - 2] == 0 && f->out[writable - 1] == 0);
    }
    return used;
}

/* The requests of today, as a driver writes them. */
static size_t attach(uint8_t *in, uint32_t domain, uint32_t endpoint, uint32_t flags)
{
    memset(in, 0, 72);
    in[0] = REQUEST_ATTACH;
    le32_put(in + 4, domain);
    le32_put(in + 8, endpoint);
    le32_put(in + 12, flags);
    return 20;
}

static size_t detach(uint8_t *in, uint32_t domain, uint32_t endpoint)
{
    memset(in, 0, 72);
    in[0] = REQUEST_DETACH;
    le32_put(in + 4, domain);
    le32_put(in + 8, endpoint);
    return 20;
}

static size_t map(uint8_t *in, uint32_t domain, uint64_t first, uint64_t last, uint64_t phys, uint32_t flags)
{
    memset(in, 0, 72);
    in[0] = REQUEST_MAP;
    le32_put(in + 4, domain);
    le64_put(in + 8, first);
    le64_put(in + 16, last);
    le64_put(in + 24, phys);
    le32_put(in + 32, flags);
    return 36;
}

static size_t unmap(uint8_t *in, uint32_t domain, uint64_t first, uint64_t last)
{
    memset(in, 0, 72);
    in[0] = REQUEST_UNMAP;
    le32_put(in + 4, domain);
    le64_put(in + 8, first);
    le64_put(in + 16, last);
    return 28;
}

static size_t probe(uint8_t *in, uint32_t endpoint)
{
    memset(in, 0, 72);
    in[0] = REQUEST_PROBE;
    le32_put(in + 4, endpoint);
    return 72;
}

/* Status of a request with room for exactly the tail. */
static unsigned status(struct fixture *f, const uint8_t *in, size_t readable)
{
    CHECK_EQ(serve(f, in, readable, 4), 4);
    return f->out[0];
}

static unsigned do_attach(struct fixture *f, uint32_t domain, uint32_t endpoint, uint32_t flags)
{
    uint8_t in[72];

    return status(f, in, attach(in, domain, endpoint, flags));
}

static unsigned do_detach(struct fixture *f, uint32_t domain, uint32_t endpoint)
{
    uint8_t in[72];

    return status(f, in, detach(in, domain, endpoint));
}

static unsigned do_map(struct fixture *f, uint32_t domain, uint64_t first, uint64_t last, uint64_t phys, uint32_t flags)
{
    uint8_t in[72];

    return status(f, in, map(in, domain, first, last, phys, flags));
}

static unsigned do_unmap(struct fixture *f, uint32_t domain, uint64_t first, uint64_t last)
{
    uint8_t in[72];

    return status(f, in, unmap(in, domain, first, last));
}

/* -------------------------------------------------------------------------------------------------------- lengths */

/* rule: R-OPS-2 */
/* rule: R-OPS-3 */
/* rule: H8 */
/* Every type that is not known, however long: the buffer comes back as it was. */
static void test_unknown_types(void)
{
    struct fixture f;
    uint8_t in[72] = {0};

    set_up(&f);
    for (unsigned type = 0; type < 256; type++) {
        if (type >= REQUEST_ATTACH && type <= REQUEST_PROBE)
            continue;
        in[0] = (uint8_t)type;
        for (f.cut = CUT_WHOLE; f.cut < CUTS; f.cut++) {
            CHECK_EQ(serve(&f, in, 72, 516), 0);
            CHECK_EQ(f.outcome.type, 0);
        }
    }
    tear_down(&f);
}

/* rule: R-OPS-1 */
/* rule: R-OPS-5 */
/* rule: R-OPS-7 */
/* rule: R-Q-FRAME */
/* rule: R-Q-USED-1 */
/* rule: H10 */
/*
 * Every request of every personality at every readable and writable length: answered when the request and a tail
 * fit (in the oldest layout exactly, where a longer ATTACH or DETACH is a later driver's), left alone otherwise; and when answered, every writable byte is ours: zeroes, properties, tail.
 */
static void test_lengths(void)
{
    static const uint32_t layouts[3][6] = {{0, 20, 20, 36, 28, 72}, {0, 20, 20, 36, 28, 72}, {0, 16, 12, 36, 28, 72}};

    for (uint32_t personality = 0; personality <= VIOMMU_PERSONALITY_0_5; personality++) {
        for (uint8_t type = REQUEST_ATTACH; type <= REQUEST_PROBE; type++) {
            struct viommu_settings settings = test_settings();
            struct fixture f;
            uint8_t in[80];

            settings.personality = personality;
            settings.probe_size = 64;
            set_up_with(&f, &settings, settings.features);
            memset(in, 0, sizeof(in));
            in[0] = type;
            for (f.cut = CUT_WHOLE; f.cut < CUTS; f.cut++) {
                for (size_t readable = 0; readable <= 76; readable++) {
                    for (size_t writable = 0; writable <= 80; writable++) {
                        bool exact = personality == VIOMMU_PERSONALITY_0_5 && type <= REQUEST_DETACH;
                        bool fits = (exact ? readable == layouts[personality][type]
                                           : readable >= layouts[personality][type]) && writable >= 4;
                        int64_t used = serve(&f, in, readable, writable);

                        CHECK_EQ(used, fits ? (int64_t)writable : 0);
                        for (size_t i = 0; fits && i < writable - 4; i++)
                            CHECK_EQ(f.out[i], 0); /* endpoint 0 does not exist: nothing to tell */
                        CHECK_EQ(f.outcome.type, readable >= 4 && writable >= 4 ? type : 0);
                    }
                }
            }
            tear_down(&f);
        }
    }
}

/* A request may have much room, but a writable part beyond all reason is not worth zeroing: it comes back as it was. */
static void test_much_room(void)
{
    struct fixture f;
    uint8_t in[72];

    set_up(&f);
    CHECK_EQ(serve(&f, in, attach(in, 1, ENDPOINT, 0), 65536), 65536);
    CHECK_EQ(f.out[65532], STATUS_OK);
    for (unsigned i = 0; i < 65532; i++)
        CHECK_EQ(f.out[i], 0);
    CHECK_EQ(serve(&f, in, detach(in, 1, ENDPOINT), 65537), 0);
    CHECK_EQ(f.stats.endpoints, 1);
    tear_down(&f);
}

/* rule: R-Q-FRAME */
/* However it is cut, the same bytes are the same request; bytes after it are nobody's. */
static void test_cuts(void)
{
    struct fixture f;

    set_up(&f);
    for (f.cut = CUT_WHOLE; f.cut < CUTS; f.cut++) {
        for (size_t more = 0; more < 40; more += 13) {
            uint8_t in[128];

            memset(in, 0xff, sizeof(in));
            (void)attach(in, 7, ENDPOINT, 0);
            CHECK_EQ(status(&f, in, 20 + more), STATUS_OK);
            (void)map(in, 7, 0x1000, 0x2fff, 0x5000, 3);
            CHECK_EQ(status(&f, in, 36 + more), STATUS_OK);
            (void)map(in, 7, 0x1000, 0x2fff, 0x5000, 3);
            CHECK_EQ(status(&f, in, 36 + more), STATUS_INVAL);
            (void)unmap(in, 7, 0, 0x2ffe);
            CHECK_EQ(status(&f, in, 28 + more), STATUS_RANGE);
            (void)unmap(in, 7, 0, 0x2fff);
            CHECK_EQ(status(&f, in, 28 + more), STATUS_OK);
            (void)detach(in, 7, ENDPOINT);
            CHECK_EQ(status(&f, in, 20 + more), STATUS_OK);
        }
    }
    tear_down(&f);
}

/* Guest memory that is gone below a request is an error of the ring, not an answer. */
static void test_memory_gone(void)
{
    struct fixture f;
    struct request_outcome outcome;
    struct chain chain = {.readable = 1, .writable = 1, .readable_bytes = 20, .writable_bytes = 4};

    set_up(&f);
    chain.buffers[0] = (struct buffer){0x1000, 20};
    chain.buffers[1] = (struct buffer){GUEST_GPA, 4};
    CHECK_EQ(request_serve(&f.iommu, f.memory, &chain, &outcome), -EFAULT);
    tear_down(&f);
}

/* --------------------------------------------------------------------------------------------------------- rules */

/* rule: R-OPS-4 */
/* rule: R-DETACH-1 */
/* rule: R-PROBE-1 */
/* rule: R-UNMAP-1 */
/* Reserved fields that must be ignored are; UNMAP's is ignored too (the specification allows either). */
static void test_reserved_ignored(void)
{
    struct fixture f;
    uint8_t in[72];

    set_up(&f);
    (void)attach(in, 1, ENDPOINT, 0);
    memset(in + 1, 0xff, 3);
    CHECK_EQ(status(&f, in, 20), STATUS_OK);
    (void)map(in, 1, 0x1000, 0x1fff, 0, 1);
    memset(in + 1, 0xff, 3);
    CHECK_EQ(status(&f, in, 36), STATUS_OK);
    (void)unmap(in, 1, 0x1000, 0x1fff);
    memset(in + 1, 0xff, 3);
    memset(in + 24, 0xff, 4);
    CHECK_EQ(status(&f, in, 28), STATUS_OK);
    (void)probe(in, ENDPOINT);
    memset(in + 1, 0xff, 3);
    memset(in + 8, 0xff, 64);
    CHECK_EQ(serve(&f, in, 72, 516), 516);
    CHECK_EQ(f.outcome.status, STATUS_OK);
    (void)detach(in, 1, ENDPOINT);
    memset(in + 1, 0xff, 3);
    memset(in + 12, 0xff, 8);
    CHECK_EQ(status(&f, in, 20), STATUS_OK);
    tear_down(&f);
}

/* rule: R-ATTACH-1 */
/* rule: R-ATTACH-2 */
/* rule: R-ATTACH-3 */
/* rule: R-ATTACH-6 */
/* rule: R-ATTACH-11 */
/* rule: R-OPS-9 */
/* ATTACH: reserved bytes, flags, endpoints and domains that do not exist, kinds that disagree. */
static void test_attach(void)
{
    struct viommu_settings settings = test_settings();
    struct fixture f;
    uint8_t in[72];
    uint64_t gpa;

    set_up(&f);
    for (unsigned i = 16; i < 20; i++) {
        (void)attach(in, 1, ENDPOINT, 0);
        in[i] = 0x80;
        CHECK_EQ(status(&f, in, 20), STATUS_INVAL);
    }
    for (unsigned bit = 1; bit < 32; bit++)
        CHECK_EQ(do_attach(&f, 1, ENDPOINT, 1u << bit), STATUS_INVAL);
    CHECK_EQ(do_attach(&f, 1, ABSENT, 0), STATUS_NOENT);
    CHECK_EQ(f.stats.domains, 0);
    CHECK_EQ(do_attach(&f, 1, ENDPOINT, 0), STATUS_OK);
    CHECK_EQ(do_attach(&f, 1, ENDPOINT + 1, 1), STATUS_INVAL);
    CHECK_EQ(do_attach(&f, 2, ENDPOINT + 1, 1), STATUS_OK);
    CHECK_EQ(do_attach(&f, 2, ENDPOINT + 2, 0), STATUS_INVAL);
    CHECK_EQ(do_attach(&f, 2, ENDPOINT, 0), STATUS_INVAL);
    CHECK_EQ(do_map(&f, 1, 0x1000, 0x1fff, 0x7000, 1), STATUS_OK); /* ENDPOINT is still in 1 */
    CHECK_EQ(iommu_translate(&f.iommu, ENDPOINT, 0x1abc, 1, &gpa), 0);
    CHECK_EQ(gpa, 0x7abc);
    CHECK_EQ(iommu_translate(&f.iommu, ENDPOINT + 1, 0xabc, 1, &gpa), 0);
    CHECK_EQ(gpa, 0xabc);
    tear_down(&f);

    set_up_with(&f, &settings, settings.features & ~VIRTIO_IOMMU_F_BYPASS_CONFIG); /* offered, not accepted */
    CHECK_EQ(do_attach(&f, 1, ENDPOINT, 1), STATUS_INVAL);
    CHECK_EQ(do_attach(&f, 1, ENDPOINT, 0), STATUS_OK);
    tear_down(&f);

    settings.domain_first = 5;
    settings.domain_last = 7;
    set_up_with(&f, &settings, settings.features & ~VIRTIO_IOMMU_F_DOMAIN_RANGE); /* enforced when offered */
    CHECK_EQ(do_attach(&f, 4, ENDPOINT, 0), STATUS_RANGE);
    CHECK_EQ(do_attach(&f, 8, ENDPOINT, 0), STATUS_RANGE);
    CHECK_EQ(do_attach(&f, 5, ENDPOINT, 0), STATUS_OK);
    CHECK_EQ(do_attach(&f, 7, ENDPOINT, 0), STATUS_OK);
    CHECK_EQ(do_map(&f, 8, 0, 0xfff, 0, 1), STATUS_RANGE);
    CHECK_EQ(do_unmap(&f, 4, 0, 0xfff), STATUS_RANGE);
    CHECK_EQ(do_detach(&f, 4, ENDPOINT), STATUS_RANGE);
    CHECK_EQ(do_detach(&f, 7, ENDPOINT), STATUS_OK);
    tear_down(&f);
}

/* rule: R-DETACH-2 */
/* rule: R-DETACH-3 */
/* rule: R-DETACH-4 */
/* DETACH: an absent endpoint, a domain that is not its own, one that is not attached. */
static void test_detach(void)
{
    struct fixture f;
    uint64_t gpa;

    set_up(&f);
    CHECK_EQ(do_detach(&f, 1, ABSENT), STATUS_NOENT);
    CHECK_EQ(do_detach(&f, 1, ENDPOINT), STATUS_INVAL);
    CHECK_EQ(do_attach(&f, 1, ENDPOINT, 0), STATUS_OK);
    CHECK_EQ(do_attach(&f, 2, ENDPOINT + 1, 0), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 0x1000, 0x1fff, 0x7000, 1), STATUS_OK);
    CHECK_EQ(do_detach(&f, 2, ENDPOINT), STATUS_INVAL);
    CHECK_EQ(do_detach(&f, 3, ENDPOINT), STATUS_INVAL);
    CHECK_EQ(iommu_translate(&f.iommu, ENDPOINT, 0x1abc, 1, &gpa), 0);
    CHECK_EQ(do_detach(&f, 1, ENDPOINT), STATUS_OK);
    CHECK_EQ(iommu_translate(&f.iommu, ENDPOINT, 0x1abc, 1, &gpa), -ENXIO);
    CHECK_EQ(do_detach(&f, 1, ENDPOINT), STATUS_INVAL);
    CHECK_EQ(do_map(&f, 1, 0x1000, 0x1fff, 0x7000, 1), STATUS_NOENT);
    tear_down(&f);
}

/* rule: R-MAP-1 */
/* rule: R-MAP-2 */
/* rule: R-MAP-3 */
/* rule: R-MAP-6 */
/* rule: R-MAP-7 */
/* rule: R-OPS-8 */
/* MAP: alignment of each field, the whole of the address space, the input range, domains of the wrong kind. */
static void test_map_ranges(void)
{
    struct viommu_settings settings = test_settings();
    struct fixture f;

    set_up(&f);
    CHECK_EQ(do_attach(&f, 1, ENDPOINT, 0), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 0x800, 0xfff, 0, 1), STATUS_RANGE);
    CHECK_EQ(do_map(&f, 1, 0x1000, 0x1fff, 0x800, 1), STATUS_RANGE);
    CHECK_EQ(do_map(&f, 1, 0x1000, 0x17ff, 0, 1), STATUS_RANGE);
    CHECK_EQ(do_map(&f, 1, 0x1000, 0x1000, 0, 1), STATUS_RANGE);
    CHECK_EQ(do_map(&f, 1, 0, 0x1000, 0, 1), STATUS_RANGE);
    CHECK_EQ(do_map(&f, 1, 0x1000, 0xfff, 0, 1), STATUS_INVAL);
    CHECK_EQ(do_map(&f, 1, UINT64_MAX - 0xfff, 0xfff, 0, 1), STATUS_INVAL);
    CHECK_EQ(do_map(&f, 2, 0x1000, 0x1fff, 0, 1), STATUS_NOENT);
    CHECK_EQ(do_attach(&f, 2, ENDPOINT + 1, 1), STATUS_OK);
    CHECK_EQ(do_map(&f, 2, 0x1000, 0x1fff, 0, 1), STATUS_INVAL);
    CHECK_EQ(do_unmap(&f, 2, 0x1000, 0x1fff), STATUS_INVAL);
    CHECK_EQ(do_map(&f, 1, UINT64_MAX - 0xfff, UINT64_MAX, 0, 1), STATUS_OK); /* the end wraps to an aligned 0 */
    CHECK_EQ(do_unmap(&f, 1, 0, UINT64_MAX), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 0, UINT64_MAX, 0, 3), STATUS_OK); /* all there is, in one mapping */
    CHECK_EQ(do_map(&f, 1, 0x1000, 0x1fff, 0, 1), STATUS_INVAL);
    CHECK_EQ(do_unmap(&f, 1, 0, UINT64_MAX - 1), STATUS_RANGE);
    CHECK_EQ(do_unmap(&f, 1, 0, UINT64_MAX), STATUS_OK);
    /* rule: R-MAP-11 */
    CHECK_EQ(do_map(&f, 1, 0, UINT64_MAX, 0x1000, 3), STATUS_RANGE);
    CHECK_EQ(do_map(&f, 1, 0, 0x1fff, UINT64_MAX - 0xfff, 3), STATUS_RANGE);
    CHECK_EQ(do_map(&f, 1, 0, 0xfff, UINT64_MAX - 0xfff, 3), STATUS_OK);
    CHECK_EQ(f.stats.mappings, 1);
    tear_down(&f);

    settings.page_size_mask = 0x40200000; /* 2 MiB, and a hint at 1 GiB */
    settings.input_first = 0x400000;
    settings.input_last = 0xffffffff;
    set_up_with(&f, &settings, settings.features & ~(VIRTIO_IOMMU_F_INPUT_RANGE | VIRTIO_IOMMU_F_MMIO));
    CHECK_EQ(do_attach(&f, 1, ENDPOINT, 0), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 0x400000, 0x400fff, 0, 1), STATUS_RANGE);
    CHECK_EQ(do_map(&f, 1, 0x200000, 0x5fffff, 0, 1), STATUS_RANGE);
    CHECK_EQ(do_map(&f, 1, 0xffe00000, 0x1001fffff, 0, 1), STATUS_RANGE);
    CHECK_EQ(do_map(&f, 1, 0x400000, 0xffffffff, 0x200000, 1), STATUS_OK);
    tear_down(&f);

    settings = test_settings();
    settings.page_size_mask = 1; /* bytes; one alone may be mapped */
    set_up_with(&f, &settings, settings.features & ~VIRTIO_IOMMU_F_MMIO);
    CHECK_EQ(do_attach(&f, 1, ENDPOINT, 0), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 5, 5, 77, 1), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 6, 6, 78, 1), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 5, 6, 77, 1), STATUS_INVAL);
    CHECK_EQ(do_unmap(&f, 1, 5, 5), STATUS_OK);
    tear_down(&f);
}

/* rule: R-MAP-4 */
/* An overlap of any shape is refused, and the mapping that was there stays. */
static void test_map_overlaps(void)
{
    static const uint64_t ranges[][2] = {{0x3000, 0x5fff}, {0x2000, 0x3fff}, {0x5000, 0x6fff},
                                         {0x4000, 0x4fff}, {0x2000, 0x6fff}, {0, UINT64_MAX}};
    struct fixture f;
    uint64_t gpa;

    set_up(&f);
    CHECK_EQ(do_attach(&f, 1, ENDPOINT, 0), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 0x3000, 0x5fff, 0x13000, 1), STATUS_OK);
    for (size_t i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
        CHECK_EQ(do_map(&f, 1, ranges[i][0], ranges[i][1], 0, 3), STATUS_INVAL);
        CHECK_EQ(iommu_translate(&f.iommu, ENDPOINT, 0x4000, 1, &gpa), 0);
        CHECK_EQ(gpa, 0x14000);
        CHECK_EQ(f.stats.mappings, 1);
    }
    CHECK_EQ(do_map(&f, 1, 0x2000, 0x2fff, 0, 1), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 0x6000, 0x6fff, 0, 1), STATUS_OK);
    tear_down(&f);
}

/* rule: R-MAP-5 */
/* rule: R-MAP-8 */
/* MAP flags: each bit known or refused, as negotiated and as of the driver's age. */
static void test_map_flags(void)
{
    for (uint32_t personality = 0; personality <= VIOMMU_PERSONALITY_0_5; personality++) {
        for (unsigned mmio = 0; mmio < 2; mmio++) {
            for (unsigned bit = 0; bit < 32; bit++) {
                struct viommu_settings settings = test_settings();
                struct fixture f;
                uint8_t in[72];
                size_t size;
                bool known = bit < 2 || (personality == VIOMMU_PERSONALITY_1_X && bit == 2 && mmio != 0) ||
                             (personality != VIOMMU_PERSONALITY_1_X && bit == 2) || /* EXEC, of no effect */
                             (personality == VIOMMU_PERSONALITY_0_9 && bit == 3);   /* MMIO of that age */
                bool is_mmio = (personality == VIOMMU_PERSONALITY_1_X && bit == 2) ||
                               (personality == VIOMMU_PERSONALITY_0_9 && bit == 3);

                settings.personality = personality;
                set_up_with(&f, &settings,
                            settings.features & ~(mmio ? VIRTIO_IOMMU_F_BYPASS_CONFIG : VIRTIO_IOMMU_F_MMIO));
                size = attach(in, 1, ENDPOINT, 0);
                CHECK_EQ(status(&f, in, personality == VIOMMU_PERSONALITY_0_5 ? 16 : size), STATUS_OK);
                (void)map(in, 1, 0x1000, 0x1fff, 0x5000, 1u << bit);
                if (personality == VIOMMU_PERSONALITY_0_5) { /* virt, phys, size */
                    le64_put(in + 16, 0x5000);
                    le64_put(in + 24, 0x1000);
                }
                CHECK_EQ(status(&f, in, 36), known ? STATUS_OK : STATUS_INVAL);
                CHECK_EQ(f.stats.mappings, known);
                if (known) {
                    const struct domain *domain = id_table_get(&f.iommu.domains, 1);
                    struct iova_mapping mapping = {0};

                    CHECK(iova_map_find(domain->map, 0x1800, &mapping));
                    CHECK(mapping.first == 0x1000 && mapping.last == 0x1fff && mapping.phys == 0x5000);
                    CHECK_EQ(mapping.flags, bit < 2 ? 1u << bit : is_mmio ? MAP_FLAG_MMIO : 0);
                }
                tear_down(&f);
            }
        }
    }
}

/* rule: R-MAP-11 */
/*
 * A target with no byte of guest memory: refused with FAULT when the driver can say what is MMIO and what needs no
 * mapping at all (MMIO and BYPASS_CONFIG accepted), and accepted otherwise.
 */
static void test_map_target(void)
{
    struct viommu_settings settings = test_settings();
    struct fixture f;

    set_up_with(&f, &settings, settings.features);
    CHECK_EQ(do_attach(&f, 1, ENDPOINT, 0), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 0, 0xfff, 0x1000, 1), STATUS_FAULT);
    CHECK_EQ(do_map(&f, 1, 0, 0xfff, 0x1000, 1 | 4), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 0, 0xfff, 0x1000, 1), STATUS_INVAL); /* an overlap is told first */
    CHECK_EQ(do_map(&f, 1, 0x1000, 0x1fff, GUEST_GPA, 1), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 0x2000, 0x3fff, GUEST_GPA - 0x1000, 1), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 0x4000, 0x5fff, GUEST_GPA + (1u << 20) - 0x1000, 1), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 0x6000, 0x6fff, GUEST_GPA + (1u << 20), 1), STATUS_FAULT);
    tear_down(&f);
    set_up(&f);
    CHECK_EQ(do_attach(&f, 1, ENDPOINT, 0), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 0, 0xfff, 0x1000, 1), STATUS_OK);
    tear_down(&f);
}

/* rule: R-MAP-10 */
/* Without MAP_UNMAP, MAP and UNMAP are types nobody knows. */
static void test_map_not_negotiated(void)
{
    struct viommu_settings settings = test_settings();
    struct fixture f;
    uint8_t in[72];

    set_up_with(&f, &settings, settings.features & ~VIRTIO_IOMMU_F_MAP_UNMAP);
    CHECK_EQ(do_attach(&f, 1, ENDPOINT, 0), STATUS_OK);
    CHECK_EQ(serve(&f, in, map(in, 1, 0, 0xfff, 0, 1), 4), 0);
    CHECK_EQ(serve(&f, in, unmap(in, 1, 0, 0xfff), 4), 0);
    tear_down(&f);
}

/* rule: R-UNMAP-2 */
/* rule: R-UNMAP-3 */
/* rule: R-UNMAP-4 */
/* rule: R-UNMAP-5 */
/* rule: R-UNMAP-6 */
/* The seven examples of the specification with pages for its bytes, and its rules at their edges. */
static void test_unmap(void)
{
    struct example {
        uint64_t maps[2][2]; /* first and last page; {1, 0}: none */
        uint64_t unmap[2];
        unsigned status;
        unsigned left;
    };
    static const struct example examples[] = {
        {{{1, 0}, {1, 0}}, {0, 4}, STATUS_OK, 0},    {{{0, 9}, {1, 0}}, {0, 9}, STATUS_OK, 0},
        {{{0, 4}, {5, 9}}, {0, 9}, STATUS_OK, 0},    {{{0, 9}, {1, 0}}, {0, 4}, STATUS_RANGE, 1},
        {{{0, 4}, {5, 9}}, {0, 4}, STATUS_OK, 1},    {{{0, 4}, {1, 0}}, {0, 9}, STATUS_OK, 0},
        {{{0, 4}, {10, 14}}, {0, 14}, STATUS_OK, 0}, {{{0, 9}, {1, 0}}, {5, 9}, STATUS_RANGE, 1},
        {{{0, 9}, {1, 0}}, {2, 7}, STATUS_RANGE, 1}, {{{0, 4}, {5, 9}}, {0, 7}, STATUS_RANGE, 2},
        {{{0, 4}, {5, 9}}, {3, 9}, STATUS_RANGE, 2},
    };
    struct fixture f;

    for (size_t i = 0; i < sizeof(examples) / sizeof(examples[0]); i++) {
        const struct example *e = &examples[i];
        uint64_t gpa;

        set_up(&f);
        CHECK_EQ(do_attach(&f, 1, ENDPOINT, 0), STATUS_OK);
        for (unsigned j = 0; j < 2; j++) {
            if (e->maps[j][0] <= e->maps[j][1])
                CHECK_EQ(do_map(&f, 1, e->maps[j][0] << 12, (e->maps[j][1] << 12) + 0xfff, 0, 1), STATUS_OK);
        }
        CHECK_EQ(do_unmap(&f, 1, e->unmap[0] << 12, (e->unmap[1] << 12) + 0xfff), e->status);
        CHECK_EQ(f.stats.mappings, e->left);
        for (unsigned j = 0; e->status == STATUS_RANGE && j < e->left; j++) /* all of them still work */
            CHECK_EQ(iommu_translate(&f.iommu, ENDPOINT, e->maps[j][1] << 12, 1, &gpa), 0);
        tear_down(&f);
    }
    set_up(&f);
    CHECK_EQ(do_unmap(&f, 1, 0, 0xfff), STATUS_NOENT);
    CHECK_EQ(do_attach(&f, 1, ENDPOINT, 0), STATUS_OK);
    CHECK_EQ(do_unmap(&f, 1, 1, 0), STATUS_INVAL);
    CHECK_EQ(do_map(&f, 1, 0x1000, 0x1fff, 0, 1), STATUS_OK);
    CHECK_EQ(do_unmap(&f, 1, 0xfff, 0x2abc), STATUS_OK); /* an unaligned range that splits nothing */
    CHECK_EQ(f.stats.mappings, 0);
    tear_down(&f);
}

/* rule: R-PROBE-2 */
/* rule: R-PROBE-3 */
/* rule: R-PROBE-4 */
/* rule: R-PROBE-5 */
/* rule: R-PROBE-6 */
/* rule: R-PROBE-7 */
/* rule: R-PROBE-8 */
/* rule: R-PROBE-8a */
/* rule: R-PROBE-9 */
/* rule: R-RESV-1 */
/* PROBE: the properties byte by byte, zeroes behind them, and every way to refuse it. */
static void test_probe(void)
{
    struct viommu_settings settings = test_settings();
    struct fixture f;
    uint8_t in[72], expected[516] = {0};

    for (unsigned i = 0; i < 2; i++) {
        le16_put(expected + 24 * i, PROBE_TYPE_RESV_MEM);
        le16_put(expected + 24 * i + 2, 20);
        expected[24 * i + 4] = (uint8_t)regions[i].subtype;
        le64_put(expected + 24 * i + 8, regions[i].first);
        le64_put(expected + 24 * i + 16, regions[i].last);
    }
    set_up(&f);
    for (f.cut = CUT_WHOLE; f.cut < CUTS; f.cut++) {
        CHECK_EQ(serve(&f, in, probe(in, 20), 516), 516);
        CHECK(memcmp(f.out, expected, 516) == 0);
        CHECK_EQ(serve(&f, in, probe(in, 20), 520), 520); /* more room than asked for: the tail is at its end */
        CHECK(memcmp(f.out, expected, 512) == 0);
        CHECK_EQ(f.outcome.status, STATUS_OK);
        CHECK_EQ(f.out[512] | f.out[513] | f.out[514] | f.out[515], 0);
        CHECK_EQ(serve(&f, in, probe(in, ENDPOINT), 516), 516);
        CHECK_EQ(f.outcome.status, STATUS_OK);
        for (unsigned i = 0; i < 516; i++)
            CHECK_EQ(f.out[i], 0);
        CHECK_EQ(serve(&f, in, probe(in, ABSENT), 516), 516);
        CHECK_EQ(f.outcome.status, STATUS_NOENT);
        for (unsigned i = 0; i < 512; i++)
            CHECK_EQ(f.out[i], 0);
        for (size_t room = 4; room < 516; room += 73) { /* too little: no property, INVAL */
            CHECK_EQ(serve(&f, in, probe(in, 20), room), (int64_t)room);
            CHECK_EQ(f.outcome.status, STATUS_INVAL);
            for (unsigned i = 0; i < room - 4; i++)
                CHECK_EQ(f.out[i], 0);
        }
    }
    f.cut = CUT_WHOLE;
    CHECK_EQ(serve(&f, in, probe(in, 20), 515), 515);
    CHECK_EQ(f.outcome.status, STATUS_INVAL);
    tear_down(&f);

    settings.features &= ~VIRTIO_IOMMU_F_PROBE;
    set_up_with(&f, &settings, settings.features);
    CHECK_EQ(serve(&f, in, probe(in, 20), 516), 0);
    tear_down(&f);

    settings = test_settings(); /* offered is enough: a driver need not accept it */
    set_up_with(&f, &settings, settings.features & ~VIRTIO_IOMMU_F_PROBE);
    CHECK_EQ(serve(&f, in, probe(in, 20), 516), 516);
    CHECK_EQ(f.outcome.status, STATUS_OK);
    tear_down(&f);

    settings.probe_size = 48; /* exactly full: no terminator needed */
    set_up_with(&f, &settings, settings.features);
    CHECK_EQ(serve(&f, in, probe(in, 20), 52), 52);
    CHECK(memcmp(f.out, expected, 48) == 0);
    tear_down(&f);

    settings.probe_size = 0;
    set_up_with(&f, &settings, settings.features);
    CHECK_EQ(serve(&f, in, probe(in, 20), 4), 4);
    CHECK_EQ(f.outcome.status, STATUS_OK);
    tear_down(&f);
}

/* ------------------------------------------------------------------------------------------------- older drivers */

/* A driver of 2018 is served with today's sizes; its ATTACH has eight reserved bytes that must be zero. */
static void test_personality_0_9(void)
{
    struct viommu_settings settings = test_settings();
    struct fixture f;
    uint8_t in[72];

    settings.personality = VIOMMU_PERSONALITY_0_9;
    settings.features &= ~(VIRTIO_IOMMU_F_MMIO | VIRTIO_IOMMU_F_BYPASS_CONFIG);
    set_up_with(&f, &settings, settings.features);
    for (unsigned i = 12; i < 20; i++) {
        (void)attach(in, 1, ENDPOINT, 0);
        in[i] = 1;
        CHECK_EQ(status(&f, in, 20), STATUS_INVAL);
    }
    CHECK_EQ(do_attach(&f, 1, ENDPOINT, 0), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 0x1000, 0x1fff, 0x2000, 1 | 2 | 4), STATUS_OK);
    CHECK_EQ(do_map(&f, 1, 0x8000, 0x8fff, 0x9000, 2 | 8), STATUS_OK);
    CHECK_EQ(do_unmap(&f, 1, 0x1000, 0x8fff), STATUS_OK);
    CHECK_EQ(serve(&f, in, attach(in, 1, ENDPOINT, 0), 4), 4);
    CHECK_EQ(do_detach(&f, 1, ENDPOINT), STATUS_OK);
    tear_down(&f);
}

/* A driver of 2017: 16-byte ATTACH, DETACH without a domain, sizes instead of ends, in PROBE too. */
static void test_personality_0_5(void)
{
    struct viommu_settings settings = test_settings();
    struct fixture f;
    uint8_t in[72];
    uint64_t gpa;

    settings.personality = VIOMMU_PERSONALITY_0_5;
    settings.domain_first = 1;
    set_up_with(&f, &settings, VIRTIO_IOMMU_F_MAP_UNMAP | VIRTIO_IOMMU_F_PROBE);
    (void)attach(in, 6, ENDPOINT, 1);
    CHECK_EQ(status(&f, in, 16), STATUS_INVAL);
    CHECK_EQ(status(&f, in, attach(in, 6, ENDPOINT, 0) - 4), STATUS_OK);

    /* MAP: virt, phys, size */
    memset(in, 0, sizeof(in));
    in[0] = REQUEST_MAP;
    le32_put(in + 4, 6);
    le64_put(in + 8, 0x10000);
    le64_put(in + 16, 0x50000);
    le64_put(in + 24, 0x3000);
    le32_put(in + 32, 3);
    CHECK_EQ(status(&f, in, 36), STATUS_OK);
    CHECK_EQ(iommu_translate(&f.iommu, ENDPOINT, 0x12fff, 2, &gpa), 0);
    CHECK_EQ(gpa, 0x52fff);
    CHECK_EQ(iommu_translate(&f.iommu, ENDPOINT, 0x13000, 2, &gpa), -EFAULT);
    le64_put(in + 8, 0x20000);
    le64_put(in + 24, 0);
    CHECK_EQ(status(&f, in, 36), STATUS_INVAL);
    le64_put(in + 24, UINT64_MAX);
    CHECK_EQ(status(&f, in, 36), STATUS_INVAL); /* past the top */
    le64_put(in + 24, 0xfff);
    CHECK_EQ(status(&f, in, 36), STATUS_RANGE);
    le64_put(in + 8, UINT64_MAX - 0xfff);
    le64_put(in + 24, 0x1000);
    CHECK_EQ(status(&f, in, 36), STATUS_OK); /* up to the top */
    CHECK_EQ(f.stats.mappings, 2);

    /* UNMAP: virt, size */
    memset(in, 0, sizeof(in));
    in[0] = REQUEST_UNMAP;
    le32_put(in + 4, 6);
    le64_put(in + 8, 0x10000);
    CHECK_EQ(status(&f, in, 28), STATUS_INVAL);
    le64_put(in + 16, 0x2000);
    CHECK_EQ(status(&f, in, 28), STATUS_RANGE);
    le64_put(in + 16, 0x3000);
    CHECK_EQ(status(&f, in, 28), STATUS_OK);
    CHECK_EQ(f.stats.mappings, 1);

    /* PROBE: address, size */
    CHECK_EQ(serve(&f, in, probe(in, 20), 516), 516);
    CHECK_EQ(le64_get(f.out + 8), 0x8000000);
    CHECK_EQ(le64_get(f.out + 16), 0x100000);

    /* DETACH: endpoint only */
    memset(in, 0, sizeof(in));
    in[0] = REQUEST_DETACH;
    le32_put(in + 4, ENDPOINT);
    CHECK_EQ(status(&f, in, 12), STATUS_OK);
    CHECK_EQ(status(&f, in, 12), STATUS_INVAL);
    le32_put(in + 4, ABSENT);
    CHECK_EQ(status(&f, in, 12), STATUS_NOENT);
    CHECK_EQ(f.stats.endpoints, 0);
    tear_down(&f);
}

/* A 2017 driver before today's device: its 16-byte ATTACH is too short for a request, and nothing is attached. */
static void test_too_old(void)
{
    struct fixture f;
    uint8_t in[72];

    set_up(&f);
    CHECK_EQ(serve(&f, in, attach(in, 1, ENDPOINT, 0) - 4, 4), 0);
    CHECK_EQ(f.outcome.type, REQUEST_ATTACH);
    CHECK_EQ(f.stats.endpoints, 0);
    tear_down(&f);
}

/* rule: R-FAULT-1 */
/* rule: R-FAULT-2 */
/* rule: R-FAULT-6 */
/* Fault reports: 24 bytes, of 2017 20; flags that are not defined are never set; no address without its flag. */
static void test_fault_report(void)
{
    static const struct {
        uint32_t personality, bytes, address_at;
    } kinds[] = {{VIOMMU_PERSONALITY_1_X, 24, 16}, {VIOMMU_PERSONALITY_0_9, 24, 16}, {VIOMMU_PERSONALITY_0_5, 20, 12}};

    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        uint8_t report[FAULT_REPORT_MAX], expected[FAULT_REPORT_MAX] = {0};

        CHECK_EQ(fault_report_bytes(kinds[i].personality), kinds[i].bytes);
        memset(report, POISON, sizeof(report));
        fault_report_encode(kinds[i].personality, FAULT_MAPPING, UINT32_MAX, 0x12345678, 0x1122334455667788, report);
        expected[0] = 2;
        le32_put(expected + 4, 0x103);
        le32_put(expected + 8, 0x12345678);
        le64_put(expected + kinds[i].address_at, 0x1122334455667788);
        CHECK(memcmp(report, expected, kinds[i].bytes) == 0);
        memset(report, POISON, sizeof(report));
        memset(expected, 0, sizeof(expected));
        fault_report_encode(kinds[i].personality, FAULT_DOMAIN, FAULT_FLAG_WRITE, 7, UINT64_MAX, report);
        expected[0] = 1;
        expected[4] = 2;
        expected[8] = 7;
        CHECK(memcmp(report, expected, kinds[i].bytes) == 0);
    }
}

/* What is recorded of a request is what was asked, and nothing that was not. */
static void test_outcome(void)
{
    struct fixture f;
    uint8_t in[72] = {0};

    set_up(&f);
    (void)do_attach(&f, 3, ENDPOINT, 1);
    CHECK(f.outcome.type == REQUEST_ATTACH && f.outcome.domain == 3 && f.outcome.endpoint == ENDPOINT);
    CHECK(f.outcome.flags == 1 && f.outcome.first == 0 && f.outcome.last == 0);
    (void)do_map(&f, 4, 0x1000, 0x1fff, 0, 3);
    CHECK(f.outcome.type == REQUEST_MAP && f.outcome.domain == 4 && f.outcome.endpoint == 0);
    CHECK(f.outcome.first == 0x1000 && f.outcome.last == 0x1fff && f.outcome.flags == 3);
    CHECK_EQ(f.outcome.status, STATUS_NOENT);
    CHECK_EQ(serve(&f, in, 3, 4), 0);
    CHECK(f.outcome.type == 0 && f.outcome.domain == 0 && f.outcome.first == 0);
    tear_down(&f);
}

int main(void)
{
    RUN(test_unknown_types);
    RUN(test_lengths);
    RUN(test_much_room);
    RUN(test_cuts);
    RUN(test_memory_gone);
    RUN(test_reserved_ignored);
    RUN(test_attach);
    RUN(test_detach);
    RUN(test_map_ranges);
    RUN(test_map_overlaps);
    RUN(test_map_flags);
    RUN(test_map_target);
    RUN(test_map_not_negotiated);
    RUN(test_unmap);
    RUN(test_probe);
    RUN(test_personality_0_9);
    RUN(test_personality_0_5);
    RUN(test_too_old);
    RUN(test_fault_report);
    RUN(test_outcome);
    return 0;
}
