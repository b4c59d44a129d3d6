/* Strided slices of host memory, packed into slots and copied to one device from there. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "align.h"
#include "aside.h"
#include "device.h"
#include "error.h"
#include "os.h"
#include "ring.h"

#define ALIGN_BYTES 64u /* of target and slot alike: what runtimes copy best, and some alone */
#define SLOT_REST 8u    /* a slice is split unless less than this part of a slot is left */
#define POLL_MS 10u
#define ELSEWHERE_MS 5000u /* what a thread of ours may take besides the wait it was asked for */

/* A slot whose copies are under way. */
struct flight {
    sllmi_slot *slot;
    uint64_t fence;
};

/* A call's slice, by which the same call is known again. */
struct slice {
    uint64_t target, source, rows, row_bytes, stride_bytes;
};

struct sllm_gather {
    pid_t pid;
    sllm_device *device;
    sllm_ring *ring;
    void *queue;
    sllmi_slot *slot;       /* being filled, or NULL */
    uint64_t filled;        /* bytes of it */
    struct slice slice;     /* that a call with SLLM_E_BUSY left off in, */
    uint64_t taken;         /* and so many bytes of it are on their way */
    struct flight *flights; /* a ring buffer, as long as the ring has slots */
    uint32_t capacity, head, count;
    uint64_t started; /* bytes whose copies were */
    bool lost;        /* a thread of ours is in the queue for ever */
};

/* Bytes [at, at + bytes) of a slice's rows, one after the other. */
static void pack(char *to, const char *source, uint64_t row_bytes, uint64_t stride_bytes,
                 uint64_t at, uint64_t bytes)
{
    while (bytes > 0) {
        uint64_t row = at / row_bytes, column = at % row_bytes;
        uint64_t part = sllmi_min(bytes, row_bytes - column);
        memcpy(to, source + row * stride_bytes + column, part);
        to += part;
        at += part;
        bytes -= part;
    }
}

static void land(sllm_gather *gather)
{
    sllmi_ring_release(gather->ring, gather->flights[gather->head].slot);
    gather->head = (gather->head + 1) % gather->capacity;
    gather->count--;
}

/* The slot in hand is full: it returns when what was copied from it is done. */
static sllm_status send_off(sllm_gather *gather, sllm_error *err)
{
    if (gather->slot == NULL) {
        return SLLM_OK;
    }
    struct flight *flight = &gather->flights[(gather->head + gather->count) % gather->capacity];
    sllm_status status = gather->device->ops->fence(gather->queue, &flight->fence, err);
    if (status == SLLM_OK) {
        flight->slot = gather->slot;
        gather->count++;
        gather->slot = NULL;
    }
    return status;
}

static sllm_status take_slot(sllm_gather *gather, uint64_t deadline_ns, sllm_error *err)
{
    const sllmi_device_ops *ops = gather->device->ops;
    const atomic_bool never = false;
    while ((gather->slot = sllmi_ring_acquire(gather->ring, 0, &never)) == NULL) {
        uint64_t now = sllmi_now_ns();
        if (gather->count == 0) {
            return sllmi_fail(err, SLLM_E_INVALID, 0, "the ring of the gather is in other use");
        }
        uint64_t left_ms = deadline_ns > now ? (deadline_ns - now) / 1000000u : 0;
        sllm_status status = ops->wait(gather->queue, gather->flights[gather->head].fence,
                                       (uint32_t)sllmi_min(left_ms, POLL_MS), err);
        if (status == SLLM_OK) {
            land(gather);
        } else if (status != SLLM_E_BUSY || left_ms == 0) {
            return status;
        }
    }
    gather->slot->users = 1;
    gather->filled = 0;
    return SLLM_OK;
}

static sllm_status check_ours(const sllm_gather *gather, const char *function, sllm_error *err)
{
    if (gather == NULL || gather->pid != getpid()) {
        return sllmi_fail(err, gather == NULL ? SLLM_E_INVALID : SLLM_E_FORKED, 0,
                          "%s: not a gather of this process", function);
    }
    if (gather->lost) {
        return sllmi_fail(err, SLLM_E_BUSY, 0, "%s: the device has not answered before", function);
    }
    return SLLM_OK;
}

static void free_gather(sllm_gather *gather)
{
    sllm_ring_destroy(gather->ring);
    sllm_device_close(gather->device);
    free(gather->flights);
    free(gather);
}

