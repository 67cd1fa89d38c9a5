#include "stage2.h"

static int open_domain(struct stage2 *stage2, uint32_t domain, struct stage2_domain **out)
{
    (void)stage2;
    (void)domain;
    *out = NULL;
    return 0;
}

static void close_domain(struct stage2 *stage2, struct stage2_domain *domain)
{
    (void)stage2;
    (void)domain;
}

static int map(struct stage2 *stage2, struct stage2_domain *domain, const struct iova_mapping *mapping)
{
    (void)stage2;
    (void)domain;
    (void)mapping;
    return 0;
}

static int unmap(struct stage2 *stage2, struct stage2_domain *domain, const struct iova_map *mappings, uint64_t first,
                 uint64_t last)
{
    (void)stage2;
    (void)domain;
    (void)mappings;
    (void)first;
    (void)last;
    return 0;
}

static int attach(struct stage2 *stage2, uint32_t endpoint, struct stage2_domain *domain)
{
    (void)stage2;
    (void)endpoint;
    (void)domain;
    return 0;
}

static int place(struct stage2 *stage2, uint32_t endpoint)
{
    (void)stage2;
    (void)endpoint;
    return 0;
}

static int memory(struct stage2 *stage2, const struct guest_memory *snapshot)
{
    (void)stage2;
    (void)snapshot;
    return 0;
}

struct stage2 *stage2_none(void)
{
    static const struct stage2_ops ops = {
        .name = "none",
        .open = open_domain,
        .close = close_domain,
        .map = map,
        .unmap = unmap,
        .attach = attach,
        .identity = place,
        .block = place,
        .memory = memory,
    };
    static struct stage2 none = {.ops = &ops};

    return &none;
}
