#define _GNU_SOURCE
#include "system.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

#define MAX_FDS 1024
#define PAGE 4096u

const char *const system_call_names[SYSTEM_CALLS] = {
    "open",         "close",        "fstat",         "fstatfs", "fadvise", "pread",
    "pread_nowait", "cached_pages", "mmap",          "munmap",  "madvise", "mprotect",
    "mincore",      "huge_bytes",   "thread_create", "alloc",   "dlopen",  "dlsym"};

static sllmi_os real;
static _Atomic uint64_t calls[SYSTEM_CALLS];
static _Atomic uint64_t failures, direct_reads, cached_reads;
static atomic_bool is_direct[MAX_FDS];
static struct {
    struct {
        uint64_t first, last;
        int error;
    } faults[SYSTEM_CALLS];
    bool shorten, simulate_direct;
    uint64_t short_nth, short_bytes;
    unsigned long filesystem;
    bool (*resident)(uint64_t offset);
} rule;

/* Count a call; true, with errno set, when it is one that fails. */
static bool fails_at(system_call call, uint64_t *number_out)
{
    uint64_t number = ++calls[call];
    *number_out = number;
    int error = rule.faults[call].error;
    if (error == 0 || number < rule.faults[call].first || number > rule.faults[call].last) {
        return false;
    }
    failures++;
    errno = error;
    return true;
}

static bool fails(system_call call)
{
    uint64_t number;
    return fails_at(call, &number);
}

static int test_open(const char *path, int flags)
{
    if (fails(SYSTEM_OPEN)) {
        return -1;
    }
    bool direct = (flags & O_DIRECT) != 0;
    int fd = real.open(path, rule.simulate_direct ? flags & ~O_DIRECT : flags);
    if (fd >= 0) {
        CHECK(fd < MAX_FDS);
        is_direct[fd] = direct;
    }
    return fd;
}

static int test_close(int fd)
{
    calls[SYSTEM_CLOSE]++;
    CHECK(fd >= 0 && fd < MAX_FDS);
    is_direct[fd] = false;
    int rc = real.close(fd);
    CHECK(rc == 0); /* else somebody's descriptor was closed twice */
    return rc;
}

static int test_fstat(int fd, struct stat *out)
{
    return fails(SYSTEM_FSTAT) ? -1 : real.fstat(fd, out);
}

static int test_fstatfs(int fd, struct statfs *out)
{
    if (fails(SYSTEM_FSTATFS)) {
        return -1;
    }
    int rc = real.fstatfs(fd, out);
    if (rule.filesystem != 0) {
        memcpy(&out->f_type, &rule.filesystem, sizeof out->f_type);
    }
    return rc;
}

static int test_fadvise(int fd, off_t offset, off_t bytes, int advice)
{
    return fails(SYSTEM_FADVISE) ? errno : real.fadvise(fd, offset, bytes, advice);
}

static ssize_t test_pread(int fd, void *buffer, size_t bytes, off_t offset)
{
    uint64_t number;
    if (fails_at(SYSTEM_PREAD, &number)) {
        return -1;
    }
    bool direct = system_is_direct(fd);
    atomic_fetch_add(direct ? &direct_reads : &cached_reads, 1);
    if (direct && ((uintptr_t)buffer | bytes | (uint64_t)offset) % PAGE != 0) {
        errno = EINVAL;
        return -1;
    }
    if (rule.shorten && (rule.short_nth == 0 || rule.short_nth == number)) {
        failures++;
        bytes = bytes < rule.short_bytes ? bytes : rule.short_bytes;
        if (direct && !rule.simulate_direct && bytes % PAGE != 0) {
            bytes -= bytes % PAGE; /* a real one would refuse */
        }
        if (bytes == 0) {
            return 0;
        }
    }
    return real.pread(fd, buffer, bytes, offset);
}

static ssize_t test_pread_nowait(int fd, void *buffer, size_t bytes, off_t offset)
{
    if (fails(SYSTEM_PREAD_NOWAIT)) {
        return -1;
    }
    if (rule.resident != NULL) {
        errno = EAGAIN;
        return rule.resident((uint64_t)offset) ? (ssize_t)bytes : -1;
    }
    return real.pread_nowait(fd, buffer, bytes, offset);
}

static int64_t test_cached_pages(int fd, uint64_t offset, uint64_t bytes)
{
    if (fails(SYSTEM_CACHED_PAGES)) {
        return -1;
    }
    return rule.resident != NULL ? rule.resident(offset) : real.cached_pages(fd, offset, bytes);
}

