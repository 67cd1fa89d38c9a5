/*
 * A guest that rewrites descriptors, indirect tables and requests while they are served, on every kind of ring.
 *
 * Two guests. The careful one leaves the books of its rings alone and changes what they lead to, one word at a time
 * and back and forth between values that are all good for something: whatever the engine happened to read, its answer
 * has to be one answer: as many bytes written as the used length says, in one place, each of them meant, and a status
 * that is true of what it did. Reading anything twice shows as an answer in two parts, or as a mapping that no request
 * could have made. The wild one flips bits anywhere in its memory, rings and indices included; the engine has to
 * live, to stop a ring only for a reason, and to serve a guest again that begins anew.
 */
#include "machine.h"

#define BASIC (TEST_FEATURES & ~(VIRTIO_F_RING_PACKED | VIRTIO_RING_F_EVENT_IDX | VIRTIO_RING_F_INDIRECT_DESC | \
                                 VIRTIO_F_IN_ORDER | VIRTIO_IOMMU_F_MMIO))

static const uint64_t kinds[] = {
    BASIC,
    BASIC | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX,
    BASIC | VIRTIO_F_RING_PACKED,
    BASIC | VIRTIO_F_RING_PACKED | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX,
};
#define KINDS (sizeof(kinds) / sizeof(kinds[0]))

#define SIZE 64u        /* of the rings; a multiple of PIECES */
#define PIECES 4u       /* of a request: its head, its rest, properties, tail */
#define POISON 0xa5

/*
 * A slot holds all that a request consists of, twice: TWIN apart, so that one bit of an address leads from one to the
 * other. Only one descriptor in front is ever the first of a chain, and no two share a length that another may have.
 */
#define SLOT 4096u
#define TWIN 2048u
#define BODY_AT 0u
#define TABLE_AT 256u
#define PROPERTIES_AT 512u
#define TAIL_AT 1280u
#define HEAD_LENGTH 4u
#define REST_LENGTH 32u
#define PROPERTIES_LENGTH 512u
#define TAIL_LENGTH 4u

struct attack {
    struct machine machine;
    uint64_t slots;        /* the same at every beginning, as is all that the mutator looks at */
    uint64_t desc;
    bool packed;
    bool indirect;
    uint8_t *ram;          /* the mutator's own mapping: as far from the driver's as another CPU is */
    pthread_t thread;
    void (*mutate)(struct attack *attack, uint64_t *state);
    atomic_uint first;     /* what is on offer, for a mutator that wants to be in time: descriptors of the ring ... */
    atomic_uint burst;     /* ... and slots from 0 on; at least 1 */
    atomic_bool stop;
    atomic_uint_fast64_t mutations;
    uint64_t seed;
    uint64_t broken;       /* records of broken rings */
};

/* ------------------------------------------------------------------------------------------------------ the mutator */

static uint8_t *mutable_at(const struct attack *attack, uint64_t gpa)
{
    return attack->ram + (gpa - GUEST_GPA);
}

/* Replace a word if it still is what it was: never undo what the device or the driver wrote in between. */
static void toggle64(uint8_t *at, uint64_t bits)
{
    uint64_t old = __atomic_load_n((uint64_t *)(void *)at, __ATOMIC_RELAXED);

    (void)__atomic_compare_exchange_n((uint64_t *)(void *)at, &old, old ^ bits, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED);
}

static void toggle32(uint8_t *at, uint32_t old, uint32_t bits)
{
    (void)__atomic_compare_exchange_n((uint32_t *)(void *)at, &old, old ^ bits, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED);
}

