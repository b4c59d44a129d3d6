/* Loads into host memory: bytes, counts, options and misuse. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "loads.h"
#include "system.h"

#define PAGE SLLM_PAGE_BYTES
#define MIB (1ull << 20)

static void check_whole_load(test_load *load)
{
    sllm_progress progress;
    sllm_error err;
    load_forget(load);
    sllm_job *job = load_start(load);
    CHECK_OK(load_wait(job, &progress, &err), &err);
    load_check(load);
    CHECK_U64(progress.bytes_done, progress.bytes_total);
    CHECK_U64(progress.chunks_done, progress.chunks_total);
    CHECK_U64(progress.bytes_disk + progress.bytes_cache, progress.bytes_total);
    uint8_t *done = malloc(progress.chunks_total + 1);
    CHECK_OK(sllm_job_chunks_done(job, 0, progress.chunks_total, done, &err), &err);
    for (uint32_t i = 0; i < progress.chunks_total; i++) {
        CHECK_U64(done[i], 1);
    }
    free(done);
    /* It stays done. */
    CHECK_OK(sllm_job_wait(job, 0, NULL, &err), &err);
    load_close(job);
}

TEST(several_files_are_loaded_at_every_chunk_size_and_thread_count)
{
    const uint64_t sizes[] = {3 * MIB + 5, 1, 4096, 700001, 0};
    static const uint64_t chunks[] = {0, 4096, 12288, 65536, 1 << 20};
    static const uint32_t threads[] = {0, 1, 3, 64};
    test_load load = load_of_files(sizes);
    for (uint32_t i = 0; i < 4; i++) {
        load_add(&load, i, -1, 0, sizes[i]);
    }
    for (size_t c = 0; c < sizeof chunks / sizeof chunks[0]; c++) {
        for (size_t t = 0; t < sizeof threads / sizeof threads[0]; t++) {
            load.options.chunk_bytes = chunks[c];
            load.options.threads = threads[t];
            load.options.flags = (uint32_t)(c + t) % 4;
            check_whole_load(&load);
        }
    }
    load_end(&load);
}

TEST(random_extents_arrive_whatever_the_options)
{
    const uint64_t sizes[] = {400000, 123457, 90000, 0};
    check_random random = check_random_start(0);
    for (uint64_t round = 0; round < check_rounds(30); round++) {
        test_load load = load_of_files(sizes);
        load_add_random(&load, &random, 0, true);
        load.options.chunk_bytes = PAGE * (1 + check_random_below(&random, 30));
        load.options.threads = 1 + (uint32_t)check_random_below(&random, 8);
        load.options.flags = (uint32_t)check_random_below(&random, 4);
        system_start();
        if (check_random_below(&random, 2) == 0) {
            system_simulate_direct();
        }
        check_whole_load(&load);
        system_end();
        load_end(&load);
    }
}

TEST(neighbours_in_one_memory_may_share_a_page)
{
    /* Tensors of one shard, each an extent, in the memory of the whole shard. */
    const uint64_t sizes[] = {300000, 0};
    test_load load = load_of_files(sizes);
    load_add(&load, 0, -1, 0, 300000);
    uint64_t base = load.extents[0].target;
    sllm_extent parts[40];
    uint64_t count = 0;
    for (uint64_t at = 0; at < 300000; count++) {
        uint64_t bytes = count == 39 ? 300000 - at : 7501;
        parts[count] =
            (sllm_extent){.device = -1, .offset = at, .bytes = bytes, .target = base + at};
        at += bytes;
    }
    sllm_file file = {.fd = load.files[0].fd, .path = load.files[0].path};
    sllm_job_options options = {.size = sizeof options, .threads = 1};
    sllm_job *job;
    sllm_progress progress;
    sllm_error err;
    system_start();
    system_simulate_direct();
    CHECK_OK(sllm_job_create(&file, 1, parts, count, &options, &job, &err), &err);
    CHECK_OK(sllm_job_start(job, &err), &err);
    CHECK_OK(load_wait(job, &progress, &err), &err);
    load_check(&load);
    load_close(job);
    system_end();
    load_end(&load);
}

