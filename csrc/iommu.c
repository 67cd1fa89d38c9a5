#include "iommu.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "counters.h"
#include "domain.h"
#include "range.h"

int iommu_init(struct iommu *iommu, const struct viommu_settings *settings, struct viommu_stats *stats)
{
    memset(iommu, 0, sizeof(*iommu));
    iommu->settings = *settings;
    iommu->granule = settings->page_size_mask & -settings->page_size_mask;
    iommu->bypass = settings->bypass != 0;
    iommu->stats = stats;
    iommu->pool = iova_pool_new(NULL);
    return iommu->pool != NULL ? 0 : -ENOMEM;
}

/* -------------------------------------------------------------------------------------------------- endpoints */

bool iommu_unattached_bypass(const struct iommu *iommu)
{
    /* Offered is enough for BYPASS_CONFIG, whatever the driver accepted; the older BYPASS must be accepted. */
    if ((iommu->settings.features & VIRTIO_IOMMU_F_BYPASS_CONFIG) != 0)
        return iommu->bypass;
    return (iommu->features & VIRTIO_IOMMU_F_BYPASS) != 0;
}

/* An endpoint that is in no domain reaches everything or nothing. When everything cannot be had, nothing it is. */
static int place_unattached(const struct iommu *iommu, const struct endpoint *endpoint)
{
    struct stage2 *stage2 = endpoint->profile->stage2;

    if (iommu_unattached_bypass(iommu)) {
        int rc = stage2->ops->identity(stage2, endpoint->id);

        if (rc != 0)
            (void)stage2->ops->block(stage2, endpoint->id);
        return rc;
    }
    return stage2->ops->block(stage2, endpoint->id);
}

const struct profile *iommu_profile(const struct iommu *iommu, uint32_t endpoint)
{
    /* Profiles only come, each whole before it shows: fault_raise()'s callers look from their own threads. */
    for (const struct profile *profile = __atomic_load_n(&iommu->profiles, __ATOMIC_ACQUIRE); profile != NULL;
         profile = profile->next) {
        if (endpoint >= profile->first && endpoint <= profile->last)
            return profile;
    }
    return NULL;
}

static int make_endpoint(struct iommu *iommu, const struct profile *profile, uint32_t id, struct endpoint **out)
{
    struct endpoint *endpoint;

    if (iommu->endpoints.count >= iommu->settings.max_endpoints)
        return -ENOSPC;
    endpoint = calloc(1, sizeof(*endpoint));
    if (endpoint == NULL)
        return -ENOMEM;
    endpoint->id = id;
    endpoint->profile = profile;
    if (id_table_put(&iommu->endpoints, id, endpoint) != 0) {
        free(endpoint);
        return -ENOMEM;
    }
    *out = endpoint;
    return 0;
}

static void forget_endpoint(struct iommu *iommu, struct endpoint *endpoint)
{
    id_table_remove(&iommu->endpoints, endpoint->id);
    free(endpoint);
}

int iommu_add_endpoints(struct iommu *iommu, uint32_t first, uint32_t last, const struct viommu_reserved *reserved,
                        size_t count, struct stage2 *stage2)
{
    struct profile *profile;
    unsigned doorbells = 0;

    if (first > last || count > (iommu->settings.probe_size / RESV_MEM_BYTES))
        return -EINVAL;
    for (size_t i = 0; i < count; i++) {
        if (reserved[i].first > reserved[i].last || reserved[i].subtype > 1)
            return -EINVAL;
        doorbells += reserved[i].subtype;
        for (size_t j = 0; j < i; j++) {
            if (ranges_overlap(reserved[i].first, reserved[i].last, reserved[j].first, reserved[j].last))
                return -EINVAL;
        }
    }
    if (doorbells > 1)
        return -EINVAL;
    for (profile = iommu->profiles; profile != NULL; profile = profile->next) {
        if (ranges_overlap(first, last, profile->first, profile->last))
            return -EEXIST;
    }
    profile = calloc(1, sizeof(*profile) + count * sizeof(reserved[0]));
    if (profile == NULL)
        return -ENOMEM;
    profile->first = first;
    profile->last = last;
    profile->stage2 = stage2;
    profile->reserved_count = count;
    if (count != 0)
        memcpy(profile->reserved, reserved, count * sizeof(reserved[0]));
    if (stage2 != stage2_none()) { /* a real endpoint has a state from the first moment on */
        for (uint64_t id = first; id <= last; id++) {
            struct endpoint *endpoint;
            int rc = make_endpoint(iommu, profile, (uint32_t)id, &endpoint);

            if (rc == 0)
                rc = place_unattached(iommu, endpoint);
            if (rc != 0) {
                for (uint64_t made = first; made <= id; made++) {
                    endpoint = id_table_get(&iommu->endpoints, (uint32_t)made);
                    id_table_remove(&iommu->endpoints, (uint32_t)made);
                    free(endpoint);
                }
                free(profile);
                return rc;
            }
        }
    }
    profile->next = iommu->profiles;
    __atomic_store_n(&iommu->profiles, profile, __ATOMIC_RELEASE);
    return 0;
}

