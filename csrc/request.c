/*
 * Request layouts (virtio 1.3 section 5.13.6). Every request is a readable part that begins with a head
 * { type u8, reserved u8[3] }, and a writable part that ends with a tail { status u8, reserved u8[3] }.
 *   ATTACH  head, domain le32, endpoint le32, flags le32, reserved u8[4]                     20 bytes
 *   DETACH  head, domain le32, endpoint le32, reserved u8[8]                                 20
 *   MAP     head, domain le32, virt_start le64, virt_end le64, phys_start le64, flags le32   36
 *   UNMAP   head, domain le32, virt_start le64, virt_end le64, reserved u8[4]                28
 *   PROBE   head, endpoint le32, reserved u8[64]; writable: properties[probe_size], tail     72
 * Up to version 0.7, ATTACH ended after a reserved le32 (16 bytes), DETACH had no domain (12 bytes), MAP carried
 * { virt, phys, size } and UNMAP { virt, size }. Those cannot be told from today's by their shape, which is why the
 * personality is the user's choice. ATTACH and DETACH can be told: before such a personality, longer ones come from a
 * later driver, whose DETACH would name a domain where an endpoint is expected, and are left unanswered.
 *
 * Choices where the specification leaves one: any other readable part longer than its request is accepted; the tail
 * is the last four writable bytes, and writable bytes before it that no property fills are zeroed; UNMAP ignores its
 * reserved field; checks run in the order length, type, reserved and flags, domain range, endpoint, domain,
 * alignment, input range, reserved regions, overlap, stage 2.
 */
#include "request.h"

#include <errno.h>
#include <string.h>

#include "le.h"

#define HEAD_BYTES 4u
#define TAIL_BYTES 4u
#define READABLE_MAX 72u
/* More room than any probe_size; a writable part beyond it is no request, and is not worth zeroing. */
#define WRITABLE_MAX 65536u
#define PROBE_MAX 4096u

struct layout {
    uint32_t readable[VIOMMU_REQUEST_TYPES]; /* bytes, by type */
    bool sized;             /* MAP and UNMAP carry a size where today's carry the last address */
    bool detach_any;        /* DETACH names no domain; ATTACH and DETACH have this length and no other */
    uint32_t mmio_flag;     /* MAP flag for MMIO; 0: there is none */
    uint32_t ignored_flags; /* MAP flags with no meaning here */
    uint32_t fault_bytes;
};

static const struct layout layouts[] = {
    [VIOMMU_PERSONALITY_1_X] = {{0, 20, 20, 36, 28, 72}, false, false, MAP_FLAG_MMIO, 0, 24},
    [VIOMMU_PERSONALITY_0_9] = {{0, 20, 20, 36, 28, 72}, false, false, 8, 4 /* EXEC */, 24},
    [VIOMMU_PERSONALITY_0_5] = {{0, 16, 12, 36, 28, 72}, true, true, 0, 4 /* EXEC */, 20},
};

static bool negotiated(const struct iommu *iommu, uint64_t feature)
{
    return (iommu->features & feature) != 0;
}

static bool any_set(const uint8_t *bytes, size_t count)
{
    uint8_t all = 0;

    for (size_t i = 0; i < count; i++)
        all |= bytes[i];
    return all != 0;
}

static enum status serve_attach(struct iommu *iommu, const struct layout *layout, const uint8_t *in,
                                struct request_outcome *outcome)
{
    uint32_t flags = 0;

    outcome->domain = le32_get(in + 4);
    outcome->endpoint = le32_get(in + 8);
    if (iommu->settings.personality == VIOMMU_PERSONALITY_1_X) {
        flags = le32_get(in + 12);
        if (any_set(in + 16, 4))
            return STATUS_INVAL;
    } else if (any_set(in + 12, layout->readable[REQUEST_ATTACH] - 12)) {
        return STATUS_INVAL;
    }
    outcome->flags = flags;
    if ((flags & ~ATTACH_FLAG_BYPASS) != 0)
        return STATUS_INVAL;
    if (flags != 0 && !negotiated(iommu, VIRTIO_IOMMU_F_BYPASS_CONFIG))
        return STATUS_INVAL;
    return iommu_attach(iommu, outcome->domain, outcome->endpoint, flags != 0);
}

static enum status serve_detach(struct iommu *iommu, const struct layout *layout, const uint8_t *in,
                                struct request_outcome *outcome)
{
    if (layout->detach_any) {
        const struct endpoint *endpoint;

        outcome->endpoint = le32_get(in + 4);
        endpoint = id_table_get(&iommu->endpoints, outcome->endpoint);
        outcome->domain = endpoint != NULL && endpoint->domain != NULL ? endpoint->domain->id
                                                                        : iommu->settings.domain_first;
    } else {
        outcome->domain = le32_get(in + 4);
        outcome->endpoint = le32_get(in + 8);
    }
    return iommu_detach(iommu, outcome->domain, outcome->endpoint);
}

