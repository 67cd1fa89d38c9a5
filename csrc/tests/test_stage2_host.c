/*
 * Stage 2 in the host's IOMMU where the kernel says no: what was before still holds, for every call that may fail. The
 * kernel is a model (host_kernel.h); real ones are in the lab's tests.
 */
#include <limits.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host_kernel.h"
#include "iommu.h"
#include "settings.h"
#include "stage2_iommufd.h"
#include "stage2_type1.h"

#define MIB (1ull << 20)
#define PAGE 4096ull
#define LOW 0x40000000ull  /* 1 MiB of memory, from the start of the file */
#define HIGH 0x80000000ull /* and another */
#define RW (MAP_FLAG_READ | MAP_FLAG_WRITE)

struct rig {
    struct viommu_stats stats;
    struct iommu iommu;
    struct viommu_iommufd *iommufd;
    struct stage2_type1 *type1;
    int file;
    struct viommu_region *regions[2];
    struct guest_memory *memories[4]; /* by bits: region 0 is in it, region 1 is */
    uint32_t monitor;
};

static uint32_t monitor_space(uint64_t shift)
{
    uint32_t id = kernel_new_space();

    CHECK_EQ(kernel_add(&kernel.spaces[id], (struct kernel_area){LOW, MIB, shift, 0}), 0);
    CHECK_EQ(kernel_add(&kernel.spaces[id], (struct kernel_area){HIGH, MIB, MIB + shift, 0}), 0);
    return id;
}

static void init(struct rig *rig, uint32_t source, bool bypass)
{
    struct viommu_settings settings = test_settings();

    memset(&kernel, 0, sizeof(kernel));
    memset(rig, 0, sizeof(*rig));
    settings.bypass = bypass;
    rig->file = memfd_create("guest", MFD_CLOEXEC);
    CHECK(rig->file >= 0);
    CHECK_EQ(ftruncate(rig->file, 2 * MIB), 0);
    CHECK_EQ(viommu_region_map(LOW, MIB, LOW, 0, rig->file, &rig->regions[0]), 0);
    CHECK_EQ(viommu_region_map(HIGH, MIB, HIGH, MIB, rig->file, &rig->regions[1]), 0);
    for (unsigned bits = 0; bits < 4; bits++)
        CHECK_EQ(guest_memory_new(bits == 2 ? &rig->regions[1] : rig->regions, (bits & 1) + (bits >> 1),
                                  &rig->memories[bits]), 0);
    CHECK_EQ(iommu_init(&rig->iommu, &settings, &rig->stats), 0);
    rig->monitor = monitor_space(0);
    CHECK_EQ(stage2_iommufd_new(rig->file, source, kernel_call, &rig->iommufd), 0);
}

/* A device of its own for an endpoint. Duplicates of descriptors count up: the model learns ours that way. */
static void add_device(struct rig *rig, uint32_t endpoint, bool bound)
{
    int next = dup(rig->file);

    CHECK(next >= 0 && close(next) == 0);
    kernel.devices[kernel.device_count++] = (struct kernel_device){next, bound, bound ? rig->monitor : 0};
    CHECK_EQ(stage2_iommufd_add(rig->iommufd, endpoint, rig->file), 0);
    CHECK_EQ(iommu_add_endpoints(&rig->iommu, endpoint, endpoint, NULL, 0, stage2_iommufd_stage2(rig->iommufd)), 0);
}

static void fini(struct rig *rig)
{
    kernel.fail_at = 0;
    kernel.fail_request = 0;
    iommu_fini(&rig->iommu);
    stage2_iommufd_free(rig->iommufd);
    stage2_type1_free(rig->type1);
    for (unsigned bits = 0; bits < 4; bits++)
        guest_memory_free(rig->memories[bits]);
    viommu_region_free(rig->regions[0]);
    viommu_region_free(rig->regions[1]);
    CHECK_EQ(close(rig->file), 0);
}

