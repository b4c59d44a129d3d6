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
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008u /* Linux 6.3 */
#endif

#define SEGMENT_ALIGN_BYTES (2u << 20)

struct sllm_segment {
    int fd;       /* the creator's, mapped for writing */
    int lease_fd; /* a second read-write description, to ask who else has one; or -1 */
    char *address;
    uint64_t bytes;
    atomic_bool unlockable; /* the process may lock no more memory */
    _Atomic uint64_t locked_bytes;
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

/* Whether this kernel's leases tell a held segment from a free one, tried on the segment itself. */
static bool lease_tells(const sllm_segment *segment)
{
    if (segment->lease_fd < 0 || somebody_holds(segment->lease_fd)) {
        return false;
    }
    int reader = reopen(segment->fd, O_RDONLY);
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

static sllm_status open_segment(sllm_segment *segment, sllm_error *err)
{
    segment->fd = memfd_create("sllm-segment", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (segment->fd < 0 && errno == EINVAL) {
        segment->fd = memfd_create("sllm-segment", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    }
    if (segment->fd < 0 || ftruncate(segment->fd, (off_t)segment->bytes) != 0) {
        int os_errno = errno;
        return sllmi_fail(err, SLLM_E_NOMEM, os_errno, "cannot make a segment of %llu bytes: %s",
                          (unsigned long long)segment->bytes, strerror(os_errno));
    }
    void *mapped =
        sllmi_sys.mmap(NULL, segment->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, segment->fd, 0);
    if (mapped == MAP_FAILED) {
        int os_errno = errno;
        return sllmi_fail(err, SLLM_E_NOMEM, os_errno, "cannot map a segment of %llu bytes: %s",
                          (unsigned long long)segment->bytes, strerror(os_errno));
    }
    segment->address = mapped;
    (void)sllmi_sys.madvise(mapped, segment->bytes, MADV_HUGEPAGE);
    segment->lease_fd = reopen(segment->fd, O_RDWR);
    (void)fchmod(segment->fd, 0400);
    int seals = F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    if (fcntl(segment->fd, F_ADD_SEALS, seals) != 0) {
        int os_errno = errno;
        return sllmi_fail(err, SLLM_E_UNSUPPORTED, os_errno,
                          "this kernel cannot seal memory against writers (it takes Linux 5.1)");
    }
    if (!lease_tells(segment) && segment->lease_fd >= 0) {
        sllmi_sys.close(segment->lease_fd);
        segment->lease_fd = -1;
    }
    return SLLM_OK;
}

sllm_status sllm_segment_create(uint64_t bytes, sllm_segment **segment_out, sllm_error *err)
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
    segment->fd = -1;
    segment->lease_fd = -1;
    segment->bytes = bytes;
    sllm_status status = open_segment(segment, err);
    if (status != SLLM_OK) {
        sllm_segment_destroy(segment);
        return status;
    }
    *segment_out = segment;
    return SLLM_OK;
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
    return (segment->lease_fd >= 0 ? SLLM_SEGMENT_RECYCLABLE : 0) |
           (segment->locked_bytes >= segment->bytes ? SLLM_SEGMENT_LOCKED : 0);
}

sllm_status sllm_segment_prefault(sllm_segment *segment, uint64_t offset, uint64_t bytes,
                                  sllm_error *err)
{
    if (segment == NULL || offset > segment->bytes || bytes > segment->bytes - offset ||
        offset % SLLM_PAGE_BYTES != 0 || bytes % SLLM_PAGE_BYTES != 0) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_segment_prefault: range outside a segment");
    }
    char *start = segment->address + offset;
    if (sllmi_sys.madvise(start, bytes, MADV_POPULATE_WRITE) != 0) {
        if (errno != EINVAL) {
            int os_errno = errno;
            return sllmi_fail(err, SLLM_E_NOMEM, os_errno,
                              "cannot supply %llu bytes of a segment: %s",
                              (unsigned long long)bytes, strerror(os_errno));
        }
        /* Before Linux 5.14: write what is there already. Nobody else writes to a free segment. */
        for (uint64_t at = 0; at < bytes; at += SLLM_PAGE_BYTES) {
            volatile char *byte = start + at;
            *byte = *byte;
        }
    }
    if (!segment->unlockable) {
        if (mlock(start, bytes) == 0) {
            segment->locked_bytes += bytes;
        } else {
            segment->unlockable = true;
        }
    }
    return SLLM_OK;
}

sllm_status sllm_segment_reader(const sllm_segment *segment, int *fd_out, sllm_error *err)
{
    if (segment == NULL || fd_out == NULL) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_segment_reader: a NULL argument");
    }
    *fd_out = reopen(segment->fd, O_RDONLY);
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
    if (segment->lease_fd >= 0) {
        sllmi_sys.close(segment->lease_fd);
    }
    if (segment->fd >= 0) {
        sllmi_sys.close(segment->fd);
    }
    free(segment);
}
