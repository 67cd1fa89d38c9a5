#include "id_table.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct id_slot {
    void *value; /* NULL: empty */
    uint32_t id;
};

/* Fibonacci hashing: endpoint IDs are requester IDs and come in runs, domain IDs count from zero. */
static size_t home(const struct id_table *table, uint32_t id)
{
    return (size_t)(((uint64_t)id * 0x9e3779b97f4a7c15u) >> 32) & (table->capacity - 1);
}

void id_table_free(struct id_table *table)
{
    free(table->slots);
    *table = (struct id_table){0};
}

void *id_table_get(const struct id_table *table, uint32_t id)
{
    if (table->capacity == 0)
        return NULL;
    for (size_t i = home(table, id);; i = (i + 1) & (table->capacity - 1)) {
        if (table->slots[i].value == NULL)
            return NULL;
        if (table->slots[i].id == id)
            return table->slots[i].value;
    }
}

static void place(struct id_table *table, uint32_t id, void *value)
{
    size_t i = home(table, id);

    while (table->slots[i].value != NULL)
        i = (i + 1) & (table->capacity - 1);
    table->slots[i] = (struct id_slot){value, id};
}

int id_table_put(struct id_table *table, uint32_t id, void *value)
{
    if (table->count * 2 >= table->capacity) { /* at most half full */
        struct id_table larger = {.capacity = table->capacity == 0 ? 16 : table->capacity * 2, .count = table->count};

        larger.slots = calloc(larger.capacity, sizeof(larger.slots[0]));
        if (larger.slots == NULL)
            return -ENOMEM;
        for (size_t i = 0; i < table->capacity; i++) {
            if (table->slots[i].value != NULL)
                place(&larger, table->slots[i].id, table->slots[i].value);
        }
        free(table->slots);
        *table = larger;
    }
    place(table, id, value);
    table->count++;
    return 0;
}

void id_table_remove(struct id_table *table, uint32_t id)
{
    size_t mask = table->capacity - 1, hole;

    if (table->capacity == 0)
        return;
    for (hole = home(table, id); table->slots[hole].id != id || table->slots[hole].value == NULL;
         hole = (hole + 1) & mask) {
        if (table->slots[hole].value == NULL)
            return;
    }
    table->count--;
    /* Close the gap: move back every later entry of the run that may stand in the hole. */
    for (size_t i = (hole + 1) & mask; table->slots[i].value != NULL; i = (i + 1) & mask) {
        size_t want = home(table, table->slots[i].id);

        if (((i - want) & mask) >= ((i - hole) & mask)) {
            table->slots[hole] = table->slots[i];
            hole = i;
        }
    }
    table->slots[hole].value = NULL;
}

size_t id_table_page(const struct id_table *table, uint64_t from, struct id_entry *out, size_t max)
{
    size_t count = 0;

    for (size_t i = 0; i < table->capacity; i++) {
        const struct id_slot *slot = &table->slots[i];
        size_t low = 0, high = count;

        if (slot->value == NULL || slot->id < from || (count == max && (max == 0 || slot->id > out[max - 1].id)))
            continue;
        while (low < high) { /* where it belongs among those kept so far */
            size_t middle = low + (high - low) / 2;

            if (out[middle].id < slot->id)
                low = middle + 1;
            else
                high = middle;
        }
        if (count < max)
            count++;
        memmove(&out[low + 1], &out[low], (count - 1 - low) * sizeof(out[0]));
        out[low] = (struct id_entry){slot->id, slot->value};
    }
    return count;
}

void *id_table_each(const struct id_table *table, size_t *slot)
{
    while (*slot < table->capacity) {
        void *value = table->slots[(*slot)++].value;

        if (value != NULL)
            return value;
    }
    return NULL;
}
