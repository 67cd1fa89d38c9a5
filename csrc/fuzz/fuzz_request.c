/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libFuzzer target: requests of any bytes and lengths, in every personality, against the model of the tests. The
 * first bytes of the input choose the device, the rest is a program of 20-byte instructions. The answer to each
 * request has to be the model's, as long as it says and written whole; the state is compared now and then and at the
 * end.
 */
#include <errno.h>

#include "../tests/guest.h"
#include "../tests/iommu_check.h"
#include "../tests/settings.h"
#include "le.h"
#include "request.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define POISON 0xa5
#define BEHIND 64u            /* bytes after the writable part that must stay as they are */
#define READABLE_AT 0x1000u   /* in guest memory */
#define WRITABLE_AT 0x10000u
#define READABLE_MAX 200u
#define MEMORY_SIZE (1u << 20)

static const struct viommu_reserved reserved[] = {{0x8000000, 0x80fffff, 1}, {0xfee00000, 0xfeefffff, 0}};

struct device {
    uint8_t personality;
    uint8_t features;   /* not negotiated: 1 MAP_UNMAP, 2 MMIO, 4 BYPASS_CONFIG; not offered: 8 PROBE */
    uint8_t shape;      /* ranges, granule, limits */
    uint8_t probe_size; /* times 8 */
};

struct instruction {
    uint8_t code;     /* request type or another event, and whether the bytes of the request follow in the input */
    int8_t length;    /* difference from the right one */
    uint8_t room;     /* for the answer */
    uint8_t cut;      /* into descriptors */
    uint8_t domain;
    uint8_t endpoint;
    uint8_t flags;
    uint8_t at;       /* a byte of the request to change ... */
    uint8_t by;       /* ... with these bits; 0: none */
    uint8_t far;      /* at the other ends of the address spaces */
    uint16_t first;   /* pages; and the bytes from there */
    uint16_t pages;
    uint16_t phys;
    uint16_t bytes;
    uint16_t unused;
};

struct target {
    struct viommu_settings settings;
    struct viommu_stats stats;
    struct iommu iommu;
    struct model model;
    struct chain chain;
};

static struct guest guest;
static struct guest_memory *memory;

static void configure(struct target *target, const struct device *device)
{
    struct viommu_settings *settings = &target->settings;
    uint64_t accepted;

    *settings = test_settings();
    settings->personality = device->personality % 3u;
    settings->max_endpoints = 6 + (device->shape & 1) * 2;
    settings->max_domains = 5;
    settings->max_mappings = 40;
    settings->max_domain_mappings = 24;
    if ((device->shape & 2) != 0) {
        settings->input_first = 0x10000;
        settings->input_last = 0xffffffffff;
    }
    if ((device->shape & 4) != 0) {
        settings->domain_first = 2;
        settings->domain_last = 9;
    }
    if ((device->shape & 8) != 0)
        settings->page_size_mask = ~0xffffull;
    settings->probe_size = 48u + 8u * device->probe_size;
    if ((device->features & 8) != 0)
        settings->features &= ~VIRTIO_IOMMU_F_PROBE;
    accepted = settings->features;
    if ((device->features & 1) != 0)
        accepted &= ~VIRTIO_IOMMU_F_MAP_UNMAP;
    if ((device->features & 2) != 0)
        accepted &= ~VIRTIO_IOMMU_F_MMIO;
    if ((device->features & 4) != 0)
        accepted &= ~VIRTIO_IOMMU_F_BYPASS_CONFIG;
    CHECK_EQ(iommu_init(&target->iommu, settings, &target->stats), 0);
    CHECK_EQ(iommu_add_endpoints(&target->iommu, 0, 5, NULL, 0, stage2_none()), 0);
    CHECK_EQ(iommu_add_endpoints(&target->iommu, 8, 9, reserved, 2, stage2_none()), 0);
    iommu_set_features(&target->iommu, accepted);
    target->iommu.memory = memory;
    target->model.settings = *settings;
    target->model.features = accepted;
    target->model.memory_first = GUEST_GPA;
    target->model.memory_last = GUEST_GPA + MEMORY_SIZE - 1;
    for (unsigned i = 0; i < 8; i++) {
        struct model_endpoint *endpoint = &target->model.endpoints[i];

        endpoint->exists = true;
        endpoint->id = i < 6 ? i : i + 2;
        if (i >= 6) {
            endpoint->reserved_count = 2;
            memcpy(endpoint->reserved, reserved, sizeof(reserved));
        }
    }
}

/* ----------------------------------------------------------------------------------------------------- the requests */

