/*
 * The IOMMU over several back-ends that can fail at every call: a request that is refused leaves domains, mappings,
 * endpoints, counters and every back-end exactly as they were. Then: pool memory that runs out, limits, bypass,
 * reset, and a long random run against the model.
 */
#include <errno.h>

#include "iommu_check.h"
#include "settings.h"

/* ------------------------------------------------------------------------------------------------ a fake back-end */

#define FAKE_ENDPOINTS 8u
#define FAKE_MAPPINGS 64u

struct stage2_domain {
    struct stage2_domain *next;
    uint32_t id;
    unsigned count;
    struct iova_mapping mappings[FAKE_MAPPINGS];
};

enum place { PLACE_BLOCKED, PLACE_IDENTITY, PLACE_DOMAIN };

/* How calls fail; shared by all back-ends of a test. */
struct trouble {
    unsigned calls;      /* so far */
    unsigned first;      /* the first call that fails, counted from 1; 0: none does */
    unsigned last;
    int error;
};

struct fake {
    struct stage2 stage2;
    struct trouble *trouble;
    struct stage2_domain *domains;
    const struct guest_memory *memory;
    struct {
        enum place place;
        struct stage2_domain *domain;
    } endpoints[FAKE_ENDPOINTS];
};

static int call(struct fake *fake)
{
    unsigned number = ++fake->trouble->calls;

    return number >= fake->trouble->first && number <= fake->trouble->last ? fake->trouble->error : 0;
}

static struct fake *fake_of(struct stage2 *stage2)
{
    return (struct fake *)(void *)stage2;
}

static int fake_open(struct stage2 *stage2, uint32_t id, struct stage2_domain **out)
{
    struct fake *fake = fake_of(stage2);
    struct stage2_domain *domain;
    int rc = call(fake);

    if (rc != 0)
        return rc;
    for (domain = fake->domains; domain != NULL; domain = domain->next)
        CHECK(domain->id != id); /* a domain is opened once */
    domain = calloc(1, sizeof(*domain));
    CHECK(domain != NULL);
    domain->id = id;
    domain->next = fake->domains;
    fake->domains = domain;
    *out = domain;
    return 0;
}

static void fake_close(struct stage2 *stage2, struct stage2_domain *domain)
{
    struct fake *fake = fake_of(stage2);
    struct stage2_domain **at = &fake->domains;

    for (unsigned i = 0; i < FAKE_ENDPOINTS; i++)
        CHECK(fake->endpoints[i].place != PLACE_DOMAIN || fake->endpoints[i].domain != domain);
    while (*at != domain) {
        CHECK(*at != NULL);
        at = &(*at)->next;
    }
    *at = domain->next;
    free(domain);
}

static int fake_map(struct stage2 *stage2, struct stage2_domain *domain, const struct iova_mapping *mapping)
{
    int rc = call(fake_of(stage2));

    if (rc != 0)
        return rc;
    for (unsigned i = 0; i < domain->count; i++)
        CHECK(mapping->first > domain->mappings[i].last || mapping->last < domain->mappings[i].first);
    CHECK(domain->count < FAKE_MAPPINGS);
    domain->mappings[domain->count++] = *mapping;
    return 0;
}

/* Takes effect in any case, as the interface demands. */
static int fake_unmap(struct stage2 *stage2, struct stage2_domain *domain, const struct iova_map *map, uint64_t first,
                      uint64_t last)
{
    struct iova_mapping mapping;
    unsigned kept = 0;

    for (uint64_t from = first; iova_map_next(map, from, &mapping) && mapping.first <= last; from = mapping.last + 1) {
        bool found = false;

        CHECK(mapping.first >= first && mapping.last <= last); /* still there, and whole */
        for (unsigned i = 0; i < domain->count; i++)
            found = found || domain->mappings[i].first == mapping.first;
        CHECK(found);
        if (mapping.last == UINT64_MAX)
            break;
    }
    for (unsigned i = 0; i < domain->count; i++) {
        if (domain->mappings[i].first < first || domain->mappings[i].last > last)
            domain->mappings[kept++] = domain->mappings[i];
    }
    domain->count = kept;
    return call(fake_of(stage2));
}

static int fake_attach(struct stage2 *stage2, uint32_t endpoint, struct stage2_domain *domain)
{
    struct fake *fake = fake_of(stage2);
    int rc = call(fake);

    if (rc != 0)
        return rc;
    fake->endpoints[endpoint % FAKE_ENDPOINTS].place = PLACE_DOMAIN;
    fake->endpoints[endpoint % FAKE_ENDPOINTS].domain = domain;
    return 0;
}

static int fake_identity(struct stage2 *stage2, uint32_t endpoint)
{
    struct fake *fake = fake_of(stage2);
    int rc = call(fake);

    if (rc != 0)
        return rc;
    fake->endpoints[endpoint % FAKE_ENDPOINTS].place = PLACE_IDENTITY;
    fake->endpoints[endpoint % FAKE_ENDPOINTS].domain = NULL;
    return 0;
}

static int fake_block(struct stage2 *stage2, uint32_t endpoint)
{
    struct fake *fake = fake_of(stage2);

    fake->endpoints[endpoint % FAKE_ENDPOINTS].place = PLACE_BLOCKED;
    fake->endpoints[endpoint % FAKE_ENDPOINTS].domain = NULL;
    return call(fake);
}

static int fake_memory(struct stage2 *stage2, const struct guest_memory *memory)
{
    struct fake *fake = fake_of(stage2);
    int rc = call(fake);

    if (rc == 0)
        fake->memory = memory;
    return rc;
}