static void replace16(uint8_t *at, uint16_t old, uint16_t new)
{
    (void)__atomic_compare_exchange_n((uint16_t *)(void *)at, &old, new, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

static unsigned offered_slot(const struct attack *attack, uint64_t *state)
{
    return (unsigned)(check_random(state) % atomic_load_explicit(&attack->burst, memory_order_relaxed));
}

static void mutate_address(uint8_t *descriptor, uint64_t *state)
{
    /* Once in a while out of memory, which breaks the ring. */
    toggle64(descriptor, check_random(state) % 32 == 0 ? 1ull << 47 : TWIN);
}

/* To another of the lengths that this piece may have. */
static void mutate_length(uint8_t *descriptor, unsigned piece, uint64_t *state)
{
    static const uint32_t bits[PIECES][2] = {
        {HEAD_LENGTH, HEAD_LENGTH}, {16, 128}, {128, PROPERTIES_LENGTH}, {128, TAIL_LENGTH}};

    toggle32(descriptor + 8, __atomic_load_n((uint32_t *)(void *)(descriptor + 8), __ATOMIC_RELAXED),
             bits[piece][check_random(state) % 2]);
}

/* NEXT and where it leads, in a split ring or table: forwards, or nowhere. base is the index of the first piece. */
static void mutate_next(uint8_t *descriptor, unsigned base, unsigned piece, uint64_t *state)
{
    uint16_t flags = shared16_get(descriptor + 12, __ATOMIC_RELAXED);
    uint16_t next = shared16_get(descriptor + 14, __ATOMIC_RELAXED);

    if (piece + 1 == PIECES)
        return;
    switch (check_random(state) % 64) {
    case 0:
        replace16(descriptor + 14, next, UINT16_MAX);
        break;
    case 1:
    case 2:
        replace16(descriptor + 12, flags, flags ^ DRIVER_NEXT);
        break;
    default:
        replace16(descriptor + 14, next,
                  (uint16_t)(base + piece + 1 + check_random(state) % (PIECES - 1 - piece)));
        break;
    }
}

static void mutate_table(struct attack *attack, uint64_t *state)
{
    uint64_t twin = check_random(state) % 2 * TWIN;
    uint64_t table = attack->slots + (uint64_t)offered_slot(attack, state) * SLOT + twin + TABLE_AT;
    unsigned piece = (unsigned)(check_random(state) % PIECES);
    uint8_t *descriptor = mutable_at(attack, table + 16 * piece);
    uint8_t *flags = descriptor + (attack->packed ? 14 : 12);

    switch (check_random(state) % 8) {
    case 0:
    case 1:
    case 2:
        mutate_address(descriptor, state);
        break;
    case 3:
    case 4:
        mutate_length(descriptor, piece, state);
        break;
    case 5:
        if (check_random(state) % 8 == 0) {
            uint16_t old = shared16_get(flags, __ATOMIC_RELAXED);

            replace16(flags, old, old ^ DRIVER_WRITE);
        }
        break;
    default:
        if (!attack->packed)
            mutate_next(descriptor, 0, piece, state);
        break;
    }
}

static void mutate_descriptor(struct attack *attack, uint64_t *state)
{
    bool indirect = attack->indirect, packed = attack->packed;
    unsigned first = atomic_load_explicit(&attack->first, memory_order_relaxed);
    unsigned piece = (unsigned)(check_random(state) % PIECES), slot = offered_slot(attack, state);
    unsigned index = (first + (indirect ? slot : PIECES * slot + piece)) % SIZE;
    uint8_t *descriptor = mutable_at(attack, attack->desc + 16ull * index);
    uint8_t *flags_at = descriptor + (packed ? 14 : 12);
    uint16_t flags = shared16_get(flags_at, __ATOMIC_ACQUIRE);

    if (packed && ((flags & DRIVER_AVAIL) != 0) == ((flags & DRIVER_USED) != 0))
        return; /* not the guest's any more, or not yet the device's */
    switch (check_random(state) % 8) {
    case 0:
    case 1:
    case 2:
        mutate_address(descriptor, state);
        break;
    case 3:
        if (!indirect && !(packed && piece == 0)) { /* there the device writes the used length */
            mutate_length(descriptor, piece, state);
        } else if (indirect) { /* and here no used length has this bit */
            uint32_t length = __atomic_load_n((uint32_t *)(void *)(descriptor + 8), __ATOMIC_RELAXED);

            if ((length & 64) != 0)
                toggle32(descriptor + 8, length, check_random(state) % 64 == 0 ? 8 : 16);
        }
        break;
    case 4:
        if (check_random(state) % 8 == 0)
            replace16(flags_at, flags, flags ^ DRIVER_WRITE);
        break;
    case 5:
        if (indirect && check_random(state) % 16 == 0)
            replace16(flags_at, flags, flags ^ DRIVER_INDIRECT);
        break;
    default:
        if (!packed && !indirect)
            mutate_next(descriptor, index - piece, piece, state);
        break;
    }
}

/* Type, domain, range, address, flags: a bit of one of them. */
static void mutate_body(struct attack *attack, uint64_t *state)
{
    static const struct {
        unsigned at;
        uint64_t bits;
    } changes[] = {
        {0, 1}, {0, 2}, {0, 4}, {0, 0xff}, {0, 1ull << 32}, {0, 3ull << 32},     /* type, domain */
        {8, 1}, {8, 0x1000}, {8, 0x2000}, {8, 1ull << 40}, {8, 1ull << 32},      /* first; endpoint, flags */
        {16, 1}, {16, 0x1000}, {16, 0x4000}, {16, 1ull << 40}, {16, 1ull << 63}, /* last; reserved */
        {24, 1}, {24, 0x1000}, {24, 1ull << 63}, {24, UINT64_MAX},               /* phys */
        {32, 1}, {32, 2}, {32, 4}, {32, 1ull << 31},                             /* flags */
    };
    uint64_t twin = check_random(state) % 2 * TWIN;
    uint64_t body = attack->slots + (uint64_t)offered_slot(attack, state) * SLOT + twin + BODY_AT;
    size_t change = check_random(state) % (sizeof(changes) / sizeof(changes[0]));

    toggle64(mutable_at(attack, body + changes[change].at), changes[change].bits);
}

static void mutate_carefully(struct attack *attack, uint64_t *state)
{
    unsigned what = (unsigned)(check_random(state) % 4);

    if (what == 0)
        mutate_body(attack, state);
    else if (what == 1 || !attack->indirect)
        mutate_descriptor(attack, state);
    else
        mutate_table(attack, state);
}

/* A bit anywhere from the first ring to the end of what the driver uses; the rings are hit more often. */
static void mutate_wildly(struct attack *attack, uint64_t *state)
{
    uint64_t rings = attack->slots - GUEST_GPA, all = attack->slots + SIZE * SLOT - GUEST_GPA;
    uint64_t at = check_random(state) % (check_random(state) % 2 == 0 ? rings : all);
    uint8_t *byte = attack->ram + at;

    (void)__atomic_fetch_xor(byte, (uint8_t)(1u << check_random(state) % 8), __ATOMIC_RELAXED);
}

static void *mutator(void *arg)
{
    struct attack *attack = arg;
    uint64_t state = attack->seed;

    while (!atomic_load_explicit(&attack->stop, memory_order_relaxed)) {
        attack->mutate(attack, &state);
        if (atomic_fetch_add_explicit(&attack->mutations, 1, memory_order_relaxed) % 256 == 0)
            (void)sched_yield(); /* there may be one CPU for everybody */
    }
    return NULL;
}

/* ------------------------------------------------------------------------------------------------------- the driver */

static const struct viommu_reserved reserved[] = {{0x8000000, 0x80fffff, 1}, {0xfee00000, 0xfeefffff, 0}};

/* Rings as a driver begins with, started. Returns where the slots are, always the same. */
static uint64_t begin_anew(struct machine *machine)
{
    machine_rings(machine, SIZE);
    machine_start(machine);
    return guest_alloc(&machine->guest, (uint64_t)SIZE * SLOT, SLOT);
}

static void attack_begin(struct attack *attack, uint64_t features, void (*mutate)(struct attack *, uint64_t *))
{
    struct viommu_settings settings = test_settings();

    memset(attack, 0, sizeof(*attack));
    settings.max_mappings = 4096;
    machine_init(&attack->machine, &settings, features, SIZE);
    CHECK_EQ(viommu_engine_add_endpoints(attack->machine.engine, 17, 17, reserved, 2), 0);
    attack->ram = mmap(NULL, MACHINE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, attack->machine.guest.fd, 0);
    CHECK(attack->ram != MAP_FAILED);
    attack->slots = begin_anew(&attack->machine);
    attack->desc = attack->machine.driver[VIOMMU_REQUESTQ].desc;
    attack->packed = attack->machine.driver[VIOMMU_REQUESTQ].packed;
    attack->indirect = attack->machine.indirect;
    atomic_store(&attack->burst, 1);
    attack->mutate = mutate;
    attack->seed = features | 1;
}

static void attack_go(struct attack *attack)
{
    atomic_store(&attack->stop, false);
    CHECK_EQ(pthread_create(&attack->thread, NULL, mutator, attack), 0);
}

static void attack_pause(struct attack *attack)
{
    atomic_store(&attack->stop, true);
    CHECK_EQ(pthread_join(attack->thread, NULL), 0);
}

/* Every broken ring has told why. */
static void take_records(struct attack *attack)
{
    struct viommu_record records[256];
    uint64_t lost;
    size_t count;

    do {
        count = viommu_engine_take_records(attack->machine.engine, records, 256, &lost);
        CHECK_EQ(lost, 0);
        for (size_t i = 0; i < count; i++) {
            if (records[i].kind != VIOMMU_RECORD_BROKEN)
                continue;
            CHECK(records[i].type < VIOMMU_QUEUES);
            CHECK(records[i].code >= VIOMMU_BROKEN_AVAIL && records[i].code <= VIOMMU_BROKEN_LENGTH);
            attack->broken++;
        }
    } while (count == 256);
}

/* Stop, which needs a worker that is alive; the ring's error eventfd was written for each ring that broke. */
static void stop_rings(struct attack *attack)
{
    uint64_t errors = 0;

    for (uint32_t i = 0; i < VIOMMU_QUEUES; i++) {
        uint32_t base;

        CHECK_EQ(viommu_queue_stop(attack->machine.engine, i, &base), 0);
    }
    take_records(attack);
    CHECK_EQ(machine_stats(&attack->machine).rings_broken, attack->broken);
    for (unsigned i = 0; i < VIOMMU_QUEUES; i++)
        errors += fd_take(attack->machine.ring[i].err);
    CHECK_EQ(viommu_engine_needs_reset(attack->machine.engine), errors != 0);
}

/* After all that: a driver that begins anew is served as ever. */
static void attack_end(struct attack *attack)
{
    struct machine *machine = &attack->machine;

    stop_rings(attack);
    viommu_engine_reset(machine->engine);
    CHECK(!viommu_engine_needs_reset(machine->engine));
    CHECK_EQ(begin_anew(machine), attack->slots);
    for (uint64_t i = 0; i < 2 * SIZE; i++) {
        CHECK_EQ(machine_attach(machine, 1, 1), STATUS_OK);
        CHECK_EQ(machine_map(machine, 1, i), STATUS_OK);
        CHECK_EQ(machine_map(machine, 1, i), STATUS_INVAL);
        CHECK_EQ(machine_unmap(machine, 1, i), STATUS_OK);
    }
    CHECK_EQ(machine_stats(machine).rings_broken, attack->broken);
    machine_fini(machine);
    CHECK(munmap(attack->ram, MACHINE_BYTES) == 0);
}

static void write_body(uint8_t *body, uint64_t number, uint64_t *state)
{
    static const uint8_t types[] = {REQUEST_ATTACH, REQUEST_DETACH, REQUEST_MAP,   REQUEST_MAP,
                                    REQUEST_MAP,    REQUEST_UNMAP,  REQUEST_PROBE, REQUEST_UNMAP};
    uint64_t page = check_random(state) % 64;

    memset(body, 0, HEAD_LENGTH + REST_LENGTH + 128);
    body[0] = types[check_random(state) % 8];
    le32_put(body + 4, body[0] == REQUEST_PROBE ? 17 : (uint32_t)(number % 2) + 1);
    if (body[0] == REQUEST_ATTACH || body[0] == REQUEST_DETACH) {
        le32_put(body + 8, (uint32_t)(number % 2) + 1);
        return;
    }
    if (body[0] == REQUEST_PROBE)
        return;
    le64_put(body + 8, page << 12);
    le64_put(body + 16, (page << 12) + 0xfff);
    if (body[0] == REQUEST_MAP) {
        le64_put(body + 24, GUEST_GPA + (page << 12));
        le32_put(body + 32, 3);
    }
}

/* Lay out a request in a slot, both twins alike, and offer it. */
static void offer(struct attack *attack, unsigned slot, uint64_t number, uint64_t *state)
{
    struct driver *driver = &attack->machine.driver[VIOMMU_REQUESTQ];
    uint64_t at = attack->slots + (uint64_t)slot * SLOT;
    const struct piece pieces[PIECES] = {
        {at + BODY_AT, HEAD_LENGTH, false},
        {at + BODY_AT + HEAD_LENGTH, REST_LENGTH, false},
        {at + PROPERTIES_AT, PROPERTIES_LENGTH, true},
        {at + TAIL_AT, TAIL_LENGTH, true},
    };
    uint8_t *bytes = guest_at(&attack->machine.guest, at);

    memset(bytes, POISON, SLOT);
    write_body(bytes, number, state);
    memcpy(bytes + TWIN, bytes, HEAD_LENGTH + REST_LENGTH + 128);
    if (!attack->machine.indirect) {
        (void)driver_add(driver, pieces, PIECES);
        return;
    }
    driver_table(driver, at + TWIN + TABLE_AT, pieces, PIECES);
    (void)driver_add_indirect(driver, at + TABLE_AT, pieces, PIECES);
}

/*
 * Bytes written at one of two places: those in front that are not poison any more. Neither both places nor a hole.
 * They are copied to *out.
 */
static uint32_t written(const struct attack *attack, uint64_t gpa, uint32_t room, uint8_t *out)
{
    uint32_t counts[2] = {0, 0};

    for (unsigned twin = 0; twin < 2; twin++) {
        const uint8_t *bytes = guest_at(&attack->machine.guest, gpa + twin * TWIN);
        uint32_t count = 0;

        while (count < room && bytes[count] != POISON)
            count++;
        for (uint32_t i = count; i < room; i++)
            CHECK_EQ(bytes[i], POISON);
        if (count != 0)
            memcpy(out, bytes, count);
        counts[twin] = count;
    }
    CHECK(counts[0] == 0 || counts[1] == 0);
    return counts[0] + counts[1];
}

/* What PROBE says about endpoint 17. */
static size_t expected_properties(uint8_t *out)
{
    memset(out, 0, 48);
    for (unsigned i = 0; i < 2; i++) {
        le16_put(out + 24 * i, PROBE_TYPE_RESV_MEM);
        le16_put(out + 24 * i + 2, 20);
        out[24 * i + 4] = (uint8_t)reserved[i].subtype;
        le64_put(out + 24 * i + 8, reserved[i].first);
        le64_put(out + 24 * i + 16, reserved[i].last);
    }
    return 48;
}

/* The answer in a slot: as long as it says, complete, and of known bytes. */
static void check_answer(const struct attack *attack, unsigned slot, uint32_t length)
{
    uint64_t at = attack->slots + (uint64_t)slot * SLOT;
    uint8_t answer[TAIL_AT - PROPERTIES_AT + 256], properties[48];
    uint32_t front = written(attack, at + PROPERTIES_AT, TAIL_AT - PROPERTIES_AT, answer);
    uint32_t total = front + written(attack, at + TAIL_AT, 256, answer + front);
    size_t known = 0;

    CHECK_EQ(total, length);
    if (length == 0)
        return;
    CHECK(length >= 4);
    CHECK(answer[length - 4] <= STATUS_NOMEM);
    CHECK(answer[length - 3] == 0 && answer[length - 2] == 0 && answer[length - 1] == 0);
    if (length > 4 + sizeof(properties) && answer[0] != 0) {
        known = expected_properties(properties);
        CHECK(memcmp(answer, properties, known) == 0);
        CHECK_EQ(answer[length - 4], STATUS_OK);
    }
    for (size_t i = known; i < length - 4; i++)
        CHECK_EQ(answer[i], 0);
}

/* Whatever was mapped passed every check with the very values it was mapped with. */
static void check_mappings(const struct attack *attack)
{
    struct viommu_engine *engine = attack->machine.engine;
    struct viommu_domain_info domains[16];
    size_t count = viommu_engine_domains(engine, 0, domains, 16);
    uint64_t all = 0;

    CHECK(count < 16);
    for (size_t i = 0; i < count; i++) {
        static struct viommu_mapping_info mappings[4096];
        int64_t found = viommu_engine_mappings(engine, domains[i].id, 0, mappings, 4096);

        CHECK_EQ(found, domains[i].mappings);
        CHECK(domains[i].endpoints != 0);
        for (int64_t j = 0; j < found; j++) {
            const struct viommu_mapping_info *mapping = &mappings[j];

            CHECK(mapping->first < mapping->last);
            CHECK(j == 0 || mapping->first > mappings[j - 1].last);
            CHECK_EQ(mapping->first % 4096, 0);
            CHECK_EQ(mapping->last % 4096, 4095);
            CHECK_EQ(mapping->phys % 4096, 0);
            CHECK(mapping->phys <= UINT64_MAX - (mapping->last - mapping->first));
            CHECK((mapping->flags & ~3u) == 0);
        }
        all += (uint64_t)found;
    }
    CHECK_EQ(machine_stats(&attack->machine).mappings, all);
}

/*
 * Wait for the next answer: true, or false when the ring broke first, and all that was given before it has been seen.
 */
static bool answered(struct attack *attack, uint32_t *length)
{
    struct driver *driver = &attack->machine.driver[VIOMMU_REQUESTQ];
    uint64_t until = check_now_ns() + 60 * 1000000000ull;
    bool broken = false;
    uint32_t id;

    while (!driver_used(driver, &id, length)) {
        if (broken)
            return false;
        CHECK(check_now_ns() < until && "the engine answers");
        broken = viommu_engine_needs_reset(attack->machine.engine);
        if (!broken)
            (void)sched_yield();
    }
    return true;
}

/* --------------------------------------------------------------------------------------------------------- the tests */

/* Words that change between values that are all good: each answer is whole, and true. */
static void test_careful_mutator(void)
{
    for (size_t kind = 0; kind < KINDS; kind++) {
        static struct attack attack;
        uint64_t state = 77 + kind, sent = 0, whole = 0, empty = 0;
        struct machine *machine = &attack.machine;

        attack_begin(&attack, kinds[kind], mutate_carefully);
        attack_go(&attack);
        while (sent < 4000 || whole < 400 || empty == 0 || attack.broken == 0 ||
               atomic_load(&attack.mutations) < 50000) {
            unsigned chains = machine->indirect ? SIZE : SIZE / PIECES;
            unsigned burst = check_random(&state) % 4 == 0 ? (unsigned)(check_random(&state) % chains) + 1 : 1;
            unsigned done = 0;
            uint16_t offered = machine->driver[VIOMMU_REQUESTQ].avail_idx;
            uint32_t length;

            atomic_store_explicit(&attack.first, machine->driver[VIOMMU_REQUESTQ].next, memory_order_relaxed);
            atomic_store_explicit(&attack.burst, burst, memory_order_relaxed);
            for (unsigned i = 0; i < burst; i++)
                offer(&attack, i, sent + i, &state);
            if (check_random(&state) % 2 == 0) { /* some changes are to come in time, whoever has the CPU */
                uint64_t until = atomic_load(&attack.mutations) + 16;

                while (atomic_load(&attack.mutations) < until)
                    (void)sched_yield();
            }
            machine_kick(machine, VIOMMU_REQUESTQ, offered);
            while (done < burst && answered(&attack, &length)) {
                check_answer(&attack, done, length);
                whole += length != 0;
                empty += length == 0;
                done++;
            }
            sent += burst;
            if (done == burst) {
                take_records(&attack);
                continue;
            }
            stop_rings(&attack);
            for (unsigned i = done; i < burst; i++) /* nothing was written for those that were not answered */
                check_answer(&attack, i, 0);
            check_mappings(&attack);
            viommu_engine_reset(machine->engine);
            CHECK_EQ(begin_anew(machine), attack.slots);
        }
        attack_pause(&attack);
        check_mappings(&attack);
        printf("  %llu requests, %llu answered, %llu not, %llu rings broken, %llu mutations\n",
               (unsigned long long)sent, (unsigned long long)whole, (unsigned long long)empty,
               (unsigned long long)attack.broken, (unsigned long long)atomic_load(&attack.mutations));
        attack_end(&attack);
    }
}

/* Bits that flip anywhere, while both queues are served: the engine lives, and tells why it stops a ring. */
static void test_wild_mutator(void)
{
    for (size_t kind = 0; kind < KINDS; kind++) {
        static struct attack attack;
        uint64_t state = 99 + kind;
        struct machine *machine = &attack.machine;

        attack_begin(&attack, kinds[kind], mutate_wildly);
        for (unsigned round = 0; round < 60 || attack.broken < 5; round++) {
            uint64_t until = atomic_load(&attack.mutations) + 2000;
            unsigned chains = machine->indirect ? SIZE : SIZE / PIECES;

            for (unsigned i = 0; i < 16; i++)
                (void)machine_post(machine, 24);
            attack_go(&attack);
            for (unsigned i = 0; i < chains; i++) {
                offer(&attack, i, i, &state);
                fd_kick(machine->ring[VIOMMU_REQUESTQ].kick);
                (void)viommu_engine_fault(machine->engine, i % 16 + 1, 1, 1, i);
            }
            while (atomic_load(&attack.mutations) < until)
                (void)sched_yield();
            attack_pause(&attack);
            stop_rings(&attack);
            check_mappings(&attack);
            viommu_engine_reset(machine->engine);
            CHECK_EQ(begin_anew(machine), attack.slots);
        }
        printf("  %llu rings broken, %llu mutations\n", (unsigned long long)attack.broken,
               (unsigned long long)atomic_load(&attack.mutations));
        attack_end(&attack);
    }
}

int main(void)
{
    unsigned fds = open_fds(), maps = memfd_maps();

    RUN(test_careful_mutator);
    RUN(test_wild_mutator);
    CHECK_EQ(open_fds(), fds);
    CHECK_EQ(memfd_maps(), maps);
    return 0;
}
