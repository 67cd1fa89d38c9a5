/* Registers, doorbells, queues and interrupts (NVMe 1.4, sections 3, 4.1 and 7.5). */
#include <errno.h>
#include <string.h>

#include "le.h"
#include "nvme.h"

enum { CAP = 0x00, VS = 0x08, INTMS = 0x0c, INTMC = 0x10, CC = 0x14, CSTS = 0x1c, AQA = 0x24, ASQ = 0x28, ACQ = 0x30 };
enum { CC_ENABLE = 1, CSTS_READY = 1, CSTS_FATAL = 2, CSTS_SHUTDOWN_DONE = 8 };
#define CC_SHUTDOWN 0xc000u
#define CC_PAGE_SIZE 0x0780u
#define SQ_ENTRY 64u
#define CQ_ENTRY 16u
/* Contiguous queues, timeout 20 * 500 ms, doorbell stride 4, NVM command set, 4 KiB pages. */
#define CAP_VALUE ((NVME_QUEUE_ENTRIES - 1u) | 1u << 16 | 20u << 24 | 1ull << 37)

static uint32_t get(const struct nvme *nvme, unsigned at)
{
    return le32_get(nvme->registers + at);
}

static void put(struct nvme *nvme, unsigned at, uint32_t value)
{
    le32_put(nvme->registers + at, value);
}

/* ---- interrupts ----------------------------------------------------------------------------------------------------- */

static void update_interrupts(struct nvme *nvme)
{
    bool msix = vfu_msix_enabled(nvme->server), level = false;

    for (unsigned i = 0; i <= NVME_IO_QUEUES; i++) {
        struct nvme_cq *cq = &nvme->cq[i];

        if (!cq->exists || !cq->interrupts)
            continue;
        if (msix && cq->posted)
            vfu_send_msix(nvme->server, cq->vector);
        cq->posted = false;
        level = level || cq->head != cq->tail;
    }
    vfu_set_intx(nvme->server, level && !msix && (get(nvme, INTMS) & 1) == 0);
}

/* ---- reset, enable, disable ------------------------------------------------------------------------------------------ */

static void drop_queues(struct nvme *nvme)
{
    memset(nvme->sq, 0, sizeof(nvme->sq));
    memset(nvme->cq, 0, sizeof(nvme->cq));
    nvme->event_requests = 0;
    put(nvme, CSTS, 0);
    put(nvme, INTMS, 0);
    put(nvme, INTMC, 0);
    if (nvme->server != NULL) /* not yet at start */
        vfu_set_intx(nvme->server, false);
}

static void nvme_reset(void *device)
{
    struct nvme *nvme = device;

    memset(nvme->registers, 0, sizeof(nvme->registers));
    memset(nvme->features, 0, sizeof(nvme->features));
    drop_queues(nvme);
    le64_put(nvme->registers + CAP, CAP_VALUE);
    put(nvme, VS, 0x00010400);
}

static void enable(struct nvme *nvme)
{
    uint32_t sq_size = (get(nvme, AQA) & 0xfff) + 1, cq_size = (get(nvme, AQA) >> 16 & 0xfff) + 1;
    uint64_t sq = le64_get(nvme->registers + ASQ), cq = le64_get(nvme->registers + ACQ);

    if (sq_size < 2 || cq_size < 2 || sq % NVME_PAGE != 0 || cq % NVME_PAGE != 0 || (get(nvme, CC) & CC_PAGE_SIZE)) {
        put(nvme, CSTS, CSTS_FATAL);
        return;
    }
    nvme->sq[0] = (struct nvme_sq){.exists = true, .base = sq, .size = sq_size};
    nvme->cq[0] = (struct nvme_cq){
        .exists = true, .interrupts = true, .phase = true, .base = cq, .size = cq_size, .users = 1};
    put(nvme, CSTS, CSTS_READY);
}

static void write_cc(struct nvme *nvme, uint32_t value)
{
    uint32_t before = get(nvme, CC);

    put(nvme, CC, value);
    if ((before & CC_ENABLE) != 0 && (value & CC_ENABLE) == 0) {
        vfu_server_cancel(nvme->server);
        drop_queues(nvme);
    } else if ((before & CC_ENABLE) == 0 && (value & CC_ENABLE) != 0) {
        enable(nvme);
    }
    if ((value & CC_SHUTDOWN) != 0 && (before & CC_SHUTDOWN) == 0) {
        nvme_sync_medium(nvme);
        put(nvme, CSTS, get(nvme, CSTS) | CSTS_SHUTDOWN_DONE);
    }
}

/* ---- registers --------------------------------------------------------------------------------------------------------- */

static void ring_doorbell(struct nvme *nvme, uint64_t index, uint32_t value)
{
    uint64_t queue = index / 2;

    if (queue > NVME_IO_QUEUES)
        return;
    /* A value outside the queue, or for no queue, changes nothing. */
    if (index % 2 == 0 && nvme->sq[queue].exists && value < nvme->sq[queue].size)
        nvme->sq[queue].tail = value;
    else if (index % 2 == 1 && nvme->cq[queue].exists && value < nvme->cq[queue].size)
        nvme->cq[queue].head = value;
    update_interrupts(nvme);
}