static const struct stage2_ops fake_ops = {
    .name = "fake",
    .open = fake_open,
    .close = fake_close,
    .map = fake_map,
    .unmap = fake_unmap,
    .attach = fake_attach,
    .identity = fake_identity,
    .block = fake_block,
    .memory = fake_memory,
};

/* -------------------------------------------------------------------------------------------------------- fixture */

/*
 * Endpoints 8-11 belong to one back-end, 16-19 to another (17 reserves a page), 24-27 to none; 32-35 are of the first
 * again, by a profile of their own that reserves another page.
 */
#define BACKENDS 2u

struct fixture {
    struct viommu_settings settings;
    struct viommu_stats stats;
    struct trouble trouble;
    struct fake fakes[BACKENDS];
    struct iommu iommu;
    struct {
        unsigned left; /* allocations of the pool until they are refused */
        bool limited;
    } memory;
};

static const struct viommu_reserved reserved_page = {0x8000000, 0x8000fff, 0};

static bool refuse(void *context, size_t bytes)
{
    struct fixture *f = context;

    (void)bytes;
    return f->memory.limited && (f->memory.left == 0 || f->memory.left-- == 0);
}

static void set_up_with(struct fixture *f, const struct viommu_settings *settings)
{
    struct iova_pool_hooks hooks = {.refuse = refuse, .context = f};

    memset(f, 0, sizeof(*f));
    f->settings = *settings;
    for (unsigned i = 0; i < BACKENDS; i++) {
        f->fakes[i].stage2.ops = &fake_ops;
        f->fakes[i].trouble = &f->trouble;
    }
    CHECK_EQ(iommu_init(&f->iommu, settings, &f->stats), 0);
    iova_pool_free(f->iommu.pool);
    f->iommu.pool = iova_pool_new(&hooks);
    CHECK(f->iommu.pool != NULL);
    CHECK_EQ(iommu_add_endpoints(&f->iommu, 8, 9, NULL, 0, &f->fakes[0].stage2), 0);
    CHECK_EQ(iommu_add_endpoints(&f->iommu, 16, 16, NULL, 0, &f->fakes[1].stage2), 0);
    CHECK_EQ(iommu_add_endpoints(&f->iommu, 17, 17, &reserved_page, 1, &f->fakes[1].stage2), 0);
    CHECK_EQ(iommu_add_endpoints(&f->iommu, 24, 27, NULL, 0, stage2_none()), 0);
    iommu_set_features(&f->iommu, settings->features & ~(VIRTIO_IOMMU_F_MMIO));
    f->trouble.calls = 0;
}

static void set_up(struct fixture *f)
{
    struct viommu_settings settings = test_settings();

    set_up_with(f, &settings);
}

static void tear_down(struct fixture *f)
{
    f->trouble.first = f->trouble.last = 0;
    iommu_fini(&f->iommu);
    for (unsigned i = 0; i < BACKENDS; i++)
        CHECK(f->fakes[i].domains == NULL);
}

static enum status map(struct fixture *f, uint32_t domain, uint64_t page, uint64_t pages)
{
    struct iova_mapping mapping = {page << 12, ((page + pages) << 12) - 1, page << 13, MAP_FLAG_READ};

    return iommu_map(&f->iommu, domain, &mapping);
}

static enum status unmap(struct fixture *f, uint32_t domain, uint64_t page, uint64_t pages)
{
    return iommu_unmap(&f->iommu, domain, page << 12, ((page + pages) << 12) - 1);
}

/* Everything there is to see, as text: two states are equal when their texts are. */
static void describe(const struct fixture *f, char *out, size_t size)
{
    size_t at = 0;
    const struct domain *domain;

#define SAY(...) at += (size_t)snprintf(out + at, at < size ? size - at : 0, __VA_ARGS__)
    SAY("features %llx bypass %d mappings %llu attached %llu memory %p\n", (unsigned long long)f->iommu.features,
        f->iommu.bypass, (unsigned long long)f->iommu.mappings, (unsigned long long)f->iommu.attached,
        (const void *)f->iommu.memory);
    SAY("stats %llu %llu %llu\n", (unsigned long long)f->stats.endpoints, (unsigned long long)f->stats.domains,
        (unsigned long long)f->stats.mappings);
    for (size_t slot = 0; (domain = id_table_each(&f->iommu.domains, &slot)) != NULL;) {
        struct iova_mapping mapping;

        SAY("domain %u bypass %d endpoints %u bindings %zu\n", domain->id, domain->bypass, domain->endpoint_count,
            domain->binding_count);
        for (uint64_t next = 0; domain->map != NULL && iova_map_next(domain->map, next, &mapping);) {
            SAY("  %llx-%llx %llx %x\n", (unsigned long long)mapping.first, (unsigned long long)mapping.last,
                (unsigned long long)mapping.phys, mapping.flags);
            next = mapping.last + 1;
            if (next == 0)
                break;
        }
        for (size_t i = 0; i < domain->binding_count; i++)
            SAY("  binding %u endpoints\n", domain->bindings[i].endpoints);
    }
    for (uint32_t i = 0; i < 64; i++) {
        const struct endpoint *endpoint = id_table_get(&f->iommu.endpoints, i);

        if (endpoint != NULL)
            SAY("endpoint %u domain %d\n", i, endpoint->domain != NULL ? (int)endpoint->domain->id : -1);
    }
    for (unsigned i = 0; i < BACKENDS; i++) {
        uint64_t all = 0;

        SAY("back-end %u memory %p\n", i, (const void *)f->fakes[i].memory);
        for (unsigned j = 0; j < FAKE_ENDPOINTS; j++)
            SAY("  endpoint %u place %d in %d\n", j, f->fakes[i].endpoints[j].place,
                f->fakes[i].endpoints[j].domain != NULL ? (int)f->fakes[i].endpoints[j].domain->id : -1);
        for (const struct stage2_domain *d = f->fakes[i].domains; d != NULL; d = d->next) {
            uint64_t sum = 0; /* the order of domains and of mappings does not matter */

            for (unsigned j = 0; j < d->count; j++)
                sum += (d->mappings[j].first >> 12) * 1000003 + (d->mappings[j].last >> 12) * 7919 + 1;
            all += (sum + d->count + 1) * (2ull * d->id + 1);
        }
        SAY("  domains %llx\n", (unsigned long long)all);
    }
#undef SAY
    CHECK(at < size);
}

