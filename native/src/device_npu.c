/* Ascend NPUs, through AscendCL. Copies start from memory of aclrtMallocHost alone: from any other
 * an asynchronous copy is undefined up to CANN 8.0 and synchronous later. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "acl.h"
#include "align.h"
#include "aside.h"
#include "device.h"
#include "error.h"
#include "fences.h"
#include "os.h"

#define START_TIMEOUT_MS 120000u /* the first call of a machine starts its driver's processes */
#define CALL_TIMEOUT_MS 60000u

typedef struct npu_device {
    const sllmi_acl *acl;
    int32_t ordinal;
} npu_device;

typedef struct npu_queue {
    const sllmi_acl *acl;
    int32_t ordinal;
    void *stream;
    bool own_stream;
    bool adopted;       /* its thread is the caller's */
    void *context;      /* the one it was adopted in */
    bool wants_aligned; /* asynchronous copies take only aligned addresses */
    bool drained;       /* the last fence stands behind the last copy */
    sllmi_fences fences;
} npu_queue;

#define FAIL(where, function, code, err)                                                           \
    sllmi_acl_fail((where)->acl, (where)->ordinal, function, code, err)

/* ---- what must not happen on the caller's thread ------------------------------------------- */

static sllm_status count_devices(sllmi_request *request, sllm_error *err)
{
    const sllmi_acl *acl;
    uint32_t count = 0;
    sllm_status status = sllmi_acl_load(&acl, err);
    if (status == SLLM_OK) {
        int code = acl->aclrtGetDeviceCount(&count);
        if (code != SLLMI_ACL_SUCCESS && code != SLLMI_ACL_NO_DEVICE) {
            status = sllmi_acl_fail(acl, -1, "aclrtGetDeviceCount", code, err);
        }
    }
    request->count = (int32_t)count;
    return status;
}

/* Each thread of ours starts with this; nothing is reset afterwards, for torch shares the device. */
static sllm_status set_device(int32_t ordinal, const sllmi_acl **acl_out, sllm_error *err)
{
    sllm_status status = sllmi_acl_load(acl_out, err);
    if (status == SLLM_OK) {
        int code = (*acl_out)->aclrtSetDevice(ordinal);
        if (code != SLLMI_ACL_SUCCESS) {
            status = sllmi_acl_fail(*acl_out, ordinal, "aclrtSetDevice", code, err);
        }
    }
    return status;
}

static sllm_status start_device(sllmi_request *request, sllm_error *err)
{
    const sllmi_acl *acl;
    return set_device(request->ordinal, &acl, err);
}

/* aclrtMallocHost promises 64 bytes of alignment; direct reads want a page. The address that it
 * gave stands before the slot. */
static void **raw_address(void *slot)
{
    return (void **)slot - 1;
}

static sllm_status pin(sllmi_request *request, sllm_error *err)
{
    const sllmi_acl *acl;
    void *raw = NULL;
    sllm_status status = set_device(request->ordinal, &acl, err);
    if (status != SLLM_OK) {
        return status;
    }
    int code = acl->aclrtMallocHost(&raw, request->bytes + SLLM_PAGE_BYTES);
    if (code != SLLMI_ACL_SUCCESS) {
        return sllmi_acl_fail(acl, request->ordinal, "aclrtMallocHost", code, err);
    }
    uint64_t address = sllmi_align_up((uintptr_t)raw + sizeof raw, SLLM_PAGE_BYTES);
    request->memory = (void *)(uintptr_t)address;
    *raw_address(request->memory) = raw;
    return SLLM_OK;
}

static sllm_status unpin(sllmi_request *request, sllm_error *err)
{
    const sllmi_acl *acl;
    sllm_status status = set_device(request->ordinal, &acl, err);
    if (acl != NULL) { /* a device that fails is no reason to keep the memory */
        (void)acl->aclrtFreeHost(*raw_address(request->memory));
    }
    return status;
}

static void unpin_late(sllmi_request *request)
{
    sllm_error ignored;
    (void)unpin(request, &ignored);
}

/* ---- the device ---------------------------------------------------------------------------- */

static sllm_status npu_probe(int32_t *count_out, sllm_error *err)
{
    sllmi_request request = {.run = count_devices,
                             .what = "counting devices",
                             .backend = "npu",
                             .timeout_ms = START_TIMEOUT_MS};
    sllm_status status = sllmi_aside(&request, err);
    *count_out = status == SLLM_OK ? request.count : 0;
    return status;
}

static sllm_status npu_open(int32_t ordinal, void **dev_out, sllm_error *err)
{
    *dev_out = NULL;
    sllmi_request request = {.run = start_device,
                             .what = "starting the device",
                             .backend = "npu",
                             .ordinal = ordinal,
                             .timeout_ms = START_TIMEOUT_MS};
    npu_device *device = sllmi_sys.alloc(sizeof *device);
    if (device == NULL) {
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for npu:%d", ordinal);
    }
    device->ordinal = ordinal;
    sllm_status status = sllmi_acl_load(&device->acl, err);
    if (status == SLLM_OK) {
        status = sllmi_acl_usable(ordinal, err);
    }
    if (status == SLLM_OK) {
        status = sllmi_aside(&request, err);
    }
    if (status != SLLM_OK) {
        free(device);
        return status;
    }
    *dev_out = device;
    return SLLM_OK;
}

