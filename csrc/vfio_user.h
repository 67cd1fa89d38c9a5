/*
 * A vfio-user endpoint from the inside. Two threads meet here, the engine's worker (through stage2_vfio_user.c) and
 * the relay (vfio_user_relay.c); both are data plane, and neither waits for the control plane.
 *
 * What the endpoint reaches is told twice: to the server, by DMA_MAP and DMA_UNMAP, so that it knows its ranges (and
 * has their files in shared mode); and here, by the view, which is what its DMA_READs and DMA_WRITEs are checked
 * against. The server knows exactly the pieces of view and memory together: whoever changes one of them under the
 * lock sends the difference before the lock is given up. One queue to the server keeps all of it in the order it
 * happened, the client's register accesses included.
 */
#ifndef VIOMMU_VFIO_USER_H
#define VIOMMU_VFIO_USER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "stage2.h"
#include "vfio_user_calls.h"
#include "vfio_user_link.h"
#include "vfio_user_memory.h"
#include "viommu.h"
#include "wire.h"

/* Mappings told to one server at once, whatever it says it can keep: each may need an ID twice. */
#define VFIO_USER_MAX_MAPS 30000u

/* Requests of the client that may be under way; it is not read from when there are more. */
#define VFIO_USER_CLIENT_CALLS 1024u

/* Bytes that may wait in a queue before its own kind of traffic has to wait. */
#define VFIO_USER_QUEUE_FULL (1u << 20)
/*
 * Bytes that may wait for either before the server is not read from: what it sends would become more of them. Well
 * above the other limit, so that the client alone, busy or not reading, never keeps us from hearing the server.
 */
#define VFIO_USER_QUEUE_DEAF (16u << 20)

/* Who gets the faults of refused accesses. Called by the relay; must not block. */
struct vfio_user_faults {
    void (*raise)(void *context, uint32_t endpoint, enum fault_reason reason, uint32_t flags, uint64_t address);
    void *context;
};

/* A domain as this endpoint knows it: a copy of its mappings. */
struct vfio_user_domain {
    struct iova_map *map;
};

enum vfio_user_reach { REACH_NOTHING, REACH_DOMAIN, REACH_MEMORY };

struct vfio_user_view {
    enum vfio_user_reach reach;
    struct vfio_user_domain *domain; /* of REACH_DOMAIN */
};

/* A DMA_MAP or DMA_UNMAP of the client that is answered when the server has answered what followed from it. */
struct vfio_user_deferred {
    struct vfio_user_deferred *next;
    struct vfio_user_batch batch;
    uint64_t deadline;
    size_t size;
    struct vfio_user_dma_unmap request; /* as much of the message as its reply repeats */
};

struct viommu_vfio_user {
    struct stage2 stage2;             /* first: the ops get a pointer to it */
    struct viommu_vfio_user *next;    /* of the engine's */
    struct viommu_vfio_user_settings settings;
    struct vfio_user_faults faults;
    struct viommu_vfio_user_stats stats;
    int event;                        /* eventfd for the control plane */
    int wake;                         /* eventfd for the relay */
    int epoll;

    pthread_mutex_t lock;
    pthread_cond_t changed;           /* replies came, room in the queue, the connection ended; CLOCK_MONOTONIC */
    /* under the lock */
    uint32_t state;                   /* VIOMMU_VFIO_USER_* */
    struct viommu_vfio_user_limits limits;
    struct iova_pool *pool;
    struct vfio_user_view view;
    struct vfio_user_memory memory;   /* changed by the relay alone */
    struct vfio_user_calls calls;
    struct vfio_user_link server;     /* its sending half; receiving is the relay's */
    uint32_t server_events;           /* that epoll looks for */
    uint32_t maps;                    /* that the server has been told and not been told to forget */
    uint64_t reachable;
    bool direct;                      /* the client can reach the device's registers past us */

    /* the relay's */
    struct vfio_user_link client;
    uint32_t client_events;
    struct vfio_user_deferred *deferred;
    unsigned deferred_count;
    pthread_t thread;
    bool started;                     /* control plane: to be joined */
    atomic_bool stop;
};

