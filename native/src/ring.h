/* Staging slots: taken by readers, filled, emptied by copiers, returned. */
#ifndef SLLMI_RING_H
#define SLLMI_RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "sllm.h"

typedef struct sllmi_slot {
    char *memory;      /* slot_bytes, page-aligned */
    uint64_t chunk;    /* index into the plan, set by the reader */
    const char *bytes; /* the chunk's first, in `memory` or in a registered file; likewise */
    atomic_uint users; /* devices that have not copied it yet */
    struct sllmi_slot *next_free;
} sllmi_slot;

/* A free slot, or NULL after timeout_ms, or at once when `stop` is set. */
sllmi_slot *sllmi_ring_acquire(sllm_ring *ring, uint32_t timeout_ms, const atomic_bool *stop);
/* One user is done with the slot; the last one returns it to the ring. */
void sllmi_ring_release(sllm_ring *ring, sllmi_slot *slot);
/* Wake those who wait, so that they look at their stop flag. */
void sllmi_ring_wake(sllm_ring *ring);

/* One more user; sllm_ring_destroy() ends that too. */
void sllmi_ring_keep(sllm_ring *ring);

/* Made by this process, not by one that forked it. */
bool sllmi_ring_is_ours(const sllm_ring *ring);
/* A device that copies from pinned memory needs slots of its own backend. */
bool sllmi_ring_feeds(const sllm_ring *ring, const sllm_device *device);
uint64_t sllmi_ring_slot_bytes(const sllm_ring *ring);
uint32_t sllmi_ring_slot_count(const sllm_ring *ring);

#endif
