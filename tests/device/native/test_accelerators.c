/* Loads and gathers to devices of the emulated runtime, whose counters are the evidence. Where the
 * environment sets the rules of another release, they hold here too. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "emulator.h"
#include "os.h"
#include "ring.h"
#include "system.h"

#define MIB (1ull << 20)
#define DEVICES 2

/* The bytes that all extents on devices come to. */
static uint64_t bytes_on_devices(const test_load *load)
{
    uint64_t bytes = 0;
    for (uint64_t i = 0; i < load->extent_count; i++) {
        bytes += load->extents[i].device < 0 ? 0 : load->extents[i].bytes;
    }
    return bytes;
}

/* Runs a load to its end: every byte there, each moved once, none from where it must not. */
static void check_load(test_load *load)
{
    sllm_progress progress;
    sllm_error err;
    uint64_t moved = emulator_stat("h2d_bytes"), synchronous = emulator_stat("sync_copies");
    int device = emulator_thread_device();
    load_forget(load);
    sllm_job *job = load_start(load);
    CHECK_OK(load_wait(job, &progress, &err), &err);
    load_check(load);
    CHECK_U64(progress.bytes_done, progress.bytes_total);
    CHECK_U64(emulator_stat("h2d_bytes") - moved, bytes_on_devices(load));
    if (getenv("ACLEMU_ALIGN") == NULL) {
        CHECK_U64(emulator_stat("sync_copies"), synchronous);
    }
    load_close(job);
    load_check_ring(load);
    CHECK(emulator_thread_device() == device);
    emulator_check();
}

TEST(the_first_device_is_found_and_others_are_counted)
{
    sllm_device *device;
    sllm_error err;
    CHECK_STATUS(sllm_device_open(backend(), 7, &device, &err), &err, SLLM_E_NO_DEVICE);
    CHECK_TEXT(err.message, device_name(7));
    CHECK_TEXT(err.message, "2 found");
    const char *visible = is_cuda() ? "CUDA_VISIBLE_DEVICES" : "ASCEND_RT_VISIBLE_DEVICES";
    CHECK(setenv(visible, "4,5", 1) == 0);
    CHECK_STATUS(sllm_device_open(backend(), 2, &device, &err), &err, SLLM_E_NO_DEVICE);
    CHECK_TEXT(err.message, visible);
    CHECK_TEXT(err.message, " is 4,5");
    CHECK(unsetenv(visible) == 0);
    CHECK_OK(sllm_device_open(backend(), 0, &device, &err), &err);
    CHECK(emulator_thread_device() == -1);
    sllm_device_close(device);
    emulator_check_empty();
}

TEST(slots_are_pinned_and_start_at_pages)
{
    enum { SLOTS = 5, SLOT_BYTES = 12288 };
    sllm_device *device;
    sllm_ring *ring;
    sllm_error err;
    sllmi_slot *slots[SLOTS];
    atomic_bool stop = false;
    CHECK_OK(sllm_device_open(backend(), 0, &device, &err), &err);
    CHECK_OK(sllm_ring_create(device, SLOT_BYTES, SLOTS, &ring, &err), &err);
    CHECK(emulator_stat("pinned_bytes") >= SLOTS * SLOT_BYTES);
    for (int i = 0; i < SLOTS; i++) {
        slots[i] = sllmi_ring_acquire(ring, 0, &stop);
        CHECK_U64((uintptr_t)slots[i]->memory % SLLM_PAGE_BYTES, 0);
        memset(slots[i]->memory, i, SLOT_BYTES);
    }
    for (int i = 0; i < SLOTS; i++) {
        CHECK(slots[i]->memory[0] == i && slots[i]->memory[SLOT_BYTES - 1] == i);
        slots[i]->users = 1;
        sllmi_ring_release(ring, slots[i]);
    }
    sllm_ring_destroy(ring);
    sllm_device_close(device);
    emulator_check_empty();
}

