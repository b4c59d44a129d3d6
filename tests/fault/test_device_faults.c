/* Every call of a backend, and of the system below it, fails once during a load to two devices: one
 * clear line, every slot back in the ring, and the ring and the devices load again. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fake_device.h"
#include "loads.h"
#include "system.h"

#define CHUNK_BYTES 8192u
#define DEVICES 2

static test_load make_load(void)
{
    const uint64_t sizes[] = {60001, 30000, 0};
    test_load load = load_of_files(sizes);
    load.options.threads = 2;
    load.options.chunk_bytes = CHUNK_BYTES;
    load.options.device_count = DEVICES;
    load.options.devices = load.devices;
    load_add(&load, 0, 0, 10, 50000);
    load_add(&load, 0, 1, 20000, 40001);
    load_add(&load, 1, 1, 1, 29000);
    load_add(&load, 1, -1, 0, 30000);
    return load;
}

/* Devices and ring, or the failure that keeps them from being. */
static sllm_status open_devices(test_load *load, sllm_error *err)
{
    sllm_status status = SLLM_OK;
    load->options.devices = load->devices; /* the load may have been copied since */
    for (int32_t i = 0; status == SLLM_OK && i < DEVICES; i++) {
        status = fake_open_or_fail(i, &load->devices[i], err);
        CHECK((status == SLLM_OK) == (load->devices[i] != NULL));
    }
    if (status == SLLM_OK) {
        status =
            sllm_ring_create(load->devices[0], CHUNK_BYTES + SLLM_PAGE_BYTES, 3, &load->ring, err);
        CHECK((status == SLLM_OK) == (load->ring != NULL));
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
    CHECK((status == SLLM_OK) == (job != NULL));
    if (status != SLLM_OK) {
        return status;
    }
    (void)sllm_job_start(job, err); /* what it says, a wait says again */
    status = load_wait(job, &progress, err);
    load_close(job);
    load_check_ring(load);
    if (status == SLLM_OK) {
        load_check(load);
        CHECK_U64(progress.bytes_done, progress.bytes_total);
    }
    return status;
}

/* Open, load, and, after a failure of the load, load again with the same ring and devices. */
static sllm_status load_once(test_load *load, sllm_error *err)
{
    sllm_status status = open_devices(load, err);
    if (status == SLLM_OK) {
        status = run_job(load, err);
        if (status != SLLM_OK) {
            sllm_error again;
            CHECK_OK(run_job(load, &again), &again);
        }
    }
    close_devices(load);
    return status;
}

static void check_slot(test_load *load, fake_slot slot)
{
    for (uint64_t nth = 1;; nth++) {
        fake_start(nth % 3 == 0 ? 200 : 0);
        fake_fail(slot, nth);
        sllm_error err;
        sllm_status status = load_once(load, &err);
        bool failed = fake_failed();
        CHECK_STATUS(status, &err, failed ? SLLM_E_DEVICE : SLLM_OK);
        if (failed) {
            CHECK_U64(err.device_code, FAKE_DEVICE_CODE + slot);
            CHECK_U64(err.os_errno, 0);
            CHECK_TEXT(err.message, "fake:");
            CHECK_TEXT(err.message, fake_slot_names[slot]);
        }
        fake_end();
        if (!failed) {
            CHECK(nth > 2);
            return;
        }
    }
}

TEST(any_call_of_a_backend_may_fail)
{
    test_load load = make_load();
    for (int slot = 0; slot < FAKE_QUEUE_ADOPT; slot++) { /* that one is a gather's */
        check_slot(&load, (fake_slot)slot);
    }
    load.options.device_count = 0; /* closed already */
    load_end(&load);
}

static void check_call(test_load *load, system_call call, int error, bool may_succeed,
                       sllm_status expected)
{
    for (uint64_t nth = 1;; nth++) {
        uint32_t descriptors = open_descriptors();
        fake_start(0);
        system_start();
        system_simulate_direct();
        system_fail(call, nth, nth, error);
        sllm_error err;
        sllm_status status = load_once(load, &err);
        bool failed = system_failures() > 0;
        if (status != SLLM_OK || (failed && !may_succeed)) {
            CHECK_STATUS(status, &err, failed ? expected : SLLM_OK);
            CHECK_U64(err.os_errno, error);
        }
        system_end();
        fake_end();
        CHECK_U64(open_descriptors(), descriptors);
        if (!failed) {
            CHECK(nth > 2);
            return;
        }
    }
}

TEST(any_system_call_below_a_load_to_devices_may_fail)
{
    test_load load = make_load();
    check_call(&load, SYSTEM_PREAD, EIO, false, SLLM_E_IO);
    check_call(&load, SYSTEM_PREAD, EINVAL, true, SLLM_E_IO);
    check_call(&load, SYSTEM_OPEN, EMFILE, true, SLLM_E_IO);
    check_call(&load, SYSTEM_FSTAT, EIO, false, SLLM_E_IO);
    check_call(&load, SYSTEM_ALLOC, ENOMEM, false, SLLM_E_NOMEM);
    check_call(&load, SYSTEM_THREAD_CREATE, EAGAIN, true, SLLM_E_NOMEM);
    load.options.device_count = 0;
    load_end(&load);
}
