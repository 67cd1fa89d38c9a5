/* The C API's part for endpoints behind the host's IOMMU. */
#include <errno.h>
#include <stdlib.h>

#include "engine.h"
#include "host_ioctl.h"
#include "stage2_iommufd.h"
#include "stage2_type1.h"

struct host_container {
    struct host_container *next;
    struct stage2_type1 *type1;
};

int viommu_engine_set_iommufd(struct viommu_engine *engine, int fd, uint32_t source)
{
    return engine->iommufd != NULL ? -EEXIST : stage2_iommufd_new(fd, source, host_ioctl, &engine->iommufd);
}

int viommu_engine_add_iommufd_endpoint(struct viommu_engine *engine, uint32_t endpoint, int fd,
                                       const struct viommu_reserved *reserved, size_t count)
{
    int rc;

    if (engine->iommufd == NULL)
        return -ENODEV;
    engine_quiesce(engine);
    rc = stage2_iommufd_add(engine->iommufd, endpoint, fd);
    if (rc == 0) {
        rc = iommu_add_endpoints(&engine->iommu, endpoint, endpoint, reserved, count,
                                 stage2_iommufd_stage2(engine->iommufd));
        if (rc != 0)
            stage2_iommufd_remove(engine->iommufd, endpoint);
    }
    engine_resume(engine);
    return rc;
}

void viommu_engine_settle_iommufd(struct viommu_engine *engine)
{
    if (engine->iommufd == NULL)
        return;
    engine_quiesce(engine);
    stage2_iommufd_settle(engine->iommufd);
    engine_resume(engine);
}

int viommu_engine_iommufd_info(struct viommu_engine *engine, struct viommu_iommufd_info *out)
{
    if (engine->iommufd == NULL)
        return -ENODEV;
    engine_quiesce(engine);
    stage2_iommufd_info(engine->iommufd, out);
    engine_resume(engine);
    return 0;
}

int viommu_engine_add_type1_endpoint(struct viommu_engine *engine, uint32_t endpoint, int fd,
                                     const struct viommu_reserved *reserved, size_t count)
{
    struct host_container *container = calloc(1, sizeof(*container));
    int rc;

    if (container == NULL)
        return -ENOMEM;
    rc = stage2_type1_new(fd, host_ioctl, &container->type1);
    if (rc != 0) {
        free(container);
        return rc == -ENOTTY || rc == -EINVAL ? -ENOTTY : rc;
    }
    engine_quiesce(engine);
    rc = iommu_add_endpoints(&engine->iommu, endpoint, endpoint, reserved, count, stage2_type1_stage2(container->type1));
    engine_resume(engine);
    if (rc != 0) {
        stage2_type1_free(container->type1);
        free(container);
        return rc;
    }
    container->next = engine->containers;
    engine->containers = container;
    return 0;
}

void engine_free_host(struct viommu_engine *engine)
{
    struct host_container *container;

    while ((container = engine->containers) != NULL) {
        engine->containers = container->next;
        stage2_type1_free(container->type1);
        free(container);
    }
    stage2_iommufd_free(engine->iommufd);
}
