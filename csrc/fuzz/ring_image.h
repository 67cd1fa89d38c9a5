/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the two ring targets share: a small guest memory with a copy of what it must contain, the program that plays
 * on it, and the checks after every step. The input is a header and a program of 16-byte instructions: the guest
 * writes descriptors, tables and anything else anywhere; the device takes, reads, writes, gives, publishes, asks for
 * kicks, stops and starts. Each format brings a model of itself, written from the specification, that says what the
 * device must do next and which bytes of memory it may change.
 */
#ifndef VIOMMU_FUZZ_RING_IMAGE_H
#define VIOMMU_FUZZ_RING_IMAGE_H

#include <sys/mman.h>
#include <unistd.h>

#include "../tests/check.h"
#include "le.h"
#include "virtqueue.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Two regions, one behind the other, and nothing before or after them. */
#define IMAGE_GPA 0x10000ull
#define IMAGE_BYTES 16384u
#define IMAGE_PAGES (IMAGE_BYTES >> GUEST_PAGE_SHIFT)
#define DESC_AT 0u
#define DRIVER_AT 4096u
#define DEVICE_AT 5120u
#define TABLES_AT 8000u /* where honest indirect tables lie: across the border of the regions */
#define IMAGE_MAX_SIZE 256u

#define FLAG_NEXT 1u
#define FLAG_WRITE 2u
#define FLAG_INDIRECT 4u

struct header {
    uint8_t size;     /* of the ring, minus 1 */
    uint8_t features; /* 1 indirect, 2 event_idx, 4 logged */
    uint16_t base;
    uint16_t base_used;
    uint16_t unused;
};

struct instruction {
    uint8_t code;
    uint8_t index;
    uint16_t flags;
    uint32_t addr;    /* an offset in the image, or beyond it */
    uint16_t len;
    uint16_t other;   /* next or id; a value */
    uint32_t unused;
};

/* What a model expects of a take. */
struct expected {
    bool broken;
    bool taken;
    uint16_t id;
    uint16_t slots;
    unsigned readable;
    unsigned writable;
    uint64_t readable_bytes;
    uint64_t writable_bytes;
    struct buffer buffers[IMAGE_MAX_SIZE];
};

struct image {
    uint8_t *ram;                 /* our mapping */
    uint8_t *log;                 /* of the dirty log */
    struct guest_memory *memory;
    struct dirty_log dirty;
    uint8_t shadow[IMAGE_BYTES];  /* what ram must contain */
    bool written[IMAGE_PAGES];    /* by the device, in this step */
    uint32_t size;
    uint64_t features;
    bool indirect;
    bool event_idx;
    bool logged;
    bool broken;
    struct virtqueue vq;
    struct chain chain;
};

/* A ring format: what the specification says of it, on the shadow. */
struct ring_model {
    void (*start)(struct image *image, const struct viommu_ring *ring);
    /* Take the next chain if there is a good one. */
    void (*take)(struct image *image, struct expected *out);
    void (*give)(struct image *image, const struct expected *chain, uint32_t length);
    /* Whether the driver must be notified: 1, 0, or -1 when either will do. */
    int (*publish)(struct image *image);
    void (*want_kick)(struct image *image, bool want);
    uint32_t (*base)(const struct image *image);
    /* The guest's side: flags as they make a descriptor available, and making a head known. */
    void (*offer)(struct image *image, const struct instruction *now);
};

/* ---------------------------------------------------------------------------------------------------------- memory */

static inline int image_file(const char *name, size_t size, uint8_t **ram)
{
    int fd = memfd_create(name, MFD_CLOEXEC);

    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    *ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(*ram != MAP_FAILED);
    return fd;
}