static enum status status_of(int rc)
{
    switch (rc) {
    case 0:
        return STATUS_OK;
    case -ENOMEM:
    case -ENOSPC:
        return STATUS_NOMEM;
    case -EFAULT:
        return STATUS_FAULT;
    case -EOPNOTSUPP:
        return STATUS_UNSUPP;
    default:
        return STATUS_DEVERR;
    }
}

static enum status at_limit(struct iommu *iommu)
{
    count_add(&iommu->stats->limit_hits, 1);
    return STATUS_NOMEM;
}

static bool domain_in_range(const struct iommu *iommu, uint32_t id)
{
    return id >= iommu->settings.domain_first && id <= iommu->settings.domain_last;
}

static struct domain *find_domain(struct iommu *iommu, uint32_t id)
{
    if (iommu->latest == NULL || iommu->latest->id != id) {
        struct domain *domain = id_table_get(&iommu->domains, id);

        if (domain == NULL)
            return NULL;
        iommu->latest = domain;
    }
    return iommu->latest;
}

/* ---------------------------------------------------------------------------------------------------- requests */

/* Bring an endpoint into a domain of the right kind, or into a new one where domain is NULL. */
static enum status attach_endpoint(struct iommu *iommu, struct endpoint *endpoint, struct domain *domain,
                                   uint32_t domain_id, bool bypass)
{
    struct stage2 *stage2 = endpoint->profile->stage2;
    bool made = false;
    int rc;

    if (domain != NULL && endpoint->domain == domain) {
        /*
         * The specification does not say what attaching again means. It is DETACH then ATTACH here, as for a move:
         * Linux counts on a domain whose last endpoint was re-attached being empty, and maps everything again.
         */
        if (domain->endpoint_count != 1 || domain->bypass)
            return STATUS_OK;
        return status_of(domain_unmap(iommu, domain, 0, UINT64_MAX));
    }
    if (domain == NULL) {
        bool replaces = endpoint->domain != NULL && endpoint->domain->endpoint_count == 1;

        if (iommu->domains.count - replaces >= iommu->settings.max_domains)
            return at_limit(iommu);
        if (domain_new(iommu, domain_id, bypass, &domain) != 0)
            return STATUS_NOMEM;
        made = true;
    }
    rc = domain_make_room(domain, endpoint->profile);
    if (rc == 0 && bypass) {
        rc = stage2->ops->identity(stage2, endpoint->id);
    } else if (rc == 0 && domain_maps_reserved(domain, endpoint->profile)) {
        rc = -EOPNOTSUPP;
    } else if (rc == 0) {
        bool bound = domain_binding(domain, stage2) != NULL;

        rc = bound ? 0 : domain_bind(domain, stage2);
        if (rc == 0) {
            rc = stage2->ops->attach(stage2, endpoint->id, domain_binding(domain, stage2)->domain);
            if (rc != 0 && !bound)
                domain_unbind_if_empty(domain, domain_binding(domain, stage2));
        }
    }
    if (rc != 0) {
        if (made)
            domain_end(iommu, domain);
        return status_of(rc);
    }
    if (endpoint->domain != NULL)
        domain_leave(iommu, endpoint);
    domain_join(iommu, endpoint, domain);
    return STATUS_OK;
}

enum status iommu_attach(struct iommu *iommu, uint32_t domain_id, uint32_t endpoint_id, bool bypass)
{
    const struct profile *profile;
    struct endpoint *endpoint;
    struct domain *domain;
    enum status status;

    if (!domain_in_range(iommu, domain_id))
        return STATUS_RANGE;
    profile = iommu_profile(iommu, endpoint_id);
    if (profile == NULL)
        return STATUS_NOENT;
    domain = find_domain(iommu, domain_id);
    if (domain != NULL && domain->bypass != bypass)
        return STATUS_INVAL;
    endpoint = id_table_get(&iommu->endpoints, endpoint_id);
    if (endpoint != NULL)
        return attach_endpoint(iommu, endpoint, domain, domain_id, bypass);
    if (make_endpoint(iommu, profile, endpoint_id, &endpoint) != 0)
        return at_limit(iommu);
    status = attach_endpoint(iommu, endpoint, domain, domain_id, bypass);
    if (status != STATUS_OK) /* a refused request leaves nothing behind that counts against a limit */
        forget_endpoint(iommu, endpoint);
    return status;
}

