/* The store's memory: nobody but its creator writes it, and the kernel says who still looks. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "system.h"

#define MIB (1ull << 20)
#define BYTES (4 * MIB)

static sllm_segment *make_as(uint32_t flags)
{
    sllm_segment *segment;
    sllm_error err;
    CHECK_OK(sllm_segment_create(BYTES, flags, &segment, &err), &err);
    return segment;
}

static sllm_segment *make(void)
{
    return make_as(0);
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

/* Fill a segment, and try everything that could change it through a reader's descriptor. */
static void attack(sllm_segment *segment)
{
    sllm_error err;
    char *address = sllm_segment_address(segment);
    memset(address, 5, BYTES);
    CHECK_OK(sllm_segment_complete(segment, &err), &err);
    CHECK_OK(sllm_segment_complete(segment, &err), &err);
    int fd = reader_of(segment);
    CHECK(mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED);
    void *view = mmap(NULL, BYTES, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(view != MAP_FAILED);
    CHECK(mprotect(view, BYTES, PROT_READ | PROT_WRITE) != 0);
    /* What removes pages from a file through its mapping. */
    CHECK(madvise(view, BYTES, MADV_REMOVE) != 0);
    CHECK(munmap(view, BYTES) == 0);
    CHECK(pwrite(fd, "x", 1, 0) < 0);
    CHECK(ftruncate(fd, 0) != 0);
    CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096) != 0);
    CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) != 0);
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int again = open(link, O_RDWR); /* root may open a memfd; the seals hold all the same */
    if (again >= 0) {
        CHECK(pwrite(again, "x", 1, 0) < 0);
        CHECK(ftruncate(again, 0) != 0 && ftruncate(again, (off_t)(2 * BYTES)) != 0);
        CHECK(fallocate(again, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096) != 0);
        CHECK(mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, again, 0) == MAP_FAILED);
        close(again);
    }
    CHECK(open(link, O_RDONLY | O_TRUNC) < 0 || address[0] == 5);
    CHECK(truncate(link, 0) != 0);
    struct stat facts;
    CHECK(fstat(fd, &facts) == 0);
    CHECK_U64((uint64_t)facts.st_size, BYTES);
    CHECK_U64(facts.st_mode & 0777, 0400);
    for (uint64_t i = 0; i < BYTES; i += 4096) {
        CHECK(address[i] == 5);
    }
    close(fd);
}

TEST(a_reader_can_change_nothing_in_any_way)
{
    sllm_segment *segment = make();
    attack(segment);
    sllm_segment_destroy(segment);
}

TEST(a_kernel_without_the_seal_against_future_writers_seals_when_full)
{
    sllm_segment *segment = make_as(SLLM_SEGMENT_SEAL_WHEN_FULL);
    sllm_error err;
    int fd;
    CHECK(!recyclable(segment));
    CHECK_OK(sllm_segment_prefault(segment, 0, BYTES, &err), &err);
    CHECK_STATUS(sllm_segment_reader(segment, &fd, &err), &err, SLLM_E_INVALID);
    attack(segment);
    sllm_segment_destroy(segment);
}

TEST(a_kernel_whose_leases_do_not_tell_recycles_nothing)
{
    sllm_segment *segment = make_as(SLLM_SEGMENT_NO_LEASE);
    CHECK(!recyclable(segment));
    CHECK_U64(sllm_segment_held(segment), 1);
    attack(segment);
    sllm_segment_destroy(segment);
}

