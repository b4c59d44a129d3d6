/* Slices of host memory that reach a device through slots: shapes, places, few slots, deadlines. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "align.h"
#include "check.h"
#include "fake_device.h"
#include "ring.h"
#include "system.h"

#define SOURCE_BYTES (1u << 20)
#define SLOT_BYTES 8192u
#define GUARD 64
#define GUARD_BYTE 0x5A

typedef struct test_gather {
    sllm_device *device;
    sllm_ring *ring;
    sllm_gather *gather;
    unsigned char *source;
} test_gather;

static test_gather open_bench(bool fake, uint32_t slots)
{
    test_gather bench = {.source = malloc(SOURCE_BYTES)};
    sllm_error err;
    check_random random = check_random_start(77);
    CHECK(bench.source != NULL);
    for (uint32_t i = 0; i < SOURCE_BYTES; i++) {
        bench.source[i] = (unsigned char)check_random_next(&random);
    }
    if (fake) {
        bench.device = fake_open(0);
    } else {
        CHECK_OK(sllm_device_open("cpu", 0, &bench.device, &err), &err);
    }
    CHECK_OK(sllm_ring_create(bench.device, SLOT_BYTES, slots, &bench.ring, &err), &err);
    CHECK_OK(sllm_gather_open(bench.device, bench.ring, 0, &bench.gather, &err), &err);
    return bench;
}

static void check_slots(const test_gather *bench)
{
    atomic_bool stop = false;
    sllmi_slot *slots[64];
    uint32_t count = sllmi_ring_slot_count(bench->ring);
    for (uint32_t i = 0; i < count; i++) {
        slots[i] = sllmi_ring_acquire(bench->ring, 0, &stop);
        CHECK(slots[i] != NULL);
        slots[i]->users = 1;
    }
    for (uint32_t i = 0; i < count; i++) {
        sllmi_ring_release(bench->ring, slots[i]);
    }
}

static void close_bench(test_gather *bench)
{
    sllm_error err;
    CHECK_OK(sllm_gather_close(bench->gather, 60000, &err), &err);
    check_slots(bench);
    sllm_ring_destroy(bench->ring);
    sllm_device_close(bench->device);
    free(bench->source);
}

static sllm_status copy(test_gather *bench, const void *target, const void *source, uint64_t rows,
                        uint64_t row_bytes, uint64_t stride, sllm_error *err)
{
    sllm_status status;
    do { /* the same call again goes on */
        status = sllm_gather_copy(bench->gather, (uint64_t)(uintptr_t)target, source, rows,
                                  row_bytes, stride, 0, err);
    } while (status == SLLM_E_BUSY);
    return status;
}

typedef struct test_slice {
    uint64_t start, rows, row_bytes, stride, odd;
    unsigned char *memory;
} test_slice;

static test_slice random_slice(check_random *random)
{
    test_slice slice = {.rows = check_random_below(random, 40),
                        .row_bytes =
                            check_random_below(random, 1ull << check_random_below(random, 15)),
                        .odd = check_random_below(random, 130)};
    slice.stride = slice.row_bytes;
    uint64_t shape = check_random_below(random, 6);
    if (shape == 0) {
        slice.stride = 0; /* one row, repeated */
    } else if (shape > 2) {
        slice.stride += check_random_below(random, 3000);
    }
    while (slice.rows * sllmi_max(slice.row_bytes, slice.stride) > SOURCE_BYTES / 2) {
        slice.rows /= 2;
    }
    slice.start = check_random_below(random, SOURCE_BYTES / 2);
    uint64_t bytes = slice.rows * slice.row_bytes + slice.odd + 2 * GUARD;
    slice.memory = malloc(bytes);
    CHECK(slice.memory != NULL);
    memset(slice.memory, GUARD_BYTE, bytes);
    return slice;
}

