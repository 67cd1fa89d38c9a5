/*
 * viommu: the engine behind viommud, the whole of its C API.
 *
 * An engine is the virtio-iommu of one virtual machine: its guest memory, its two virtqueues, its endpoints and
 * domains, and one worker thread that serves requests. The worker is the data plane; every function here is called
 * by the control plane, from one thread at a time, and the ones that change what the worker sees stop it at a
 * request boundary first (quiesce). None of them is called by the worker.
 *
 * Conventions: opaque handles; 0 or a negative errno; results through out-parameters; range ends are inclusive;
 * file descriptors passed in are borrowed (the engine duplicates what it keeps). The only exceptions to the
 * one-thread rule are viommu_engine_fault(), which any thread may call, and viommu_engine_take_records(), which one
 * further thread may.
 *
 * What stands between the two cffi marks is read by cffi as well as by C: declarations and plain constants only.
 */
#ifndef VIOMMU_H
#define VIOMMU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#pragma GCC visibility push(default)
/* cffi: begin */

#define VIOMMU_ABI 2

#define VIOMMU_QUEUES 2
#define VIOMMU_REQUESTQ 0
#define VIOMMU_EVENTQ 1
#define VIOMMU_MAX_QUEUE_SIZE 1024

/* Wire layouts a driver may speak; there is no in-band version, so the user chooses (viommu_settings.personality). */
#define VIOMMU_PERSONALITY_1_X 0  /* the released specification */
#define VIOMMU_PERSONALITY_0_9 1  /* drivers of 2018 */
#define VIOMMU_PERSONALITY_0_5 2  /* drivers of 2017 */

/* Request types and status codes of the specification, as counted in viommu_stats. */
#define VIOMMU_REQUEST_TYPES 6    /* 0 counts every type that is not known */
#define VIOMMU_STATUS_CODES 9
#define VIOMMU_STATUS_UNANSWERED 9 /* the buffer went back unwritten, used length 0 */
#define VIOMMU_STATUSES 10

#define VIOMMU_TIME_BUCKETS 144  /* of service times: four to a power of two, up to 2^37 ns */

#define VIOMMU_ACCESS_READ 1
#define VIOMMU_ACCESS_WRITE 2

struct viommu_settings {
    uint64_t features;            /* virtio feature bits offered to the driver */
    uint64_t page_size_mask;      /* lowest bit: granularity of mappings, bytes */
    uint64_t input_first;         /* lowest and highest IOVA that can be mapped */
    uint64_t input_last;
    uint32_t domain_first;        /* lowest and highest domain ID */
    uint32_t domain_last;
    uint32_t probe_size;          /* bytes of PROBE properties */
    uint32_t personality;         /* VIOMMU_PERSONALITY_* */
    uint32_t bypass;              /* config.bypass at start: 0 or 1 */
    uint32_t max_endpoints;       /* endpoint objects that may exist at once */
    uint32_t max_domains;
    uint32_t max_faults;          /* fault reports waiting for a buffer of the guest */
    uint64_t max_mappings;        /* in all domains */
    uint64_t max_domain_mappings; /* in one domain */
    uint32_t fault_wait_ms;       /* a report older than this is dropped */
    uint32_t fault_burst;         /* reports one endpoint may raise at once ... */
    uint32_t fault_rate;          /* ... and per second after that */
    uint32_t spin_us;             /* longest polling of an empty ring before the worker sleeps; 0 never polls */
    uint32_t time_every;          /* one batch of requests in so many is timed; 0: none */
};

/* A region of an endpoint's IOVA space that cannot be mapped; subtype as in RESV_MEM (0 reserved, 1 MSI doorbell). */
struct viommu_reserved {
    uint64_t first;
    uint64_t last;
    uint32_t subtype;
};

/* One vring as the front-end described it. Addresses are the front-end's unless gpa is set. */
struct viommu_ring {
    uint32_t size;                /* entries */
    uint32_t base;                /* as in SET_VRING_BASE: avail index, or both packed indices with wrap bits */
    uint64_t desc;
    uint64_t avail;               /* packed: driver event area */
    uint64_t used;                /* packed: device event area */
    uint64_t log_addr;            /* guest-physical address that writes to the used ring are logged at (split) */
    bool gpa;
    bool logged;
    int kick;                     /* eventfds; call and err may be -1 */
    int call;
    int err;
};

