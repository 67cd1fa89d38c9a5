#include "vfio_user_server.h"

#include <errno.h>
#include <linux/vfio.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "irqs.h"
#include "le.h"
#include "transport.h"
#include "vfio_user.h"

#define BAR_REGION VFIO_PCI_BAR0_REGION_INDEX
#define CONFIG_REGION VFIO_PCI_CONFIG_REGION_INDEX

struct request {
    uint16_t id;
    uint16_t command;
    uint32_t flags;
    size_t length; /* of the payload, which is in server->payload */
};

/* The one request of ours that waits for its reply. */
struct pending {
    bool active;
    uint16_t id;
    uint16_t command;
    void *read_into;
    size_t length;
    uint64_t iova;
    int result;
};

struct vfu_server {
    struct vfu_options options;
    struct pci_identity identity;
    const struct vfu_ops *ops;
    void *device;
    struct pci_config config;
    struct irqs irqs;
    struct dma_table *dma;
    struct vfu_counters counters;
    int listener;
    int client; /* -1: none */
    bool versioned;
    size_t max_transfer; /* what the client takes */
    uint16_t next_id;
    uint64_t epoch;      /* counts resets and cancellations */
    uint64_t work_epoch; /* epoch when the running work() began */
    struct pending pending;
    int fds[VFU_MAX_FDS];
    size_t fd_count;
    size_t fds_used;
    uint8_t payload[VFU_MAX_MESSAGE];
};

static void complain(const char *what, int error)
{
    fprintf(stderr, "vfio-user server: %s: %s\n", what, strerror(-error));
}

/* ---- replies ---------------------------------------------------------------------------------------------------- */

static void put_header(uint8_t *header, uint16_t id, uint16_t command, size_t size, uint32_t flags, int error)
{
    le16_put(header, id);
    le16_put(header + 2, command);
    le32_put(header + 4, (uint32_t)size);
    le32_put(header + 8, flags);
    le32_put(header + 12, (uint32_t)error);
}

/* error is 0 or -errno; an error reply has no payload. */
static int reply(struct vfu_server *server, const struct request *request, int error, const void *payload,
                 size_t length)
{
    uint8_t header[VFU_HEADER_SIZE];
    struct iovec parts[2] = {{header, sizeof(header)}, {(void *)(uintptr_t)payload, length}};

    if ((request->flags & VFU_NO_REPLY) != 0 || server->options.mute)
        return 0;
    if (error != 0)
        length = 0;
    put_header(header, request->id, request->command, sizeof(header) + length,
               VFU_TYPE_REPLY | (error != 0 ? (uint32_t)VFU_ERROR : 0u), -error);
    return transport_send(server->client, parts, length > 0 ? 2 : 1);
}

/* ---- requests of the client: each returns what the connection says, not what the request does -------------------- */

/* The number after "name": in a JSON text, or fallback. Enough for the flat capabilities of VERSION. */
static uint64_t json_number(const char *text, const char *name, uint64_t fallback)
{
    const char *at = strstr(text, name);

    if (at == NULL)
        return fallback;
    at += strlen(name);
    at += strspn(at, "\" \t\r\n:");
    return *at >= '0' && *at <= '9' ? strtoull(at, NULL, 10) : fallback;
}

static int do_version(struct vfu_server *server, const struct request *request)
{
    static const char capabilities[] =
        "{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"max_dma_maps\":65535,\"pgsizes\":4096}}";
    uint8_t payload[VFU_VERSION_SIZE + sizeof(capabilities)] = {0}; /* version 0.0 */
    const char *json = (const char *)server->payload + VFU_VERSION_SIZE;
    uint64_t transfer = VFU_MAX_TRANSFER;

    if (request->length < VFU_VERSION_SIZE || le16_get(server->payload) != 0 ||
        (request->length > VFU_VERSION_SIZE && server->payload[request->length - 1] != 0))
        return reply(server, request, -EINVAL, NULL, 0);
    if (request->length > VFU_VERSION_SIZE)
        transfer = json_number(json, "\"max_data_xfer_size\"", transfer);
    server->max_transfer = transfer == 0 || transfer > VFU_MAX_TRANSFER ? VFU_MAX_TRANSFER : (size_t)transfer;
    server->versioned = true;
    memcpy(payload + VFU_VERSION_SIZE, capabilities, sizeof(capabilities));
    return reply(server, request, 0, payload, sizeof(payload));
}

