#define _GNU_SOURCE
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "align.h"
#include "error.h"
#include "os.h"

/* f_type of filesystems that live elsewhere: their page cache is not ours to trust.
 * Source: statfs(2), linux/magic.h. FUSE covers virtiofs, s3fs, JuiceFS and the like. */
static bool is_remote(unsigned long type)
{
    switch (type) {
    case 0x6969UL:     /* NFS */
    case 0x517BUL:     /* SMB */
    case 0xFE534D42UL: /* SMB2 */
    case 0xFF534D42UL: /* CIFS */
    case 0x65735546UL: /* FUSE */
    case 0x01021997UL: /* 9P */
    case 0x00C36400UL: /* Ceph */
    case 0x5346414FUL: /* AFS */
    case 0x6B414653UL: /* kAFS */
    case 0x73757245UL: /* Coda */
    case 0x0BD00BD0UL: /* Lustre */
    case 0x47504653UL: /* GPFS */
    case 0x01161970UL: /* GFS2 */
    case 0x7461636FUL: /* OCFS2 */
    case 0x19830326UL: /* BeeGFS */ return true;
    default: return false;
    }
}

#ifndef MADV_POPULATE_READ /* Source: the kernel's asm-generic/mman-common.h, since 5.14 */
#define MADV_POPULATE_READ 22
#endif

#define ASIDE_BYTES (64u << 10)

#define TMPFS_TYPE 0x01021994UL
#define RAMFS_TYPE 0x858458F6UL
#define OVERLAYFS_TYPE 0x794C7630UL

static bool is_memory(unsigned long type)
{
    return type == TMPFS_TYPE || type == RAMFS_TYPE;
}

/* Our own open file description of somebody's descriptor, or -1. Without /proc, or without the
 * right to open the file anew, the caller's descriptor has to do. */
static int reopen(int fd, int flags)
{
    char link[32];
    (void)snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return sllmi_sys.open(link, O_RDONLY | O_CLOEXEC | flags);
}

sllm_status sllmi_source_open(int fd, const char *path, bool direct, sllmi_source *source,
                              sllm_error *err)
{
    *source = (sllmi_source){.fd = fd, .probe_fd = -1, .direct_fd = -1};
    if (path == NULL) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "a file has no path for messages");
    }
    source->path = sllmi_sys.alloc(strlen(path) + 1);
    if (source->path == NULL) {
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for the name of `%s`", path);
    }
    memcpy(source->path, path, strlen(path) + 1);
    struct statfs filesystem;
    if (sllmi_sys.fstat(fd, &source->at_open) != 0 || sllmi_sys.fstatfs(fd, &filesystem) != 0) {
        int os_errno = errno;
        return sllmi_fail(err, SLLM_E_IO, os_errno, "cannot stat `%s`: %s (%s)", path,
                          strerror(os_errno), sllmi_errno_name(os_errno));
    }
    /* Opened anew below, with this process' own rights: a descriptor that gives its holder no
     * right to read must not become one that does. Source: open(2), O_PATH. */
    int status_flags = fcntl(fd, F_GETFL);
    if (status_flags < 0 || (status_flags & O_PATH) != 0 ||
        (status_flags & O_ACCMODE) == O_WRONLY) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "`%s` is not open for reading", path);
    }
    if (!S_ISREG(source->at_open.st_mode)) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "`%s` is not a regular file", path);
    }
    unsigned long type = (unsigned long)filesystem.f_type & 0xFFFFFFFFUL;
    source->local = !is_remote(type);
    if (is_memory(type)) {
        source->residency = SLLMI_RESIDENCY_ALL;
        return SLLM_OK;
    }
    source->residency =
        type == OVERLAYFS_TYPE ? SLLMI_RESIDENCY_MINCORE : SLLMI_RESIDENCY_CACHESTAT;
    source->probe_fd = reopen(fd, 0);
    if (source->probe_fd >= 0) {
        /* A look at one page must not make the kernel read its neighbours. */
        (void)sllmi_sys.fadvise(source->probe_fd, 0, 0, POSIX_FADV_RANDOM);
    }
    source->direct_fd = direct ? reopen(fd, O_DIRECT) : -1;
    return SLLM_OK;
}

void sllmi_source_close(sllmi_source *source)
{
    if (source->probe_fd >= 0) {
        sllmi_sys.close(source->probe_fd);
    }
    if (source->direct_fd >= 0) {
        sllmi_sys.close(source->direct_fd);
    }
    free(source->path);
    *source = (sllmi_source){.fd = -1, .probe_fd = -1, .direct_fd = -1};
}

static int resident_by_cachestat(const sllmi_source *source, uint64_t offset)
{
    int64_t pages = sllmi_sys.cached_pages(source->fd, offset, SLLM_PAGE_BYTES);
    return pages < 0 ? -1 : pages > 0;
}