/* What the worker has counted since the engine was made. Read without stopping it; each number is exact on its own. */
struct viommu_stats {
    uint64_t requests[VIOMMU_REQUEST_TYPES][VIOMMU_STATUSES];
    uint64_t endpoints;           /* attached now */
    uint64_t domains;
    uint64_t mappings;
    uint64_t peak_domains;
    uint64_t peak_mappings;
    uint64_t mapping_bytes;       /* memory behind the mappings of all domains */
    uint64_t limit_hits;          /* requests refused with NOMEM by a limit */
    uint64_t faults_sent;
    uint64_t faults_dropped;      /* no room, no buffer in time, or over the endpoint's rate */
    uint64_t rings_broken;
    uint64_t kicks;               /* wake-ups by an eventfd */
    uint64_t notifications;       /* interrupts asked for */
    uint64_t batches;
    uint64_t busy_ns;             /* serving, and polling that paid */
    uint64_t spin_ns;             /* polling in vain */
    uint64_t sleeps;
    uint64_t heartbeat;           /* changes whenever the worker makes a round */
    bool asleep;                  /* waiting for a kick, nothing to do */
};

#define VIOMMU_RECORD_REFUSED 1   /* a request was answered with an error or not at all */
#define VIOMMU_RECORD_BROKEN 2    /* a ring was stopped: code = VIOMMU_BROKEN_*, queue */
#define VIOMMU_RECORD_ATTACHED 3
#define VIOMMU_RECORD_DETACHED 4
#define VIOMMU_RECORD_FAULT 5     /* a report was given to the guest: code = reason, value = flags */
#define VIOMMU_RECORD_INJECTED 6  /* a request met an injection: value = VIOMMU_INJECT_* */

/* Something that happened in the worker, for logs and watchers. Lossy: a full ring drops records and counts them. */
struct viommu_record {
    uint32_t kind;
    uint32_t type;                /* request type, or queue index */
    uint32_t code;                /* status code or VIOMMU_STATUS_UNANSWERED; reason */
    uint32_t endpoint;
    uint32_t domain;
    uint32_t value;
    uint64_t first;               /* IOVA range of a MAP or UNMAP; address of a fault */
    uint64_t last;
};

/* Why a ring was stopped. */
#define VIOMMU_BROKEN_AVAIL 1     /* the available index is more than a ring ahead */
#define VIOMMU_BROKEN_HEAD 2      /* a descriptor index at or beyond the ring size */
#define VIOMMU_BROKEN_LOOP 3      /* a chain longer than the ring */
#define VIOMMU_BROKEN_ORDER 4     /* a writable descriptor before a readable one */
#define VIOMMU_BROKEN_INDIRECT 5  /* a bad use or size of an indirect table */
#define VIOMMU_BROKEN_ADDRESS 6   /* a buffer outside guest memory */
#define VIOMMU_BROKEN_LENGTH 7    /* a chain of more than 4 GiB */
#define VIOMMU_BROKEN_MEMORY 8    /* the file behind guest memory shrank under the mapping */

struct viommu_endpoint_info {
    uint32_t id;
    uint32_t domain;
    bool attached;
    bool bypass;                  /* reaches all guest memory now */
    uint64_t faults;
};

struct viommu_domain_info {
    uint32_t id;
    uint32_t endpoints;
    uint64_t mappings;
    bool bypass;
};

struct viommu_mapping_info {
    uint64_t first;
    uint64_t last;
    uint64_t phys;
    uint32_t flags;               /* READ 1, WRITE 2, MMIO 4 */
};

struct viommu_engine;
struct viommu_region;

unsigned viommu_abi_version(void);

/* An engine with its worker thread started and nothing to serve. -EINVAL for settings that contradict each other. */
int viommu_engine_new(const struct viommu_settings *settings, struct viommu_engine **out);
void viommu_engine_free(struct viommu_engine *engine);