static void check_slice(const test_gather *bench, test_slice *slice)
{
    const unsigned char *target = slice->memory + GUARD + slice->odd;
    uint64_t bytes = slice->rows * slice->row_bytes;
    for (uint64_t row = 0; row < slice->rows; row++) {
        CHECK(memcmp(target + row * slice->row_bytes,
                     bench->source + slice->start + row * slice->stride, slice->row_bytes) == 0);
    }
    for (uint64_t i = 0; i < GUARD; i++) {
        CHECK_U64(target[bytes + i], GUARD_BYTE);
        CHECK_U64(*(target - 1 - i), GUARD_BYTE);
    }
    free(slice->memory);
}

static void check_random_slices(bool fake, uint64_t rounds)
{
    check_random random = check_random_start(5 + fake);
    sllm_error err;
    for (uint64_t round = 0; round < rounds; round++) {
        fake_start((uint32_t)check_random_below(&random, 60));
        test_gather bench = open_bench(fake, 2 + (uint32_t)check_random_below(&random, 4));
        test_slice slices[32];
        uint64_t count = 1 + check_random_below(&random, 31);
        uint64_t bytes = 0;
        for (uint64_t i = 0; i < count; i++) {
            slices[i] = random_slice(&random);
            bytes += slices[i].rows * slices[i].row_bytes;
            CHECK_OK(copy(&bench, slices[i].memory + GUARD + slices[i].odd,
                          bench.source + slices[i].start, slices[i].rows, slices[i].row_bytes,
                          slices[i].stride, &err),
                     &err);
        }
        CHECK_OK(sllm_gather_synchronize(bench.gather, 60000, &err), &err);
        check_slots(&bench);
        for (uint64_t i = 0; i < count; i++) {
            check_slice(&bench, &slices[i]);
        }
        if (fake) {
            CHECK_U64(fake_copied_bytes(), bytes);
        }
        close_bench(&bench);
        fake_end();
    }
}

TEST(random_slices_arrive_whatever_their_shape_and_place)
{
    check_random_slices(true, check_rounds(60));
}

TEST(random_slices_arrive_on_the_cpu_backend)
{
    check_random_slices(false, check_rounds(60));
}

TEST(small_slices_share_a_slot)
{
    fake_start(0);
    test_gather bench = open_bench(true, 2);
    unsigned char target[64 * 64];
    sllm_error err;
    for (uint64_t i = 0; i < 64; i++) {
        CHECK_OK(copy(&bench, target + i * 64, bench.source + i * 100, 1, 64, 64, &err), &err);
    }
    CHECK_U64(fake_calls(FAKE_FENCE), 0); /* one slot of two, and not full yet */
    CHECK_OK(sllm_gather_synchronize(bench.gather, 60000, &err), &err);
    CHECK_U64(fake_calls(FAKE_FENCE), 1);
    for (uint64_t i = 0; i < 64; i++) {
        CHECK(memcmp(target + i * 64, bench.source + i * 100, 64) == 0);
    }
    close_bench(&bench);
    fake_end();
}

TEST(the_source_may_change_when_the_call_has_returned)
{
    fake_start(0);
    test_gather bench = open_bench(true, 2);
    unsigned char source[4096], target[4096];
    sllm_error err;
    memset(source, 1, sizeof source);
    fake_hold(true);
    CHECK_OK(copy(&bench, target, source, 1, sizeof source, sizeof source, &err), &err);
    memset(source, 2, sizeof source);
    fake_hold(false);
    CHECK_OK(sllm_gather_synchronize(bench.gather, 60000, &err), &err);
    for (size_t i = 0; i < sizeof target; i++) {
        CHECK_U64(target[i], 1);
    }
    close_bench(&bench);
    fake_end();
}

