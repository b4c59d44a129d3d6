/* A file as a job reads it: asked for residency, then read directly or through the page cache. */
#ifndef SLLMI_IO_H
#define SLLMI_IO_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include "sllm.h"

/* One resident page stands for so many bytes: the page cache grows by large folios and read-ahead
 * windows, so a finer look tells nothing more. */
#define SLLMI_SAMPLE_BYTES (2u << 20)
/* Of a whole file, as many samples as find a hole of 2 % with 99 % certainty. */
#define SLLMI_FILE_SAMPLES 256u

/* How to learn whether a page is in the page cache, best first. */
typedef enum sllmi_residency {
    SLLMI_RESIDENCY_ALL,       /* the filesystem is memory */
    SLLMI_RESIDENCY_CACHESTAT, /* Linux 6.5, not on overlayfs, for who may write the file */
    SLLMI_RESIDENCY_MINCORE,   /* for who owns or may write the file: else it says "all" */
    SLLMI_RESIDENCY_NOWAIT,    /* a one-page read that must not wait */
    SLLMI_RESIDENCY_UNKNOWN
} sllmi_residency;

typedef struct sllmi_source {
    int fd;        /* the caller's; for reads that want read-ahead */
    int probe_fd;  /* our own description without read-ahead, or -1 */
    int direct_fd; /* our own with O_DIRECT, or -1 */
    atomic_bool direct_refused;
    _Atomic(int) residency;
    bool local;
    struct stat at_open;
    char *path;
} sllmi_source;

/* How many bytes came from where. */
typedef struct sllmi_read_counts {
    uint64_t disk;
    uint64_t cache;
} sllmi_read_counts;

/* Open our own descriptions of `fd` and find out what can be asked of it. Fills `source` in every
 * case; end it with sllmi_source_close(). SLLM_E_INVALID, SLLM_E_NOMEM or SLLM_E_IO. */
sllm_status sllmi_source_open(int fd, const char *path, bool direct, sllmi_source *source,
                              sllm_error *err);
void sllmi_source_close(sllmi_source *source);

/* Bytes of the range that are in the page cache, by samples of one page per `sample_bytes`.
 * `known_out` may be NULL; false where this process may not ask, and the answer is 0. */
uint64_t sllmi_source_resident(sllmi_source *source, uint64_t offset, uint64_t bytes,
                               uint64_t sample_bytes, bool *known_out);

/* Read [offset, offset + bytes) to `target`. A direct read covers whole pages, so the page that
 * `target` starts in and the one it ends in must be writable; target must be congruent to offset
 * modulo SLLM_PAGE_BYTES, else the read goes through the page cache.
 * SLLM_E_IO or SLLM_E_TRUNCATED, naming file and offset. */
sllm_status sllmi_source_read(sllmi_source *source, uint64_t offset, uint64_t bytes, char *target,
                              bool ask_cache, sllmi_read_counts *counts, sllm_error *err);

/* Bring [offset, offset + bytes) into the page cache, and into its mapping at `mapped`.
 * SLLM_E_IO or SLLM_E_TRUNCATED, naming file and offset. */
sllm_status sllmi_source_bring_in(const sllmi_source *source, uint64_t offset, uint64_t bytes,
                                  char *mapped, sllm_error *err);

/* SLLM_E_CHANGED when the file is no longer what it was at sllmi_source_open(). */
sllm_status sllmi_source_check(const sllmi_source *source, sllm_error *err);

#endif
