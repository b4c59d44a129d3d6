/* A system that counts its calls and misbehaves on demand: replacements for every sllmi_sys entry.
 * Change it only while no job runs. */
#ifndef SYSTEM_H
#define SYSTEM_H

#include <stdbool.h>
#include <stdint.h>

#include "os.h"

typedef enum system_call {
    SYSTEM_OPEN,
    SYSTEM_CLOSE,
    SYSTEM_FSTAT,
    SYSTEM_FSTATFS,
    SYSTEM_FADVISE,
    SYSTEM_PREAD,
    SYSTEM_PREAD_NOWAIT,
    SYSTEM_CACHED_PAGES,
    SYSTEM_MMAP,
    SYSTEM_MUNMAP,
    SYSTEM_MADVISE,
    SYSTEM_MPROTECT,
    SYSTEM_MINCORE,
    SYSTEM_HUGE_BYTES,
    SYSTEM_THREAD_CREATE,
    SYSTEM_ALLOC,
    SYSTEM_DLOPEN,
    SYSTEM_DLSYM,
    SYSTEM_CALLS
} system_call;

extern const char *const system_call_names[SYSTEM_CALLS];

/* Every call counted from zero, none failing, files as they are. */
void system_start(void);
/* The real table again. */
void system_end(void);

/* Calls number first to last (from 1) of one kind fail with `error`; one such rule a kind. */
#define SYSTEM_ALWAYS 1, UINT64_MAX
void system_fail(system_call call, uint64_t first, uint64_t last, int error);
/* pread number `nth` gives at most `bytes`; 0: the end of the file. 0 for `nth`: every one. */
void system_shorten(uint64_t nth, uint64_t bytes);

/* Descriptors opened with O_DIRECT behave like one on any filesystem: what is not aligned to 4096
 * in offset, length or address gets EINVAL. */
void system_simulate_direct(void);
bool system_is_direct(int fd);

/* What filesystem the files are said to lie on (f_type). */
void system_filesystem(unsigned long type);
/* Which pages the page cache is said to hold, for all ways of asking. NULL: the truth. */
void system_resident(bool (*resident)(uint64_t offset));

uint64_t system_calls(system_call call);
/* How many calls failed or gave less on demand. */
uint64_t system_failures(void);
/* What has been mapped and not yet unmapped. */
uint64_t system_mapped_bytes(void);
uint64_t system_direct_reads(void);
uint64_t system_cached_reads(void);

#define SYSTEM_EXT4 0xEF53UL
#define SYSTEM_TMPFS 0x01021994UL
#define SYSTEM_OVERLAYFS 0x794C7630UL
#define SYSTEM_NFS 0x6969UL

#endif
