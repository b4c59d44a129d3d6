/* Every call of a device runtime fails once, at every place where a load or a gather makes it:
 * one clear line with code and name, nothing left behind, and the next load is right. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "acl.h"
#include "check.h"
#include "cuda_abi.h"
#include "device.h"
#include "emulator.h"
#include "system.h"

#define DEVICES 2
#define CHUNK_BYTES 4096u
#define CODE 207000

/* These come first: nothing of the runtime is loaded yet. */
TEST(a_library_that_cannot_be_loaded_or_lacks_a_name_is_a_missing_device)
{
    sllm_device *device;
    sllm_error err;
    system_start();
    system_fail(SYSTEM_DLOPEN, SYSTEM_ALWAYS, 2);
    CHECK_STATUS(sllm_device_open(backend(), 0, &device, &err), &err, SLLM_E_NO_DEVICE);
    CHECK_TEXT(err.message, is_cuda() ? "cannot load the CUDA runtime (libcudart)"
                                      : "cannot load the Ascend runtime (AscendCL)");
    system_end();
    system_start();
    system_fail(SYSTEM_DLSYM, 3, 3, 2);
    CHECK_STATUS(sllm_device_open(backend(), 0, &device, &err), &err, SLLM_E_NO_DEVICE);
    CHECK_TEXT(err.message, is_cuda() ? "has no `cudaGetDevice`" : "has no `aclrtGetDeviceCount`");
    system_end();
}

TEST(a_runtime_that_does_not_start_can_be_started_later)
{
    sllm_device *device;
    sllm_error err;
    if (is_cuda()) {
        check_skip("CUDA's runtime has no start of its own");
    }
    emulator_fail("aclInit:1:100003");
    CHECK_STATUS(sllm_device_open(backend(), 0, &device, &err), &err, SLLM_E_DEVICE);
    CHECK_U64(err.device_code, 100003);
    CHECK_TEXT(err.message, "npu: aclInit failed with 100003 (ACL_ERROR_INVALID_FILE): EZ9999");
    emulator_fail(NULL);
    CHECK_OK(sllm_device_open(backend(), 0, &device, &err), &err);
    sllm_device_close(device);
}

static test_load make_load(void)
{
    const uint64_t sizes[] = {60001, 30000, 0};
    test_load load = load_of_files(sizes);
    load.memory = &emulator_memory;
    load.options.threads = 2;
    load.options.chunk_bytes = CHUNK_BYTES;
    load.options.device_count = DEVICES;
    load_add(&load, 0, 0, 0, 50000);
    load_add(&load, 0, 1, 20000, 40001);
    load_add(&load, 1, 1, 0, 29000);
    load_add(&load, 1, -1, 0, 30000);
    return load;
}

static sllm_status open_devices(test_load *load, sllm_error *err)
{
    sllm_status status = SLLM_OK;
    load->options.devices = load->devices;
    for (int32_t i = 0; status == SLLM_OK && i < DEVICES; i++) {
        status = sllm_device_open(backend(), i, &load->devices[i], err);
    }
    if (status == SLLM_OK) {
        status =
            sllm_ring_create(load->devices[0], CHUNK_BYTES + SLLM_PAGE_BYTES, 3, &load->ring, err);
        load->options.ring = load->ring;
    }
    return status;
}

static void close_devices(test_load *load)
{
    load_check_ring(load);
    sllm_ring_destroy(load->ring);
    load->ring = NULL;
    for (int i = 0; i < DEVICES; i++) {
        sllm_device_close(load->devices[i]);
        load->devices[i] = NULL;
    }
}

static sllm_status run_job(test_load *load, sllm_error *err)
{
    sllm_job *job;
    sllm_progress progress;
    load_forget(load);
    sllm_status status = load_create(load, &job, err);
    if (status != SLLM_OK) {
        return status;
    }
    (void)sllm_job_start(job, err);
    status = load_wait(job, &progress, err);
    load_close(job);
    load_check_ring(load);
    if (status == SLLM_OK) {
        load_check(load);
    }
    return status;
}

static sllm_status load_once(test_load *load, sllm_error *err)
{
    sllm_status status = open_devices(load, err);
    if (status == SLLM_OK) {
        status = run_job(load, err);
    }
    close_devices(load);
    return status;
}

struct gather_case {
    test_load *load;
    sllm_status status;
    sllm_error err;
};