static int do_dma_map(struct vfu_server *server, const struct request *request)
{
    const uint8_t *payload = server->payload;
    int fd = server->fd_count > 0 && !server->options.messages_only ? server->fds[0] : -1;
    uint32_t flags;
    int error;

    if (request->length != VFU_DMA_MAP_SIZE || le32_get(payload) < VFU_DMA_MAP_SIZE || server->fd_count > 1)
        return reply(server, request, -EINVAL, NULL, 0);
    flags = le32_get(payload + 4);
    server->counters.maps++;
    if (server->fd_count > 0 && server->ops->memory_fd != NULL)
        server->ops->memory_fd(server->device, server->fds[0]);
    error = dma_table_add(server->dma, le64_get(payload + 16), le64_get(payload + 24),
                          (flags & VFU_DMA_READABLE) != 0, (flags & VFU_DMA_WRITABLE) != 0, fd, le64_get(payload + 8));
    if (error != 0)
        complain("DMA_MAP refused", error);
    return reply(server, request, error, NULL, 0);
}

static int do_dma_unmap(struct vfu_server *server, const struct request *request)
{
    const uint8_t *payload = server->payload;
    uint64_t iova, size;
    int error = 0;

    if (request->length < VFU_DMA_UNMAP_SIZE || le32_get(payload) < VFU_DMA_UNMAP_SIZE)
        return reply(server, request, -EINVAL, NULL, 0);
    iova = le64_get(payload + 8);
    size = le64_get(payload + 16);
    server->counters.unmaps++;
    if ((le32_get(payload + 4) & VFU_DMA_UNMAP_ALL) == 0)
        error = dma_table_remove(server->dma, iova, size);
    else if (iova != 0 || size != 0)
        error = -EINVAL;
    else
        dma_table_clear(server->dma);
    if (error != 0)
        complain("DMA_UNMAP refused", error);
    if (server->options.no_unmap_reply)
        return 0;
    return reply(server, request, error, payload, VFU_DMA_UNMAP_SIZE);
}

static int do_device_info(struct vfu_server *server, const struct request *request)
{
    uint8_t info[VFU_DEVICE_INFO_SIZE];

    if (request->length < sizeof(info))
        return reply(server, request, -EINVAL, NULL, 0);
    le32_put(info, sizeof(info));
    le32_put(info + 4, VFIO_DEVICE_FLAGS_RESET | VFIO_DEVICE_FLAGS_PCI);
    le32_put(info + 8, VFIO_PCI_NUM_REGIONS);
    le32_put(info + 12, VFIO_PCI_NUM_IRQS);
    return reply(server, request, 0, info, sizeof(info));
}

static uint64_t region_size(const struct vfu_server *server, uint32_t index)
{
    return index == BAR_REGION ? server->identity.bar_size : index == CONFIG_REGION ? PCI_CONFIG_SIZE : 0;
}

static int do_region_info(struct vfu_server *server, const struct request *request)
{
    uint8_t info[VFU_REGION_INFO_SIZE] = {0};
    uint32_t index;
    uint64_t size;

    if (request->length < sizeof(info) || (index = le32_get(server->payload + 8)) >= VFIO_PCI_NUM_REGIONS)
        return reply(server, request, -EINVAL, NULL, 0);
    size = region_size(server, index);
    le32_put(info, sizeof(info));
    le32_put(info + 4, size > 0 ? VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE : 0);
    le32_put(info + 8, index);
    le64_put(info + 16, size);
    return reply(server, request, 0, info, sizeof(info));
}

static int do_irq_info(struct vfu_server *server, const struct request *request)
{
    uint8_t info[VFU_IRQ_INFO_SIZE];
    uint32_t index, flags, count;
    int error;

    if (request->length < sizeof(info))
        return reply(server, request, -EINVAL, NULL, 0);
    index = le32_get(server->payload + 8);
    error = irqs_info(&server->irqs, index, &flags, &count);
    le32_put(info, sizeof(info));
    le32_put(info + 4, flags);
    le32_put(info + 8, index);
    le32_put(info + 12, count);
    return reply(server, request, error, info, sizeof(info));
}

static int do_set_irqs(struct vfu_server *server, const struct request *request)
{
    const uint8_t *payload = server->payload;
    int error = -EINVAL;

    if (request->length >= VFU_SET_IRQS_SIZE && le32_get(payload) >= VFU_SET_IRQS_SIZE)
        error = irqs_set(&server->irqs, le32_get(payload + 4), le32_get(payload + 8), le32_get(payload + 12),
                         le32_get(payload + 16), payload + VFU_SET_IRQS_SIZE, request->length - VFU_SET_IRQS_SIZE,
                         server->fds, server->fd_count, &server->fds_used);
    return reply(server, request, error, NULL, 0);
}

