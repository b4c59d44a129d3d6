/* The store's memory: files in memory that only their creator can write. */
#define _GNU_SOURCE
#include "sllm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "align.h"
#include "error.h"
#include "os.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010 /* Linux 5.1 */
#endif
#ifndef MPOL_INTERLEAVE /* linux/mempolicy.h, which not every libc brings */
#define MPOL_INTERLEAVE 3
#define MPOL_F_MEMS_ALLOWED 4
#endif
#ifndef MLOCK_ONFAULT
#define MLOCK_ONFAULT 1u /* Linux 4.4 */
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008u /* Linux 6.3 */
#endif

#define SEGMENT_ALIGN_BYTES (2u << 20)

struct sllm_segment {
    int fd;       /* the creator's, mapped for writing */
    int open_fd;  /* what a reader's descriptor is opened from: `fd`, or one of a read-only mount */
    int lease_fd; /* the description of `fd` that counts as open for writing, to ask who else has
                     one: its own of a memfd, `fd` of a file; or -1 */
    char *address;
    uint64_t bytes;
    uint32_t flags;        /* of creation */
    bool sealed_when_full; /* the kernel cannot seal against future writers alone */
    atomic_bool complete;  /* and it is full */
    bool locked;
};

static int reopen(int fd, int flags)
{
    char link[32];
    (void)snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return sllmi_sys.open(link, O_CLOEXEC | flags);
}

static bool somebody_holds(int lease_fd)
{
    /* A write lease is granted only while nobody else has the file open or mapped.
     * Source: fcntl(2), F_SETLEASE; check_conflicting_open() in fs/locks.c. */
    if (fcntl(lease_fd, F_SETLEASE, F_WRLCK) != 0) {
        return true;
    }
    (void)fcntl(lease_fd, F_SETLEASE, F_UNLCK);
    return false;
}

static void forget_lease(sllm_segment *segment)
{
    if (segment->lease_fd >= 0 && segment->lease_fd != segment->fd) {
        sllmi_sys.close(segment->lease_fd);
    }
    segment->lease_fd = -1;
}

/* Whether this kernel's leases tell a held segment from a free one, tried on the segment itself. */
static bool lease_tells(const sllm_segment *segment)
{
    if (segment->lease_fd < 0 || somebody_holds(segment->lease_fd)) {
        return false;
    }
    int reader = reopen(segment->open_fd, O_RDONLY);
    if (reader < 0) {
        return false;
    }
    void *view = mmap(NULL, SLLM_PAGE_BYTES, PROT_READ, MAP_PRIVATE, reader, 0);
    bool told = somebody_holds(segment->lease_fd);
    sllmi_sys.close(reader);
    bool told_of_view = view != MAP_FAILED && somebody_holds(segment->lease_fd);
    if (view != MAP_FAILED) {
        munmap(view, SLLM_PAGE_BYTES);
    }
    return told && told_of_view && !somebody_holds(segment->lease_fd);
}

/* Lock the pages that are there, and each further one when it is supplied, where we may. */
static void lock(sllm_segment *segment)
{
#ifdef SYS_mlock2
    segment->locked = syscall(SYS_mlock2, segment->address, segment->bytes, MLOCK_ONFAULT) == 0;
#endif
}

/* Spread the pages over the memory nodes, whoever supplies them: what reads them is on all nodes. A
 * kernel or container without NUMA calls leaves them where they are. Source: mbind(2). */
static void interleave(const sllm_segment *segment)
{
#if defined(SYS_mbind) && defined(SYS_get_mempolicy)
    unsigned long nodes[1024 / (8 * sizeof(unsigned long))]; /* the most a kernel has */
    const unsigned long count = 8 * sizeof nodes;
    if (syscall(SYS_get_mempolicy, NULL, nodes, count, NULL, MPOL_F_MEMS_ALLOWED) == 0) {
        (void)syscall(SYS_mbind, segment->address, segment->bytes, MPOL_INTERLEAVE, nodes, count,
                      0);
    }
#endif
}

