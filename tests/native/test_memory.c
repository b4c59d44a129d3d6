/* Fresh memory for a range of a file, and private views of one. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "files.h"
#include "system.h"

#define PAGE SLLM_PAGE_BYTES
#define MIB (1ull << 20)

/* The size of a huge page that the library aligns to, or 0. */
static uint64_t huge_page_bytes(void)
{
    unsigned long long bytes = 0;
    FILE *file = fopen("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", "re");
    if (file != NULL) {
        CHECK(fscanf(file, "%llu", &bytes) == 1);
        fclose(file);
    }
    return bytes <= 32 * MIB ? bytes : 0;
}

static sllm_memory *create(uint64_t bytes, uint64_t offset)
{
    sllm_memory *memory;
    sllm_error err;
    CHECK_OK(sllm_memory_create(bytes, offset, &memory, &err), &err);
    CHECK_U64(sllm_memory_bytes(memory), bytes);
    CHECK_U64(sllm_memory_writable(memory), 1);
    CHECK_U64((uintptr_t)sllm_memory_address(memory) % PAGE, offset % PAGE);
    return memory;
}

static sllm_memory *map(const test_file *file, uint64_t offset, uint64_t bytes)
{
    sllm_memory *memory;
    sllm_error err;
    CHECK_OK(sllm_memory_map(file->fd, file->path, offset, bytes, &memory, &err), &err);
    CHECK_U64(sllm_memory_bytes(memory), bytes);
    file_check(file->seed, offset, sllm_memory_address(memory), bytes);
    return memory;
}

TEST(fresh_memory_is_congruent_zeroed_and_owns_its_pages_whole)
{
    check_random random = check_random_start(0);
    for (uint64_t offset = 0; offset < PAGE; offset += 1 + check_random_below(&random, 12)) {
        uint64_t bytes = 1 + check_random_below(&random, 3 * PAGE);
        uint64_t base = check_random_below(&random, 1ull << 50) * PAGE;
        sllm_memory *memory = create(bytes, base + offset);
        char *address = sllm_memory_address(memory);
        for (uint64_t i = 0; i < bytes; i++) {
            CHECK_U64(address[i], 0);
        }
        char *start = address - offset, *end = address + bytes;
        end += (PAGE - (uintptr_t)end % PAGE) % PAGE;
        memset(start, 0x42, (size_t)(end - start));
        sllm_memory_destroy(memory);
    }
}

TEST(large_memory_starts_on_a_huge_page_and_small_memory_takes_no_more_than_it_needs)
{
    uint64_t huge = huge_page_bytes();
    system_start();
    sllm_memory *memory = create(9 * MIB + 1, 4097);
    if (huge != 0) {
        CHECK_U64(((uintptr_t)sllm_memory_address(memory) - 1) % huge, 0);
        CHECK_U64(system_mapped_bytes() % huge, 0);
        CHECK_U64(system_calls(SYSTEM_MADVISE), 1);
    }
    sllm_memory_destroy(memory);
    CHECK_U64(system_mapped_bytes(), 0);
    memory = create(5000, 0);
    CHECK(system_mapped_bytes() <= (uint64_t)sysconf(_SC_PAGESIZE) + 2 * PAGE);
    sllm_memory_destroy(memory);
    system_end();
}

TEST(memory_that_is_destroyed_is_gone)
{
    sllm_memory *memory = create(100000, 0);
    char *address = sllm_memory_address(memory);
    unsigned char resident;
    CHECK(mincore(address, PAGE, &resident) == 0);
    sllm_memory_destroy(memory);
    CHECK(mincore(address, PAGE, &resident) != 0 && errno == ENOMEM);
    sllm_memory_destroy(NULL);
}

TEST(no_memory_answers_for_itself)
{
    CHECK(sllm_memory_address(NULL) == NULL);
    CHECK_U64(sllm_memory_bytes(NULL), 0);
    CHECK_U64(sllm_memory_writable(NULL), 0);
}