/* A tmpfs of our own and a read-only mount of it, as directories; skips without the privilege. */
static void mount_tmpfs(int directories[2])
{
    const char *at = "/tmp";
    unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    if (unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
        mount("tmpfs", at, "tmpfs", flags, "mode=0700,size=64m,huge=always") != 0) {
        check_skip("cannot mount a tmpfs with huge pages here: %s", strerror(errno));
    }
    directories[0] = open(at, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(mount(at, at, NULL, MS_BIND, NULL) == 0);
    CHECK(mount(NULL, at, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | flags, NULL) == 0);
    directories[1] = open(at, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(directories[0] >= 0 && directories[1] >= 0);
}

TEST(a_reader_of_a_tmpfs_with_huge_pages_can_change_nothing_either)
{
    int directories[2];
    mount_tmpfs(directories);
    sllm_segment *segment;
    sllm_error err;
    CHECK_OK(sllm_segment_create_in(directories[0], directories[1], BYTES, &segment, &err), &err);
    attack(segment);
    int fd = reader_of(segment);
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    CHECK(open(link, O_RDWR) < 0 && errno == EROFS);
    CHECK(fchmod(fd, 0600) != 0 && errno == EROFS);
    CHECK(openat(directories[1], "new", O_RDWR | O_CREAT, 0600) < 0 && errno == EROFS);
    /* Neither is the mount made writable through the descriptor: it is not the mount's root. */
    struct {
        uint64_t set, clear, propagation, user_namespace;
    } change = {.clear = 1}; /* MOUNT_ATTR_RDONLY */
    CHECK(syscall(442, fd, "", AT_EMPTY_PATH, &change, sizeof change) != 0);
    CHECK(mount(NULL, link, NULL, MS_REMOUNT | MS_BIND, NULL) != 0);
    CHECK(recyclable(segment) && sllm_segment_held(segment));
    close(fd);
    CHECK_U64(sllm_segment_held(segment), 0);
    sllm_segment_destroy(segment);
}

TEST(a_tmpfs_that_readers_could_write_to_is_refused)
{
    int directories[2];
    mount_tmpfs(directories);
    sllm_segment *segment;
    sllm_error err;
    CHECK_STATUS(sllm_segment_create_in(directories[0], directories[0], BYTES, &segment, &err),
                 &err, SLLM_E_UNSUPPORTED);
    CHECK_STATUS(sllm_segment_create_in(-1, -1, BYTES, &segment, &err), &err, SLLM_E_IO);
    /* What keeps the file from being is said, and not what follows from that. */
    CHECK_STATUS(sllm_segment_create_in(directories[1], directories[0], BYTES, &segment, &err),
                 &err, SLLM_E_IO);
    CHECK_U64(err.os_errno, EROFS);
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

static void check_prefault(void)
{
    sllm_segment *segment = make();
    sllm_error err;
    unsigned char there[BYTES / 4096];
    CHECK_OK(sllm_segment_prefault(segment, 0, 2 * MIB, &err), &err);
    CHECK_OK(sllm_segment_prefault(segment, 2 * MIB, 2 * MIB, &err), &err);
    CHECK_OK(sllm_segment_prefault(segment, BYTES, 0, &err), &err);
    CHECK(mincore(sllm_segment_address(segment), BYTES, there) == 0);
    for (size_t i = 0; i < sizeof there; i++) {
        CHECK(there[i] & 1);
    }
    CHECK_STATUS(sllm_segment_prefault(segment, BYTES, 4096, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_segment_prefault(segment, 1, 4096, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_segment_prefault(NULL, 0, 4096, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_segment_complete(NULL, &err), &err, SLLM_E_INVALID);
    sllm_segment_destroy(segment);
}

static void before_linux_5_14(void)
{
    system_start();
    system_fail(SYSTEM_MADVISE, SYSTEM_ALWAYS, EINVAL);
}

TEST(prefaulting_supplies_pages_and_refuses_what_lies_outside)
{
    check_prefault();
    before_linux_5_14();
    check_prefault();
    system_end();
}

TEST(pages_that_cannot_be_had_are_an_error_and_no_signal)
{
    int directories[2];
    mount_tmpfs(directories); /* of 64 MiB */
    for (int old = 0; old < 2; old++) {
        sllm_segment *segment;
        sllm_error err;
        CHECK_OK(sllm_segment_create_in(directories[0], directories[1], 128 * MIB, &segment, &err),
                 &err);
        if (old) {
            before_linux_5_14();
        }
        CHECK_STATUS(sllm_segment_prefault(segment, 0, 128 * MIB, &err), &err, SLLM_E_NOMEM);
        if (old) {
            CHECK_U64(err.os_errno, ENOSPC);
            system_end();
        }
        sllm_segment_destroy(segment);
    }
}

/* Bytes that this process has locked. */
static uint64_t locked_bytes(void)
{
    char line[256];
    unsigned long kib = 0;
    FILE *status = fopen("/proc/self/status", "re");
    CHECK(status != NULL);
    while (fgets(line, sizeof line, status) != NULL) {
        if (sscanf(line, "VmLck: %lu", &kib) == 1) {
            break;
        }
    }
    fclose(status);
    return kib * 1024;
}

TEST(a_segment_is_locked_where_the_limit_allows)
{
    for (int with_seal = 0; with_seal < 2; with_seal++) {
        sllm_segment *segment = make_as(with_seal ? 0 : SLLM_SEGMENT_SEAL_WHEN_FULL);
        sllm_error err;
        bool locked = (sllm_segment_flags(segment) & SLLM_SEGMENT_LOCKED) != 0;
        CHECK_U64(locked_bytes(), locked ? BYTES : 0);
        CHECK_OK(sllm_segment_complete(segment, &err), &err);
        CHECK_U64(locked_bytes(), locked ? BYTES : 0);
        struct rlimit limit = {0};
        if (getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur >= 2 * BYTES) {
            CHECK(locked);
        }
        sllm_segment_destroy(segment);
        CHECK_U64(locked_bytes(), 0);
    }
}

TEST(a_size_that_is_none_is_refused)
{
    sllm_segment *segment;
    sllm_error err;
    CHECK_STATUS(sllm_segment_create(0, 0, &segment, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_segment_create(MIB, 0, &segment, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_segment_create(BYTES, 0, NULL, &err), &err, SLLM_E_INVALID);
    CHECK(segment == NULL);
    CHECK(sllm_segment_address(NULL) == NULL && sllm_segment_flags(NULL) == 0);
    CHECK_U64(sllm_segment_held(NULL), 1);
    sllm_segment_destroy(NULL);
}