/* Map the creator's view, where the kernel can use huge pages for it. */
static sllm_status map_segment(sllm_segment *segment, sllm_error *err)
{
    char *reserved = sllmi_sys.mmap(NULL, segment->bytes + SEGMENT_ALIGN_BYTES, PROT_NONE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ftruncate(segment->fd, (off_t)segment->bytes) == 0 && reserved != MAP_FAILED) {
        char *start = (char *)sllmi_align_up((uintptr_t)reserved, SEGMENT_ALIGN_BYTES);
        char *end = reserved + segment->bytes + SEGMENT_ALIGN_BYTES;
        if (start > reserved) {
            sllmi_sys.munmap(reserved, (size_t)(start - reserved));
        }
        if (end > start + segment->bytes) {
            sllmi_sys.munmap(start + segment->bytes, (size_t)(end - start) - segment->bytes);
        }
        segment->address = start;
        if (sllmi_sys.mmap(start, segment->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                           segment->fd, 0) != MAP_FAILED) {
            (void)sllmi_sys.madvise(start, segment->bytes, MADV_HUGEPAGE);
            interleave(segment);
            lock(segment);
            return SLLM_OK;
        }
    }
    int os_errno = errno;
    if (reserved != MAP_FAILED && segment->address == NULL) {
        sllmi_sys.munmap(reserved, segment->bytes + SEGMENT_ALIGN_BYTES);
    }
    return sllmi_fail(err, SLLM_E_NOMEM, os_errno, "cannot make a segment of %llu bytes: %s",
                      (unsigned long long)segment->bytes, strerror(os_errno));
}

static sllm_status open_memfd(sllm_segment *segment, sllm_error *err)
{
    segment->fd = memfd_create("sllm-segment", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (segment->fd < 0 && errno == EINVAL) {
        segment->fd = memfd_create("sllm-segment", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    }
    if (segment->fd < 0) {
        int os_errno = errno;
        return sllmi_fail(err, SLLM_E_NOMEM, os_errno, "cannot make a file in memory: %s",
                          strerror(os_errno));
    }
    segment->open_fd = segment->fd;
    sllm_status status = map_segment(segment, err);
    if (status != SLLM_OK) {
        return status;
    }
    segment->lease_fd = reopen(segment->fd, O_RDWR);
    (void)fchmod(segment->fd, 0400);
    int seals = F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    segment->sealed_when_full = (segment->flags & SLLM_SEGMENT_SEAL_WHEN_FULL) != 0 ||
                                fcntl(segment->fd, F_ADD_SEALS, seals) != 0;
    return SLLM_OK;
}

static sllm_status open_files(sllm_segment *segment, int writable_dir, int readable_dir,
                              sllm_error *err)
{
    static atomic_uint count;
    char name[40];
    (void)snprintf(name, sizeof name, "segment-%ld-%u", (long)getpid(),
                   atomic_fetch_add(&count, 1));
    segment->fd = openat(writable_dir, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0400);
    int os_errno = errno;
    if (segment->fd >= 0) {
        /* O_PATH does not count as open: it holds no lease back. */
        segment->open_fd = openat(readable_dir, name, O_PATH | O_CLOEXEC);
        os_errno = errno;
        (void)unlinkat(writable_dir, name, 0);
    }
    if (segment->open_fd < 0) {
        return sllmi_fail(err, SLLM_E_IO, os_errno, "cannot make a file for a segment: %s (%s)",
                          strerror(os_errno), sllmi_errno_name(os_errno));
    }
    int writable = reopen(segment->open_fd, O_RDWR);
    if (writable >= 0) {
        sllmi_sys.close(writable);
        return sllmi_fail(err, SLLM_E_UNSUPPORTED, 0,
                          "the directory that readers open segments from is not read-only");
    }
    segment->lease_fd = segment->fd;
    return map_segment(segment, err);
}

static sllm_status create(uint64_t bytes, uint32_t flags, const int directories[2],
                          sllm_segment **segment_out, sllm_error *err)
{
    if (segment_out == NULL) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_segment_create: segment_out is NULL");
    }
    *segment_out = NULL;
    if (bytes == 0 || bytes % SEGMENT_ALIGN_BYTES != 0 || bytes > INT64_MAX / 2) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "a segment of %llu bytes is no multiple of %u",
                          (unsigned long long)bytes, SEGMENT_ALIGN_BYTES);
    }
    sllm_segment *segment = sllmi_sys.alloc(sizeof *segment);
    if (segment == NULL) {
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for a segment's handle");
    }
    segment->fd = segment->open_fd = segment->lease_fd = -1;
    segment->bytes = bytes;
    segment->flags = flags;
    sllm_status status = directories == NULL
                             ? open_memfd(segment, err)
                             : open_files(segment, directories[0], directories[1], err);
    if (status != SLLM_OK) {
        sllm_segment_destroy(segment);
        return status;
    }
    if ((flags & SLLM_SEGMENT_NO_LEASE) != 0 || !lease_tells(segment)) {
        forget_lease(segment);
    }
    *segment_out = segment;
    return SLLM_OK;
}

sllm_status sllm_segment_create(uint64_t bytes, uint32_t flags, sllm_segment **segment_out,
                                sllm_error *err)
{
    return create(bytes, flags, NULL, segment_out, err);
}

sllm_status sllm_segment_create_in(int writable_dir, int readable_dir, uint64_t bytes,
                                   sllm_segment **segment_out, sllm_error *err)
{
    return create(bytes, 0, (int[]){writable_dir, readable_dir}, segment_out, err);
}

