#include "dma_table.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "page_set.h"

#define PAGE_SIZE 4096u
#define PAGE_SHIFT 12
/* Account keys: the number of a file above the page's number in it. File 0 stands for "known by IOVA only". */
#define FILE_SHIFT 52
#define MAX_FILES 256u

struct dma_table {
    struct dma_mapping *entries; /* by iova */
    size_t count;
    size_t capacity;
    struct {
        dev_t device;
        ino_t inode;
    } files[MAX_FILES];
    unsigned file_count;
    struct page_set touched;
    bool in_use;
    struct dma_account account;
};

struct dma_table *dma_table_new(void)
{
    return calloc(1, sizeof(struct dma_table));
}

void dma_table_free(struct dma_table *table)
{
    if (table == NULL)
        return;
    dma_table_clear(table);
    page_set_free(&table->touched);
    free(table->entries);
    free(table);
}

/* The index of the first mapping that ends at or after iova. */
static size_t lower_bound(const struct dma_table *table, uint64_t iova)
{
    size_t low = 0, high = table->count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if (table->entries[middle].last < iova)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static uint64_t size_of(const struct dma_mapping *mapping)
{
    return mapping->last - mapping->iova + 1;
}

static void raise_to(uint64_t *peak, uint64_t value)
{
    if (value > *peak)
        *peak = value;
}

static void update_peaks(struct dma_table *table)
{
    struct dma_account *account = &table->account;

    raise_to(&account->mappings_peak, account->mappings);
    raise_to(&account->reachable_peak, account->reachable);
    if (table->in_use)
        raise_to(&account->in_use_peak, account->reachable);
}

static int file_key(struct dma_table *table, int fd, uint64_t *key)
{
    struct stat st;
    unsigned i;

    if (fstat(fd, &st) < 0)
        return -errno;
    for (i = 0; i < table->file_count; i++)
        if (table->files[i].device == st.st_dev && table->files[i].inode == st.st_ino)
            break;
    if (i == table->file_count) {
        if (i == MAX_FILES - 1)
            return -ENFILE;
        table->files[i].device = st.st_dev;
        table->files[i].inode = st.st_ino;
        table->file_count++;
    }
    *key = (uint64_t)(i + 1) << FILE_SHIFT;
    return 0;
}

static int reserve(struct dma_table *table)
{
    size_t capacity = table->capacity == 0 ? 64 : table->capacity * 2;
    struct dma_mapping *entries;

    if (table->count < table->capacity)
        return 0;
    entries = realloc(table->entries, capacity * sizeof(*entries));
    if (entries == NULL)
        return -ENOMEM;
    table->entries = entries;
    table->capacity = capacity;
    return 0;
}

int dma_table_add(struct dma_table *table, uint64_t iova, uint64_t size, bool readable, bool writable, int fd,
                  uint64_t offset)
{
    struct dma_mapping mapping = {.iova = iova, .readable = readable, .writable = writable};
    size_t at;
    int error;

    if (size == 0 || size - 1 > UINT64_MAX - iova)
        return -EINVAL;
    mapping.last = iova + size - 1;
    at = lower_bound(table, iova);
    if (at < table->count && table->entries[at].iova <= mapping.last)
        return -EEXIST;
    if (table->count == DMA_TABLE_MAX)
        return -ENOSPC;
    error = reserve(table);
    if (error != 0)
        return error;
    mapping.key = iova >> PAGE_SHIFT;
    if (fd >= 0) {
        int protection = (readable ? PROT_READ : 0) | (writable ? PROT_WRITE : 0);
        void *host;

        if (offset % PAGE_SIZE != 0 || offset > INT64_MAX || size > SIZE_MAX)
            return -EINVAL;
        error = file_key(table, fd, &mapping.key);
        if (error != 0)
            return error;
        mapping.key += offset >> PAGE_SHIFT;
        host = mmap(NULL, size, protection, MAP_SHARED, fd, (off_t)offset);
        if (host == MAP_FAILED)
            return -errno;
        mapping.host = host;
    }
    memmove(&table->entries[at + 1], &table->entries[at], (table->count - at) * sizeof(mapping));
    table->entries[at] = mapping;
    table->count++;
    table->account.mappings = table->count;
    table->account.reachable += size;
    update_peaks(table);
    return 0;
}

void dma_table_set_in_use(struct dma_table *table, bool in_use)
{
    table->in_use = in_use;
    update_peaks(table);
}

static void remove_range(struct dma_table *table, size_t first, size_t end)
{
    for (size_t i = first; i < end; i++) {
        struct dma_mapping *mapping = &table->entries[i];

        table->account.reachable -= size_of(mapping);
        if (mapping->host != NULL)
            munmap(mapping->host, size_of(mapping));
    }
    memmove(&table->entries[first], &table->entries[end], (table->count - end) * sizeof(*table->entries));
    table->count -= end - first;
    table->account.mappings = table->count;
}

int dma_table_remove(struct dma_table *table, uint64_t iova, uint64_t size)
{
    size_t first, end;
    uint64_t last;

    if (size == 0 || size - 1 > UINT64_MAX - iova)
        return -EINVAL;
    last = iova + size - 1;
    first = lower_bound(table, iova);
    for (end = first; end < table->count && table->entries[end].iova <= last; end++)
        if (table->entries[end].iova < iova || table->entries[end].last > last)
            return -EINVAL;
    if (first == end)
        return -ENOENT;
    remove_range(table, first, end);
    return 0;
}

void dma_table_clear(struct dma_table *table)
{
    if (table->count > 0)
        remove_range(table, 0, table->count);
}

const struct dma_mapping *dma_table_find(const struct dma_table *table, uint64_t iova)
{
    size_t at = lower_bound(table, iova);

    return at < table->count && table->entries[at].iova <= iova ? &table->entries[at] : NULL;
}

void dma_table_touch(struct dma_table *table, const struct dma_mapping *mapping, uint64_t iova, uint64_t length)
{
    uint64_t base = mapping == NULL ? 0 : mapping->iova;
    uint64_t key = mapping == NULL ? 0 : mapping->key;

    if (length == 0)
        return;
    /* A mapping by IOVA keeps its key in pages too, so the same sum serves all three kinds. */
    for (uint64_t page = (iova - base) >> PAGE_SHIFT; page <= (iova - base + length - 1) >> PAGE_SHIFT; page++)
        page_set_add(&table->touched, key + page);
}

struct dma_account dma_table_account(const struct dma_table *table)
{
    struct dma_account account = table->account;

    account.touched = (uint64_t)table->touched.count * PAGE_SIZE;
    return account;
}
