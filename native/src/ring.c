#include "ring.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "device.h"
#include "error.h"
#include "os.h"
#include "queue.h"

struct sllm_ring {
    pthread_mutex_t lock;
    pthread_cond_t returned;
    sllmi_slot *free_slots;
    sllmi_slot *slots;
    uint32_t count;
    uint64_t slot_bytes;
    sllm_device *device;
    pid_t pid;
    atomic_uint users; /* the caller's handle and jobs; the last one frees */
};

sllm_status sllm_ring_create(sllm_device *device, uint64_t slot_bytes, uint32_t count,
                             sllm_ring **ring_out, sllm_error *err)
{
    if (ring_out == NULL) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_ring_create: ring_out is NULL");
    }
    *ring_out = NULL;
    if (device == NULL || slot_bytes == 0 || slot_bytes % SLLM_PAGE_BYTES != 0 || count < 2 ||
        count > 1024) {
        return sllmi_fail(err, SLLM_E_INVALID, 0,
                          "sllm_ring_create: %u slots of %llu bytes are no ring", count,
                          (unsigned long long)slot_bytes);
    }
    if (device->pid != getpid()) {
        return sllmi_fail(err, SLLM_E_FORKED, 0, "sllm_ring_create: not a device of this process");
    }
    sllm_ring *ring = sllmi_sys.alloc(sizeof *ring);
    sllmi_slot *slots = ring == NULL ? NULL : sllmi_sys.alloc(count * sizeof *slots);
    if (slots == NULL) {
        free(ring);
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for a ring of %u slots", count);
    }
    ring->slots = slots;
    ring->slot_bytes = slot_bytes;
    ring->device = device;
    sllmi_device_keep(device);
    ring->pid = getpid();
    ring->users = 1;
    pthread_mutex_init(&ring->lock, NULL);
    sllmi_cond_init(&ring->returned);
    for (; ring->count < count; ring->count++) {
        sllmi_slot *slot = &slots[ring->count];
        void *memory = NULL;
        sllm_status status = device->ops->host_alloc(device->dev, slot_bytes, &memory, err);
        if (status != SLLM_OK) {
            sllm_ring_destroy(ring);
            return status;
        }
        slot->memory = memory;
        slot->next_free = ring->free_slots;
        ring->free_slots = slot;
    }
    *ring_out = ring;
    return SLLM_OK;
}

void sllmi_ring_keep(sllm_ring *ring)
{
    atomic_fetch_add(&ring->users, 1);
}

void sllm_ring_destroy(sllm_ring *ring)
{
    if (ring == NULL || ring->pid != getpid() || atomic_fetch_sub(&ring->users, 1) > 1) {
        return;
    }
    sllm_status status = SLLM_OK; /* a runtime that hangs keeps the other slots */
    for (uint32_t i = 0; status == SLLM_OK && i < ring->count; i++) {
        status = ring->device->ops->host_free(ring->device->dev, ring->slots[i].memory);
    }
    pthread_cond_destroy(&ring->returned);
    pthread_mutex_destroy(&ring->lock);
    sllm_device_close(ring->device);
    free(ring->slots);
    free(ring);
}

sllmi_slot *sllmi_ring_acquire(sllm_ring *ring, uint32_t timeout_ms, const atomic_bool *stop)
{
    uint64_t deadline = sllmi_now_ns() + (uint64_t)timeout_ms * 1000000u;
    sllmi_slot *slot = NULL;
    pthread_mutex_lock(&ring->lock);
    while (!*stop && ring->free_slots == NULL &&
           sllmi_cond_wait(&ring->returned, &ring->lock, deadline)) {
    }
    if (!*stop && ring->free_slots != NULL) {
        slot = ring->free_slots;
        ring->free_slots = slot->next_free;
    }
    pthread_mutex_unlock(&ring->lock);
    return slot;
}

void sllmi_ring_release(sllm_ring *ring, sllmi_slot *slot)
{
    if (atomic_fetch_sub(&slot->users, 1) == 1) {
        pthread_mutex_lock(&ring->lock);
        slot->next_free = ring->free_slots;
        ring->free_slots = slot;
        pthread_cond_signal(&ring->returned);
        pthread_mutex_unlock(&ring->lock);
    }
}

void sllmi_ring_wake(sllm_ring *ring)
{
    pthread_mutex_lock(&ring->lock);
    pthread_cond_broadcast(&ring->returned);
    pthread_mutex_unlock(&ring->lock);
}

bool sllmi_ring_is_ours(const sllm_ring *ring)
{
    return ring->pid == getpid();
}

bool sllmi_ring_feeds(const sllm_ring *ring, const sllm_device *device)
{
    return (device->ops->caps & SLLMI_DEV_PINNED) == 0 || ring->device->ops == device->ops;
}

uint64_t sllmi_ring_slot_bytes(const sllm_ring *ring)
{
    return ring->slot_bytes;
}

uint32_t sllmi_ring_slot_count(const sllm_ring *ring)
{
    return ring->count;
}
