/* Reading a range of a file: around the page cache, through it, and when things go wrong. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "align.h"
#include "check.h"
#include "files.h"
#include "io.h"
#include "system.h"

#define PAGE 4096u
#define MIB (1ull << 20)

enum manner { REAL_DIRECT, SIMULATED_DIRECT, NO_DIRECT, MANNERS };

static bool all(uint64_t offset)
{
    (void)offset;
    return true;
}

static bool none(uint64_t offset)
{
    (void)offset;
    return false;
}

static void begin(enum manner manner)
{
    system_start();
    system_filesystem(SYSTEM_EXT4);
    system_resident(none);
    if (manner == SIMULATED_DIRECT) {
        system_simulate_direct();
    }
}

static sllmi_source open_source(const test_file *file, enum manner manner)
{
    sllmi_source source;
    sllm_error err;
    CHECK_OK(sllmi_source_open(file->fd, file->path, manner != NO_DIRECT, &source, &err), &err);
    return source;
}

/* Room for a range with whole pages around it and nothing accessible beyond those. */
typedef struct test_room {
    char *mapping, *target;
    uint64_t mapping_bytes;
} test_room;

static test_room make_room(uint64_t offset, uint64_t bytes)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t skew = offset % PAGE, span = sllmi_align_up(skew + bytes, PAGE);
    uint64_t inner = sllmi_align_up(span, page);
    test_room made = {.mapping_bytes = inner + 2 * page};
    made.mapping = mmap(NULL, made.mapping_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(made.mapping != MAP_FAILED);
    CHECK(mprotect(made.mapping + page, inner, PROT_READ | PROT_WRITE) == 0);
    /* The span ends where access ends. */
    made.target = made.mapping + page + (inner - span) + skew;
    return made;
}

static void end_room(test_room *room)
{
    munmap(room->mapping, room->mapping_bytes);
}

static sllm_status read_range(sllmi_source *source, const test_file *file, uint64_t offset,
                              uint64_t bytes, sllmi_read_counts *counts, sllm_error *err)
{
    test_room place = make_room(offset, bytes);
    *counts = (sllmi_read_counts){0};
    sllm_status status = sllmi_source_read(source, offset, bytes, place.target, true, counts, err);
    if (status == SLLM_OK) {
        file_check(file->seed, offset, place.target, bytes);
        CHECK_U64(counts->disk + counts->cache, bytes);
    }
    end_room(&place);
    return status;
}

static void read_whole_and_parts(const test_file *file, enum manner manner, check_random *random)
{
    begin(manner);
    sllmi_source source = open_source(file, manner);
    sllmi_read_counts counts;
    sllm_error err;
    CHECK_OK(read_range(&source, file, 0, file->bytes, &counts, &err), &err);
    CHECK_U64(counts.disk, file->bytes);
    uint64_t parts = check_rounds(file->bytes > MIB ? 6 : 25);
    for (uint64_t i = 0; i < parts; i++) {
        uint64_t offset = check_random_below(random, file->bytes);
        uint64_t bytes = 1 + check_random_below(random, file->bytes - offset);
        CHECK_OK(read_range(&source, file, offset, bytes, &counts, &err), &err);
    }
    CHECK_OK(read_range(&source, file, file->bytes - 1, 1, &counts, &err), &err);
    if (manner == SIMULATED_DIRECT) {
        CHECK_U64(system_cached_reads(), 0);
    }
    sllmi_source_close(&source);
    system_end();
}

TEST(files_of_every_odd_size_are_read_whole_and_in_parts)
{
    static const uint64_t sizes[] = {16 * MIB + 1, 16 * MIB, 16 * MIB - 1, 3 * PAGE + 5,
                                     PAGE + 1,     PAGE,     PAGE - 1,     1};
    check_random random = check_random_start(0);
    test_file file = file_make("sizes", sizes[0], 1);
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        CHECK(truncate(file.path, (off_t)sizes[i]) == 0);
        file.bytes = sizes[i];
        for (int manner = 0; manner < MANNERS; manner++) {
            read_whole_and_parts(&file, (enum manner)manner, &random);
        }
    }
    file_end(&file);
}