/*
 * Endpoints first..last exist, each with these reserved regions (copied). -EEXIST when one is known already,
 * -EINVAL when regions overlap each other or cannot be told in probe_size bytes. Endpoint objects are made as the
 * guest names them, up to max_endpoints.
 */
int viommu_engine_add_endpoints(struct viommu_engine *engine, uint32_t first, uint32_t last,
                                const struct viommu_reserved *reserved, size_t count);

/* Guest memory: one mapping of a shared file. The region keeps its own duplicate of fd. */
int viommu_region_map(uint64_t gpa, uint64_t size, uint64_t user_addr, uint64_t offset, int fd,
                      struct viommu_region **out);
void viommu_region_free(struct viommu_region *region);

/*
 * The new guest memory, whole: the regions given and no others. The engine takes a reference on each. -EINVAL when
 * guest-physical ranges overlap. A running ring that no longer lies in memory is broken (VIOMMU_BROKEN_ADDRESS).
 */
int viommu_engine_set_memory(struct viommu_engine *engine, struct viommu_region *const *regions, size_t count);

/* Dirty logging of everything the engine writes to guest memory: a bitmap of 4 KiB pages. fd -1 takes it away. */
int viommu_engine_set_log(struct viommu_engine *engine, int fd, uint64_t size, uint64_t offset);
void viommu_engine_set_logging(struct viommu_engine *engine, bool on);

/* Feature bits the driver accepted. */
int viommu_engine_set_features(struct viommu_engine *engine, uint64_t features);

/*
 * -EFAULT: a ring address is in no region. -EINVAL: size, alignment or base. -EBUSY: the queue runs.
 * stop is 0 for a queue that does not run; *base then is what it last was.
 */
int viommu_queue_start(struct viommu_engine *engine, uint32_t queue, const struct viommu_ring *ring);
int viommu_queue_stop(struct viommu_engine *engine, uint32_t queue, uint32_t *base);
int viommu_queue_set_call(struct viommu_engine *engine, uint32_t queue, int fd);
int viommu_queue_set_err(struct viommu_engine *engine, uint32_t queue, int fd);
int viommu_queue_set_log(struct viommu_engine *engine, uint32_t queue, bool logged, uint64_t log_addr);

/* Whether the memory of this (stopped) ring shows that a device has used it: 1, 0, or -errno as for start. */
int viommu_queue_looks_used(struct viommu_engine *engine, const struct viommu_ring *ring);

/* Shared in-flight region of vhost-user: bytes needed, and the memory (fd -1 takes it away). */
uint64_t viommu_inflight_size(uint32_t queues, uint32_t queue_size);
int viommu_engine_set_inflight(struct viommu_engine *engine, int fd, uint64_t size, uint64_t offset,
                               uint32_t queues, uint32_t queue_size);

/* Device reset: every endpoint detached, every domain gone, waiting faults dropped; config.bypass stays. */
void viommu_engine_reset(struct viommu_engine *engine);

/* config.bypass: the value now, and a new one (0 or 1). */
bool viommu_engine_bypass(struct viommu_engine *engine);
int viommu_engine_set_bypass(struct viommu_engine *engine, bool bypass);

/* A ring is broken and the device wants a reset. */
bool viommu_engine_needs_reset(struct viommu_engine *engine);

/*
 * Raise a fault report for an endpoint. 0 when it was queued, -ENOENT for an endpoint that does not exist, -ENOBUFS
 * when too many wait (it is counted as dropped). Never blocks.
 */
int viommu_engine_fault(struct viommu_engine *engine, uint32_t endpoint, uint32_t reason, uint32_t flags,
                        uint64_t address);

void viommu_engine_stats(struct viommu_engine *engine, struct viommu_stats *out);

/* Readable when records wait; take gives up to max of them and the number lost since the last call. */
int viommu_engine_record_fd(struct viommu_engine *engine);
size_t viommu_engine_take_records(struct viommu_engine *engine, struct viommu_record *out, size_t max,
                                  uint64_t *lost);