/* The IOVA range of MAP and UNMAP. A size of 0, or one past the top, is no range. */
static bool range_of(const struct layout *layout, const uint8_t *in, size_t end_at, struct request_outcome *outcome)
{
    outcome->first = le64_get(in + 8);
    outcome->last = le64_get(in + end_at);
    if (layout->sized)
        return outcome->last != 0 && !__builtin_add_overflow(outcome->first, outcome->last - 1, &outcome->last);
    return true;
}

static enum status serve_map(struct iommu *iommu, const struct layout *layout, const uint8_t *in,
                             struct request_outcome *outcome)
{
    uint32_t known = MAP_FLAG_READ | MAP_FLAG_WRITE | layout->ignored_flags;
    struct iova_mapping mapping;

    outcome->domain = le32_get(in + 4);
    outcome->flags = le32_get(in + 32);
    /* version 0.9 has the flag but no feature bit for it */
    if (layout->mmio_flag != 0 &&
        (iommu->settings.personality != VIOMMU_PERSONALITY_1_X || negotiated(iommu, VIRTIO_IOMMU_F_MMIO)))
        known |= layout->mmio_flag;
    if (!range_of(layout, in, layout->sized ? 24 : 16, outcome))
        return STATUS_INVAL;
    if ((outcome->flags & ~known) != 0)
        return STATUS_INVAL;
    mapping.first = outcome->first;
    mapping.last = outcome->last;
    mapping.phys = le64_get(in + (layout->sized ? 16 : 24));
    mapping.flags = outcome->flags & (MAP_FLAG_READ | MAP_FLAG_WRITE);
    if ((outcome->flags & layout->mmio_flag) != 0)
        mapping.flags |= MAP_FLAG_MMIO;
    return iommu_map(iommu, outcome->domain, &mapping);
}

static enum status serve_unmap(struct iommu *iommu, const struct layout *layout, const uint8_t *in,
                               struct request_outcome *outcome)
{
    outcome->domain = le32_get(in + 4);
    if (!range_of(layout, in, 16, outcome))
        return STATUS_INVAL;
    return iommu_unmap(iommu, outcome->domain, outcome->first, outcome->last);
}

/* Properties of an endpoint, written to out (PROBE_MAX bytes); returns how many bytes. It fits: checked when added. */
static size_t encode_properties(const struct iommu *iommu, const struct profile *profile, uint8_t *out)
{
    size_t at = 0;

    for (size_t i = 0; i < profile->reserved_count; i++) {
        const struct viommu_reserved *region = &profile->reserved[i];

        memset(out + at, 0, RESV_MEM_BYTES);
        le16_put(out + at, PROBE_TYPE_RESV_MEM);
        le16_put(out + at + 2, RESV_MEM_BYTES - 4); /* without this header */
        out[at + 4] = (uint8_t)region->subtype;
        le64_put(out + at + 8, region->first);
        /* a size in the oldest layout; the whole space has none that fits, and is never reserved */
        le64_put(out + at + 16, layouts[iommu->settings.personality].sized ? region->last - region->first + 1
                                                                            : region->last);
        at += RESV_MEM_BYTES;
    }
    return at;
}

static enum status serve_probe(struct iommu *iommu, const uint8_t *in, uint64_t room, uint8_t *properties,
                               size_t *bytes, struct request_outcome *outcome)
{
    const struct profile *profile;

    outcome->endpoint = le32_get(in + 4);
    if (room < iommu->settings.probe_size)
        return STATUS_INVAL;
    profile = iommu_profile(iommu, outcome->endpoint);
    if (profile == NULL)
        return STATUS_NOENT;
    *bytes = encode_properties(iommu, profile, properties);
    return STATUS_OK;
}

/* Whether the type is one that this device, as negotiated, answers. */
static bool knows(const struct iommu *iommu, uint8_t type)
{
    switch (type) {
    case REQUEST_ATTACH:
    case REQUEST_DETACH:
        return true;
    case REQUEST_MAP:
    case REQUEST_UNMAP:
        return negotiated(iommu, VIRTIO_IOMMU_F_MAP_UNMAP);
    case REQUEST_PROBE:
        return (iommu->settings.features & VIRTIO_IOMMU_F_PROBE) != 0;
    default:
        return false;
    }
}

/* Look for a rule that this request falls under. The outcome's type is set. */
static void tap_inject(struct inject *inject, const struct layout *layout, const uint8_t *in,
                       struct request_outcome *outcome)
{
    bool named = outcome->type == REQUEST_ATTACH || (outcome->type == REQUEST_DETACH && !layout->detach_any);
    bool has_domain = named || outcome->type == REQUEST_MAP || outcome->type == REQUEST_UNMAP;
    bool has_endpoint = named || !has_domain;
    struct viommu_injection rule;

    /* Both are again set by who carries the request out. */
    outcome->domain = has_domain ? le32_get(in + 4) : 0;
    outcome->endpoint = has_endpoint ? le32_get(in + (named ? 8 : 4)) : 0;
    if (inject_match(inject, outcome, has_endpoint, has_domain, &rule) == NULL)
        return;
    outcome->injected = rule.action;
    outcome->delay_ns = rule.delay_ns;
    outcome->status = (uint8_t)rule.status;
}

