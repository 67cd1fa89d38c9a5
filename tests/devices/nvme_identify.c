/* Identify (NVMe 1.4, section 5.15): who the controller and its namespace are. */
#include <stdio.h>
#include <string.h>

#include "le.h"
#include "nvme.h"

enum { IDENTIFY_NAMESPACE = 0, IDENTIFY_CONTROLLER = 1, IDENTIFY_ACTIVE = 2, IDENTIFY_DESCRIPTORS = 3 };

/* ASCII fields are padded by spaces. */
static void put_text(uint8_t *field, size_t size, const char *text)
{
    memset(field, ' ', size);
    memcpy(field, text, strnlen(text, size));
}

/* An EUI-64 from the serial number, so that two controllers of one machine differ (FNV-1a). */
static void put_eui64(uint8_t *field, const char *serial)
{
    uint64_t hash = 0xcbf29ce484222325u;

    for (; *serial != '\0'; serial++)
        hash = (hash ^ (uint8_t)*serial) * 0x100000001b3u;
    le64_put(field, hash);
    field[0] = 0x02; /* locally administered */
}

static void identify_controller(const struct nvme *nvme, uint8_t *data)
{
    le16_put(data, 0x1234); /* PCI vendor and subsystem vendor */
    le16_put(data + 2, 0x1234);
    put_text(data + 4, 20, nvme->serial);
    put_text(data + 24, 40, "viommud test NVMe");
    put_text(data + 64, 8, "1");
    data[77] = NVME_MDTS;
    le16_put(data + 78, 1);        /* controller ID */
    le32_put(data + 80, 0x010400); /* version */
    data[111] = 1;                 /* an I/O controller */
    data[258] = 3;                 /* Abort: 4 at once (0-based) */
    data[259] = NVME_EVENT_REQUESTS - 1;
    data[260] = 0x03;              /* one firmware slot, read only */
    le16_put(data + 266, 343);     /* temperatures, kelvin */
    le16_put(data + 268, 353);
    data[512] = 0x66;              /* queue entry sizes: 64 and 16 bytes */
    data[513] = 0x44;
    le32_put(data + 516, 1);       /* namespaces */
    data[525] = 1;                 /* a volatile write cache: the host sends Flush */
    snprintf((char *)data + 768, 256, "nqn.2014-08.org.nvmexpress:viommud:%s", nvme->serial);
    le16_put(data + 2048, 100);    /* power state 0: 1 W */
}

static void identify_namespace(const struct nvme *nvme, uint8_t *data)
{
    uint64_t blocks = nvme->medium_size >> NVME_BLOCK_SHIFT;

    le64_put(data, blocks);
    le64_put(data + 8, blocks);
    le64_put(data + 16, blocks);
    put_eui64(data + 120, nvme->serial);
    data[130] = NVME_BLOCK_SHIFT; /* LBA format 0 */
}

int nvme_identify(struct nvme *nvme, const struct nvme_command *command)
{
    uint8_t data[4096] = {0};

    switch (command->dw[10] & 0xff) {
    case IDENTIFY_CONTROLLER:
        identify_controller(nvme, data);
        break;
    case IDENTIFY_NAMESPACE:
        if (command->nsid != 1)
            return NVME_INVALID_NAMESPACE | NVME_DO_NOT_RETRY;
        identify_namespace(nvme, data);
        break;
    case IDENTIFY_ACTIVE:
        if (command->nsid >= 0xfffffffe)
            return NVME_INVALID_NAMESPACE | NVME_DO_NOT_RETRY;
        if (command->nsid == 0)
            le32_put(data, 1);
        break;
    case IDENTIFY_DESCRIPTORS:
        if (command->nsid != 1)
            return NVME_INVALID_NAMESPACE | NVME_DO_NOT_RETRY;
        data[0] = 1; /* EUI-64, 8 bytes */
        data[1] = 8;
        put_eui64(data + 4, nvme->serial);
        break;
    default:
        return NVME_INVALID_FIELD | NVME_DO_NOT_RETRY;
    }
    return nvme_to_host(nvme, command, data, sizeof(data));
}
