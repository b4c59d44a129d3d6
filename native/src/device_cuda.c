/* CUDA devices, through the runtime library: it shares the primary context with torch. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "accelerator.h"
#include "cuda_abi.h"
#include "device.h"
#include "dl.h"
#include "error.h"
#include "fences.h"
#include "os.h"

#define STREAM_PAUSE_NS 500000u /* between two questions whether a stream is done */

static const char *const names[] = {"libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0",
                                    "libcudart.so", NULL};
static const char *const folders[] = {"$CUDA_HOME/lib64", "$CUDA_PATH/lib64",
                                      "/usr/local/cuda/lib64", NULL};
static const sllmi_dl_library library = {
    .what = "the CUDA runtime (libcudart)", .names = names, .folders = folders};

#define SYMBOL(result, function, parameters)                                                       \
    {.name = #function, .offset = offsetof(sllmi_cuda, function), .required = true},
static const sllmi_dl_symbol symbols[] = {SLLMI_CUDA_FUNCTIONS(SYMBOL)};
#undef SYMBOL

static sllmi_cuda api; /* to be called after load() */

static struct {
    pthread_mutex_t lock;
    pid_t pid; /* that loaded it; 0: none yet */
} runtime = {.lock = PTHREAD_MUTEX_INITIALIZER};

typedef struct cuda_queue {
    int32_t ordinal;
    void *stream;
    bool own_stream;
    sllmi_fences fences;
} cuda_queue;

static sllm_status load(sllm_error *err)
{
    sllm_status status = SLLM_OK;
    void *handle;
    pthread_mutex_lock(&runtime.lock);
    if (runtime.pid == 0) {
        status = sllmi_dl_open(&library, &handle, err);
        if (status == SLLM_OK) {
            status = sllmi_dl_resolve(&library, handle, symbols, sizeof symbols / sizeof symbols[0],
                                      &api, err);
        }
        if (status == SLLM_OK) {
            runtime.pid = getpid();
        }
    } else if (runtime.pid != getpid()) {
        status = sllmi_fail(err, SLLM_E_FORKED, 0,
                            "the CUDA runtime was started by process %ld, which forked this one",
                            (long)runtime.pid);
    }
    pthread_mutex_unlock(&runtime.lock);
    return status;
}

/* The code of a call. A runtime keeps the last error of each thread, "not ready" among them, and
 * torch asks for it after every kernel: it must not find ours. */
static int forgotten(int code)
{
    if (code != SLLMI_CUDA_SUCCESS) {
        (void)api.cudaGetLastError();
    }
    return code;
}

static sllm_status status_of(int32_t ordinal, const char *function, int code, sllm_error *err)
{
    if (code == SLLMI_CUDA_SUCCESS) {
        return SLLM_OK;
    }
    sllm_status status = code == SLLMI_CUDA_MEMORY_ALLOCATION ? SLLM_E_NOMEM : SLLM_E_DEVICE;
    return sllmi_fail_device(err, status, code, "cuda:%d: %s failed with %d (%s): %s", ordinal,
                             function, code, api.cudaGetErrorName(code),
                             api.cudaGetErrorString(code));
}

#define CALL(ordinal, err, function, ...)                                                          \
    status_of(ordinal, #function, forgotten(api.function(__VA_ARGS__)), err)

/* ---- the device: on threads of ours -------------------------------------------------------- */

static sllm_status count_devices(int32_t *count_out, sllm_error *err)
{
    sllm_status status = load(err);
    if (status == SLLM_OK) {
        int code = api.cudaGetDeviceCount(count_out);
        if (code == SLLMI_CUDA_NO_DEVICE) {
            *count_out = 0;
        } else if (code == SLLMI_CUDA_INSUFFICIENT_DRIVER) {
            status = sllmi_fail_device(err, SLLM_E_NO_DEVICE, code,
                                       "the NVIDIA driver is missing, or older than %s needs",
                                       library.what);
        } else {
            status = status_of(0, "cudaGetDeviceCount", code, err);
        }
    }
    return status;
}

static sllm_status set_device(int32_t ordinal, sllm_error *err)
{
    sllm_status status = load(err);
    return status == SLLM_OK ? CALL(ordinal, err, cudaSetDevice, ordinal) : status;
}

/* cudaHostAlloc gives whole pages: it maps them. */
static sllm_status pin(int32_t ordinal, size_t bytes, void **memory_out, sllm_error *err)
{
    sllm_status status =
        CALL(ordinal, err, cudaHostAlloc, memory_out, bytes, SLLMI_CUDA_HOST_ALLOC_PORTABLE);
    if (status == SLLM_OK && (uintptr_t)*memory_out % SLLM_PAGE_BYTES != 0) {
        (void)api.cudaFreeHost(*memory_out);
        status = sllmi_fail(err, SLLM_E_UNSUPPORTED, 0,
                            "cuda:%d: pinned memory does not start at a page", ordinal);
    }
    return status;
}

static void unpin(void *memory)
{
    (void)api.cudaFreeHost(memory);
}

/* A mapping that may only be read takes the flag, which not every platform has. */
static sllm_status host_register(int32_t ordinal, void *memory, size_t bytes, sllm_error *err)
{
    return CALL(ordinal, err, cudaHostRegister, memory, bytes,
                SLLMI_CUDA_HOST_REGISTER_PORTABLE | SLLMI_CUDA_HOST_REGISTER_READ_ONLY);
}

static sllm_status host_unregister(int32_t ordinal, void *memory, sllm_error *err)
{
    return CALL(ordinal, err, cudaHostUnregister, memory);
}

static const sllmi_accelerator_ops accelerator = {.name = "cuda",
                                                  .count = count_devices,
                                                  .set_device = set_device,
                                                  .pin = pin,
                                                  .unpin = unpin,
                                                  .host_register = host_register,
                                                  .host_unregister = host_unregister};

static sllm_status cuda_probe(int32_t *count_out, sllm_error *err)
{
    return sllmi_accelerator_probe(&accelerator, count_out, err);
}

static sllm_status cuda_open(int32_t ordinal, void **dev_out, sllm_error *err)
{
    return sllmi_accelerator_open(&accelerator, ordinal, dev_out, err);
}

/* ---- queues: a stream, and events as fences ------------------------------------------------ */

static sllm_status event_create(void *argument, void **event_out, sllm_error *err)
{
    cuda_queue *queue = argument;
    sllm_status status = CALL(queue->ordinal, err, cudaEventCreateWithFlags, event_out,
                              SLLMI_CUDA_EVENT_DISABLE_TIMING);
    if (status != SLLM_OK) {
        *event_out = NULL;
    }
    return status;
}

static sllm_status event_record(void *argument, void *event, sllm_error *err)
{
    cuda_queue *queue = argument;
    return CALL(queue->ordinal, err, cudaEventRecord, event, queue->stream);
}

static sllm_status event_query(void *argument, void *event, bool *passed_out, sllm_error *err)
{
    cuda_queue *queue = argument;
    int code = forgotten(api.cudaEventQuery(event));
    *passed_out = code == SLLMI_CUDA_SUCCESS;
    return code == SLLMI_CUDA_NOT_READY ? SLLM_OK
                                        : status_of(queue->ordinal, "cudaEventQuery", code, err);
}

static void event_destroy(void *argument, void *event)
{
    cuda_queue *queue = argument;
    (void)CALL(queue->ordinal, NULL, cudaEventDestroy, event);
}

static const sllmi_event_ops event_ops = {
    .create = event_create, .record = event_record, .query = event_query, .destroy = event_destroy};

/* A queue on a stream, or with NULL on a new one of the thread's current device. */
static sllm_status make_queue(int32_t ordinal, void *stream, void **queue_out, sllm_error *err)
{
    *queue_out = NULL;
    cuda_queue *queue = sllmi_sys.alloc(sizeof *queue);
    if (queue == NULL) {
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for copies to cuda:%d",
                          ordinal);
    }
    queue->ordinal = ordinal;
    queue->stream = stream;
    queue->own_stream = stream == NULL;
    queue->fences.ops = &event_ops;
    queue->fences.queue = queue;
    if (queue->own_stream) {
        /* Not blocked by the default stream, on which torch computes. */
        sllm_status status = CALL(ordinal, err, cudaStreamCreateWithFlags, &queue->stream,
                                  SLLMI_CUDA_STREAM_NON_BLOCKING);
        if (status != SLLM_OK) {
            free(queue);
            return status;
        }
    }
    *queue_out = queue;
    return SLLM_OK;
}

static sllm_status cuda_queue_open(void *dev, void **queue_out, sllm_error *err)
{
    const sllmi_accelerator *device = dev;
    return make_queue(device->ordinal, NULL, queue_out, err);
}

static sllm_status cuda_queue_adopt(void *dev, uint64_t stream, void **queue_out, sllm_error *err)
{
    const sllmi_accelerator *device = dev;
    int current = -1;
    *queue_out = NULL;
    sllm_status status = CALL(device->ordinal, err, cudaGetDevice, &current);
    if (status != SLLM_OK) {
        return status;
    }
    if (current != device->ordinal) {
        return sllmi_fail(err, SLLM_E_INVALID, 0,
                          "the calling thread is on cuda:%d, not on cuda:%d", current,
                          device->ordinal);
    }
    return make_queue(device->ordinal, (void *)(uintptr_t)stream, queue_out, err);
}

static bool cuda_queue_is_here(void *argument)
{
    const cuda_queue *queue = argument;
    int current = -1;
    return CALL(queue->ordinal, NULL, cudaGetDevice, &current) == SLLM_OK &&
           current == queue->ordinal;
}

static sllm_status cuda_queue_bind(void *argument, sllm_error *err)
{
    const cuda_queue *queue = argument;
    return set_device(queue->ordinal, err);
}

static void cuda_queue_close(void *argument)
{
    cuda_queue *queue = argument;
    if (queue != NULL) {
        sllmi_fences_end(&queue->fences);
        if (queue->own_stream) {
            (void)CALL(queue->ordinal, NULL, cudaStreamDestroy, queue->stream);
        }
        free(queue);
    }
}

static sllm_status cuda_copy(void *argument, uint64_t dst, const void *src, size_t bytes,
                             sllm_error *err)
{
    cuda_queue *queue = argument;
    queue->fences.behind = true;
    return CALL(queue->ordinal, err, cudaMemcpyAsync, (void *)(uintptr_t)dst, src, bytes,
                SLLMI_CUDA_MEMCPY_HOST_TO_DEVICE, queue->stream);
}

static sllm_status cuda_fence(void *argument, uint64_t *fence_out, sllm_error *err)
{
    cuda_queue *queue = argument;
    return sllmi_fences_add(&queue->fences, fence_out, err);
}

static sllm_status cuda_wait(void *argument, uint64_t fence, uint32_t timeout_ms, sllm_error *err)
{
    cuda_queue *queue = argument;
    return sllmi_fences_wait(&queue->fences, fence, timeout_ms, err);
}

static sllm_status cuda_drain(void *argument, uint32_t timeout_ms, sllm_error *err)
{
    cuda_queue *queue = argument;
    sllm_status status = sllmi_fences_drain(&queue->fences, timeout_ms, err);
    if (status == SLLM_E_BUSY) {
        return status;
    }
    /* The stream's end tells whether a copy failed. It may come after the fence's, and is the copies'
     * only known one where there is no event to be had. */
    uint64_t deadline = sllmi_now_ns() + (uint64_t)timeout_ms * 1000000u;
    int code = forgotten(api.cudaStreamQuery(queue->stream));
    while (code == SLLMI_CUDA_NOT_READY && sllmi_now_ns() < deadline) {
        sllmi_sleep_ns(STREAM_PAUSE_NS);
        code = forgotten(api.cudaStreamQuery(queue->stream));
    }
    if (code == SLLMI_CUDA_NOT_READY) {
        /* On the caller's stream, after a fence that has passed, it is other work than ours. */
        return status == SLLM_OK && !queue->own_stream
                   ? SLLM_OK
                   : sllmi_fail(err, SLLM_E_BUSY, 0, "the copies are not done yet");
    }
    return status == SLLM_OK ? status_of(queue->ordinal, "cudaStreamQuery", code, err) : status;
}

const sllmi_device_ops sllmi_device_cuda = {
    .abi = SLLMI_DEVICE_ABI,
    .name = "cuda",
    .caps = SLLMI_DEV_PINNED,
    .probe = cuda_probe,
    .open = cuda_open,
    .close = sllmi_accelerator_close,
    .bind_thread = sllmi_accelerator_bind_thread,
    .host_alloc = sllmi_accelerator_host_alloc,
    .host_free = sllmi_accelerator_host_free,
    .queue_open = cuda_queue_open,
    .queue_close = cuda_queue_close,
    .copy = cuda_copy,
    .fence = cuda_fence,
    .wait = cuda_wait,
    .drain = cuda_drain,
    .queue_adopt = cuda_queue_adopt,
    .queue_is_here = cuda_queue_is_here,
    .queue_bind = cuda_queue_bind,
    .visibility = "CUDA_VISIBLE_DEVICES",
    .host_register = sllmi_accelerator_host_register,
    .host_unregister = sllmi_accelerator_host_unregister,
};
