/* How loads end early: cancelled, closed, stalled, forked, failed, or over a file that changed. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "fake_device.h"
#include "loads.h"
#include "system.h"

#define PAGE SLLM_PAGE_BYTES

static test_load make_load(uint64_t bytes, uint64_t chunk_bytes, uint32_t threads)
{
    const uint64_t sizes[] = {bytes, 0};
    test_load load = load_of_files(sizes);
    load.options.chunk_bytes = chunk_bytes;
    load.options.threads = threads;
    load_add(&load, 0, -1, 0, bytes);
    return load;
}

/* A read of this offset waits at the gate; offset UINT64_MAX: none does. */
static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t offset;
    bool open;
    uint32_t waiting;
} gate = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
static ssize_t (*behind_gate)(int fd, void *buffer, size_t bytes, off_t offset);

static ssize_t gated_pread(int fd, void *buffer, size_t bytes, off_t offset)
{
    if ((uint64_t)offset == gate.offset) {
        pthread_mutex_lock(&gate.lock);
        gate.waiting++;
        pthread_cond_broadcast(&gate.changed);
        while (!gate.open) {
            pthread_cond_wait(&gate.changed, &gate.lock);
        }
        gate.waiting--;
        pthread_mutex_unlock(&gate.lock);
    }
    return behind_gate(fd, buffer, bytes, offset);
}

static void shut_gate(uint64_t offset)
{
    system_start();
    gate.offset = offset;
    gate.open = false;
    behind_gate = sllmi_sys.pread;
    sllmi_sys.pread = gated_pread;
}

static void await_gate(void)
{
    pthread_mutex_lock(&gate.lock);
    while (gate.waiting == 0) {
        pthread_cond_wait(&gate.changed, &gate.lock);
    }
    pthread_mutex_unlock(&gate.lock);
}

static void open_gate(void)
{
    pthread_mutex_lock(&gate.lock);
    gate.open = true;
    pthread_cond_broadcast(&gate.changed);
    pthread_mutex_unlock(&gate.lock);
}

static void *cancel(void *job)
{
    sllm_job_cancel(job);
    return NULL;
}

TEST(a_load_cancelled_at_any_moment_ends_and_what_it_says_is_done_is_done)
{
    test_load load = make_load(2 << 20, 16384, 3);
    const char *target = (const char *)(uintptr_t)load.extents[0].target;
    check_random random = check_random_start(0);
    uint64_t cancelled = 0;
    for (uint64_t round = 0; round < check_rounds(60); round++) {
        load_forget(&load);
        sllm_job *job = load_start(&load);
        sllm_progress progress = {0};
        sllm_error err;
        uint32_t enough = (uint32_t)check_random_below(&random, 120);
        sllm_status status = SLLM_E_BUSY;
        while (status == SLLM_E_BUSY && progress.chunks_done < enough) {
            status = sllm_job_wait(job, 0, &progress, &err);
        }
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, cancel, job) == 0);
        status = load_wait(job, &progress, &err);
        CHECK(status == SLLM_OK || status == SLLM_E_CANCELLED);
        CHECK_STATUS(status, &err, status);
        cancelled += status == SLLM_E_CANCELLED;
        uint8_t done[128];
        CHECK_OK(sllm_job_chunks_done(job, 0, 128, done, &err), &err);
        for (uint64_t i = 0; i < 128; i++) {
            CHECK(!done[i] ||
                  file_matches(load.files[0].seed, i * 16384, target + i * 16384, 16384));
        }
        pthread_join(thread, NULL);
        load_close(job);
    }
    CHECK(cancelled > 0);
    load_end(&load);
}

TEST(a_job_cancelled_before_its_start_reads_nothing)
{
    test_load load = make_load(100000, PAGE, 2);
    sllm_job *job;
    sllm_progress progress;
    sllm_error err;
    CHECK_OK(load_create(&load, &job, &err), &err);
    sllm_job_cancel(job);
    CHECK_OK(sllm_job_start(job, &err), &err);
    CHECK_STATUS(load_wait(job, &progress, &err), &err, SLLM_E_CANCELLED);
    CHECK_U64(progress.bytes_done, 0);
    load_close(job);
    load_end(&load);
}

