/* Every system call of a load into host memory fails once, and from some time on for ever: the load
 * succeeds with the right bytes, or fails with one clear line; either way nothing is left behind. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "files.h"
#include "io.h"
#include "system.h"

#define FILES 3
#define CHUNK_BYTES 16384u
#define LARGE_BYTES (4u << 20) /* memory that asks for huge pages; never written here */

static test_file files[FILES];

static void make_files(void)
{
    static const uint64_t sizes[FILES] = {60001, 4096, 33000};
    for (int i = 0; i < FILES; i++) {
        char name[] = "fault-0";
        name[6] = (char)('0' + i);
        files[i] = file_make(name, sizes[i], 50u + (uint64_t)i);
    }
}

static void end_files(void)
{
    for (int i = 0; i < FILES; i++) {
        file_end(&files[i]);
    }
}

/* Half of every file lies in the page cache, as far as anybody says. */
static bool first_half(uint64_t offset)
{
    return offset < 2 * CHUNK_BYTES;
}

static sllm_status run_job(const sllm_extent *extents, uint32_t count, uint32_t flags,
                           sllm_error *err)
{
    sllm_file names[FILES];
    for (uint32_t i = 0; i < FILES; i++) {
        names[i] = (sllm_file){.fd = files[i].fd, .path = files[i].path};
    }
    const sllm_job_options options = {
        .size = sizeof options, .chunk_bytes = CHUNK_BYTES, .threads = 2, .flags = flags};
    sllm_job *job;
    sllm_progress progress;
    sllm_status status = sllm_job_create(names, FILES, extents, count, &options, &job, err);
    CHECK((status == SLLM_OK) == (job != NULL));
    if (status != SLLM_OK) {
        return status;
    }
    status = sllm_job_start(job, err);
    do {
        sllm_error waiting;
        sllm_status now = sllm_job_wait(job, 200, &progress, &waiting);
        if (now != SLLM_OK && now != SLLM_E_BUSY) {
            *err = waiting;
        }
        status = now;
    } while (status == SLLM_E_BUSY);
    sllm_error closing;
    CHECK_OK(sllm_job_close(job, 250000, &closing), &closing);
    if (status == SLLM_OK) {
        CHECK_U64(progress.bytes_done, progress.bytes_total);
        CHECK_U64(progress.bytes_disk + progress.bytes_cache, progress.bytes_total);
    }
    return status;
}

static sllm_extent place(uint32_t file, uint64_t offset, uint64_t bytes, const sllm_memory *memory)
{
    return (sllm_extent){.file = file,
                         .device = -1,
                         .offset = offset,
                         .bytes = bytes,
                         .target = (uint64_t)(uintptr_t)sllm_memory_address(memory)};
}

/* All that a program does on the host; the first failure. */
static sllm_status load_all(sllm_error *err)
{
    sllm_memory *memories[FILES] = {0}, *large = NULL, *view = NULL;
    sllm_file_facts facts;
    sllm_status status = SLLM_OK;
    for (int i = 0; status == SLLM_OK && i < FILES; i++) {
        status = sllm_file_probe(files[i].fd, files[i].path, 0, files[i].bytes, &facts, err);
        CHECK(status != SLLM_OK || facts.resident_bytes <= files[i].bytes);
    }
    if (status == SLLM_OK) {
        status = sllm_memory_create(LARGE_BYTES, 0, &large, err);
    }
    for (int i = 0; status == SLLM_OK && i < FILES; i++) {
        status = sllm_memory_create(files[i].bytes, 0, &memories[i], err);
    }
    if (status == SLLM_OK) {
        sllm_extent extents[FILES];
        for (uint32_t i = 0; i < FILES; i++) {
            extents[i] = place(i, 0, files[i].bytes, memories[i]);
        }
        status = run_job(extents, FILES, 0, err);
    }
    for (int i = 0; status == SLLM_OK && i < FILES; i++) {
        file_check(files[i].seed, 0, sllm_memory_address(memories[i]), files[i].bytes);
    }
    if (status == SLLM_OK) {
        status = sllm_memory_map(files[0].fd, files[0].path, 5, 50000, &view, err);
    }
    if (status == SLLM_OK) {
        sllm_extent extent = place(0, 5, 50000, view);
        (void)sllm_memory_advise_huge(view);
        CHECK(sllm_memory_huge_bytes(view, 0, 50000) <= 50000); /* -1 where nobody tells */
        status = run_job(&extent, 1, SLLM_JOB_MAPPED, err);
    }
    if (status == SLLM_OK) {
        file_check(files[0].seed, 5, sllm_memory_address(view), 50000);
    }
    sllm_memory_destroy(view);
    for (int i = 0; i < FILES; i++) {
        sllm_memory_destroy(memories[i]);
    }
    sllm_memory_destroy(large);
    return status;
}

