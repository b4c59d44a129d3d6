/* What the devices of NPU and CUDA have in common: their runtimes are started, counted and asked
 * for pinned memory on threads of ours, with a deadline. */
#ifndef SLLMI_ACCELERATOR_H
#define SLLMI_ACCELERATOR_H

#include <stddef.h>
#include <stdint.h>

#include "sllm.h"

/* What differs. */
typedef struct sllmi_accelerator_ops {
    const char *name; /* of the backend */
    sllm_status (*count)(int32_t *count_out, sllm_error *err);
    /* NULL: the runtime itself refuses a device that has failed for good. */
    sllm_status (*usable)(int32_t ordinal, sllm_error *err);
    /* Make a device the calling thread's, and start it where that has not been done. */
    sllm_status (*set_device)(int32_t ordinal, sllm_error *err);
    /* On a thread that has the device; aligned to SLLM_PAGE_BYTES. */
    sllm_status (*pin)(int32_t ordinal, size_t bytes, void **memory_out, sllm_error *err);
    void (*unpin)(void *memory);
    /* The slots of sllmi_device_ops, on such a thread; NULL where the backend cannot. */
    sllm_status (*host_register)(int32_t ordinal, void *memory, size_t bytes, sllm_error *err);
    sllm_status (*host_unregister)(int32_t ordinal, void *memory, sllm_error *err);
} sllmi_accelerator_ops;

/* What `dev` is to the slots of a sllmi_device_ops; those below are some of them. */
typedef struct sllmi_accelerator {
    const sllmi_accelerator_ops *ops;
    int32_t ordinal;
} sllmi_accelerator;

sllm_status sllmi_accelerator_probe(const sllmi_accelerator_ops *ops, int32_t *count_out,
                                    sllm_error *err);
sllm_status sllmi_accelerator_open(const sllmi_accelerator_ops *ops, int32_t ordinal,
                                   void **dev_out, sllm_error *err);
void sllmi_accelerator_close(void *dev);
sllm_status sllmi_accelerator_bind_thread(void *dev, sllm_error *err);
sllm_status sllmi_accelerator_host_alloc(void *dev, size_t bytes, void **ptr_out, sllm_error *err);
sllm_status sllmi_accelerator_host_free(void *dev, void *ptr);
sllm_status sllmi_accelerator_host_register(void *dev, void *memory, size_t bytes, sllm_error *err);
sllm_status sllmi_accelerator_host_unregister(void *dev, void *memory, sllm_error *err);

#endif
