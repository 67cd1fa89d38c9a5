/*
 * The C API for those who look at a running engine and steer it. What has to agree with the worker is done by the
 * worker itself, between two batches: a page of a listing costs the guest a few microseconds.
 */
#include <errno.h>
#include <string.h>

#include "counters.h"
#include "engine.h"
#include "le.h"

/* ----------------------------------------------------------------------------------------------------- listings */

struct listing {
    struct viommu_engine *engine;
    uint64_t from;
    uint32_t domain;
    void *out;
    size_t max;
    int64_t count; /* or -errno */
};

static int64_t run_listing(struct viommu_engine *engine, worker_errand *errand, uint32_t domain, uint64_t from,
                           void *out, size_t max)
{
    struct listing listing = {engine, from, domain, out, max < VIOMMU_PAGE ? max : VIOMMU_PAGE, 0};

    worker_run(&engine->worker, errand, &listing);
    return listing.count;
}

static void list_endpoints(void *context)
{
    struct listing *listing = context;
    const struct iommu *iommu = &listing->engine->iommu;
    struct viommu_endpoint_info *out = listing->out;
    struct id_entry page[VIOMMU_PAGE];
    size_t count = id_table_page(&iommu->endpoints, listing->from, page, listing->max);

    for (size_t i = 0; i < count; i++) {
        const struct endpoint *endpoint = page[i].value;

        out[i] = (struct viommu_endpoint_info){.id = endpoint->id, .attached = endpoint->domain != NULL};
        if (endpoint->domain != NULL) {
            out[i].domain = endpoint->domain->id;
            out[i].bypass = endpoint->domain->bypass;
        } else {
            out[i].bypass = iommu_unattached_bypass(iommu);
        }
    }
    listing->count = (int64_t)count;
}

size_t viommu_engine_endpoints(struct viommu_engine *engine, uint32_t from, struct viommu_endpoint_info *out,
                               size_t max)
{
    size_t count = (size_t)run_listing(engine, list_endpoints, 0, from, out, max);

    for (size_t i = 0; i < count; i++)
        out[i].faults = fault_count(engine->worker.faults, out[i].id);
    return count;
}

static void list_domains(void *context)
{
    struct listing *listing = context;
    struct viommu_domain_info *out = listing->out;
    struct id_entry page[VIOMMU_PAGE];
    size_t count = id_table_page(&listing->engine->iommu.domains, listing->from, page, listing->max);

    for (size_t i = 0; i < count; i++) {
        const struct domain *domain = page[i].value;

        out[i] = (struct viommu_domain_info){
            .id = domain->id,
            .endpoints = domain->endpoint_count,
            .mappings = domain->map != NULL ? iova_map_count(domain->map) : 0,
            .bypass = domain->bypass,
        };
    }
    listing->count = (int64_t)count;
}

size_t viommu_engine_domains(struct viommu_engine *engine, uint32_t from, struct viommu_domain_info *out, size_t max)
{
    return (size_t)run_listing(engine, list_domains, 0, from, out, max);
}

static void list_mappings(void *context)
{
    struct listing *listing = context;
    const struct domain *domain = id_table_get(&listing->engine->iommu.domains, listing->domain);
    struct viommu_mapping_info *out = listing->out;
    struct iova_mapping mapping;
    size_t count = 0;

    if (domain == NULL) {
        listing->count = -ENOENT;
        return;
    }
    while (domain->map != NULL && count < listing->max && iova_map_next(domain->map, listing->from, &mapping)) {
        out[count++] = (struct viommu_mapping_info){mapping.first, mapping.last, mapping.phys, mapping.flags};
        listing->from = mapping.last + 1;
        if (listing->from == 0)
            break;
    }
    listing->count = (int64_t)count;
}

int64_t viommu_engine_mappings(struct viommu_engine *engine, uint32_t domain, uint64_t from,
                               struct viommu_mapping_info *out, size_t max)
{
    return run_listing(engine, list_mappings, domain, from, out, max);
}

struct translation {
    struct viommu_engine *engine;
    uint32_t endpoint;
    uint32_t access;
    uint64_t iova;
    uint64_t *gpa;
    int rc;
};

static void translate(void *context)
{
    struct translation *job = context;

    job->rc = iommu_translate(&job->engine->iommu, job->endpoint, job->iova, job->access, job->gpa);
}

int viommu_engine_translate(struct viommu_engine *engine, uint32_t endpoint, uint64_t iova, uint32_t access,
                            uint64_t *gpa)
{
    struct translation job = {engine, endpoint, access, iova, gpa, 0};

    worker_run(&engine->worker, translate, &job);
    return job.rc;
}