TEST(random_extents_reach_every_device_and_the_host)
{
    const uint64_t sizes[] = {300000, 70001, 4096, 0};
    check_random random = check_random_start(21);
    for (uint64_t round = 0; round < check_rounds(8); round++) {
        test_load load = load_of_files(sizes);
        uint64_t chunk_bytes = SLLM_PAGE_BYTES * (1 + check_random_below(&random, 12));
        uint32_t devices = 1 + (uint32_t)check_random_below(&random, DEVICES);
        load_use_backend(&load, backend(), &emulator_memory, devices,
                         2 + (uint32_t)check_random_below(&random, 4), chunk_bytes);
        load_add_random(&load, &random, (int32_t)devices, round % 2 == 0);
        load.options.threads = 1 + (uint32_t)check_random_below(&random, 4);
        check_load(&load);
        check_load(&load); /* the ring serves one job after the other */
        load_end(&load);
        emulator_check_empty();
    }
}

/* Tensors of 4097 bytes, one after the other in the file: each starts at another offset modulo
 * 4096. In the slab each starts at a multiple of 512. */
TEST(a_tensor_is_right_at_each_alignment_of_its_file)
{
    enum { TENSORS = 4096, BYTES = 4097, PITCH = 4608 };
    test_file file = file_make("aligned", (uint64_t)TENSORS * BYTES + 8, 3);
    unsigned char *slab = emulator_memory.alloc(0, (uint64_t)TENSORS * PITCH);
    sllm_extent *extents = calloc(TENSORS, sizeof *extents);
    sllm_device *device;
    sllm_ring *ring;
    sllm_job *job;
    sllm_error err;
    CHECK(extents != NULL);
    for (uint64_t i = 0; i < TENSORS; i++) {
        extents[i] = (sllm_extent){.offset = 8 + i * BYTES,
                                   .bytes = BYTES,
                                   .target = (uint64_t)(uintptr_t)slab + i * PITCH};
    }
    CHECK_OK(sllm_device_open(backend(), 0, &device, &err), &err);
    CHECK_OK(sllm_ring_create(device, MIB + SLLM_PAGE_BYTES, 3, &ring, &err), &err);
    const sllm_file name = {.fd = file.fd, .path = file.path};
    const sllm_job_options options = {.size = sizeof options,
                                      .chunk_bytes = MIB,
                                      .threads = 2,
                                      .device_count = 1,
                                      .devices = &device,
                                      .ring = ring};
    uint64_t moved = emulator_stat("h2d_bytes");
    CHECK_OK(sllm_job_create(&name, 1, extents, TENSORS, &options, &job, &err), &err);
    CHECK_OK(sllm_job_start(job, &err), &err);
    sllm_progress progress;
    CHECK_OK(load_wait(job, &progress, &err), &err);
    for (uint64_t i = 0; i < TENSORS; i++) {
        file_check(file.seed, extents[i].offset, emulator_memory.look(slab + i * PITCH), BYTES);
    }
    CHECK_U64(emulator_stat("h2d_bytes") - moved, (uint64_t)TENSORS * BYTES);
    load_close(job);
    sllm_ring_destroy(ring);
    sllm_device_close(device);
    emulator_memory.free(slab);
    free(extents);
    file_end(&file);
    emulator_check_empty();
}

TEST(two_hundred_loads_leave_nothing_behind)
{
    const uint64_t sizes[] = {50000, 0};
    for (uint64_t i = 0; i < check_rounds(200); i++) {
        test_load load = load_of_files(sizes);
        load_use_backend(&load, backend(), &emulator_memory, DEVICES, 2, 8192);
        load_add(&load, 0, 0, 0, 30000);
        load_add(&load, 0, 1, 20000, 30000);
        check_load(&load);
        load_end(&load);
        emulator_check_empty();
    }
}