static enum status map(struct rig *rig, uint32_t domain, uint64_t iova, uint64_t length, uint64_t phys)
{
    struct iova_mapping mapping = {iova, iova + length - 1, phys, RW};

    return iommu_map(&rig->iommu, domain, &mapping);
}

static void the_monitors_memory_is_taken_over(void)
{
    struct rig rig;
    struct viommu_iommufd_info info;

    init(&rig, VIOMMU_IOMMUFD_FROM_MONITOR, true);
    add_device(&rig, 8, true);
    CHECK_EQ(kernel.devices[0].space, rig.monitor); /* all memory is reached already */
    CHECK_EQ(iommu_set_memory(&rig.iommu, rig.memories[3]), 0);
    stage2_iommufd_info(rig.iommufd, &info);
    CHECK(info.monitor_ioas == rig.monitor && info.bytes_from_monitor == 2 * MIB && info.bytes_from_files == 0);
    CHECK(kernel.devices[0].space != rig.monitor && info.unsettled == 0);
    CHECK_EQ(kernel_reach(0, HIGH + PAGE), MIB + PAGE);
    fini(&rig);
    CHECK_EQ(kernel.devices[0].space, 0);
    CHECK_EQ(kernel_space_count(), 1);
}

/* None has all memory, or two have: then the files. */
static void an_ambiguous_monitor_is_not_relied_on(void)
{
    for (unsigned count = 0; count <= 2; count += 2) {
        struct viommu_iommufd_info info;
        struct rig rig;

        init(&rig, VIOMMU_IOMMUFD_FROM_MONITOR, true);
        add_device(&rig, 8, true);
        if (count == 0)
            CHECK_EQ(kernel_remove(&kernel.spaces[rig.monitor], HIGH, HIGH + MIB - 1, -1, -1), 0);
        else
            (void)monitor_space(64 * MIB); /* of another guest */
        CHECK_EQ(iommu_set_memory(&rig.iommu, rig.memories[3]), 0);
        stage2_iommufd_info(rig.iommufd, &info);
        CHECK(info.monitor_ioas == 0 && info.bytes_from_monitor == 0 && info.bytes_from_files == 2 * MIB);
        CHECK_EQ(kernel_reach(0, HIGH + PAGE), MIB + PAGE);
        fini(&rig);
    }
}

static void an_unbound_device_waits(void)
{
    struct viommu_iommufd_info info;
    struct rig rig;

    init(&rig, VIOMMU_IOMMUFD_FROM_FILES, false);
    add_device(&rig, 8, false);
    stage2_iommufd_info(rig.iommufd, &info);
    CHECK_EQ(info.unsettled, 1);
    CHECK_EQ(iommu_attach(&rig.iommu, 1, 8, false), STATUS_DEVERR); /* nobody could do DMA with it */
    CHECK_EQ(rig.iommu.domains.count, 0);
    kernel.devices[0].bound = true;
    kernel.devices[0].space = rig.monitor;
    stage2_iommufd_settle(rig.iommufd);
    CHECK_EQ(kernel.devices[0].space, 0); /* no bypass */
    CHECK_EQ(iommu_attach(&rig.iommu, 1, 8, false), STATUS_OK);
    fini(&rig);
}

/* Only what is memory is mapped, in as many pieces as there are regions; the rest is stopped by the host. */
static void a_mapping_over_holes(void)
{
    struct rig rig;

    init(&rig, VIOMMU_IOMMUFD_FROM_FILES, false);
    add_device(&rig, 8, true);
    CHECK_EQ(iommu_set_memory(&rig.iommu, rig.memories[3]), 0);
    CHECK_EQ(iommu_attach(&rig.iommu, 1, 8, false), STATUS_OK);
    CHECK_EQ(map(&rig, 1, 0, HIGH + 2 * MIB, 0), STATUS_OK);
    CHECK_EQ(kernel_reach(0, LOW + PAGE), PAGE);
    CHECK_EQ(kernel_reach(0, HIGH), MIB);
    CHECK_EQ(kernel_reach(0, LOW - 1), KERNEL_NOWHERE);
    CHECK_EQ(kernel_reach(0, HIGH + MIB), KERNEL_NOWHERE);
    CHECK_EQ(iommu_unmap(&rig.iommu, 1, 0, UINT64_MAX), STATUS_OK);
    CHECK_EQ(kernel_reach(0, LOW + PAGE), KERNEL_NOWHERE);
    fini(&rig);
}

