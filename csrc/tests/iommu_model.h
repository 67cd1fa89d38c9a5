/*
 * What ATTACH, DETACH, MAP and UNMAP ought to answer: a model of endpoints and domains in plain arrays, written from
 * the specification and from the choices that request.c states. Too simple to be fast, or to be wrong in the same way.
 */
#ifndef VIOMMU_TESTS_IOMMU_MODEL_H
#define VIOMMU_TESTS_IOMMU_MODEL_H

#include <string.h>

#include "check.h"
#include "viommu.h"
#include "wire.h"

#define MODEL_DOMAINS 32u
#define MODEL_ENDPOINTS 64u
#define MODEL_MAPPINGS 256u

struct model_mapping {
    uint64_t first;
    uint64_t last;
    uint64_t phys;
    uint32_t flags;
};

struct model_domain {
    bool exists;
    bool bypass;
    uint32_t id;
    unsigned count;
    struct model_mapping mappings[MODEL_MAPPINGS];
};

struct model_endpoint {
    bool exists;   /* in the configuration */
    bool known;    /* has been attached since the last reset: takes one of max_endpoints */
    uint32_t id;
    struct model_domain *domain;
    unsigned reserved_count;
    struct viommu_reserved reserved[4];
};

struct model {
    struct viommu_settings settings; /* of which the limits must fit the arrays here */
    uint64_t features;
    uint64_t memory_first;           /* the one region of guest memory */
    uint64_t memory_last;
    struct model_domain domains[MODEL_DOMAINS];
    struct model_endpoint endpoints[MODEL_ENDPOINTS];
};

static inline struct model_endpoint *model_endpoint(struct model *model, uint32_t id)
{
    for (unsigned i = 0; i < MODEL_ENDPOINTS; i++) {
        if (model->endpoints[i].exists && model->endpoints[i].id == id)
            return &model->endpoints[i];
    }
    return NULL;
}

static inline struct model_domain *model_domain(struct model *model, uint32_t id)
{
    for (unsigned i = 0; i < MODEL_DOMAINS; i++) {
        if (model->domains[i].exists && model->domains[i].id == id)
            return &model->domains[i];
    }
    return NULL;
}

static inline unsigned model_members(const struct model *model, const struct model_domain *domain)
{
    unsigned members = 0;

    for (unsigned i = 0; i < MODEL_ENDPOINTS; i++)
        members += model->endpoints[i].exists && model->endpoints[i].domain == domain;
    return members;
}

static inline unsigned model_domains(const struct model *model)
{
    unsigned count = 0;

    for (unsigned i = 0; i < MODEL_DOMAINS; i++)
        count += model->domains[i].exists;
    return count;
}

static inline uint64_t model_mappings(const struct model *model)
{
    uint64_t count = 0;

    for (unsigned i = 0; i < MODEL_DOMAINS; i++)
        count += model->domains[i].exists ? model->domains[i].count : 0;
    return count;
}

static inline bool model_domain_in_range(const struct model *model, uint32_t id)
{
    return id >= model->settings.domain_first && id <= model->settings.domain_last;
}

/* A mapping of the domain that shares a byte with first..last. */
static inline bool model_overlaps(const struct model_domain *domain, uint64_t first, uint64_t last)
{
    for (unsigned i = 0; i < domain->count; i++) {
        if (first <= domain->mappings[i].last && domain->mappings[i].first <= last)
            return true;
    }
    return false;
}

static inline void model_leave(struct model *model, struct model_endpoint *endpoint)
{
    struct model_domain *domain = endpoint->domain;

    endpoint->domain = NULL;
    if (domain != NULL && model_members(model, domain) == 0)
        memset(domain, 0, sizeof(*domain));
}

static inline enum status model_attach(struct model *model, uint32_t domain_id, uint32_t endpoint_id, bool bypass)
{
    struct model_endpoint *endpoint = model_endpoint(model, endpoint_id);
    struct model_domain *domain = model_domain(model, domain_id);
    unsigned known = 0;

    if (!model_domain_in_range(model, domain_id))
        return STATUS_RANGE;
    if (endpoint == NULL)
        return STATUS_NOENT;
    if (domain != NULL && domain->bypass != bypass)
        return STATUS_INVAL;
    for (unsigned i = 0; i < MODEL_ENDPOINTS; i++)
        known += model->endpoints[i].known;
    if (!endpoint->known && known >= model->settings.max_endpoints)
        return STATUS_NOMEM;
    if (domain != NULL && endpoint->domain == domain) { /* as if detached first */
        if (model_members(model, domain) == 1)
            domain->count = 0;
        return STATUS_OK;
    }
    if (domain != NULL && !bypass) {
        for (unsigned i = 0; i < endpoint->reserved_count; i++) {
            if (model_overlaps(domain, endpoint->reserved[i].first, endpoint->reserved[i].last))
                return STATUS_UNSUPP;
        }
    }
    if (domain == NULL) {
        unsigned ends = endpoint->domain != NULL && model_members(model, endpoint->domain) == 1;

        if (model_domains(model) - ends >= model->settings.max_domains)
            return STATUS_NOMEM;
    }
    model_leave(model, endpoint);
    for (unsigned i = 0; domain == NULL; i++) {
        CHECK(i < MODEL_DOMAINS);
        if (!model->domains[i].exists) {
            domain = &model->domains[i];
            *domain = (struct model_domain){.exists = true, .bypass = bypass, .id = domain_id};
        }
    }
    endpoint->domain = domain;
    endpoint->known = true;
    return STATUS_OK;
}