static void reset(struct vfu_server *server)
{
    server->epoch++;
    pci_config_reset(&server->config);
    dma_table_set_in_use(server->dma, false);
    irqs_set_intx(&server->irqs, false);
    server->ops->reset(server->device);
}

/* What REGION_READ and REGION_WRITE ask for: 0 or -EINVAL. */
static int region_access(const struct vfu_server *server, const struct request *request, uint64_t *offset,
                         uint32_t *region, uint32_t *count)
{
    uint64_t size;

    if (request->length < VFU_REGION_IO_SIZE)
        return -EINVAL;
    *offset = le64_get(server->payload);
    *region = le32_get(server->payload + 8);
    *count = le32_get(server->payload + 12);
    size = region_size(server, *region);
    return *count <= VFU_MAX_TRANSFER && *offset <= size && *count <= size - *offset ? 0 : -EINVAL;
}

static int do_region_read(struct vfu_server *server, const struct request *request)
{
    uint64_t offset;
    uint32_t region, count;
    uint8_t *data = server->payload + VFU_REGION_IO_SIZE;
    int error = region_access(server, request, &offset, &region, &count);

    if (error != 0)
        return reply(server, request, error, NULL, 0);
    memset(data, 0, count);
    error = region == CONFIG_REGION ? pci_config_read(&server->config, offset, data, count)
                                    : server->ops->read(server->device, offset, data, count);
    return reply(server, request, error, server->payload, VFU_REGION_IO_SIZE + (size_t)count);
}

static int do_region_write(struct vfu_server *server, const struct request *request)
{
    uint64_t offset;
    uint32_t region, count;
    const uint8_t *data = server->payload + VFU_REGION_IO_SIZE;
    bool reset_asked = false;
    int error = region_access(server, request, &offset, &region, &count);

    if (error == 0 && request->length != VFU_REGION_IO_SIZE + (size_t)count)
        error = -EINVAL;
    if (error == 0)
        error = region == CONFIG_REGION ? pci_config_write(&server->config, offset, data, count, &reset_asked)
                                        : server->ops->write(server->device, offset, data, count);
    if (reset_asked)
        reset(server);
    if (error == 0 && region == CONFIG_REGION)
        dma_table_set_in_use(server->dma, pci_config_bus_master(&server->config));
    return reply(server, request, error, server->payload, VFU_REGION_IO_SIZE);
}

static int do_device_reset(struct vfu_server *server, const struct request *request)
{
    reset(server);
    return reply(server, request, 0, NULL, 0);
}

static int handle_request(struct vfu_server *server, const struct request *request)
{
    server->counters.requests++;
    if (!server->versioned && request->command != VFU_VERSION)
        return reply(server, request, -EINVAL, NULL, 0);
    switch (request->command) {
    case VFU_VERSION:
        return do_version(server, request);
    case VFU_DMA_MAP:
        return do_dma_map(server, request);
    case VFU_DMA_UNMAP:
        return do_dma_unmap(server, request);
    case VFU_DEVICE_GET_INFO:
        return do_device_info(server, request);
    case VFU_DEVICE_GET_REGION_INFO:
        return do_region_info(server, request);
    case VFU_DEVICE_GET_IRQ_INFO:
        return do_irq_info(server, request);
    case VFU_DEVICE_SET_IRQS:
        return do_set_irqs(server, request);
    case VFU_REGION_READ:
        return do_region_read(server, request);
    case VFU_REGION_WRITE:
        return do_region_write(server, request);
    case VFU_DEVICE_RESET:
        return do_device_reset(server, request);
    default:
        return reply(server, request, -ENOTSUP, NULL, 0);
    }
}

/* ---- replies of the client ---------------------------------------------------------------------------------------- */

static int handle_reply(struct vfu_server *server, const struct request *message, uint32_t error)
{
    struct pending *pending = &server->pending;
    const uint8_t *payload = server->payload;
    size_t data = pending->read_into != NULL ? pending->length : 0;

    if (!pending->active || message->id != pending->id || message->command != pending->command) {
        complain("reply to nothing", -EPROTO);
        return -EPROTO;
    }
    pending->active = false;
    if ((message->flags & VFU_ERROR) != 0) {
        pending->result = error > 0 && error < 4096 ? -(int)error : -EIO;
    } else if (message->length != VFU_DMA_IO_SIZE + data || le64_get(payload) != pending->iova ||
               le64_get(payload + 8) != pending->length) {
        complain("malformed reply to a DMA request", -EPROTO);
        return -EPROTO;
    } else if (data > 0) {
        memcpy(pending->read_into, payload + VFU_DMA_IO_SIZE, data);
    }
    return 0;
}