TEST(a_job_closed_while_it_runs_writes_nothing_afterwards)
{
    check_random random = check_random_start(1);
    for (uint64_t round = 0; round < check_rounds(25); round++) {
        test_load load = make_load(600000, PAGE, 4);
        sllm_job *job = load_start(&load);
        sllm_progress progress = {0};
        sllm_error err;
        uint32_t enough = (uint32_t)check_random_below(&random, 100);
        while (progress.chunks_done < enough &&
               sllm_job_wait(job, 0, &progress, &err) == SLLM_E_BUSY) {
        }
        load_close(job);
        load_end(&load); /* a late write would be a fault */
    }
}

TEST(a_disk_that_hangs_is_named_and_the_job_can_be_closed_when_it_wakes)
{
    test_load load = make_load(100000, 16384, 2);
    load.options.stall_ms = 400;
    shut_gate(32768);
    sllm_job *job = load_start(&load);
    sllm_progress progress;
    sllm_error err;
    /* Whoever waits for ever learns of it, too. */
    sllm_status status = sllm_job_wait(job, UINT32_MAX, &progress, &err);
    CHECK_STATUS(status, &err, SLLM_E_TIMEOUT);
    CHECK_U64(err.os_errno, ETIMEDOUT);
    CHECK_TEXT(err.message, load.files[0].path);
    CHECK_TEXT(err.message, "reading");
    CHECK_TEXT(err.message, "at byte 32768");
    CHECK_STATUS(sllm_job_wait(job, 0, &progress, &err), &err, SLLM_E_TIMEOUT);
    await_gate();
    CHECK_STATUS(sllm_job_close(job, 0, &err), &err, SLLM_E_BUSY);
    CHECK_STATUS(sllm_job_close(job, 10, &err), &err, SLLM_E_BUSY);
    open_gate();
    load_close(job);
    system_end();
    load_end(&load);
}

static ssize_t instant_pread(int fd, void *buffer, size_t bytes, off_t offset)
{
    (void)fd, (void)buffer, (void)offset;
    return (ssize_t)bytes;
}

TEST(a_job_that_moves_has_not_stalled_however_often_one_asks)
{
    test_load load = make_load(8 << 20, PAGE, 4);
    load.options.flags = SLLM_JOB_NO_CACHE;
    system_start();
    sllmi_sys.pread = instant_pread; /* things move all the time */
    for (uint64_t round = 0; round < check_rounds(200); round++) {
        sllm_job *job = load_start(&load);
        sllm_progress progress;
        sllm_error err;
        sllm_status status;
        do {
            status = sllm_job_wait(job, 0, &progress, &err);
        } while (status == SLLM_E_BUSY);
        CHECK_OK(status, &err);
        load_close(job);
    }
    system_end();
    load_end(&load);
}

TEST(a_device_that_hangs_is_named_and_not_the_disk)
{
    const uint64_t sizes[] = {200000, 0};
    test_load load = load_of_files(sizes);
    fake_start(0);
    load_use_devices(&load, 2, true, 2, 8192);
    load.options.stall_ms = 400;
    load.options.threads = 1; /* chunks come in order */
    load_add(&load, 0, 0, 20000, 150000);
    load_add(&load, 0, 1, 20000, 150000);
    fake_hold(true);
    sllm_job *job = load_start(&load);
    sllm_progress progress;
    sllm_error err;
    CHECK_STATUS(sllm_job_wait(job, UINT32_MAX, &progress, &err), &err, SLLM_E_TIMEOUT);
    CHECK_TEXT(err.message, "copying");
    CHECK_TEXT(err.message, "fake:0");
    CHECK_TEXT(err.message, load.files[0].path);
    CHECK_TEXT(err.message, "at byte 20000");
    CHECK_STATUS(sllm_job_close(job, 10, &err), &err, SLLM_E_BUSY);
    fake_hold(false);
    load_close(job);
    load_end(&load);
    fake_end();
}