TEST(a_load_of_nothing_is_done_at_once)
{
    sllm_job *job;
    sllm_progress progress;
    sllm_error err;
    CHECK_OK(sllm_job_create(NULL, 0, NULL, 0, NULL, &job, &err), &err);
    CHECK_OK(sllm_job_start(job, &err), &err);
    CHECK_OK(sllm_job_wait(job, 0, &progress, &err), &err);
    CHECK_U64(progress.bytes_total + progress.bytes_done + progress.chunks_total, 0);
    uint8_t done;
    CHECK_OK(sllm_job_chunks_done(job, 0, 0, &done, &err), &err);
    load_close(job);
}

TEST(options_that_contradict_the_contract_are_refused)
{
    const uint64_t sizes[] = {100000, 0};
    test_load load = load_of_files(sizes);
    load_add(&load, 0, -1, 0, 100000);
    sllm_job *job = NULL;
    sllm_error err;
    const sllm_job_options good = load.options;
    sllm_job_options bad[7];
    for (int i = 0; i < 7; i++) {
        bad[i] = good;
    }
    bad[0].size = 8;
    bad[1].chunk_bytes = 4097;
    bad[2].chunk_bytes = 1ull << 41;
    bad[3].threads = 65;
    bad[4].device_count = 65;
    bad[5].device_count = 1;
    bad[6].size = 0;
    for (int i = 0; i < 7; i++) {
        load.options = bad[i];
        CHECK_STATUS(load_create(&load, &job, &err), &err, SLLM_E_INVALID);
        CHECK(job == NULL);
    }
    load.options = good;
    CHECK_STATUS(sllm_job_create(NULL, 1, NULL, 0, NULL, &job, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_job_create(NULL, 0, NULL, 1, NULL, &job, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_job_create(NULL, 0, NULL, 0, NULL, NULL, &err), &err, SLLM_E_INVALID);
    load_end(&load);
}

TEST(extents_that_are_none_are_refused_by_number)
{
    const uint64_t sizes[] = {100000, 0};
    test_load load = load_of_files(sizes);
    load_add(&load, 0, -1, 0, 100000);
    load_add(&load, 0, -1, 0, 100000);
    const sllm_extent good = load.extents[1];
    sllm_extent bad[7];
    for (int i = 0; i < 7; i++) {
        bad[i] = good;
    }
    bad[0].file = 1;
    bad[1].bytes = 0;
    bad[2].device = 0;
    bad[3].device = -2;
    bad[4].offset = UINT64_MAX - 50000; /* the sum wraps */
    bad[5].bytes = UINT64_MAX;
    bad[6].target += 1;
    sllm_job *job = NULL;
    sllm_error err;
    for (int i = 0; i < 7; i++) {
        load.extents[1] = bad[i];
        CHECK_STATUS(load_create(&load, &job, &err), &err, SLLM_E_INVALID);
        CHECK_TEXT(err.message, "extent 1");
    }
    load.extents[1] = good;
    load.extents[1].bytes += 1;
    CHECK_STATUS(load_create(&load, &job, &err), &err, SLLM_E_TRUNCATED);
    CHECK_TEXT(err.message, load.files[0].path);
    CHECK_TEXT(err.message, "ends at byte 100000, before byte 100001");
    CHECK(job == NULL);
    load.extents[1] = good;
    load_end(&load);
}

TEST(a_file_without_descriptor_or_name_is_refused)
{
    sllm_job *job = NULL;
    sllm_error err;
    sllm_file file = {.fd = -1, .path = "gone"};
    CHECK_STATUS(sllm_job_create(&file, 1, NULL, 0, NULL, &job, &err), &err, SLLM_E_IO);
    CHECK_TEXT(err.message, "gone");
    file = (sllm_file){.fd = 0, .path = NULL};
    CHECK_STATUS(sllm_job_create(&file, 1, NULL, 0, NULL, &job, &err), &err, SLLM_E_INVALID);
    CHECK(job == NULL);
}

TEST(a_job_runs_once_and_is_waited_for_after_its_start)
{
    const uint64_t sizes[] = {50000, 0};
    test_load load = load_of_files(sizes);
    load_add(&load, 0, -1, 0, 50000);
    sllm_job *job;
    sllm_progress progress;
    sllm_error err;
    CHECK_OK(load_create(&load, &job, &err), &err);
    CHECK_STATUS(sllm_job_wait(job, 0, &progress, &err), &err, SLLM_E_INVALID);
    CHECK_OK(sllm_job_start(job, &err), &err);
    CHECK_STATUS(sllm_job_start(job, &err), &err, SLLM_E_INVALID);
    CHECK_OK(load_wait(job, &progress, &err), &err);
    CHECK_STATUS(sllm_job_start(job, &err), &err, SLLM_E_INVALID);
    load_close(job);
    CHECK_OK(load_create(&load, &job, &err), &err); /* one that never starts */
    load_close(job);
    CHECK_STATUS(sllm_job_start(NULL, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_job_wait(NULL, 0, &progress, &err), &err, SLLM_E_INVALID);
    CHECK_OK(sllm_job_close(NULL, 0, &err), &err);
    sllm_job_cancel(NULL);
    load_end(&load);
}

TEST(chunks_that_are_not_there_are_refused)
{
    const uint64_t sizes[] = {50000, 0};
    test_load load = load_of_files(sizes);
    load.options.chunk_bytes = PAGE;
    load_add(&load, 0, -1, 0, 50000);
    sllm_job *job = load_start(&load);
    sllm_error err;
    uint8_t done[32];
    CHECK_STATUS(sllm_job_chunks_done(job, 0, 14, done, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_job_chunks_done(job, 14, 0, done, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_job_chunks_done(job, UINT32_MAX, 2, done, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_job_chunks_done(job, 0, 1, NULL, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_job_chunks_done(NULL, 0, 1, done, &err), &err, SLLM_E_INVALID);
    CHECK_OK(sllm_job_chunks_done(job, 13, 0, done, &err), &err);
    CHECK_OK(sllm_job_chunks_done(job, 0, 13, done, &err), &err);
    load_close(job);
    load_end(&load);
}

TEST(fewer_threads_than_asked_for_load_as_well)
{
    const uint64_t sizes[] = {400000, 0};
    test_load load = load_of_files(sizes);
    load.options.chunk_bytes = PAGE;
    load.options.threads = 8;
    load_add(&load, 0, -1, 0, 400000);
    for (uint64_t nth = 2; nth <= 8; nth++) {
        system_start();
        system_fail(SYSTEM_THREAD_CREATE, nth, UINT64_MAX, EAGAIN);
        check_whole_load(&load);
        system_end();
    }
    system_start();
    system_fail(SYSTEM_THREAD_CREATE, SYSTEM_ALWAYS, EAGAIN);
    sllm_job *job;
    sllm_error err;
    sllm_progress progress;
    CHECK_OK(load_create(&load, &job, &err), &err);
    CHECK_STATUS(sllm_job_start(job, &err), &err, SLLM_E_NOMEM);
    CHECK_U64(err.os_errno, EAGAIN);
    CHECK_STATUS(load_wait(job, &progress, &err), &err, SLLM_E_NOMEM);
    load_close(job);
    system_end();
    load_end(&load);
}

/* As a program with large thread-local arrays has it: they are taken from each thread's stack. */
static _Thread_local volatile char large_storage[3 << 20];

TEST(threads_start_in_a_program_with_much_thread_local_storage)
{
    const uint64_t sizes[] = {100000, 0};
    large_storage[0] = 1;
    test_load load = load_of_files(sizes);
    load_add(&load, 0, -1, 0, 100000);
    check_whole_load(&load);
    load_end(&load);
}

TEST(descriptors_of_a_job_are_closed_with_it)
{
    const uint64_t sizes[] = {40000, 40000, 40000, 0};
    test_load load = load_of_files(sizes);
    for (uint32_t i = 0; i < 3; i++) {
        load_add(&load, i, -1, 0, 40000);
    }
    uint32_t before = open_descriptors();
    for (int i = 0; i < 20; i++) {
        check_whole_load(&load);
    }
    CHECK_U64(open_descriptors(), before);
    load_end(&load);
}
