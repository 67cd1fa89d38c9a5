/*
 * A hash table from 32-bit IDs to pointers: domains and endpoints by the numbers the guest gives them. The caller
 * bounds how many there are. Looking up never allocates; the order of iteration is the order of IDs, found by a scan,
 * and meant for listings only.
 */
#ifndef VIOMMU_ID_TABLE_H
#define VIOMMU_ID_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct id_table {
    struct id_slot *slots; /* a power of two of them, linear probing */
    size_t capacity;
    size_t count;
};

void id_table_free(struct id_table *table);
void *id_table_get(const struct id_table *table, uint32_t id);
/* The ID is not in the table. 0 or -ENOMEM. */
int id_table_put(struct id_table *table, uint32_t id, void *value);
void id_table_remove(struct id_table *table, uint32_t id);
/*
 * Up to max entries in order of their IDs, at or above from: the lowest ones there are. One scan of the table, whatever
 * max is.
 */
struct id_entry {
    uint32_t id;
    void *value;
};
size_t id_table_page(const struct id_table *table, uint64_t from, struct id_entry *out, size_t max);

/* Any entry, by slot: start with *slot = 0; NULL at the end. Entries may not come or go meanwhile. */
void *id_table_each(const struct id_table *table, size_t *slot);

#endif
