/* CUDA devices, through the runtime library: it shares the primary context with torch. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "aside.h"
#include "cuda_abi.h"
#include "device.h"
#include "dl.h"
#include "error.h"
#include "fences.h"
#include "os.h"

#define START_TIMEOUT_MS 120000u
#define CALL_TIMEOUT_MS 60000u
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

static struct {
    pthread_mutex_t lock;
    sllmi_cuda cuda;
    pid_t pid; /* that loaded it; 0: none yet */
} runtime = {.lock = PTHREAD_MUTEX_INITIALIZER};

typedef struct cuda_device {
    const sllmi_cuda *cuda;
    int32_t ordinal;
} cuda_device;

typedef struct cuda_queue {
    const sllmi_cuda *cuda;
    int32_t ordinal;
    void *stream;
    bool own_stream;
    bool drained; /* the last fence stands behind the last copy */
    sllmi_fences fences;
} cuda_queue;

static sllm_status load(const sllmi_cuda **cuda_out, sllm_error *err)
{
    sllm_status status = SLLM_OK;
    void *handle;
    pthread_mutex_lock(&runtime.lock);
    if (runtime.pid == 0) {
        sllmi_cuda cuda;
        status = sllmi_dl_open(&library, &handle, err);
        if (status == SLLM_OK) {
            status = sllmi_dl_resolve(&library, handle, symbols, sizeof symbols / sizeof symbols[0],
                                      &cuda, err);
        }
        if (status == SLLM_OK) {
            runtime.cuda = cuda;
            runtime.pid = getpid();
        }
    } else if (runtime.pid != getpid()) {
        status = sllmi_fail(err, SLLM_E_FORKED, 0,
                            "the CUDA runtime was started by process %ld, which forked this one",
                            (long)runtime.pid);
    }
    pthread_mutex_unlock(&runtime.lock);
    *cuda_out = status == SLLM_OK ? &runtime.cuda : NULL;
    return status;
}

/* The answer of a call. A runtime keeps the last error of each thread, "not ready" among them, and
 * torch asks for it after every kernel: it must not find ours. */
static int answer(const sllmi_cuda *cuda, int code)
{
    if (code != SLLMI_CUDA_SUCCESS) {
        (void)cuda->cudaGetLastError();
    }
    return code;
}

#define CALL(where, function, ...) answer((where)->cuda, (where)->cuda->function(__VA_ARGS__))

static sllm_status fail(const sllmi_cuda *cuda, int32_t ordinal, const char *function, int code,
                        sllm_error *err)
{
    sllm_status status = code == SLLMI_CUDA_MEMORY_ALLOCATION ? SLLM_E_NOMEM : SLLM_E_DEVICE;
    return sllmi_fail_device(err, status, code, "cuda:%d: %s failed with %d (%s): %s", ordinal,
                             function, code, cuda->cudaGetErrorName(code),
                             cuda->cudaGetErrorString(code));
}

#define FAIL(where, function, code, err) fail((where)->cuda, (where)->ordinal, function, code, err)

/* ---- what must not happen on the caller's thread ------------------------------------------- */

static sllm_status count_devices(sllmi_request *request, sllm_error *err)
{
    const sllmi_cuda *cuda;
    sllm_status status = load(&cuda, err);
    if (status == SLLM_OK) {
        int code = cuda->cudaGetDeviceCount(&request->count);
        if (code == SLLMI_CUDA_NO_DEVICE) {
            request->count = 0;
        } else if (code == SLLMI_CUDA_INSUFFICIENT_DRIVER) {
            status = sllmi_fail_device(err, SLLM_E_NO_DEVICE, code,
                                       "the NVIDIA driver is missing, or older than %s needs",
                                       library.what);
        } else if (code != SLLMI_CUDA_SUCCESS) {
            status = fail(cuda, 0, "cudaGetDeviceCount", code, err);
        }
    }
    return status;
}