/* Length of a request by type and personality, from the layouts of its time; 0: unknown type. */
static unsigned natural_length(unsigned personality, uint8_t type)
{
    bool old = personality == VIOMMU_PERSONALITY_0_5;

    switch (type) {
    case REQUEST_ATTACH:
        return old ? 16 : 20;
    case REQUEST_DETACH:
        return old ? 12 : 20;
    case REQUEST_MAP:
        return 36;
    case REQUEST_UNMAP:
        return 28;
    case REQUEST_PROBE:
        return 72;
    default:
        return 0;
    }
}

static uint64_t address(uint16_t pages, uint16_t bytes, bool far, uint64_t base)
{
    return (far ? UINT64_MAX - 0xffff : base) + ((uint64_t)pages << 12) + bytes;
}

/* A well-formed request, or what the instruction makes of one. Returns its length. */
static size_t build(unsigned personality, const struct instruction *now, uint8_t *in)
{
    bool old = personality == VIOMMU_PERSONALITY_0_5;
    uint8_t type = now->code & 7;
    int length = (int)natural_length(personality, type) + now->length;
    uint64_t first = address(now->first, now->bytes & 1 ? now->bytes : 0, now->far & 1, 0);
    uint64_t size = ((uint64_t)now->pages << 12) + (now->bytes & 2 ? now->bytes : 0);
    uint64_t phys = address(now->phys, now->bytes & 4 ? now->bytes : 0, now->far & 2, GUEST_GPA);
    uint64_t last = first + size - 1;

    memset(in, 0, READABLE_MAX);
    in[0] = type;
    le32_put(in + 4, now->domain);
    switch (type) {
    case REQUEST_ATTACH:
        le32_put(in + 8, now->endpoint);
        le32_put(in + 12, personality == VIOMMU_PERSONALITY_1_X ? now->flags : 0);
        break;
    case REQUEST_DETACH:
        le32_put(in + 4, old ? now->endpoint : now->domain);
        le32_put(in + 8, old ? 0 : now->endpoint);
        break;
    case REQUEST_MAP:
        le64_put(in + 8, first);
        le64_put(in + 16, old ? phys : last);
        le64_put(in + 24, old ? size : phys);
        le32_put(in + 32, now->flags);
        break;
    case REQUEST_UNMAP:
        le64_put(in + 8, first);
        le64_put(in + 16, old ? size : last);
        break;
    case REQUEST_PROBE:
        le32_put(in + 4, now->endpoint);
        break;
    default:
        break;
    }
    in[now->at % 80u] ^= now->by;
    return length < 0 ? 0 : length > (int)READABLE_MAX ? READABLE_MAX : (size_t)length;
}

/* ------------------------------------------------------------------------------------------------------- the oracle */

static bool zeroes(const uint8_t *bytes, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (bytes[i] != 0)
            return false;
    }
    return true;
}

static enum status expect_attach(struct target *target, const uint8_t *in, unsigned length)
{
    if (target->settings.personality == VIOMMU_PERSONALITY_1_X) {
        uint32_t flags = le32_get(in + 12);

        if (!zeroes(in + 16, 4) || flags > 1)
            return STATUS_INVAL;
        if (flags == 1 && (target->model.features & VIRTIO_IOMMU_F_BYPASS_CONFIG) == 0)
            return STATUS_INVAL;
        return model_attach(&target->model, le32_get(in + 4), le32_get(in + 8), flags == 1);
    }
    if (!zeroes(in + 12, length - 12))
        return STATUS_INVAL;
    return model_attach(&target->model, le32_get(in + 4), le32_get(in + 8), false);
}

static enum status expect_detach(struct target *target, const uint8_t *in)
{
    if (target->settings.personality == VIOMMU_PERSONALITY_0_5) { /* of whichever domain it is in */
        const struct model_endpoint *endpoint = model_endpoint(&target->model, le32_get(in + 4));

        return model_detach(&target->model,
                            endpoint != NULL && endpoint->domain != NULL ? endpoint->domain->id
                                                                         : target->settings.domain_first,
                            le32_get(in + 4));
    }
    return model_detach(&target->model, le32_get(in + 4), le32_get(in + 8));
}

static enum status expect_map(struct target *target, const uint8_t *in)
{
    uint32_t flags = le32_get(in + 32), kept = flags & 3;
    uint64_t first = le64_get(in + 8), last = le64_get(in + 16), phys = le64_get(in + 24);

    switch (target->settings.personality) {
    case VIOMMU_PERSONALITY_1_X:
        if (flags > 7 || ((flags & 4) != 0 && (target->model.features & VIRTIO_IOMMU_F_MMIO) == 0))
            return STATUS_INVAL;
        kept = flags;
        break;
    case VIOMMU_PERSONALITY_0_9: /* 4 was EXEC, 8 MMIO */
        if (flags > 15)
            return STATUS_INVAL;
        kept |= (flags & 8) != 0 ? MAP_FLAG_MMIO : 0;
        break;
    default:
        if (phys == 0 || first > UINT64_MAX - (phys - 1)) /* there it is the size */
            return STATUS_INVAL;
        if (flags > 7)
            return STATUS_INVAL;
        last = first + phys - 1;
        phys = le64_get(in + 16);
        break;
    }
    return model_map(&target->model, le32_get(in + 4), first, last, phys, kept);
}

