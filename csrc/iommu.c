#include "iommu.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "counters.h"

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
    for (const struct profile *profile = iommu->profiles; profile != NULL; profile = profile->next) {
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

static bool overlap(uint64_t first, uint64_t last, uint64_t other_first, uint64_t other_last)
{
    return first <= other_last && other_first <= last;
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
            if (overlap(reserved[i].first, reserved[i].last, reserved[j].first, reserved[j].last))
                return -EINVAL;
        }
    }
    if (doorbells > 1)
        return -EINVAL;
    for (profile = iommu->profiles; profile != NULL; profile = profile->next) {
        if (overlap(first, last, profile->first, profile->last))
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
    iommu->profiles = profile;
    return 0;
}

/* ---------------------------------------------------------------------------------------------------- domains */

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

static void count_domains(struct iommu *iommu)
{
    count_set(&iommu->stats->domains, iommu->domains.count);
    if (iommu->domains.count > iommu->stats->peak_domains)
        count_set(&iommu->stats->peak_domains, iommu->domains.count);
}

static void count_mappings(struct iommu *iommu, uint64_t mappings)
{
    iommu->mappings = mappings;
    count_set(&iommu->stats->mappings, mappings);
    if (mappings > iommu->stats->peak_mappings)
        count_set(&iommu->stats->peak_mappings, mappings);
    count_set(&iommu->stats->mapping_bytes, iova_pool_bytes(iommu->pool));
}

static int make_domain(struct iommu *iommu, uint32_t id, bool bypass, struct domain **out)
{
    struct domain *domain = calloc(1, sizeof(*domain));

    if (domain == NULL)
        return -ENOMEM;
    domain->id = id;
    domain->bypass = bypass;
    if (!bypass) {
        domain->map = iova_map_new(iommu->pool);
        if (domain->map == NULL)
            goto fail;
    }
    if (id_table_put(&iommu->domains, id, domain) != 0)
        goto fail;
    *out = domain;
    return 0;
fail:
    iova_map_free(domain->map);
    free(domain);
    return -ENOMEM;
}

/* No endpoint is in the domain: it ends, with its mappings. */
static void end_domain(struct iommu *iommu, struct domain *domain)
{
    uint64_t mappings = domain->map != NULL ? iova_map_count(domain->map) : 0;

    for (size_t i = 0; i < domain->binding_count; i++)
        domain->bindings[i].stage2->ops->close(domain->bindings[i].stage2, domain->bindings[i].domain);
    if (iommu->latest == domain)
        iommu->latest = NULL;
    id_table_remove(&iommu->domains, domain->id);
    iova_map_free(domain->map);
    free(domain->bindings);
    free(domain);
    count_domains(iommu);
    count_mappings(iommu, iommu->mappings - mappings);
}

static struct binding *find_binding(const struct domain *domain, const struct stage2 *stage2)
{
    for (size_t i = 0; i < domain->binding_count; i++) {
        if (domain->bindings[i].stage2 == stage2)
            return &domain->bindings[i];
    }
    return NULL;
}

/* Bring a domain with its mappings into a back-end it is not in yet. */
static int bind(struct domain *domain, struct stage2 *stage2)
{
    struct binding *grown = realloc(domain->bindings, (domain->binding_count + 1) * sizeof(*grown));
    struct stage2_domain *opened;
    struct iova_mapping mapping;
    uint64_t from = 0;
    int rc;

    if (grown == NULL)
        return -ENOMEM;
    domain->bindings = grown;
    rc = stage2->ops->open(stage2, domain->id, &opened);
    if (rc != 0)
        return rc;
    while (iova_map_next(domain->map, from, &mapping)) {
        rc = stage2->ops->map(stage2, opened, &mapping);
        if (rc != 0) {
            stage2->ops->close(stage2, opened);
            return rc;
        }
        from = mapping.last + 1;
        if (from == 0)
            break;
    }
    domain->bindings[domain->binding_count++] = (struct binding){stage2, opened, 0};
    return 0;
}

static void unbind_if_empty(struct domain *domain, struct binding *binding)
{
    if (binding->endpoints != 0)
        return;
    binding->stage2->ops->close(binding->stage2, binding->domain);
    *binding = domain->bindings[--domain->binding_count];
}

/* Take an endpoint out of its domain's books; stage 2 has moved it already. */
static void leave(struct iommu *iommu, struct endpoint *endpoint)
{
    struct domain *domain = endpoint->domain;

    if (endpoint->previous != NULL)
        endpoint->previous->next = endpoint->next;
    else
        domain->endpoints = endpoint->next;
    if (endpoint->next != NULL)
        endpoint->next->previous = endpoint->previous;
    endpoint->domain = NULL;
    endpoint->next = endpoint->previous = NULL;
    domain->endpoint_count--;
    count_set(&iommu->stats->endpoints, --iommu->attached);
    if (!domain->bypass) {
        struct binding *binding = find_binding(domain, endpoint->profile->stage2);

        binding->endpoints--;
        if (domain->endpoint_count != 0)
            unbind_if_empty(domain, binding);
    }
    if (domain->endpoint_count == 0)
        end_domain(iommu, domain);
}

static void join(struct iommu *iommu, struct endpoint *endpoint, struct domain *domain)
{
    endpoint->domain = domain;
    endpoint->previous = NULL;
    endpoint->next = domain->endpoints;
    if (domain->endpoints != NULL)
        domain->endpoints->previous = endpoint;
    domain->endpoints = endpoint;
    domain->endpoint_count++;
    count_set(&iommu->stats->endpoints, ++iommu->attached);
    count_domains(iommu); /* not before: one that ends for a new one never counted beside it */
    if (!domain->bypass)
        find_binding(domain, endpoint->profile->stage2)->endpoints++;
}