/* Memory comes and goes under a mapping: it follows, and every call on the way may fail without a trace. */
static void mappings_follow_memory_whatever_fails(void)
{
    unsigned failed = 0;

    for (unsigned at = 1, calls = UINT_MAX; at <= calls; at++) {
        unsigned before;
        struct rig rig;
        int rc;

        init(&rig, VIOMMU_IOMMUFD_FROM_FILES, false);
        add_device(&rig, 8, true);
        CHECK_EQ(iommu_set_memory(&rig.iommu, rig.memories[1]), 0);
        CHECK_EQ(iommu_attach(&rig.iommu, 1, 8, false), STATUS_OK);
        CHECK_EQ(map(&rig, 1, 0x1000000, PAGE, LOW), STATUS_OK);
        CHECK_EQ(map(&rig, 1, 0x2000000, PAGE, HIGH), STATUS_OK);
        before = kernel.calls;
        kernel.error = ENOMEM;
        kernel.fail_at = before + at;
        rc = iommu_set_memory(&rig.iommu, rig.memories[3]);
        if (rc == 0)
            calls = kernel.calls - before;
        if (rc != 0) {
            failed++;
            CHECK_EQ(rc, -ENOMEM);
            CHECK_EQ(kernel_reach(0, 0x1000000), 0);
            CHECK_EQ(kernel_reach(0, 0x2000000), KERNEL_NOWHERE);
            kernel.fail_at = 0;
            CHECK_EQ(iommu_set_memory(&rig.iommu, rig.memories[3]), 0);
        }
        CHECK_EQ(kernel_reach(0, 0x1000000), 0);
        CHECK_EQ(kernel_reach(0, 0x2000000), MIB);
        kernel.fail_at = 0;
        CHECK_EQ(iommu_set_memory(&rig.iommu, rig.memories[2]), 0);
        CHECK_EQ(kernel_reach(0, 0x1000000), KERNEL_NOWHERE);
        CHECK_EQ(kernel_reach(0, 0x2000000), MIB);
        fini(&rig);
    }
    CHECK(failed >= 2); /* MAP_FILE for the region, COPY for the mapping */
}

static void a_refused_piece_takes_the_others_with_it(void)
{
    struct rig rig;

    init(&rig, VIOMMU_IOMMUFD_FROM_FILES, false);
    add_device(&rig, 8, true);
    CHECK_EQ(iommu_set_memory(&rig.iommu, rig.memories[3]), 0);
    CHECK_EQ(iommu_attach(&rig.iommu, 1, 8, false), STATUS_OK);
    kernel.error = ENOMEM;
    kernel.fail_at = kernel.calls + 2;
    CHECK_EQ(map(&rig, 1, LOW, HIGH + MIB - LOW, LOW), STATUS_NOMEM);
    CHECK_EQ(kernel_reach(0, LOW), KERNEL_NOWHERE);
    CHECK_EQ(map(&rig, 1, LOW, HIGH + MIB - LOW, LOW), STATUS_OK);
    CHECK_EQ(kernel_reach(0, LOW), 0);
    fini(&rig);
}

