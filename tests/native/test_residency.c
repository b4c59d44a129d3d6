/* Asking the page cache, by each of the ways there are. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "files.h"
#include "io.h"
#include "system.h"

#define MIB (1ull << 20)
#define FILE_BYTES (6 * MIB + 123)

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

static bool even_steps(uint64_t offset)
{
    return offset / SLLMI_SAMPLE_BYTES % 2 == 0;
}

static sllmi_source open_source(const test_file *file)
{
    sllmi_source source;
    sllm_error err;
    CHECK_OK(sllmi_source_open(file->fd, file->path, true, &source, &err), &err);
    return source;
}

static uint64_t resident(sllmi_source *source, uint64_t offset, uint64_t bytes, bool expect_known)
{
    bool known = !expect_known;
    uint64_t answer = sllmi_source_resident(source, offset, bytes, SLLMI_SAMPLE_BYTES, &known);
    CHECK_U64(known, expect_known);
    CHECK(answer <= bytes);
    return answer;
}

/* Leave only the ways from `way` on. */
static void refuse_ways_before(int way)
{
    if (way > SLLMI_RESIDENCY_CACHESTAT) {
        system_fail(SYSTEM_CACHED_PAGES, SYSTEM_ALWAYS, ENOSYS);
    }
    if (way > SLLMI_RESIDENCY_MINCORE) {
        system_fail(SYSTEM_MINCORE, SYSTEM_ALWAYS, ENOMEM);
    }
    if (way > SLLMI_RESIDENCY_NOWAIT) {
        system_fail(SYSTEM_PREAD_NOWAIT, SYSTEM_ALWAYS, EOPNOTSUPP);
    }
}

TEST(a_memory_filesystem_is_resident_without_a_question)
{
    test_file file = file_make("memory", 5 * MIB, 1);
    system_start();
    system_filesystem(SYSTEM_TMPFS);
    sllmi_source source = open_source(&file);
    CHECK_U64(resident(&source, 0, 5 * MIB, true), 5 * MIB);
    CHECK_U64(system_calls(SYSTEM_CACHED_PAGES) + system_calls(SYSTEM_MINCORE) +
                  system_calls(SYSTEM_PREAD_NOWAIT) + system_calls(SYSTEM_OPEN),
              0);
    sllmi_source_close(&source);
    system_end();
    file_end(&file);
}

TEST(each_way_tells_what_is_there_and_steps_down_when_it_is_refused)
{
    test_file file = file_make("ways", FILE_BYTES, 2);
    for (int way = SLLMI_RESIDENCY_CACHESTAT; way < SLLMI_RESIDENCY_UNKNOWN; way++) {
        system_start();
        system_filesystem(SYSTEM_EXT4);
        refuse_ways_before(way);
        sllmi_source source = open_source(&file);
        system_resident(all);
        CHECK_U64(resident(&source, 0, FILE_BYTES, true), FILE_BYTES);
        CHECK_U64(source.residency, way);
        system_resident(none);
        CHECK_U64(resident(&source, 0, FILE_BYTES, true), 0);
        system_resident(even_steps);
        CHECK_U64(resident(&source, 0, FILE_BYTES, true), 4 * MIB);
        CHECK_U64(resident(&source, 1000, 3 * MIB, true), 2 * MIB - 1000);
        CHECK_U64(resident(&source, 77, 0, true), 0);
        CHECK(system_failures() <= 3); /* nobody is asked again who refused */
        sllmi_source_close(&source);
        system_end();
    }
    file_end(&file);
}

TEST(where_every_way_is_refused_the_answer_is_unknown_and_nothing)
{
    test_file file = file_make("unknown", 4 * MIB, 3);
    system_start();
    system_filesystem(SYSTEM_EXT4);
    refuse_ways_before(SLLMI_RESIDENCY_UNKNOWN);
    sllmi_source source = open_source(&file);
    CHECK_U64(resident(&source, 0, 4 * MIB, false), 0);
    CHECK_U64(resident(&source, 0, 4 * MIB, false), 0);
    CHECK_U64(system_failures(), 3);
    CHECK_U64(sllmi_source_resident(&source, 0, 4 * MIB, SLLMI_SAMPLE_BYTES, NULL), 0);
    sllmi_source_close(&source);
    system_end();
    file_end(&file);
}

TEST(a_way_that_is_refused_in_the_middle_hands_over_to_the_next)
{
    test_file file = file_make("middle", FILE_BYTES, 4);
    system_start();
    system_filesystem(SYSTEM_EXT4);
    system_resident(all);
    system_fail(SYSTEM_CACHED_PAGES, 3, UINT64_MAX, EPERM);
    sllmi_source source = open_source(&file);
    CHECK_U64(resident(&source, 0, FILE_BYTES, true), FILE_BYTES);
    CHECK_U64(source.residency, SLLMI_RESIDENCY_MINCORE);
    CHECK_U64(system_failures(), 1);
    sllmi_source_close(&source);
    system_end();
    file_end(&file);
}