/*
 * Pages of a listing, in order from an ID or address: up to max entries, and VIOMMU_PAGE at most. A page of endpoints
 * or domains looks once through the table of all, a page of mappings at no more than it gives.
 */
#define VIOMMU_PAGE 256
size_t viommu_engine_endpoints(struct viommu_engine *engine, uint32_t from, struct viommu_endpoint_info *out,
                               size_t max);
size_t viommu_engine_domains(struct viommu_engine *engine, uint32_t from, struct viommu_domain_info *out, size_t max);
/* -ENOENT for no such domain; else the number written. */
int64_t viommu_engine_mappings(struct viommu_engine *engine, uint32_t domain, uint64_t from,
                               struct viommu_mapping_info *out, size_t max);

/* Where an access of an endpoint goes: 0 and *gpa, -ENOENT no endpoint, -ENXIO unattached and blocked, -EFAULT. */
int viommu_engine_translate(struct viommu_engine *engine, uint32_t endpoint, uint64_t iova, uint32_t access,
                            uint64_t *gpa);

/* Limits anew; what exists stays, even above them. -EINVAL for a limit of 0. */
int viommu_engine_set_limits(struct viommu_engine *engine, uint32_t max_endpoints, uint32_t max_domains,
                             uint64_t max_mappings, uint64_t max_domain_mappings);

/* Serve no request until told to go on; what was taken is answered first. Faults are still reported. */
void viommu_engine_pause(struct viommu_engine *engine, bool paused);
bool viommu_engine_paused(struct viommu_engine *engine);

/*
 * Service times: from the worker's look at a batch of requests until its answers are visible, each request of the
 * batch counted with the whole. One batch in settings.time_every is timed. Bucket i < 4 counts i ns; bucket
 * i = 4p - 4 + q counts times from (4 + q) 2^(p-2) ns up to the next; the last takes everything longer.
 */
void viommu_engine_service_times(struct viommu_engine *engine, uint64_t counts[VIOMMU_TIME_BUCKETS],
                                 uint64_t *sum_ns);

/* Misbehaviour on demand: the next count requests that match are treated like this. */
#define VIOMMU_INJECT_DELAY 1     /* carried out, and answered delay_ns later, as is everything after them */
#define VIOMMU_INJECT_STATUS 2    /* not carried out, and answered with this status or VIOMMU_STATUS_UNANSWERED */
#define VIOMMU_INJECT_DROP 3      /* carried out, and never answered: the buffer is lost until the ring is reset */
#define VIOMMU_INJECT_HANG 4      /* the worker stops for good, as if it had a fault of its own */

#define VIOMMU_INJECTIONS 16      /* armed at once */
#define VIOMMU_INJECT_DELAY_MAX 600000000000

struct viommu_injection {
    uint32_t action;              /* VIOMMU_INJECT_* */
    uint32_t type;                /* request type; 0: any */
    uint32_t status;
    uint32_t endpoint;
    uint32_t domain;
    bool match_endpoint;          /* only requests that name this endpoint, or this domain */
    bool match_domain;
    uint64_t delay_ns;
    uint64_t count;
};

/* -EINVAL: a rule without sense; -ENOSPC: too many are armed. The first rule that matches is the one that counts. */
int viommu_engine_inject(struct viommu_engine *engine, const struct viommu_injection *rule);
/* Those still armed, count as it is now, oldest first; up to max of them. */
size_t viommu_engine_injections(struct viommu_engine *engine, struct viommu_injection *out, size_t max);
void viommu_engine_clear_injections(struct viommu_engine *engine);

#define VIOMMU_RECORDED_BYTES 72  /* of the readable part: no request is longer */
#define VIOMMU_RECORDED_RESET 0x80    /* not requests: what else changes the device */
#define VIOMMU_RECORDED_BYPASS 0x81   /* bytes[0]: config.bypass */
#define VIOMMU_RECORDED_FEATURES 0x82 /* bytes[0..7]: what the driver accepted, little endian */
#define VIOMMU_RECORDED_MEMORY 0x83   /* a region: first and last address, and le32 how many more of its table follow;
                                         readable 0: there is no memory */

