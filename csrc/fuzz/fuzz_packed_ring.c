/* SPDX-License-Identifier: Apache-2.0 */
/* libFuzzer target: the packed ring against a model of it (virtio 1.x section 2.8), on images of any contents. */
#include "ring_image.h"

#define FLAG_AVAIL (1u << 7)
#define FLAG_USED (1u << 15)

struct position {
    uint32_t slot;
    bool wrap;
};

static struct image image;
static struct position avail, used;
/* Given and not yet shown: the flags of the first, and the slots of all of them. */
static unsigned given;
static uint32_t first_slot;
static uint16_t first_flags;
static struct position slots[1u << 16];
static unsigned slot_count;

static struct position after(struct position position, uint32_t by)
{
    for (; by != 0; by--) {
        if (++position.slot == image.size) {
            position.slot = 0;
            position.wrap = !position.wrap;
        }
    }
    return position;
}

static uint16_t flags_at(uint32_t slot)
{
    return le16_get(image.shadow + DESC_AT + 16 * slot + 14);
}

static bool is_available(struct position position)
{
    uint16_t flags = flags_at(position.slot);

    return ((flags & FLAG_AVAIL) != 0) == position.wrap && ((flags & FLAG_USED) != 0) == !position.wrap;
}

static void packed_start(struct image *unused, const struct viommu_ring *ring)
{
    (void)unused;
    avail = (struct position){ring->base & 0x7fff, (ring->base & 0x8000) != 0};
    used = (struct position){ring->base >> 16 & 0x7fff, (ring->base >> 31) != 0};
    given = slot_count = 0;
}

/* All entries of a table, in their order. */
static bool walk_table(struct expected *out, uint64_t table, uint32_t len)
{
    if (!expect_table(&image, out, table, len))
        return false;
    for (uint32_t at = 0; at < len; at += 16) {
        const uint8_t *entry = image.shadow + (table - IMAGE_GPA) + at;

        if (!expect_buffer(&image, out, le64_get(entry), le32_get(entry + 8),
                           (le16_get(entry + 14) & FLAG_WRITE) != 0))
            return false;
    }
    return true;
}

static void packed_take(struct image *unused, struct expected *out)
{
    struct position at = avail;
    uint16_t flags;

    (void)unused;
    if (!is_available(at))
        return;
    do {
        const uint8_t *entry = image.shadow + DESC_AT + 16 * at.slot;

        if (out->slots == image.size || !is_available(at)) { /* a list has all its descriptors, and an end */
            out->broken = true;
            return;
        }
        flags = le16_get(entry + 14);
        out->id = le16_get(entry + 12);
        if ((flags & FLAG_INDIRECT) != 0) {
            out->broken = out->slots != 0 || (flags & FLAG_NEXT) != 0;
            if (out->broken || !walk_table(out, le64_get(entry), le32_get(entry + 8)))
                return;
        } else if (!expect_buffer(&image, out, le64_get(entry), le32_get(entry + 8), (flags & FLAG_WRITE) != 0)) {
            return;
        }
        out->slots++;
        at = after(at, 1);
    } while ((flags & FLAG_NEXT) != 0);
    out->taken = true;
    avail = at;
}

static void packed_give(struct image *unused, const struct expected *chain, uint32_t length)
{
    uint32_t at = DESC_AT + 16 * used.slot;
    uint16_t flags = (uint16_t)((length != 0 ? FLAG_WRITE : 0) | (used.wrap ? FLAG_AVAIL | FLAG_USED : 0));

    (void)unused;
    if (given++ == 0) { /* what comes first is shown last, and logged then */
        bool page = image.written[at >> GUEST_PAGE_SHIFT];

        image_write32(&image, at + 8, length);
        image_write16(&image, at + 12, chain->id);
        image.written[at >> GUEST_PAGE_SHIFT] = page;
        first_slot = used.slot;
        first_flags = flags;
    } else {
        image_write32(&image, at + 8, length);
        image_write16(&image, at + 12, chain->id);
        image_write16(&image, at + 14, flags);
    }
    for (uint32_t i = 0; i < chain->slots; i++) {
        if (slot_count < sizeof(slots) / sizeof(slots[0]))
            slots[slot_count++] = after(used, i);
    }
    used = after(used, chain->slots);
}