/* Once for all inputs. */
static inline void image_init(struct image *image)
{
    struct viommu_region *regions[2];
    int fd = image_file("guest", IMAGE_BYTES, &image->ram), log = image_file("log", 4096, &image->log);

    for (unsigned i = 0; i < 2; i++)
        CHECK_EQ(viommu_region_map(IMAGE_GPA + i * IMAGE_BYTES / 2, IMAGE_BYTES / 2, 0, i * IMAGE_BYTES / 2, fd,
                                   &regions[i]),
                 0);
    CHECK_EQ(guest_memory_new(regions, 2, &image->memory), 0);
    CHECK_EQ(dirty_log_map(log, 4096, 0, &image->dirty), 0);
    for (unsigned i = 0; i < 2; i++)
        viommu_region_free(regions[i]);
    CHECK(close(fd) == 0 && close(log) == 0);
}

/* The guest writes. */
static inline void image_poke(struct image *image, uint32_t at, const void *bytes, uint32_t length)
{
    at %= IMAGE_BYTES;
    length = length < IMAGE_BYTES - at ? length : IMAGE_BYTES - at;
    memcpy(image->ram + at, bytes, length);
    memcpy(image->shadow + at, bytes, length);
}

static inline void image_poke16(struct image *image, uint32_t at, uint16_t value)
{
    uint8_t bytes[2];

    le16_put(bytes, value);
    image_poke(image, at, bytes, 2);
}

/* A model expects this write of the device. */
static inline void image_write(struct image *image, uint32_t at, const void *bytes, uint32_t length)
{
    if (length == 0)
        return;
    memcpy(image->shadow + at, bytes, length);
    for (uint32_t page = at >> GUEST_PAGE_SHIFT; page <= (at + length - 1) >> GUEST_PAGE_SHIFT; page++)
        image->written[page] = true;
}

static inline void image_write16(struct image *image, uint32_t at, uint16_t value)
{
    uint8_t bytes[2];

    le16_put(bytes, value);
    image_write(image, at, bytes, 2);
}

static inline void image_write32(struct image *image, uint32_t at, uint32_t value)
{
    uint8_t bytes[4];

    le32_put(bytes, value);
    image_write(image, at, bytes, 4);
}

static inline bool image_covers(uint64_t gpa, uint64_t length)
{
    return length == 0 || (gpa >= IMAGE_GPA && gpa < IMAGE_GPA + IMAGE_BYTES && length <= IMAGE_GPA + IMAGE_BYTES - gpa);
}

/* Memory is what it must be, and what the device wrote is in the log. */
static inline void image_check(struct image *image)
{
    CHECK(memcmp(image->ram, image->shadow, IMAGE_BYTES) == 0);
    for (unsigned page = 0; page < IMAGE_PAGES; page++) {
        uint64_t bit = (IMAGE_GPA >> GUEST_PAGE_SHIFT) + page;
        bool marked = (image->log[bit / 8] >> bit % 8 & 1) != 0;

        CHECK_EQ(marked, image->logged && image->written[page]);
        image->written[page] = false;
    }
    memset(image->log, 0, 64);
}

/* ---------------------------------------------------------------------------------------------------------- chains */

/* One more buffer: false, and the chain is broken, when it may not be. */
static inline bool expect_buffer(const struct image *image, struct expected *out, uint64_t addr, uint32_t len,
                                 bool writable)
{
    out->broken = true;
    if (out->readable + out->writable >= image->size || !image_covers(addr, len) || (!writable && out->writable != 0))
        return false;
    out->broken = false;
    out->buffers[out->readable + out->writable] = (struct buffer){addr, len};
    if (writable) {
        out->writable++;
        out->writable_bytes += len;
    } else {
        out->readable++;
        out->readable_bytes += len;
    }
    return true;
}

static inline bool expect_table(const struct image *image, struct expected *out, uint64_t addr, uint32_t len)
{
    out->broken = !image->indirect || len == 0 || len % 16 != 0 || !image_covers(addr, len);
    return !out->broken;
}