static sllm_status set_device(int32_t ordinal, const sllmi_cuda **cuda_out, sllm_error *err)
{
    sllm_status status = load(cuda_out, err);
    if (status == SLLM_OK) {
        int code = (*cuda_out)->cudaSetDevice(ordinal);
        if (code != SLLMI_CUDA_SUCCESS) {
            status = fail(*cuda_out, ordinal, "cudaSetDevice", code, err);
        }
    }
    return status;
}

static sllm_status start_device(sllmi_request *request, sllm_error *err)
{
    const sllmi_cuda *cuda;
    return set_device(request->ordinal, &cuda, err);
}

/* cudaHostAlloc gives whole pages: it maps them. */
static sllm_status pin(sllmi_request *request, sllm_error *err)
{
    const sllmi_cuda *cuda;
    sllm_status status = set_device(request->ordinal, &cuda, err);
    if (status == SLLM_OK) {
        int code =
            cuda->cudaHostAlloc(&request->memory, request->bytes, SLLMI_CUDA_HOST_ALLOC_PORTABLE);
        if (code != SLLMI_CUDA_SUCCESS) {
            status = fail(cuda, request->ordinal, "cudaHostAlloc", code, err);
        }
    }
    if (status == SLLM_OK && (uintptr_t)request->memory % SLLM_PAGE_BYTES != 0) {
        (void)cuda->cudaFreeHost(request->memory);
        status = sllmi_fail(err, SLLM_E_UNSUPPORTED, 0,
                            "cuda:%d: pinned memory does not start at a page", request->ordinal);
    }
    return status;
}

static sllm_status unpin(sllmi_request *request, sllm_error *err)
{
    const sllmi_cuda *cuda;
    sllm_status status = set_device(request->ordinal, &cuda, err);
    if (cuda != NULL) { /* a device that fails is no reason to keep the memory */
        (void)cuda->cudaFreeHost(request->memory);
    }
    return status;
}

static void unpin_late(sllmi_request *request)
{
    sllm_error ignored;
    (void)unpin(request, &ignored);
}

/* ---- the device ---------------------------------------------------------------------------- */

static sllm_status cuda_probe(int32_t *count_out, sllm_error *err)
{
    sllmi_request request = {.run = count_devices,
                             .what = "counting devices",
                             .backend = "cuda",
                             .timeout_ms = START_TIMEOUT_MS};
    sllm_status status = sllmi_aside(&request, err);
    *count_out = status == SLLM_OK ? request.count : 0;
    return status;
}

