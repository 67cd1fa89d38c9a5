#include "host_ioctl.h"

#include <errno.h>
#include <sys/ioctl.h>

int host_ioctl(int fd, unsigned long request, void *argument)
{
    int rc;

    do {
        rc = ioctl(fd, request, argument);
    } while (rc < 0 && errno == EINTR);
    return rc < 0 ? -errno : 0;
}