static void npu_close(void *dev)
{
    free(dev);
}

static sllm_status npu_bind_thread(void *dev, sllm_error *err)
{
    const npu_device *device = dev;
    const sllmi_acl *acl;
    sllm_status status = sllmi_acl_usable(device->ordinal, err);
    return status == SLLM_OK ? set_device(device->ordinal, &acl, err) : status;
}

static sllm_status npu_host_alloc(void *dev, size_t bytes, void **ptr_out, sllm_error *err)
{
    const npu_device *device = dev;
    sllmi_request request = {.run = pin,
                             .undo = unpin_late,
                             .what = "pinning memory",
                             .backend = "npu",
                             .ordinal = device->ordinal,
                             .timeout_ms = CALL_TIMEOUT_MS,
                             .bytes = bytes};
    sllm_status status = sllmi_acl_usable(device->ordinal, err);
    if (status == SLLM_OK) {
        status = sllmi_aside(&request, err);
    }
    *ptr_out = status == SLLM_OK ? request.memory : NULL;
    return status;
}

static sllm_status npu_host_free(void *dev, void *ptr)
{
    const npu_device *device = dev;
    sllmi_request request = {.run = unpin,
                             .what = "unpinning memory",
                             .backend = "npu",
                             .ordinal = device->ordinal,
                             .timeout_ms = CALL_TIMEOUT_MS,
                             .memory = ptr};
    sllm_error ignored;
    return sllmi_aside(&request, &ignored) == SLLM_E_TIMEOUT ? SLLM_E_TIMEOUT : SLLM_OK;
}

/* ---- queues: a stream, and events as fences ------------------------------------------------ */

static sllm_status event_create(void *argument, void **event_out, sllm_error *err)
{
    npu_queue *queue = argument;
    int code =
        queue->acl->aclrtCreateEventExWithFlag(event_out, SLLMI_ACL_EVENT_CAPTURE_STREAM_PROGRESS);
    if (code != SLLMI_ACL_SUCCESS) {
        *event_out = NULL;
        return FAIL(queue, "aclrtCreateEventExWithFlag", code, err);
    }
    return SLLM_OK;
}

static sllm_status event_record(void *argument, void *event, sllm_error *err)
{
    npu_queue *queue = argument;
    int code = queue->acl->aclrtRecordEvent(event, queue->stream);
    return code == SLLMI_ACL_SUCCESS ? SLLM_OK : FAIL(queue, "aclrtRecordEvent", code, err);
}

static sllm_status event_query(void *argument, void *event, bool *passed_out, sllm_error *err)
{
    npu_queue *queue = argument;
    unsigned state = 0;
    int code = queue->acl->aclrtQueryEventStatus(event, &state);
    *passed_out = state == SLLMI_ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return code == SLLMI_ACL_SUCCESS ? SLLM_OK : FAIL(queue, "aclrtQueryEventStatus", code, err);
}

static void event_destroy(void *argument, void *event)
{
    npu_queue *queue = argument;
    (void)queue->acl->aclrtDestroyEvent(event);
}

static const sllmi_event_ops event_ops = {
    .create = event_create, .record = event_record, .query = event_query, .destroy = event_destroy};

/* A queue on a stream, or with NULL on a new one of the thread's current context. */
static sllm_status make_queue(const npu_device *device, void *stream, npu_queue **queue_out,
                              sllm_error *err)
{
    npu_queue *queue = sllmi_sys.alloc(sizeof *queue);
    if (queue == NULL) {
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for copies to npu:%d",
                          device->ordinal);
    }
    queue->acl = device->acl;
    queue->ordinal = device->ordinal;
    queue->stream = stream;
    queue->own_stream = stream == NULL;
    queue->wants_aligned = sllmi_acl_wants_aligned();
    queue->drained = true;
    queue->fences.ops = &event_ops;
    queue->fences.queue = queue;
    if (queue->own_stream) {
        int code = queue->acl->aclrtCreateStream(&queue->stream);
        if (code != SLLMI_ACL_SUCCESS) {
            sllm_status status = FAIL(queue, "aclrtCreateStream", code, err);
            free(queue);
            return status;
        }
    }
    *queue_out = queue;
    return SLLM_OK;
}

static sllm_status npu_queue_open(void *dev, void **queue_out, sllm_error *err)
{
    npu_queue *queue = NULL;
    sllm_status status = make_queue(dev, NULL, &queue, err);
    *queue_out = queue;
    return status;
}