static inline void check_chain(const struct image *image, const struct expected *expected)
{
    const struct chain *chain = &image->chain;

    CHECK_EQ(chain->id, expected->id);
    CHECK_EQ(chain->slots, expected->slots);
    CHECK_EQ(chain->readable, expected->readable);
    CHECK_EQ(chain->writable, expected->writable);
    CHECK_EQ(chain->readable_bytes, expected->readable_bytes);
    CHECK_EQ(chain->writable_bytes, expected->writable_bytes);
    for (unsigned i = 0; i < expected->readable + expected->writable; i++) {
        CHECK_EQ(chain->buffers[i].gpa, expected->buffers[i].gpa);
        CHECK_EQ(chain->buffers[i].length, expected->buffers[i].length);
    }
}

static inline void read_chain(struct image *image, const struct expected *expected)
{
    uint8_t bytes[300], wanted[300];
    size_t most = expected->readable_bytes < sizeof(bytes) ? (size_t)expected->readable_bytes : sizeof(bytes);
    size_t have = 0;

    for (unsigned i = 0; i < expected->readable && have < most; i++) {
        const struct buffer *buffer = &expected->buffers[i];
        size_t part = buffer->length < most - have ? buffer->length : most - have;

        if (part != 0)
            memcpy(wanted + have, image->shadow + (buffer->gpa - IMAGE_GPA), part);
        have += part;
    }
    CHECK_EQ(chain_read(image->memory, &image->chain, bytes, most), 0);
    CHECK(memcmp(bytes, wanted, most) == 0);
    if (most < sizeof(bytes))
        CHECK(chain_read(image->memory, &image->chain, bytes, most + 1) != 0);
}

/* Write, or zero, length bytes from an offset on; buffers may overlap each other and the ring. */
static inline void write_chain(struct image *image, const struct expected *expected, uint64_t offset, uint64_t length,
                               bool zero)
{
    static uint8_t pattern[IMAGE_BYTES];
    uint64_t at = 0, done = 0;

    for (size_t i = 0; i < sizeof(pattern); i++)
        pattern[i] = zero ? 0 : (uint8_t)(i + length);
    for (unsigned i = expected->readable; i < expected->readable + expected->writable && done < length; i++) {
        const struct buffer *buffer = &expected->buffers[i];

        if (offset < at + buffer->length) {
            uint64_t in = offset > at ? offset - at : 0, part = buffer->length - in;

            part = part < length - done ? part : length - done;
            image_write(image, (uint32_t)(buffer->gpa + in - IMAGE_GPA), pattern + done, (uint32_t)part);
            done += part;
        }
        at += buffer->length;
    }
    CHECK_EQ(done, length);
    CHECK_EQ(zero ? chain_zero(image->memory, &image->chain, offset, length)
                  : chain_write(image->memory, &image->chain, offset, pattern, (size_t)length),
             0);
}

/* --------------------------------------------------------------------------------------------------------- programs */

static inline uint64_t address_of(const struct instruction *now)
{
    if ((now->addr & 0x80000000u) != 0) /* the top of the address space, where ends wrap */
        return UINT64_MAX - (now->addr & 0xffff);
    if ((now->addr & 0x40000000u) != 0)
        return ((uint64_t)now->addr << 34) | (now->addr & 0xffff);
    return IMAGE_GPA + now->addr % (IMAGE_BYTES + 512) - 256;
}

static inline void poke_descriptor(struct image *image, uint32_t at, const struct instruction *now, uint16_t a,
                                   uint16_t b)
{
    uint8_t bytes[16];

    le64_put(bytes, address_of(now));
    le32_put(bytes + 8, (now->flags & 0x100) != 0 ? (uint32_t)now->len << 16 : now->len % 1024u);
    le16_put(bytes + 12, a);
    le16_put(bytes + 14, b);
    image_poke(image, at, bytes, 16);
}