static sllm_status cuda_open(int32_t ordinal, void **dev_out, sllm_error *err)
{
    *dev_out = NULL;
    sllmi_request request = {.run = start_device,
                             .what = "starting the device",
                             .backend = "cuda",
                             .ordinal = ordinal,
                             .timeout_ms = START_TIMEOUT_MS};
    cuda_device *device = sllmi_sys.alloc(sizeof *device);
    if (device == NULL) {
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for cuda:%d", ordinal);
    }
    device->ordinal = ordinal;
    sllm_status status = load(&device->cuda, err);
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

static void cuda_close(void *dev)
{
    free(dev);
}

static sllm_status cuda_bind_thread(void *dev, sllm_error *err)
{
    const cuda_device *device = dev;
    const sllmi_cuda *cuda;
    return set_device(device->ordinal, &cuda, err);
}

static sllm_status cuda_host_alloc(void *dev, size_t bytes, void **ptr_out, sllm_error *err)
{
    const cuda_device *device = dev;
    sllmi_request request = {.run = pin,
                             .undo = unpin_late,
                             .what = "pinning memory",
                             .backend = "cuda",
                             .ordinal = device->ordinal,
                             .timeout_ms = CALL_TIMEOUT_MS,
                             .bytes = bytes};
    sllm_status status = sllmi_aside(&request, err);
    *ptr_out = status == SLLM_OK ? request.memory : NULL;
    return status;
}

static sllm_status cuda_host_free(void *dev, void *ptr)
{
    const cuda_device *device = dev;
    sllmi_request request = {.run = unpin,
                             .what = "unpinning memory",
                             .backend = "cuda",
                             .ordinal = device->ordinal,
                             .timeout_ms = CALL_TIMEOUT_MS,
                             .memory = ptr};
    sllm_error ignored;
    return sllmi_aside(&request, &ignored) == SLLM_E_TIMEOUT ? SLLM_E_TIMEOUT : SLLM_OK;
}

/* ---- queues: a stream, and events as fences ------------------------------------------------ */

static sllm_status event_create(void *argument, void **event_out, sllm_error *err)
{
    cuda_queue *queue = argument;
    int code = CALL(queue, cudaEventCreateWithFlags, event_out, SLLMI_CUDA_EVENT_DISABLE_TIMING);
    if (code != SLLMI_CUDA_SUCCESS) {
        *event_out = NULL;
        return FAIL(queue, "cudaEventCreateWithFlags", code, err);
    }
    return SLLM_OK;
}

static sllm_status event_record(void *argument, void *event, sllm_error *err)
{
    cuda_queue *queue = argument;
    int code = CALL(queue, cudaEventRecord, event, queue->stream);
    return code == SLLMI_CUDA_SUCCESS ? SLLM_OK : FAIL(queue, "cudaEventRecord", code, err);
}

static sllm_status event_query(void *argument, void *event, bool *passed_out, sllm_error *err)
{
    cuda_queue *queue = argument;
    int code = CALL(queue, cudaEventQuery, event);
    *passed_out = code == SLLMI_CUDA_SUCCESS;
    return code == SLLMI_CUDA_SUCCESS || code == SLLMI_CUDA_NOT_READY
               ? SLLM_OK
               : FAIL(queue, "cudaEventQuery", code, err);
}

static void event_destroy(void *argument, void *event)
{
    cuda_queue *queue = argument;
    (void)CALL(queue, cudaEventDestroy, event);
}

static const sllmi_event_ops event_ops = {
    .create = event_create, .record = event_record, .query = event_query, .destroy = event_destroy};

/* A queue on a stream, or with NULL on a new one of the thread's current device. */
static sllm_status make_queue(const cuda_device *device, void *stream, void **queue_out,
                              sllm_error *err)
{
    *queue_out = NULL;
    cuda_queue *queue = sllmi_sys.alloc(sizeof *queue);
    if (queue == NULL) {
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for copies to cuda:%d",
                          device->ordinal);
    }
    queue->cuda = device->cuda;
    queue->ordinal = device->ordinal;
    queue->stream = stream;
    queue->own_stream = stream == NULL;
    queue->drained = true;
    queue->fences.ops = &event_ops;
    queue->fences.queue = queue;
    if (queue->own_stream) {
        /* Not blocked by the default stream, on which torch computes. */
        int code =
            CALL(queue, cudaStreamCreateWithFlags, &queue->stream, SLLMI_CUDA_STREAM_NON_BLOCKING);
        if (code != SLLMI_CUDA_SUCCESS) {
            sllm_status status = FAIL(queue, "cudaStreamCreateWithFlags", code, err);
            free(queue);
            return status;
        }
    }
    *queue_out = queue;
    return SLLM_OK;
}

static sllm_status cuda_queue_open(void *dev, void **queue_out, sllm_error *err)
{
    return make_queue(dev, NULL, queue_out, err);
}

static sllm_status cuda_queue_adopt(void *dev, uint64_t stream, void **queue_out, sllm_error *err)
{
    const cuda_device *device = dev;
    *queue_out = NULL;
    int current = -1;
    int code = CALL(device, cudaGetDevice, &current);
    if (code != SLLMI_CUDA_SUCCESS) {
        return FAIL(device, "cudaGetDevice", code, err);
    }
    if (current != device->ordinal) {
        return sllmi_fail(err, SLLM_E_INVALID, 0,
                          "the calling thread is on cuda:%d, not on cuda:%d", current,
                          device->ordinal);
    }
    return make_queue(device, (void *)(uintptr_t)stream, queue_out, err);
}