TEST(cachestat_is_not_asked_on_overlayfs)
{
    test_file file = file_make("overlay", MIB, 5);
    system_start();
    system_filesystem(SYSTEM_OVERLAYFS);
    system_resident(all);
    sllmi_source source = open_source(&file);
    CHECK_U64(resident(&source, 0, MIB, true), MIB);
    CHECK_U64(system_calls(SYSTEM_CACHED_PAGES), 0);
    CHECK_U64(system_calls(SYSTEM_MINCORE), 1);
    sllmi_source_close(&source);
    system_end();
    file_end(&file);
}

TEST(a_mapping_that_is_refused_is_a_way_refused)
{
    test_file file = file_make("nomap", MIB, 6);
    system_start();
    system_filesystem(SYSTEM_OVERLAYFS);
    system_resident(all);
    system_fail(SYSTEM_MMAP, SYSTEM_ALWAYS, ENODEV);
    sllmi_source source = open_source(&file);
    CHECK_U64(resident(&source, 0, MIB, true), MIB);
    CHECK_U64(source.residency, SLLMI_RESIDENCY_NOWAIT);
    sllmi_source_close(&source);
    system_end();
    file_end(&file);
}

TEST(without_a_descriptor_of_our_own_nobody_asks_by_reading)
{
    test_file file = file_make("noprobe", MIB, 7);
    system_start();
    system_filesystem(SYSTEM_EXT4);
    system_resident(all);
    system_fail(SYSTEM_OPEN, SYSTEM_ALWAYS, EACCES);
    refuse_ways_before(SLLMI_RESIDENCY_NOWAIT);
    sllmi_source source = open_source(&file);
    CHECK_U64(source.probe_fd, -1);
    CHECK_U64(source.direct_fd, -1);
    CHECK_U64(resident(&source, 0, MIB, false), 0);
    CHECK_U64(system_calls(SYSTEM_PREAD_NOWAIT), 0);
    sllmi_source_close(&source);
    system_end();
    file_end(&file);
}

/* As somebody who may read the file and not write it, whoever had the process before. */
static int ask_as_a_stranger(const test_file *file, uid_t real)
{
    if (setresuid(real, 65534, 65534) != 0) {
        return 2;
    }
    system_start();
    system_filesystem(SYSTEM_OVERLAYFS);
    sllmi_source source = open_source(file);
    (void)sllmi_source_resident(&source, 0, MIB, SLLMI_SAMPLE_BYTES, NULL);
    return system_calls(SYSTEM_MINCORE) == 0 ? 0 : 1;
}

TEST(mincore_is_not_believed_about_a_file_of_somebody_else)
{
    if (geteuid() != 0) {
        check_skip("only root can become somebody else");
    }
    test_file file = file_make("stranger", MIB, 8);
    CHECK(fchmod(file.fd, 0444) == 0);
    static const uid_t reals[] = {65534, 0};
    for (int i = 0; i < 2; i++) {
        pid_t child = fork();
        if (child == 0) {
            _exit(ask_as_a_stranger(&file, reals[i]));
        }
        int status = -1;
        CHECK(waitpid(child, &status, 0) == child);
        CHECK_U64(status, 0);
    }
    file_end(&file);
}

/* How much of the file is in the page cache, by the kernel's own word. */
static uint64_t truly_resident(const test_file *file)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (file->bytes + page - 1) / page;
    unsigned char *map = malloc(pages);
    void *view = mmap(NULL, file->bytes, PROT_READ, MAP_SHARED, file->fd, 0);
    CHECK(map != NULL && view != MAP_FAILED && mincore(view, file->bytes, map) == 0);
    uint64_t count = 0;
    for (size_t i = 0; i < pages; i++) {
        count += map[i] & 1;
    }
    munmap(view, file->bytes);
    free(map);
    return count;
}