static void gather_once(void *argument)
{
    static unsigned char source[80000];
    struct gather_case *test = argument;
    test_load *load = test->load;
    sllm_gather *gather = NULL;
    const sllm_extent *extent = &load->extents[0];
    memset(source, 0x77, sizeof source);
    test->status = open_devices(load, &test->err);
    if (test->status == SLLM_OK) {
        int code = emulator()->aclrtSetDevice(0);
        CHECK(code == 0 || code == CODE);
        test->status = code == 0
                           ? sllm_gather_open(load->devices[0], load->ring, 0, &gather, &test->err)
                           : SLLM_E_CANCELLED; /* the test's own call */
    }
    if (test->status == SLLM_OK) {
        do {
            test->status = sllm_gather_copy(gather, extent->target, source, extent->bytes / 50, 50,
                                            70, 100, &test->err);
        } while (test->status == SLLM_E_BUSY);
    }
    if (test->status == SLLM_OK) {
        test->status = sllm_gather_synchronize(gather, 60000, &test->err);
    }
    sllm_error closing;
    CHECK_OK(sllm_gather_close(gather, 60000, &closing), &closing);
    if (test->status == SLLM_OK) {
        const unsigned char *seen = emulator_memory.look((const void *)(uintptr_t)extent->target);
        for (uint64_t i = 0; i < extent->bytes / 50 * 50; i++) {
            CHECK_U64(seen[i], 0x77);
        }
    }
    close_devices(load);
}

/* What cannot fail a load: ends of things, and questions with a safe answer. */
static bool is_harmless(const char *function)
{
    return strstr(function, "FreeHost") != NULL || strstr(function, "Destroy") != NULL;
}

static uint64_t failures;

static void check_function(test_load *load, const char *function, bool gather)
{
    for (uint64_t nth = 1;; nth++) {
        char rule[96];
        struct gather_case test = {.load = load};
        (void)snprintf(rule, sizeof rule, "%s:%d:%d", function, (int)nth, CODE);
        uint64_t streams = emulator_stat("streams"), events = emulator_stat("events");
        uint64_t pinned = emulator_stat("pinned_bytes");
        emulator_fail(rule);
        if (gather) {
            on_a_thread(gather_once, &test);
        } else {
            test.status = load_once(load, &test.err);
        }
        bool failed = emulator_failed();
        emulator_fail(NULL);
        if (!failed) {
            CHECK_OK(test.status, &test.err);
            return;
        }
        failures++;
        if (is_harmless(function)) {
            CHECK_OK(test.status, &test.err);
            continue;
        }
        /* Giving memory back, or closing what was synchronized before, takes no answer. */
        bool at_the_end =
            test.status == SLLM_OK &&
            (strstr(function, "SetDevice") != NULL || strstr(function, "CurrentContext") != NULL ||
             strcmp(function, "cudaGetDevice") == 0 ||
             (gather && (strstr(function, "SynchronizeStream") != NULL ||
                         strstr(function, "StreamQuery") != NULL)));
        if (test.status == SLLM_OK && !at_the_end) {
            check_failed(__FILE__, __LINE__, "call %d of %s failed, and nobody noticed", (int)nth,
                         function);
        }
        if (test.status != SLLM_E_CANCELLED && !at_the_end) {
            CHECK_STATUS(test.status, &test.err, SLLM_E_DEVICE);
            CHECK_U64(test.err.device_code, CODE);
            CHECK_TEXT(test.err.message, backend());
            CHECK_TEXT(test.err.message,
                       is_cuda() ? "failed with 207000 (cudaErrorEmulated): an emulated failure"
                                 : "failed with 207000 (ACL_ERROR_RT_FEATURE_NOT_SUPPORT): EZ9999");
            CHECK_TEXT(test.err.message, function);
        }
        emulator_check();
        CHECK_U64(emulator_stat("streams"), streams);
        CHECK_U64(emulator_stat("events"), events);
        CHECK_U64(emulator_stat("pinned_bytes"), pinned);
        sllm_error again;
        CHECK_OK(load_once(load, &again), &again);
    }
}