static inline enum status model_detach(struct model *model, uint32_t domain_id, uint32_t endpoint_id)
{
    struct model_endpoint *endpoint = model_endpoint(model, endpoint_id);

    if (!model_domain_in_range(model, domain_id))
        return STATUS_RANGE;
    if (endpoint == NULL)
        return STATUS_NOENT;
    if (endpoint->domain == NULL || endpoint->domain->id != domain_id)
        return STATUS_INVAL;
    model_leave(model, endpoint);
    return STATUS_OK;
}

/* flags are those of today's layout, checked by the caller. */
static inline enum status model_map(struct model *model, uint32_t domain_id, uint64_t first, uint64_t last,
                                    uint64_t phys, uint32_t flags)
{
    struct model_domain *domain = model_domain(model, domain_id);
    uint64_t granule = model->settings.page_size_mask & -model->settings.page_size_mask;
    const uint64_t strict = VIRTIO_IOMMU_F_MMIO | VIRTIO_IOMMU_F_BYPASS_CONFIG;

    if (!model_domain_in_range(model, domain_id))
        return STATUS_RANGE;
    if (domain == NULL)
        return STATUS_NOENT;
    if (domain->bypass || first > last)
        return STATUS_INVAL;
    if (first % granule != 0 || (last + 1) % granule != 0 || phys % granule != 0)
        return STATUS_RANGE;
    if (first < model->settings.input_first || last > model->settings.input_last)
        return STATUS_RANGE;
    if (phys > UINT64_MAX - (last - first))
        return STATUS_RANGE;
    for (unsigned i = 0; i < MODEL_ENDPOINTS; i++) {
        const struct model_endpoint *endpoint = &model->endpoints[i];

        for (unsigned j = 0; endpoint->exists && endpoint->domain == domain && j < endpoint->reserved_count; j++) {
            if (first <= endpoint->reserved[j].last && endpoint->reserved[j].first <= last)
                return STATUS_INVAL;
        }
    }
    if (model_overlaps(domain, first, last))
        return STATUS_INVAL;
    if (domain->count >= model->settings.max_domain_mappings || model_mappings(model) >= model->settings.max_mappings)
        return STATUS_NOMEM;
    if ((model->features & strict) == strict && (flags & MAP_FLAG_MMIO) == 0 &&
        (phys > model->memory_last || phys + (last - first) < model->memory_first))
        return STATUS_FAULT;
    CHECK(domain->count < MODEL_MAPPINGS);
    domain->mappings[domain->count++] = (struct model_mapping){first, last, phys, flags};
    return STATUS_OK;
}

static inline enum status model_unmap(struct model *model, uint32_t domain_id, uint64_t first, uint64_t last)
{
    struct model_domain *domain = model_domain(model, domain_id);
    unsigned kept = 0;

    if (!model_domain_in_range(model, domain_id))
        return STATUS_RANGE;
    if (domain == NULL)
        return STATUS_NOENT;
    if (domain->bypass || first > last)
        return STATUS_INVAL;
    for (unsigned i = 0; i < domain->count; i++) {
        const struct model_mapping *mapping = &domain->mappings[i];
        bool touches = first <= mapping->last && mapping->first <= last;

        if (touches && (mapping->first < first || mapping->last > last))
            return STATUS_RANGE;
    }
    for (unsigned i = 0; i < domain->count; i++) {
        const struct model_mapping *mapping = &domain->mappings[i];

        if (mapping->last < first || mapping->first > last)
            domain->mappings[kept++] = *mapping;
    }
    domain->count = kept;
    return STATUS_OK;
}

static inline void model_reset(struct model *model)
{
    memset(model->domains, 0, sizeof(model->domains));
    for (unsigned i = 0; i < MODEL_ENDPOINTS; i++) {
        model->endpoints[i].domain = NULL;
        model->endpoints[i].known = false;
    }
}

#endif
