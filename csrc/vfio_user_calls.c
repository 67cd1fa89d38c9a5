#include "vfio_user_calls.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define NONE VFIO_USER_IDS

int vfio_user_calls_init(struct vfio_user_calls *calls)
{
    memset(calls, 0, sizeof(*calls));
    calls->free = calls->oldest = calls->youngest = NONE;
    calls->calls = calloc(VFIO_USER_IDS, sizeof(*calls->calls));
    return calls->calls != NULL ? 0 : -ENOMEM;
}

void vfio_user_calls_fini(struct vfio_user_calls *calls)
{
    free(calls->calls);
    memset(calls, 0, sizeof(*calls));
}

static bool take(struct vfio_user_calls *calls, uint16_t *id)
{
    uint32_t index = calls->free;

    if (index != NONE)
        calls->free = calls->calls[index].next;
    else if (calls->used < VFIO_USER_IDS)
        index = calls->used++;
    else
        return false;
    memset(&calls->calls[index], 0, sizeof(calls->calls[index]));
    calls->calls[index].pending = true;
    calls->pending++;
    *id = (uint16_t)index;
    return true;
}

bool vfio_user_calls_own(struct vfio_user_calls *calls, uint16_t command, struct vfio_user_batch *batch, uint16_t *id)
{
    if (!take(calls, id))
        return false;
    calls->calls[*id].command = command;
    calls->calls[*id].batch = batch;
    if (batch != NULL)
        batch->outstanding++;
    return true;
}

bool vfio_user_calls_client(struct vfio_user_calls *calls, const struct vfio_user_header *request, uint64_t deadline,
                            uint16_t *id)
{
    struct vfio_user_call *call;

    if (!take(calls, id))
        return false;
    call = &calls->calls[*id];
    call->of_client = true;
    call->command = request->command;
    call->client_id = request->id;
    call->deadline = deadline;
    call->next = NONE;
    call->previous = calls->youngest;
    if (calls->youngest != NONE)
        calls->calls[calls->youngest].next = *id;
    else
        calls->oldest = *id;
    calls->youngest = *id;
    calls->of_client++;
    return true;
}

struct vfio_user_call *vfio_user_calls_find(struct vfio_user_calls *calls, uint16_t id)
{
    return id < calls->used && calls->calls[id].pending ? &calls->calls[id] : NULL;
}

void vfio_user_calls_release(struct vfio_user_calls *calls, uint16_t id)
{
    struct vfio_user_call *call = &calls->calls[id];

    if (call->of_client) {
        if (call->previous != NONE)
            calls->calls[call->previous].next = call->next;
        else
            calls->oldest = call->next;
        if (call->next != NONE)
            calls->calls[call->next].previous = call->previous;
        else
            calls->youngest = call->previous;
        calls->of_client--;
    }
    call->pending = false;
    call->next = calls->free;
    calls->free = id;
    calls->pending--;
}

struct vfio_user_call *vfio_user_calls_oldest(struct vfio_user_calls *calls, uint16_t *id)
{
    if (calls->oldest == NONE)
        return NULL;
    *id = (uint16_t)calls->oldest;
    return &calls->calls[calls->oldest];
}

void vfio_user_calls_fail_own(struct vfio_user_calls *calls)
{
    for (uint32_t id = 0; id < calls->used; id++) {
        struct vfio_user_call *call = &calls->calls[id];

        if (!call->pending || call->of_client)
            continue;
        if (call->batch != NULL) {
            call->batch->failed = true;
            call->batch->outstanding = 0;
        }
        vfio_user_calls_release(calls, (uint16_t)id);
    }
}
