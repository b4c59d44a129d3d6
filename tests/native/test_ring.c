/* The ring of staging slots. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "device.h"
#include "os.h"
#include "ring.h"
#include "system.h"

#define SLOT_BYTES 8192u

static sllm_device *open_cpu(void)
{
    sllm_device *device;
    sllm_error err;
    CHECK_OK(sllm_device_open("cpu", 0, &device, &err), &err);
    return device;
}

static sllm_ring *make_ring(sllm_device *device, uint32_t count)
{
    sllm_ring *ring;
    sllm_error err;
    CHECK_OK(sllm_ring_create(device, SLOT_BYTES, count, &ring, &err), &err);
    return ring;
}

TEST(what_is_no_ring_is_refused)
{
    sllm_device *device = open_cpu();
    sllm_error err;
    sllm_ring *ring = NULL;
    CHECK_STATUS(sllm_ring_create(device, 0, 2, &ring, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_ring_create(device, 4097, 2, &ring, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_ring_create(device, 4096, 1, &ring, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_ring_create(device, 4096, 1025, &ring, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_ring_create(NULL, 4096, 2, &ring, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_ring_create(device, 4096, 2, NULL, &err), &err, SLLM_E_INVALID);
    CHECK(ring == NULL);
    sllm_ring_destroy(NULL);
    sllm_device_close(device);
}

TEST(slots_are_apart_aligned_and_as_many_as_asked_for)
{
    sllm_device *device = open_cpu();
    sllm_ring *ring = make_ring(device, 7);
    atomic_bool stop = false;
    sllmi_slot *slots[7];
    CHECK_U64(sllmi_ring_slot_count(ring), 7);
    CHECK_U64(sllmi_ring_slot_bytes(ring), SLOT_BYTES);
    for (int i = 0; i < 7; i++) {
        slots[i] = sllmi_ring_acquire(ring, 0, &stop);
        CHECK(slots[i] != NULL);
        CHECK_U64((uintptr_t)slots[i]->memory % SLLM_PAGE_BYTES, 0);
        memset(slots[i]->memory, i, SLOT_BYTES);
        slots[i]->users = 1;
    }
    CHECK(sllmi_ring_acquire(ring, 0, &stop) == NULL);
    for (int i = 0; i < 7; i++) {
        CHECK(slots[i]->memory[0] == i && slots[i]->memory[SLOT_BYTES - 1] == i);
        sllmi_ring_release(ring, slots[i]);
    }
    sllm_ring_destroy(ring);
    sllm_device_close(device);
}

TEST(a_slot_returns_with_its_last_user)
{
    sllm_device *device = open_cpu();
    sllm_ring *ring = make_ring(device, 2);
    atomic_bool stop = false;
    sllmi_slot *one = sllmi_ring_acquire(ring, 0, &stop);
    sllmi_slot *two = sllmi_ring_acquire(ring, 0, &stop);
    one->users = 3;
    two->users = 1;
    sllmi_ring_release(ring, one);
    sllmi_ring_release(ring, one);
    CHECK(sllmi_ring_acquire(ring, 0, &stop) == NULL);
    sllmi_ring_release(ring, one);
    CHECK(sllmi_ring_acquire(ring, 0, &stop) == one);
    one->users = 1;
    sllmi_ring_release(ring, one);
    sllmi_ring_release(ring, two);
    sllm_ring_destroy(ring);
    sllm_device_close(device);
}

TEST(waiting_for_a_slot_ends_with_its_time)
{
    sllm_device *device = open_cpu();
    sllm_ring *ring = make_ring(device, 2);
    atomic_bool stop = false;
    sllmi_slot *one = sllmi_ring_acquire(ring, 0, &stop);
    sllmi_slot *two = sllmi_ring_acquire(ring, 0, &stop);
    uint64_t start = sllmi_now_ns();
    CHECK(sllmi_ring_acquire(ring, 20, &stop) == NULL);
    CHECK(sllmi_now_ns() - start >= 20000000u);
    one->users = two->users = 1;
    sllmi_ring_release(ring, one);
    sllmi_ring_release(ring, two);
    stop = true;
    CHECK(sllmi_ring_acquire(ring, 60000, &stop) == NULL);
    sllm_ring_destroy(ring);
    sllm_device_close(device);
}

struct waiter {
    sllm_ring *ring;
    atomic_bool *stop;
};

static void *wait_for_slot(void *argument)
{
    struct waiter *waiter = argument;
    return sllmi_ring_acquire(waiter->ring, 250000, waiter->stop);
}

TEST(stopping_wakes_everyone_who_waits_for_a_slot)
{
    sllm_device *device = open_cpu();
    sllm_ring *ring = make_ring(device, 2);
    atomic_bool stop = false;
    sllmi_slot *one = sllmi_ring_acquire(ring, 0, &stop);
    sllmi_slot *two = sllmi_ring_acquire(ring, 0, &stop);
    struct waiter waiter = {ring, &stop};
    pthread_t threads[6];
    for (int i = 0; i < 6; i++) {
        CHECK(pthread_create(&threads[i], NULL, wait_for_slot, &waiter) == 0);
    }
    stop = true;
    sllmi_ring_wake(ring);
    for (int i = 0; i < 6; i++) {
        void *slot;
        pthread_join(threads[i], &slot);
        CHECK(slot == NULL);
    }
    one->users = two->users = 1;
    sllmi_ring_release(ring, one);
    sllmi_ring_release(ring, two);
    sllm_ring_destroy(ring);
    sllm_device_close(device);
}

struct crowd {
    sllm_ring *ring;
    sllmi_slot *_Atomic offered; /* from an owner to the second user of its slot */
    atomic_bool stop;
    atomic_uint holders;
};