TEST(reads_go_on_while_copies_are_under_way)
{
    enum { SLOTS = 4, CHUNK = 65536 };
    const uint64_t sizes[] = {10 * CHUNK, 0};
    test_load load = load_of_files(sizes);
    load_use_backend(&load, backend(), &emulator_memory, 1, SLOTS, CHUNK);
    load_add(&load, 0, 0, 0, 10 * CHUNK);
    load.options.threads = 1;
    emulator_hold(true);
    uint64_t copies = emulator_stat("async_pinned"), moved = emulator_stat("h2d_bytes");
    sllm_job *job = load_start(&load);
    sllm_progress progress = {0};
    sllm_error err;
    /* No copy ends, and yet every slot is filled, and handed to the device. */
    while (progress.bytes_disk + progress.bytes_cache < SLOTS * CHUNK ||
           emulator_stat("async_pinned") - copies < SLOTS) {
        if (getenv("ACLEMU_ALIGN") != NULL && emulator_stat("h2d_bytes") > moved) {
            break; /* synchronous copies do not wait */
        }
        CHECK_STATUS(sllm_job_wait(job, 1, &progress, &err), &err, SLLM_E_BUSY);
    }
    emulator_hold(false);
    CHECK_OK(load_wait(job, &progress, &err), &err);
    load_check(&load);
    load_close(job);
    load_end(&load);
    emulator_check_empty();
}

TEST(a_device_that_stalls_is_named_and_waited_for_at_the_end)
{
    const uint64_t sizes[] = {100000, 0};
    test_load load = load_of_files(sizes);
    load_use_backend(&load, backend(), &emulator_memory, 1, 2, 8192);
    load_add(&load, 0, 0, 64, 99000);
    load.options.stall_ms = 100;
    load.extents[0].target = (load.extents[0].target + 511) / 512 * 512; /* an asynchronous copy */
    load.extents[0].bytes = 90000;
    emulator_hold(true);
    sllm_job *job = load_start(&load);
    sllm_progress progress;
    sllm_error err;
    CHECK_STATUS(load_wait(job, &progress, &err), &err, SLLM_E_TIMEOUT);
    CHECK_TEXT(err.message, device_name(0));
    for (int i = 0; i < 5; i++) { /* longer than any one wait of the copier's */
        CHECK_STATUS(sllm_job_close(job, 50, &err), &err, SLLM_E_BUSY);
    }
    CHECK_U64(emulator_stat("streams"), 1);
    emulator_hold(false);
    load_close(job);
    load_check_ring(&load);
    load_end(&load);
    emulator_check_empty();
}

TEST(a_copy_that_fails_on_the_device_fails_the_load_though_its_fence_passes)
{
    const uint64_t sizes[] = {100000, 0};
    test_load load = load_of_files(sizes);
    load_use_backend(&load, backend(), &emulator_memory, DEVICES, 3, 8192);
    load_add(&load, 0, 0, 0, 100000);
    load_add(&load, 0, 1, 0, 100000);
    for (int i = 0; i < 2; i++) { /* so that asynchronous copies take them under every rule */
        load.extents[i].target = (load.extents[i].target + 511) / 512 * 512;
        load.extents[i].bytes = 98304;
    }
    for (uint64_t nth = 1; nth < 13; nth += 3) {
        char rule[64];
        (void)snprintf(rule, sizeof rule, "async:aclrtMemcpyAsync:%d:107020", (int)nth);
        emulator_fail(rule);
        sllm_job *job = load_start(&load);
        sllm_progress progress;
        sllm_error err;
        CHECK_STATUS(load_wait(job, &progress, &err), &err, SLLM_E_DEVICE);
        CHECK_U64(err.device_code, is_cuda() ? 999 : 107020);
        CHECK_TEXT(err.message, is_cuda() ? "cudaErrorEmulated" : "ACL_ERROR_RT_TASK_TIMEOUT");
        CHECK_TEXT(err.message, is_cuda() ? "cudaStreamQuery" : "aclrtSynchronizeStream");
        load_close(job);
        load_check_ring(&load);
        emulator_fail(NULL);
    }
    load_end(&load);
    emulator_check_empty();
}

static void load_with_device_1(void *argument)
{
    CHECK(emulator()->aclrtSetDevice(1) == 0);
    check_load(argument);
}

TEST(a_thread_of_the_caller_keeps_its_device)
{
    const uint64_t sizes[] = {50000, 0};
    test_load load = load_of_files(sizes);
    load_use_backend(&load, backend(), &emulator_memory, 1, 2, 8192);
    load_add(&load, 0, 0, 0, 50000);
    on_a_thread(load_with_device_1, &load);
    load_end(&load);
    emulator_check_empty();
}

