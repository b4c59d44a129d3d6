/* Loads to devices through the ring: late copies in any order, few slots, shared bytes. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fake_device.h"
#include "loads.h"
#include "plan.h"
#include "system.h"

#define PAGE SLLM_PAGE_BYTES

/* What one read of everything wanted comes to, gaps that are read along included. */
static uint64_t bytes_to_read(const test_load *load)
{
    sllmi_plan plan;
    sllm_error err;
    CHECK_OK(
        sllmi_plan_build(load->extents, load->extent_count, load->options.chunk_bytes, &plan, &err),
        &err);
    uint64_t bytes = 0;
    for (uint64_t i = 0; i < plan.chunk_count; i++) {
        bool wanted = plan.chunks[i].host || sllmi_plan_devices(&plan, &plan.chunks[i]) != 0;
        bytes += wanted ? plan.chunks[i].bytes : 0;
    }
    sllmi_plan_free(&plan);
    return bytes;
}

static void check_load(test_load *load)
{
    sllm_progress progress;
    sllm_error err;
    load_forget(load);
    sllm_job *job = load_start(load);
    CHECK_OK(load_wait(job, &progress, &err), &err);
    load_check(load);
    CHECK_U64(progress.bytes_done, progress.bytes_total);
    CHECK_U64(progress.chunks_done, progress.chunks_total);
    CHECK_U64(progress.bytes_disk + progress.bytes_cache, bytes_to_read(load));
    load_close(job);
    load_check_ring(load);
}

static void check_random_loads(bool fake, uint64_t rounds)
{
    static const uint64_t sizes[] = {300000, 70001, 4096, 0};
    check_random random = check_random_start(fake);
    for (uint64_t round = 0; round < rounds; round++) {
        test_load load = load_of_files(sizes);
        uint32_t devices = 1 + (uint32_t)check_random_below(&random, LOAD_DEVICES);
        uint64_t chunk_bytes = PAGE * (1 + check_random_below(&random, 12));
        fake_start((uint32_t)check_random_below(&random, 60));
        load_use_devices(&load, devices, fake, 2 + (uint32_t)check_random_below(&random, 4),
                         chunk_bytes);
        load_add_random(&load, &random, (int32_t)devices, check_random_below(&random, 2) == 0);
        load.options.threads = 1 + (uint32_t)check_random_below(&random, 6);
        load.options.flags = (uint32_t)check_random_below(&random, 4);
        system_start();
        if (check_random_below(&random, 2) == 0) {
            system_simulate_direct();
        }
        check_load(&load);
        check_load(&load); /* the ring serves one job after the other */
        system_end();
        load_end(&load);
        fake_end();
    }
}

TEST(random_extents_reach_devices_whose_copies_are_late_and_out_of_order)
{
    check_random_loads(true, check_rounds(40));
}

TEST(random_extents_reach_the_cpu_backend)
{
    check_random_loads(false, check_rounds(40));
}

TEST(bytes_that_several_devices_want_are_read_once)
{
    const uint64_t sizes[] = {400000, 0};
    test_load load = load_of_files(sizes);
    fake_start(20);
    load_use_devices(&load, 4, true, 2, 16384);
    for (int32_t device = 0; device < 4; device++) {
        load_add(&load, 0, device, 1234, 300000);
    }
    CHECK_U64(bytes_to_read(&load), 300000);
    check_load(&load);
    CHECK_U64(fake_copied_bytes(), 4 * 300000);
    load_end(&load);
    fake_end();
}

TEST(neighbours_in_file_and_device_are_copied_as_one)
{
    const uint64_t sizes[] = {65536, 0};
    test_load load = load_of_files(sizes);
    fake_start(0);
    load_use_devices(&load, 1, true, 2, 65536);
    load_add(&load, 0, 0, 0, 65536);
    const sllm_extent whole = load.extents[0];
    for (uint64_t i = 0; i < 16; i++) { /* sixteen tensors in one slab */
        load.extents[i] = (sllm_extent){
            .device = 0, .offset = i * 4096, .bytes = 4096, .target = whole.target + i * 4096};
    }
    load.extent_count = 16;
    sllm_job *job = load_start(&load);
    sllm_progress progress;
    sllm_error err;
    CHECK_OK(load_wait(job, &progress, &err), &err);
    CHECK_U64(fake_calls(FAKE_COPY), 1);
    load_close(job);
    load.extents[0] = whole;
    load.extent_count = 1;
    load_check(&load);
    load_end(&load);
    fake_end();
}

