#include "rogue.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "device_main.h"

static const char *hex(char *text, const uint8_t *bytes)
{
    for (size_t i = 0; i < ROGUE_BYTES; i++)
        snprintf(text + 2 * i, 3, "%02x", bytes[i]);
    return text;
}

static bool connection_over(int error)
{
    return error == -ECANCELED || error == -ECONNRESET || error == -EINTR;
}

/* Our own mapping of [iova, iova + ROGUE_BYTES), or NULL. */
static uint8_t *own_mapping(struct vfu_server *server, uint64_t iova)
{
    const struct dma_mapping *mapping = dma_table_find(vfu_server_dma(server), iova);

    return mapping != NULL && mapping->host != NULL && mapping->last - iova >= ROGUE_BYTES - 1
               ? mapping->host + (iova - mapping->iova)
               : NULL;
}

int rogue_read(struct vfu_server *server, uint64_t iova)
{
    uint8_t bytes[ROGUE_BYTES] = {0};
    char through_mapping[2 * ROGUE_BYTES + 1] = "", by_message[2 * ROGUE_BYTES + 1] = "";
    const uint8_t *mapped = own_mapping(server, iova);
    int error;

    if (mapped != NULL)
        hex(through_mapping, mapped);
    error = vfu_dma_read_message(server, iova, bytes, sizeof(bytes));
    if (error == 0)
        hex(by_message, bytes);
    device_event("rogue_read", "\"iova\":%" PRIu64 ",\"mapped\":%s,\"through_mapping\":\"%s\",\"by_message\":\"%s\","
                 "\"errno\":%d", iova, mapped != NULL ? "true" : "false", through_mapping, by_message, -error);
    return connection_over(error) ? error : 0;
}

int rogue_write(struct vfu_server *server, uint64_t iova)
{
    uint8_t bytes[ROGUE_BYTES];
    const struct dma_mapping *mapping = dma_table_find(vfu_server_dma(server), iova);
    uint8_t *mapped = own_mapping(server, iova);
    bool writable = mapped != NULL && mapping->writable; /* the page tables of this process agree */
    int error;

    memset(bytes, 0xa5, sizeof(bytes));
    if (writable)
        memcpy(mapped, bytes, sizeof(bytes));
    error = vfu_dma_write_message(server, iova, bytes, sizeof(bytes));
    device_event("rogue_write", "\"iova\":%" PRIu64 ",\"mapped\":%s,\"errno\":%d", iova, writable ? "true" : "false",
                 -error);
    return connection_over(error) ? error : 0;
}

void rogue_keep_fd(struct rogue *rogue, int fd)
{
    struct stat new_file, known;

    if (rogue->scan == NULL || rogue->file_count == ROGUE_FILES || fstat(fd, &new_file) < 0)
        return;
    for (size_t i = 0; i < rogue->file_count; i++)
        if (fstat(rogue->files[i], &known) == 0 && known.st_dev == new_file.st_dev && known.st_ino == new_file.st_ino)
            return;
    fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (fd >= 0)
        rogue->files[rogue->file_count++] = fd;
}

static void scan_files(const struct rogue *rogue)
{
    size_t length = strlen(rogue->scan), found = 0;
    uint64_t bytes = 0;

    for (size_t i = 0; i < rogue->file_count; i++) {
        struct stat st;
        uint8_t *all, *at;

        if (fstat(rogue->files[i], &st) < 0 || st.st_size <= 0)
            continue;
        all = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, rogue->files[i], 0);
        if (all == MAP_FAILED)
            continue;
        bytes += (uint64_t)st.st_size;
        for (at = all; (at = memmem(at, (size_t)(all + st.st_size - at), rogue->scan, length)) != NULL; at += length)
            found++;
        munmap(all, (size_t)st.st_size);
    }
    device_event("rogue_scan", "\"files\":%zu,\"bytes\":%" PRIu64 ",\"found\":%zu", rogue->file_count, bytes, found);
}

int rogue_run(struct rogue *rogue, struct vfu_server *server)
{
    int error = 0;

    if (rogue->scan != NULL)
        scan_files(rogue);
    if (rogue->read)
        error = rogue_read(server, rogue->read_iova);
    if (error == 0 && rogue->write)
        error = rogue_write(server, rogue->write_iova);
    return error;
}