/* The back-ends hold what the books say: every domain with all its mappings, every endpoint in its place. */
static void check_consistent(const struct fixture *f)
{
    unsigned bindings = 0, opened = 0;
    const struct domain *domain;

    for (size_t slot = 0; (domain = id_table_each(&f->iommu.domains, &slot)) != NULL;) {
        unsigned members = 0;

        CHECK(domain->endpoint_count != 0);
        for (size_t i = 0; i < domain->binding_count; i++) {
            const struct binding *binding = &domain->bindings[i];
            struct iova_mapping mapping;

            CHECK(binding->endpoints != 0);
            members += binding->endpoints;
            if (binding->stage2 == stage2_none())
                continue;
            bindings++;
            CHECK_EQ(binding->domain->id, domain->id);
            CHECK_EQ(binding->domain->count, iova_map_count(domain->map));
            for (unsigned j = 0; j < binding->domain->count; j++) {
                const struct iova_mapping *mine = &binding->domain->mappings[j];

                CHECK(iova_map_find(domain->map, mine->first, &mapping));
                CHECK(mapping.first == mine->first && mapping.last == mine->last && mapping.phys == mine->phys &&
                      mapping.flags == mine->flags);
            }
        }
        CHECK(domain->bypass ? domain->binding_count == 0 : members == domain->endpoint_count);
    }
    for (unsigned i = 0; i < BACKENDS; i++) {
        for (const struct stage2_domain *d = f->fakes[i].domains; d != NULL; d = d->next)
            opened++;
    }
    CHECK_EQ(opened, bindings);
    for (uint32_t i = 8; i < 18; i++) {
        const struct endpoint *endpoint = id_table_get(&f->iommu.endpoints, i);
        const struct fake *fake = &f->fakes[i < 16 ? 0 : 1];

        if (endpoint == NULL)
            continue;
        if (endpoint->domain == NULL) {
            CHECK(fake->endpoints[i % FAKE_ENDPOINTS].place != PLACE_DOMAIN);
            CHECK(iommu_unattached_bypass(&f->iommu) || fake->endpoints[i % FAKE_ENDPOINTS].place == PLACE_BLOCKED);
        } else if (endpoint->domain->bypass) {
            CHECK_EQ(fake->endpoints[i % FAKE_ENDPOINTS].place, PLACE_IDENTITY);
        } else {
            CHECK_EQ(fake->endpoints[i % FAKE_ENDPOINTS].place, PLACE_DOMAIN);
            CHECK_EQ(fake->endpoints[i % FAKE_ENDPOINTS].domain->id, endpoint->domain->id);
        }
    }
}

/* ------------------------------------------------------------------------------------------- failure at every call */

/* Domain 1 holds endpoints of all back-ends and five mappings; 2 holds one endpoint and a mapping; 3 is bypass. */
static void furnish(struct fixture *f)
{
    set_up(f);
    CHECK_EQ(iommu_attach(&f->iommu, 1, 8, false), STATUS_OK);
    CHECK_EQ(iommu_attach(&f->iommu, 1, 16, false), STATUS_OK);
    CHECK_EQ(iommu_attach(&f->iommu, 1, 24, false), STATUS_OK);
    for (uint64_t i = 0; i < 5; i++)
        CHECK_EQ(map(f, 1, 10 * i, 2), STATUS_OK);
    CHECK_EQ(iommu_attach(&f->iommu, 2, 9, false), STATUS_OK);
    CHECK_EQ(map(f, 2, 100, 1), STATUS_OK);
    CHECK_EQ(iommu_attach(&f->iommu, 3, 25, true), STATUS_OK);
    check_consistent(f);
    f->trouble.calls = 0;
}

struct operation {
    const char *what;
    enum status (*run)(struct fixture *f);
    bool always;  /* takes effect whatever a back-end says */
};

static enum status do_map(struct fixture *f)
{
    return map(f, 1, 7, 1);
}

static enum status do_unmap(struct fixture *f)
{
    return unmap(f, 1, 0, 35);
}

static enum status do_attach_new(struct fixture *f)
{
    return iommu_attach(&f->iommu, 9, 17, false);
}

static enum status do_attach_bind(struct fixture *f)
{
    return iommu_attach(&f->iommu, 2, 17, false); /* brings domain 2 into the second back-end */
}

static enum status do_attach_bound(struct fixture *f)
{
    return iommu_attach(&f->iommu, 1, 17, false);
}

static enum status do_move_last(struct fixture *f)
{
    return iommu_attach(&f->iommu, 1, 9, false); /* domain 2 ends */
}

static enum status do_move_new(struct fixture *f)
{
    return iommu_attach(&f->iommu, 9, 9, false); /* domain 2 ends, 9 begins */
}

static enum status do_move_one(struct fixture *f)
{
    return iommu_attach(&f->iommu, 2, 16, false);
}

static enum status do_move_to_bypass(struct fixture *f)
{
    return iommu_attach(&f->iommu, 3, 8, true);
}

static enum status do_attach_new_bypass(struct fixture *f)
{
    return iommu_attach(&f->iommu, 9, 9, true);
}

