/*
 * The DMA mappings a vfio-user client gave to a device: ranges of IOVA, never overlapping, each either a window into a
 * file of the client (mapped here) or a bare promise that DMA_READ and DMA_WRITE messages will be served.
 *
 * It also keeps the account that the tests are about: how many bytes the device could reach at most, and which pages
 * it did touch.
 */
#ifndef DMA_TABLE_H
#define DMA_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DMA_TABLE_MAX 65535u /* mappings; announced as max_dma_maps */

struct dma_mapping {
    uint64_t iova;
    uint64_t last;   /* inclusive */
    uint8_t *host;   /* NULL: only through messages */
    uint64_t key;    /* of the first page in the account of touched pages */
    bool readable;   /* by the device */
    bool writable;
};

struct dma_table;

struct dma_table *dma_table_new(void);
void dma_table_free(struct dma_table *table);

/*
 * Add [iova, iova + size). fd >= 0: that window of the file is mapped, fd stays the caller's. 0, -EINVAL (size 0, end
 * beyond 2^64, window not page aligned), -EEXIST (overlap), -ENOSPC (DMA_TABLE_MAX), or what mmap says.
 */
int dma_table_add(struct dma_table *table, uint64_t iova, uint64_t size, bool readable, bool writable, int fd,
                  uint64_t offset);

/* Remove every mapping inside [iova, iova + size): 0, -ENOENT (none), -EINVAL (one is cut; nothing was removed). */
int dma_table_remove(struct dma_table *table, uint64_t iova, uint64_t size);

void dma_table_clear(struct dma_table *table);

/* The mapping that holds iova, or NULL. Valid until the table changes. */
const struct dma_mapping *dma_table_find(const struct dma_table *table, uint64_t iova);

/* Note that the device accessed [iova, iova + length). mapping (may be NULL) holds it. */
void dma_table_touch(struct dma_table *table, const struct dma_mapping *mapping, uint64_t iova, uint64_t length);

/*
 * The device is used or not: what is mapped while nobody uses it (all of memory, before a guest set up translation)
 * says nothing about a driver's mappings, so there is a peak of its own for the time of use.
 */
void dma_table_set_in_use(struct dma_table *table, bool in_use);

struct dma_account {
    uint64_t mappings;        /* now */
    uint64_t mappings_peak;
    uint64_t reachable;       /* bytes, now */
    uint64_t reachable_peak;
    uint64_t in_use_peak;     /* bytes, while the device was in use */
    uint64_t touched;         /* distinct pages touched so far, in bytes; over all clients */
};

/* Pages of a file count by their place in the file, so a page seen at two IOVAs counts once; others by IOVA. */
struct dma_account dma_table_account(const struct dma_table *table);

#endif
