/* Ascend NPUs, through AscendCL. Copies start from memory of aclrtMallocHost alone: from any other
 * an asynchronous copy is undefined up to CANN 8.0 and synchronous later. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "accelerator.h"
#include "acl.h"
#include "align.h"
#include "device.h"
#include "error.h"
#include "fences.h"
#include "os.h"

#define CALL_TIMEOUT_MS 60000u

typedef struct npu_queue {
    int32_t ordinal;
    void *stream;
    bool own_stream;
    bool adopted;       /* its thread is the caller's */
    void *context;      /* the one it was adopted in */
    bool wants_aligned; /* asynchronous copies take only aligned addresses */
    sllmi_fences fences;
} npu_queue;

/* ---- the device: on threads of ours -------------------------------------------------------- */

static sllm_status count_devices(int32_t *count_out, sllm_error *err)
{
    uint32_t count = 0;
    sllm_status status = sllmi_acl_load(err);
    if (status == SLLM_OK) {
        int code = sllmi_acl_api.aclrtGetDeviceCount(&count);
        status = code == SLLMI_ACL_NO_DEVICE
                     ? SLLM_OK
                     : sllmi_acl_status(-1, "aclrtGetDeviceCount", code, err);
    }
    *count_out = (int32_t)count;
    return status;
}

/* Each thread of ours starts with this; nothing is reset afterwards, for torch shares the device. */
static sllm_status set_device(int32_t ordinal, sllm_error *err)
{
    sllm_status status = sllmi_acl_load(err);
    return status == SLLM_OK ? SLLMI_ACL_CALL(ordinal, err, aclrtSetDevice, ordinal) : status;
}

/* aclrtMallocHost promises 64 bytes of alignment; direct reads want a page. The address that it
 * gave stands before the slot. */
static void **raw_address(void *slot)
{
    return (void **)slot - 1;
}

static sllm_status pin(int32_t ordinal, size_t bytes, void **memory_out, sllm_error *err)
{
    void *raw = NULL;
    sllm_status status =
        SLLMI_ACL_CALL(ordinal, err, aclrtMallocHost, &raw, bytes + SLLM_PAGE_BYTES);
    if (status != SLLM_OK) {
        return status;
    }
    uint64_t address = sllmi_align_up((uintptr_t)raw + sizeof raw, SLLM_PAGE_BYTES);
    *memory_out = (void *)(uintptr_t)address;
    *raw_address(*memory_out) = raw;
    return SLLM_OK;
}

static void unpin(void *memory)
{
    (void)sllmi_acl_api.aclrtFreeHost(*raw_address(memory));
}

static const sllmi_accelerator_ops accelerator = {.name = "npu",
                                                  .count = count_devices,
                                                  .usable = sllmi_acl_usable,
                                                  .set_device = set_device,
                                                  .pin = pin,
                                                  .unpin = unpin};

static sllm_status npu_probe(int32_t *count_out, sllm_error *err)
{
    return sllmi_accelerator_probe(&accelerator, count_out, err);
}

static sllm_status npu_open(int32_t ordinal, void **dev_out, sllm_error *err)
{
    return sllmi_accelerator_open(&accelerator, ordinal, dev_out, err);
}

/* ---- queues: a stream, and events as fences ------------------------------------------------ */

static sllm_status event_create(void *argument, void **event_out, sllm_error *err)
{
    npu_queue *queue = argument;
    sllm_status status = SLLMI_ACL_CALL(queue->ordinal, err, aclrtCreateEventExWithFlag, event_out,
                                        SLLMI_ACL_EVENT_CAPTURE_STREAM_PROGRESS);
    if (status != SLLM_OK) {
        *event_out = NULL;
    }
    return status;
}

static sllm_status event_record(void *argument, void *event, sllm_error *err)
{
    npu_queue *queue = argument;
    return SLLMI_ACL_CALL(queue->ordinal, err, aclrtRecordEvent, event, queue->stream);
}