/* One request as it came, and the status it was answered with. */
struct viommu_recorded {
    uint64_t time_ns;             /* CLOCK_MONOTONIC */
    uint64_t lost;                /* entries missing just before this one */
    uint32_t writable;            /* bytes for the answer */
    uint16_t readable;            /* of bytes[] */
    uint8_t kind;                 /* request type, 0 for one that is not known, or VIOMMU_RECORDED_* */
    uint8_t status;
    uint8_t bytes[VIOMMU_RECORDED_BYTES];
};

/* Record, or stop. -EALREADY. What was not taken when recording stops is lost. */
int viommu_engine_record(struct viommu_engine *engine, bool on);
/* Up to max entries, oldest first, and how many were lost after the newest so far. 0 when none is recorded. */
size_t viommu_engine_take_recorded(struct viommu_engine *engine, struct viommu_recorded *out, size_t max,
                                   uint64_t *lost);

/*
 * Play recorded entries to an engine that no front-end uses; statuses[i] is what entry i is answered with now.
 * -EINVAL for an entry that nothing could have recorded, or -errno; those before it have been played.
 */
int viommu_engine_play(struct viommu_engine *engine, const struct viommu_recorded *entries, size_t count,
                       uint8_t *statuses);

/*
 * Endpoints behind the host's IOMMU, through an iommufd that is shared with the machine monitor. Where the memory in
 * their domains comes from: the IOAS in which the monitor has all guest memory, so that no page is pinned twice, and
 * the files of guest memory when there is no such IOAS or more than one; or always the files.
 */
#define VIOMMU_IOMMUFD_FROM_MONITOR 0
#define VIOMMU_IOMMUFD_FROM_FILES 1

struct viommu_iommufd_info {
    uint32_t monitor_ioas;        /* ID of the monitor's IOAS; 0: not found, or not looked for */
    uint32_t unsettled;           /* devices that are not where they should be, since nobody has bound them yet */
    uint64_t bytes_from_monitor;  /* of guest memory taken over since the start, by where it came from */
    uint64_t bytes_from_files;
};

/*
 * The engine's iommufd; fd is duplicated. -EEXIST: it has one. -ENOTTY: fd is no iommufd. To be called before the
 * first endpoint is added to it.
 */
int viommu_engine_set_iommufd(struct viommu_engine *engine, int fd, uint32_t source);
/*
 * An endpoint whose device is this VFIO character device, bound by the monitor to the same iommufd now or later; fd
 * is duplicated. Otherwise as viommu_engine_add_endpoints(). -ENODEV: there is no iommufd.
 */
int viommu_engine_add_iommufd_endpoint(struct viommu_engine *engine, uint32_t endpoint, int fd,
                                       const struct viommu_reserved *reserved, size_t count);
/* The monitor shows that it has its devices: those that had to wait for it are put where they belong. */
void viommu_engine_settle_iommufd(struct viommu_engine *engine);
/* -ENODEV: there is no iommufd. */
int viommu_engine_iommufd_info(struct viommu_engine *engine, struct viommu_iommufd_info *out);

/*
 * An endpoint behind the host's IOMMU by a VFIO container of its own, whose IOMMU is TYPE1v2 and in which the device
 * is already; fd is duplicated. Otherwise as viommu_engine_add_endpoints(). -ENOTTY: fd is no such container.
 */
int viommu_engine_add_type1_endpoint(struct viommu_engine *engine, uint32_t endpoint, int fd,
                                     const struct viommu_reserved *reserved, size_t count);

/*
 * A vfio-user endpoint: a device in another process. The engine stands between its client (QEMU) and its server (the
 * process): it keeps the client's DMA_MAPs as the endpoint's guest-physical memory, and the server reaches what the
 * guest mapped. One relay thread per connection, beside the worker.
 */
#define VIOMMU_VFIO_USER_SHARED 0 /* the server is given the files of guest memory with each DMA_MAP */
#define VIOMMU_VFIO_USER_STRICT 1 /* it is given none: all its DMA goes through the engine */

