/* How the kernel is called. Tests of errors that no kernel gives on demand put a function of their own in place. */
#ifndef VIOMMU_HOST_IOCTL_H
#define VIOMMU_HOST_IOCTL_H

/* 0 or -errno. */
typedef int (*host_ioctl_fn)(int fd, unsigned long request, void *argument);

/* The real one; an interrupted call is repeated. */
int host_ioctl(int fd, unsigned long request, void *argument);

#endif