static enum status expect_unmap(struct target *target, const uint8_t *in)
{
    uint64_t first = le64_get(in + 8), last = le64_get(in + 16);

    if (target->settings.personality == VIOMMU_PERSONALITY_0_5) {
        if (last == 0 || first > UINT64_MAX - (last - 1))
            return STATUS_INVAL;
        last = first + last - 1;
    }
    return model_unmap(&target->model, le32_get(in + 4), first, last);
}

/* The properties that PROBE tells of an endpoint; returns their bytes. */
static size_t expect_properties(const struct target *target, const struct model_endpoint *endpoint, uint8_t *out)
{
    for (unsigned i = 0; i < endpoint->reserved_count; i++, out += 24) {
        const struct viommu_reserved *region = &endpoint->reserved[i];
        bool old = target->settings.personality == VIOMMU_PERSONALITY_0_5;

        memset(out, 0, 24);
        le16_put(out, 1);
        le16_put(out + 2, 20);
        out[4] = (uint8_t)region->subtype;
        le64_put(out + 8, region->first);
        le64_put(out + 16, old ? region->last - region->first + 1 : region->last);
    }
    return 24u * endpoint->reserved_count;
}

/* False: not answered. Else the status, and what stands in front of the tail: zeroes behind the properties. */
static bool expect(struct target *target, const uint8_t *in, size_t readable, uint64_t writable, enum status *status,
                   uint8_t *properties, size_t *bytes)
{
    const struct model_endpoint *endpoint;
    unsigned length = natural_length(target->settings.personality, in[0]);

    *bytes = 0;
    if (readable < 4 || writable < 4 || writable > 65536 || length == 0 || readable < length)
        return false;
    if ((in[0] == REQUEST_MAP || in[0] == REQUEST_UNMAP) && (target->model.features & VIRTIO_IOMMU_F_MAP_UNMAP) == 0)
        return false;
    if (in[0] == REQUEST_PROBE && (target->settings.features & VIRTIO_IOMMU_F_PROBE) == 0)
        return false;
    if (target->settings.personality == VIOMMU_PERSONALITY_0_5 && in[0] <= REQUEST_DETACH && readable != length)
        return false; /* a later driver's */
    switch (in[0]) {
    case REQUEST_ATTACH:
        *status = expect_attach(target, in, length);
        break;
    case REQUEST_DETACH:
        *status = expect_detach(target, in);
        break;
    case REQUEST_MAP:
        *status = expect_map(target, in);
        break;
    case REQUEST_UNMAP:
        *status = expect_unmap(target, in);
        break;
    default:
        endpoint = model_endpoint(&target->model, le32_get(in + 4));
        *status = writable - 4 < target->settings.probe_size ? STATUS_INVAL
                  : endpoint == NULL                         ? STATUS_NOENT
                                                             : STATUS_OK;
        if (*status == STATUS_OK)
            *bytes = expect_properties(target, endpoint, properties);
        break;
    }
    return true;
}

/* ---------------------------------------------------------------------------------------------------------- one run */

static void add_buffers(struct chain *chain, uint64_t gpa, uint64_t length, uint8_t cut, bool writable)
{
    for (uint64_t at = 0; at < length;) {
        unsigned count = (unsigned)chain->readable + chain->writable;
        uint64_t part = length - at;

        if (count < 500 && cut != 0) /* pieces of cut bytes, or of all sizes; empty ones between them */
            part = cut < 200 ? cut : at % 7 + 1;
        part = part > length - at ? length - at : part;
        if (cut % 16 == 15 && count < 500) {
            chain->buffers[count++] = (struct buffer){gpa + at, 0};
            writable ? chain->writable++ : chain->readable++;
        }
        chain->buffers[count] = (struct buffer){gpa + at, (uint32_t)part};
        writable ? chain->writable++ : chain->readable++;
        at += part;
    }
    if (writable)
        chain->writable_bytes = length;
    else
        chain->readable_bytes = length;
}