TEST(resident_bytes_come_through_the_cache_and_the_rest_around_it)
{
    test_file file = file_make("counts", 4 * MIB, 2);
    sllmi_read_counts counts;
    sllm_error err;
    begin(SIMULATED_DIRECT);
    sllmi_source source = open_source(&file, SIMULATED_DIRECT);
    CHECK_OK(read_range(&source, &file, 5, 3 * MIB, &counts, &err), &err);
    CHECK(counts.disk == 3 * MIB && system_cached_reads() == 0);
    system_resident(all);
    uint64_t direct_reads = system_direct_reads();
    CHECK_OK(read_range(&source, &file, 5, 3 * MIB, &counts, &err), &err);
    CHECK(counts.cache == 3 * MIB && system_direct_reads() == direct_reads);
    /* Who does not ask reads directly, resident or not. */
    test_room place = make_room(5, MIB);
    counts = (sllmi_read_counts){0};
    CHECK_OK(sllmi_source_read(&source, 5, MIB, place.target, false, &counts, &err), &err);
    CHECK(counts.disk == MIB && system_direct_reads() > direct_reads);
    end_room(&place);
    sllmi_source_close(&source);
    system_end();
    file_end(&file);
}

static bool but_one_step(uint64_t offset)
{
    return offset / SLLMI_SAMPLE_BYTES != 3;
}

TEST(a_hole_of_a_tenth_is_read_along_and_counted_as_disk)
{
    test_file file = file_make("hole", 20 * MIB, 3);
    sllmi_read_counts counts;
    sllm_error err;
    begin(SIMULATED_DIRECT);
    system_resident(but_one_step);
    sllmi_source source = open_source(&file, SIMULATED_DIRECT);
    CHECK_OK(read_range(&source, &file, 0, 20 * MIB, &counts, &err), &err);
    CHECK(counts.cache == 18 * MIB && counts.disk == 2 * MIB && system_direct_reads() == 0);
    CHECK_OK(read_range(&source, &file, 0, 8 * MIB, &counts, &err), &err);
    CHECK(counts.cache == 0 && counts.disk == 8 * MIB && system_direct_reads() == 1);
    sllmi_source_close(&source);
    system_end();
    file_end(&file);
}

TEST(a_target_that_is_not_congruent_goes_through_the_cache)
{
    test_file file = file_make("skewed", 100000, 4);
    begin(SIMULATED_DIRECT);
    sllmi_source source = open_source(&file, SIMULATED_DIRECT);
    sllmi_read_counts counts = {0};
    sllm_error err;
    char *target = malloc(60000);
    for (uint64_t skew = 1; skew < 4; skew++) {
        char *odd = target + PAGE - (uintptr_t)target % PAGE + skew;
        memset(target, 0x77, 60000);
        CHECK_OK(sllmi_source_read(&source, 4096, 50000, odd, true, &counts, &err), &err);
        file_check(file.seed, 4096, odd, 50000);
        CHECK(odd[-1] == 0x77 && odd[50000] == 0x77); /* and touches nothing around it */
    }
    CHECK_U64(system_direct_reads(), 0);
    free(target);
    sllmi_source_close(&source);
    system_end();
    file_end(&file);
}

TEST(reads_that_give_less_than_asked_are_gone_on_with)
{
    static const uint64_t pieces[] = {511, 512, 4095, 4096, 5000, 12288, 20481};
    test_file file = file_make("short", 70001, 5);
    for (int manner = 0; manner < MANNERS; manner++) {
        for (size_t i = 0; i < sizeof pieces / sizeof pieces[0]; i++) {
            begin((enum manner)manner);
            sllmi_source source = open_source(&file, (enum manner)manner);
            sllmi_read_counts counts;
            sllm_error err;
            bool whole_pages = pieces[i] >= PAGE || manner != REAL_DIRECT;
            system_shorten(0, whole_pages ? pieces[i] : PAGE);
            CHECK_OK(read_range(&source, &file, 0, file.bytes, &counts, &err), &err);
            CHECK_OK(read_range(&source, &file, 777, 60003, &counts, &err), &err);
            CHECK(system_failures() > 5);
            CHECK(!source.direct_refused); /* nothing unaligned was asked for */
            sllmi_source_close(&source);
            system_end();
        }
    }
    file_end(&file);
}