enum { OK = 1, IO = 2, NOMEM = 4, TRUNCATED = 8 };

static bool allowed(sllm_status status, unsigned set)
{
    switch ((int)status) {
    case SLLM_OK: return (set & OK) != 0;
    case SLLM_E_IO: return (set & IO) != 0;
    case SLLM_E_NOMEM: return (set & NOMEM) != 0;
    case SLLM_E_TRUNCATED: return (set & TRUNCATED) != 0;
    default: return false;
    }
}

static const struct fault_case {
    system_call call;
    int error;
    unsigned allowed;
} cases[] = {
    {SYSTEM_OPEN, EMFILE, OK},
    {SYSTEM_OPEN, EACCES, OK},
    {SYSTEM_OPEN, EINVAL, OK},
    {SYSTEM_FSTAT, EIO, IO},
    {SYSTEM_FSTAT, ESTALE, IO},
    {SYSTEM_FSTATFS, EIO, IO},
    {SYSTEM_FADVISE, EINVAL, OK},
    {SYSTEM_PREAD, EIO, IO},
    {SYSTEM_PREAD, EAGAIN, IO},
    {SYSTEM_PREAD, ENOMEM, IO},
    {SYSTEM_PREAD, EINVAL, OK | IO}, /* direct reads are done without, others fail */
    {SYSTEM_PREAD_NOWAIT, EOPNOTSUPP, OK},
    {SYSTEM_PREAD_NOWAIT, EINTR, OK},
    {SYSTEM_PREAD_NOWAIT, EIO, OK},
    {SYSTEM_CACHED_PAGES, ENOSYS, OK},
    {SYSTEM_CACHED_PAGES, EPERM, OK},
    {SYSTEM_MMAP, ENOMEM, OK | NOMEM | IO}, /* a question that fails is asked otherwise */
    {SYSTEM_MMAP, EACCES, OK | NOMEM | IO},
    {SYSTEM_MPROTECT, ENOMEM, OK | NOMEM}, /* a view is read-only then */
    {SYSTEM_MADVISE, EINVAL, OK},
    {SYSTEM_MADVISE, ENOMEM, OK},
    {SYSTEM_MINCORE, ENOMEM, OK},
    {SYSTEM_HUGE_BYTES, ENOTTY, OK},
    {SYSTEM_THREAD_CREATE, EAGAIN, OK | NOMEM},
    {SYSTEM_THREAD_CREATE, EPERM, OK | NOMEM},
    {SYSTEM_ALLOC, ENOMEM, NOMEM},
};

static void check_message(const sllm_error *err)
{
    bool named = strstr(err->message, "memory") != NULL || strstr(err->message, "thread") != NULL;
    for (int i = 0; i < FILES; i++) {
        named = named || strstr(err->message, files[i].path) != NULL;
    }
    if (!named) {
        check_failed(__FILE__, __LINE__, "the message names nothing: `%s`", err->message);
    }
}

static void begin(int way, bool direct)
{
    system_start();
    system_filesystem(way == SLLMI_RESIDENCY_MINCORE ? SYSTEM_OVERLAYFS : SYSTEM_EXT4);
    system_resident(first_half);
    if (way == SLLMI_RESIDENCY_NOWAIT) {
        system_fail(SYSTEM_CACHED_PAGES, SYSTEM_ALWAYS, ENOSYS);
        system_fail(SYSTEM_MINCORE, SYSTEM_ALWAYS, ENOMEM);
    }
    if (direct) {
        system_simulate_direct();
    } else {
        system_fail(SYSTEM_OPEN, SYSTEM_ALWAYS, EINVAL);
    }
}

