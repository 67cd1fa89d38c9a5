/*
 * Requests on their way to a vfio-user server: which message ID belongs to whom. The client's requests and viommud's
 * own share one connection, so every request gets an ID of viommud's choice, and its reply is led back by it.
 */
#ifndef VIOMMU_VFIO_USER_CALLS_H
#define VIOMMU_VFIO_USER_CALLS_H

#include <stdbool.h>
#include <stdint.h>

#include "vfio_user_message.h"

#define VFIO_USER_IDS 65536u

/* Requests of viommud that are waited for together. */
struct vfio_user_batch {
    uint32_t outstanding;
    bool failed;           /* the connection ended before all were answered */
};

struct vfio_user_call {
    bool pending;
    bool of_client;
    uint16_t command;
    uint16_t client_id;
    uint32_t next;                 /* client's: younger one; free: next free ID */
    uint32_t previous;
    uint64_t deadline;             /* client's: CLOCK_MONOTONIC, ns */
    struct vfio_user_batch *batch; /* viommud's; NULL: nobody waits */
};

struct vfio_user_calls {
    struct vfio_user_call *calls; /* by ID; pages are touched as IDs come into use */
    uint32_t used;                /* IDs below were used once */
    uint32_t free;                /* a list; VFIO_USER_IDS: empty */
    uint32_t pending;
    uint32_t of_client;           /* among those pending */
    uint32_t oldest;              /* the client's, in the order of their deadlines */
    uint32_t youngest;
};

int vfio_user_calls_init(struct vfio_user_calls *calls);
void vfio_user_calls_fini(struct vfio_user_calls *calls);

/* A pending call; false when every ID is in use. The client's come with deadlines that never go down. */
bool vfio_user_calls_own(struct vfio_user_calls *calls, uint16_t command, struct vfio_user_batch *batch, uint16_t *id);
bool vfio_user_calls_client(struct vfio_user_calls *calls, const struct vfio_user_header *request, uint64_t deadline,
                            uint16_t *id);

/* The pending call of this ID, or NULL. It is forgotten by release. */
struct vfio_user_call *vfio_user_calls_find(struct vfio_user_calls *calls, uint16_t id);
void vfio_user_calls_release(struct vfio_user_calls *calls, uint16_t id);

/* The client's oldest pending call, or NULL. */
struct vfio_user_call *vfio_user_calls_oldest(struct vfio_user_calls *calls, uint16_t *id);

/* Nobody will answer: viommud's own calls are forgotten, their batches failed. The client's stay. */
void vfio_user_calls_fail_own(struct vfio_user_calls *calls);

#endif