void *sllm_segment_address(const sllm_segment *segment)
{
    return segment == NULL ? NULL : segment->address;
}

uint32_t sllm_segment_flags(const sllm_segment *segment)
{
    if (segment == NULL) {
        return 0;
    }
    bool recyclable = segment->lease_fd >= 0 && !segment->sealed_when_full;
    return (recyclable ? SLLM_SEGMENT_RECYCLABLE : 0) | (segment->locked ? SLLM_SEGMENT_LOCKED : 0);
}

/* Supply pages one by one. First the file gets them: a write to one that cannot be had is SIGBUS. */
static int touch(int fd, char *start, uint64_t offset, uint64_t bytes)
{
    int os_errno;
    do {
        os_errno = posix_fallocate(fd, (off_t)offset, (off_t)bytes);
    } while (os_errno == EINTR);
    for (uint64_t at = 0; os_errno == 0 && at < bytes; at += SLLM_PAGE_BYTES) {
        volatile char *byte = start + at; /* nobody else writes to a free segment */
        *byte = *byte;
    }
    return os_errno;
}

sllm_status sllm_segment_prefault(sllm_segment *segment, uint64_t offset, uint64_t bytes,
                                  sllm_error *err)
{
    if (segment == NULL || offset > segment->bytes || bytes > segment->bytes - offset ||
        offset % SLLM_PAGE_BYTES != 0 || bytes % SLLM_PAGE_BYTES != 0) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_segment_prefault: range outside a segment");
    }
    char *start = segment->address + offset;
    int os_errno = 0;
    if (bytes > 0 && sllmi_sys.madvise(start, bytes, MADV_POPULATE_WRITE) != 0) {
        os_errno = errno;
    }
    if (os_errno == EINVAL) { /* before Linux 5.14 */
        os_errno = touch(segment->fd, start, offset, bytes);
    }
    return os_errno == 0 ? SLLM_OK
                         : sllmi_fail(err, SLLM_E_NOMEM, os_errno,
                                      "cannot supply %llu bytes of a segment: %s",
                                      (unsigned long long)bytes, strerror(os_errno));
}

sllm_status sllm_segment_complete(sllm_segment *segment, sllm_error *err)
{
    if (segment == NULL) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_segment_complete: no segment");
    }
    if (!segment->sealed_when_full || segment->complete) {
        segment->complete = true;
        return SLLM_OK;
    }
    forget_lease(segment);
    int reader = reopen(segment->fd, O_RDONLY);
    /* A shared view of a read-only description can never be made writable, and does not stand in
     * the seal's way as the creator's did, in whose place it is put. */
    bool done = reader >= 0 && sllmi_sys.mmap(segment->address, segment->bytes, PROT_READ,
                                              MAP_SHARED | MAP_FIXED, reader, 0) != MAP_FAILED;
    int seals = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    done = done && fcntl(segment->fd, F_ADD_SEALS, seals) == 0;
    int os_errno = errno;
    if (reader >= 0) {
        sllmi_sys.close(reader);
    }
    if (!done) {
        return sllmi_fail(err, SLLM_E_UNSUPPORTED, os_errno,
                          "this kernel cannot seal memory against writers: %s", strerror(os_errno));
    }
    lock(segment); /* anew: the first lock was the first view's */
    segment->complete = true;
    return SLLM_OK;
}

sllm_status sllm_segment_reader(const sllm_segment *segment, int *fd_out, sllm_error *err)
{
    if (segment == NULL || fd_out == NULL || (segment->sealed_when_full && !segment->complete)) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_segment_reader: no complete segment");
    }
    *fd_out = reopen(segment->open_fd, O_RDONLY);
    if (*fd_out < 0) {
        int os_errno = errno;
        return sllmi_fail(err, SLLM_E_IO, os_errno, "cannot open a segment for a reader: %s (%s)",
                          strerror(os_errno), sllmi_errno_name(os_errno));
    }
    return SLLM_OK;
}

int sllm_segment_held(const sllm_segment *segment)
{
    return segment == NULL || segment->lease_fd < 0 || somebody_holds(segment->lease_fd);
}

void sllm_segment_destroy(sllm_segment *segment)
{
    if (segment == NULL) {
        return;
    }
    if (segment->address != NULL) {
        sllmi_sys.munmap(segment->address, segment->bytes);
    }
    forget_lease(segment);
    if (segment->open_fd >= 0 && segment->open_fd != segment->fd) {
        sllmi_sys.close(segment->open_fd);
    }
    if (segment->fd >= 0) {
        sllmi_sys.close(segment->fd);
    }
    free(segment);
}