/* ---- one message --------------------------------------------------------------------------------------------------- */

static int receive(struct vfu_server *server, struct request *message, uint32_t *error)
{
    uint8_t header[VFU_HEADER_SIZE];
    uint32_t size;
    int result;

    server->fd_count = 0;
    server->fds_used = 0;
    result = transport_receive(server->client, header, sizeof(header), server->fds, &server->fd_count);
    if (result != 0)
        return result;
    message->id = le16_get(header);
    message->command = le16_get(header + 2);
    size = le32_get(header + 4);
    message->flags = le32_get(header + 8);
    *error = le32_get(header + 12);
    if (size < VFU_HEADER_SIZE || size > VFU_MAX_MESSAGE) {
        complain("message of an impossible size", -EPROTO);
        return -EPROTO;
    }
    message->length = size - VFU_HEADER_SIZE;
    return transport_receive(server->client, server->payload, message->length, server->fds, &server->fd_count);
}

static int serve_one(struct vfu_server *server)
{
    struct request message;
    uint32_t error = 0;
    int result = receive(server, &message, &error);

    if (result == 0) {
        if ((message.flags & VFU_TYPE_MASK) == VFU_TYPE_REQUEST)
            result = handle_request(server, &message);
        else if ((message.flags & VFU_TYPE_MASK) == VFU_TYPE_REPLY)
            result = handle_reply(server, &message, error);
        else
            result = -EPROTO;
    }
    for (size_t i = server->fds_used; i < server->fd_count; i++)
        close(server->fds[i]);
    server->fd_count = server->fds_used = 0;
    return result;
}

/* ---- DMA ------------------------------------------------------------------------------------------------------------ */

static int ask(struct vfu_server *server, uint16_t command, uint64_t iova, const void *data, void *read_into,
               size_t length)
{
    uint8_t head[VFU_HEADER_SIZE + VFU_DMA_IO_SIZE];
    struct iovec parts[2] = {{head, sizeof(head)}, {(void *)(uintptr_t)data, length}};
    size_t sent = data != NULL ? length : 0;
    int result;

    if (server->client < 0)
        return -ECONNRESET;
    if (server->epoch != server->work_epoch)
        return -ECANCELED;
    put_header(head, server->next_id, command, sizeof(head) + sent, VFU_TYPE_REQUEST, 0);
    le64_put(head + VFU_HEADER_SIZE, iova);
    le64_put(head + VFU_HEADER_SIZE + 8, length);
    server->pending = (struct pending){
        .active = true, .id = server->next_id++, .command = command, .read_into = read_into, .length = length,
        .iova = iova};
    result = transport_send(server->client, parts, sent > 0 ? 2 : 1);
    while (result == 0 && server->pending.active)
        result = serve_one(server);
    if (result != 0) {
        /* The stream is out of step from here on: the connection is over. */
        server->pending.active = false;
        close(server->client);
        server->client = -1;
        return result == -EINTR ? -EINTR : -ECONNRESET;
    }
    if (server->pending.result != 0)
        server->counters.dma_refused++;
    return server->epoch != server->work_epoch ? -ECANCELED : server->pending.result;
}

int vfu_dma_read_message(struct vfu_server *server, uint64_t iova, void *buffer, size_t length)
{
    server->counters.dma_read_messages++;
    return ask(server, VFU_DMA_READ, iova, NULL, buffer, length);
}

int vfu_dma_write_message(struct vfu_server *server, uint64_t iova, const void *buffer, size_t length)
{
    server->counters.dma_write_messages++;
    return ask(server, VFU_DMA_WRITE, iova, buffer, NULL, length);
}

static void copy_out(uint8_t *to, const uint8_t *from, size_t length)
{
    uint32_t last;

    if (length < sizeof(last) || length % sizeof(last) != 0 || (uintptr_t)to % sizeof(last) != 0) {
        memcpy(to, from, length);
        return;
    }
    /* A driver polls the last word of a completion entry for its phase bit. */
    memcpy(&last, from + length - sizeof(last), sizeof(last));
    memcpy(to, from, length - sizeof(last));
    __atomic_store_n((uint32_t *)(void *)(to + length - sizeof(last)), last, __ATOMIC_RELEASE);
}

