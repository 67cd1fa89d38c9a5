/*
 * Stage 2: what makes a domain's mappings true for real endpoints. One small interface, several back-ends behind it:
 * stage2_none (state only), the host's IOMMU (stage2_iommufd, stage2_type1), and devices in other processes
 * (stage2_vfio_user).
 *
 * Every endpoint belongs to one back-end; a domain may hold endpoints of several. The engine opens a domain in a
 * back-end when its first endpoint of that kind comes, and replays the mappings into it; it closes it after the last
 * has left. All calls come from the worker, or from the control plane while the worker is parked, after everything
 * was validated and before the guest is answered.
 *
 * Errors are negative errnos. What the guest is told: -ENOMEM and -ENOSPC NOMEM, -EFAULT FAULT, -EOPNOTSUPP UNSUPP,
 * any other DEVERR. An operation that fails leaves everything as it was, except where noted.
 */
#ifndef VIOMMU_STAGE2_H
#define VIOMMU_STAGE2_H

#include <stdint.h>

#include "guest_memory.h"
#include "iova_map.h"

struct stage2_domain; /* a domain as the back-end knows it */

struct stage2;

struct stage2_ops {
    const char *name;

    /* A domain with nothing mapped. */
    int (*open)(struct stage2 *stage2, uint32_t domain, struct stage2_domain **out);
    /* No endpoint is in it. Whatever is still mapped goes. */
    void (*close)(struct stage2 *stage2, struct stage2_domain *domain);

    int (*map)(struct stage2 *stage2, struct stage2_domain *domain, const struct iova_mapping *mapping);
    /*
     * The mappings of [first, last] in map (still there; none is cut by the ends) stop working. They do in any case:
     * an error says that an endpoint had to be cut off to make it so.
     */
    int (*unmap)(struct stage2 *stage2, struct stage2_domain *domain, const struct iova_map *map, uint64_t first,
                 uint64_t last);

    /* What an endpoint reaches from now on: a domain; all guest memory at its own addresses; nothing. */
    int (*attach)(struct stage2 *stage2, uint32_t endpoint, struct stage2_domain *domain);
    int (*identity)(struct stage2 *stage2, uint32_t endpoint);
    /* Must take effect in any case, as unmap. */
    int (*block)(struct stage2 *stage2, uint32_t endpoint);

    /* Guest memory is about to become this (the one before stays valid until the call returns). */
    int (*memory)(struct stage2 *stage2, const struct guest_memory *memory);
    /*
     * Then, for each domain: of its mappings, those into memory that only before (which may be NULL) had stop working
     * and those into memory that only now has begin to. NULL where memory() is all it takes.
     */
    int (*follow)(struct stage2 *stage2, struct stage2_domain *domain, const struct iova_map *map,
                  const struct guest_memory *before, const struct guest_memory *now);
};

struct stage2 {
    const struct stage2_ops *ops;
};

/* The back-end for endpoints whose DMA nobody translates: every call succeeds. Never freed. */
struct stage2 *stage2_none(void);

#endif