void viommu_engine_service_times(struct viommu_engine *engine, uint64_t counts[VIOMMU_TIME_BUCKETS], uint64_t *sum_ns)
{
    for (size_t i = 0; i < VIOMMU_TIME_BUCKETS; i++)
        counts[i] = count_get(&engine->worker.times.counts[i]);
    *sum_ns = count_get(&engine->worker.times.sum_ns);
}

/* ----------------------------------------------------------------------------------------------------- steering */

int viommu_engine_set_limits(struct viommu_engine *engine, uint32_t max_endpoints, uint32_t max_domains,
                             uint64_t max_mappings, uint64_t max_domain_mappings)
{
    struct viommu_settings *settings = &engine->iommu.settings;

    if (max_endpoints == 0 || max_domains == 0 || max_mappings == 0 || max_domain_mappings == 0)
        return -EINVAL;
    engine_quiesce(engine);
    settings->max_endpoints = max_endpoints;
    settings->max_domains = max_domains;
    settings->max_mappings = max_mappings;
    settings->max_domain_mappings = max_domain_mappings;
    engine_resume(engine);
    return 0;
}

void viommu_engine_pause(struct viommu_engine *engine, bool paused)
{
    engine_quiesce(engine);
    worker_pause(&engine->worker, paused);
    engine_resume(engine);
}

bool viommu_engine_paused(struct viommu_engine *engine)
{
    return engine->worker.paused; /* only ever changed from the control plane */
}

static void arm(struct worker *worker)
{
    worker->taps.inject = worker->inject.armed != 0 ? &worker->inject : NULL;
}

int viommu_engine_inject(struct viommu_engine *engine, const struct viommu_injection *rule)
{
    int rc;

    engine_quiesce(engine);
    rc = inject_arm(&engine->worker.inject, rule);
    arm(&engine->worker);
    engine_resume(engine);
    return rc;
}

size_t viommu_engine_injections(struct viommu_engine *engine, struct viommu_injection *out, size_t max)
{
    const struct inject *inject = &engine->worker.inject;
    size_t count;

    engine_quiesce(engine);
    count = inject->armed < max ? inject->armed : max;
    memcpy(out, inject->rules, count * sizeof(*out));
    arm(&engine->worker); /* rules that are used up leave the request path */
    engine_resume(engine);
    return count;
}

void viommu_engine_clear_injections(struct viommu_engine *engine)
{
    engine_quiesce(engine);
    engine->worker.inject.armed = 0;
    arm(&engine->worker);
    worker_flush(&engine->worker);
    engine_resume(engine);
}

/* ---------------------------------------------------------------------------------------------------- recording */

int viommu_engine_record(struct viommu_engine *engine, bool on)
{
    struct recording **here = &engine->worker.taps.recording;
    struct recording *recording = NULL, *before;

    if (on == (*here != NULL))
        return -EALREADY;
    if (on && (recording = recording_new()) == NULL)
        return -ENOMEM;
    engine_quiesce(engine);
    before = *here;
    *here = recording;
    engine_note(engine, VIOMMU_RECORDED_FEATURES, engine->iommu.features);
    engine_note(engine, VIOMMU_RECORDED_BYPASS, engine->iommu.bypass);
    engine_note_memory(engine);
    engine_resume(engine);
    recording_free(before);
    return 0;
}

size_t viommu_engine_take_recorded(struct viommu_engine *engine, struct viommu_recorded *out, size_t max,
                                   uint64_t *lost)
{
    struct recording *recording = engine->worker.taps.recording;

    *lost = 0;
    return recording != NULL ? recording_take(recording, out, max, lost) : 0;
}

void engine_note(struct viommu_engine *engine, uint8_t kind, uint64_t value)
{
    struct viommu_recorded entry = {.kind = kind, .readable = sizeof(value)};

    if (engine->worker.taps.recording == NULL)
        return;
    le64_put(entry.bytes, value);
    recording_put(engine->worker.taps.recording, &entry);
}

void engine_note_memory(struct viommu_engine *engine)
{
    const struct guest_memory *memory = engine->memory;

    if (engine->worker.taps.recording == NULL)
        return;
    for (size_t i = 0; i < memory->count || i == 0; i++) {
        struct viommu_recorded entry = {.kind = VIOMMU_RECORDED_MEMORY};

        if (memory->count != 0) {
            entry.readable = 20;
            le64_put(entry.bytes, memory->regions[i]->gpa);
            le64_put(entry.bytes + 8, memory->regions[i]->last);
            le32_put(entry.bytes + 16, (uint32_t)(memory->count - 1 - i));
        }
        recording_put(engine->worker.taps.recording, &entry);
    }
}
