/*
 * Stage 2 through the host's IOMMU, by a VFIO container with a type1 IOMMU: for kernels without iommufd, and for
 * devices that another process than the machine monitor drives.
 *
 * A container is one I/O address space, and a device stays in its container while it is in use. So the container is
 * rewritten when its endpoint goes to another domain: its mappings go, those of the new domain come, and what the
 * device accesses in between is stopped. When they do not all fit, those of the old domain come back.
 */
#ifndef VIOMMU_STAGE2_TYPE1_H
#define VIOMMU_STAGE2_TYPE1_H

#include "host_ioctl.h"
#include "stage2.h"

struct stage2_type1;

/*
 * A back-end for one endpoint; fd is duplicated: a container whose IOMMU is TYPE1v2, with every device that the
 * endpoint stands for in it and nothing mapped. -ENOTTY or -EINVAL: it is none.
 */
int stage2_type1_new(int fd, host_ioctl_fn call, struct stage2_type1 **out);
/* Everything mapped goes. */
void stage2_type1_free(struct stage2_type1 *type1);

struct stage2 *stage2_type1_stage2(struct stage2_type1 *type1);

#endif
