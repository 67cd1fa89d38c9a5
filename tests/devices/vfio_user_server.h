/*
 * A vfio-user server for one PCI function with one BAR: it owns the socket, the configuration space, the interrupts
 * and the DMA mappings, and leaves registers and behaviour to a device. One thread, one client at a time; when a
 * client goes away its mappings and interrupts go with it and the next one is accepted.
 *
 * A device accesses guest memory only from its work() function. While such an access waits for the client, further
 * requests of the client are served (QEMU serves DMA_READ and DMA_WRITE in the same thread that may be waiting for our
 * answer to a register access), so registers can change and mappings can go in the middle of work(); they are looked
 * up anew for every access, and an access after a reset returns -ECANCELED.
 */
#ifndef VFIO_USER_SERVER_H
#define VFIO_USER_SERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "dma_table.h"
#include "pci_config.h"

struct vfu_ops {
    /* Registers in BAR 0; [offset, offset + length) is inside it. 0 or -errno. They must not access guest memory. */
    int (*read)(void *device, uint64_t offset, void *data, size_t length);
    int (*write)(void *device, uint64_t offset, const void *data, size_t length);
    /* Back to the state after power on; the configuration space is reset by the server. */
    void (*reset)(void *device);
    /* Called after each request of the client, while the function is a bus master. */
    void (*work)(void *device);
    /* Optional: a descriptor of memory arrived with a DMA_MAP. Still the server's. */
    void (*memory_fd)(void *device, int fd);
};

struct vfu_options {
    const char *socket_path;
    bool messages_only;  /* never map a descriptor: all DMA by DMA_READ and DMA_WRITE */
    bool mute;           /* read everything, answer nothing */
    bool no_unmap_reply; /* answer everything but DMA_UNMAP */
    bool once;           /* end with the first client */
};

struct vfu_counters {
    uint64_t clients;
    uint64_t requests;        /* of clients, all kinds */
    uint64_t maps;
    uint64_t unmaps;
    uint64_t dma_read_messages;
    uint64_t dma_write_messages;
    uint64_t dma_refused;     /* messages answered with an error */
    uint64_t interrupts;
};

struct vfu_server;

/* The device must outlive the server. 0 or -errno. The socket listens when this returns. */
int vfu_server_new(const struct vfu_options *options, const struct pci_identity *identity, const struct vfu_ops *ops,
                   void *device, struct vfu_server **out);
void vfu_server_free(struct vfu_server *server);

/* Serve until SIGTERM or SIGINT (or the end of the first client, with options.once): 0 or -errno. */
int vfu_server_run(struct vfu_server *server);

/*
 * Access guest memory: through a mapping where there is one that permits it, by messages elsewhere, so that it is the
 * client who refuses. 0; what the client answered, negative (-EFAULT ...); -ECANCELED after a reset or
 * vfu_server_cancel(); -ECONNRESET or -EINTR when the client is gone or the program is to stop. A write of whole
 * 32-bit words to an aligned address stores the last word last, as a completion entry needs.
 */
int vfu_dma_read(struct vfu_server *server, uint64_t iova, void *buffer, size_t length);
int vfu_dma_write(struct vfu_server *server, uint64_t iova, const void *buffer, size_t length);

/* One DMA_READ or DMA_WRITE message whatever is mapped; length at most VFU_MAX_TRANSFER. */
int vfu_dma_read_message(struct vfu_server *server, uint64_t iova, void *buffer, size_t length);
int vfu_dma_write_message(struct vfu_server *server, uint64_t iova, const void *buffer, size_t length);

/* Every access of the work() that runs now fails from here on. */
void vfu_server_cancel(struct vfu_server *server);
/* From here on nothing is answered. */
void vfu_server_mute(struct vfu_server *server);

/* MSI-X when the client enabled it. */
bool vfu_msix_enabled(const struct vfu_server *server);
void vfu_send_msix(struct vfu_server *server, unsigned vector);
void vfu_set_intx(struct vfu_server *server, bool level);

const struct dma_table *vfu_server_dma(const struct vfu_server *server);
struct vfu_counters vfu_server_counters(const struct vfu_server *server);

#endif