static enum status do_attach_unmade(struct fixture *f)
{
    /* an endpoint that has no object yet, into a domain of the other kind */
    return iommu_attach(&f->iommu, 2, 26, true);
}

static enum status do_reattach_sole(struct fixture *f)
{
    return iommu_attach(&f->iommu, 2, 9, false);
}

static enum status do_detach(struct fixture *f)
{
    return iommu_detach(&f->iommu, 1, 16);
}

static enum status do_detach_last(struct fixture *f)
{
    return iommu_detach(&f->iommu, 2, 9);
}

static const struct operation operations[] = {
    {"MAP into three back-ends", do_map, false},
    {"UNMAP of four mappings", do_unmap, true},
    {"ATTACH to a new domain", do_attach_new, false},
    {"ATTACH that brings a domain into a back-end", do_attach_bind, false},
    {"ATTACH to a domain the back-end has", do_attach_bound, false},
    {"ATTACH that ends the former domain", do_move_last, false},
    {"ATTACH that ends one domain and begins another", do_move_new, false},
    {"ATTACH that leaves others behind", do_move_one, false},
    {"ATTACH to a bypass domain", do_move_to_bypass, false},
    {"ATTACH to a new bypass domain", do_attach_new_bypass, false},
    {"ATTACH refused before any back-end", do_attach_unmade, false},
    {"ATTACH to the same domain", do_reattach_sole, true},
    {"DETACH", do_detach, true},
    {"DETACH of the last", do_detach_last, true},
};

static enum status status_for(int error)
{
    switch (error) {
    case -ENOMEM:
    case -ENOSPC:
        return STATUS_NOMEM;
    case -EFAULT:
        return STATUS_FAULT;
    case -EOPNOTSUPP:
        return STATUS_UNSUPP;
    default:
        return STATUS_DEVERR;
    }
}

/* One operation with the calls from first to last failing. False when there are not so many calls. */
static bool fail_operation(const struct operation *operation, unsigned first, unsigned last, int error)
{
    static char before[16384], after[16384], clean[16384];
    struct fixture f;
    enum status status;
    bool failed;

    furnish(&f);
    describe(&f, before, sizeof(before));
    (void)operation->run(&f);
    describe(&f, clean, sizeof(clean));
    tear_down(&f);

    furnish(&f);
    f.trouble.first = first;
    f.trouble.last = last;
    f.trouble.error = error;
    status = operation->run(&f);
    failed = f.trouble.calls >= first;
    f.trouble.first = f.trouble.last = 0;
    describe(&f, after, sizeof(after));
    check_consistent(&f);
    if (failed && operation->always) {
        CHECK_EQ(status, status_for(error));
        CHECK(strcmp(after, clean) == 0);
    } else if (failed) {
        CHECK_EQ(status, status_for(error));
        CHECK(strcmp(after, before) == 0);
        CHECK_EQ(operation->run(&f), STATUS_OK); /* and it can be done again */
        describe(&f, after, sizeof(after));
        CHECK(strcmp(after, clean) == 0);
    } else if (status != STATUS_OK) {
        CHECK(strcmp(after, before) == 0);
    }
    check_consistent(&f);
    tear_down(&f);
    return failed;
}

/* rule: R-MAP-12 */
/* rule: R-ATTACH-8 */
/* rule: R-ATTACH-5 */
/* Each operation, with each call failing alone and all calls from there on failing: all or nothing. */
static void test_failure_at_every_call(void)
{
    static const int errors[] = {-ENOMEM, -EFAULT, -EOPNOTSUPP, -EIO};

    for (size_t i = 0; i < sizeof(operations) / sizeof(operations[0]); i++) {
        unsigned calls = 0;

        for (size_t e = 0; e < sizeof(errors) / sizeof(errors[0]); e++) {
            for (calls = 0; fail_operation(&operations[i], calls + 1, calls + 1, errors[e]); calls++)
                (void)fail_operation(&operations[i], calls + 1, UINT32_MAX, errors[e]);
        }
        printf("  %s: %u calls\n", operations[i].what, calls);
    }
}

/* rule: R-DETACH-4 */
/* A detached endpoint that cannot have everything gets nothing, and never keeps the domain. */
static void test_detach_when_identity_fails(void)
{
    struct fixture f;

    furnish(&f);
    iommu_set_bypass(&f.iommu, true);
    f.trouble.calls = 0;
    f.trouble.first = f.trouble.last = 1;
    f.trouble.error = -EIO;
    CHECK_EQ(iommu_detach(&f.iommu, 1, 16), STATUS_DEVERR);
    f.trouble.first = f.trouble.last = 0;
    CHECK_EQ(f.fakes[1].endpoints[0].place, PLACE_BLOCKED);
    check_consistent(&f);
    CHECK_EQ(iommu_detach(&f.iommu, 1, 16), STATUS_INVAL);
    tear_down(&f);
}

/* New guest memory that one back-end refuses is refused: the others go back to the memory before. */
static void test_memory_refused(void)
{
    struct guest_memory *first, *second;

    CHECK_EQ(guest_memory_new(NULL, 0, &first), 0);
    CHECK_EQ(guest_memory_new(NULL, 0, &second), 0);
    for (unsigned fail = 1; fail <= 8; fail++) {
        struct fixture f;
        int rc;

        furnish(&f);
        CHECK_EQ(iommu_set_memory(&f.iommu, first), 0);
        f.trouble.calls = 0;
        f.trouble.first = f.trouble.last = fail;
        f.trouble.error = -ENOMEM;
        rc = iommu_set_memory(&f.iommu, second);
        CHECK(rc == 0 || rc == -ENOMEM);
        CHECK_EQ(rc == 0, f.trouble.calls < fail);
        for (unsigned i = 0; i < BACKENDS; i++)
            CHECK(f.fakes[i].memory == (rc == 0 ? second : first));
        CHECK(f.iommu.memory == (rc == 0 ? second : first));
        tear_down(&f);
        if (rc == 0)
            break;
        CHECK(fail < 8);
    }
    guest_memory_free(first);
    guest_memory_free(second);
}