TEST(any_call_of_the_runtime_may_fail)
{
#define ACL_NAME(required, result, function, parameters) #function,
#define CUDA_NAME(result, function, parameters) #function,
    static const char *const of_acl[] = {SLLMI_ACL_FUNCTIONS(ACL_NAME) NULL};
    static const char *const of_cuda[] = {SLLMI_CUDA_FUNCTIONS(CUDA_NAME) NULL};
#undef ACL_NAME
#undef CUDA_NAME
    test_load load = make_load();
    for (const char *const *name = is_cuda() ? of_cuda : of_acl; *name != NULL; name++) {
        check_function(&load, *name, false);
        check_function(&load, *name, true);
    }
    emulator_check();
    CHECK(failures >= 200);
    load.options.device_count = 0; /* closed already */
    load_end(&load);
    CHECK_U64(emulator_stat("used0"), 0);
    CHECK_U64(emulator_stat("used1"), 0);
}

TEST(memory_that_cannot_be_pinned_is_an_error_of_host_memory)
{
    test_load load = make_load();
    sllm_error err;
    emulator_fail("aclrtMallocHost:2:207001");
    CHECK_STATUS(load_once(&load, &err), &err, SLLM_E_NOMEM);
    CHECK_U64(err.device_code, is_cuda() ? 2 : 207001);
    CHECK_TEXT(err.message,
               is_cuda()
                   ? "cuda:0: cudaHostAlloc failed with 2 (cudaErrorMemoryAllocation)"
                   : "npu:0: aclrtMallocHost failed with 207001 (ACL_ERROR_RT_MEMORY_ALLOCATION)");
    emulator_fail(NULL);
    load.options.device_count = 0;
    load_end(&load);
}

struct held_gather {
    sllm_device *device;
    sllm_ring *ring;
    const char *rule;
};

static void close_without_fences(void *argument)
{
    struct held_gather *test = argument;
    sllm_gather *gather;
    sllm_error err;
    unsigned char *target = emulator_memory.alloc(0, 4096 + 512);
    unsigned char *place = (unsigned char *)(((uintptr_t)target + 511) / 512 * 512);
    unsigned char source[4096] = {1, 2, 3};
    CHECK(emulator()->aclrtSetDevice(0) == 0);
    CHECK_OK(sllm_gather_open(test->device, test->ring, 0, &gather, &err), &err);
    emulator_hold(true);
    emulator_fail(test->rule);
    CHECK_OK(sllm_gather_copy(gather, (uint64_t)(uintptr_t)place, source, 1, 4096, 4096, 0, &err),
             &err);
    for (int again = 0; again < 2; again++) {
        CHECK_STATUS(sllm_gather_close(gather, 20, &err), &err, SLLM_E_BUSY);
    }
    CHECK(emulator_failed());
    emulator_hold(false);
    CHECK_OK(sllm_gather_close(gather, 60000, &err), &err);
    emulator_fail(NULL);
    CHECK(memcmp(emulator_memory.look(place), source, 4096) == 0);
    emulator_memory.free(target);
}

TEST(a_fence_that_cannot_be_had_is_no_end_of_the_copies)
{
    static const char *const rules[] = {"aclrtCreateEventExWithFlag:0:207007",
                                        "aclrtRecordEvent:0:207007"};
    sllm_error err;
    uint64_t streams = emulator_stat("streams"), pinned = emulator_stat("pinned_bytes");
    for (int i = 0; i < 2; i++) {
        struct held_gather test = {.rule = rules[i]};
        CHECK_OK(sllm_device_open(backend(), 0, &test.device, &err), &err);
        CHECK_OK(sllm_ring_create(test.device, 65536, 2, &test.ring, &err), &err);
        on_a_thread(close_without_fences, &test);
        sllm_ring_destroy(test.ring);
        sllm_device_close(test.device);
        emulator_check();
        CHECK_U64(emulator_stat("streams"), streams);
        CHECK_U64(emulator_stat("pinned_bytes"), pinned);
    }
}

TEST(a_job_whose_fences_fail_keeps_its_slots_until_the_copies_are_done)
{
    const uint64_t sizes[] = {8192, 0};
    test_load load = load_of_files(sizes);
    load_use_backend(&load, backend(), &emulator_memory, 1, 2, 8192);
    load_add(&load, 0, 0, 0, 8192);
    load.extents[0].target = (load.extents[0].target + 511) / 512 * 512;
    load.extents[0].bytes = 4096;
    emulator_hold(true);
    emulator_fail("aclrtCreateEventExWithFlag:0:207007");
    sllm_job *job = load_start(&load);
    sllm_progress progress;
    sllm_error err;
    CHECK_STATUS(load_wait(job, &progress, &err), &err, SLLM_E_DEVICE);
    CHECK_STATUS(sllm_job_close(job, 100, &err), &err, SLLM_E_BUSY);
    emulator_hold(false);
    load_close(job);
    emulator_fail(NULL);
    load_check_ring(&load);
    load_end(&load);
    emulator_check();
}