#define VIOMMU_VFIO_USER_ABSENT 0 /* no client */
#define VIOMMU_VFIO_USER_UP 1
#define VIOMMU_VFIO_USER_FAILED 2 /* the server is cut off; the client is answered with errors */

/* Why a server was cut off. */
#define VIOMMU_VFIO_USER_GONE 1     /* it closed the connection */
#define VIOMMU_VFIO_USER_PROTOCOL 2 /* it sent what cannot be understood, or what no server may send */
#define VIOMMU_VFIO_USER_REFUSED 3  /* it answered DMA_MAP or DMA_UNMAP with an error */
#define VIOMMU_VFIO_USER_TIMEOUT 4  /* it did not answer DMA_UNMAP, or did not take messages, in time */
#define VIOMMU_VFIO_USER_SILENT 5   /* it did not answer a request of the client in time */
#define VIOMMU_VFIO_USER_LIMIT 6    /* memory changed, and it cannot hold the mappings that became of it */
#define VIOMMU_VFIO_USER_NOMEM 7    /* we had no memory for a message to it */

struct viommu_vfio_user_settings {
    uint32_t endpoint;
    uint32_t mode;                /* VIOMMU_VFIO_USER_SHARED or _STRICT */
    uint32_t timeout_ms;          /* for the server to give up a mapping; not 0 */
    uint32_t reply_timeout_ms;    /* for the server to answer a request of the client; 0: for ever */
    uint32_t spin_us;             /* polling of idle sockets after a message before the relay sleeps */
};

/* What client, engine and server agreed on when they exchanged VERSION. */
struct viommu_vfio_user_limits {
    uint32_t max_fds;             /* file descriptors in one message */
    uint32_t max_dma_maps;        /* that the server keeps at once */
    uint64_t max_transfer;        /* bytes of data in one message */
};

struct viommu_vfio_user_stats {
    uint64_t state;               /* VIOMMU_VFIO_USER_ABSENT ... */
    uint64_t cause;               /* why the server was cut off last; 0: never */
    uint64_t failures;            /* times it was */
    uint64_t connections;
    uint64_t requests;            /* of the client, passed on */
    uint64_t replies;             /* of the server, passed on */
    uint64_t errors;              /* of those, with the error flag */
    uint64_t answered;            /* requests of the client answered with an error by the engine */
    uint64_t strays;              /* replies that nobody had asked for */
    uint64_t maps;                /* DMA_MAPs sent to the server */
    uint64_t unmaps;
    uint64_t reads;               /* DMA_READs served */
    uint64_t read_bytes;
    uint64_t writes;
    uint64_t write_bytes;
    uint64_t refused;             /* DMA_READs and DMA_WRITEs refused */
    uint64_t memory_bytes;        /* guest memory the client shares now, and at most so far */
    uint64_t peak_memory_bytes;
    uint64_t reachable_bytes;     /* of it mapped for the endpoint now, and at most so far */
    uint64_t peak_reachable_bytes;
};

struct viommu_vfio_user;

/*
 * An endpoint with these reserved regions, and no client yet. It lives as long as the engine. -EEXIST, -EINVAL as
 * for viommu_engine_add_endpoints().
 */
int viommu_vfio_user_new(struct viommu_engine *engine, const struct viommu_vfio_user_settings *settings,
                         const struct viommu_reserved *reserved, size_t count, struct viommu_vfio_user **out);

/*
 * Relay between two connected sockets that have exchanged VERSION and nothing else. -EBUSY: the connection before
 * has not ended. -EINVAL: limits that cannot be worked with.
 */
int viommu_vfio_user_connect(struct viommu_vfio_user *user, int client_fd, int server_fd,
                             const struct viommu_vfio_user_limits *limits);
/* End the connection, if there is one. */
void viommu_vfio_user_disconnect(struct viommu_vfio_user *user);

/* An eventfd: written whenever the state changes. */
int viommu_vfio_user_event_fd(struct viommu_vfio_user *user);
void viommu_vfio_user_stats(struct viommu_vfio_user *user, struct viommu_vfio_user_stats *out);

/* cffi: end */
#pragma GCC visibility pop
#endif