/* Endpoints that cannot be placed, or have no room, are not added at all. */
static void test_add_endpoints_refused(void)
{
    struct viommu_settings settings = test_settings();
    struct fixture f;
    static char before[16384], after[16384];

    settings.max_endpoints = 6;
    set_up_with(&f, &settings); /* which has made four objects */
    describe(&f, before, sizeof(before));
    CHECK_EQ(iommu_add_endpoints(&f.iommu, 32, 34, NULL, 0, &f.fakes[0].stage2), -ENOSPC);
    CHECK(iommu_profile(&f.iommu, 32) == NULL);
    describe(&f, after, sizeof(after));
    CHECK(strcmp(before, after) == 0);
    f.trouble.calls = 0;
    f.trouble.first = f.trouble.last = 2;
    f.trouble.error = -EIO;
    CHECK_EQ(iommu_add_endpoints(&f.iommu, 32, 33, NULL, 0, &f.fakes[0].stage2), -EIO);
    CHECK(iommu_profile(&f.iommu, 32) == NULL);
    f.trouble.first = f.trouble.last = 0;
    CHECK_EQ(iommu_add_endpoints(&f.iommu, 32, 33, NULL, 0, &f.fakes[0].stage2), 0);
    CHECK(iommu_profile(&f.iommu, 33) != NULL);
    tear_down(&f);
}

/* rule: R-RESV-2 */
/* rule: R-RESV-3 */
/* rule: R-PROBE-10 */
/* Endpoints whose reserved regions cannot be told to a driver are refused, as are endpoints that exist. */
static void test_add_endpoints_checked(void)
{
    struct viommu_settings settings = test_settings();
    struct viommu_reserved two[2] = {{0x1000, 0x1fff, 0}, {0x3000, 0x3fff, 1}};
    struct fixture f;

    settings.probe_size = 48;
    set_up_with(&f, &settings);
    CHECK_EQ(iommu_add_endpoints(&f.iommu, 41, 40, NULL, 0, stage2_none()), -EINVAL);
    CHECK_EQ(iommu_add_endpoints(&f.iommu, 40, 41, two, 2, stage2_none()), 0);
    CHECK_EQ(iommu_add_endpoints(&f.iommu, 41, 50, NULL, 0, stage2_none()), -EEXIST);
    CHECK_EQ(iommu_add_endpoints(&f.iommu, 0, UINT32_MAX, NULL, 0, stage2_none()), -EEXIST);
    CHECK_EQ(iommu_add_endpoints(&f.iommu, 42, 42, (struct viommu_reserved[3]){two[0], two[1], {8, 8, 0}}, 3,
                                 stage2_none()),
             -EINVAL);
    two[1].first = 0x1fff;
    CHECK_EQ(iommu_add_endpoints(&f.iommu, 42, 42, two, 2, stage2_none()), -EINVAL);
    two[1] = (struct viommu_reserved){0x3000, 0x2fff, 0};
    CHECK_EQ(iommu_add_endpoints(&f.iommu, 42, 42, two, 2, stage2_none()), -EINVAL);
    two[1] = (struct viommu_reserved){0x3000, 0x3fff, 2};
    CHECK_EQ(iommu_add_endpoints(&f.iommu, 42, 42, two, 2, stage2_none()), -EINVAL);
    two[0].subtype = two[1].subtype = 1;
    CHECK_EQ(iommu_add_endpoints(&f.iommu, 42, 42, two, 2, stage2_none()), -EINVAL);
    two[0] = (struct viommu_reserved){0, UINT64_MAX, 0};
    CHECK_EQ(iommu_add_endpoints(&f.iommu, UINT32_MAX, UINT32_MAX, two, 1, stage2_none()), 0);
    CHECK(iommu_profile(&f.iommu, 42) == NULL);
    tear_down(&f);
}

/* The pool runs out at every allocation in turn: NOMEM, and everything as before. */
static void test_out_of_memory(void)
{
    static char before[65536], after[65536];
    static const struct operation needy[] = {
        {"MAP", do_map, false},
        {"ATTACH", do_attach_new, false},
        {"move", do_move_new, false},
    };

    for (size_t i = 0; i < sizeof(needy) / sizeof(needy[0]); i++) {
        for (unsigned left = 0;; left++) {
            struct fixture f;
            enum status status;

            furnish(&f);
            for (uint64_t page = 200; page < 230; page++) /* so that leaves split on the way */
                CHECK_EQ(map(&f, 1, 2 * page, 1), STATUS_OK);
            describe(&f, before, sizeof(before));
            f.memory.limited = true;
            f.memory.left = left;
            status = needy[i].run(&f);
            f.memory.limited = false;
            describe(&f, after, sizeof(after));
            check_consistent(&f);
            CHECK(status == STATUS_OK || status == STATUS_NOMEM);
            CHECK(status == STATUS_OK || strcmp(before, after) == 0);
            tear_down(&f);
            if (status == STATUS_OK)
                break;
            CHECK(left < 16);
        }
    }
}

/* -------------------------------------------------------------------------------------------------------- requests */

