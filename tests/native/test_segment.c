/* The store's memory: nobody but its creator writes it, and the kernel says who still looks. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#define MIB (1ull << 20)
#define BYTES (4 * MIB)

static sllm_segment *make(void)
{
    sllm_segment *segment;
    sllm_error err;
    sllm_status status = sllm_segment_create(BYTES, &segment, &err);
    if (status == SLLM_E_UNSUPPORTED) {
        check_skip("%s", err.message);
    }
    CHECK_OK(status, &err);
    return segment;
}

static int reader_of(const sllm_segment *segment)
{
    int fd;
    sllm_error err;
    CHECK_OK(sllm_segment_reader(segment, &fd, &err), &err);
    return fd;
}

static bool recyclable(const sllm_segment *segment)
{
    return (sllm_segment_flags(segment) & SLLM_SEGMENT_RECYCLABLE) != 0;
}

TEST(a_reader_can_change_nothing_in_any_way)
{
    sllm_segment *segment = make();
    char *address = sllm_segment_address(segment);
    memset(address, 5, BYTES);
    int fd = reader_of(segment);
    CHECK(mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED);
    void *view = mmap(NULL, BYTES, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(view != MAP_FAILED);
    CHECK(mprotect(view, BYTES, PROT_READ | PROT_WRITE) != 0);
    CHECK(munmap(view, BYTES) == 0);
    CHECK(pwrite(fd, "x", 1, 0) < 0);
    CHECK(ftruncate(fd, 0) != 0);
    CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096) != 0);
    CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) != 0);
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int again = open(link, O_RDWR); /* root may; the seals hold all the same */
    if (again >= 0) {
        CHECK(pwrite(again, "x", 1, 0) < 0);
        CHECK(ftruncate(again, 0) != 0 && ftruncate(again, (off_t)(2 * BYTES)) != 0);
        CHECK(fallocate(again, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096) != 0);
        CHECK(mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, again, 0) == MAP_FAILED);
        close(again);
    }
    struct stat facts;
    CHECK(fstat(fd, &facts) == 0);
    CHECK_U64(facts.st_mode & 0777, 0400);
    for (uint64_t i = 0; i < BYTES; i += 4096) {
        CHECK(address[i] == 5);
    }
    close(fd);
    sllm_segment_destroy(segment);
}

TEST(the_creator_goes_on_writing)
{
    sllm_segment *segment = make();
    char *address = sllm_segment_address(segment);
    int fd = reader_of(segment);
    address[4096] = 3;
    char byte = 0;
    CHECK(pread(fd, &byte, 1, 4096) == 1 && byte == 3);
    close(fd);
    sllm_segment_destroy(segment);
}

TEST(a_descriptor_or_a_mapping_holds_a_segment)
{
    sllm_segment *segment = make();
    if (!recyclable(segment)) {
        CHECK_U64(sllm_segment_held(segment), 1);
        sllm_segment_destroy(segment);
        check_skip("this kernel's leases do not tell who holds a segment");
    }
    CHECK_U64(sllm_segment_held(segment), 0);
    int fd = reader_of(segment);
    CHECK_U64(sllm_segment_held(segment), 1);
    void *view = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, (off_t)MIB);
    CHECK(view != MAP_FAILED);
    close(fd);
    CHECK_U64(sllm_segment_held(segment), 1);
    *(volatile char *)view = 1; /* a private copy still belongs to the mapping */
    CHECK_U64(sllm_segment_held(segment), 1);
    munmap(view, 4096);
    CHECK_U64(sllm_segment_held(segment), 0);
    sllm_segment_destroy(segment);
}

TEST(a_forked_child_that_outlives_its_parent_holds_a_segment)
{
    sllm_segment *segment = make();
    if (!recyclable(segment)) {
        sllm_segment_destroy(segment);
        check_skip("this kernel's leases do not tell who holds a segment");
    }
    int fd = reader_of(segment), to_child[2];
    void *view = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0);
    CHECK(view != MAP_FAILED && pipe(to_child) == 0);
    pid_t child = fork();
    if (child == 0) {
        char byte;
        close(to_child[1]);
        close(fd);
        _exit(read(to_child[0], &byte, 1) == 0 ? 0 : 1); /* until the parent closes its end */
    }
    close(to_child[0]);
    close(fd);
    munmap(view, 4096);
    CHECK_U64(sllm_segment_held(segment), 1);
    close(to_child[1]);
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK_U64(sllm_segment_held(segment), 0);
    sllm_segment_destroy(segment);
}

TEST(a_view_keeps_its_bytes_when_the_segment_ends)
{
    sllm_segment *segment = make();
    memset(sllm_segment_address(segment), 8, BYTES);
    int fd = reader_of(segment);
    char *view = mmap(NULL, BYTES, PROT_READ, MAP_PRIVATE, fd, 0);
    CHECK(view != MAP_FAILED);
    close(fd);
    sllm_segment_destroy(segment);
    CHECK(view[0] == 8 && view[BYTES - 1] == 8);
    munmap(view, BYTES);
}

TEST(prefaulting_supplies_pages_and_refuses_what_lies_outside)
{
    sllm_segment *segment = make();
    sllm_error err;
    unsigned char there[BYTES / 4096];
    CHECK_OK(sllm_segment_prefault(segment, 0, 2 * MIB, &err), &err);
    CHECK_OK(sllm_segment_prefault(segment, 2 * MIB, 2 * MIB, &err), &err);
    CHECK(mincore(sllm_segment_address(segment), BYTES, there) == 0);
    for (size_t i = 0; i < sizeof there; i++) {
        CHECK(there[i] & 1);
    }
    CHECK_STATUS(sllm_segment_prefault(segment, BYTES, 4096, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_segment_prefault(segment, 1, 4096, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_segment_prefault(NULL, 0, 4096, &err), &err, SLLM_E_INVALID);
    sllm_segment_destroy(segment);
}

TEST(a_size_that_is_none_is_refused)
{
    sllm_segment *segment;
    sllm_error err;
    CHECK_STATUS(sllm_segment_create(0, &segment, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_segment_create(MIB, &segment, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_segment_create(BYTES, NULL, &err), &err, SLLM_E_INVALID);
    CHECK(segment == NULL);
    CHECK(sllm_segment_address(NULL) == NULL && sllm_segment_flags(NULL) == 0);
    CHECK_U64(sllm_segment_held(NULL), 1);
    sllm_segment_destroy(NULL);
}
