/*
 * Domains: their life, the books of who is in them, and the back-ends they are open in. What a request may do with a
 * domain is decided in iommu.c; here it is done.
 */
#ifndef VIOMMU_DOMAIN_H
#define VIOMMU_DOMAIN_H

#include "iommu.h"

/* A domain with nothing in it. 0 or -ENOMEM. It counts from the first domain_join() on. */
int domain_new(struct iommu *iommu, uint32_t id, bool bypass, struct domain **out);
/* No endpoint is in the domain: it ends, with its mappings, in stage 2 as well. */
void domain_end(struct iommu *iommu, struct domain *domain);

/* The domain in a back-end, or NULL; and bringing it there with its mappings: 0 or the back-end's error. */
struct binding *domain_binding(const struct domain *domain, const struct stage2 *stage2);
int domain_bind(struct domain *domain, struct stage2 *stage2);
void domain_unbind_if_empty(struct domain *domain, struct binding *binding);

/* See to it that domain_join() of an endpoint of this profile cannot fail. 0 or -ENOMEM. */
int domain_make_room(struct domain *domain, const struct profile *profile);
/* The books, after stage 2 has moved an endpoint. The last to leave ends the domain. */
void domain_join(struct iommu *iommu, struct endpoint *endpoint, struct domain *domain);
void domain_leave(struct iommu *iommu, struct endpoint *endpoint);

/* Map in every back-end, or in none; the mapping is in the domain's map already. */
int domain_map(const struct domain *domain, const struct iova_mapping *mapping);
/* Remove every mapping of a range that splits none. It is done in any case; an error is one of stage2_ops.unmap. */
int domain_unmap(struct iommu *iommu, struct domain *domain, uint64_t first, uint64_t last);

/* Something is mapped where an endpoint of this profile has a reserved region. */
bool domain_maps_reserved(const struct domain *domain, const struct profile *profile);
/* An endpoint in the domain reserves a byte of [first, last]. */
bool domain_reserves(const struct domain *domain, uint64_t first, uint64_t last);

/* How many mappings there are in all domains, for limits and counters. */
void iommu_count_mappings(struct iommu *iommu, uint64_t mappings);

#endif