static sllm_status event_query(void *argument, void *event, bool *passed_out, sllm_error *err)
{
    npu_queue *queue = argument;
    unsigned state = 0;
    sllm_status status = SLLMI_ACL_CALL(queue->ordinal, err, aclrtQueryEventStatus, event, &state);
    *passed_out = state == SLLMI_ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return status;
}

static void event_destroy(void *argument, void *event)
{
    npu_queue *queue = argument;
    (void)SLLMI_ACL_CALL(queue->ordinal, NULL, aclrtDestroyEvent, event);
}

static const sllmi_event_ops event_ops = {
    .create = event_create, .record = event_record, .query = event_query, .destroy = event_destroy};

/* A queue on a stream, or with NULL on a new one of the thread's current context. */
static sllm_status make_queue(int32_t ordinal, void *stream, npu_queue **queue_out, sllm_error *err)
{
    npu_queue *queue = sllmi_sys.alloc(sizeof *queue);
    if (queue == NULL) {
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for copies to npu:%d", ordinal);
    }
    queue->ordinal = ordinal;
    queue->stream = stream;
    queue->own_stream = stream == NULL;
    queue->wants_aligned = sllmi_acl_wants_aligned();
    queue->fences.ops = &event_ops;
    queue->fences.queue = queue;
    if (queue->own_stream) {
        sllm_status status = SLLMI_ACL_CALL(ordinal, err, aclrtCreateStream, &queue->stream);
        if (status != SLLM_OK) {
            free(queue);
            return status;
        }
    }
    *queue_out = queue;
    return SLLM_OK;
}

static sllm_status npu_queue_open(void *dev, void **queue_out, sllm_error *err)
{
    const sllmi_accelerator *device = dev;
    npu_queue *queue = NULL;
    sllm_status status = make_queue(device->ordinal, NULL, &queue, err);
    *queue_out = queue;
    return status;
}

/* The context that the calling thread is in, if it is one of the device. */
static sllm_status find_context(int32_t ordinal, void **context_out, sllm_error *err)
{
    int32_t current = -1;
    sllm_status status = SLLMI_ACL_CALL(ordinal, err, aclrtGetDevice, &current);
    if (status != SLLM_OK) {
        return status;
    }
    if (current != ordinal) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "the calling thread is on npu:%d, not on npu:%d",
                          current, ordinal);
    }
    return SLLMI_ACL_CALL(ordinal, err, aclrtGetCurrentContext, context_out);
}

static sllm_status npu_queue_adopt(void *dev, uint64_t stream, void **queue_out, sllm_error *err)
{
    const sllmi_accelerator *device = dev;
    npu_queue *queue = NULL;
    void *context = NULL;
    sllm_status status = sllmi_acl_usable(device->ordinal, err);
    if (status == SLLM_OK) {
        status = find_context(device->ordinal, &context, err);
    }
    if (status == SLLM_OK) {
        status = make_queue(device->ordinal, (void *)(uintptr_t)stream, &queue, err);
    }
    if (status == SLLM_OK) {
        queue->adopted = true;
        queue->context = context;
    }
    *queue_out = queue;
    return status;
}

static bool npu_queue_is_here(void *argument)
{
    const npu_queue *queue = argument;
    void *context = NULL;
    return SLLMI_ACL_CALL(queue->ordinal, NULL, aclrtGetCurrentContext, &context) == SLLM_OK &&
           context == queue->context;
}

static sllm_status npu_queue_bind(void *argument, sllm_error *err)
{
    const npu_queue *queue = argument;
    return SLLMI_ACL_CALL(queue->ordinal, err, aclrtSetCurrentContext, queue->context);
}

static void npu_queue_close(void *argument)
{
    npu_queue *queue = argument;
    if (queue != NULL) {
        sllmi_fences_end(&queue->fences);
        if (queue->own_stream) {
            (void)SLLMI_ACL_CALL(queue->ordinal, NULL, aclrtDestroyStream, queue->stream);
        }
        free(queue);
    }
}

static sllm_status npu_fence(void *argument, uint64_t *fence_out, sllm_error *err)
{
    npu_queue *queue = argument;
    return sllmi_fences_add(&queue->fences, fence_out, err);
}