sllm_status sllm_gather_open(sllm_device *device, sllm_ring *ring, uint64_t stream,
                             sllm_gather **gather_out, sllm_error *err)
{
    if (gather_out == NULL) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_gather_open: gather_out is NULL");
    }
    *gather_out = NULL;
    if (device == NULL || ring == NULL) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "a gather needs a device and a ring");
    }
    if (device->pid != getpid() || !sllmi_ring_is_ours(ring)) {
        return sllmi_fail(err, SLLM_E_FORKED, 0,
                          "sllm_gather_open: not a device and a ring of this process");
    }
    if (!sllmi_ring_feeds(ring, device)) {
        return sllmi_fail(err, SLLM_E_INVALID, 0,
                          "%s:%d copies from pinned memory, and the ring was not made for %s",
                          device->ops->name, device->ordinal, device->ops->name);
    }
    sllm_gather *gather = sllmi_sys.alloc(sizeof *gather);
    uint32_t capacity = sllmi_ring_slot_count(ring);
    struct flight *flights =
        gather == NULL ? NULL : sllmi_sys.alloc(capacity * sizeof *gather->flights);
    if (flights == NULL) {
        free(gather);
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for a gather");
    }
    *gather = (sllm_gather){
        .pid = getpid(), .device = device, .ring = ring, .flights = flights, .capacity = capacity};
    sllmi_device_keep(device);
    sllmi_ring_keep(ring);
    sllm_status status = device->ops->queue_adopt(device->dev, stream, &gather->queue, err);
    if (status != SLLM_OK) {
        free_gather(gather);
        return status;
    }
    *gather_out = gather;
    return SLLM_OK;
}

/* Start the copy of what fits into the slot in hand. */
static sllm_status copy_part(sllm_gather *gather, uint64_t target, const char *source,
                             uint64_t row_bytes, uint64_t stride_bytes, uint64_t bytes,
                             sllm_error *err)
{
    uint64_t left = bytes - gather->taken;
    uint64_t to = target + gather->taken;
    uint64_t slot_bytes = sllmi_ring_slot_bytes(gather->ring);
    /* Slot and target differ by a multiple of the alignment, and parts end at one. */
    uint64_t start = gather->filled + (to - gather->filled) % ALIGN_BYTES;
    uint64_t room = start < slot_bytes ? slot_bytes - start : 0;
    uint64_t part = left <= room ? left : room - sllmi_min(room, (to + room) % ALIGN_BYTES);
    if (part == 0 || (part < left && gather->filled > 0 && part < slot_bytes / SLOT_REST)) {
        return send_off(gather, err);
    }
    char *place = gather->slot->memory + start;
    pack(place, source, row_bytes, stride_bytes, gather->taken, part);
    sllm_status status = gather->device->ops->copy(gather->queue, to, place, part, err);
    gather->filled = start + part; /* of a copy that failed too: nobody knows how far it went */
    if (status == SLLM_OK) {
        gather->taken += part;
        gather->started += part;
    }
    return status;
}

uint64_t sllm_gather_started(const sllm_gather *gather)
{
    return gather == NULL ? 0 : gather->started;
}

sllm_status sllm_gather_copy(sllm_gather *gather, uint64_t target, const void *source,
                             uint64_t rows, uint64_t row_bytes, uint64_t source_stride_bytes,
                             uint32_t timeout_ms, sllm_error *err)
{
    sllm_status status = check_ours(gather, "sllm_gather_copy", err);
    if (status != SLLM_OK) {
        return status;
    }
    uint64_t bytes;
    if (__builtin_mul_overflow(rows, row_bytes, &bytes) || bytes > INT64_MAX ||
        (bytes > 0 && (target == 0 || source == NULL)) || source_stride_bytes > INT64_MAX ||
        (rows > 1 && source_stride_bytes < row_bytes && source_stride_bytes > 0)) {
        return sllmi_fail(err, SLLM_E_INVALID, 0,
                          "a slice of %llu rows of %llu bytes, %llu apart, is not one",
                          (unsigned long long)rows, (unsigned long long)row_bytes,
                          (unsigned long long)source_stride_bytes);
    }
    const struct slice slice = {.target = target,
                                .source = (uintptr_t)source,
                                .rows = rows,
                                .row_bytes = row_bytes,
                                .stride_bytes = source_stride_bytes};
    if (gather->taken > 0 && memcmp(&slice, &gather->slice, sizeof slice) != 0) {
        return sllmi_fail(err, SLLM_E_INVALID, 0,
                          "the gather is at byte %llu of another slice: make that call again first",
                          (unsigned long long)gather->taken);
    }
    gather->slice = slice;
    if (source_stride_bytes == row_bytes || rows == 1) {
        row_bytes = bytes; /* one run */
    }
    uint64_t deadline = sllmi_now_ns() + (uint64_t)timeout_ms * 1000000u;
    while (status == SLLM_OK && gather->taken < bytes) {
        if (gather->slot == NULL) {
            status = take_slot(gather, deadline, err);
        }
        if (status == SLLM_OK) {
            status = copy_part(gather, target, source, row_bytes, source_stride_bytes, bytes, err);
        }
    }
    if (status != SLLM_E_BUSY) {
        gather->taken = 0;
    }
    return status;
}

