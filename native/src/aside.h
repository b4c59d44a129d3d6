/* Calls of a device runtime that must not happen on the caller's thread, or may never return.
 *
 * A runtime keeps a current device for each thread, and so does torch, which does not ask again:
 * to set one on a thread of torch's would send its next allocation to another device. */
#ifndef SLLMI_ASIDE_H
#define SLLMI_ASIDE_H

#include <stddef.h>
#include <stdint.h>

#include "sllm.h"

typedef struct sllmi_request {
    /* The call, on a thread of its own. */
    sllm_status (*run)(struct sllmi_request *request, sllm_error *err);
    /* There too, after a success that came too late for anybody to take it; may be NULL. */
    void (*undo)(struct sllmi_request *request);
    const char *what; /* for messages, such as "pinning memory"; static storage */
    const char *backend;
    int32_t ordinal;
    uint32_t timeout_ms;
    const struct sllmi_accelerator_ops *ops; /* what else run() needs */
    size_t bytes;
    void *memory;
    int32_t count;
} sllmi_request;

/* Run a request and wait for its end; what it changed of itself is there afterwards.
 * What run() returns, SLLM_E_NOMEM (no thread), or SLLM_E_TIMEOUT: the thread is left behind. */
sllm_status sllmi_aside(sllmi_request *request, sllm_error *err);

#endif