TEST(a_load_of_nothing_to_devices_ends)
{
    const uint64_t sizes[] = {4096, 0};
    test_load load = load_of_files(sizes);
    fake_start(0);
    load_use_devices(&load, 3, true, 2, PAGE);
    check_load(&load);
    CHECK_U64(fake_calls(FAKE_COPY), 0);
    load_end(&load);
    fake_end();
}

TEST(a_device_that_wants_nothing_does_not_hold_up_the_others)
{
    const uint64_t sizes[] = {300000, 0};
    test_load load = load_of_files(sizes);
    fake_start(10);
    load_use_devices(&load, 3, true, 2, PAGE);
    load_add(&load, 0, 1, 5, 250000);
    check_load(&load);
    load_end(&load);
    fake_end();
}

TEST(slots_too_small_for_a_chunk_and_devices_that_are_none_are_refused)
{
    const uint64_t sizes[] = {4096, 0};
    test_load load = load_of_files(sizes);
    fake_start(0);
    load_use_devices(&load, 2, true, 2, 8192);
    load_add(&load, 0, 1, 0, 4096);
    sllm_job *job;
    sllm_error err;
    load.options.chunk_bytes = 12288;
    CHECK_STATUS(load_create(&load, &job, &err), &err, SLLM_E_INVALID);
    CHECK_TEXT(err.message, "12288");
    load.options.chunk_bytes = 0; /* the default is larger still */
    CHECK_STATUS(load_create(&load, &job, &err), &err, SLLM_E_INVALID);
    load.options.chunk_bytes = 8192;
    sllm_device *kept = load.devices[1];
    load.devices[1] = NULL;
    CHECK_STATUS(load_create(&load, &job, &err), &err, SLLM_E_INVALID);
    load.devices[1] = kept;
    load.options.ring = NULL;
    CHECK_STATUS(load_create(&load, &job, &err), &err, SLLM_E_INVALID);
    load.options.ring = load.ring;
    load.extents[0].device = 2;
    CHECK_STATUS(load_create(&load, &job, &err), &err, SLLM_E_INVALID);
    load.extents[0].device = 1;
    CHECK(job == NULL);
    check_load(&load);
    load_end(&load);
    fake_end();
}

TEST(a_load_to_devices_cancelled_at_any_moment_gives_every_slot_back)
{
    const uint64_t sizes[] = {500000, 0};
    test_load load = load_of_files(sizes);
    fake_start(30);
    load_use_devices(&load, 3, true, 3, 8192);
    for (int32_t device = 0; device < 3; device++) {
        load_add(&load, 0, device, 100u * (uint64_t)device, 490000);
    }
    check_random random = check_random_start(9);
    for (uint64_t round = 0; round < check_rounds(40); round++) {
        load_forget(&load);
        sllm_job *job = load_start(&load);
        sllm_progress progress = {0};
        sllm_error err;
        uint32_t enough = (uint32_t)check_random_below(&random, 70);
        sllm_status status = SLLM_E_BUSY;
        while (status == SLLM_E_BUSY && progress.chunks_done < enough) {
            status = sllm_job_wait(job, 0, &progress, &err);
        }
        sllm_job_cancel(job);
        status = load_wait(job, &progress, &err);
        CHECK(status == SLLM_OK || status == SLLM_E_CANCELLED);
        load_close(job);
        load_check_ring(&load);
    }
    check_load(&load);
    load_end(&load);
    fake_end();
}

TEST(a_file_that_cannot_be_read_ends_a_load_to_devices_by_name)
{
    const uint64_t sizes[] = {500000, 0};
    test_load load = load_of_files(sizes);
    fake_start(30);
    load_use_devices(&load, 2, true, 2, 8192);
    load_add(&load, 0, 0, 0, 500000);
    load_add(&load, 0, 1, 0, 500000);
    system_start();
    system_fail(SYSTEM_PREAD, 20, 20, 5);
    sllm_job *job = load_start(&load);
    sllm_progress progress;
    sllm_error err;
    CHECK_STATUS(load_wait(job, &progress, &err), &err, SLLM_E_IO);
    CHECK_TEXT(err.message, load.files[0].path);
    load_close(job);
    system_end();
    load_end(&load);
    fake_end();
}