static void serve(struct target *target, const uint8_t *in, size_t readable, uint64_t writable, uint8_t cut)
{
    uint8_t *from = guest.ram + READABLE_AT, *to = guest.ram + WRITABLE_AT;
    uint8_t properties[4096];
    struct request_outcome outcome;
    enum status status = STATUS_OK;
    size_t bytes;
    bool answered = expect(target, in, readable, writable, &status, properties, &bytes);
    int64_t used;

    memset(to, POISON, writable + BEHIND);
    memcpy(from, in, readable);
    memset(&target->chain, 0, offsetof(struct chain, buffers));
    add_buffers(&target->chain, GUEST_GPA + READABLE_AT, readable, cut, false);
    add_buffers(&target->chain, GUEST_GPA + WRITABLE_AT, writable, cut, true);
    used = request_serve(&target->iommu, memory, &target->chain, &outcome);
    CHECK_EQ(used, answered ? (int64_t)writable : 0);
    CHECK(memcmp(from, in, readable) == 0);
    for (uint64_t i = answered ? writable : 0; i < writable + BEHIND; i++)
        CHECK_EQ(to[i], POISON);
    if (!answered) {
        CHECK_EQ(outcome.status, VIOMMU_STATUS_UNANSWERED);
        return;
    }
    CHECK_EQ(outcome.status, status);
    CHECK_EQ(outcome.type, in[0]);
    CHECK(bytes == 0 || memcmp(to, properties, bytes) == 0);
    CHECK(zeroes(to + bytes, writable - 4 - bytes));
    CHECK_EQ(to[writable - 4], status);
    CHECK(zeroes(to + writable - 3, 3));
}

static uint64_t room_of(const struct target *target, uint8_t room)
{
    const uint64_t probe = target->settings.probe_size;
    const uint64_t rooms[] = {4, 0, 3, 5, probe + 4, probe + 3, probe, probe + 100, 65536, 65537};

    return room < sizeof(rooms) / sizeof(rooms[0]) ? rooms[room] : room;
}

/* An access is let through exactly where the model has a mapping, or bypass, that allows it. */
static void translate(struct target *target, const struct instruction *now)
{
    uint64_t iova = address(now->first, now->bytes, now->far & 1, 0), gpa = 0, expected = iova;
    const struct model_endpoint *endpoint = model_endpoint(&target->model, now->endpoint);
    uint32_t access = (now->flags & 3u) == 0 ? 1 : now->flags & 3u;
    int rc = iommu_translate(&target->iommu, now->endpoint, iova, access, &gpa);
    bool allowed = false;

    if (endpoint == NULL) {
        CHECK_EQ(rc, -ENOENT);
        return;
    }
    if (endpoint->domain == NULL) {
        if (rc == 0)
            CHECK_EQ(gpa, iova);
        CHECK(rc == (iommu_unattached_bypass(&target->iommu) ? 0 : -ENXIO));
        return;
    }
    allowed = endpoint->domain->bypass;
    for (unsigned i = 0; i < endpoint->domain->count; i++) {
        const struct model_mapping *mapping = &endpoint->domain->mappings[i];

        if (iova >= mapping->first && iova <= mapping->last && (access & ~mapping->flags) == 0) {
            allowed = true;
            expected = mapping->phys + (iova - mapping->first);
        }
    }
    CHECK_EQ(rc == 0, allowed);
    if (allowed)
        CHECK_EQ(gpa, expected);
}

static void run(struct target *target, const uint8_t *data, size_t size)
{
    struct instruction now;

    while (size >= sizeof(now)) {
        uint8_t in[READABLE_MAX] = {0};
        size_t readable;

        memcpy(&now, data, sizeof(now));
        data += sizeof(now);
        size -= sizeof(now);
        if ((now.code & 0x40) != 0) {
            if (now.code % 16 == 0) {
                iommu_reset(&target->iommu);
                model_reset(&target->model);
            } else if (now.code % 16 == 1) {
                iommu_set_bypass(&target->iommu, now.flags & 1);
            } else {
                translate(target, &now);
            }
            continue;
        }
        if ((now.code & 0x80) != 0) { /* the next bytes as they are */
            readable = (size_t)(uint8_t)now.length % 100;
            readable = readable > size ? size : readable;
            memcpy(in, data, readable);
            data += readable;
            size -= readable;
        } else {
            readable = build(target->settings.personality, &now, in);
        }
        serve(target, in, readable, room_of(target, now.room), now.cut);
        if ((now.unused & 7) == 1)
            iommu_agrees(&target->iommu, &target->model);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct target target; /* large */
    struct device device = {0};
    size_t head = size < sizeof(device) ? size : sizeof(device);

    if (guest.ram == NULL) {
        guest_init(&guest, MEMORY_SIZE);
        CHECK_EQ(guest_memory_new(&guest.region, 1, &memory), 0);
    }
    if (head != 0)
        memcpy(&device, data, head);
    memset(&target, 0, sizeof(target));
    configure(&target, &device);
    run(&target, data + head, size - head);
    iommu_agrees(&target.iommu, &target.model);
    iommu_fini(&target.iommu);
    return 0;
}
