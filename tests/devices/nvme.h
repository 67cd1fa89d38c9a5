/*
 * An NVMe 1.4 controller with one namespace of 512-byte blocks, as small as Linux's driver permits (NVM Express Base
 * Specification 1.4). The parts: nvme_controller (registers, queues), nvme_prp (data pointers), nvme_admin,
 * nvme_identify, nvme_io (commands), nvme (the program), rogue (its misbehaviour on demand).
 *
 * A command handler returns a status for the completion, or a negative number: there is no completion to post, because
 * the controller was reset, the client is gone or the command stays outstanding.
 */
#ifndef NVME_H
#define NVME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "rogue.h"
#include "vfio_user_server.h"

#define NVME_PAGE 4096u
#define NVME_BLOCK_SHIFT 9
#define NVME_IO_QUEUES 8u      /* pairs, at most */
#define NVME_QUEUE_ENTRIES 1024u
#define NVME_MDTS 9u           /* largest transfer: 2^9 pages, 2 MiB */
#define NVME_MAX_TRANSFER ((size_t)NVME_PAGE << NVME_MDTS)
#define NVME_EVENT_REQUESTS 4u /* outstanding Asynchronous Event Requests */
#define NVME_FEATURES 16u

#define NVME_BAR_SIZE 0x4000u
#define NVME_DOORBELLS 0x1000u
#define NVME_MSIX_TABLE 0x2000u
#define NVME_MSIX_PBA 0x3000u

enum nvme_status {
    NVME_SUCCESS = 0x000,
    NVME_INVALID_OPCODE = 0x001,
    NVME_INVALID_FIELD = 0x002,
    NVME_DATA_TRANSFER_ERROR = 0x004,
    NVME_INVALID_NAMESPACE = 0x00b,
    NVME_INVALID_PRP_OFFSET = 0x013,
    NVME_LBA_OUT_OF_RANGE = 0x080,
    NVME_INVALID_CQ = 0x100,
    NVME_INVALID_QID = 0x101,
    NVME_INVALID_QUEUE_SIZE = 0x102,
    NVME_EVENT_LIMIT = 0x105,
    NVME_INVALID_VECTOR = 0x108,
    NVME_INVALID_LOG_PAGE = 0x109,
    NVME_INVALID_QUEUE_DELETION = 0x10c,
    NVME_DO_NOT_RETRY = 0x4000,
};
enum { NVME_NO_COMPLETION = -1 };

struct nvme_sq {
    bool exists;
    uint64_t base;
    uint32_t size; /* entries */
    uint32_t head;
    uint32_t tail;
    uint16_t cq;
};

struct nvme_cq {
    bool exists;
    bool interrupts;
    bool phase;
    bool posted; /* something since the last interrupt */
    uint64_t base;
    uint32_t size;
    uint32_t head;
    uint32_t tail;
    uint16_t vector;
    unsigned users; /* submission queues */
};

/* A submission queue entry, decoded (figure 104). */
struct nvme_command {
    uint8_t opcode;
    uint8_t flags;
    uint16_t id;
    uint32_t nsid;
    uint64_t prp1;
    uint64_t prp2;
    uint32_t dw[16]; /* dw[10] to dw[15] are command specific */
    uint32_t result; /* for dword 0 of the completion */
};

struct nvme_options {
    uint64_t die_after;  /* exit in the middle of the data of this I/O command, counted from 1; 0: never */
    uint64_t mute_after; /* from this I/O command on answer nothing */
    uint64_t rogue_at;   /* misbehave before this I/O command */
};

struct nvme_counters {
    uint64_t reads, writes, flushes, admin, errors;
    uint64_t read_bytes, written_bytes;
};

struct nvme {
    struct vfu_server *server;
    struct nvme_options options;
    struct rogue rogue;
    struct nvme_counters counters;
    uint8_t *medium;
    size_t medium_size;
    bool medium_is_file;
    unsigned vectors; /* of MSI-X */
    char serial[21];
    uint64_t io_commands;

    uint8_t registers[0x40];
    uint32_t features[NVME_FEATURES];
    unsigned event_requests;
    struct nvme_sq sq[NVME_IO_QUEUES + 1]; /* 0: admin */
    struct nvme_cq cq[NVME_IO_QUEUES + 1];
};

/* nvme_controller.c */
extern const struct vfu_ops nvme_ops;
void nvme_sync_medium(struct nvme *nvme);

/* nvme_prp.c: move length bytes (at most NVME_MAX_TRANSFER) between data and what the command's PRPs describe. */
int nvme_to_host(struct nvme *nvme, const struct nvme_command *command, const void *data, size_t length);
int nvme_from_host(struct nvme *nvme, const struct nvme_command *command, void *data, size_t length);
/* What a failed DMA access means for its command: a status, or negative when nothing can be said any more. */
int nvme_dma_status(int error);

int nvme_admin_command(struct nvme *nvme, struct nvme_command *command);
int nvme_identify(struct nvme *nvme, const struct nvme_command *command);
int nvme_io_command(struct nvme *nvme, struct nvme_command *command);

#endif