TEST(what_is_no_range_is_refused)
{
    test_file file = file_make("ranges", 10000, 1);
    sllm_memory *memory = NULL;
    sllm_error err;
    CHECK_STATUS(sllm_memory_create(0, 0, &memory, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_memory_create(UINT64_MAX, 0, &memory, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_memory_create(1, 0, NULL, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_memory_create(INT64_MAX / 2, 0, &memory, &err), &err, SLLM_E_NOMEM);
    CHECK_U64(err.os_errno, ENOMEM);
    const char *path = file.path;
    CHECK_STATUS(sllm_memory_map(file.fd, path, 0, 0, &memory, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_memory_map(file.fd, NULL, 0, 1, &memory, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_memory_map(file.fd, path, 0, 1, NULL, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_memory_map(file.fd, path, UINT64_MAX, 1, &memory, &err), &err,
                 SLLM_E_INVALID);
    CHECK_STATUS(sllm_memory_map(file.fd, path, 1, UINT64_MAX, &memory, &err), &err,
                 SLLM_E_INVALID);
    CHECK_STATUS(sllm_memory_map(file.fd, path, 1, 10000, &memory, &err), &err, SLLM_E_TRUNCATED);
    CHECK_TEXT(err.message, path);
    CHECK_TEXT(err.message, "ends at byte 10000, before byte 10001");
    CHECK_STATUS(sllm_memory_map(-1, path, 0, 1, &memory, &err), &err, SLLM_E_IO);
    CHECK_TEXT(err.message, "EBADF");
    CHECK(memory == NULL);
    file_end(&file);
}

TEST(a_view_starts_at_any_byte_and_shows_the_file)
{
    test_file file = file_make("views", 3 * MIB + 77, 2);
    check_random random = check_random_start(1);
    uint64_t huge = huge_page_bytes();
    for (uint64_t i = 0; i < check_rounds(200); i++) {
        uint64_t offset = check_random_below(&random, file.bytes);
        uint64_t most = i < 20 ? file.bytes - offset : 20000;
        uint64_t bytes = 1 + check_random_below(&random, most);
        bytes = bytes < file.bytes - offset ? bytes : file.bytes - offset;
        sllm_memory *memory = map(&file, offset, bytes);
        CHECK_U64(((uintptr_t)sllm_memory_address(memory) - offset) % (huge ? huge : PAGE), 0);
        sllm_memory_destroy(memory);
    }
    sllm_memory *end = map(&file, file.bytes - 1, 1);
    sllm_memory_destroy(end);
    file_end(&file);
}

TEST(a_view_outlives_the_descriptor_and_the_name)
{
    test_file file = file_make("outlived", 50000, 3);
    sllm_memory *memory = map(&file, 0, 50000);
    file_end(&file);
    file_check(3, 0, sllm_memory_address(memory), 50000);
    sllm_memory_destroy(memory);
}

TEST(a_write_to_a_view_reaches_neither_the_file_nor_another_view)
{
    test_file file = file_make("cow", 50000, 4);
    sllm_memory *one = map(&file, 1, 49000), *two = map(&file, 1, 49000);
    CHECK_U64(sllm_memory_writable(one), 1);
    memset(sllm_memory_address(one), 0, 49000);
    file_check(file.seed, 1, sllm_memory_address(two), 49000);
    char *copy = malloc(50000);
    CHECK_U64(pread(file.fd, copy, 50000, 0), 50000);
    file_check(file.seed, 0, copy, 50000);
    free(copy);
    sllm_memory_destroy(one);
    sllm_memory_destroy(two);
    file_end(&file);
}

/* A kernel that does not overcommit, as they were before 6.12: what a fixed mapping replaces is
 * gone before memory is counted, and another thread's mapping takes the hole. */
static char *stranger;
static sllmi_os before;

static void *strict_mmap(void *address, size_t bytes, int protection, int flags, int fd,
                         off_t offset)
{
    if ((protection & PROT_WRITE) == 0 || (flags & MAP_PRIVATE) == 0) {
        return before.mmap(address, bytes, protection, flags, fd, offset);
    }
    if ((flags & MAP_FIXED) != 0 && stranger == NULL) {
        stranger = mmap(address, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        CHECK(stranger == address);
        stranger[0] = 0x55;
    }
    errno = ENOMEM;
    return MAP_FAILED;
}

static int strict_mprotect(void *address, size_t bytes, int protection)
{
    (void)address, (void)bytes, (void)protection;
    errno = ENOMEM;
    return -1;
}

TEST(without_overcommit_a_view_is_read_only_and_nobody_else_is_mapped_over)
{
    test_file file = file_make("strict", 100000, 5);
    before = sllmi_sys;
    stranger = NULL;
    sllmi_sys.mmap = strict_mmap;
    sllmi_sys.mprotect = strict_mprotect;
    sllm_memory *view = map(&file, 10, 90000);
    CHECK_U64(sllm_memory_writable(view), 0);
    sllm_memory_destroy(view);
    sllm_memory *fresh;
    sllm_error err;
    CHECK_STATUS(sllm_memory_create(90000, 10, &fresh, &err), &err, SLLM_E_NOMEM);
    CHECK_U64(err.os_errno, ENOMEM);
    CHECK(fresh == NULL);
    sllmi_sys.mprotect = before.mprotect;
    CHECK_OK(sllm_memory_create(90000, 0, &fresh, &err), &err);
    sllmi_sys.mprotect = strict_mprotect;
    CHECK_STATUS(sllm_memory_place(fresh, 0, file.fd, 0, 90000, &err), &err, SLLM_E_NOMEM);
    sllm_memory_destroy(fresh);
    CHECK(stranger == NULL || stranger[0] == 0x55); /* a fault, had it been unmapped */
    sllmi_sys = before;
    file_end(&file);
}

TEST(a_read_only_view_cannot_be_written_by_mistake)
{
    test_file file = file_make("readonly", 5000, 6);
    before = sllmi_sys;
    sllmi_sys.mprotect = strict_mprotect;
    sllm_memory *view = map(&file, 0, 5000);
    sllmi_sys = before;
    int null = open("/dev/zero", O_RDONLY | O_CLOEXEC);
    CHECK(read(null, sllm_memory_address(view), 1) == -1 && errno == EFAULT);
    close(null);
    sllm_memory_destroy(view);
    file_end(&file);
}

TEST(a_failure_at_any_step_leaves_nothing_mapped)
{
    static const system_call calls[] = {SYSTEM_MMAP, SYSTEM_MPROTECT, SYSTEM_ALLOC, SYSTEM_MADVISE};
    test_file file = file_make("steps", 9 * MIB, 7);
    for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++) {
        for (uint64_t nth = 1; nth <= 4; nth++) {
            for (int kind = 0; kind < 2; kind++) {
                system_start();
                system_fail(calls[i], nth, nth, EACCES);
                sllm_memory *memory;
                sllm_error err = {0};
                sllm_status status =
                    kind == 0 ? sllm_memory_create(9 * MIB, 3, &memory, &err)
                              : sllm_memory_map(file.fd, file.path, 3, 8 * MIB, &memory, &err);
                CHECK(status == SLLM_OK || system_failures() == 1);
                CHECK((status == SLLM_OK) == (memory != NULL));
                CHECK_STATUS(status, &err, status);
                sllm_memory_destroy(memory);
                CHECK_U64(system_mapped_bytes(), 0);
                system_end();
            }
        }
    }
    file_end(&file);
}

TEST(a_file_that_cannot_be_mapped_is_named)
{
    test_file file = file_make("nomap", 5000, 8);
    system_start();
    system_fail(SYSTEM_MMAP, 2, 2, ENODEV);
    sllm_memory *memory;
    sllm_error err;
    sllm_status status = sllm_memory_map(file.fd, file.path, 0, 5000, &memory, &err);
    CHECK_STATUS(status, &err, SLLM_E_IO);
    CHECK_TEXT(err.message, file.path);
    CHECK_TEXT(err.message, "ENODEV");
    system_end();
    file_end(&file);
}

TEST(placed_segments_and_fresh_pages_make_one_memory)
{
    sllm_segment *segment;
    sllm_error err;
    CHECK_OK(sllm_segment_create(2 * MIB, 0, &segment, &err), &err);
    memset(sllm_segment_address(segment), 7, 2 * MIB);
    int reader;
    CHECK_OK(sllm_segment_reader(segment, &reader, &err), &err);
    sllm_memory *memory = create(6 * MIB - 100, 0);
    char *address = sllm_memory_address(memory);
    CHECK_OK(sllm_memory_place(memory, 2 * MIB, reader, 0, 2 * MIB, &err), &err);
    close(reader);
    CHECK(address[0] == 0 && address[2 * MIB - 1] == 0 && address[4 * MIB] == 0);
    CHECK(address[2 * MIB] == 7 && address[4 * MIB - 1] == 7);
    address[2 * MIB] = 9; /* a copy of the page: the segment keeps its own */
    CHECK(*(char *)sllm_segment_address(segment) == 7);
    CHECK_U64(sllm_segment_held(segment), 1);
    sllm_memory_destroy(memory);
    CHECK_U64(sllm_segment_held(segment), !(sllm_segment_flags(segment) & 1));
    sllm_segment_destroy(segment);
}

TEST(what_is_no_part_of_the_memory_is_not_placed)
{
    test_file file = file_make("place", 3 * MIB, 9);
    sllm_memory *memory = create(MIB, 0), *askew = create(MIB, 8);
    sllm_error err;
    CHECK_STATUS(sllm_memory_place(NULL, 0, file.fd, 0, PAGE, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_memory_place(askew, 0, file.fd, 0, PAGE, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_memory_place(memory, 1, file.fd, 0, PAGE, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_memory_place(memory, 0, file.fd, 1, PAGE, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_memory_place(memory, 0, file.fd, 0, 2 * MIB, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_memory_place(memory, PAGE, file.fd, 0, MIB, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_memory_place(memory, 2 * MIB, file.fd, 0, 1, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_memory_place(memory, 0, -1, 0, PAGE, &err), &err, SLLM_E_NOMEM);
    CHECK_U64(err.os_errno, EBADF);
    sllm_memory_destroy(memory);
    sllm_memory_destroy(askew);
    file_end(&file);
}
