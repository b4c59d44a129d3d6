/* A file that is mapped: its pages are brought into the page cache, and nothing is copied. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "check.h"
#include "files.h"
#include "loads.h"
#include "system.h"

#define MIB (1ull << 20)
#define OFFSET 4099u

/* A view of a file from an odd offset on, and a job that brings it in. */
typedef struct mapped_load {
    test_file file;
    sllm_memory *memory;
    sllm_job *job;
} mapped_load;

static mapped_load start_load(uint64_t bytes, uint64_t chunk_bytes)
{
    mapped_load load = {.file = file_make("mapped", bytes, 9)};
    CHECK(fsync(load.file.fd) == 0);
    CHECK(posix_fadvise(load.file.fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
    sllm_error err;
    CHECK_OK(
        sllm_memory_map(load.file.fd, load.file.path, OFFSET, bytes - OFFSET, &load.memory, &err),
        &err);
    const sllm_file file = {.fd = load.file.fd, .path = load.file.path};
    const sllm_extent extent = {.device = -1,
                                .offset = OFFSET,
                                .bytes = bytes - OFFSET,
                                .target = (uintptr_t)sllm_memory_address(load.memory)};
    const sllm_job_options options = {
        .size = sizeof options, .chunk_bytes = chunk_bytes, .threads = 4, .flags = SLLM_JOB_MAPPED};
    CHECK_OK(sllm_job_create(&file, 1, &extent, 1, &options, &load.job, &err), &err);
    return load;
}

static sllm_status run(mapped_load *load, sllm_error *err)
{
    sllm_progress progress;
    CHECK_OK(sllm_job_start(load->job, err), err);
    sllm_status status = load_wait(load->job, &progress, err);
    if (status == SLLM_OK) {
        CHECK_U64(progress.bytes_done, load->file.bytes - OFFSET);
        CHECK_U64(progress.bytes_disk + progress.bytes_cache, load->file.bytes - OFFSET);
    }
    return status;
}

static void end_load(mapped_load *load)
{
    load_close(load->job);
    sllm_memory_destroy(load->memory);
    file_end(&load->file);
}

/* How much of a view lies in the page cache. */
static uint64_t resident_bytes(const mapped_load *load)
{
    unsigned char pages[4096];
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), bytes = load->file.bytes - OFFSET;
    char *start = sllm_memory_address(load->memory);
    start -= (uintptr_t)start % page;
    uint64_t count = (bytes + OFFSET % page + page - 1) / page, resident = 0;
    CHECK(count <= sizeof pages);
    CHECK(mincore(start, count * page, pages) == 0);
    for (uint64_t i = 0; i < count; i++) {
        resident += pages[i] & 1;
    }
    return resident == count ? bytes : resident * page;
}

/* What the kernel says of the mapping at an address. Source: proc(5), smaps. */
static uint64_t pmd_mapped_bytes(const void *address)
{
    char line[1024];
    unsigned long long start, end, kib, found = 0;
    bool here = false;
    FILE *maps = fopen("/proc/self/smaps", "re");
    CHECK(maps != NULL);
    while (fgets(line, sizeof line, maps) != NULL) {
        if (sscanf(line, "%llx-%llx ", &start, &end) == 2) {
            here = start <= (uintptr_t)address && (uintptr_t)address < end;
        } else if (here && sscanf(line, "FilePmdMapped: %llu", &kib) == 1) {
            found = kib * 1024;
        }
    }
    fclose(maps);
    return found;
}

static bool kernel_before(int major, int minor)
{
    struct utsname name;
    int found_major = 0, found_minor = 0;
    CHECK(uname(&name) == 0 && sscanf(name.release, "%d.%d", &found_major, &found_minor) == 2);
    return found_major < major || (found_major == major && found_minor < minor);
}

TEST(every_page_is_brought_in_and_nothing_is_copied)
{
    system_start();
    mapped_load load = start_load(5 * MIB + 123, MIB);
    sllm_error err;
    CHECK_OK(run(&load, &err), &err);
    CHECK_U64(resident_bytes(&load), load.file.bytes - OFFSET);
    CHECK_U64(system_direct_reads(), 0);
    file_check(load.file.seed, OFFSET, sllm_memory_address(load.memory), load.file.bytes - OFFSET);
    end_load(&load);
    CHECK_U64(system_mapped_bytes(), 0);
    system_end();
}

TEST(a_kernel_that_cannot_bring_pages_in_reads_them)
{
    system_start();
    system_fail(SYSTEM_MADVISE, SYSTEM_ALWAYS, EINVAL);
    mapped_load load = start_load(3 * MIB + 123, MIB);
    sllm_error err;
    CHECK_OK(run(&load, &err), &err);
    CHECK(system_cached_reads() >= 3 * 16);
    CHECK_U64(resident_bytes(&load), load.file.bytes - OFFSET);
    file_check(load.file.seed, OFFSET, sllm_memory_address(load.memory), load.file.bytes - OFFSET);
    end_load(&load);
    system_end();
}

TEST(a_disk_that_fails_is_named_with_the_place)
{
    system_start();
    system_fail(SYSTEM_MADVISE, SYSTEM_ALWAYS, EFAULT);
    mapped_load load = start_load(MIB, MIB);
    system_fail(SYSTEM_PREAD, 2, UINT64_MAX, EIO);
    sllm_error err;
    CHECK_STATUS(run(&load, &err), &err, SLLM_E_IO);
    CHECK_U64(err.os_errno, EIO);
    CHECK_TEXT(err.message, load.file.path);
    CHECK_TEXT(err.message, "at byte 69635"); /* the second of 64 KiB */
    end_load(&load);
    system_end();
}

TEST(a_file_that_lost_its_end_is_an_error_and_no_signal)
{
    mapped_load load = start_load(2 * MIB, MIB);
    CHECK(truncate(load.file.path, MIB / 2) == 0);
    sllm_error err;
    CHECK_STATUS(run(&load, &err), &err, SLLM_E_TRUNCATED);
    CHECK_TEXT(err.message, load.file.path);
    end_load(&load);
}

TEST(no_device_takes_what_is_mapped)
{
    const uint64_t sizes[] = {100000, 0};
    test_load load = load_of_files(sizes);
    load_use_devices(&load, 1, false, 2, 8192);
    load_add(&load, 0, 0, 0, 100000);
    load.options.flags = SLLM_JOB_MAPPED;
    sllm_job *job;
    sllm_error err;
    CHECK_STATUS(load_create(&load, &job, &err), &err, SLLM_E_INVALID);
    load_end(&load);
}

TEST(huge_pages_are_counted_where_the_system_tells)
{
    mapped_load load = start_load(9 * MIB, 2 * MIB);
    sllm_error err;
    bool advised = sllm_memory_advise_huge(load.memory) == 1;
    CHECK_OK(run(&load, &err), &err);
    uint64_t bytes = load.file.bytes - OFFSET;
    int64_t huge = sllm_memory_huge_bytes(load.memory, 0, bytes);
    CHECK((huge == -1) == kernel_before(6, 7));
    if (huge >= 0) {
        /* The view begins and ends within a page of what the kernel counts whole. */
        int64_t told = (int64_t)pmd_mapped_bytes(sllm_memory_address(load.memory));
        CHECK(huge <= told && told - huge < 2 * sysconf(_SC_PAGESIZE));
        CHECK(advised || huge == 0);
        int64_t sum = 0; /* parts add up */
        for (uint64_t at = 0; at < bytes; at += MIB / 2) {
            uint64_t part = bytes - at < MIB / 2 ? bytes - at : MIB / 2;
            sum += sllm_memory_huge_bytes(load.memory, at, part);
        }
        CHECK(sum == huge);
    }
    CHECK(sllm_memory_huge_bytes(load.memory, 1, bytes) == -1);
    CHECK(sllm_memory_huge_bytes(NULL, 0, 1) == -1);
    CHECK_U64(sllm_memory_advise_huge(NULL), 0);
    system_start();
    system_fail(SYSTEM_HUGE_BYTES, SYSTEM_ALWAYS, ENOTTY);
    system_fail(SYSTEM_MADVISE, SYSTEM_ALWAYS, EINVAL);
    CHECK(sllm_memory_huge_bytes(load.memory, 0, bytes) == -1);
    CHECK_U64(sllm_memory_advise_huge(load.memory), 0);
    system_end();
    end_load(&load);
}
