/* The system calls that loading depends on, in a table that a test may replace. */
#ifndef SLLMI_OS_H
#define SLLMI_OS_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/vfs.h>

_Static_assert(sizeof(off_t) == 8, "files are larger than 2 GiB: define _FILE_OFFSET_BITS=64");

typedef struct sllmi_os {
    int (*open)(const char *path, int flags);
    int (*close)(int fd);
    int (*fstat)(int fd, struct stat *out);
    int (*fstatfs)(int fd, struct statfs *out);
    int (*fadvise)(int fd, off_t offset, off_t bytes, int advice); /* returns the error number */
    ssize_t (*pread)(int fd, void *buffer, size_t bytes, off_t offset);
    /* Read without waiting for a disk: -1 and EAGAIN when the page is not resident. */
    ssize_t (*pread_nowait)(int fd, void *buffer, size_t bytes, off_t offset);
    /* How many pages of the range are in the page cache. -1 and errno before Linux 6.5. */
    int64_t (*cached_pages)(int fd, uint64_t offset, uint64_t bytes);
    void *(*mmap)(void *address, size_t bytes, int protection, int flags, int fd, off_t offset);
    int (*munmap)(void *address, size_t bytes);
    int (*madvise)(void *address, size_t bytes, int advice);
    int (*mprotect)(void *address, size_t bytes, int protection);
    int (*mincore)(void *address, size_t bytes, unsigned char *resident_out);
    /* How many bytes of a range lie in huge pages. -1 and errno before Linux 6.7. */
    int64_t (*huge_bytes)(const void *address, uint64_t bytes);
    int (*thread_create)(pthread_t *thread_out, void *(*run)(void *), void *argument);
    void *(*alloc)(size_t bytes); /* zeroed; ended with free() */
    void *(*dlopen)(const char *name, int flags);
    void *(*dlsym)(void *library, const char *name);
} sllmi_os;

extern sllmi_os sllmi_sys;

/* Nanoseconds of the monotonic clock. */
uint64_t sllmi_now_ns(void);
void sllmi_sleep_ns(uint64_t ns);

#endif