static inline void serve(struct image *image, const struct ring_model *model, const struct instruction *now)
{
    static struct expected expected; /* large */
    int rc;

    memset(&expected, 0, offsetof(struct expected, buffers));
    if (image->broken)
        expected.broken = true;
    else
        model->take(image, &expected);
    CHECK_EQ(virtqueue_available(&image->vq), image->broken ? false : expected.broken || expected.taken);
    rc = virtqueue_take(&image->vq, &image->chain);
    if (expected.broken) {
        CHECK(rc < 0);
        CHECK(image->vq.broken >= VIOMMU_BROKEN_AVAIL && image->vq.broken <= VIOMMU_BROKEN_LENGTH);
        image->broken = true;
        return;
    }
    CHECK_EQ(rc, expected.taken);
    if (!expected.taken)
        return;
    check_chain(image, &expected);
    read_chain(image, &expected);
    if (expected.writable_bytes <= IMAGE_BYTES) {
        uint64_t offset = expected.writable_bytes == 0 ? 0 : now->other % expected.writable_bytes;

        write_chain(image, &expected, offset, now->len % (expected.writable_bytes - offset + 1), now->flags & 1);
    }
    model->give(image, &expected, now->len);
    virtqueue_give(&image->vq, &image->chain, now->len);
}

static inline void publish(struct image *image, const struct ring_model *model)
{
    int expected = model->publish(image);
    bool notify = virtqueue_publish(&image->vq);

    if (expected >= 0)
        CHECK_EQ(notify, expected);
}

static inline int start(struct image *image, const struct ring_model *model, uint32_t base)
{
    struct viommu_ring ring = {
        .size = image->size,
        .base = base,
        .desc = IMAGE_GPA + DESC_AT,
        .avail = IMAGE_GPA + DRIVER_AT,
        .used = IMAGE_GPA + DEVICE_AT,
        .log_addr = IMAGE_GPA + DEVICE_AT,
        .gpa = true,
        .logged = image->logged,
    };
    int rc = virtqueue_init(&image->vq, &ring, image->features, image->memory, NULL);

    if (rc == 0) {
        image->broken = false;
        model->start(image, &ring);
    }
    return rc;
}

static inline void step(struct image *image, const struct ring_model *model, const struct instruction *now)
{
    switch (now->code % 8) {
    case 0:
        image_poke16(image, now->addr & ~1u, now->other);
        break;
    case 1: /* of an indirect table */
        poke_descriptor(image, TABLES_AT + 16u * (now->index % 64), now, (uint16_t)(now->flags & 7),
                        (now->flags & 0x200) != 0 ? (uint16_t)(now->flags & 7) : now->other);
        break;
    case 2:
    case 3:
        model->offer(image, now);
        break;
    case 4:
    case 5:
        serve(image, model, now);
        if ((now->code & 8) != 0)
            break;
        image_check(image);
        publish(image, model);
        break;
    case 6:
        model->want_kick(image, now->other & 1);
        virtqueue_want_kick(&image->vq, now->other & 1);
        break;
    default: /* stop and start */
        publish(image, model);
        CHECK_EQ(virtqueue_base(&image->vq), model->base(image));
        (void)virtqueue_looks_used(&image->vq);
        CHECK_EQ(start(image, model, virtqueue_base(&image->vq)), 0);
        break;
    }
    image_check(image);
}

/* size: of the ring, already made one that the format allows. base: where it starts. */
static inline int run(const struct ring_model *model, struct image *image, const struct header *header, uint32_t size,
                      uint32_t base, uint64_t features, const uint8_t *data, size_t left)
{
    struct instruction now;

    memset(image->ram, 0, IMAGE_BYTES);
    memset(image->shadow, 0, IMAGE_BYTES);
    image->size = size;
    image->indirect = (header->features & 1) != 0;
    image->event_idx = (header->features & 2) != 0;
    image->logged = (header->features & 4) != 0;
    image->memory->log = image->logged ? &image->dirty : NULL;
    image->features = features | VIRTIO_F_VERSION_1 | (image->indirect ? VIRTIO_RING_F_INDIRECT_DESC : 0) |
                      (image->event_idx ? VIRTIO_RING_F_EVENT_IDX : 0);
    if (start(image, model, base) != 0)
        return -1;
    for (; left >= sizeof(now); data += sizeof(now), left -= sizeof(now)) {
        memcpy(&now, data, sizeof(now));
        step(image, model, &now);
    }
    publish(image, model);
    image_check(image);
    return 0;
}

#endif