TEST(slots_that_are_not_pinned_are_refused)
{
    const uint64_t sizes[] = {8192, 0};
    test_load load = load_of_files(sizes);
    sllm_device *cpu;
    sllm_ring *pageable;
    sllm_gather *gather;
    sllm_job *job;
    sllm_error err;
    load_use_backend(&load, backend(), &emulator_memory, 1, 2, 8192);
    load_add(&load, 0, 0, 0, 8192);
    CHECK_OK(sllm_device_open("cpu", 0, &cpu, &err), &err);
    CHECK_OK(sllm_ring_create(cpu, 12288, 2, &pageable, &err), &err);
    load.options.ring = pageable;
    CHECK_STATUS(load_create(&load, &job, &err), &err, SLLM_E_INVALID);
    CHECK_TEXT(err.message, " copies from pinned memory");
    CHECK_STATUS(sllm_gather_open(load.devices[0], pageable, 0, &gather, &err), &err,
                 SLLM_E_INVALID);
    load.options.ring = load.ring;
    check_load(&load);
    sllm_ring_destroy(pageable);
    sllm_device_close(cpu);
    load_end(&load);
    emulator_check_empty();
}

TEST(the_runtime_does_not_survive_a_fork)
{
    const uint64_t sizes[] = {8192, 0};
    test_load load = load_of_files(sizes);
    sllm_error err;
    load_use_backend(&load, backend(), &emulator_memory, 1, 2, 8192);
    load_add(&load, 0, 0, 0, 8192);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        sllm_device *device;
        sllm_job *job;
        bool refused = sllm_device_open(backend(), 0, &device, &err) == SLLM_E_FORKED &&
                       load_create(&load, &job, &err) == SLLM_E_FORKED;
        sllm_ring_destroy(load.ring); /* both nothing, here */
        sllm_device_close(load.devices[0]);
        _exit(refused ? 7 : 1);
    }
    int state = 0;
    CHECK(waitpid(child, &state, 0) == child);
    CHECK_U64(WEXITSTATUS(state), 7);
    check_load(&load);
    load_end(&load);
    emulator_check_empty();
}

/* ---- gather -------------------------------------------------------------------------------- */

struct gather_case {
    sllm_device *device;
    sllm_ring *ring;
    bool own_stream;
};

/* Rows of ordinary memory to odd places of a device, in the order of the caller's stream. */
static void gather_rows(void *argument)
{
    enum { ROWS = 300, ROW_BYTES = 1000, STRIDE = 1777, SLICES = 7 };
    struct gather_case *test = argument;
    const sllmi_acl *acl = emulator();
    void *stream = NULL;
    sllm_gather *gather;
    sllm_error err;
    CHECK(acl->aclrtSetDevice(0) == 0);
    if (!test->own_stream) {
        CHECK(acl->aclrtCreateStream(&stream) == 0);
    }
    uint64_t sets = emulator_stat("set_devices"), moved = emulator_stat("h2d_bytes");
    uint64_t streams = emulator_stat("streams");
    CHECK_OK(sllm_gather_open(test->device, test->ring, (uint64_t)(uintptr_t)stream, &gather, &err),
             &err);
    CHECK_U64(emulator_stat("streams"), streams + test->own_stream);
    unsigned char *source = malloc((uint64_t)ROWS * STRIDE);
    CHECK(source != NULL);
    check_random random = check_random_start(4);
    for (uint64_t i = 0; i < (uint64_t)ROWS * STRIDE; i++) {
        source[i] = (unsigned char)check_random_next(&random);
    }
    unsigned char *targets[SLICES];
    for (int i = 0; i < SLICES; i++) {
        sets += 1; /* our own allocation's thread */
        targets[i] = emulator_memory.alloc(0, (uint64_t)ROWS * ROW_BYTES + 512);
        sllm_status status;
        do {
            status = sllm_gather_copy(gather, (uint64_t)(uintptr_t)targets[i] + (uint64_t)i * 9,
                                      source, ROWS, ROW_BYTES, STRIDE, 100, &err);
        } while (status == SLLM_E_BUSY);
        CHECK_OK(status, &err);
    }
    CHECK_OK(sllm_gather_synchronize(gather, 60000, &err), &err);
    for (int i = 0; i < SLICES; i++) {
        const unsigned char *seen = emulator_memory.look(targets[i]) + i * 9;
        for (uint64_t row = 0; row < ROWS; row++) {
            CHECK(memcmp(seen + row * ROW_BYTES, source + row * STRIDE, ROW_BYTES) == 0);
        }
    }
    CHECK_U64(emulator_stat("h2d_bytes") - moved, (uint64_t)SLICES * ROWS * ROW_BYTES);
    CHECK_OK(sllm_gather_close(gather, 60000, &err), &err);
    CHECK_U64(emulator_stat("set_devices"), sets);
    CHECK(emulator_thread_device() == 0);
    for (int i = 0; i < SLICES; i++) {
        emulator_memory.free(targets[i]);
    }
    free(source);
    if (!test->own_stream) {
        CHECK(acl->aclrtSynchronizeStreamWithTimeout(stream, 60000) == 0); /* it is alive still */
        CHECK(acl->aclrtDestroyStream(stream) == 0);
    }
}