/* Loads with call number `nth` failing; false when there was no such call. */
static bool load_with_fault(const struct fault_case *fault, int way, bool direct, uint64_t nth,
                            uint64_t last)
{
    uint32_t descriptors = open_descriptors();
    begin(way, direct);
    system_fail(fault->call, nth, last, fault->error);
    sllm_error err = {0};
    sllm_status status = load_all(&err);
    bool reached = system_calls(fault->call) >= nth;
    if (!allowed(status, reached ? fault->allowed : OK)) {
        check_failed(__FILE__, __LINE__, "call %llu of %s with %s: %s: %s", (unsigned long long)nth,
                     system_call_names[fault->call], strerror(fault->error),
                     sllm_status_name(status), err.message);
    }
    if (status != SLLM_OK) {
        CHECK_STATUS(status, &err, status);
        CHECK_U64(err.os_errno, fault->error);
        check_message(&err);
    }
    CHECK_U64(system_mapped_bytes(), 0);
    system_end();
    CHECK_U64(open_descriptors(), descriptors);
    return reached;
}

static void check_every_call(int way, bool direct)
{
    make_files();
    uint64_t reached = 0;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        for (uint64_t nth = 1; load_with_fault(&cases[i], way, direct, nth, nth); nth++) {
            (void)load_with_fault(&cases[i], way, direct, nth, UINT64_MAX);
            reached++;
        }
    }
    CHECK(reached > 100);
    end_files();
}

TEST(any_call_may_fail_where_cachestat_and_direct_reads_work)
{
    check_every_call(SLLMI_RESIDENCY_CACHESTAT, true);
}

TEST(any_call_may_fail_where_mincore_answers)
{
    check_every_call(SLLMI_RESIDENCY_MINCORE, true);
}

TEST(any_call_may_fail_where_only_a_read_that_does_not_wait_answers)
{
    check_every_call(SLLMI_RESIDENCY_NOWAIT, true);
}

TEST(any_call_may_fail_where_direct_reads_are_refused)
{
    check_every_call(SLLMI_RESIDENCY_CACHESTAT, false);
}

/* A read that gives less than asked, at any place; 0 bytes is the end of a file that shrank. */
static void check_short_reads(bool direct, uint64_t bytes, sllm_status expected)
{
    make_files();
    for (uint64_t nth = 1;; nth++) {
        begin(SLLMI_RESIDENCY_CACHESTAT, direct);
        system_shorten(nth, bytes);
        sllm_error err;
        sllm_status status = load_all(&err);
        bool reached = system_calls(SYSTEM_PREAD) >= nth;
        CHECK_STATUS(status, &err, reached ? expected : SLLM_OK);
        if (status != SLLM_OK) {
            check_message(&err);
        }
        CHECK_U64(system_mapped_bytes(), 0);
        system_end();
        if (!reached) {
            break;
        }
    }
    end_files();
}

TEST(any_read_may_give_less)
{
    static const uint64_t pieces[] = {1, 511, 512, 4096, 4097, 9000};
    for (size_t i = 0; i < sizeof pieces / sizeof pieces[0]; i++) {
        check_short_reads(true, pieces[i], SLLM_OK);
        check_short_reads(false, pieces[i], SLLM_OK);
    }
}

TEST(any_read_may_meet_the_end_of_a_file_that_shrank)
{
    check_short_reads(true, 0, SLLM_E_TRUNCATED);
    check_short_reads(false, 0, SLLM_E_TRUNCATED);
}

TEST(any_read_may_be_interrupted)
{
    static const struct fault_case interrupted = {SYSTEM_PREAD, EINTR, OK};
    make_files();
    for (int direct = 0; direct < 2; direct++) {
        uint64_t nth = 1;
        while (load_with_fault(&interrupted, SLLMI_RESIDENCY_CACHESTAT, direct, nth, nth + 2)) {
            nth++;
        }
        CHECK(nth > 5);
    }
    end_files();
}