/* Endpoint without connection, viewing nothing; faults is copied. The caller frees it after the iommu. */
int vfio_user_new(const struct viommu_vfio_user_settings *settings, const struct vfio_user_faults *faults,
                  struct viommu_vfio_user **out);
void vfio_user_free(struct viommu_vfio_user *user);

extern const struct stage2_ops vfio_user_stage2_ops;

/* The relay's thread, in vfio_user_relay.c; the argument is the struct viommu_vfio_user. */
void *vfio_user_relay(void *arg);

uint64_t vfio_user_now(void);

/* ----------------------------------------------------------------- vfio_user_tell.c; all under the lock */

/*
 * Wait until the queue to the server has room and count requests have IDs. 0 at once; 1 when the lock was given up
 * meanwhile: look again; -EIO when the server was cut off, or no longer is there.
 */
int vfio_user_reserve(struct viommu_vfio_user *user, uint32_t count, uint64_t deadline);

/* Tell the server. What goes wrong cuts it off; batch, if not NULL, counts what it has to answer. */
void vfio_user_tell_map(struct viommu_vfio_user *user, const struct vfio_user_piece *piece,
                        struct vfio_user_batch *batch);
void vfio_user_tell_unmap(struct viommu_vfio_user *user, const struct vfio_user_piece *piece,
                          struct vfio_user_batch *batch);
void vfio_user_tell_unmap_all(struct viommu_vfio_user *user, struct vfio_user_batch *batch);

/* Wait for the answers: 0, or -EIO when the connection ended first or, at the deadline, was ended. */
int vfio_user_await(struct viommu_vfio_user *user, struct vfio_user_batch *batch, uint64_t deadline);

/* The server has no say any more: its connection is shut, and whoever waits for it is told. */
void vfio_user_cut(struct viommu_vfio_user *user, uint32_t cause);
/* Forget the server's side of the books: nothing sent will be answered. */
void vfio_user_forget(struct viommu_vfio_user *user, uint32_t state);

/* Have epoll look for what is needed of the server now. */
void vfio_user_watch_server(struct viommu_vfio_user *user, uint32_t events);

/* -------------------------------------------------------------------------- the view; all under the lock */

/* Number of pieces the mappings in [first, last] of the view have. */
uint32_t vfio_user_pieces(const struct viommu_vfio_user *user, const struct vfio_user_view *view, uint64_t first,
                          uint64_t last);

typedef void vfio_user_tell(struct viommu_vfio_user *user, const struct vfio_user_piece *piece,
                            struct vfio_user_batch *batch);

/* Tell the server about each of these pieces. */
void vfio_user_tell_pieces(struct viommu_vfio_user *user, uint64_t first, uint64_t last, vfio_user_tell *tell,
                           struct vfio_user_batch *batch);
/* The same for the pieces that lie in one range of memory. */
void vfio_user_tell_range(struct viommu_vfio_user *user, const struct vfio_user_range *range, vfio_user_tell *tell,
                          struct vfio_user_batch *batch);

/* ------------------------------------------------------------------------------------------ vfio_user_dma.c */

/*
 * Copy between data and the guest memory behind [iova, iova + length), access MAP_FLAG_READ (out of memory) or
 * MAP_FLAG_WRITE. 0 or a positive errno, then a fault was raised. The relay alone; takes the lock.
 */
int vfio_user_dma(struct viommu_vfio_user *user, uint32_t access, uint64_t iova, uint8_t *data, uint64_t length);

/* --------------------------------------------------------------------------------------- vfio_user_client.c */

/* Answer every request that waits for the server, which is cut off, with an error. Under the lock. */
int vfio_user_answer_all(struct viommu_vfio_user *user);

/* A message of the client: 0, or -errno when there can be no further one. The relay alone. */
int vfio_user_client_message(struct viommu_vfio_user *user, struct vfio_user_message *message);
/* Answer with an error, or with nothing if the request asked for no reply. */
int vfio_user_answer(struct viommu_vfio_user *user, const struct vfio_user_header *request, int error);
/* Answer the deferred requests that can be; the deadline of the next one, UINT64_MAX when none waits. */
int vfio_user_answer_deferred(struct viommu_vfio_user *user, uint64_t now, uint64_t *next);
void vfio_user_drop_deferred(struct viommu_vfio_user *user);

#endif
