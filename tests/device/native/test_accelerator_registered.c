/* Files in memory that a device copies from where they are mapped, past the slots of the ring. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "emulator.h"
#include "system.h"

#define DEVICES 2
#define CHUNK_BYTES 8192u

/* What a store hands out: the same bytes in a memory file under the same descriptor. */
static void move_to_memory(test_file *file)
{
    int memory = memfd_create("segment", MFD_CLOEXEC);
    char *bytes = malloc(file->bytes);
    CHECK(memory >= 0 && bytes != NULL);
    CHECK(pread(file->fd, bytes, file->bytes, 0) == (ssize_t)file->bytes);
    CHECK(write(memory, bytes, file->bytes) == (ssize_t)file->bytes);
    CHECK(dup2(memory, file->fd) == file->fd);
    free(bytes);
    close(memory);
}

static void make_load(test_load *load)
{
    const uint64_t sizes[] = {200001, 70000, 0};
    *load = load_of_files(sizes);
    move_to_memory(&load->files[0]);
    move_to_memory(&load->files[1]);
    load_use_backend(load, backend(), &emulator_memory, DEVICES, 3, CHUNK_BYTES);
    load_add(load, 0, 0, 1, 150000);
    load_add(load, 0, 1, 90001, 110000);
    load_add(load, 1, 1, 0, 70000);
    load_add(load, 1, -1, 0, 4096);
}

static sllm_registered *registered_file(test_load *load, int number)
{
    sllm_registered *registered;
    sllm_error err;
    CHECK_OK(sllm_registered_create(load->devices[0], load->files[number].fd, &registered, &err),
             &err);
    return registered;
}

static void run_load(test_load *load)
{
    sllm_progress progress;
    sllm_error err;
    load_forget(load);
    sllm_job *job = load_start(load);
    CHECK_OK(load_wait(job, &progress, &err), &err);
    load_check(load);
    CHECK_U64(progress.bytes_done, progress.bytes_total);
    CHECK(progress.bytes_disk == 0 && progress.bytes_cache >= 70000 + 200000);
    load_close(job);
    load_check_ring(load);
    emulator_check();
}

static void only_for_cuda(void)
{
    if (!is_cuda()) {
        check_skip("npu registers no memory");
    }
}

TEST(a_backend_that_cannot_says_so)
{
    if (is_cuda()) {
        check_skip("cuda can");
    }
    test_load load;
    make_load(&load);
    sllm_registered *registered;
    sllm_error err;
    CHECK_STATUS(sllm_registered_create(load.devices[0], load.files[0].fd, &registered, &err), &err,
                 SLLM_E_UNSUPPORTED);
    CHECK(registered == NULL);
    load_end(&load);
}

TEST(a_registered_file_is_copied_from_where_it_is_and_never_read)
{
    only_for_cuda();
    test_load load;
    make_load(&load);
    load.registered[0] = registered_file(&load, 0);
    for (int round = 0; round < 3; round++) { /* one, then both, then both again */
        system_start();
        run_load(&load);
        uint64_t reads = system_calls(SYSTEM_PREAD);
        system_end();
        /* The host's 4096 bytes are, and the second file as long as it is not registered. */
        CHECK(round == 0 ? reads > 1 : reads == 1);
        if (round == 0) {
            load.registered[1] = registered_file(&load, 1);
        }
    }
    sllm_registered_destroy(load.registered[0]);
    sllm_registered_destroy(load.registered[1]);
    CHECK_U64(emulator_stat("registrations"), 2);
    load_end(&load);
    emulator_check_empty();
}

TEST(a_job_keeps_what_its_caller_has_given_back)
{
    only_for_cuda();
    test_load load;
    make_load(&load);
    sllm_progress progress;
    sllm_error err;
    load.registered[0] = registered_file(&load, 0);
    load_forget(&load);
    emulator_hold(true);
    sllm_job *job = load_start(&load);
    sllm_registered_destroy(load.registered[0]);
    CHECK(emulator_stat("registered_bytes") > 0);
    emulator_hold(false);
    CHECK_OK(load_wait(job, &progress, &err), &err);
    load_check(&load);
    load_close(job);
    load_end(&load);
    emulator_check_empty();
}

TEST(another_file_is_refused)
{
    only_for_cuda();
    test_load load;
    make_load(&load);
    sllm_job *job;
    sllm_error err;
    load.registered[1] = registered_file(&load, 0);
    CHECK_STATUS(load_create(&load, &job, &err), &err, SLLM_E_INVALID);
    CHECK_TEXT(err.message, "is another file");
    sllm_registered_destroy(load.registered[1]);
    load_end(&load);
    emulator_check_empty();
}

TEST(an_empty_file_and_a_wrong_descriptor_are_refused)
{
    only_for_cuda();
    test_load load;
    make_load(&load);
    sllm_registered *registered;
    sllm_error err;
    int empty = memfd_create("empty", MFD_CLOEXEC);
    CHECK_STATUS(sllm_registered_create(load.devices[0], empty, &registered, &err), &err,
                 SLLM_E_INVALID);
    close(empty);
    CHECK_STATUS(sllm_registered_create(load.devices[0], -1, &registered, &err), &err, SLLM_E_IO);
    load_end(&load);
    emulator_check_empty();
}

TEST(a_runtime_that_refuses_is_an_error_and_leaves_no_mapping)
{
    only_for_cuda();
    test_load load;
    make_load(&load);
    sllm_registered *registered;
    sllm_error err;
    system_start();
    uint64_t mapped = system_mapped_bytes();
    emulator_fail("cudaHostRegister:1:801");
    CHECK_STATUS(sllm_registered_create(load.devices[0], load.files[0].fd, &registered, &err), &err,
                 SLLM_E_DEVICE);
    CHECK_U64(err.device_code, 801);
    CHECK_TEXT(err.message, "cudaHostRegister failed with 801");
    emulator_fail(NULL);
    CHECK_U64(system_mapped_bytes(), mapped);
    system_end();
    load_end(&load);
    emulator_check_empty();
}

TEST(a_load_that_fails_gives_back_what_it_was_lent)
{
    only_for_cuda();
    test_load load;
    make_load(&load);
    sllm_progress progress;
    sllm_error err;
    load.registered[0] = registered_file(&load, 0);
    emulator_fail("cudaMemcpyAsync:4:719");
    load_forget(&load);
    sllm_job *job = load_start(&load);
    CHECK_STATUS(load_wait(job, &progress, &err), &err, SLLM_E_DEVICE);
    load_close(job);
    emulator_fail(NULL);
    sllm_registered_destroy(load.registered[0]);
    CHECK_U64(emulator_stat("registered_bytes"), 0);
    load_end(&load);
}

/* Last, for what it leaves. Its address would otherwise become another mapping's, which the runtime
 * takes for registered. */
TEST(what_cannot_be_unregistered_stays_mapped)
{
    only_for_cuda();
    test_load load;
    make_load(&load);
    system_start();
    uint64_t mapped = system_mapped_bytes();
    load.registered[0] = registered_file(&load, 0);
    emulator_fail("cudaHostUnregister:1:719");
    sllm_registered_destroy(load.registered[0]);
    CHECK(emulator_failed());
    emulator_fail(NULL);
    CHECK(system_mapped_bytes() > mapped);
    CHECK(emulator_stat("registered_bytes") > 0);
    system_end();
    load.registered[0] = NULL;
    load_end(&load);
}
