/* The table of IDs: against an array that is too simple to be wrong, with IDs that crowd into few slots. */
#include "id_table.h"

#include <string.h>

#include "check.h"

#define IDS 512u

/* IDs near each other, far apart, at both ends of the 32 bits, and a set that shares one home slot. */
static uint32_t id_of(uint32_t index, unsigned kind)
{
    switch (kind) {
    case 0:
        return index;
    case 1:
        return UINT32_MAX - index;
    case 2:
        return index * 0x01000193u;
    default: { /* every one at home in slot 0 of a table of up to 4096 slots */
        static uint32_t crowded[IDS];
        static uint32_t found;

        for (uint32_t id = found == 0 ? 0 : crowded[found - 1] + 1; found <= index; id++) {
            if (((uint64_t)id * 0x9e3779b97f4a7c15u >> 32 & 4095) == 0)
                crowded[found++] = id;
        }
        return crowded[index];
    }
    }
}

/* Puts, removals and look-ups in random order agree with a model, also when every ID is at home in one slot. */
static void test_random_against_model(void)
{
    for (unsigned kind = 0; kind < 4; kind++) {
        struct id_table table = {0};
        uint8_t values[IDS];
        bool present[IDS] = {false};
        uint64_t state = 1 + kind;
        size_t count = 0;

        for (unsigned step = 0; step < 40000; step++) {
            uint32_t index = (uint32_t)(check_random(&state) % IDS);
            uint32_t id = id_of(index, kind);

            CHECK(id_table_get(&table, id) == (present[index] ? &values[index] : NULL));
            if (present[index]) {
                id_table_remove(&table, id);
                count--;
            } else {
                if (check_random(&state) % 4 == 0) {
                    id_table_remove(&table, id); /* of an ID that is not there: nothing happens */
                    CHECK_EQ(table.count, count);
                }
                CHECK_EQ(id_table_put(&table, id, &values[index]), 0);
                count++;
            }
            present[index] = !present[index];
            CHECK_EQ(table.count, count);
            if (step % 1000 == 0) {
                for (uint32_t i = 0; i < IDS; i++)
                    CHECK(id_table_get(&table, id_of(i, kind)) == (present[i] ? &values[i] : NULL));
            }
        }
        id_table_free(&table);
        CHECK(id_table_get(&table, 1) == NULL);
    }
}

/* A page has the lowest IDs from any start on, in order, to the last possible ID; each() meets every entry once. */
static void test_order(void)
{
    static const uint32_t ids[] = {UINT32_MAX, 7, 0, 0x80000000u, 8, UINT32_MAX - 1};
    static const uint32_t sorted[] = {0, 7, 8, 0x80000000u, UINT32_MAX - 1, UINT32_MAX};
    struct id_table table = {0};
    struct id_entry page[7];
    size_t seen = 0;

    CHECK_EQ(id_table_page(&table, 0, page, 7), 0);
    id_table_remove(&table, 5);
    for (size_t i = 0; i < sizeof(ids) / sizeof(ids[0]); i++)
        CHECK_EQ(id_table_put(&table, ids[i], (void *)(uintptr_t)&ids[i]), 0);
    for (size_t first = 0; first <= 6; first++) {
        uint64_t from = first == 6 ? (uint64_t)UINT32_MAX + 1 : sorted[first];

        for (size_t max = 0; max <= 7; max++) {
            size_t left = 6 - first, count = id_table_page(&table, from, page, max);

            CHECK_EQ(count, left < max ? left : max);
            for (size_t i = 0; i < count; i++) {
                CHECK_EQ(page[i].id, sorted[first + i]);
                CHECK_EQ(*(const uint32_t *)page[i].value, sorted[first + i]);
            }
        }
    }
    for (size_t slot = 0; id_table_each(&table, &slot) != NULL;)
        seen++;
    CHECK_EQ(seen, 6);
    id_table_free(&table);
}

int main(void)
{
    RUN(test_random_against_model);
    RUN(test_order);
    return 0;
}
