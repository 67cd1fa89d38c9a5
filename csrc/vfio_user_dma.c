/* DMA that a server asks for by message: translated, checked, and served from guest memory. */
#include <errno.h>

#include "counters.h"
#include "vfio_user.h"

/* Bytes copied before the worker may have the lock. */
#define DMA_STEP 65536u

/* What came of an access, or of a part of it. */
struct outcome {
    int error; /* positive errno; 0: served */
    enum fault_reason reason;
    uint64_t gpa;
    uint64_t length; /* of the part */
};

/* The first part of [iova, iova + length) that is one run of guest-physical addresses. */
static struct outcome translate(const struct viommu_vfio_user *user, uint32_t access, uint64_t iova, uint64_t length)
{
    struct outcome outcome = {.gpa = iova, .length = length};
    struct iova_mapping mapping;

    switch (user->view.reach) {
    case REACH_NOTHING:
        return (struct outcome){.error = EFAULT, .reason = FAULT_DOMAIN};
    case REACH_DOMAIN:
        if (!iova_map_find(user->view.domain->map, iova, &mapping))
            return (struct outcome){.error = EFAULT, .reason = FAULT_MAPPING};
        if ((access & ~mapping.flags) != 0)
            return (struct outcome){.error = EPERM, .reason = FAULT_MAPPING};
        if (mapping.last - iova < length - 1)
            outcome.length = mapping.last - iova + 1;
        outcome.gpa = mapping.phys + (iova - mapping.first);
        break;
    case REACH_MEMORY:
        break;
    }
    /* The IOMMU has no objection, but there is no memory, none that can be shared, or none to be written to. */
    if (!vfio_user_memory_allows(&user->memory, outcome.gpa, outcome.length, access))
        return (struct outcome){.error = EFAULT, .reason = FAULT_UNKNOWN};
    return outcome;
}

/* Serve, or only check (data NULL), a whole range. *at is where it failed. */
static struct outcome go_through(struct viommu_vfio_user *user, uint32_t access, uint64_t iova, uint8_t *data,
                                 uint64_t length, uint64_t *at)
{
    struct outcome outcome = {0};

    for (uint64_t done = 0; done < length && outcome.error == 0;) {
        uint64_t end = length - done < DMA_STEP ? length : done + DMA_STEP;

        (void)pthread_mutex_lock(&user->lock);
        while (done < end && outcome.error == 0) {
            *at = iova + done;
            outcome = translate(user, access, *at, end - done);
            if (outcome.error != 0)
                break;
            if (data != NULL && access == MAP_FLAG_READ)
                outcome.error =
                    -guest_memory_read(user->memory.table, outcome.gpa, data + done, (size_t)outcome.length);
            else if (data != NULL)
                outcome.error =
                    -guest_memory_write(user->memory.table, outcome.gpa, data + done, (size_t)outcome.length);
            done += outcome.length;
        }
        (void)pthread_mutex_unlock(&user->lock);
    }
    return outcome;
}

int vfio_user_dma(struct viommu_vfio_user *user, uint32_t access, uint64_t iova, uint8_t *data, uint64_t length)
{
    uint32_t flags = access == MAP_FLAG_READ ? FAULT_FLAG_READ : FAULT_FLAG_WRITE;
    struct outcome outcome;
    uint64_t at = iova, last;

    if (length == 0)
        return 0;
    if (__builtin_add_overflow(iova, length - 1, &last)) {
        outcome = (struct outcome){.error = EFAULT, .reason = FAULT_MAPPING};
    } else {
        /* Nothing is touched before all of it is known to be allowed; UNMAP may still cut it short. */
        outcome = go_through(user, access, iova, NULL, length, &at);
        if (outcome.error == 0)
            outcome = go_through(user, access, iova, data, length, &at);
    }
    if (outcome.error != 0) {
        count_add(&user->stats.refused, 1);
        user->faults.raise(user->faults.context, user->settings.endpoint, outcome.reason, flags | FAULT_FLAG_ADDRESS,
                           at);
        return outcome.error;
    }
    if (access == MAP_FLAG_READ) {
        count_add(&user->stats.reads, 1);
        count_add(&user->stats.read_bytes, length);
    } else {
        count_add(&user->stats.writes, 1);
        count_add(&user->stats.write_bytes, length);
    }
    return 0;
}