static _Atomic uint64_t mapped_offset; /* of the last mapping: what mincore is asked about */
static _Atomic uint64_t mapped_bytes;

static void *test_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    if (fails(SYSTEM_MMAP)) {
        return MAP_FAILED;
    }
    mapped_offset = (uint64_t)offset;
    void *mapped = real.mmap(address, bytes, protection, flags, fd, offset);
    if (mapped != MAP_FAILED && (flags & MAP_FIXED) == 0) {
        mapped_bytes += bytes;
    }
    return mapped;
}

static int test_munmap(void *address, size_t bytes)
{
    calls[SYSTEM_MUNMAP]++;
    int rc = real.munmap(address, bytes);
    CHECK(rc == 0);
    mapped_bytes -= bytes;
    return rc;
}

static int test_madvise(void *address, size_t bytes, int advice)
{
    return fails(SYSTEM_MADVISE) ? -1 : real.madvise(address, bytes, advice);
}

static int test_mprotect(void *address, size_t bytes, int protection)
{
    return fails(SYSTEM_MPROTECT) ? -1 : real.mprotect(address, bytes, protection);
}

static int test_mincore(void *address, size_t bytes, unsigned char *resident_out)
{
    if (fails(SYSTEM_MINCORE)) {
        return -1;
    }
    if (rule.resident != NULL) {
        *resident_out = rule.resident(mapped_offset);
        return 0;
    }
    return real.mincore(address, bytes, resident_out);
}

static int64_t test_huge_bytes(const void *address, uint64_t bytes)
{
    return fails(SYSTEM_HUGE_BYTES) ? -1 : real.huge_bytes(address, bytes);
}

static int test_thread_create(pthread_t *thread_out, void *(*run)(void *), void *argument)
{
    return fails(SYSTEM_THREAD_CREATE) ? errno : real.thread_create(thread_out, run, argument);
}

static void *test_alloc(size_t bytes)
{
    return fails(SYSTEM_ALLOC) ? NULL : real.alloc(bytes);
}

static void *test_dlopen(const char *name, int flags)
{
    return fails(SYSTEM_DLOPEN) ? NULL : real.dlopen(name, flags);
}

static void *test_dlsym(void *library, const char *name)
{
    return fails(SYSTEM_DLSYM) ? NULL : real.dlsym(library, name);
}

void system_start(void)
{
    system_end();
    real = sllmi_sys;
    memset(&rule, 0, sizeof rule);
    for (int i = 0; i < SYSTEM_CALLS; i++) {
        calls[i] = 0;
    }
    failures = direct_reads = cached_reads = mapped_bytes = 0;
    sllmi_sys = (sllmi_os){
        .open = test_open,
        .close = test_close,
        .fstat = test_fstat,
        .fstatfs = test_fstatfs,
        .fadvise = test_fadvise,
        .pread = test_pread,
        .pread_nowait = test_pread_nowait,
        .cached_pages = test_cached_pages,
        .mmap = test_mmap,
        .munmap = test_munmap,
        .madvise = test_madvise,
        .mprotect = test_mprotect,
        .mincore = test_mincore,
        .huge_bytes = test_huge_bytes,
        .thread_create = test_thread_create,
        .alloc = test_alloc,
        .dlopen = test_dlopen,
        .dlsym = test_dlsym,
    };
}

void system_end(void)
{
    if (real.open != NULL) {
        sllmi_sys = real;
    }
}

void system_fail(system_call call, uint64_t first, uint64_t last, int error)
{
    rule.faults[call].first = first;
    rule.faults[call].last = last;
    rule.faults[call].error = error;
}

void system_shorten(uint64_t nth, uint64_t bytes)
{
    rule.shorten = true;
    rule.short_nth = nth;
    rule.short_bytes = bytes;
}

void system_simulate_direct(void)
{
    rule.simulate_direct = true;
}

bool system_is_direct(int fd)
{
    return fd >= 0 && fd < MAX_FDS && is_direct[fd];
}

void system_filesystem(unsigned long type)
{
    rule.filesystem = type;
}

void system_resident(bool (*resident)(uint64_t offset))
{
    rule.resident = resident;
}

uint64_t system_calls(system_call call)
{
    return calls[call];
}

uint64_t system_failures(void)
{
    return failures;
}

uint64_t system_mapped_bytes(void)
{
    return mapped_bytes;
}

uint64_t system_direct_reads(void)
{
    return direct_reads;
}

uint64_t system_cached_reads(void)
{
    return cached_reads;
}
