#define _GNU_SOURCE
#include "os.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "align.h"

/* Numbers and layouts that older headers lack. Source: the kernel's uapi headers. */
#ifndef __NR_cachestat
#define __NR_cachestat 451
#endif
#ifndef RWF_NOWAIT
#define RWF_NOWAIT 0x00000008
#endif
#ifndef PAGEMAP_SCAN
#define PAGEMAP_SCAN _IOC(_IOC_READ | _IOC_WRITE, 'f', 16, 96)
#define PAGE_IS_HUGE (1u << 6)
#endif

/* Enough for the device runtimes that run on it; strict overcommit counts every byte. */
#define WORKER_STACK_BYTES (1u << 20)

static int os_open(const char *path, int flags)
{
    return open(path, flags);
}

static ssize_t os_pread_nowait(int fd, void *buffer, size_t bytes, off_t offset)
{
    struct iovec part = {.iov_base = buffer, .iov_len = bytes};
    return preadv2(fd, &part, 1, offset, RWF_NOWAIT);
}

static int64_t os_cached_pages(int fd, uint64_t offset, uint64_t bytes)
{
    struct {
        uint64_t offset, bytes;
    } range = {offset, bytes};
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } pages = {0};
    if (syscall(__NR_cachestat, fd, &range, &pages, 0) != 0) {
        return -1;
    }
    return (int64_t)pages.cached;
}

static int64_t os_huge_bytes(const void *address, uint64_t bytes)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t start = (uintptr_t)address, end = start + bytes;
    /* Source: linux/fs.h, PAGEMAP_SCAN. */
    struct {
        uint64_t start, end, categories;
    } regions[16];
    struct {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t inverted, mask, any_of, returned;
    } scan = {.size = sizeof scan,
              .start = sllmi_align_down(start, page),
              .end = sllmi_align_up(end, page),
              .vec = (uintptr_t)regions,
              .vec_len = sizeof regions / sizeof regions[0],
              .mask = PAGE_IS_HUGE,
              .returned = PAGE_IS_HUGE};
    int64_t huge = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return -1;
    }
    while (scan.start < scan.end) {
        int found = ioctl(fd, PAGEMAP_SCAN, &scan);
        if (found < 0 || scan.walk_end <= scan.start) {
            huge = -1;
            break;
        }
        for (int i = 0; i < found; i++) {
            huge += (int64_t)(sllmi_min(regions[i].end, end) - sllmi_max(regions[i].start, start));
        }
        scan.start = scan.walk_end;
    }
    close(fd);
    return huge;
}

/* Those that a thread's own faults raise: blocked, they would end the process without a handler's
 * word, such as Python's faulthandler has. */
static const int faults[] = {SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP};

static int os_thread_create(pthread_t *thread_out, void *(*run)(void *), void *argument)
{
    pthread_attr_t attributes;
    sigset_t others, before;
    int rc = pthread_attr_init(&attributes);
    if (rc != 0) {
        return rc;
    }
    (void)pthread_attr_setstacksize(&attributes, WORKER_STACK_BYTES);
    /* All others belong to the application's threads: a worker starts with them blocked. */
    sigfillset(&others);
    for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++) {
        sigdelset(&others, faults[i]);
    }
    pthread_sigmask(SIG_SETMASK, &others, &before);
    rc = pthread_create(thread_out, &attributes, run, argument);
    if (rc == EINVAL) { /* a program's thread-local storage lies in the stack, and may not fit */
        rc = pthread_create(thread_out, NULL, run, argument);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return rc;
}

static void *os_alloc(size_t bytes)
{
    return calloc(1, bytes);
}

sllmi_os sllmi_sys = {
    .open = os_open,
    .close = close,
    .fstat = fstat,
    .fstatfs = fstatfs,
    .fadvise = posix_fadvise,
    .pread = pread,
    .pread_nowait = os_pread_nowait,
    .cached_pages = os_cached_pages,
    .mmap = mmap,
    .munmap = munmap,
    .madvise = madvise,
    .mprotect = mprotect,
    .mincore = mincore,
    .huge_bytes = os_huge_bytes,
    .thread_create = os_thread_create,
    .alloc = os_alloc,
    .dlopen = dlopen,
    .dlsym = dlsym,
};

uint64_t sllmi_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void sllmi_sleep_ns(uint64_t ns)
{
    const struct timespec pause = {.tv_sec = (time_t)(ns / 1000000000u),
                                   .tv_nsec = (long)(ns % 1000000000u)};
    nanosleep(&pause, NULL);
}
