/* What a device backend implements, and the devices made of it. */
#ifndef SLLMI_DEVICE_H
#define SLLMI_DEVICE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "sllm.h"

#define SLLMI_DEVICE_ABI 4
/* host_alloc() gives page-locked memory; copy() takes that, and what host_register() was given. */
#define SLLMI_DEV_PINNED 1u

/* A slot of the table never calls back into the core, and no lock is held across a call. */
typedef struct sllmi_device_ops {
    uint32_t abi;     /* SLLMI_DEVICE_ABI; new slots go at the end and bump it */
    const char *name; /* "cpu", "cuda", "npu" */
    uint32_t caps;    /* SLLMI_DEV_* */
    /* Count devices. Cheap, creates no context. SLLM_E_NO_DEVICE without the runtime library. */
    sllm_status (*probe)(int32_t *count_out, sllm_error *err);
    sllm_status (*open)(int32_t ordinal, void **dev_out, sllm_error *err);
    void (*close)(void *dev);                               /* NULL-safe */
    sllm_status (*bind_thread)(void *dev, sllm_error *err); /* first call of each worker */
    /* Staging memory, aligned to SLLM_PAGE_BYTES. */
    sllm_status (*host_alloc)(void *dev, size_t bytes, void **ptr_out, sllm_error *err);
    /* SLLM_E_TIMEOUT: the runtime hangs, and would at the next one; else SLLM_OK. */
    sllm_status (*host_free)(void *dev, void *ptr);
    sllm_status (*queue_open)(void *dev, void **queue_out, sllm_error *err);
    void (*queue_close)(void *queue); /* after drain(), on the thread that opened; NULL-safe */
    /* Start a host-to-device copy; `src` must stay as it is until a later fence has passed. */
    sllm_status (*copy)(void *queue, uint64_t dst, const void *src, size_t bytes, sllm_error *err);
    /* Mark the queue: the fence passes when all copies before it are done. Fences pass in order. */
    sllm_status (*fence)(void *queue, uint64_t *fence_out, sllm_error *err);
    /* SLLM_OK when the fence has passed, SLLM_E_BUSY when it has not after timeout_ms. */
    sllm_status (*wait)(void *queue, uint64_t fence, uint32_t timeout_ms, sllm_error *err);
    /* The end of all copies: SLLM_OK says that none failed, which a fence need not tell.
     * SLLM_E_BUSY: not after timeout_ms. Any other failure: they are over, in whatever state, which
     * a fence that cannot be made does not say. */
    sllm_status (*drain)(void *queue, uint32_t timeout_ms, sllm_error *err);
    /* A queue for a thread that is not ours and stays as it is: it has the device as its current
     * one. `stream` is the caller's, as the runtime has it; 0: a new one. */
    sllm_status (*queue_adopt)(void *dev, uint64_t stream, void **queue_out, sllm_error *err);
    /* Whether the calling thread is where an adopted queue was made: runtimes refuse a stream elsewhere,
     * or take another for it. NULL: every thread is. */
    bool (*queue_is_here)(void *queue);
    /* Make the calling thread, which is one of ours, such a place. */
    sllm_status (*queue_bind)(void *queue, sllm_error *err);
    const char *visibility; /* the environment variable that hides devices, or NULL */
    /* Let copies to every device of the backend start in memory that is mapped for reading alone,
     * whole pages, until host_unregister(). Both are NULL where the backend cannot. Where the one
     * answers SLLM_E_TIMEOUT, or the other anything but SLLM_OK, the memory has to stay mapped. */
    sllm_status (*host_register)(void *dev, void *memory, size_t bytes, sllm_error *err);
    sllm_status (*host_unregister)(void *dev, void *memory, sllm_error *err);
} sllmi_device_ops;

struct sllm_device {
    const sllmi_device_ops *ops;
    void *dev;
    int32_t ordinal;
    pid_t pid;
    atomic_uint users; /* the caller's handle, rings and jobs; the last one closes */
};

/* One more user; sllm_device_close() ends that too. */
void sllmi_device_keep(sllm_device *device);

extern const sllmi_device_ops sllmi_device_cpu;
extern const sllmi_device_ops sllmi_device_npu;
extern const sllmi_device_ops sllmi_device_cuda;

/* Open a device of a table that need not be compiled in: tests bring their own. */
sllm_status sllmi_device_open_ops(const sllmi_device_ops *ops, int32_t ordinal,
                                  sllm_device **device_out, sllm_error *err);

#endif