static void *use_slots(void *argument)
{
    struct crowd *crowd = argument;
    for (int i = 0; i < 2000; i++) {
        sllmi_slot *slot = sllmi_ring_acquire(crowd->ring, 100000, &crowd->stop);
        CHECK(slot != NULL);
        CHECK(++crowd->holders <= 4);
        slot->memory[i % SLOT_BYTES]++; /* a race here means that two hold it */
        slot->users = 2;
        crowd->holders--;
        sllmi_slot *mine = atomic_exchange(&crowd->offered, slot);
        sllmi_ring_release(crowd->ring, slot);
        if (mine != NULL) {
            sllmi_ring_release(crowd->ring, mine);
        }
    }
    return NULL;
}

TEST(a_crowd_shares_few_slots_and_never_one_at_a_time_twice)
{
    sllm_device *device = open_cpu();
    struct crowd crowd = {.ring = make_ring(device, 4)};
    pthread_t threads[8];
    for (int i = 0; i < 8; i++) {
        CHECK(pthread_create(&threads[i], NULL, use_slots, &crowd) == 0);
    }
    for (int i = 0; i < 8; i++) {
        pthread_join(threads[i], NULL);
    }
    sllmi_ring_release(crowd.ring, crowd.offered);
    sllmi_slot *slots[4];
    for (int i = 0; i < 4; i++) {
        slots[i] = sllmi_ring_acquire(crowd.ring, 0, &crowd.stop);
        CHECK(slots[i] != NULL);
        slots[i]->users = 1;
    }
    for (int i = 0; i < 4; i++) {
        sllmi_ring_release(crowd.ring, slots[i]);
    }
    sllm_ring_destroy(crowd.ring);
    sllm_device_close(device);
}

TEST(a_ring_that_does_not_fit_leaves_nothing_behind)
{
    sllm_device *device = open_cpu();
    sllm_error err;
    sllm_ring *ring;
    for (uint64_t n = 1; n <= 2; n++) {
        system_start();
        system_fail(SYSTEM_ALLOC, n, n, 12);
        CHECK_STATUS(sllm_ring_create(device, SLOT_BYTES, 3, &ring, &err), &err, SLLM_E_NOMEM);
        CHECK(ring == NULL);
        system_end();
    }
    sllm_device_close(device);
}

static int allocations, frees;

static sllm_status free_and_hang(void *dev, void *ptr)
{
    (void)dev;
    frees++;
    free(ptr);
    return SLLM_E_TIMEOUT;
}

static void *allocated[4];

static sllm_status alloc_and_remember(void *dev, size_t bytes, void **ptr_out, sllm_error *err)
{
    sllm_status status = sllmi_device_cpu.host_alloc(dev, bytes, ptr_out, err);
    allocated[allocations++] = *ptr_out;
    return status;
}

TEST(a_runtime_that_hangs_is_waited_for_once_and_keeps_the_other_slots)
{
    sllmi_device_ops ops = sllmi_device_cpu;
    sllm_device *device;
    sllm_error err;
    ops.host_alloc = alloc_and_remember;
    ops.host_free = free_and_hang;
    CHECK_OK(sllmi_device_open_ops(&ops, 0, &device, &err), &err);
    sllm_ring *ring = make_ring(device, 4);
    CHECK_U64(allocations, 4);
    sllm_ring_destroy(ring);
    CHECK_U64(frees, 1);
    for (int i = 1; i < 4; i++) {
        free(allocated[i]);
    }
    sllm_device_close(device);
}
