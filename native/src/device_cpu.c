/* The host as a device: copies are memcpy, and done when they return. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "error.h"

static char the_host;

static sllm_status cpu_probe(int32_t *count_out, sllm_error *err)
{
    (void)err;
    *count_out = 1;
    return SLLM_OK;
}

static sllm_status cpu_open(int32_t ordinal, void **dev_out, sllm_error *err)
{
    (void)ordinal, (void)err;
    *dev_out = &the_host;
    return SLLM_OK;
}

static void cpu_close(void *dev)
{
    (void)dev;
}

static sllm_status cpu_bind_thread(void *dev, sllm_error *err)
{
    (void)dev, (void)err;
    return SLLM_OK;
}

static sllm_status cpu_host_alloc(void *dev, size_t bytes, void **ptr_out, sllm_error *err)
{
    (void)dev;
    int rc = posix_memalign(ptr_out, SLLM_PAGE_BYTES, bytes);
    if (rc != 0) {
        *ptr_out = NULL;
        return sllmi_fail(err, SLLM_E_NOMEM, rc, "cannot allocate a slot of %zu bytes: %s", bytes,
                          strerror(rc));
    }
    return SLLM_OK;
}

static sllm_status cpu_host_free(void *dev, void *ptr)
{
    (void)dev;
    free(ptr);
    return SLLM_OK;
}

static sllm_status cpu_queue_open(void *dev, void **queue_out, sllm_error *err)
{
    (void)err;
    *queue_out = dev;
    return SLLM_OK;
}

static void cpu_queue_close(void *queue)
{
    (void)queue;
}

static sllm_status cpu_copy(void *queue, uint64_t dst, const void *src, size_t bytes,
                            sllm_error *err)
{
    (void)queue, (void)err;
    memcpy((void *)(uintptr_t)dst, src, bytes);
    return SLLM_OK;
}

static sllm_status cpu_fence(void *queue, uint64_t *fence_out, sllm_error *err)
{
    (void)queue, (void)err;
    *fence_out = 0;
    return SLLM_OK;
}

static sllm_status cpu_wait(void *queue, uint64_t fence, uint32_t timeout_ms, sllm_error *err)
{
    (void)queue, (void)fence, (void)timeout_ms, (void)err;
    return SLLM_OK;
}

static sllm_status cpu_drain(void *queue, uint32_t timeout_ms, sllm_error *err)
{
    (void)queue, (void)timeout_ms, (void)err;
    return SLLM_OK;
}

static sllm_status cpu_queue_adopt(void *dev, uint64_t stream, void **queue_out, sllm_error *err)
{
    (void)stream;
    return cpu_queue_open(dev, queue_out, err);
}

const sllmi_device_ops sllmi_device_cpu = {
    .abi = SLLMI_DEVICE_ABI,
    .name = "cpu",
    .probe = cpu_probe,
    .open = cpu_open,
    .close = cpu_close,
    .bind_thread = cpu_bind_thread,
    .host_alloc = cpu_host_alloc,
    .host_free = cpu_host_free,
    .queue_open = cpu_queue_open,
    .queue_close = cpu_queue_close,
    .copy = cpu_copy,
    .fence = cpu_fence,
    .wait = cpu_wait,
    .drain = cpu_drain,
    .queue_adopt = cpu_queue_adopt,
};