/* 0, or the number of the check that failed. */
static int use_in_child(test_load *load, sllm_job *job, sllm_job *fresh)
{
    sllm_error err;
    sllm_progress progress;
    uint8_t done;
    sllm_ring *ring;
    sllm_job *made;
    memset(&progress, 0xff, sizeof progress);
    if (sllm_job_wait(job, 0, &progress, &err) != SLLM_E_FORKED || err.status != SLLM_E_FORKED) {
        return 1;
    }
    if (progress.bytes_done != 0) {
        return 2; /* it is filled in every case */
    }
    sllm_job_cancel(job);
    if (sllm_job_start(fresh, &err) != SLLM_E_FORKED) {
        return 3;
    }
    if (sllm_job_chunks_done(job, 0, 1, &done, &err) != SLLM_E_FORKED) {
        return 4;
    }
    if (sllm_job_close(job, 100, &err) != SLLM_E_FORKED) {
        return 5;
    }
    if (load_create(load, &made, &err) != SLLM_E_FORKED || made != NULL) {
        return 6;
    }
    if (sllm_ring_create(load->devices[0], PAGE, 2, &ring, &err) != SLLM_E_FORKED || ring != NULL) {
        return 7;
    }
    sllm_ring_destroy(load->ring);
    sllm_device_close(load->devices[0]);
    char *target = (char *)(uintptr_t)load->extents[0].target;
    memset(target, 7, load->extents[0].bytes); /* memory is the child's own copy */
    return target[0] == 7 ? 0 : 8;
}

TEST(a_forked_child_may_use_the_memory_and_nothing_else)
{
    const uint64_t sizes[] = {300000, 0};
    test_load load = load_of_files(sizes);
    fake_start(100);
    load_use_devices(&load, 1, true, 3, 16384);
    load_add(&load, 0, -1, 0, 300000);
    load_add(&load, 0, 0, 0, 300000);
    sllm_job *fresh;
    sllm_progress progress;
    sllm_error err;
    CHECK_OK(load_create(&load, &fresh, &err), &err);
    sllm_job *job = load_start(&load);
    pid_t child = fork();
    if (child == 0) {
        _exit(use_in_child(&load, job, fresh));
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    CHECK_U64(WEXITSTATUS(status), 0);
    CHECK_OK(load_wait(job, &progress, &err), &err);
    load_check(&load);
    load_close(job);
    load_close(fresh);
    load_end(&load);
    fake_end();
}

static const char *changing_path;
static void (*change)(void);
static _Atomic int reads_before_change;

static ssize_t changing_pread(int fd, void *buffer, size_t bytes, off_t offset)
{
    if (--reads_before_change == 0) {
        change();
    }
    return behind_gate(fd, buffer, bytes, offset);
}

static void touch(void)
{
    const struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = 1000}};
    CHECK(utimensat(AT_FDCWD, changing_path, times, 0) == 0);
}

static void grow(void)
{
    CHECK(truncate(changing_path, 700000) == 0);
}

static void shrink(void)
{
    CHECK(truncate(changing_path, 300000) == 0);
}

TEST(a_file_that_changes_while_it_is_read_fails_the_load_by_name)
{
    static void (*const changes[])(void) = {touch, grow, shrink};
    for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) {
        test_load load = make_load(600000, 65536, 1);
        changing_path = load.files[0].path;
        change = changes[i];
        reads_before_change = 3;
        system_start();
        behind_gate = sllmi_sys.pread;
        sllmi_sys.pread = changing_pread;
        sllm_job *job = load_start(&load);
        sllm_progress progress;
        sllm_error err;
        sllm_status status = load_wait(job, &progress, &err);
        CHECK_STATUS(status, &err, change == shrink ? SLLM_E_TRUNCATED : SLLM_E_CHANGED);
        CHECK_TEXT(err.message, load.files[0].path);
        load_close(job);
        system_end();
        load_end(&load);
    }
}

TEST(the_first_failure_stops_the_other_readers)
{
    test_load load = make_load(4 << 20, PAGE, 2);
    shut_gate(PAGE);
    system_fail(SYSTEM_PREAD, 1, 1, EIO); /* of whichever chunk is not at the gate */
    sllm_job *job = load_start(&load);
    sllm_progress progress;
    sllm_error err;
    CHECK_STATUS(load_wait(job, &progress, &err), &err, SLLM_E_IO);
    CHECK_U64(err.os_errno, EIO);
    CHECK_TEXT(err.message, load.files[0].path);
    open_gate();
    load_close(job);
    CHECK(system_calls(SYSTEM_PREAD) <= 2);
    system_end();
    load_end(&load);
}