static int packed_publish(struct image *unused)
{
    uint16_t event, wish;
    unsigned count = slot_count;

    (void)unused;
    if (given == 0)
        return 0;
    given = slot_count = 0;
    image_write16(&image, DESC_AT + 16 * first_slot + 14, first_flags);
    wish = le16_get(image.shadow + DRIVER_AT + 2) & 3;
    if (wish == 1)
        return 0;
    if (wish != 2 || !image.event_idx)
        return 1;
    event = le16_get(image.shadow + DRIVER_AT);
    if ((event & 0x7fff) >= image.size)
        return 1;
    if (count > image.size) /* of a guest that offers what it has not got back; it may be told or not */
        return -1;
    for (unsigned i = 0; i < count; i++) {
        if (slots[i].slot == (event & 0x7fffu) && slots[i].wrap == ((event & 0x8000) != 0))
            return 1;
    }
    return 0;
}

static void packed_want_kick(struct image *unused, bool want)
{
    (void)unused;
    if (want && image.event_idx)
        image_write16(&image, DEVICE_AT, (uint16_t)(avail.slot | (avail.wrap ? 0x8000u : 0)));
    image_write16(&image, DEVICE_AT + 2, (uint16_t)(!want ? 1 : image.event_idx ? 2 : 0));
}

static uint32_t packed_base(const struct image *unused)
{
    (void)unused;
    return avail.slot | (avail.wrap ? 0x8000u : 0) | used.slot << 16 | (used.wrap ? 0x80000000u : 0);
}

/* A descriptor some slots behind the next to be taken; available, unless flags say which of both bits it has. */
static void packed_offer(struct image *unused, const struct instruction *now)
{
    struct position at = after(avail, now->code % 8 == 2 ? now->index % 4 : now->index % image.size);
    struct instruction descriptor = *now;
    unsigned flags = (now->flags & 7) | (at.wrap ? FLAG_AVAIL : FLAG_USED);

    (void)unused;
    if ((now->flags & 0x800) != 0)
        flags = (now->flags & 7) | (now->other & (FLAG_AVAIL | FLAG_USED));
    if ((now->flags & FLAG_INDIRECT) != 0 && (now->flags & 0x400) == 0) {
        descriptor.addr = TABLES_AT + 256 + 16u * (now->addr % 64); /* address_of() takes 256 away */
        descriptor.len = (uint16_t)(16 * (now->len % 64));
    }
    poke_descriptor(&image, DESC_AT + 16 * at.slot, &descriptor, now->other, (uint16_t)flags);
}

static const struct ring_model packed_model = {packed_start,     packed_take, packed_give, packed_publish,
                                               packed_want_kick, packed_base, packed_offer};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct header header = {0};
    size_t head = size < sizeof(header) ? size : sizeof(header);
    uint32_t ring, base = 0x80008000u;

    if (image.ram == NULL)
        image_init(&image);
    if (head != 0)
        memcpy(&header, data, head);
    ring = header.size + 1u;
    if (header.base % 3 != 0) /* somewhere; both positions alike, as they are when nothing is under way */
        base = (header.base % ring | (header.base & 0x8000u)) * 0x10001u;
    if ((header.features & 0x80) != 0) /* or as no front-end would have them */
        base = header.base | (uint32_t)header.base_used << 16;
    if (run(&packed_model, &image, &header, ring, base, VIRTIO_F_RING_PACKED, data + head, size - head) != 0)
        CHECK((base & 0x7fff) >= ring || (base >> 16 & 0x7fff) >= ring);
    return 0;
}