static sllm_status npu_wait(void *argument, uint64_t fence, uint32_t timeout_ms, sllm_error *err)
{
    npu_queue *queue = argument;
    return sllmi_fences_wait(&queue->fences, fence, timeout_ms, err);
}

static sllm_status synchronize(const npu_queue *queue, uint64_t timeout_ms, sllm_error *err)
{
    int code = sllmi_acl_api.aclrtSynchronizeStreamWithTimeout(
        queue->stream, (int32_t)sllmi_min(timeout_ms, INT32_MAX));
    if (code == SLLMI_ACL_STREAM_SYNC_TIMEOUT) {
        return sllmi_fail(err, SLLM_E_BUSY, 0, "the copies are not done yet");
    }
    return sllmi_acl_status(queue->ordinal, "aclrtSynchronizeStreamWithTimeout", code, err);
}

static sllm_status npu_drain(void *argument, uint32_t timeout_ms, sllm_error *err)
{
    npu_queue *queue = argument;
    sllm_status status = sllmi_fences_drain(&queue->fences, timeout_ms, err);
    if (status == SLLM_E_BUSY) {
        return status;
    }
    /* After the fence this returns at once, and alone tells of a copy that failed on the device.
     * Without one, as when there is no event to be had, it is the copies' only known end. */
    sllm_error late;
    sllm_status end =
        synchronize(queue, status == SLLM_OK ? CALL_TIMEOUT_MS : sllmi_max(timeout_ms, 1), &late);
    if (end != SLLM_OK && (status == SLLM_OK || end == SLLM_E_BUSY)) {
        status = end;
        if (err != NULL) {
            *err = late;
        }
    }
    return status;
}

/* The rule of alignment is documented for asynchronous copies alone, and a misaligned run cannot be
 * moved within its slot: other devices copy from that too, and its neighbours adjoin. So on a
 * runtime that has the rule such a run is copied synchronously, while the readers go on. */
static sllm_status copy_misaligned(npu_queue *queue, void *dst, const void *src, size_t bytes,
                                   sllm_error *err)
{
    /* Not ordered by any stream: on the caller's, what it has queued before comes first. */
    if (queue->adopted) {
        queue->fences.behind = true;
        sllm_status status = npu_drain(queue, CALL_TIMEOUT_MS, err);
        if (status != SLLM_OK) {
            return status;
        }
    }
    return SLLMI_ACL_CALL(queue->ordinal, err, aclrtMemcpy, dst, bytes, src, bytes,
                          SLLMI_ACL_MEMCPY_HOST_TO_DEVICE);
}

static sllm_status npu_copy(void *argument, uint64_t dst, const void *src, size_t bytes,
                            sllm_error *err)
{
    npu_queue *queue = argument;
    void *target = (void *)(uintptr_t)dst;
    if (queue->wants_aligned && (dst | (uintptr_t)src) % SLLMI_ACL_ALIGN_BYTES != 0) {
        return copy_misaligned(queue, target, src, bytes, err);
    }
    queue->fences.behind = true;
    return SLLMI_ACL_CALL(queue->ordinal, err, aclrtMemcpyAsync, target, bytes, src, bytes,
                          SLLMI_ACL_MEMCPY_HOST_TO_DEVICE, queue->stream);
}

const sllmi_device_ops sllmi_device_npu = {
    .abi = SLLMI_DEVICE_ABI,
    .name = "npu",
    .caps = SLLMI_DEV_PINNED,
    .probe = npu_probe,
    .open = npu_open,
    .close = sllmi_accelerator_close,
    .bind_thread = sllmi_accelerator_bind_thread,
    .host_alloc = sllmi_accelerator_host_alloc,
    .host_free = sllmi_accelerator_host_free,
    .queue_open = npu_queue_open,
    .queue_close = npu_queue_close,
    .copy = npu_copy,
    .fence = npu_fence,
    .wait = npu_wait,
    .drain = npu_drain,
    .queue_adopt = npu_queue_adopt,
    .queue_is_here = npu_queue_is_here,
    .queue_bind = npu_queue_bind,
    .visibility = "ASCEND_RT_VISIBLE_DEVICES",
};
