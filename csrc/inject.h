/*
 * Misbehaviour on demand, for those who write guest drivers: the next requests that match a rule are answered late,
 * wrongly, or not at all. Off unless a rule is armed; the worker alone touches it.
 */
#ifndef VIOMMU_INJECT_H
#define VIOMMU_INJECT_H

#include <stddef.h>
#include <stdint.h>

#include "viommu.h"

struct request_outcome;

struct inject {
    size_t armed;              /* rules, oldest first */
    struct viommu_injection rules[VIOMMU_INJECTIONS];
};

/* 0; -EINVAL: a rule that says nothing sensible; -ENOSPC: as many are armed as there may be. */
int inject_arm(struct inject *inject, const struct viommu_injection *rule);

/*
 * The rule a request falls under, used once by this; NULL: none. Of the outcome, type, endpoint and domain are set;
 * has_endpoint and has_domain tell which of these the request names.
 */
const struct viommu_injection *inject_match(struct inject *inject, const struct request_outcome *request,
                                            bool has_endpoint, bool has_domain, struct viommu_injection *out);

#endif