static int resident_by_mincore(const sllmi_source *source, uint64_t offset)
{
    /* The kernel answers "all of it" to those who could not find out by writing. Source:
     * can_do_mincore() in mm/mincore.c. */
    char link[32];
    (void)snprintf(link, sizeof link, "/proc/self/fd/%d", source->fd);
    if (source->at_open.st_uid != geteuid() && eaccess(link, W_OK) != 0) {
        return -1;
    }
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *view = sllmi_sys.mmap(NULL, page, PROT_READ, MAP_SHARED, source->fd,
                                (off_t)sllmi_align_down(offset, page));
    if (view == MAP_FAILED) {
        return -1;
    }
    unsigned char resident = 0;
    int rc = sllmi_sys.mincore(view, page, &resident);
    sllmi_sys.munmap(view, page);
    return rc != 0 ? -1 : (resident & 1);
}

static int resident_by_nowait(const sllmi_source *source, uint64_t offset)
{
    char byte;
    if (source->probe_fd < 0) {
        return -1; /* on a descriptor with read-ahead the question itself would read the disk */
    }
    ssize_t got = sllmi_sys.pread_nowait(source->probe_fd, &byte, 1, (off_t)offset);
    if (got < 0) {
        return errno == EAGAIN ? 0 : -1;
    }
    return 1;
}

/* 1, 0, or -1 when nobody can tell. Steps down to the next way for good when one is refused. */
static int is_resident(sllmi_source *source, uint64_t offset)
{
    for (;;) {
        int way = source->residency;
        int answer = -1;
        switch ((sllmi_residency)way) {
        case SLLMI_RESIDENCY_ALL: return 1;
        case SLLMI_RESIDENCY_CACHESTAT: answer = resident_by_cachestat(source, offset); break;
        case SLLMI_RESIDENCY_MINCORE: answer = resident_by_mincore(source, offset); break;
        case SLLMI_RESIDENCY_NOWAIT: answer = resident_by_nowait(source, offset); break;
        case SLLMI_RESIDENCY_UNKNOWN: return -1;
        }
        if (answer >= 0) {
            return answer;
        }
        atomic_compare_exchange_strong(&source->residency, &way, way + 1);
    }
}

uint64_t sllmi_source_resident(sllmi_source *source, uint64_t offset, uint64_t bytes,
                               uint64_t sample_bytes, bool *known_out)
{
    uint64_t resident = 0;
    uint64_t end = offset + bytes;
    bool known = true;
    for (uint64_t at = offset; at < end && known;) {
        uint64_t next = sllmi_min(end, at - at % sample_bytes + sample_bytes);
        /* In the middle half: headers and tails are read for other reasons and stand for nothing.
         * Never twice the same page: a look by reading may leave it in the cache. */
        uint64_t quarter = (next - at) / 4;
        uint64_t spot = at + quarter + sllmi_now_ns() * 0x9E3779B97F4A7C15u % (2 * quarter + 1);
        int answer = is_resident(source, spot);
        known = answer >= 0;
        resident += answer > 0 ? next - at : 0;
        at = next;
    }
    if (known_out != NULL) {
        *known_out = known;
    }
    return known ? resident : 0;
}

static sllm_status fail_read(const sllmi_source *source, uint64_t at, int os_errno, sllm_error *err)
{
    return sllmi_fail(err, SLLM_E_IO, os_errno, "cannot read `%s` at byte %llu: %s (%s)",
                      source->path, (unsigned long long)at, strerror(os_errno),
                      sllmi_errno_name(os_errno));
}

static sllm_status fail_short(const sllmi_source *source, uint64_t at, uint64_t wanted,
                              sllm_error *err)
{
    return sllmi_fail(err, SLLM_E_TRUNCATED, 0,
                      "`%s` ends at byte %llu, and %llu bytes more were expected", source->path,
                      (unsigned long long)at, (unsigned long long)wanted);
}

static sllm_status read_cached(const sllmi_source *source, int fd, uint64_t offset, uint64_t bytes,
                               char *target, sllm_error *err)
{
    uint64_t done = 0;
    while (done < bytes) {
        ssize_t got = sllmi_sys.pread(fd, target + done, bytes - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            return fail_read(source, offset + done, errno, err);
        }
        if (got == 0) {
            return fail_short(source, offset + done, bytes - done, err);
        }
        done += (uint64_t)got;
    }
    return SLLM_OK;
}

/* Read whole pages around the page cache. `done_out` is how far that came, a multiple of the page
 * past the first page's start: less than asked with SLLM_OK means that direct reads are refused
 * here, or that the file's odd end is left for a cached read. */
static sllm_status read_direct(sllmi_source *source, uint64_t offset, uint64_t bytes, char *target,
                               uint64_t *done_out, sllm_error *err)
{
    uint64_t start = sllmi_align_down(offset, SLLM_PAGE_BYTES);
    uint64_t span = sllmi_align_up(offset + bytes, SLLM_PAGE_BYTES) - start;
    uint64_t skew = offset - start;
    char *pages = target - skew;
    uint64_t done = 0;
    while (done < skew + bytes) {
        ssize_t got =
            sllmi_sys.pread(source->direct_fd, pages + done, span - done, (off_t)(start + done));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0 && (errno == EINVAL || errno == EOPNOTSUPP || errno == ENOTSUP)) {
            source->direct_refused = true;
            break;
        }
        if (got < 0) {
            return fail_read(source, start + done, errno, err);
        }
        if (got == 0) {
            uint64_t at = sllmi_max(start + done, offset);
            return fail_short(source, at, offset + bytes - at, err);
        }
        done += (uint64_t)got;
        if (done < skew + bytes && done % SLLM_PAGE_BYTES != 0) {
            /* The file's last page, or a filesystem that gives less: go on in whole pages. */
            uint64_t whole = sllmi_align_down(done, SLLM_PAGE_BYTES);
            if (whole + (uint64_t)got == done) {
                done = whole;
                break;
            }
            done = whole;
        }
    }
    *done_out = done <= skew ? 0 : sllmi_min(done - skew, bytes);
    return SLLM_OK;
}