TEST(an_interrupted_read_is_tried_again)
{
    test_file file = file_make("eintr", 50000, 6);
    for (int manner = 0; manner < MANNERS; manner++) {
        begin((enum manner)manner);
        sllmi_source source = open_source(&file, (enum manner)manner);
        sllmi_read_counts counts;
        sllm_error err;
        system_fail(SYSTEM_PREAD, 1, 3, EINTR);
        CHECK_OK(read_range(&source, &file, 100, 40000, &counts, &err), &err);
        CHECK_U64(system_failures(), 3);
        sllmi_source_close(&source);
        system_end();
    }
    file_end(&file);
}

TEST(a_failing_read_names_the_file_and_the_byte)
{
    test_file file = file_make("eio", 50000, 7);
    for (int manner = 0; manner < MANNERS; manner++) {
        begin((enum manner)manner);
        sllmi_source source = open_source(&file, (enum manner)manner);
        sllmi_read_counts counts;
        sllm_error err;
        system_shorten(1, 8192);
        system_fail(SYSTEM_PREAD, 2, 2, EIO);
        sllm_status status = read_range(&source, &file, 4096, 40000, &counts, &err);
        CHECK_STATUS(status, &err, SLLM_E_IO);
        CHECK_U64(err.os_errno, EIO);
        CHECK_TEXT(err.message, file.path);
        CHECK_TEXT(err.message, "at byte 12288");
        CHECK_TEXT(err.message, "EIO");
        sllmi_source_close(&source);
        system_end();
    }
    file_end(&file);
}

TEST(a_file_that_shrank_is_named_with_its_end_and_what_is_missing)
{
    static const struct {
        uint64_t size, offset, bytes;
        const char *end, *missing;
    } cases[] = {
        {8192, 0, 20000, "ends at byte 8192", "11808 bytes more"},
        {8200, 0, 20000, "ends at byte 8200", "11800 bytes more"},
        {8192, 100, 20000, "ends at byte 8192", "11908 bytes more"},
        {8200, 100, 20000, "ends at byte 8200", "11900 bytes more"},
        {8192, 9000, 5000, "ends at byte 9000", "5000 bytes more"},
        {8192, 8192, 5000, "ends at byte 8192", "5000 bytes more"},
        {9000, 8500, 5000, "ends at byte 9000", "4500 bytes more"},
        {8300, 8500, 5000, "ends at byte 8500", "5000 bytes more"},
        {0, 0, 20000, "ends at byte 0", "20000 bytes more"},
        {1, 0, 20000, "ends at byte 1", "19999 bytes more"},
    };
    for (int manner = 0; manner < MANNERS; manner++) {
        for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
            test_file file = file_make("shrunk", 30000, 8);
            begin((enum manner)manner);
            sllmi_source source = open_source(&file, (enum manner)manner);
            CHECK(truncate(file.path, (off_t)cases[i].size) == 0);
            sllmi_read_counts counts;
            sllm_error err;
            sllm_status status =
                read_range(&source, &file, cases[i].offset, cases[i].bytes, &counts, &err);
            CHECK_STATUS(status, &err, SLLM_E_TRUNCATED);
            CHECK_TEXT(err.message, file.path);
            CHECK_TEXT(err.message, cases[i].end);
            CHECK_TEXT(err.message, cases[i].missing);
            CHECK_STATUS(sllmi_source_check(&source, &err), &err, SLLM_E_CHANGED);
            sllmi_source_close(&source);
            system_end();
            file_end(&file);
        }
    }
}

