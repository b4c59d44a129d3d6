/* Fences made of a runtime's events: numbered, passing in order, asked rather than waited for. */
#ifndef SLLMI_FENCES_H
#define SLLMI_FENCES_H

#include <stdbool.h>
#include <stdint.h>

#include "sllm.h"

#define SLLMI_MAX_FENCES 1024u /* under way at once: a ring has no more slots */

/* A runtime's events, on the stream of one queue. */
typedef struct sllmi_event_ops {
    sllm_status (*create)(void *queue, void **event_out, sllm_error *err);
    sllm_status (*record)(void *queue, void *event, sllm_error *err);
    sllm_status (*query)(void *queue, void *event, bool *passed_out, sllm_error *err);
    void (*destroy)(void *queue, void *event);
} sllmi_event_ops;

typedef struct sllmi_fences {
    const sllmi_event_ops *ops;
    void *queue;
    void *events[SLLMI_MAX_FENCES]; /* made when first needed, then used in turn */
    uint64_t last;                  /* number of the newest fence; the first is 1 */
    uint64_t passed;
    bool behind; /* something was queued after the newest fence: set by whoever does that */
} sllmi_fences;

/* Mark the stream's present end. SLLM_E_INVALID when too many are under way. */
sllm_status sllmi_fences_add(sllmi_fences *fences, uint64_t *fence_out, sllm_error *err);
/* SLLM_OK when the fence has passed, SLLM_E_BUSY when it has not after timeout_ms. */
sllm_status sllmi_fences_wait(sllmi_fences *fences, uint64_t fence, uint32_t timeout_ms,
                              sllm_error *err);
/* The same for all that was queued so far. Another failure: nobody knows when that is done. */
sllm_status sllmi_fences_drain(sllmi_fences *fences, uint32_t timeout_ms, sllm_error *err);
void sllmi_fences_end(sllmi_fences *fences);

#endif