TEST(no_wait_is_longer_than_its_deadline_and_every_one_can_be_taken_up_again)
{
    fake_start(0);
    test_gather bench = open_bench(true, 2);
    static unsigned char target[5 * SLOT_BYTES];
    sllm_error err;
    uint64_t address = (uint64_t)(uintptr_t)target;
    fake_hold(true);
    for (int again = 0; again < 2; again++) {
        CHECK_STATUS(sllm_gather_copy(bench.gather, address, bench.source, 5, SLOT_BYTES,
                                      SLOT_BYTES, 20, &err),
                     &err, SLLM_E_BUSY);
    }
    CHECK_STATUS(sllm_gather_copy(bench.gather, address, bench.source + 1, 5, SLOT_BYTES,
                                  SLOT_BYTES, 20, &err),
                 &err, SLLM_E_INVALID); /* another slice */
    CHECK_TEXT(err.message, "of another slice");
    CHECK_STATUS(sllm_gather_close(bench.gather, 20, &err), &err, SLLM_E_BUSY);
    fake_hold(false);
    CHECK_OK(sllm_gather_copy(bench.gather, address, bench.source, 5, SLOT_BYTES, SLOT_BYTES, 60000,
                              &err),
             &err);
    CHECK_U64(sllm_gather_started(bench.gather), sizeof target);
    fake_hold(true);
    CHECK_STATUS(sllm_gather_synchronize(bench.gather, 20, &err), &err, SLLM_E_BUSY);
    fake_hold(false);
    CHECK_OK(sllm_gather_synchronize(bench.gather, 60000, &err), &err);
    CHECK(memcmp(target, bench.source, sizeof target) == 0);
    close_bench(&bench);
    fake_end();
}

