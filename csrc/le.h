/* Little-endian fields of shared memory and messages. Unaligned access through memcpy, which compiles to one load. */
#ifndef VIOMMU_LE_H
#define VIOMMU_LE_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

static inline uint16_t le16_get(const uint8_t *at)
{
    uint16_t value;
    memcpy(&value, at, sizeof(value));
    return le16toh(value);
}

static inline uint32_t le32_get(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof(value));
    return le32toh(value);
}

static inline uint64_t le64_get(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof(value));
    return le64toh(value);
}

static inline void le16_put(uint8_t *at, uint16_t value)
{
    value = htole16(value);
    memcpy(at, &value, sizeof(value));
}

static inline void le32_put(uint8_t *at, uint32_t value)
{
    value = htole32(value);
    memcpy(at, &value, sizeof(value));
}

static inline void le64_put(uint8_t *at, uint64_t value)
{
    value = htole64(value);
    memcpy(at, &value, sizeof(value));
}

/* Ring indices and flags: aligned, shared with a driver that runs, so one untorn access with an order. */
static inline uint16_t shared16_get(const uint8_t *at, int order)
{
    return le16toh(__atomic_load_n((const uint16_t *)(const void *)at, order));
}

static inline void shared16_put(uint8_t *at, uint16_t value, int order)
{
    __atomic_store_n((uint16_t *)(void *)at, htole16(value), order);
}

#endif
