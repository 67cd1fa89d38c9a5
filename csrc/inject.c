#include "inject.h"

#include <errno.h>
#include <string.h>

#include "request.h"

int inject_arm(struct inject *inject, const struct viommu_injection *rule)
{
    if (rule->action < VIOMMU_INJECT_DELAY || rule->action > VIOMMU_INJECT_HANG || rule->count == 0 ||
        rule->type >= VIOMMU_REQUEST_TYPES)
        return -EINVAL;
    if (rule->action == VIOMMU_INJECT_STATUS ? rule->status > VIOMMU_STATUS_UNANSWERED : rule->status != 0)
        return -EINVAL;
    if ((rule->action == VIOMMU_INJECT_DELAY) != (rule->delay_ns != 0) || rule->delay_ns > VIOMMU_INJECT_DELAY_MAX)
        return -EINVAL;
    if (inject->armed == VIOMMU_INJECTIONS)
        return -ENOSPC;
    inject->rules[inject->armed++] = *rule;
    return 0;
}

static bool matches(const struct viommu_injection *rule, const struct request_outcome *request, bool has_endpoint,
                    bool has_domain)
{
    return (rule->type == 0 || rule->type == request->type) &&
           (!rule->match_endpoint || (has_endpoint && rule->endpoint == request->endpoint)) &&
           (!rule->match_domain || (has_domain && rule->domain == request->domain));
}

const struct viommu_injection *inject_match(struct inject *inject, const struct request_outcome *request,
                                            bool has_endpoint, bool has_domain, struct viommu_injection *out)
{
    for (size_t i = 0; i < inject->armed; i++) {
        struct viommu_injection *rule = &inject->rules[i];

        if (!matches(rule, request, has_endpoint, has_domain))
            continue;
        *out = *rule;
        if (--rule->count == 0) {
            inject->armed--;
            memmove(rule, rule + 1, (inject->armed - i) * sizeof(*rule));
        }
        return out;
    }
    return NULL;
}