static void gather_on_no_device(void *argument)
{
    struct gather_case *test = argument;
    sllm_gather *gather;
    sllm_error err;
    CHECK_STATUS(sllm_gather_open(test->device, test->ring, 0, &gather, &err), &err, SLLM_E_DEVICE);
    CHECK_TEXT(err.message, "ACL_ERROR_RT_CONTEXT_NULL");
}

static void gather_on_another_device(void *argument)
{
    struct gather_case *test = argument;
    sllm_gather *gather;
    sllm_error err;
    CHECK(emulator()->aclrtSetDevice(1) == 0);
    CHECK_STATUS(sllm_gather_open(test->device, test->ring, 0, &gather, &err), &err,
                 SLLM_E_INVALID);
    CHECK_TEXT(err.message, "the calling thread is on");
}

TEST(a_gather_works_on_the_callers_thread_and_stream_and_sets_no_device_there)
{
    struct gather_case test = {0};
    sllm_error err;
    CHECK_OK(sllm_device_open(backend(), 0, &test.device, &err), &err);
    CHECK_OK(sllm_ring_create(test.device, 65536, 3, &test.ring, &err), &err);
    on_a_thread(gather_rows, &test);
    test.own_stream = true;
    on_a_thread(gather_rows, &test);
    if (!is_cuda()) { /* CUDA's threads start on device 0 */
        on_a_thread(gather_on_no_device, &test);
    }
    on_a_thread(gather_on_another_device, &test);
    sllm_ring_destroy(test.ring);
    sllm_device_close(test.device);
    emulator_check_empty();
}

struct left_gather {
    struct gather_case bench;
    sllm_gather *gather;
    unsigned char *target;
};

static void leave_a_copy(void *argument)
{
    struct left_gather *left = argument;
    sllm_error err;
    unsigned char source[4096] = {1, 2, 3};
    CHECK(emulator()->aclrtSetDevice(0) == 0);
    CHECK_OK(sllm_gather_open(left->bench.device, left->bench.ring, 0, &left->gather, &err), &err);
    CHECK_OK(sllm_gather_copy(left->gather, (uint64_t)(uintptr_t)left->target, source, 1, 4096,
                              4096, 0, &err),
             &err);
}

static void end_it_here(void *argument)
{
    struct left_gather *left = argument;
    sllm_error err;
    if (is_cuda()) { /* whose threads start on device 0 */
        CHECK(emulator()->aclrtSetDevice(1) == 0);
    }
    int device = emulator_thread_device();
    CHECK(device != 0);
    for (int again = 0; again < 2; again++) {
        CHECK_STATUS(sllm_gather_close(left->gather, 20, &err), &err, SLLM_E_BUSY);
    }
    CHECK_U64(emulator_stat("streams"), 1);
    emulator_hold(false);
    CHECK_OK(sllm_gather_close(left->gather, 60000, &err), &err);
    CHECK(emulator_thread_device() == device);
}

