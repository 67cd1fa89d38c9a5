/*
 * What a hostile device process can try, so that tests can show what it gets. Each attempt prints one event with what
 * came of it.
 */
#ifndef ROGUE_H
#define ROGUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vfio_user_server.h"

#define ROGUE_BYTES 16u
#define ROGUE_FILES 16u

struct rogue {
    bool read;
    uint64_t read_iova;
    bool write;
    uint64_t write_iova;
    const char *scan;       /* look for this text in all of every file that came with a DMA_MAP */
    int files[ROGUE_FILES]; /* kept for the scan, one per file */
    size_t file_count;
};

/* Keep a descriptor of memory beyond what it was given for, if there is something to look for. */
void rogue_keep_fd(struct rogue *rogue, int fd);

/* Everything that was asked for. What the connection says: 0, -ECANCELED, -ECONNRESET or -EINTR. */
int rogue_run(struct rogue *rogue, struct vfu_server *server);

/* Read ROGUE_BYTES at iova, or write as many bytes of 0xa5: through a mapping if there is one, and by a message. */
int rogue_read(struct vfu_server *server, uint64_t iova);
int rogue_write(struct vfu_server *server, uint64_t iova);

#endif