static sllm_status npu_queue_adopt(void *dev, uint64_t stream, void **queue_out, sllm_error *err)
{
    const npu_device *device = dev;
    npu_queue *queue = NULL;
    *queue_out = NULL;
    sllm_status status = sllmi_acl_usable(device->ordinal, err);
    if (status != SLLM_OK) {
        return status;
    }
    int32_t current = -1;
    int code = device->acl->aclrtGetDevice(&current);
    if (code != SLLMI_ACL_SUCCESS) {
        return FAIL(device, "aclrtGetDevice", code, err);
    }
    if (current != device->ordinal) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "the calling thread is on npu:%d, not on npu:%d",
                          current, device->ordinal);
    }
    void *context = NULL;
    code = device->acl->aclrtGetCurrentContext(&context);
    if (code != SLLMI_ACL_SUCCESS) {
        return FAIL(device, "aclrtGetCurrentContext", code, err);
    }
    status = make_queue(device, (void *)(uintptr_t)stream, &queue, err);
    if (status == SLLM_OK) {
        queue->adopted = true;
        queue->context = context;
        *queue_out = queue;
    }
    return status;
}

static bool npu_queue_is_here(void *argument)
{
    const npu_queue *queue = argument;
    void *context = NULL;
    int code = queue->acl->aclrtGetCurrentContext(&context);
    return code == SLLMI_ACL_SUCCESS && context == queue->context;
}

static sllm_status npu_queue_bind(void *argument, sllm_error *err)
{
    const npu_queue *queue = argument;
    int code = queue->acl->aclrtSetCurrentContext(queue->context);
    return code == SLLMI_ACL_SUCCESS ? SLLM_OK : FAIL(queue, "aclrtSetCurrentContext", code, err);
}

static void npu_queue_close(void *argument)
{
    npu_queue *queue = argument;
    if (queue != NULL) {
        sllmi_fences_end(&queue->fences);
        if (queue->own_stream) {
            (void)queue->acl->aclrtDestroyStream(queue->stream);
        }
        free(queue);
    }
}

static sllm_status npu_fence(void *argument, uint64_t *fence_out, sllm_error *err)
{
    npu_queue *queue = argument;
    sllm_status status = sllmi_fences_add(&queue->fences, fence_out, err);
    queue->drained = queue->drained || status == SLLM_OK;
    return status;
}

static sllm_status npu_wait(void *argument, uint64_t fence, uint32_t timeout_ms, sllm_error *err)
{
    npu_queue *queue = argument;
    return sllmi_fences_wait(&queue->fences, fence, timeout_ms, err);
}

static sllm_status synchronize(const npu_queue *queue, uint64_t timeout_ms, sllm_error *err)
{
    const sllmi_acl *acl = queue->acl;
    int code = acl->aclrtSynchronizeStreamWithTimeout != NULL
                   ? acl->aclrtSynchronizeStreamWithTimeout(
                         queue->stream, (int32_t)sllmi_min(timeout_ms, INT32_MAX))
                   : acl->aclrtSynchronizeStream(queue->stream);
    if (code == SLLMI_ACL_STREAM_SYNC_TIMEOUT) {
        return sllmi_fail(err, SLLM_E_BUSY, 0, "the copies are not done yet");
    }
    return code == SLLMI_ACL_SUCCESS ? SLLM_OK : FAIL(queue, "aclrtSynchronizeStream", code, err);
}

static sllm_status npu_drain(void *argument, uint32_t timeout_ms, sllm_error *err)
{
    npu_queue *queue = argument;
    uint64_t fence;
    sllm_status status = queue->drained ? SLLM_OK : npu_fence(queue, &fence, err);
    if (status == SLLM_OK) {
        status = npu_wait(queue, queue->fences.last, timeout_ms, err);
    }
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
        queue->drained = false;
        sllm_status status = npu_drain(queue, CALL_TIMEOUT_MS, err);
        if (status != SLLM_OK) {
            return status;
        }
    }
    int code = queue->acl->aclrtMemcpy(dst, bytes, src, bytes, SLLMI_ACL_MEMCPY_HOST_TO_DEVICE);
    return code == SLLMI_ACL_SUCCESS ? SLLM_OK : FAIL(queue, "aclrtMemcpy", code, err);
}

static sllm_status npu_copy(void *argument, uint64_t dst, const void *src, size_t bytes,
                            sllm_error *err)
{
    npu_queue *queue = argument;
    void *target = (void *)(uintptr_t)dst;
    if (queue->wants_aligned && (dst | (uintptr_t)src) % SLLMI_ACL_ALIGN_BYTES != 0) {
        return copy_misaligned(queue, target, src, bytes, err);
    }
    queue->drained = false;
    int code = queue->acl->aclrtMemcpyAsync(target, bytes, src, bytes,
                                            SLLMI_ACL_MEMCPY_HOST_TO_DEVICE, queue->stream);
    return code == SLLMI_ACL_SUCCESS ? SLLM_OK : FAIL(queue, "aclrtMemcpyAsync", code, err);
}

const sllmi_device_ops sllmi_device_npu = {
    .abi = SLLMI_DEVICE_ABI,
    .name = "npu",
    .caps = SLLMI_DEV_PINNED,
    .probe = npu_probe,
    .open = npu_open,
    .close = npu_close,
    .bind_thread = npu_bind_thread,
    .host_alloc = npu_host_alloc,
    .host_free = npu_host_free,
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
