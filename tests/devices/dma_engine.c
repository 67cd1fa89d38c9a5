/*
 * A DMA engine as a vfio-user device: registers and transfers like QEMU's edu device (docs/specs/edu.rst), so that a
 * guest program can move exact bytes between guest memory and a buffer of the device and see what arrived.
 *
 * BAR 0, 16 KiB, registers of 4 bytes and from 0x80 also of 8:
 *   0x00  RO  identification, 0x010000ed
 *   0x04  RW  liveness: reads as the inversion of what was written
 *   0x24  RO  interrupt status          0x60  WO  raise it by these bits     0x64  WO  acknowledge these bits
 *   0x80  RW  source, 0x88 destination, 0x90 count: an IOVA, or 0x40000 + n for byte n of the buffer of 4 KiB
 *   0x98  RW  command: 1 start (reads 1 while it runs), 2 from the buffer to memory (else the other way),
 *             4 raise interrupt 0x100 when done
 *   0xa0  RO  what the last transfer came to: 0, or an errno. Not in edu: there a refused transfer cannot be told.
 *   0xa8  RO  transfers done, refused ones included
 *   0x1000    MSI-X table (one vector), 0x2000 pending bits; both belong to the client
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device_main.h"
#include "le.h"
#include "transport.h"

#define BUFFER_BASE 0x40000u
#define BUFFER_SIZE 4096u
#define REGISTERS 0xb0u

enum { ID = 0x00, LIVENESS = 0x04, IRQ_STATUS = 0x24, IRQ_RAISE = 0x60, IRQ_ACK = 0x64 };
enum { SOURCE = 0x80, DESTINATION = 0x88, COUNT = 0x90, COMMAND = 0x98, RESULT = 0xa0, DONE = 0xa8 };
enum { COMMAND_START = 1, COMMAND_TO_MEMORY = 2, COMMAND_INTERRUPT = 4 };

struct dma_engine {
    struct vfu_server *server;
    uint8_t registers[REGISTERS];
    uint8_t buffer[BUFFER_SIZE];
    uint64_t transfers;
    uint64_t refused;
    uint64_t bytes;
};

static void engine_reset(void *device)
{
    struct dma_engine *engine = device;

    memset(engine->registers, 0, sizeof(engine->registers));
    memset(engine->buffer, 0, sizeof(engine->buffer));
    le32_put(engine->registers + ID, 0x010000ed);
}

static void set_irq_status(struct dma_engine *engine, uint32_t status)
{
    uint32_t before = le32_get(engine->registers + IRQ_STATUS);

    le32_put(engine->registers + IRQ_STATUS, status);
    if (!vfu_msix_enabled(engine->server))
        vfu_set_intx(engine->server, status != 0);
    else if ((status & ~before) != 0)
        vfu_send_msix(engine->server, 0);
}

static int engine_read(void *device, uint64_t offset, void *data, size_t length)
{
    const struct dma_engine *engine = device;

    if (offset + length <= REGISTERS)
        memcpy(data, engine->registers + offset, length);
    return 0;
}

static int engine_write(void *device, uint64_t offset, const void *data, size_t length)
{
    struct dma_engine *engine = device;
    uint32_t status = le32_get(engine->registers + IRQ_STATUS);
    uint32_t value;

    if (offset >= REGISTERS)
        return 0; /* MSI-X table and pending bits are played by the client */
    if ((length != 4 && (length != 8 || offset < SOURCE)) || offset % length != 0)
        return -EINVAL;
    if (offset >= SOURCE && offset < RESULT) {
        /* The command is read when the work begins; until it is done the registers stand still. */
        if ((engine->registers[COMMAND] & COMMAND_START) == 0)
            memcpy(engine->registers + offset, data, length);
        return 0;
    }
    value = le32_get(data);
    if (offset == LIVENESS)
        le32_put(engine->registers + LIVENESS, ~value);
    else if (offset == IRQ_RAISE)
        set_irq_status(engine, status | value);
    else if (offset == IRQ_ACK)
        set_irq_status(engine, status & ~value);
    return 0;
}

/* The place of [at, at + count) in the buffer, or NULL when it is not inside. */
static uint8_t *in_buffer(struct dma_engine *engine, uint64_t at, uint64_t count)
{
    uint64_t offset = at - BUFFER_BASE;

    return offset <= BUFFER_SIZE && count <= BUFFER_SIZE - offset ? engine->buffer + offset : NULL;
}

static int run_transfer(struct dma_engine *engine, bool to_memory)
{
    uint64_t source = le64_get(engine->registers + SOURCE);
    uint64_t destination = le64_get(engine->registers + DESTINATION);
    uint64_t count = le64_get(engine->registers + COUNT);
    uint8_t *buffer = in_buffer(engine, to_memory ? source : destination, count);

    if (buffer == NULL)
        return -EINVAL;
    return to_memory ? vfu_dma_write(engine->server, destination, buffer, (size_t)count)
                     : vfu_dma_read(engine->server, source, buffer, (size_t)count);
}

static void engine_work(void *device)
{
    struct dma_engine *engine = device;
    uint8_t command = engine->registers[COMMAND];
    int error;

    if ((command & COMMAND_START) == 0)
        return;
    error = run_transfer(engine, (command & COMMAND_TO_MEMORY) != 0);
    if (error == -ECANCELED || error == -ECONNRESET || error == -EINTR)
        return; /* reset in the middle: the registers are new */
    engine->transfers++;
    if (error == 0)
        engine->bytes += le64_get(engine->registers + COUNT);
    else
        engine->refused++;
    le64_put(engine->registers + RESULT, (uint64_t)-error);
    le64_put(engine->registers + DONE, le64_get(engine->registers + DONE) + 1);
    engine->registers[COMMAND] &= (uint8_t)~COMMAND_START;
    if ((command & COMMAND_INTERRUPT) != 0)
        set_irq_status(engine, le32_get(engine->registers + IRQ_STATUS) | 0x100);
}

static void engine_summary(void *device)
{
    const struct dma_engine *engine = device;

    printf("\"transfers\":%" PRIu64 ",\"refused\":%" PRIu64 ",\"bytes\":%" PRIu64, engine->transfers, engine->refused,
           engine->bytes);
}

int main(int argc, char **argv)
{
    static const struct option long_options[] = {DEVICE_OPTIONS, {"help", no_argument, NULL, 'h'}, {0}};
    static const struct pci_identity identity = {
        .vendor = 0x1234, .device = 0x11e9, .class_code = 0xff0000, .bar_size = 0x4000,
        .vectors = 1, .msix_table = 0x1000, .msix_pba = 0x2000};
    static const struct vfu_ops ops = {
        .read = engine_read, .write = engine_write, .reset = engine_reset, .work = engine_work};
    static struct dma_engine engine;
    struct vfu_options options = {0};
    int option, error;

    while ((option = getopt_long(argc, argv, "", long_options, NULL)) != -1) {
        if (option == 'h') {
            fputs("usage: dma_engine --socket PATH [options]\n" DEVICE_USAGE, stdout);
            return 0;
        }
        if (option == '?')
            return 2;
        device_option(&options, option, optarg);
    }
    if (options.socket_path == NULL || optind != argc)
        device_usage_error("dma_engine: --socket PATH is required, and no other argument");
    transport_catch_stop();
    engine_reset(&engine);
    error = vfu_server_new(&options, &identity, &ops, &engine, &engine.server);
    if (error != 0)
        device_usage_error("dma_engine: --socket %s: %s", options.socket_path, strerror(-error));
    return device_run(engine.server, &options, engine_summary, &engine);
}