enum status iommu_detach(struct iommu *iommu, uint32_t domain_id, uint32_t endpoint_id)
{
    struct endpoint *endpoint;
    int rc;

    if (!domain_in_range(iommu, domain_id))
        return STATUS_RANGE;
    if (iommu_profile(iommu, endpoint_id) == NULL)
        return STATUS_NOENT;
    endpoint = id_table_get(&iommu->endpoints, endpoint_id);
    if (endpoint == NULL || endpoint->domain == NULL || endpoint->domain->id != domain_id)
        return STATUS_INVAL;
    rc = place_unattached(iommu, endpoint);
    domain_leave(iommu, endpoint);
    return status_of(rc);
}

/*
 * A driver that knows the MMIO flag and bypass domains has no reason to map what is neither memory nor marked as
 * MMIO; without them, a doorbell looks like this, and so does a part of an identity mapping.
 */
static bool must_be_memory(const struct iommu *iommu, uint32_t flags)
{
    const uint64_t both = VIRTIO_IOMMU_F_MMIO | VIRTIO_IOMMU_F_BYPASS_CONFIG;

    return (iommu->features & both) == both && (flags & MAP_FLAG_MMIO) == 0;
}

enum status iommu_map(struct iommu *iommu, uint32_t domain_id, const struct iova_mapping *mapping)
{
    uint64_t phys_last;
    struct domain *domain;
    int rc;

    if (!domain_in_range(iommu, domain_id))
        return STATUS_RANGE;
    domain = find_domain(iommu, domain_id);
    if (domain == NULL)
        return STATUS_NOENT;
    if (domain->bypass || mapping->first > mapping->last)
        return STATUS_INVAL;
    if (((mapping->first | mapping->phys | (mapping->last + 1)) & (iommu->granule - 1)) != 0)
        return STATUS_RANGE;
    if (mapping->first < iommu->settings.input_first || mapping->last > iommu->settings.input_last)
        return STATUS_RANGE;
    if (__builtin_add_overflow(mapping->phys, mapping->last - mapping->first, &phys_last))
        return STATUS_RANGE;
    if (domain_reserves(domain, mapping->first, mapping->last))
        return STATUS_INVAL;
    if (iova_map_count(domain->map) >= iommu->settings.max_domain_mappings ||
        iommu->mappings >= iommu->settings.max_mappings) {
        /* an overlap is still an overlap: a full domain must not hide the driver's mistake */
        return iova_map_overlaps(domain->map, mapping->first, mapping->last) ? STATUS_INVAL : at_limit(iommu);
    }
    if (must_be_memory(iommu, mapping->flags) &&
        (iommu->memory == NULL || !guest_memory_touches(iommu->memory, mapping->phys, phys_last)))
        return iova_map_overlaps(domain->map, mapping->first, mapping->last) ? STATUS_INVAL : STATUS_FAULT;
    rc = iova_map_insert(domain->map, mapping);
    if (rc != 0)
        return rc == -EEXIST ? STATUS_INVAL : STATUS_NOMEM;
    rc = domain_map(domain, mapping);
    if (rc != 0) {
        (void)iova_map_remove(domain->map, mapping->first, mapping->last, NULL);
        return status_of(rc);
    }
    iommu_count_mappings(iommu, iommu->mappings + 1);
    return STATUS_OK;
}

enum status iommu_unmap(struct iommu *iommu, uint32_t domain_id, uint64_t first, uint64_t last)
{
    struct domain *domain;

    if (!domain_in_range(iommu, domain_id))
        return STATUS_RANGE;
    domain = find_domain(iommu, domain_id);
    if (domain == NULL)
        return STATUS_NOENT;
    if (domain->bypass || first > last)
        return STATUS_INVAL;
    if (iova_map_check_remove(domain->map, first, last) != 0)
        return STATUS_RANGE;
    return status_of(domain_unmap(iommu, domain, first, last));
}

/* ------------------------------------------------------------------------------------------------ control plane */

void iommu_reset(struct iommu *iommu)
{
    struct endpoint *endpoint;
    size_t slot = 0;

    while ((endpoint = id_table_each(&iommu->endpoints, &slot)) != NULL) {
        if (endpoint->domain != NULL) {
            (void)place_unattached(iommu, endpoint);
            domain_leave(iommu, endpoint);
        }
    }
    /* Endpoint objects that only a guest's request made go as well, so that they cannot pile up over resets. */
    for (slot = 0; (endpoint = id_table_each(&iommu->endpoints, &slot)) != NULL;) {
        if (endpoint->profile->stage2 == stage2_none()) {
            forget_endpoint(iommu, endpoint);
            slot--; /* removing may have moved a later entry here */
        }
    }
}

