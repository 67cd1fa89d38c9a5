#include "page_set.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

static size_t slot_of(const uint64_t *slots, size_t capacity, uint64_t stored)
{
    size_t at = (size_t)((stored * 0x9e3779b97f4a7c15u) >> 32) & (capacity - 1);

    while (slots[at] != 0 && slots[at] != stored)
        at = (at + 1) & (capacity - 1);
    return at;
}

static void grow(struct page_set *set)
{
    size_t capacity = set->capacity == 0 ? 1024 : set->capacity * 2;
    uint64_t *slots = calloc(capacity, sizeof(*slots));

    if (slots == NULL) {
        fputs("page_set: out of memory\n", stderr);
        abort();
    }
    for (size_t i = 0; i < set->capacity; i++)
        if (set->slots[i] != 0)
            slots[slot_of(slots, capacity, set->slots[i])] = set->slots[i];
    free(set->slots);
    set->slots = slots;
    set->capacity = capacity;
}

void page_set_add(struct page_set *set, uint64_t page)
{
    size_t at;

    if (set->count * 4 >= set->capacity * 3)
        grow(set);
    at = slot_of(set->slots, set->capacity, page + 1);
    if (set->slots[at] == 0) {
        set->slots[at] = page + 1;
        set->count++;
    }
}

void page_set_free(struct page_set *set)
{
    free(set->slots);
    *set = (struct page_set){0};
}