static bool reserved_is_mapped(const struct profile *profile, const struct domain *domain)
{
    for (size_t i = 0; i < profile->reserved_count; i++) {
        if (iova_map_overlaps(domain->map, profile->reserved[i].first, profile->reserved[i].last))
            return true;
    }
    return false;
}

/* ---------------------------------------------------------------------------------------------------- requests */

/* Remove all mappings of a domain, in stage 2 as well. */
static int clear_domain(struct iommu *iommu, struct domain *domain)
{
    uint64_t removed = 0;
    int rc = 0;

    if (domain->map == NULL)
        return 0;
    for (size_t i = 0; i < domain->binding_count; i++) {
        struct binding *binding = &domain->bindings[i];
        int failed = binding->stage2->ops->unmap(binding->stage2, binding->domain, domain->map, 0, UINT64_MAX);

        if (failed != 0)
            rc = failed;
    }
    (void)iova_map_remove(domain->map, 0, UINT64_MAX, &removed);
    count_mappings(iommu, iommu->mappings - removed);
    return rc;
}

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
        return domain->endpoint_count == 1 ? status_of(clear_domain(iommu, domain)) : STATUS_OK;
    }
    if (domain == NULL) {
        bool replaces = endpoint->domain != NULL && endpoint->domain->endpoint_count == 1;

        if (iommu->domains.count - replaces >= iommu->settings.max_domains)
            return at_limit(iommu);
        if (make_domain(iommu, domain_id, bypass, &domain) != 0)
            return STATUS_NOMEM;
        made = true;
    }
    if (bypass) {
        rc = stage2->ops->identity(stage2, endpoint->id);
    } else if (reserved_is_mapped(endpoint->profile, domain)) {
        rc = -EOPNOTSUPP;
    } else {
        bool bound = find_binding(domain, stage2) != NULL;

        rc = bound ? 0 : bind(domain, stage2);
        if (rc == 0) {
            rc = stage2->ops->attach(stage2, endpoint->id, find_binding(domain, stage2)->domain);
            if (rc != 0 && !bound)
                unbind_if_empty(domain, find_binding(domain, stage2));
        }
    }
    if (rc != 0) {
        if (made)
            end_domain(iommu, domain);
        return status_of(rc);
    }
    if (endpoint->domain != NULL)
        leave(iommu, endpoint);
    join(iommu, endpoint, domain);
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
    leave(iommu, endpoint);
    return status_of(rc);
}

static bool in_reserved(const struct domain *domain, uint64_t first, uint64_t last)
{
    const struct profile *seen = NULL;

    for (const struct endpoint *endpoint = domain->endpoints; endpoint != NULL; endpoint = endpoint->next) {
        const struct profile *profile = endpoint->profile;

        if (profile == seen) /* neighbours mostly share one */
            continue;
        seen = profile;
        for (size_t i = 0; i < profile->reserved_count; i++) {
            if (overlap(first, last, profile->reserved[i].first, profile->reserved[i].last))
                return true;
        }
    }
    return false;
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
    size_t mapped;
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
    if (in_reserved(domain, mapping->first, mapping->last))
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
    for (mapped = 0; mapped < domain->binding_count; mapped++) {
        struct binding *binding = &domain->bindings[mapped];

        rc = binding->stage2->ops->map(binding->stage2, binding->domain, mapping);
        if (rc != 0)
            break;
    }
    if (rc != 0) {
        while (mapped-- > 0) {
            struct binding *binding = &domain->bindings[mapped];

            (void)binding->stage2->ops->unmap(binding->stage2, binding->domain, domain->map, mapping->first,
                                              mapping->last);
        }
        (void)iova_map_remove(domain->map, mapping->first, mapping->last, NULL);
        return status_of(rc);
    }
    count_mappings(iommu, iommu->mappings + 1);
    return STATUS_OK;
}

enum status iommu_unmap(struct iommu *iommu, uint32_t domain_id, uint64_t first, uint64_t last)
{
    struct domain *domain;
    uint64_t removed = 0;
    int rc = 0;

    if (!domain_in_range(iommu, domain_id))
        return STATUS_RANGE;
    domain = find_domain(iommu, domain_id);
    if (domain == NULL)
        return STATUS_NOENT;
    if (domain->bypass || first > last)
        return STATUS_INVAL;
    if (iova_map_check_remove(domain->map, first, last) != 0)
        return STATUS_RANGE;
    for (size_t i = 0; i < domain->binding_count; i++) {
        struct binding *binding = &domain->bindings[i];
        int failed = binding->stage2->ops->unmap(binding->stage2, binding->domain, domain->map, first, last);

        if (failed != 0)
            rc = failed;
    }
    (void)iova_map_remove(domain->map, first, last, &removed);
    count_mappings(iommu, iommu->mappings - removed);
    return status_of(rc);
}

/* ------------------------------------------------------------------------------------------------ control plane */

void iommu_reset(struct iommu *iommu)
{
    struct endpoint *endpoint;
    size_t slot = 0;

    while ((endpoint = id_table_each(&iommu->endpoints, &slot)) != NULL) {
        if (endpoint->domain != NULL) {
            (void)place_unattached(iommu, endpoint);
            leave(iommu, endpoint);
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