/* A move that fails leaves the endpoint where it was, and no domain behind. */
static void a_refused_attach_changes_nothing(void)
{
    unsigned refused = 0;

    for (unsigned at = 0; at <= 2; at++) { /* 1 IOAS_ALLOC, 2 ATTACH */
        struct rig rig;
        unsigned spaces;
        enum status status;

        init(&rig, VIOMMU_IOMMUFD_FROM_FILES, false);
        add_device(&rig, 8, true);
        CHECK_EQ(iommu_set_memory(&rig.iommu, rig.memories[3]), 0);
        CHECK_EQ(iommu_attach(&rig.iommu, 1, 8, false), STATUS_OK);
        CHECK_EQ(map(&rig, 1, 0x1000000, PAGE, HIGH), STATUS_OK);
        spaces = kernel_space_count();
        kernel.error = at == 1 ? ENOMEM : EADDRINUSE;
        kernel.fail_at = at != 0 ? kernel.calls + at : 0;
        status = iommu_attach(&rig.iommu, 2, 8, false);
        kernel.fail_at = 0;
        if (status != STATUS_OK) {
            refused++;
            CHECK_EQ(status, at == 1 ? STATUS_NOMEM : STATUS_UNSUPP);
            CHECK_EQ(rig.iommu.domains.count, 1);
            CHECK_EQ(kernel_reach(0, 0x1000000), MIB);
        } else {
            CHECK_EQ(kernel_reach(0, 0x1000000), KERNEL_NOWHERE);
        }
        CHECK_EQ(kernel_space_count(), spaces);
        fini(&rig);
    }
    CHECK_EQ(refused, 2);
}

/* What cannot be unmapped must not be reached any more: both devices of the domain are cut off. */
static void a_failing_unmap_cuts_off(void)
{
    struct rig rig;

    init(&rig, VIOMMU_IOMMUFD_FROM_FILES, false);
    add_device(&rig, 8, true);
    add_device(&rig, 9, true);
    CHECK_EQ(iommu_set_memory(&rig.iommu, rig.memories[3]), 0);
    CHECK_EQ(iommu_attach(&rig.iommu, 1, 8, false), STATUS_OK);
    CHECK_EQ(iommu_attach(&rig.iommu, 1, 9, false), STATUS_OK);
    CHECK_EQ(map(&rig, 1, 0x1000000, PAGE, LOW), STATUS_OK);
    CHECK(kernel_reach(0, 0x1000000) == 0 && kernel_reach(1, 0x1000000) == 0);
    kernel.error = EBUSY;
    kernel.fail_request = HOST_IOMMU_IOAS_UNMAP;
    CHECK_EQ(iommu_unmap(&rig.iommu, 1, 0x1000000, 0x1000fff), STATUS_DEVERR);
    CHECK(kernel_reach(0, 0x1000000) == KERNEL_NOWHERE && kernel_reach(1, 0x1000000) == KERNEL_NOWHERE);
    fini(&rig);
}

/* -------------------------------------------------------------------------------------------------------------- type1 */

static void add_container(struct rig *rig, uint32_t endpoint)
{
    CHECK_EQ(stage2_type1_new(rig->file, kernel_call, &rig->type1), 0);
    CHECK_EQ(iommu_add_endpoints(&rig->iommu, endpoint, endpoint, NULL, 0, stage2_type1_stage2(rig->type1)), 0);
}

/* What an access in the container reaches, as an address in a region's mapping. */
static uint64_t container_reach(uint64_t iova)
{
    const struct kernel_area *area = kernel_find(&kernel.spaces[0], iova);

    return area != NULL ? area->backing + (iova - area->iova) : KERNEL_NOWHERE;
}