/* rule: R-ATTACH-4 */
/* rule: R-ATTACH-7 */
/* rule: R-DETACH-5 */
/* Domains live as long as they have an endpoint, however it goes: move, detach, attach again. */
static void test_domain_life(void)
{
    struct fixture f;
    uint64_t gpa;

    set_up(&f);
    CHECK_EQ(map(&f, 1, 0, 1), STATUS_NOENT);
    CHECK_EQ(iommu_attach(&f.iommu, 1, 24, false), STATUS_OK);
    CHECK_EQ(iommu_attach(&f.iommu, 1, 25, false), STATUS_OK);
    CHECK_EQ(map(&f, 1, 4, 1), STATUS_OK);
    CHECK_EQ(iommu_translate(&f.iommu, 24, 0x4010, 1, &gpa), 0);
    CHECK_EQ(gpa, 0x8010);
    CHECK_EQ(iommu_translate(&f.iommu, 25, 0x4010, 1, &gpa), 0);
    CHECK_EQ(iommu_attach(&f.iommu, 2, 24, false), STATUS_OK);
    CHECK_EQ(iommu_translate(&f.iommu, 24, 0x4010, 1, &gpa), -EFAULT);
    CHECK_EQ(iommu_translate(&f.iommu, 25, 0x4010, 1, &gpa), 0);
    CHECK_EQ(iommu_attach(&f.iommu, 2, 25, false), STATUS_OK); /* the last one leaves 1 */
    CHECK_EQ(map(&f, 1, 5, 1), STATUS_NOENT);
    CHECK_EQ(unmap(&f, 1, 0, 10), STATUS_NOENT);
    CHECK_EQ(f.stats.mappings, 0);
    CHECK_EQ(iommu_attach(&f.iommu, 1, 24, true), STATUS_OK); /* the number is free for another kind of domain */
    CHECK_EQ(iommu_detach(&f.iommu, 1, 24), STATUS_OK);
    CHECK_EQ(map(&f, 2, 4, 1), STATUS_OK);
    CHECK_EQ(iommu_attach(&f.iommu, 2, 25, false), STATUS_OK); /* again, alone: empty */
    CHECK_EQ(f.stats.mappings, 0);
    CHECK_EQ(map(&f, 2, 4, 1), STATUS_OK);
    CHECK_EQ(iommu_attach(&f.iommu, 2, 24, false), STATUS_OK);
    CHECK_EQ(iommu_attach(&f.iommu, 2, 25, false), STATUS_OK); /* again, with another: as it was */
    CHECK_EQ(f.stats.mappings, 1);
    CHECK_EQ(iommu_detach(&f.iommu, 2, 24), STATUS_OK);
    CHECK_EQ(iommu_detach(&f.iommu, 2, 25), STATUS_OK);
    CHECK_EQ(iommu_detach(&f.iommu, 2, 25), STATUS_INVAL);
    CHECK_EQ(iommu_attach(&f.iommu, 2, 25, false), STATUS_OK);
    CHECK_EQ(iommu_translate(&f.iommu, 25, 0x4010, 1, &gpa), -EFAULT);
    tear_down(&f);
}

/* rule: R-ATTACH-9 */
/* rule: R-ATTACH-10 */
/* rule: R-RESV-4 */
/* Reserved regions: of every endpoint in the domain, for MAP and for ATTACH, to the byte. */
static void test_reserved(void)
{
    struct fixture f;
    struct viommu_reserved two[2] = {{0x3000, 0x4fff, 1}, {UINT64_MAX - 0xfff, UINT64_MAX, 0}};

    set_up(&f);
    CHECK_EQ(iommu_add_endpoints(&f.iommu, 40, 41, two, 2, stage2_none()), 0);
    CHECK_EQ(iommu_attach(&f.iommu, 1, 24, false), STATUS_OK);
    CHECK_EQ(map(&f, 1, 4, 1), STATUS_OK);
    CHECK_EQ(iommu_attach(&f.iommu, 1, 40, false), STATUS_UNSUPP);
    CHECK_EQ(unmap(&f, 1, 4, 1), STATUS_OK);
    CHECK_EQ(map(&f, 1, 5, 1), STATUS_OK);
    CHECK_EQ(map(&f, 1, 2, 1), STATUS_OK);
    CHECK_EQ(iommu_attach(&f.iommu, 1, 40, false), STATUS_OK);
    CHECK_EQ(iommu_attach(&f.iommu, 1, 41, false), STATUS_OK);
    CHECK_EQ(map(&f, 1, 3, 1), STATUS_INVAL);
    CHECK_EQ(map(&f, 1, 4, 1), STATUS_INVAL);
    CHECK_EQ(map(&f, 1, 0xfffffffffffff, 1), STATUS_INVAL);
    CHECK_EQ(map(&f, 1, 0xffffffffffffe, 1), STATUS_OK);
    CHECK_EQ(iommu_detach(&f.iommu, 1, 40), STATUS_OK);
    CHECK_EQ(map(&f, 1, 4, 1), STATUS_INVAL); /* 41 is still there */
    CHECK_EQ(iommu_detach(&f.iommu, 1, 41), STATUS_OK);
    CHECK_EQ(map(&f, 1, 4, 1), STATUS_OK);
    tear_down(&f);
}

