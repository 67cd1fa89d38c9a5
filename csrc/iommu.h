/*
 * The IOMMU itself: endpoints, domains, and who reaches what. Requests are validated whole, then committed; a request
 * that is refused changes nothing, in the guest's view and in stage 2.
 *
 * Used by the worker, and by the control plane while the worker is parked.
 */
#ifndef VIOMMU_IOMMU_H
#define VIOMMU_IOMMU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "guest_memory.h"
#include "id_table.h"
#include "stage2.h"
#include "viommu.h"
#include "wire.h"

/* Endpoints first..last, alike in what they reserve and who translates for them. */
struct profile {
    struct profile *next;
    uint32_t first;
    uint32_t last;
    struct stage2 *stage2;
    size_t reserved_count;
    struct viommu_reserved reserved[];
};

struct endpoint {
    uint32_t id;
    const struct profile *profile;
    struct domain *domain; /* NULL: unattached */
    struct endpoint *next; /* in its domain */
    struct endpoint *previous;
};

/* A domain in one of the back-ends its endpoints belong to. */
struct binding {
    struct stage2 *stage2;
    struct stage2_domain *domain;
    unsigned endpoints;
};

/* How many endpoints of a domain are of one profile: what it reserves is looked at on every MAP. */
struct profile_use {
    const struct profile *profile;
    unsigned endpoints;
};

struct domain {
    uint32_t id;
    bool bypass;
    uint32_t endpoint_count;
    struct endpoint *endpoints;
    struct iova_map *map; /* NULL in a bypass domain */
    struct binding *bindings;
    size_t binding_count;
    struct profile_use *uses;
    size_t use_count;
};

struct iommu {
    struct viommu_settings settings;
    uint64_t granule;    /* bytes; a power of two */
    uint64_t features;   /* accepted by the driver */
    bool bypass;         /* config.bypass */
    struct profile *profiles;
    struct id_table endpoints;
    struct id_table domains;
    struct domain *latest; /* the domain looked up last: a guest mostly stays in one */
    struct iova_pool *pool;
    uint64_t mappings;
    uint64_t attached;
    const struct guest_memory *memory;
    struct viommu_stats *stats;
};

int iommu_init(struct iommu *iommu, const struct viommu_settings *settings, struct viommu_stats *stats);
void iommu_fini(struct iommu *iommu);

/* As viommu_engine_add_endpoints(); stage2 must outlive the iommu. */
int iommu_add_endpoints(struct iommu *iommu, uint32_t first, uint32_t last, const struct viommu_reserved *reserved,
                        size_t count, struct stage2 *stage2);
/* The description of an endpoint, or NULL when there is none of this ID. */
const struct profile *iommu_profile(const struct iommu *iommu, uint32_t endpoint);

enum status iommu_attach(struct iommu *iommu, uint32_t domain, uint32_t endpoint, bool bypass);
enum status iommu_detach(struct iommu *iommu, uint32_t domain, uint32_t endpoint);
enum status iommu_map(struct iommu *iommu, uint32_t domain, const struct iova_mapping *mapping);
enum status iommu_unmap(struct iommu *iommu, uint32_t domain, uint64_t first, uint64_t last);

/* Every endpoint unattached, every domain gone. config.bypass stays (virtio 1.3 section 5.13.4). */
void iommu_reset(struct iommu *iommu);
void iommu_set_features(struct iommu *iommu, uint64_t features);
void iommu_set_bypass(struct iommu *iommu, bool bypass);
/* Whether an unattached endpoint reaches all memory. */
bool iommu_unattached_bypass(const struct iommu *iommu);
/* Stage 2 is told first; -errno and the old memory stays. */
int iommu_set_memory(struct iommu *iommu, const struct guest_memory *memory);

/* As viommu_engine_translate(). */
int iommu_translate(const struct iommu *iommu, uint32_t endpoint, uint64_t iova, uint32_t access, uint64_t *gpa);

#endif
