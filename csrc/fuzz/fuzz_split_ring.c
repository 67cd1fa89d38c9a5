/* SPDX-License-Identifier: Apache-2.0 */
/* libFuzzer target: the split ring against a model of it (virtio 1.x section 2.7), on images of any contents. */
#include "ring_image.h"

static struct image image;
static uint16_t next_avail, next_used, shown; /* shown: used index when it was last published */

static uint16_t at16(uint32_t at)
{
    return le16_get(image.shadow + at);
}

static void split_start(struct image *unused, const struct viommu_ring *ring)
{
    (void)unused;
    next_avail = next_used = shown = (uint16_t)ring->base;
}

/* The entries of a table, from the first on. */
static bool walk_table(struct expected *out, uint64_t table, uint32_t len)
{
    uint32_t index = 0;

    if (!expect_table(&image, out, table, len))
        return false;
    for (;;) {
        const uint8_t *entry = image.shadow + (table - IMAGE_GPA) + 16u * index;
        uint16_t flags = le16_get(entry + 12);

        if ((flags & FLAG_INDIRECT) != 0 || index >= len / 16) {
            out->broken = true;
            return false;
        }
        if (!expect_buffer(&image, out, le64_get(entry), le32_get(entry + 8), (flags & FLAG_WRITE) != 0))
            return false;
        if ((flags & FLAG_NEXT) == 0)
            return true;
        index = le16_get(entry + 14);
        if (index >= len / 16) {
            out->broken = true;
            return false;
        }
    }
}

static bool walk(struct expected *out, uint32_t index)
{
    for (;;) {
        const uint8_t *entry = image.shadow + DESC_AT + 16u * index;
        uint16_t flags;

        if (index >= image.size) {
            out->broken = true;
            return false;
        }
        flags = le16_get(entry + 12);
        if ((flags & FLAG_INDIRECT) != 0) {
            out->broken = (flags & FLAG_NEXT) != 0;
            return !out->broken && walk_table(out, le64_get(entry), le32_get(entry + 8));
        }
        if (!expect_buffer(&image, out, le64_get(entry), le32_get(entry + 8), (flags & FLAG_WRITE) != 0))
            return false;
        if ((flags & FLAG_NEXT) == 0)
            return true;
        index = le16_get(entry + 14);
    }
}

static void split_take(struct image *unused, struct expected *out)
{
    uint16_t ahead = (uint16_t)(at16(DRIVER_AT + 2) - next_avail);

    (void)unused;
    if (ahead == 0)
        return;
    if (ahead > image.size) {
        out->broken = true;
        return;
    }
    out->id = at16(DRIVER_AT + 4 + 2 * (next_avail % image.size));
    out->slots = 1;
    if (walk(out, out->id)) {
        out->taken = true;
        next_avail++;
    }
}

static void split_give(struct image *unused, const struct expected *chain, uint32_t length)
{
    uint32_t at = DEVICE_AT + 4 + 8 * (next_used % image.size);

    (void)unused;
    image_write32(&image, at, chain->id);
    image_write32(&image, at + 4, length);
    next_used++;
}

static int split_publish(struct image *unused)
{
    uint16_t before = shown;

    (void)unused;
    if (shown == next_used)
        return 0;
    shown = next_used;
    image_write16(&image, DEVICE_AT + 2, next_used);
    if (!image.event_idx)
        return (at16(DRIVER_AT) & 1) == 0;
    /* a notification is due when the entry at used_event was among those that became visible */
    for (uint16_t entry = before; entry != next_used; entry++) {
        if (entry == at16(DRIVER_AT + 4 + 2 * image.size))
            return 1;
    }
    return 0;
}

static void split_want_kick(struct image *unused, bool want)
{
    (void)unused;
    if (!image.event_idx)
        image_write16(&image, DEVICE_AT, !want);
    else if (want)
        image_write16(&image, DEVICE_AT + 4 + 8 * image.size, next_avail);
}

static uint32_t split_base(const struct image *unused)
{
    (void)unused;
    return next_avail;
}

/* A descriptor, as a head unless flags say otherwise; with the flag for it, one that points to the tables. */
static void split_offer(struct image *unused, const struct instruction *now)
{
    uint32_t index = now->index % image.size;
    struct instruction descriptor = *now;
    uint16_t avail = at16(DRIVER_AT + 2);

    (void)unused;
    if ((now->flags & FLAG_INDIRECT) != 0 && (now->flags & 0x400) == 0) {
        descriptor.addr = TABLES_AT + 256 + 16u * (now->addr % 64); /* address_of() takes 256 away */
        descriptor.len = (uint16_t)(16 * (now->len % 64));
    }
    poke_descriptor(&image, DESC_AT + 16 * index, &descriptor, (uint16_t)(now->flags & 7),
                    (now->flags & 0x800) != 0 ? now->other : (uint16_t)((index + 1) % image.size));
    if (now->code % 8 == 3)
        return;
    image_poke16(&image, DRIVER_AT + 4 + 2 * (avail % image.size), (uint16_t)index);
    image_poke16(&image, DRIVER_AT + 2, (uint16_t)(avail + 1));
}

static const struct ring_model split_model = {split_start,     split_take, split_give, split_publish,
                                              split_want_kick, split_base, split_offer};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct header header = {0};
    size_t head = size < sizeof(header) ? size : sizeof(header);

    if (image.ram == NULL)
        image_init(&image);
    if (head != 0)
        memcpy(&header, data, head);
    /* An honest ring starts where its index is, and the image is all zeroes: so begin with what was "used" so far. */
    CHECK_EQ(run(&split_model, &image, &header, 1u << header.size % 9, header.base % 3 == 0 ? 0 : header.base, 0,
                 data + head, size - head),
             0);
    return 0;
}
