/* Commands of I/O queues (NVMe 1.4, section 6): Flush, Write, Read. */
#include <sys/mman.h>
#include <unistd.h>

#include "device_main.h"
#include "nvme.h"

enum { OPCODE_FLUSH = 0x00, OPCODE_WRITE = 0x01, OPCODE_READ = 0x02 };
enum { EXIT_AS_TOLD = 70 };

void nvme_sync_medium(struct nvme *nvme)
{
    if (nvme->medium_is_file)
        msync(nvme->medium, nvme->medium_size, MS_SYNC);
}

/* The part of the medium that Read and Write are about. */
static int medium_range(const struct nvme *nvme, const struct nvme_command *command, uint8_t **data, size_t *length)
{
    uint64_t first = command->dw[10] | (uint64_t)command->dw[11] << 32;
    uint64_t count = (command->dw[12] & 0xffff) + 1u;
    uint64_t blocks = nvme->medium_size >> NVME_BLOCK_SHIFT;

    if (count << NVME_BLOCK_SHIFT > NVME_MAX_TRANSFER)
        return NVME_INVALID_FIELD | NVME_DO_NOT_RETRY;
    if (first >= blocks || count > blocks - first)
        return NVME_LBA_OUT_OF_RANGE | NVME_DO_NOT_RETRY;
    *data = nvme->medium + (first << NVME_BLOCK_SHIFT);
    *length = (size_t)(count << NVME_BLOCK_SHIFT);
    return NVME_SUCCESS;
}

static int read_or_write(struct nvme *nvme, const struct nvme_command *command)
{
    uint8_t *data;
    size_t length;
    int status = medium_range(nvme, command, &data, &length);
    bool dying = nvme->io_commands == nvme->options.die_after;

    if (status != NVME_SUCCESS)
        return status;
    if (dying)
        length /= 2;
    status = command->opcode == OPCODE_READ ? nvme_to_host(nvme, command, data, length)
                                            : nvme_from_host(nvme, command, data, length);
    if (dying) {
        device_event("died", "\"io_command\":%llu", (unsigned long long)nvme->io_commands);
        _exit(EXIT_AS_TOLD);
    }
    if (status != NVME_SUCCESS)
        return status;
    if (command->opcode == OPCODE_READ) {
        nvme->counters.reads++;
        nvme->counters.read_bytes += length;
    } else {
        nvme->counters.writes++;
        nvme->counters.written_bytes += length;
    }
    return NVME_SUCCESS;
}

int nvme_io_command(struct nvme *nvme, struct nvme_command *command)
{
    nvme->io_commands++;
    if (nvme->io_commands == nvme->options.mute_after) {
        device_event("muted", "\"io_command\":%llu", (unsigned long long)nvme->io_commands);
        vfu_server_mute(nvme->server);
        return NVME_NO_COMPLETION;
    }
    if (nvme->io_commands == nvme->options.rogue_at) {
        int error = rogue_run(&nvme->rogue, nvme->server);

        if (error != 0)
            return error;
    }
    if ((command->flags & 0x03) != 0) /* fused */
        return NVME_INVALID_FIELD | NVME_DO_NOT_RETRY;
    if (command->nsid != 1 && !(command->opcode == OPCODE_FLUSH && command->nsid == UINT32_MAX))
        return NVME_INVALID_NAMESPACE | NVME_DO_NOT_RETRY;
    switch (command->opcode) {
    case OPCODE_FLUSH:
        nvme_sync_medium(nvme);
        nvme->counters.flushes++;
        return NVME_SUCCESS;
    case OPCODE_WRITE:
    case OPCODE_READ:
        return read_or_write(nvme, command);
    default:
        return NVME_INVALID_OPCODE | NVME_DO_NOT_RETRY;
    }
}
