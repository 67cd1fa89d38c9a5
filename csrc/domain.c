#include "domain.h"

#include <errno.h>
#include <stdlib.h>

#include "counters.h"
#include "range.h"

static void count_domains(struct iommu *iommu)
{
    count_set(&iommu->stats->domains, iommu->domains.count);
    if (iommu->domains.count > iommu->stats->peak_domains)
        count_set(&iommu->stats->peak_domains, iommu->domains.count);
}

void iommu_count_mappings(struct iommu *iommu, uint64_t mappings)
{
    iommu->mappings = mappings;
    count_set(&iommu->stats->mappings, mappings);
    if (mappings > iommu->stats->peak_mappings)
        count_set(&iommu->stats->peak_mappings, mappings);
    count_set(&iommu->stats->mapping_bytes, iova_pool_bytes(iommu->pool));
}

int domain_new(struct iommu *iommu, uint32_t id, bool bypass, struct domain **out)
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

void domain_end(struct iommu *iommu, struct domain *domain)
{
    uint64_t mappings = domain->map != NULL ? iova_map_count(domain->map) : 0;

    for (size_t i = 0; i < domain->binding_count; i++)
        domain->bindings[i].stage2->ops->close(domain->bindings[i].stage2, domain->bindings[i].domain);
    if (iommu->latest == domain)
        iommu->latest = NULL;
    id_table_remove(&iommu->domains, domain->id);
    iova_map_free(domain->map);
    free(domain->bindings);
    free(domain->uses);
    free(domain);
    count_domains(iommu);
    iommu_count_mappings(iommu, iommu->mappings - mappings);
}

struct binding *domain_binding(const struct domain *domain, const struct stage2 *stage2)
{
    for (size_t i = 0; i < domain->binding_count; i++) {
        if (domain->bindings[i].stage2 == stage2)
            return &domain->bindings[i];
    }
    return NULL;
}

int domain_bind(struct domain *domain, struct stage2 *stage2)
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

void domain_unbind_if_empty(struct domain *domain, struct binding *binding)
{
    if (binding->endpoints != 0)
        return;
    binding->stage2->ops->close(binding->stage2, binding->domain);
    *binding = domain->bindings[--domain->binding_count];
}

static struct profile_use *find_use(const struct domain *domain, const struct profile *profile)
{
    for (size_t i = 0; i < domain->use_count; i++) {
        if (domain->uses[i].profile == profile)
            return &domain->uses[i];
    }
    return NULL;
}

int domain_make_room(struct domain *domain, const struct profile *profile)
{
    struct profile_use *grown;

    if (find_use(domain, profile) != NULL)
        return 0;
    grown = realloc(domain->uses, (domain->use_count + 1) * sizeof(*grown));
    if (grown == NULL)
        return -ENOMEM;
    domain->uses = grown;
    return 0;
}

void domain_leave(struct iommu *iommu, struct endpoint *endpoint)
{
    struct domain *domain = endpoint->domain;
    struct profile_use *use;

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
    use = find_use(domain, endpoint->profile);
    if (--use->endpoints == 0)
        *use = domain->uses[--domain->use_count];
    if (!domain->bypass) {
        struct binding *binding = domain_binding(domain, endpoint->profile->stage2);

        binding->endpoints--;
        if (domain->endpoint_count != 0)
            domain_unbind_if_empty(domain, binding);
    }
    if (domain->endpoint_count == 0)
        domain_end(iommu, domain);
}

void domain_join(struct iommu *iommu, struct endpoint *endpoint, struct domain *domain)
{
    struct profile_use *use = find_use(domain, endpoint->profile);

    if (use == NULL) { /* domain_make_room() has seen to it that it fits */
        use = &domain->uses[domain->use_count++];
        *use = (struct profile_use){endpoint->profile, 0};
    }
    use->endpoints++;
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
        domain_binding(domain, endpoint->profile->stage2)->endpoints++;
}

int domain_map(const struct domain *domain, const struct iova_mapping *mapping)
{
    for (size_t i = 0; i < domain->binding_count; i++) {
        const struct binding *binding = &domain->bindings[i];
        int rc = binding->stage2->ops->map(binding->stage2, binding->domain, mapping);

        if (rc == 0)
            continue;
        while (i-- > 0) {
            binding = &domain->bindings[i];
            (void)binding->stage2->ops->unmap(binding->stage2, binding->domain, domain->map, mapping->first,
                                              mapping->last);
        }
        return rc;
    }
    return 0;
}

int domain_unmap(struct iommu *iommu, struct domain *domain, uint64_t first, uint64_t last)
{
    uint64_t removed = 0;
    int rc = 0;

    for (size_t i = 0; i < domain->binding_count; i++) {
        const struct binding *binding = &domain->bindings[i];
        int failed = binding->stage2->ops->unmap(binding->stage2, binding->domain, domain->map, first, last);

        if (failed != 0)
            rc = failed;
    }
    (void)iova_map_remove(domain->map, first, last, &removed);
    iommu_count_mappings(iommu, iommu->mappings - removed);
    return rc;
}

bool domain_maps_reserved(const struct domain *domain, const struct profile *profile)
{
    for (size_t i = 0; i < profile->reserved_count; i++) {
        if (iova_map_overlaps(domain->map, profile->reserved[i].first, profile->reserved[i].last))
            return true;
    }
    return false;
}

bool domain_reserves(const struct domain *domain, uint64_t first, uint64_t last)
{
    for (size_t i = 0; i < domain->use_count; i++) {
        const struct profile *profile = domain->uses[i].profile;

        for (size_t j = 0; j < profile->reserved_count; j++) {
            if (ranges_overlap(first, last, profile->reserved[j].first, profile->reserved[j].last))
                return true;
        }
    }
    return false;
}
