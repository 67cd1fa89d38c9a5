/* Physical Region Pages: the data pointer of a command (NVMe 1.4, section 4.3). */
#include <errno.h>
#include <string.h>

#include "le.h"
#include "nvme.h"

#define ENTRIES_PER_PAGE (NVME_PAGE / 8u)
/* One more page than the data has when it begins in the middle of one. */
#define MAX_SEGMENTS ((1u << NVME_MDTS) + 1u)

/* The data of one command: runs of IOVA, neighbours merged. */
struct segments {
    size_t count;
    struct {
        uint64_t iova;
        size_t length;
    } at[MAX_SEGMENTS];
};

int nvme_dma_status(int error)
{
    return error == -ECANCELED || error == -ECONNRESET || error == -EINTR ? error : NVME_DATA_TRANSFER_ERROR;
}

static void append(struct segments *segments, uint64_t iova, size_t length)
{
    size_t last = segments->count - 1;

    if (segments->count > 0 && segments->at[last].iova + segments->at[last].length == iova) {
        segments->at[last].length += length;
        return;
    }
    segments->at[segments->count].iova = iova;
    segments->at[segments->count++].length = length;
}

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* The pages named by the list at iova, and by the lists it chains to. */
static int walk_list(struct nvme *nvme, struct segments *segments, uint64_t iova, size_t rest)
{
    uint8_t list[NVME_PAGE];

    if (iova % 8 != 0)
        return NVME_INVALID_PRP_OFFSET;
    while (rest > 0) {
        size_t room = (NVME_PAGE - iova % NVME_PAGE) / 8;
        size_t wanted = (rest + NVME_PAGE - 1) / NVME_PAGE;
        size_t taken = smaller(room, wanted);
        size_t pages = wanted > room ? room - 1 : wanted; /* the last entry of a full page points to the next list */
        int error = vfu_dma_read(nvme->server, iova, list, taken * 8);

        if (error != 0)
            return nvme_dma_status(error);
        for (size_t i = 0; i < pages; i++) {
            uint64_t page = le64_get(list + 8 * i);
            size_t length = smaller(rest, NVME_PAGE);

            if (page % NVME_PAGE != 0)
                return NVME_INVALID_PRP_OFFSET;
            append(segments, page, length);
            rest -= length;
        }
        if (rest > 0) {
            iova = le64_get(list + 8 * (taken - 1));
            if (iova % NVME_PAGE != 0) /* so every list after the first has room for pages: the walk ends */
                return NVME_INVALID_PRP_OFFSET;
        }
    }
    return NVME_SUCCESS;
}

static int gather(struct nvme *nvme, const struct nvme_command *command, size_t length, struct segments *segments)
{
    size_t first = smaller(length, NVME_PAGE - command->prp1 % NVME_PAGE);

    segments->count = 0;
    if ((command->flags & 0xc0) != 0) /* an SGL */
        return NVME_INVALID_FIELD;
    if (command->prp1 % 4 != 0)
        return NVME_INVALID_PRP_OFFSET;
    append(segments, command->prp1, first);
    if (length == first)
        return NVME_SUCCESS;
    if (length - first > NVME_PAGE)
        return walk_list(nvme, segments, command->prp2, length - first);
    if (command->prp2 % NVME_PAGE != 0)
        return NVME_INVALID_PRP_OFFSET;
    append(segments, command->prp2, length - first);
    return NVME_SUCCESS;
}

static int transfer(struct nvme *nvme, const struct nvme_command *command, const uint8_t *from, uint8_t *into,
                    size_t length)
{
    struct segments segments;
    int status = gather(nvme, command, length, &segments);

    for (size_t i = 0; i < segments.count && status == NVME_SUCCESS; i++) {
        size_t part = segments.at[i].length;
        int error = from != NULL ? vfu_dma_write(nvme->server, segments.at[i].iova, from, part)
                                 : vfu_dma_read(nvme->server, segments.at[i].iova, into, part);

        if (error != 0)
            status = nvme_dma_status(error);
        if (from != NULL)
            from += part;
        else
            into += part;
    }
    return status;
}

int nvme_to_host(struct nvme *nvme, const struct nvme_command *command, const void *data, size_t length)
{
    return transfer(nvme, command, data, NULL, length);
}

int nvme_from_host(struct nvme *nvme, const struct nvme_command *command, void *data, size_t length)
{
    return transfer(nvme, command, NULL, data, length);
}
