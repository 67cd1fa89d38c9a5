/* An engine from within, for the files that its C API is spread over. */
#ifndef VIOMMU_ENGINE_H
#define VIOMMU_ENGINE_H

#include "recording.h"
#include "worker.h"

struct player; /* play.c */

struct viommu_engine {
    struct worker worker;
    struct iommu iommu;
    struct guest_memory *memory;
    struct dirty_log log;
    bool logging;
    struct shared_map inflight_map;
    uint8_t *inflight;         /* NULL: none */
    uint32_t inflight_queues;
    uint32_t inflight_queue_size;
    struct viommu_vfio_user *vfio_users;
    struct viommu_iommufd *iommufd; /* NULL: none */
    struct host_container *containers;
    struct player *player;      /* NULL: nothing was played */
    struct viommu_stats stats; /* the worker's */
};

/*
 * Stop the worker at a request boundary, and let it go on. What this thread touches of guest memory in between is
 * guarded as the worker's accesses are.
 */
void engine_quiesce(struct viommu_engine *engine);
void engine_resume(struct viommu_engine *engine);

/* While quiesced: something other than a request has changed the device; for the recording, if there is one. */
void engine_note(struct viommu_engine *engine, uint8_t kind, uint64_t value);
void engine_note_memory(struct viommu_engine *engine);

/* What is behind the host's IOMMU; the endpoints have gone already. */
void engine_free_host(struct viommu_engine *engine);

void player_free(struct player *player);

#endif