static bool cuda_queue_is_here(void *argument)
{
    const cuda_queue *queue = argument;
    int current = -1;
    return CALL(queue, cudaGetDevice, &current) == SLLMI_CUDA_SUCCESS && current == queue->ordinal;
}

static sllm_status cuda_queue_bind(void *argument, sllm_error *err)
{
    const cuda_queue *queue = argument;
    const sllmi_cuda *cuda;
    return set_device(queue->ordinal, &cuda, err);
}

static void cuda_queue_close(void *argument)
{
    cuda_queue *queue = argument;
    if (queue != NULL) {
        sllmi_fences_end(&queue->fences);
        if (queue->own_stream) {
            (void)CALL(queue, cudaStreamDestroy, queue->stream);
        }
        free(queue);
    }
}

static sllm_status cuda_copy(void *argument, uint64_t dst, const void *src, size_t bytes,
                             sllm_error *err)
{
    cuda_queue *queue = argument;
    queue->drained = false;
    int code = CALL(queue, cudaMemcpyAsync, (void *)(uintptr_t)dst, src, bytes,
                    SLLMI_CUDA_MEMCPY_HOST_TO_DEVICE, queue->stream);
    return code == SLLMI_CUDA_SUCCESS ? SLLM_OK : FAIL(queue, "cudaMemcpyAsync", code, err);
}

static sllm_status cuda_fence(void *argument, uint64_t *fence_out, sllm_error *err)
{
    cuda_queue *queue = argument;
    sllm_status status = sllmi_fences_add(&queue->fences, fence_out, err);
    queue->drained = queue->drained || status == SLLM_OK;
    return status;
}

static sllm_status cuda_wait(void *argument, uint64_t fence, uint32_t timeout_ms, sllm_error *err)
{
    cuda_queue *queue = argument;
    return sllmi_fences_wait(&queue->fences, fence, timeout_ms, err);
}

static sllm_status cuda_drain(void *argument, uint32_t timeout_ms, sllm_error *err)
{
    cuda_queue *queue = argument;
    uint64_t fence;
    sllm_status status = queue->drained ? SLLM_OK : cuda_fence(queue, &fence, err);
    if (status == SLLM_OK) {
        status = cuda_wait(queue, queue->fences.last, timeout_ms, err);
    }
    if (status == SLLM_E_BUSY) {
        return status;
    }
    /* After the fence it tells whether a copy failed. Without one, as when there is no event to be
     * had, the stream's end is the copies' only known one. */
    uint64_t deadline = sllmi_now_ns() + (uint64_t)timeout_ms * 1000000u;
    int code = CALL(queue, cudaStreamQuery, queue->stream);
    while (status != SLLM_OK && code == SLLMI_CUDA_NOT_READY && sllmi_now_ns() < deadline) {
        sllmi_sleep_ns(STREAM_PAUSE_NS);
        code = CALL(queue, cudaStreamQuery, queue->stream);
    }
    if (code == SLLMI_CUDA_NOT_READY && status != SLLM_OK) {
        return sllmi_fail(err, SLLM_E_BUSY, 0, "the copies are not done yet");
    }
    if (code != SLLMI_CUDA_SUCCESS && code != SLLMI_CUDA_NOT_READY && status == SLLM_OK) {
        status = FAIL(queue, "cudaStreamQuery", code, err);
    }
    return status;
}

const sllmi_device_ops sllmi_device_cuda = {
    .abi = SLLMI_DEVICE_ABI,
    .name = "cuda",
    .caps = SLLMI_DEV_PINNED,
    .probe = cuda_probe,
    .open = cuda_open,
    .close = cuda_close,
    .bind_thread = cuda_bind_thread,
    .host_alloc = cuda_host_alloc,
    .host_free = cuda_host_free,
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
};
