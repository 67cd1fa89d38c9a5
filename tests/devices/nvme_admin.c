/* Commands of the admin queue (NVMe 1.4, section 5). */
#include <string.h>

#include "le.h"
#include "nvme.h"

enum {
    OPCODE_DELETE_SQ = 0x00,
    OPCODE_CREATE_SQ = 0x01,
    OPCODE_GET_LOG_PAGE = 0x02,
    OPCODE_DELETE_CQ = 0x04,
    OPCODE_CREATE_CQ = 0x05,
    OPCODE_IDENTIFY = 0x06,
    OPCODE_ABORT = 0x08,
    OPCODE_SET_FEATURES = 0x09,
    OPCODE_GET_FEATURES = 0x0a,
    OPCODE_EVENT_REQUEST = 0x0c,
    OPCODE_ROGUE = 0xc0, /* vendor specific, no data: dw10, dw11 an IOVA; dw12 0 read it, 1 write it */
};
enum { LOG_ERRORS = 1, LOG_HEALTH = 2, LOG_FIRMWARE = 3 };
enum { FEATURE_QUEUES = 7 };
/* Those that hold one dword and do nothing here: arbitration, power, temperature, error recovery, write cache,
 * interrupt coalescing and vector, write atomicity, asynchronous events. */
#define PLAIN_FEATURES 0x0f76u

static int create_cq(struct nvme *nvme, const struct nvme_command *command)
{
    uint32_t id = command->dw[10] & 0xffff, size = (command->dw[10] >> 16) + 1;
    uint32_t flags = command->dw[11] & 0xffff, vector = command->dw[11] >> 16;

    if (id == 0 || id > NVME_IO_QUEUES || nvme->cq[id].exists)
        return NVME_INVALID_QID | NVME_DO_NOT_RETRY;
    if (size < 2 || size > NVME_QUEUE_ENTRIES)
        return NVME_INVALID_QUEUE_SIZE | NVME_DO_NOT_RETRY;
    if ((flags & 1) == 0 || command->prp1 % NVME_PAGE != 0) /* contiguous queues only, as CAP says */
        return NVME_INVALID_FIELD | NVME_DO_NOT_RETRY;
    if (vector != 0 && vector >= nvme->vectors)
        return NVME_INVALID_VECTOR | NVME_DO_NOT_RETRY;
    nvme->cq[id] = (struct nvme_cq){.exists = true,
                                    .interrupts = (flags & 2) != 0,
                                    .phase = true,
                                    .base = command->prp1,
                                    .size = size,
                                    .vector = (uint16_t)vector};
    return NVME_SUCCESS;
}

static int create_sq(struct nvme *nvme, const struct nvme_command *command)
{
    uint32_t id = command->dw[10] & 0xffff, size = (command->dw[10] >> 16) + 1;
    uint32_t cq = command->dw[11] >> 16;

    if (id == 0 || id > NVME_IO_QUEUES || nvme->sq[id].exists)
        return NVME_INVALID_QID | NVME_DO_NOT_RETRY;
    if (cq == 0 || cq > NVME_IO_QUEUES || !nvme->cq[cq].exists)
        return NVME_INVALID_CQ | NVME_DO_NOT_RETRY;
    if (size < 2 || size > NVME_QUEUE_ENTRIES)
        return NVME_INVALID_QUEUE_SIZE | NVME_DO_NOT_RETRY;
    if ((command->dw[11] & 1) == 0 || command->prp1 % NVME_PAGE != 0)
        return NVME_INVALID_FIELD | NVME_DO_NOT_RETRY;
    nvme->sq[id] = (struct nvme_sq){.exists = true, .base = command->prp1, .size = size, .cq = (uint16_t)cq};
    nvme->cq[cq].users++;
    return NVME_SUCCESS;
}

static int delete_sq(struct nvme *nvme, const struct nvme_command *command)
{
    uint32_t id = command->dw[10] & 0xffff;

    if (id == 0 || id > NVME_IO_QUEUES || !nvme->sq[id].exists)
        return NVME_INVALID_QID | NVME_DO_NOT_RETRY;
    nvme->cq[nvme->sq[id].cq].users--;
    nvme->sq[id] = (struct nvme_sq){0};
    return NVME_SUCCESS;
}