static int transfer(struct vfu_server *server, uint64_t iova, uint8_t *read_into, const uint8_t *data, size_t length)
{
    while (length > 0) {
        const struct dma_mapping *mapping = dma_table_find(server->dma, iova);
        size_t part = length;
        int error = 0;

        if (server->epoch != server->work_epoch)
            return -ECANCELED;
        if (mapping != NULL && part - 1 > mapping->last - iova)
            part = (size_t)(mapping->last - iova) + 1;
        if (mapping != NULL && mapping->host != NULL && (read_into != NULL ? mapping->readable : mapping->writable)) {
            if (read_into != NULL)
                memcpy(read_into, mapping->host + (iova - mapping->iova), part);
            else
                copy_out(mapping->host + (iova - mapping->iova), data, part);
        } else {
            if (part > server->max_transfer)
                part = server->max_transfer;
            error = read_into != NULL ? vfu_dma_read_message(server, iova, read_into, part)
                                      : vfu_dma_write_message(server, iova, data, part);
            if (error != 0)
                return error;
            mapping = dma_table_find(server->dma, iova); /* the table may have changed meanwhile */
            if (mapping != NULL && part - 1 > mapping->last - iova)
                mapping = NULL;
        }
        dma_table_touch(server->dma, mapping, iova, part);
        iova += part;
        length -= part;
        if (read_into != NULL)
            read_into += part;
        else
            data += part;
    }
    return 0;
}

int vfu_dma_read(struct vfu_server *server, uint64_t iova, void *buffer, size_t length)
{
    return transfer(server, iova, buffer, NULL, length);
}

int vfu_dma_write(struct vfu_server *server, uint64_t iova, const void *buffer, size_t length)
{
    return transfer(server, iova, NULL, buffer, length);
}

/* ---- the server ----------------------------------------------------------------------------------------------------- */

int vfu_server_new(const struct vfu_options *options, const struct pci_identity *identity, const struct vfu_ops *ops,
                   void *device, struct vfu_server **out)
{
    struct vfu_server *server = calloc(1, sizeof(*server));
    int listener;

    if (server == NULL)
        return -ENOMEM;
    server->dma = dma_table_new();
    listener = server->dma == NULL ? -ENOMEM : transport_listen(options->socket_path);
    if (listener < 0) {
        dma_table_free(server->dma);
        free(server);
        return listener;
    }
    server->options = *options;
    server->identity = *identity;
    server->ops = ops;
    server->device = device;
    server->listener = listener;
    server->client = -1;
    irqs_init(&server->irqs, identity->vectors);
    pci_config_init(&server->config, identity);
    *out = server;
    return 0;
}

void vfu_server_free(struct vfu_server *server)
{
    if (server == NULL)
        return;
    close(server->listener);
    unlink(server->options.socket_path);
    irqs_clear(&server->irqs);
    dma_table_free(server->dma);
    free(server);
}

static void run_work(struct vfu_server *server)
{
    do {
        if (server->client < 0 || server->options.mute || !pci_config_bus_master(&server->config))
            return;
        server->work_epoch = server->epoch;
        server->ops->work(server->device);
        /* A reset that was served in the middle may have been followed by requests that left new work. */
    } while (server->epoch != server->work_epoch);
}

static void serve_client(struct vfu_server *server)
{
    int result = 0;

    server->counters.clients++;
    server->versioned = false;
    server->max_transfer = VFU_MAX_TRANSFER;
    while (result == 0 && server->client >= 0) {
        result = serve_one(server);
        if (result == 0)
            run_work(server);
    }
    if (result != 0 && result != -ECONNRESET && result != -EINTR)
        complain("client dropped", result);
    if (server->client >= 0)
        close(server->client);
    server->client = -1;
    dma_table_clear(server->dma);
    irqs_clear(&server->irqs);
    reset(server);
}

int vfu_server_run(struct vfu_server *server)
{
    do {
        int fd = transport_accept(server->listener);

        if (fd == -EINTR)
            return 0;
        if (fd < 0)
            return fd;
        server->client = fd;
        serve_client(server);
    } while (!server->options.once && !transport_stopped());
    return 0;
}

void vfu_server_cancel(struct vfu_server *server)
{
    server->epoch++;
}

void vfu_server_mute(struct vfu_server *server)
{
    server->options.mute = true;
}

bool vfu_msix_enabled(const struct vfu_server *server)
{
    return irqs_msix_enabled(&server->irqs);
}

void vfu_send_msix(struct vfu_server *server, unsigned vector)
{
    irqs_send_msix(&server->irqs, vector);
}

void vfu_set_intx(struct vfu_server *server, bool level)
{
    irqs_set_intx(&server->irqs, level);
}

const struct dma_table *vfu_server_dma(const struct vfu_server *server)
{
    return server->dma;
}

struct vfu_counters vfu_server_counters(const struct vfu_server *server)
{
    struct vfu_counters counters = server->counters;

    counters.interrupts = server->irqs.sent;
    return counters;
}
