/*
 * Stage 2 through the host's IOMMU, by an iommufd that is shared with the machine monitor.
 *
 * The monitor binds a device to the iommufd, attaches it to all guest memory, and does not touch it again while the
 * guest runs. From then on viommud moves it, with the same file of the device: into the I/O address space (IOAS) of
 * its domain, to guest memory at its own addresses, or to nothing. Each of these is one ioctl that replaces what was
 * there before, without a moment in between, or fails and changes nothing.
 *
 * All of the domain's endpoints share its IOAS. What is in it is copied from the identity IOAS: that copies no memory
 * and pins none again, since both refer to the same pages. The identity IOAS holds guest memory at its own addresses
 * and comes from the monitor's IOAS in the same way, when there is exactly one that has all of it; else from the files
 * behind guest memory.
 */
#ifndef VIOMMU_STAGE2_IOMMUFD_H
#define VIOMMU_STAGE2_IOMMUFD_H

#include <stdbool.h>
#include <stdint.h>

#include "host_ioctl.h"
#include "stage2.h"
#include "viommu.h"

struct viommu_iommufd;

/*
 * A back-end without devices; fd is duplicated. -ENOTTY or -EINVAL: fd is no iommufd. -EINVAL: an unknown source.
 */
int stage2_iommufd_new(int fd, uint32_t source, host_ioctl_fn call, struct viommu_iommufd **out);
/* Every device it moved is left without access to memory, and everything it made is gone. */
void stage2_iommufd_free(struct viommu_iommufd *iommufd);

struct stage2 *stage2_iommufd_stage2(struct viommu_iommufd *iommufd);

/*
 * The device of an endpoint, a VFIO character device that was or will be bound to this iommufd; fd is duplicated. To
 * be done before the endpoint is added to the IOMMU. -EEXIST.
 */
int stage2_iommufd_add(struct viommu_iommufd *iommufd, uint32_t endpoint, int fd);
void stage2_iommufd_remove(struct viommu_iommufd *iommufd, uint32_t endpoint);

/*
 * Put devices where they belong that could not be put there when it was asked for, because nobody had bound them yet.
 * Worth calling when the monitor shows that it has its devices.
 */
void stage2_iommufd_settle(struct viommu_iommufd *iommufd);

void stage2_iommufd_info(const struct viommu_iommufd *iommufd, struct viommu_iommufd_info *out);

#endif