TEST(what_is_no_slice_and_no_gather_is_refused)
{
    fake_start(0);
    test_gather bench = open_bench(true, 2);
    sllm_gather *gather;
    sllm_error err;
    char target[8];
    uint64_t at = (uint64_t)(uintptr_t)target;
    CHECK_STATUS(sllm_gather_copy(bench.gather, 0, target, 1, 1, 1, 0, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_gather_copy(bench.gather, at, NULL, 1, 1, 1, 0, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_gather_copy(bench.gather, at, target, 2, 4, 3, 0, &err), &err,
                 SLLM_E_INVALID);
    CHECK_STATUS(
        sllm_gather_copy(bench.gather, at, target, 1ull << 40, 1ull << 40, 1ull << 40, 0, &err),
        &err, SLLM_E_INVALID);
    CHECK_TEXT(err.message, "1099511627776 rows");
    CHECK_STATUS(sllm_gather_copy(NULL, at, target, 1, 1, 1, 0, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_gather_synchronize(NULL, 0, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_gather_open(NULL, bench.ring, 0, &gather, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_gather_open(bench.device, NULL, 0, &gather, &err), &err, SLLM_E_INVALID);
    CHECK_OK(sllm_gather_copy(bench.gather, at, target, 0, 1, 1, 0, &err), &err);
    CHECK_OK(sllm_gather_copy(bench.gather, at, target, 1, 0, 0, 0, &err), &err);
    CHECK_OK(sllm_gather_copy(bench.gather, 0, NULL, 0, 1, 1, 0, &err), &err); /* as torch has it */
    CHECK_OK(sllm_gather_close(NULL, 0, &err), &err);
    CHECK_U64(fake_calls(FAKE_COPY), 0);
    close_bench(&bench);
    fake_end();
}

TEST(a_ring_that_is_in_other_use_is_an_error_and_no_hang)
{
    fake_start(0);
    test_gather bench = open_bench(true, 2);
    atomic_bool stop = false;
    sllmi_slot *taken[2] = {sllmi_ring_acquire(bench.ring, 0, &stop),
                            sllmi_ring_acquire(bench.ring, 0, &stop)};
    sllm_error err;
    char target[8];
    CHECK_STATUS(sllm_gather_copy(bench.gather, (uint64_t)(uintptr_t)target, bench.source, 1, 8, 8,
                                  60000, &err),
                 &err, SLLM_E_INVALID);
    for (int i = 0; i < 2; i++) {
        taken[i]->users = 1;
        sllmi_ring_release(bench.ring, taken[i]);
    }
    close_bench(&bench);
    fake_end();
}

TEST(any_call_of_a_backend_may_fail_below_a_gather)
{
    static const fake_slot slots[] = {FAKE_QUEUE_ADOPT, FAKE_COPY, FAKE_FENCE, FAKE_WAIT,
                                      FAKE_DRAIN};
    static unsigned char target[20 * SLOT_BYTES];
    for (size_t i = 0; i < sizeof slots / sizeof slots[0]; i++) {
        for (uint64_t nth = 1;; nth++) {
            fake_start(20);
            sllm_error err;
            sllm_device *device = fake_open(0);
            sllm_ring *ring;
            sllm_gather *gather;
            CHECK_OK(sllm_ring_create(device, SLOT_BYTES, 2, &ring, &err), &err);
            test_gather bench = {.device = device, .ring = ring};
            unsigned char *source = malloc(sizeof target);
            CHECK(source != NULL);
            memset(source, (int)nth, sizeof target);
            fake_fail(slots[i], nth);
            sllm_status status = sllm_gather_open(device, ring, 0, &gather, &err);
            CHECK((status == SLLM_OK) == (gather != NULL));
            bench.gather = gather;
            if (status == SLLM_OK) {
                status = copy(&bench, target, source, 20, SLOT_BYTES, SLOT_BYTES, &err);
            }
            if (status == SLLM_OK) {
                status = sllm_gather_synchronize(gather, 60000, &err);
            }
            bool failed = fake_failed();
            CHECK_STATUS(status, &err, failed ? SLLM_E_DEVICE : SLLM_OK);
            if (status == SLLM_OK) {
                CHECK(memcmp(target, source, sizeof target) == 0);
            }
            sllm_error closing;
            CHECK_OK(sllm_gather_close(gather, 60000, &closing), &closing);
            check_slots(&bench);
            sllm_ring_destroy(ring);
            sllm_device_close(device);
            free(source);
            fake_end();
            if (!failed) {
                CHECK(nth > 1);
                break;
            }
        }
    }
}

TEST(a_gather_that_does_not_fit_leaves_nothing_behind)
{
    fake_start(0);
    sllm_device *device = fake_open(0);
    sllm_ring *ring;
    sllm_gather *gather;
    sllm_error err;
    CHECK_OK(sllm_ring_create(device, SLOT_BYTES, 2, &ring, &err), &err);
    for (uint64_t nth = 1; nth <= 2; nth++) {
        system_start();
        system_fail(SYSTEM_ALLOC, nth, nth, ENOMEM);
        CHECK_STATUS(sllm_gather_open(device, ring, 0, &gather, &err), &err, SLLM_E_NOMEM);
        CHECK(gather == NULL);
        system_end();
    }
    sllm_ring_destroy(ring);
    sllm_device_close(device);
    fake_end();
}

TEST(a_forked_child_may_not_use_a_gather)
{
    test_gather bench = open_bench(false, 2);
    char target[8];
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        sllm_error err;
        sllm_gather *gather;
        uint64_t at = (uint64_t)(uintptr_t)target;
        bool refused =
            sllm_gather_copy(bench.gather, at, bench.source, 1, 8, 8, 0, &err) == SLLM_E_FORKED &&
            sllm_gather_synchronize(bench.gather, 0, &err) == SLLM_E_FORKED &&
            sllm_gather_close(bench.gather, 0, &err) == SLLM_E_FORKED &&
            sllm_gather_open(bench.device, bench.ring, 0, &gather, &err) == SLLM_E_FORKED;
        _exit(refused ? 7 : 1);
    }
    int state = 0;
    CHECK(waitpid(child, &state, 0) == child);
    CHECK_U64(WEXITSTATUS(state), 7);
    close_bench(&bench);
}
