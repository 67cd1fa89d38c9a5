/* Whether an iommu agrees with the model, mapping by mapping, and its books with its state. */
#ifndef VIOMMU_TESTS_IOMMU_CHECK_H
#define VIOMMU_TESTS_IOMMU_CHECK_H

#include "iommu.h"
#include "iommu_model.h"

static inline void iommu_agrees(const struct iommu *iommu, struct model *model)
{
    uint64_t attached = 0;

    CHECK_EQ(iommu->domains.count, model_domains(model));
    CHECK_EQ(iommu->mappings, model_mappings(model));
    for (unsigned i = 0; i < MODEL_DOMAINS; i++) {
        const struct model_domain *wanted = &model->domains[i];
        const struct domain *domain = wanted->exists ? id_table_get(&iommu->domains, wanted->id) : NULL;
        unsigned members = 0;

        if (!wanted->exists)
            continue;
        CHECK(domain != NULL);
        CHECK_EQ(domain->bypass, wanted->bypass);
        CHECK_EQ(domain->map != NULL ? iova_map_count(domain->map) : 0, wanted->count);
        for (unsigned j = 0; j < wanted->count; j++) {
            struct iova_mapping mapping = {0};

            CHECK(iova_map_find(domain->map, wanted->mappings[j].first, &mapping));
            CHECK(mapping.first == wanted->mappings[j].first && mapping.last == wanted->mappings[j].last);
            CHECK(mapping.phys == wanted->mappings[j].phys && mapping.flags == wanted->mappings[j].flags);
        }
        for (const struct endpoint *endpoint = domain->endpoints; endpoint != NULL; endpoint = endpoint->next) {
            CHECK(endpoint->domain == domain);
            members++;
        }
        CHECK_EQ(members, domain->endpoint_count);
        CHECK_EQ(members, model_members(model, wanted));
        attached += members;
    }
    CHECK_EQ(iommu->attached, attached);
    CHECK_EQ(iommu->stats->endpoints, attached);
    CHECK_EQ(iommu->stats->domains, model_domains(model));
    CHECK_EQ(iommu->stats->mappings, model_mappings(model));
    CHECK(iommu->stats->peak_domains <= model->settings.max_domains);
    CHECK(iommu->stats->peak_mappings <= model->settings.max_mappings);
    for (unsigned i = 0; i < MODEL_ENDPOINTS; i++) {
        const struct model_endpoint *wanted = &model->endpoints[i];
        const struct endpoint *endpoint = wanted->exists ? id_table_get(&iommu->endpoints, wanted->id) : NULL;

        if (wanted->exists && wanted->domain != NULL) {
            CHECK(endpoint != NULL && endpoint->domain != NULL);
            CHECK_EQ(endpoint->domain->id, wanted->domain->id);
        } else {
            CHECK(endpoint == NULL || endpoint->domain == NULL);
        }
    }
}

#endif