/* At a limit the answer is NOMEM, counted; what is there stays, and one going makes room for one coming. */
static void test_limits(void)
{
    struct viommu_settings settings = test_settings();
    struct fixture f;

    settings.max_domains = 2;
    settings.max_endpoints = 7; /* four are made by the fixture's back-ends */
    settings.max_mappings = 5;
    settings.max_domain_mappings = 3;
    set_up_with(&f, &settings);
    CHECK_EQ(iommu_attach(&f.iommu, 1, 24, false), STATUS_OK);
    CHECK_EQ(iommu_attach(&f.iommu, 2, 25, false), STATUS_OK);
    CHECK_EQ(iommu_attach(&f.iommu, 3, 26, false), STATUS_NOMEM);
    CHECK_EQ(f.stats.limit_hits, 1);
    CHECK(id_table_get(&f.iommu.endpoints, 26) == NULL); /* refused: nothing is left of it */
    CHECK_EQ(iommu_attach(&f.iommu, 3, 24, false), STATUS_OK); /* 1 ends for it */
    CHECK_EQ(f.stats.peak_domains, 2);
    CHECK_EQ(iommu_attach(&f.iommu, 3, 26, false), STATUS_OK);
    CHECK_EQ(iommu_attach(&f.iommu, 3, 27, false), STATUS_NOMEM); /* the eighth endpoint */
    CHECK_EQ(iommu_attach(&f.iommu, 4, 24, false), STATUS_NOMEM); /* 26 keeps 3 */
    for (uint64_t i = 0; i < 3; i++)
        CHECK_EQ(map(&f, 2, i, 1), STATUS_OK);
    CHECK_EQ(map(&f, 2, 3, 1), STATUS_NOMEM);
    CHECK_EQ(map(&f, 2, 2, 2), STATUS_INVAL); /* an overlap is one also at the limit */
    CHECK_EQ(map(&f, 3, 0, 1), STATUS_OK);
    CHECK_EQ(map(&f, 3, 1, 1), STATUS_OK);
    CHECK_EQ(map(&f, 3, 2, 1), STATUS_NOMEM);
    CHECK_EQ(f.stats.limit_hits, 5);
    CHECK_EQ(unmap(&f, 2, 0, 1), STATUS_OK);
    CHECK_EQ(map(&f, 3, 2, 1), STATUS_OK);
    CHECK_EQ(f.stats.peak_mappings, 5);
    CHECK_EQ(f.stats.mappings, 5);
    iommu_reset(&f.iommu);
    CHECK_EQ(f.stats.mappings, 0);
    CHECK_EQ(f.stats.endpoints, 0);
    CHECK_EQ(iommu_attach(&f.iommu, 3, 27, false), STATUS_OK);
    tear_down(&f);
}

/* rule: R-OPS-6 */
/* rule: R-MAP-8 */
/* The bypass table: what an unattached endpoint reaches, for every mixture of offered, accepted and config.bypass. */
static void test_bypass(void)
{
    const uint64_t config = VIRTIO_IOMMU_F_BYPASS_CONFIG, old = VIRTIO_IOMMU_F_BYPASS;
    static const struct {
        bool config_offered, config_accepted, old_offered, old_accepted, bypass, reaches;
    } table[] = {
        {true, true, false, false, true, true},     {true, false, false, false, true, true},
        {true, true, false, false, false, false},   {true, false, false, false, false, false},
        {false, false, true, true, false, true},    {false, false, true, false, false, false},
        {false, false, true, true, true, true},     {false, false, true, false, true, false},
        {false, false, false, false, true, false},  {false, false, false, false, false, false},
    };

    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        struct viommu_settings settings = test_settings();
        struct fixture f;
        uint64_t gpa = 0;

        settings.features = (settings.features & ~(config | old)) | (table[i].config_offered ? config : 0) |
                            (table[i].old_offered ? old : 0);
        settings.bypass = table[i].bypass;
        set_up_with(&f, &settings);
        iommu_set_features(&f.iommu, (settings.features & ~(config | old | VIRTIO_IOMMU_F_MMIO)) |
                                         (table[i].config_accepted ? config : 0) |
                                         (table[i].old_accepted ? old : 0));
        CHECK_EQ(iommu_unattached_bypass(&f.iommu), table[i].reaches);
        CHECK_EQ(iommu_translate(&f.iommu, 24, 0x12345, 1, &gpa), table[i].reaches ? 0 : -ENXIO);
        CHECK_EQ(f.fakes[0].endpoints[0].place, table[i].reaches ? PLACE_IDENTITY : PLACE_BLOCKED);
        /* attached: mappings only, with the access they allow */
        CHECK_EQ(iommu_attach(&f.iommu, 1, 8, false), STATUS_OK);
        CHECK_EQ(map(&f, 1, 1, 1), STATUS_OK);
        CHECK_EQ(iommu_translate(&f.iommu, 8, 0x1234, VIOMMU_ACCESS_READ, &gpa), 0);
        CHECK_EQ(gpa, 0x2234);
        CHECK_EQ(iommu_translate(&f.iommu, 8, 0x1234, VIOMMU_ACCESS_WRITE, &gpa), -EFAULT);
        CHECK_EQ(iommu_translate(&f.iommu, 8, 0x2000, VIOMMU_ACCESS_READ, &gpa), -EFAULT);
        CHECK_EQ(iommu_translate(&f.iommu, 99, 0x2000, VIOMMU_ACCESS_READ, &gpa), -ENOENT);
        CHECK_EQ(iommu_detach(&f.iommu, 1, 8), STATUS_OK);
        CHECK_EQ(f.fakes[0].endpoints[0].place, table[i].reaches ? PLACE_IDENTITY : PLACE_BLOCKED);
        /* config.bypass changes what unattached endpoints reach, at once */
        iommu_set_bypass(&f.iommu, !table[i].bypass);
        CHECK_EQ(f.fakes[0].endpoints[0].place == PLACE_IDENTITY,
                 table[i].config_offered ? !table[i].bypass : table[i].reaches);
        check_consistent(&f);
        /* and stays over a reset */
        iommu_reset(&f.iommu);
        CHECK_EQ(f.iommu.bypass, !table[i].bypass);
        check_consistent(&f);
        tear_down(&f);
    }
}