static void a_container_follows_its_endpoint(void)
{
    struct rig rig;
    uint64_t low, high;

    init(&rig, VIOMMU_IOMMUFD_FROM_FILES, true);
    add_container(&rig, 8);
    low = (uint64_t)(uintptr_t)rig.regions[0]->host;
    high = (uint64_t)(uintptr_t)rig.regions[1]->host;
    CHECK_EQ(iommu_set_memory(&rig.iommu, rig.memories[1]), 0);
    CHECK_EQ(container_reach(LOW + PAGE), low + PAGE); /* bypass */
    CHECK_EQ(iommu_attach(&rig.iommu, 1, 8, false), STATUS_OK);
    CHECK_EQ(container_reach(LOW + PAGE), KERNEL_NOWHERE);
    CHECK_EQ(map(&rig, 1, 0x1000000, PAGE, LOW), STATUS_OK);
    CHECK_EQ(map(&rig, 1, 0x2000000, PAGE, HIGH), STATUS_OK);
    CHECK_EQ(container_reach(0x1000000), low);
    CHECK_EQ(container_reach(0x2000000), KERNEL_NOWHERE);
    CHECK_EQ(iommu_set_memory(&rig.iommu, rig.memories[3]), 0);
    CHECK_EQ(container_reach(0x2000000), high);
    CHECK_EQ(iommu_set_memory(&rig.iommu, rig.memories[2]), 0);
    CHECK_EQ(container_reach(0x1000000), KERNEL_NOWHERE);
    CHECK_EQ(iommu_unmap(&rig.iommu, 1, 0x1000001 - 1, 0x2000fff + 7), STATUS_OK); /* ends that no page has */
    CHECK_EQ(container_reach(0x2000000), KERNEL_NOWHERE);
    CHECK_EQ(iommu_detach(&rig.iommu, 1, 8), STATUS_OK);
    CHECK_EQ(container_reach(HIGH), high);
    fini(&rig);
    CHECK_EQ(kernel.spaces[0].count, 0);
}

/* A domain with more mappings than the container takes: the endpoint stays where it was, with all it had. */
static void a_container_that_is_too_small(void)
{
    struct rig rig;

    init(&rig, VIOMMU_IOMMUFD_FROM_FILES, false);
    add_device(&rig, 9, true);
    add_container(&rig, 8);
    CHECK_EQ(iommu_set_memory(&rig.iommu, rig.memories[3]), 0);
    CHECK_EQ(iommu_attach(&rig.iommu, 1, 9, false), STATUS_OK);
    for (uint64_t i = 0; i < 4; i++)
        CHECK_EQ(map(&rig, 1, 0x1000000 + i * PAGE, PAGE, LOW), STATUS_OK);
    CHECK_EQ(iommu_attach(&rig.iommu, 2, 8, false), STATUS_OK);
    CHECK_EQ(map(&rig, 2, 0x7000000, PAGE, HIGH), STATUS_OK);
    kernel.most_areas = 3;
    CHECK_EQ(iommu_attach(&rig.iommu, 1, 8, false), STATUS_NOMEM);
    CHECK_EQ(container_reach(0x1000000), KERNEL_NOWHERE);
    CHECK_EQ(container_reach(0x7000000), (uint64_t)(uintptr_t)rig.regions[1]->host);
    kernel.most_areas = 4;
    CHECK_EQ(iommu_attach(&rig.iommu, 1, 8, false), STATUS_OK);
    CHECK_EQ(container_reach(0x7000000), KERNEL_NOWHERE);
    CHECK_EQ(map(&rig, 1, 0x7000000, PAGE, HIGH), STATUS_NOMEM); /* in the IOAS of the other device neither */
    CHECK_EQ(kernel_reach(0, 0x7000000), KERNEL_NOWHERE);
    fini(&rig);
}

int main(void)
{
    RUN(the_monitors_memory_is_taken_over);
    RUN(an_ambiguous_monitor_is_not_relied_on);
    RUN(an_unbound_device_waits);
    RUN(a_mapping_over_holes);
    RUN(mappings_follow_memory_whatever_fails);
    RUN(a_refused_piece_takes_the_others_with_it);
    RUN(a_refused_attach_changes_nothing);
    RUN(a_failing_unmap_cuts_off);
    RUN(a_container_follows_its_endpoint);
    RUN(a_container_that_is_too_small);
    return 0;
}