sllm_status sllmi_source_read(sllmi_source *source, uint64_t offset, uint64_t bytes, char *target,
                              bool ask_cache, sllmi_read_counts *counts, sllm_error *err)
{
    uint64_t done = 0;
    sllm_status status = SLLM_OK;
    uint64_t resident = 0;
    bool direct = source->direct_fd >= 0 && !source->direct_refused &&
                  ((uintptr_t)target - offset) % SLLM_PAGE_BYTES == 0;
    if (ask_cache || !direct) {
        resident = sllmi_source_resident(source, offset, bytes, SLLMI_SAMPLE_BYTES, NULL);
    }
    /* A chunk with a hole or two is still faster through the cache than all of it from the disk. */
    bool cached = resident >= bytes - bytes / 8;
    if (direct && !cached) {
        status = read_direct(source, offset, bytes, target, &done, err);
        counts->disk += done;
        resident = 0;
    }
    if (status == SLLM_OK && done < bytes) {
        int fd = cached && source->probe_fd >= 0 ? source->probe_fd : source->fd;
        status = read_cached(source, fd, offset + done, bytes - done, target + done, err);
        resident = sllmi_min(resident, bytes - done);
        counts->cache += resident;
        counts->disk += bytes - done - resident;
    }
    return status;
}

/* Read for the page cache alone: all of it lands in the same place. */
static sllm_status read_aside(const sllmi_source *source, uint64_t offset, uint64_t bytes,
                              sllm_error *err)
{
    char scratch[ASIDE_BYTES];
    sllm_status status = SLLM_OK;
    for (uint64_t done = 0; status == SLLM_OK && done < bytes; done += ASIDE_BYTES) {
        status = read_cached(source, source->fd, offset + done,
                             sllmi_min(bytes - done, ASIDE_BYTES), scratch, err);
    }
    return status;
}

sllm_status sllmi_source_bring_in(const sllmi_source *source, uint64_t offset, uint64_t bytes,
                                  char *mapped, sllm_error *err)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t skew = (uintptr_t)mapped % page;
    uint64_t span = sllmi_align_up(skew + bytes, page);
    if (sllmi_sys.madvise(mapped - skew, span, MADV_POPULATE_READ) == 0) {
        return SLLM_OK;
    }
    /* Before Linux 5.14; or the disk fails, and a read tells where. */
    return read_aside(source, offset, bytes, err);
}

sllm_status sllmi_source_check(const sllmi_source *source, sllm_error *err)
{
    struct stat now;
    if (sllmi_sys.fstat(source->fd, &now) != 0) {
        int os_errno = errno;
        return sllmi_fail(err, SLLM_E_IO, os_errno, "cannot stat `%s`: %s (%s)", source->path,
                          strerror(os_errno), sllmi_errno_name(os_errno));
    }
    const struct stat *then = &source->at_open;
    if (now.st_size != then->st_size || now.st_mtim.tv_sec != then->st_mtim.tv_sec ||
        now.st_mtim.tv_nsec != then->st_mtim.tv_nsec) {
        return sllmi_fail(err, SLLM_E_CHANGED, 0,
                          "`%s` changed while it was read (from %lld to %lld bytes)", source->path,
                          (long long)then->st_size, (long long)now.st_size);
    }
    return SLLM_OK;
}

sllm_status sllm_file_probe(int fd, const char *path, uint64_t file_offset, uint64_t bytes,
                            sllm_file_facts *facts_out, sllm_error *err)
{
    if (facts_out == NULL || bytes > INT64_MAX / 2 || file_offset > INT64_MAX / 2) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_file_probe: not a range of a file");
    }
    *facts_out = (sllm_file_facts){0};
    sllmi_source source;
    sllm_status status = sllmi_source_open(fd, path, false, &source, err);
    if (status == SLLM_OK) {
        uint64_t size = (uint64_t)source.at_open.st_size;
        uint64_t start = sllmi_min(file_offset, size);
        bool known;
        facts_out->size_bytes = size;
        facts_out->local = source.local;
        bytes = sllmi_min(bytes, size - start);
        uint64_t sample_bytes = sllmi_max(SLLMI_SAMPLE_BYTES, bytes / SLLMI_FILE_SAMPLES);
        facts_out->resident_bytes =
            sllmi_source_resident(&source, start, bytes, sample_bytes, &known);
        facts_out->residency_known = known;
    }
    sllmi_source_close(&source);
    return status;
}