static void tap_record(struct recording *recording, const struct chain *chain, const uint8_t *in, uint8_t type,
                       uint8_t status)
{
    struct viommu_recorded entry = {.kind = type, .status = status};

    entry.writable = chain->writable_bytes < UINT32_MAX ? (uint32_t)chain->writable_bytes : UINT32_MAX;
    entry.readable = (uint16_t)(chain->readable_bytes < READABLE_MAX ? chain->readable_bytes : READABLE_MAX);
    memcpy(entry.bytes, in, entry.readable);
    recording_put(recording, &entry);
}

int64_t request_serve(struct iommu *iommu, const struct guest_memory *memory, const struct chain *chain,
                      struct request_outcome *outcome)
{
    static const struct request_taps none;

    return request_serve_tapped(iommu, memory, chain, &none, outcome);
}

/* As request_serve_tapped(), with the request in and not recorded. */
static int64_t answer(struct iommu *iommu, const struct guest_memory *memory, const struct chain *chain,
                      struct inject *inject, const uint8_t *in, struct request_outcome *outcome)
{
    const struct layout *layout = &layouts[iommu->settings.personality];
    uint8_t tail[TAIL_BYTES] = {0};
    uint8_t properties[PROBE_MAX];
    size_t bytes = 0;
    uint64_t room;
    enum status status;

    if (!knows(iommu, in[0]))
        return 0;
    outcome->type = in[0];
    if (chain->readable_bytes < layout->readable[in[0]])
        return 0;
    if (layout->detach_any && (in[0] == REQUEST_ATTACH || in[0] == REQUEST_DETACH) &&
        chain->readable_bytes != layout->readable[in[0]])
        return 0;
    room = chain->writable_bytes - TAIL_BYTES;
    if (inject != NULL) {
        tap_inject(inject, layout, in, outcome);
        if (outcome->injected == VIOMMU_INJECT_STATUS) {
            if (outcome->status == VIOMMU_STATUS_UNANSWERED)
                return 0;
            status = (enum status)outcome->status;
            goto carried_out;
        }
    }
    switch (in[0]) {
    case REQUEST_ATTACH:
        status = serve_attach(iommu, layout, in, outcome);
        break;
    case REQUEST_DETACH:
        status = serve_detach(iommu, layout, in, outcome);
        break;
    case REQUEST_MAP:
        status = serve_map(iommu, layout, in, outcome);
        break;
    case REQUEST_UNMAP:
        status = serve_unmap(iommu, layout, in, outcome);
        break;
    default:
        status = serve_probe(iommu, in, room, properties, &bytes, outcome);
        break;
    }
    outcome->status = (uint8_t)status;
    if (outcome->injected == VIOMMU_INJECT_DROP)
        return 0;
carried_out:
    tail[0] = (uint8_t)status;
    if (bytes != 0 && chain_write(memory, chain, 0, properties, bytes) != 0)
        return -EFAULT;
    if (room > bytes && chain_zero(memory, chain, bytes, room - bytes) != 0)
        return -EFAULT;
    if (chain_write(memory, chain, room, tail, sizeof(tail)) != 0)
        return -EFAULT;
    return (int64_t)chain->writable_bytes;
}

int64_t request_serve_tapped(struct iommu *iommu, const struct guest_memory *memory, const struct chain *chain,
                             const struct request_taps *taps, struct request_outcome *outcome)
{
    uint8_t in[READABLE_MAX] = {0};
    size_t bytes = chain->readable_bytes < sizeof(in) ? (size_t)chain->readable_bytes : sizeof(in);
    int64_t length = 0;

    memset(outcome, 0, sizeof(*outcome));
    outcome->status = VIOMMU_STATUS_UNANSWERED;
    if (chain->readable_bytes >= HEAD_BYTES && chain->writable_bytes >= TAIL_BYTES &&
        chain->writable_bytes <= WRITABLE_MAX) { /* else it is no request, and recorded without its bytes */
        /* the one copy of the request: everything else works on it */
        if (chain_read(memory, chain, in, bytes) != 0)
            return -EFAULT;
        length = answer(iommu, memory, chain, taps->inject, in, outcome);
    }
    if (taps->recording != NULL)
        tap_record(taps->recording, chain, in, outcome->type, outcome->status);
    return length;
}

uint32_t fault_report_bytes(uint32_t personality)
{
    return layouts[personality].fault_bytes;
}

void fault_report_encode(uint32_t personality, uint32_t reason, uint32_t flags, uint32_t endpoint, uint64_t address,
                         uint8_t *out)
{
    memset(out, 0, FAULT_REPORT_MAX);
    out[0] = (uint8_t)reason;
    le32_put(out + 4, flags & (FAULT_FLAG_READ | FAULT_FLAG_WRITE | FAULT_FLAG_ADDRESS));
    le32_put(out + 8, endpoint);
    if ((flags & FAULT_FLAG_ADDRESS) != 0)
        le64_put(out + (layouts[personality].fault_bytes == 24 ? 16 : 12), address);
}