static int nvme_register_read(void *device, uint64_t offset, void *data, size_t length)
{
    const struct nvme *nvme = device;

    if (offset < sizeof(nvme->registers) && length <= sizeof(nvme->registers) - offset)
        memcpy(data, nvme->registers + offset, length);
    return 0;
}

static int nvme_register_write(void *device, uint64_t offset, const void *data, size_t length)
{
    struct nvme *nvme = device;
    uint32_t value;

    if (offset >= NVME_MSIX_TABLE)
        return 0; /* MSI-X table and pending bits are played by the client */
    if (offset % 4 != 0 || (length != 4 && (length != 8 || (offset != ASQ && offset != ACQ))))
        return -EINVAL;
    if (offset >= AQA && offset < ACQ + 8) {
        if ((get(nvme, CC) & CC_ENABLE) == 0)
            memcpy(nvme->registers + offset, data, length);
        return 0;
    }
    value = le32_get(data);
    if (offset >= NVME_DOORBELLS) {
        ring_doorbell(nvme, (offset - NVME_DOORBELLS) / 4, value);
    } else if (offset == CC) {
        write_cc(nvme, value);
    } else if (offset == INTMS || offset == INTMC) {
        uint32_t masked = offset == INTMS ? get(nvme, INTMS) | value : get(nvme, INTMS) & ~value;

        put(nvme, INTMS, masked);
        put(nvme, INTMC, masked);
        update_interrupts(nvme);
    }
    return 0;
}

/* ---- commands ------------------------------------------------------------------------------------------------------------ */

static bool full(const struct nvme_cq *cq)
{
    return (cq->tail + 1) % cq->size == cq->head;
}

/* 0 or a negative number when the controller is no longer what it was. */
static int complete(struct nvme *nvme, const struct nvme_sq *sq, uint16_t sq_id, const struct nvme_command *command,
                    int status)
{
    struct nvme_cq *cq = &nvme->cq[sq->cq];
    uint32_t state = (uint32_t)status << 1 | (cq->phase ? 1u : 0u);
    uint8_t entry[CQ_ENTRY] = {0};
    int error;

    le32_put(entry, command->result);
    le16_put(entry + 8, (uint16_t)sq->head);
    le16_put(entry + 10, sq_id);
    le32_put(entry + 12, command->id | state << 16);
    error = vfu_dma_write(nvme->server, cq->base + cq->tail * CQ_ENTRY, entry, sizeof(entry));
    if (error != 0)
        return error;
    cq->tail = (cq->tail + 1) % cq->size;
    cq->phase = cq->tail == 0 ? !cq->phase : cq->phase;
    cq->posted = true;
    if (status != NVME_SUCCESS)
        nvme->counters.errors++;
    return 0;
}

static int fetch(struct nvme *nvme, const struct nvme_sq *sq, struct nvme_command *command)
{
    uint8_t entry[SQ_ENTRY];
    int error = vfu_dma_read(nvme->server, sq->base + sq->head * SQ_ENTRY, entry, sizeof(entry));

    if (error != 0)
        return error;
    for (unsigned i = 0; i < 16; i++)
        command->dw[i] = le32_get(entry + 4 * i);
    command->opcode = entry[0];
    command->flags = entry[1];
    command->id = le16_get(entry + 2);
    command->nsid = command->dw[1];
    command->prp1 = le64_get(entry + 24);
    command->prp2 = le64_get(entry + 32);
    command->result = 0;
    return 0;
}

/* One command of a queue that has one. 0 or negative. */
static int execute_next(struct nvme *nvme, uint16_t sq_id)
{
    struct nvme_sq *sq = &nvme->sq[sq_id];
    struct nvme_command command;
    int status = fetch(nvme, sq, &command);

    if (status != 0)
        return status;
    sq->head = (sq->head + 1) % sq->size;
    status = sq_id == 0 ? nvme_admin_command(nvme, &command) : nvme_io_command(nvme, &command);
    if (status == NVME_NO_COMPLETION)
        return 0;
    return status < 0 ? status : complete(nvme, sq, sq_id, &command, status);
}

static bool has_work(const struct nvme *nvme, unsigned sq_id)
{
    const struct nvme_sq *sq = &nvme->sq[sq_id];

    return sq->exists && sq->head != sq->tail && !full(&nvme->cq[sq->cq]);
}

static void nvme_work(void *device)
{
    struct nvme *nvme = device;
    bool worked;

    do {
        worked = false;
        for (uint16_t i = 0; i <= NVME_IO_QUEUES && (get(nvme, CSTS) & CSTS_READY) != 0; i++) {
            int error = 0;

            while (error == 0 && has_work(nvme, i)) {
                error = execute_next(nvme, i);
                worked = true;
            }
            if (error == -ECANCELED || error == -ECONNRESET || error == -EINTR)
                return;
            if (error != 0) /* a queue itself cannot be reached */
                put(nvme, CSTS, (get(nvme, CSTS) & ~(uint32_t)CSTS_READY) | CSTS_FATAL);
        }
        update_interrupts(nvme);
    } while (worked);
}

static void nvme_memory_fd(void *device, int fd)
{
    struct nvme *nvme = device;

    rogue_keep_fd(&nvme->rogue, fd);
}

const struct vfu_ops nvme_ops = {
    .read = nvme_register_read,
    .write = nvme_register_write,
    .reset = nvme_reset,
    .work = nvme_work,
    .memory_fd = nvme_memory_fd,
};