static void drop(const test_file *file)
{
    int fd = open(file->path, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0 && fsync(fd) == 0);
    CHECK(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
    close(fd);
    if (truly_resident(file) != 0) {
        check_skip("this filesystem keeps its pages");
    }
}

TEST(a_question_to_the_real_page_cache_is_answered_and_reads_nearly_nothing)
{
    test_file file = file_make("real", FILE_BYTES, 9);
    for (int way = SLLMI_RESIDENCY_CACHESTAT; way <= SLLMI_RESIDENCY_UNKNOWN; way++) {
        system_start();
        refuse_ways_before(way);
        sllmi_source source = open_source(&file);
        bool known;
        uint64_t cold;
        int looks = way == SLLMI_RESIDENCY_NOWAIT ? 50 : 1;
        do { /* a look by reading makes newer kernels fetch that one page, in time for the answer */
            drop(&file);
            cold = sllmi_source_resident(&source, 0, FILE_BYTES, SLLMI_SAMPLE_BYTES, &known);
        } while (cold != 0 && --looks > 0);
        CHECK_U64(cold, 0);
        CHECK(truly_resident(&file) <= (way == SLLMI_RESIDENCY_NOWAIT ? 4 : 0));
        CHECK(known || way > SLLMI_RESIDENCY_MINCORE); /* an old kernel lacks the last two */
        char *copy = malloc(FILE_BYTES);
        CHECK_U64(pread(file.fd, copy, FILE_BYTES, 0), FILE_BYTES);
        free(copy);
        uint64_t warm = sllmi_source_resident(&source, 0, FILE_BYTES, SLLMI_SAMPLE_BYTES, &known);
        CHECK_U64(warm, known ? FILE_BYTES : 0);
        sllmi_source_close(&source);
        system_end();
    }
    file_end(&file);
}

static bool left_behind[1 << 16]; /* pages that a question has brought in */

static ssize_t look_and_leave(int fd, void *buffer, size_t bytes, off_t offset)
{
    (void)fd, (void)buffer, (void)bytes;
    bool there = left_behind[offset / 4096];
    left_behind[offset / 4096] = true;
    errno = EAGAIN;
    return there ? 1 : -1;
}

TEST(a_question_that_brings_its_page_in_does_not_answer_the_next_one)
{
    test_file file = file_make("again", MIB, 12);
    system_start();
    system_filesystem(SYSTEM_EXT4);
    refuse_ways_before(SLLMI_RESIDENCY_NOWAIT);
    sllmi_sys.pread_nowait = look_and_leave;
    for (int i = 0; i < 3; i++) {
        sllmi_source source = open_source(&file);
        CHECK(resident(&source, 0, 256 * MIB, true) < 32 * MIB);
        sllmi_source_close(&source);
    }
    system_end();
    file_end(&file);
}

TEST(a_probe_tells_size_place_and_residency)
{
    test_file file = file_make("probe", FILE_BYTES, 10);
    sllm_file_facts facts;
    sllm_error err;
    system_start();
    system_filesystem(SYSTEM_EXT4);
    system_resident(all);
    CHECK_OK(sllm_file_probe(file.fd, file.path, 0, FILE_BYTES, &facts, &err), &err);
    CHECK_U64(facts.size_bytes, FILE_BYTES);
    CHECK_U64(facts.resident_bytes, FILE_BYTES);
    CHECK(facts.local == 1 && facts.residency_known == 1);
    CHECK_OK(sllm_file_probe(file.fd, file.path, MIB, INT64_MAX / 2, &facts, &err), &err);
    CHECK_U64(facts.resident_bytes, FILE_BYTES - MIB);
    CHECK_OK(sllm_file_probe(file.fd, file.path, FILE_BYTES + 7, 9, &facts, &err), &err);
    CHECK_U64(facts.resident_bytes, 0);
    system_filesystem(SYSTEM_NFS);
    CHECK_OK(sllm_file_probe(file.fd, file.path, 0, FILE_BYTES, &facts, &err), &err);
    CHECK_U64(facts.local, 0);
    refuse_ways_before(SLLMI_RESIDENCY_UNKNOWN);
    CHECK_OK(sllm_file_probe(file.fd, file.path, 0, FILE_BYTES, &facts, &err), &err);
    CHECK(facts.residency_known == 0 && facts.resident_bytes == 0);
    system_end();
    file_end(&file);
}

TEST(an_empty_file_can_be_probed)
{
    test_file file = file_make("empty", 0, 11);
    sllm_file_facts facts;
    sllm_error err;
    CHECK_OK(sllm_file_probe(file.fd, file.path, 0, 100, &facts, &err), &err);
    CHECK_U64(facts.size_bytes + facts.resident_bytes, 0);
    file_end(&file);
}

TEST(what_is_no_file_is_refused_by_name)
{
    sllm_file_facts facts;
    sllm_error err;
    int ends[2];
    CHECK(pipe(ends) == 0);
    CHECK_STATUS(sllm_file_probe(ends[0], "/a pipe", 0, 1, &facts, &err), &err, SLLM_E_INVALID);
    CHECK_TEXT(err.message, "/a pipe");
    close(ends[0]);
    close(ends[1]);
    CHECK_STATUS(sllm_file_probe(-1, "/gone", 0, 1, &facts, &err), &err, SLLM_E_IO);
    CHECK_U64(err.os_errno, EBADF);
    CHECK_TEXT(err.message, "/gone");
    CHECK_TEXT(err.message, "EBADF");
    CHECK_STATUS(sllm_file_probe(0, NULL, 0, 1, &facts, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_file_probe(0, "x", 0, 1, NULL, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_file_probe(0, "x", UINT64_MAX, 1, &facts, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_file_probe(0, "x", 0, UINT64_MAX, &facts, &err), &err, SLLM_E_INVALID);
}