/* ---- the end, which a finalizer may bring about on any thread ---------------------------------- */

static bool is_here(const sllm_gather *gather)
{
    const sllmi_device_ops *ops = gather->device->ops;
    return ops->queue_is_here == NULL || ops->queue_is_here(gather->queue);
}

static sllm_status drain_there(sllmi_request *request, sllm_error *err)
{
    sllm_gather *gather = request->memory;
    const sllmi_device_ops *ops = gather->device->ops;
    if (ops->queue_bind(gather->queue, err) != SLLM_OK) {
        return SLLM_E_BUSY; /* it says nothing of the copies */
    }
    return ops->drain(gather->queue, request->timeout_ms - ELSEWHERE_MS, err);
}

static sllm_status close_there(sllmi_request *request, sllm_error *err)
{
    sllm_gather *gather = request->memory;
    (void)gather->device->ops->queue_bind(gather->queue, err);
    gather->device->ops->queue_close(gather->queue);
    return SLLM_OK;
}

/* Run either on a thread of ours that stands where the queue does. */
static sllm_status go_there(sllm_gather *gather, sllm_status (*run)(sllmi_request *, sllm_error *),
                            uint32_t timeout_ms, sllm_error *err)
{
    sllmi_request request = {.run = run,
                             .what = "ending copies",
                             .backend = gather->device->ops->name,
                             .ordinal = gather->device->ordinal,
                             .timeout_ms =
                                 (uint32_t)sllmi_min(timeout_ms, INT32_MAX) + ELSEWHERE_MS,
                             .memory = gather};
    sllm_status status = sllmi_aside(&request, err);
    gather->lost = status == SLLM_E_TIMEOUT;
    return status;
}

static sllm_status drain(sllm_gather *gather, uint32_t timeout_ms, sllm_error *err)
{
    if (is_here(gather)) {
        return gather->device->ops->drain(gather->queue, timeout_ms, err);
    }
    sllm_status status = go_there(gather, drain_there, timeout_ms, err);
    return status == SLLM_OK || status == SLLM_E_DEVICE
               ? status
               : sllmi_fail(err, SLLM_E_BUSY, 0, "the copies to %s:%d are not done yet",
                            gather->device->ops->name, gather->device->ordinal);
}

sllm_status sllm_gather_synchronize(sllm_gather *gather, uint32_t timeout_ms, sllm_error *err)
{
    sllm_status status = check_ours(gather, "sllm_gather_synchronize", err);
    if (status == SLLM_OK) {
        status = send_off(gather, err);
    }
    if (status == SLLM_OK) {
        status = drain(gather, timeout_ms, err);
    }
    while (status == SLLM_OK && gather->count > 0) {
        land(gather);
    }
    return status;
}

sllm_status sllm_gather_close(sllm_gather *gather, uint32_t timeout_ms, sllm_error *err)
{
    if (gather == NULL) {
        return SLLM_OK;
    }
    sllm_status status = check_ours(gather, "sllm_gather_close", err);
    if (status != SLLM_OK) {
        return status;
    }
    /* Anything but "not yet" is the end of the copies, well or badly. */
    if (drain(gather, timeout_ms, err) == SLLM_E_BUSY) {
        return SLLM_E_BUSY;
    }
    if (is_here(gather)) {
        gather->device->ops->queue_close(gather->queue);
    } else if (go_there(gather, close_there, 0, err) != SLLM_OK) {
        return SLLM_E_BUSY;
    }
    if (gather->slot != NULL) {
        sllmi_ring_release(gather->ring, gather->slot);
    }
    while (gather->count > 0) {
        land(gather);
    }
    free_gather(gather);
    return SLLM_OK;
}