TEST(direct_reads_refused_at_open_are_done_without)
{
    test_file file = file_make("noopen", 50000, 9);
    begin(SIMULATED_DIRECT);
    system_fail(SYSTEM_OPEN, 2, 2, EINVAL); /* the first is for questions */
    sllmi_source source = open_source(&file, SIMULATED_DIRECT);
    sllmi_read_counts counts;
    sllm_error err;
    CHECK_U64(source.direct_fd, -1);
    CHECK_OK(read_range(&source, &file, 3, 40000, &counts, &err), &err);
    CHECK(counts.disk == 40000 && system_direct_reads() == 0);
    sllmi_source_close(&source);
    system_end();
    file_end(&file);
}

TEST(direct_reads_refused_at_the_first_read_or_later_are_not_tried_again)
{
    static const int refusals[] = {EINVAL, EOPNOTSUPP};
    test_file file = file_make("noread", 90000, 10);
    for (size_t i = 0; i < sizeof refusals / sizeof refusals[0]; i++) {
        for (uint64_t nth = 1; nth <= 3; nth++) {
            begin(SIMULATED_DIRECT);
            sllmi_source source = open_source(&file, SIMULATED_DIRECT);
            sllmi_read_counts counts;
            sllm_error err;
            system_shorten(0, 16384);
            system_fail(SYSTEM_PREAD, nth, nth, refusals[i]);
            CHECK_OK(read_range(&source, &file, 50, 80000, &counts, &err), &err);
            CHECK_OK(read_range(&source, &file, 50, 80000, &counts, &err), &err);
            CHECK_U64(system_direct_reads(), nth - 1);
            CHECK(source.direct_refused);
            sllmi_source_close(&source);
            system_end();
        }
    }
    file_end(&file);
}

TEST(a_file_that_is_as_it_was_passes_and_one_that_is_not_is_named)
{
    test_file file = file_make("check", 5000, 11);
    begin(NO_DIRECT);
    sllmi_source source = open_source(&file, NO_DIRECT);
    sllm_error err;
    CHECK_OK(sllmi_source_check(&source, &err), &err);
    const struct timespec then = source.at_open.st_mtim;
    const struct timespec others[] = {{then.tv_sec + 5, then.tv_nsec},
                                      {then.tv_sec, (then.tv_nsec + 1000) % 1000000000}};
    for (int i = 0; i < 2; i++) {
        const struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, others[i]};
        CHECK(utimensat(AT_FDCWD, file.path, times, 0) == 0);
        CHECK_STATUS(sllmi_source_check(&source, &err), &err, SLLM_E_CHANGED);
        CHECK_TEXT(err.message, file.path);
    }
    sllmi_source_close(&source);
    source = open_source(&file, NO_DIRECT);
    CHECK_OK(sllmi_source_check(&source, &err), &err);
    system_fail(SYSTEM_FSTAT, SYSTEM_ALWAYS, ESTALE);
    CHECK_STATUS(sllmi_source_check(&source, &err), &err, SLLM_E_IO);
    CHECK_TEXT(err.message, "ESTALE");
    sllmi_source_close(&source);
    system_end();
    file_end(&file);
}

TEST(a_source_that_half_opened_closes_what_it_has)
{
    test_file file = file_make("half", 5000, 12);
    uint32_t before = open_descriptors();
    static const struct {
        system_call call;
        int error;
        sllm_status status;
    } cases[] = {{SYSTEM_FSTAT, EIO, SLLM_E_IO},
                 {SYSTEM_FSTATFS, ENOSYS, SLLM_E_IO},
                 {SYSTEM_ALLOC, ENOMEM, SLLM_E_NOMEM}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        begin(REAL_DIRECT);
        system_fail(cases[i].call, 1, 1, cases[i].error);
        sllmi_source source;
        sllm_error err;
        sllm_status status = sllmi_source_open(file.fd, file.path, true, &source, &err);
        CHECK_STATUS(status, &err, cases[i].status);
        CHECK_TEXT(err.message, file.path);
        sllmi_source_close(&source);
        system_end();
        CHECK_U64(open_descriptors(), before);
    }
    begin(REAL_DIRECT);
    sllmi_source source = open_source(&file, REAL_DIRECT);
    sllmi_source_close(&source);
    sllmi_source_close(&source);
    system_end();
    CHECK_U64(open_descriptors(), before);
    file_end(&file);
}