void iommu_fini(struct iommu *iommu)
{
    struct profile *profile;
    struct endpoint *endpoint;

    iommu_reset(iommu);
    for (size_t slot = 0; (endpoint = id_table_each(&iommu->endpoints, &slot)) != NULL;)
        free(endpoint);
    id_table_free(&iommu->endpoints);
    id_table_free(&iommu->domains);
    while ((profile = iommu->profiles) != NULL) {
        iommu->profiles = profile->next;
        free(profile);
    }
    iova_pool_free(iommu->pool);
}

static void place_all_unattached(struct iommu *iommu)
{
    struct endpoint *endpoint;

    for (size_t slot = 0; (endpoint = id_table_each(&iommu->endpoints, &slot)) != NULL;) {
        if (endpoint->domain == NULL)
            (void)place_unattached(iommu, endpoint);
    }
}

void iommu_set_features(struct iommu *iommu, uint64_t features)
{
    bool before = iommu_unattached_bypass(iommu);

    iommu->features = features;
    if (iommu_unattached_bypass(iommu) != before)
        place_all_unattached(iommu);
}

void iommu_set_bypass(struct iommu *iommu, bool bypass)
{
    bool before = iommu_unattached_bypass(iommu);

    iommu->bypass = bypass;
    if (iommu_unattached_bypass(iommu) != before)
        place_all_unattached(iommu);
}

/* Tell the back-ends of all profiles before end, each once. On an error *failed is whom it came from. */
static int tell_memory(const struct iommu *iommu, const struct profile *end, const struct guest_memory *memory,
                       const struct profile **failed)
{
    for (const struct profile *profile = iommu->profiles; profile != end; profile = profile->next) {
        const struct profile *first = iommu->profiles;
        int rc;

        while (first->stage2 != profile->stage2)
            first = first->next;
        if (first != profile) /* told already */
            continue;
        rc = profile->stage2->ops->memory(profile->stage2, memory);
        if (rc != 0 && failed != NULL) {
            *failed = profile;
            return rc;
        }
    }
    return 0;
}

/* Have the domains' mappings follow memory, one domain after the other; the one that cannot ends it. */
static int follow_memory(struct iommu *iommu, const struct guest_memory *before, const struct guest_memory *now,
                         bool go_on)
{
    const struct domain *domain;

    for (size_t slot = 0; (domain = id_table_each(&iommu->domains, &slot)) != NULL;) {
        for (size_t i = 0; i < domain->binding_count; i++) {
            const struct binding *binding = &domain->bindings[i];
            int rc;

            if (binding->stage2->ops->follow == NULL)
                continue;
            rc = binding->stage2->ops->follow(binding->stage2, binding->domain, domain->map, before, now);
            if (rc != 0 && !go_on)
                return rc;
        }
    }
    return 0;
}

int iommu_set_memory(struct iommu *iommu, const struct guest_memory *memory)
{
    const struct guest_memory *before = iommu->memory;
    const struct profile *failed = NULL; /* all were told */
    int rc = tell_memory(iommu, NULL, memory, &failed);

    if (rc == 0) {
        rc = follow_memory(iommu, before, memory, false);
        if (rc == 0) {
            iommu->memory = memory;
            return 0;
        }
    }
    (void)tell_memory(iommu, failed, before, NULL); /* the new one ends with this call */
    if (failed == NULL)
        (void)follow_memory(iommu, memory, before, true);
    return rc;
}

int iommu_translate(const struct iommu *iommu, uint32_t endpoint_id, uint64_t iova, uint32_t access, uint64_t *gpa)
{
    const struct endpoint *endpoint = id_table_get(&iommu->endpoints, endpoint_id);
    struct iova_mapping mapping;

    if (iommu_profile(iommu, endpoint_id) == NULL)
        return -ENOENT;
    if (endpoint == NULL || endpoint->domain == NULL) {
        if (!iommu_unattached_bypass(iommu))
            return -ENXIO;
        *gpa = iova;
        return 0;
    }
    if (endpoint->domain->bypass) {
        *gpa = iova;
        return 0;
    }
    if (!iova_map_find(endpoint->domain->map, iova, &mapping) || (access & ~mapping.flags) != 0)
        return -EFAULT;
    *gpa = mapping.phys + (iova - mapping.first);
    return 0;
}