TEST(a_device_s_own_error_is_for_good_and_a_wait_s_end_is_not)
{
    static const int for_good[] = {507000, 507015, 507053, 507899, 507901};
    static const int passing[] = {0, 107020, 207001, 507046, 507047, 507910};
    sllm_error err;
    if (is_cuda()) {
        check_skip("CUDA's runtime says so itself, at every call");
    }
    CHECK_OK(sllmi_acl_load(&err), &err);
    for (int i = 0; i < 5; i++) { /* devices that are not there */
        CHECK_STATUS(sllmi_acl_status(10 + i, "aclrtFree", for_good[i], &err), &err, SLLM_E_DEVICE);
        CHECK_TEXT(err.message, "this process cannot use the device any more");
        CHECK_STATUS(sllmi_acl_usable(10 + i, &err), &err, SLLM_E_DEVICE);
    }
    for (int i = 0; i < 6; i++) {
        CHECK((sllmi_acl_status(20, "aclrtFree", passing[i], &err) == SLLM_OK) == (i == 0));
        CHECK_OK(sllmi_acl_usable(20, &err), &err);
    }
}

/* The last one: it spoils device 1 for this process. */
struct spoilt_device {
    sllm_device *device;
    sllm_ring *ring;
};

static void check_refused(sllm_status status, const sllm_error *err)
{
    CHECK_STATUS(status, err, SLLM_E_DEVICE);
    CHECK_U64(err->device_code, 507899);
    CHECK_TEXT(err->message, "npu:1 failed with 507899 before");
}

static void gather_on_a_spoilt_device(void *argument)
{
    const struct spoilt_device *spoilt = argument;
    sllm_gather *gather;
    sllm_error err;
    CHECK(emulator()->aclrtSetDevice(1) == 0);
    check_refused(sllm_gather_open(spoilt->device, spoilt->ring, 0, &gather, &err), &err);
}

/* What was opened before is of no more use than what is opened later. */
static void check_spoilt(struct spoilt_device *spoilt)
{
    sllm_ring *ring;
    sllm_error err;
    check_refused(sllm_ring_create(spoilt->device, 8192, 2, &ring, &err), &err);
    on_a_thread(gather_on_a_spoilt_device, spoilt);
    check_refused(spoilt->device->ops->bind_thread(spoilt->device->dev, &err), &err);
    sllm_ring_destroy(spoilt->ring);
    sllm_device_close(spoilt->device);
}

TEST(a_device_that_failed_for_good_is_not_used_again)
{
    struct spoilt_device spoilt;
    sllm_device *device;
    sllm_error err;
    if (is_cuda()) {
        check_skip("CUDA's runtime says so itself, at every call");
    }
    test_load load = make_load();
    CHECK_OK(sllm_device_open(backend(), 1, &spoilt.device, &err), &err);
    CHECK_OK(sllm_ring_create(spoilt.device, 8192, 2, &spoilt.ring, &err), &err);
    emulator_fail("aclrtSetDevice:4:507899");
    for (int i = 0; i < 8 && !emulator_failed(); i++) {
        sllm_status status = sllm_device_open(backend(), 1, &device, &err);
        if (status == SLLM_OK) {
            sllm_device_close(device);
        } else {
            CHECK_STATUS(status, &err, SLLM_E_DEVICE);
            CHECK_TEXT(err.message, "507899 (ACL_ERROR_RT_DRV_INTERNAL_ERROR)");
            CHECK_TEXT(err.message, "this process cannot use the device any more");
        }
    }
    CHECK(emulator_failed());
    emulator_fail(NULL);
    CHECK_STATUS(sllm_device_open(backend(), 1, &device, &err), &err, SLLM_E_DEVICE);
    CHECK_U64(err.device_code, 507899);
    CHECK_TEXT(err.message, "npu:1 failed with 507899 before");
    check_spoilt(&spoilt);
    CHECK_OK(sllm_device_open(backend(), 0, &device, &err), &err);
    sllm_device_close(device);
    load.options.device_count = 0;
    load_end(&load);
}