/* rule: R-INIT-1 */
/* A reset detaches everything, in the back-ends too, and gives back what the guest's requests had made. */
static void test_reset(void)
{
    struct fixture f;

    furnish(&f);
    iommu_reset(&f.iommu);
    check_consistent(&f);
    CHECK_EQ(f.iommu.domains.count, 0);
    CHECK_EQ(f.stats.mappings, 0);
    CHECK_EQ(f.stats.endpoints, 0);
    CHECK_EQ(f.stats.domains, 0);
    CHECK(f.fakes[0].domains == NULL && f.fakes[1].domains == NULL);
    CHECK_EQ(map(&f, 1, 0, 1), STATUS_NOENT);
    CHECK(id_table_get(&f.iommu.endpoints, 24) == NULL);
    CHECK(id_table_get(&f.iommu.endpoints, 8) != NULL);
    CHECK_EQ(iommu_attach(&f.iommu, 1, 8, false), STATUS_OK);
    tear_down(&f);
}

/* Many endpoints made by the guest all go at a reset, wherever they stand in the table. */
static void test_reset_many(void)
{
    struct viommu_settings settings = test_settings();
    struct fixture f;

    settings.max_endpoints = 5000;
    set_up_with(&f, &settings);
    CHECK_EQ(iommu_add_endpoints(&f.iommu, 1000, 10000, NULL, 0, stage2_none()), 0);
    for (uint32_t round = 0; round < 3; round++) {
        for (uint32_t i = 0; i < 4000; i++)
            CHECK_EQ(iommu_attach(&f.iommu, i % 7, 1000 + 2 * i, false), STATUS_OK);
        iommu_reset(&f.iommu);
        CHECK_EQ(f.iommu.endpoints.count, 4); /* the back-ends' own */
    }
    tear_down(&f);
}

/* A long random run over all back-ends, some of whose calls fail: the model says what is to be answered. */
static void test_random_against_model(void)
{
    for (uint64_t seed = 1; seed <= 8; seed++) {
        static struct model model;
        struct viommu_settings settings = test_settings();
        static const uint32_t ids[] = {8, 9, 16, 17, 24, 25, 26, 27, 99};
        struct fixture f;
        uint64_t state = seed;

        settings.max_domains = 4;
        settings.max_endpoints = 7;
        settings.max_mappings = 40;
        settings.max_domain_mappings = 20;
        settings.domain_first = 3;
        settings.domain_last = 12;
        settings.input_first = 0x4000;
        settings.input_last = 0x8010fff;
        set_up_with(&f, &settings);
        memset(&model, 0, sizeof(model));
        model.settings = settings;
        model.features = f.iommu.features;
        for (unsigned i = 0; i < 8; i++) {
            model.endpoints[i].exists = true;
            model.endpoints[i].known = i < 4;
            model.endpoints[i].id = ids[i];
        }
        model.endpoints[3].reserved_count = 1;
        model.endpoints[3].reserved[0] = reserved_page;
        for (unsigned step = 0; step < 40000; step++) {
            uint32_t domain = (uint32_t)(check_random(&state) % 12 + 2);
            uint32_t endpoint = ids[check_random(&state) % 9];
            uint64_t r = check_random(&state);
            uint64_t page = (r & 1) != 0 ? r >> 8 & 31 : 0x8000 - 8 + (r >> 8 & 31);
            uint64_t pages = (r >> 16 & 3) + 1;
            uint64_t skew = (r >> 20) % 16 == 0 ? 0x800 : 0; /* not aligned */

            switch ((r >> 24) % 8) {
            case 0:
            case 1: {
                bool bypass = (r >> 32) % 4 == 0;

                CHECK_EQ(iommu_attach(&f.iommu, domain, endpoint, bypass),
                         model_attach(&model, domain, endpoint, bypass));
                break;
            }
            case 2:
                CHECK_EQ(iommu_detach(&f.iommu, domain, endpoint), model_detach(&model, domain, endpoint));
                break;
            case 3:
            case 4: {
                uint64_t first = page << 12, last = ((page + (r >> 40) % 20) << 12) - 1 + skew;

                CHECK_EQ(iommu_unmap(&f.iommu, domain, first, last), model_unmap(&model, domain, first, last));
                break;
            }
            default: {
                struct iova_mapping mapping = {(page << 12) + skew, ((page + pages) << 12) - 1 + skew, page << 13,
                                               (uint32_t)(r >> 48 & 3)};

                if ((r >> 60) == 0)
                    mapping.phys = UINT64_MAX & ~0xfffull;
                CHECK_EQ(iommu_map(&f.iommu, domain, &mapping),
                         model_map(&model, domain, mapping.first, mapping.last, mapping.phys, mapping.flags));
                break;
            }
            }
            if (step % 50 == 0) {
                iommu_agrees(&f.iommu, &model);
                check_consistent(&f);
            }
            if (check_random(&state) % 4000 == 0) {
                iommu_reset(&f.iommu);
                model_reset(&model);
                for (unsigned i = 0; i < 4; i++)
                    model.endpoints[i].known = true;
                iommu_agrees(&f.iommu, &model);
            }
        }
        tear_down(&f);
    }
}

int main(void)
{
    RUN(test_failure_at_every_call);
    RUN(test_detach_when_identity_fails);
    RUN(test_memory_refused);
    RUN(test_add_endpoints_refused);
    RUN(test_add_endpoints_checked);
    RUN(test_out_of_memory);
    RUN(test_domain_life);
    RUN(test_reserved);
    RUN(test_limits);
    RUN(test_bypass);
    RUN(test_reset);
    RUN(test_reset_many);
    RUN(test_random_against_model);
    return 0;
}