TEST(a_gather_may_end_on_a_thread_that_is_not_on_its_device)
{
    struct left_gather left = {0};
    sllm_error err;
    CHECK_OK(sllm_device_open(backend(), 0, &left.bench.device, &err), &err);
    CHECK_OK(sllm_ring_create(left.bench.device, 65536, 2, &left.bench.ring, &err), &err);
    left.target = emulator_memory.alloc(0, 4096);
    emulator_hold(true);
    on_a_thread(leave_a_copy, &left);
    on_a_thread(end_it_here, &left);
    CHECK_U64(emulator_memory.look(left.target)[2], 3);
    emulator_memory.free(left.target);
    sllm_ring_destroy(left.bench.ring);
    sllm_device_close(left.bench.device);
    emulator_check_empty();
}

static void repeat_a_row(void *argument)
{
    enum { ROWS = 300, ROW_BYTES = 1000 };
    struct gather_case *test = argument;
    sllm_gather *gather;
    sllm_error err;
    unsigned char source[ROW_BYTES], *target = emulator_memory.alloc(0, ROWS * ROW_BYTES);
    for (int i = 0; i < ROW_BYTES; i++) {
        source[i] = (unsigned char)(i % 251);
    }
    CHECK(emulator()->aclrtSetDevice(0) == 0);
    CHECK_OK(sllm_gather_open(test->device, test->ring, 0, &gather, &err), &err);
    sllm_status status;
    do {
        status = sllm_gather_copy(gather, (uint64_t)(uintptr_t)target, source, ROWS, ROW_BYTES, 0,
                                  100, &err);
    } while (status == SLLM_E_BUSY);
    CHECK_OK(status, &err);
    CHECK_OK(sllm_gather_close(gather, 60000, &err), &err);
    for (uint64_t row = 0; row < ROWS; row++) {
        CHECK(memcmp(emulator_memory.look(target) + row * ROW_BYTES, source, ROW_BYTES) == 0);
    }
    emulator_memory.free(target);
}

TEST(a_row_with_no_stride_is_repeated)
{
    struct gather_case test = {0};
    sllm_error err;
    CHECK_OK(sllm_device_open(backend(), 0, &test.device, &err), &err);
    CHECK_OK(sllm_ring_create(test.device, 65536, 2, &test.ring, &err), &err);
    on_a_thread(repeat_a_row, &test);
    sllm_ring_destroy(test.ring);
    sllm_device_close(test.device);
    emulator_check_empty();
}

static void close_while_held(void *argument)
{
    struct gather_case *test = argument;
    sllm_gather *gather;
    sllm_error err;
    unsigned char *target = emulator_memory.alloc(0, 4096);
    unsigned char source[4096] = {1, 2, 3};
    CHECK(emulator()->aclrtSetDevice(0) == 0);
    CHECK_OK(sllm_gather_open(test->device, test->ring, 0, &gather, &err), &err);
    emulator_hold(true);
    CHECK_OK(sllm_gather_copy(gather, (uint64_t)(uintptr_t)target, source, 1, 4096, 4096, 0, &err),
             &err);
    CHECK_STATUS(sllm_gather_synchronize(gather, 20, &err), &err, SLLM_E_BUSY);
    CHECK_STATUS(sllm_gather_close(gather, 20, &err), &err, SLLM_E_BUSY);
    emulator_hold(false);
    CHECK_OK(sllm_gather_close(gather, 60000, &err), &err);
    CHECK(memcmp(emulator_memory.look(target), source, 4096) == 0);
    emulator_memory.free(target);
}

TEST(a_gather_ends_after_its_copies)
{
    struct gather_case test = {0};
    sllm_error err;
    CHECK_OK(sllm_device_open(backend(), 0, &test.device, &err), &err);
    CHECK_OK(sllm_ring_create(test.device, 65536, 2, &test.ring, &err), &err);
    on_a_thread(close_while_held, &test);
    sllm_ring_destroy(test.ring);
    sllm_device_close(test.device);
    emulator_check_empty();
}