static int delete_cq(struct nvme *nvme, const struct nvme_command *command)
{
    uint32_t id = command->dw[10] & 0xffff;

    if (id == 0 || id > NVME_IO_QUEUES || !nvme->cq[id].exists)
        return NVME_INVALID_QID | NVME_DO_NOT_RETRY;
    if (nvme->cq[id].users > 0)
        return NVME_INVALID_QUEUE_DELETION | NVME_DO_NOT_RETRY;
    nvme->cq[id] = (struct nvme_cq){0};
    return NVME_SUCCESS;
}

static int get_log_page(struct nvme *nvme, const struct nvme_command *command)
{
    uint8_t data[NVME_PAGE] = {0};
    uint64_t offset = command->dw[12] | (uint64_t)command->dw[13] << 32;
    uint64_t length = 4 * (1 + ((uint64_t)(command->dw[11] & 0xffff) << 16 | command->dw[10] >> 16));

    switch (command->dw[10] & 0xff) {
    case LOG_HEALTH:
        le16_put(data + 1, 300); /* kelvin */
        data[3] = 100;           /* percent of spare */
        data[4] = 10;
        le64_put(data + 32, nvme->counters.read_bytes / 512000);
        le64_put(data + 48, nvme->counters.written_bytes / 512000);
        le64_put(data + 64, nvme->counters.reads);
        le64_put(data + 80, nvme->counters.writes);
        break;
    case LOG_FIRMWARE:
        data[0] = 1;
        memcpy(data + 8, "1       ", 8);
        break;
    case LOG_ERRORS:
        break;
    default:
        return NVME_INVALID_LOG_PAGE | NVME_DO_NOT_RETRY;
    }
    if (length > sizeof(data) || offset > sizeof(data) - length)
        return NVME_INVALID_FIELD | NVME_DO_NOT_RETRY;
    return nvme_to_host(nvme, command, data + offset, (size_t)length);
}

static int features(struct nvme *nvme, struct nvme_command *command)
{
    uint32_t id = command->dw[10] & 0xff;

    if (id == FEATURE_QUEUES) {
        command->result = (NVME_IO_QUEUES - 1) << 16 | (NVME_IO_QUEUES - 1);
        return NVME_SUCCESS;
    }
    if (id >= NVME_FEATURES || (PLAIN_FEATURES >> id & 1) == 0)
        return NVME_INVALID_FIELD | NVME_DO_NOT_RETRY;
    if (command->opcode == OPCODE_SET_FEATURES)
        nvme->features[id] = command->dw[11];
    else
        command->result = nvme->features[id];
    return NVME_SUCCESS;
}

static int rogue_command(struct nvme *nvme, const struct nvme_command *command)
{
    uint64_t iova = command->dw[10] | (uint64_t)command->dw[11] << 32;

    return command->dw[12] == 0 ? rogue_read(nvme->server, iova) : rogue_write(nvme->server, iova);
}

int nvme_admin_command(struct nvme *nvme, struct nvme_command *command)
{
    nvme->counters.admin++;
    switch (command->opcode) {
    case OPCODE_IDENTIFY:
        return nvme_identify(nvme, command);
    case OPCODE_CREATE_CQ:
        return create_cq(nvme, command);
    case OPCODE_CREATE_SQ:
        return create_sq(nvme, command);
    case OPCODE_DELETE_SQ:
        return delete_sq(nvme, command);
    case OPCODE_DELETE_CQ:
        return delete_cq(nvme, command);
    case OPCODE_GET_LOG_PAGE:
        return get_log_page(nvme, command);
    case OPCODE_SET_FEATURES:
    case OPCODE_GET_FEATURES:
        return features(nvme, command);
    case OPCODE_ABORT:
        command->result = 1; /* not aborted: commands are done in the order they come */
        return NVME_SUCCESS;
    case OPCODE_EVENT_REQUEST:
        if (nvme->event_requests == NVME_EVENT_REQUESTS)
            return NVME_EVENT_LIMIT | NVME_DO_NOT_RETRY;
        nvme->event_requests++; /* outstanding until a reset: there are no events */
        return NVME_NO_COMPLETION;
    case OPCODE_ROGUE:
        return rogue_command(nvme, command);
    default:
        return NVME_INVALID_OPCODE | NVME_DO_NOT_RETRY;
    }
}
