/**
 * sllm.h: move bytes from files to memory or devices at the speed of the slowest link.
 *
 * A *job* reads *extents* of open files in aligned chunks and puts them where the caller wants
 * them: into host memory in place, or through a *ring* of staging slots into a device. *Memory*
 * is what a job fills on the host, or a private view of a file in the page cache, whose pages a job
 * brings in. A *gather* brings slices of host memory to a device through a ring.
 *
 * Every call returns a status, 0 or a negative code; the detail goes to a caller-owned
 * sllm_error. Nothing is logged, the library never exits, and nothing is global but the devices'
 * runtimes, which are loaded and started once a process. Handles belong to the process that made
 * them: after fork() a child may use memory it was given, and every call with an inherited handle
 * answers SLLM_E_FORKED.
 */
#ifndef SLLM_H
#define SLLM_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SLLM_API __attribute__((visibility("default")))
#else
#define SLLM_API
#endif

#define SLLM_PAGE_BYTES 4096u /* alignment of direct I/O in file and memory */

/* [cdef] */
#define SLLM_ABI_VERSION 1

typedef enum sllm_status {
    SLLM_OK = 0,
    SLLM_E_INVALID = -1,      /* an argument contradicts the contract */
    SLLM_E_NOMEM = -2,        /* host memory or address space could not be had */
    SLLM_E_IO = -3,           /* the system refused a read; see os_errno */
    SLLM_E_TRUNCATED = -4,    /* a file ends before the extent does */
    SLLM_E_CHANGED = -5,      /* a file changed while it was read */
    SLLM_E_CANCELLED = -6,    /* sllm_job_cancel() was called */
    SLLM_E_TIMEOUT = -7,      /* nothing moved for the deadline */
    SLLM_E_NO_DEVICE = -8,    /* no such device, or its runtime library is missing */
    SLLM_E_DEVICE = -9,       /* a device call failed; see device_code */
    SLLM_E_UNSUPPORTED = -10, /* this kernel, filesystem or backend cannot do that */
    SLLM_E_FORKED = -11,      /* the handle belongs to the parent process */
    SLLM_E_BUSY = -12         /* threads are still inside the system; try again or leave it */
} sllm_status;

#define SLLM_ERROR_TEXT_BYTES 768

/* Filled by a failing call. `message` is one line without a trailing newline. */
typedef struct sllm_error {
    int32_t status;      /* what the call returned */
    int32_t os_errno;    /* the system's error number, or 0 */
    int32_t device_code; /* the device runtime's code, or 0 */
    char message[SLLM_ERROR_TEXT_BYTES];
} sllm_error;

/** The header's SLLM_ABI_VERSION, as compiled into the library. */
int sllm_abi_version(void);

/** The name of a status, such as "SLLM_E_IO". Static storage; "SLLM_E_?" for a number unknown. */
const char *sllm_status_name(int status);

/* ---- memory: what a job fills, or a view of a file -------------------------------------- */

typedef struct sllm_memory sllm_memory;

/**
 * Reserve fresh, zeroed, private memory for a byte range of a file.
 *
 * The address is congruent to `file_offset` modulo SLLM_PAGE_BYTES, as direct reads want it, and
 * huge pages are asked for. Whole pages at both ends belong to the memory, so that a job may read
 * the pages that the range touches in full.
 *
 * @param bytes        Length of the range, at least 1.
 * @param file_offset  Where the range starts in its file; only its value modulo 4096 counts.
 * @param memory_out   Receives the memory. The caller ends it with sllm_memory_destroy().
 * @param err          May be NULL.
 * @return SLLM_OK, SLLM_E_INVALID or SLLM_E_NOMEM.
 *
 * Threads: any. Blocks: no; pages are supplied when they are first written.
 */
sllm_status sllm_memory_create(uint64_t bytes, uint64_t file_offset, sllm_memory **memory_out,
                               sllm_error *err);

/**
 * Map a private, copy-on-write view of a byte range of a file. No byte is copied.
 *
 * The view shows the file's page cache: the file must not change in place, and a read past a
 * later truncation is SIGBUS. Ask sllm_file_probe() first whether that is a fair bet.
 *
 * @param fd            An open, readable descriptor; not kept.
 * @param path          For messages.
 * @param file_offset   Start of the range, any value.
 * @param bytes         Length, at least 1; the range ends within the file.
 * @param memory_out    Receives the memory. The caller ends it with sllm_memory_destroy().
 * @param err           May be NULL.
 * @return SLLM_OK, SLLM_E_INVALID, SLLM_E_TRUNCATED, SLLM_E_NOMEM or SLLM_E_IO.
 *
 * Threads: any. Blocks: no. The view is writable, unless strict overcommit refuses that and it
 * is read-only; sllm_memory_writable() says which.
 */
sllm_status sllm_memory_map(int fd, const char *path, uint64_t file_offset, uint64_t bytes,
                            sllm_memory **memory_out, sllm_error *err);

/** The address of the range's first byte. Valid until sllm_memory_destroy(). */
void *sllm_memory_address(const sllm_memory *memory);

/** Length of the range in bytes. */
uint64_t sllm_memory_bytes(const sllm_memory *memory);

/** 1 when the memory may be written, else 0. */
int sllm_memory_writable(const sllm_memory *memory);

/**
 * Ask for huge pages in a view of a file. They come with what is read from then on, where the
 * filesystem has them (ext4 since Linux 6.16, XFS since 5.18).
 * @return 1 when the system takes the advice, else 0.
 *
 * Threads: one at a time a memory. Blocks: no.
 */
int sllm_memory_advise_huge(sllm_memory *memory);

/**
 * How many bytes of a range lie in huge pages of the system's size; -1 where it does not tell
 * (before Linux 6.7), or where the memory has no such range.
 *
 * Threads: any. Blocks: no.
 */
int64_t sllm_memory_huge_bytes(const sllm_memory *memory, uint64_t offset, uint64_t bytes);

/**
 * Map a private, copy-on-write view of a descriptor over a part of memory that was created.
 *
 * It is how bytes that are in a segment already become part of a shard's memory.
 *
 * @param memory       From sllm_memory_create(), with a file_offset of 0.
 * @param offset       Where in the memory, a multiple of the page size.
 * @param fd           An open, readable descriptor, such as sllm_segment_reader() gives; not kept.
 * @param fd_offset    Where in the descriptor, a multiple of the page size.
 * @param bytes        Length; past the memory's end only to the end of its last page.
 * @return SLLM_OK, SLLM_E_INVALID, or SLLM_E_NOMEM: nothing may look into the memory any more.
 *
 * Threads: any, on disjoint ranges. Blocks: no.
 */
sllm_status sllm_memory_place(sllm_memory *memory, uint64_t offset, int fd, uint64_t fd_offset,
                              uint64_t bytes, sllm_error *err);

/** Give the memory back. NULL is fine. Nothing may look into it any more. */
void sllm_memory_destroy(sllm_memory *memory);

/* ---- files ------------------------------------------------------------------------------- */

/* What sllm_file_probe() found. */
typedef struct sllm_file_facts {
    uint64_t size_bytes;
    uint64_t resident_bytes;  /* of the range asked about; an estimate from samples */
    uint32_t local;           /* 1: a disk or memory filesystem of this machine */
    uint32_t residency_known; /* 1: resident_bytes was measured; 0: this process may not ask */
} sllm_file_facts;

/**
 * Ask how much of a file is in the page cache, without reading it: at most one page per sample.
 * @return SLLM_OK, SLLM_E_INVALID or SLLM_E_IO.
 *
 * Threads: any. Blocks: microseconds a GiB.
 */
sllm_status sllm_file_probe(int fd, const char *path, uint64_t file_offset, uint64_t bytes,
                            sllm_file_facts *facts_out, sllm_error *err);

/* ---- segments: the store's memory --------------------------------------------------------- */

typedef struct sllm_segment sllm_segment;

#define SLLM_SEGMENT_RECYCLABLE 1u /* sllm_segment_held() can tell: it may be filled anew */
#define SLLM_SEGMENT_LOCKED 2u     /* its pages are locked in memory as they are supplied */

/* For tests: do as on kernels before 5.1, whose seals admit no writer at all, */
#define SLLM_SEGMENT_SEAL_WHEN_FULL 1u
/* and before 5.3, whose leases do not tell who holds a file. */
#define SLLM_SEGMENT_NO_LEASE 2u

/**
 * Create a memory file that only its creator can write.
 *
 * It is sealed against writing by anybody else, shrinking, growing and hole punching, and its
 * descriptors are readable by its owner alone. Where the kernel can seal it only against every
 * writer (before 5.1), that happens in sllm_segment_complete().
 *
 * @param bytes         Size, a multiple of 2 MiB.
 * @param flags         0, or SLLM_SEGMENT_SEAL_WHEN_FULL and SLLM_SEGMENT_NO_LEASE.
 * @param segment_out   Receives the segment. The caller ends it with sllm_segment_destroy().
 * @return SLLM_OK, SLLM_E_INVALID or SLLM_E_NOMEM.
 *
 * Threads: any. Blocks: no; pages are supplied when they are first written.
 */
sllm_status sllm_segment_create(uint64_t bytes, uint32_t flags, sllm_segment **segment_out,
                                sllm_error *err);

/**
 * The same in a file of a tmpfs, which may have huge pages where memory files have none. Such a
 * file cannot be sealed: readers open it in a read-only mount of the tmpfs.
 *
 * @param writable_dir  A directory of the tmpfs. The file has no name in it afterwards.
 * @param readable_dir  The same directory in a read-only mount.
 * @return SLLM_OK, SLLM_E_INVALID, SLLM_E_NOMEM, SLLM_E_IO, or SLLM_E_UNSUPPORTED: the second
 *         mount is not read-only.
 */
sllm_status sllm_segment_create_in(int writable_dir, int readable_dir, uint64_t bytes,
                                   sllm_segment **segment_out, sllm_error *err);

/** Where the creator writes. Valid until sllm_segment_destroy(). */
void *sllm_segment_address(const sllm_segment *segment);

/** SLLM_SEGMENT_* of what the system granted. */
uint32_t sllm_segment_flags(const sllm_segment *segment);

/**
 * Supply the pages of a range.
 * @return SLLM_OK, SLLM_E_INVALID or SLLM_E_NOMEM (the machine has no memory left).
 *
 * Threads: any, on disjoint ranges in parallel. Blocks: while the kernel clears pages.
 */
sllm_status sllm_segment_prefault(sllm_segment *segment, uint64_t offset, uint64_t bytes,
                                  sllm_error *err);

/**
 * Say that the segment holds what it shall hold, before it is handed to a reader. Nothing may be
 * written to it afterwards, unless it is SLLM_SEGMENT_RECYCLABLE and nobody holds it.
 * @return SLLM_OK, SLLM_E_INVALID, or SLLM_E_UNSUPPORTED: the kernel cannot seal memory.
 *
 * Threads: any, when no other uses the segment. Blocks: no.
 */
sllm_status sllm_segment_complete(sllm_segment *segment, sllm_error *err);

/**
 * Open a new read-only descriptor, to be handed to another process and then closed by the caller.
 * @param fd_out  Receives the descriptor.
 * @return SLLM_OK, SLLM_E_INVALID (not complete, where that matters) or SLLM_E_IO.
 *
 * Threads: any. Blocks: no.
 */
sllm_status sllm_segment_reader(const sllm_segment *segment, int *fd_out, sllm_error *err);

/**
 * Ask the kernel whether anybody but the creator holds a descriptor or a mapping of the segment.
 * @return 1 or 0; always 1 without SLLM_SEGMENT_RECYCLABLE.
 *
 * Threads: any. Blocks: no (2 us).
 */
int sllm_segment_held(const sllm_segment *segment);

/** Unmap and close. NULL is fine. The memory ends when nobody holds it any more. */
void sllm_segment_destroy(sllm_segment *segment);

/* ---- devices and staging ----------------------------------------------------------------- */

typedef struct sllm_device sllm_device;
typedef struct sllm_ring sllm_ring;

/** Name of the n-th backend compiled in, or NULL past the last. Static storage. */
const char *sllm_backend_name(uint32_t index);

/**
 * Open a device of a backend, such as "npu", 0. The runtime library ("npu": libascendcl, "cuda":
 * libcudart) is looked for at this time, and the copy that the process has loaded is preferred.
 * @param ordinal  Which of the devices that the runtime may see, from 0.
 * @return SLLM_OK, SLLM_E_INVALID, SLLM_E_NOMEM, SLLM_E_NO_DEVICE (no such device, or no runtime
 *         library), SLLM_E_DEVICE, SLLM_E_TIMEOUT (the runtime hangs), or SLLM_E_FORKED: a process
 *         that forked this one has started the runtime, which does not survive that.
 *
 * The caller's thread keeps its current device: whatever sets one happens on threads of ours. Where
 * torch_npu is used, let it start first: it gives the runtime a configuration when it does.
 *
 * Threads: any. Blocks: while the runtime starts, seconds; up to 2 minutes for each of its answers
 * where it hangs. The caller ends it with sllm_device_close(); rings and jobs that use it keep it.
 */
sllm_status sllm_device_open(const char *backend, int32_t ordinal, sllm_device **device_out,
                             sllm_error *err);

/** Close a device, now or with the last ring or job that uses it. NULL is fine. */
void sllm_device_close(sllm_device *device);

/**
 * Create a ring of equal staging slots, pinned where the backend pins.
 * @param device      Whose copies the slots feed; kept.
 * @param slot_bytes  Size of one slot, a multiple of 4096: a job's chunk_bytes plus 4096.
 * @param count       Number of slots, 2 to 1024.
 * @param ring_out    Receives the ring, or NULL on failure. The caller owns it and ends it with
 *                    sllm_ring_destroy().
 * @param err         May be NULL.
 * @return SLLM_OK, SLLM_E_INVALID, SLLM_E_NOMEM, SLLM_E_DEVICE, SLLM_E_TIMEOUT or SLLM_E_FORKED.
 *
 * Threads: any; one job or gather at a time uses a ring. Blocks: while pages are pinned (seconds for tens
 * of GiB).
 */
sllm_status sllm_ring_create(sllm_device *device, uint64_t slot_bytes, uint32_t count,
                             sllm_ring **ring_out, sllm_error *err);

/**
 * Unpin and free, now or with the last job that uses it. NULL is fine.
 *
 * Threads: any. Blocks: while pages are unpinned; for a minute where the runtime hangs, and it keeps
 * them.
 */
void sllm_ring_destroy(sllm_ring *ring);

typedef struct sllm_registered sllm_registered;

/**
 * Map a file and register it with a device's runtime, so that jobs may copy from there without
 * reading it into a ring first. For files in memory, such as a store's segments. No load registers
 * by itself: whether it pays has to be measured.
 * @param device          Of a backend that can ("cuda"); kept. Serves all devices of the backend.
 * @param fd              Readable; may be closed afterwards. The file must keep its size.
 * @param registered_out  The caller ends it with sllm_registered_destroy().
 * @return SLLM_OK, SLLM_E_UNSUPPORTED (the backend cannot), SLLM_E_INVALID (an empty file),
 *         SLLM_E_IO, SLLM_E_NOMEM, SLLM_E_DEVICE (the runtime refuses), SLLM_E_TIMEOUT or
 *         SLLM_E_FORKED.
 *
 * Threads: any. Blocks: while pages are locked; a minute where the runtime hangs.
 */
sllm_status sllm_registered_create(sllm_device *device, int fd, sllm_registered **registered_out,
                                   sllm_error *err);

/**
 * Unregister and unmap, now or with the last job that uses it. NULL is fine. Where the runtime
 * refuses, the mapping stays.
 *
 * Threads: any. Blocks: while pages are unlocked; a minute where the runtime hangs.
 */
void sllm_registered_destroy(sllm_registered *registered);

/* ---- gather: slices of host memory to a device --------------------------------------------- */

typedef struct sllm_gather sllm_gather;

/**
 * Open a gather: it packs strided slices of any host memory into slots of a ring, and copies them
 * from there, so that no memory but the ring's ever takes part in a device's copy.
 *
 * It works on the thread that calls, which has the device as its current one and keeps it: a
 * runtime's current device is never changed there. One gather or job at a time uses a ring.
 *
 * @param device      Where the slices go; kept.
 * @param ring        Of the same backend; kept.
 * @param stream      The caller's stream, as the runtime has it (an aclrtStream or a cudaStream_t),
 *                    on which copies come after what is there already, and before what comes later;
 *                    it outlives the gather. 0: a stream of the gather's own; CUDA's legacy default
 *                    stream is 1.
 * @param gather_out  Receives the gather. The caller ends it with sllm_gather_close().
 * @return SLLM_OK, SLLM_E_INVALID (the thread is on another device, or the ring of another
 *         backend), SLLM_E_NOMEM, SLLM_E_DEVICE or SLLM_E_FORKED.
 *
 * Threads: one at a time a gather. Blocks: no.
 */
sllm_status sllm_gather_open(sllm_device *device, sllm_ring *ring, uint64_t stream,
                             sllm_gather **gather_out, sllm_error *err);

/**
 * Start the copy of a slice: rows of host memory, packed without gaps on the device.
 * @param target               Device address of the first row; any alignment.
 * @param source               Address of the first row; free again when the call returns.
 * @param rows, row_bytes      How many, and the length of each; 0 bytes are nothing to do.
 * @param source_stride_bytes  From one row's start to the next one's, at least row_bytes; 0: the same
 *                             row again and again.
 * @param timeout_ms           For a slot to become free.
 * @return SLLM_OK: the slice is on its way. SLLM_E_BUSY: a part of it is; the same call again goes
 *         on from there, and any other is SLLM_E_INVALID. SLLM_E_DEVICE: close it.
 *
 * Threads: one at a time a gather. Blocks: while rows are packed, and up to timeout_ms.
 */
sllm_status sllm_gather_copy(sllm_gather *gather, uint64_t target, const void *source,
                             uint64_t rows, uint64_t row_bytes, uint64_t source_stride_bytes,
                             uint32_t timeout_ms, sllm_error *err);

/**
 * Bytes whose copies sllm_gather_copy() has started so far: after SLLM_E_BUSY it tells a slow device
 * from one that has stalled.
 */
uint64_t sllm_gather_started(const sllm_gather *gather);

/**
 * Wait until every slice is on the device; all slots are back in the ring then.
 * @return SLLM_OK, SLLM_E_BUSY (not after timeout_ms) or SLLM_E_DEVICE: a copy failed.
 *
 * Threads: one at a time a gather. Blocks: up to timeout_ms.
 */
sllm_status sllm_gather_synchronize(sllm_gather *gather, uint32_t timeout_ms, sllm_error *err);

/**
 * End a gather, after the copies that are under way. NULL is fine.
 * @return SLLM_OK. SLLM_E_BUSY: copies are still under way after timeout_ms; the ring and the
 *         targets must stay as they are. Call again, or leave them for ever.
 *
 * Threads: one at a time a gather. Any thread may make this call, as a finalizer does: where the
 * gather's device is not the current one, a thread of ours waits instead.
 * Blocks: up to timeout_ms, and 5 s longer where such a thread's runtime hangs.
 */
sllm_status sllm_gather_close(sllm_gather *gather, uint32_t timeout_ms, sllm_error *err);

/* ---- jobs -------------------------------------------------------------------------------- */

/* A file that extents name by its index. The descriptor must stay open until the job is closed. */
typedef struct sllm_file {
    int32_t fd;        /* a normal, readable descriptor; the job opens its own for direct I/O */
    uint32_t reserved; /* 0 */
    const char *path;  /* for messages; copied */
    /* Of the same file, kept: devices copy from there, past the slots' memory. NULL: from slots. */
    sllm_registered *registered;
} sllm_file;

/* A byte range of a file and where it goes. */
typedef struct sllm_extent {
    uint32_t file;   /* index into the job's files */
    int32_t device;  /* -1: `target` is host memory; else index into the job's devices */
    uint64_t offset; /* in the file */
    uint64_t bytes;  /* at least 1 */
    uint64_t target; /* address of the first byte */
} sllm_extent;

#define SLLM_JOB_NO_DIRECT 1u /* never use O_DIRECT */
#define SLLM_JOB_NO_CACHE 2u  /* do not ask the page cache: read everything directly */
/* Each target is where sllm_memory_map() mapped the extent itself: its pages are brought into the
 * page cache and the mapping, and nothing is copied. All of it counts as read from the disk: what
 * was there before, sllm_file_probe() tells beforehand. Host memory only. */
#define SLLM_JOB_MAPPED 4u

typedef struct sllm_job_options {
    uint64_t size;         /* sizeof(sllm_job_options) */
    uint64_t chunk_bytes;  /* largest read, a multiple of 4096; 0: 8 MiB */
    uint32_t threads;      /* readers, 1 to 64; 0: 16, for devices 8 */
    uint32_t flags;        /* SLLM_JOB_* */
    uint32_t stall_ms;     /* nothing moved for so long: SLLM_E_TIMEOUT; 0: 60000 */
    uint32_t device_count; /* length of devices; 0 for host memory alone */
    sllm_device **devices; /* kept; the array itself is copied */
    sllm_ring *ring;       /* required when device_count > 0; kept; one job at a time uses it */
} sllm_job_options;

/* A snapshot of a job. Times are seconds since sllm_job_start(); 0: not come to that yet. */
typedef struct sllm_progress {
    uint64_t bytes_total; /* sum of the extents, each once a device that wants it */
    uint64_t bytes_disk;  /* read around the page cache, or by the page cache from disk */
    uint64_t bytes_cache; /* found in the page cache */
    uint64_t bytes_done;  /* in their final place; bytes_total when the job is done */
    uint32_t chunks_total;
    uint32_t chunks_done;
    double read_s; /* until the last byte was read */
    double copy_s; /* until the last byte was in its place */
} sllm_progress;

typedef struct sllm_job sllm_job;

/**
 * Plan a load. Nothing is read yet.
 *
 * Extents may overlap only between different devices; each byte is read once. An extent in host
 * memory is read in place: its address must be congruent to its offset modulo 4096, and the pages
 * it touches must belong to the job, or hold bytes of the same file at the same places, as
 * sllm_memory_create() gives them. An extent on a device goes through the ring, or is copied from
 * where its file is registered.
 *
 * @param files, file_count      Copied.
 * @param extents, extent_count  Any order; copied.
 * @param options                May be NULL: all defaults, host memory only.
 * @param job_out                Receives the job. The caller ends it with sllm_job_close().
 * @param err                    May be NULL.
 * @return SLLM_OK, SLLM_E_INVALID, SLLM_E_NOMEM, SLLM_E_IO or SLLM_E_TRUNCATED (an extent ends
 *         past its file; the message names it).
 *
 * Threads: any. Blocks: no.
 */
sllm_status sllm_job_create(const sllm_file *files, uint32_t file_count, const sllm_extent *extents,
                            uint64_t extent_count, const sllm_job_options *options,
                            sllm_job **job_out, sllm_error *err);

/**
 * Start the threads. Once a job.
 * @return SLLM_OK, SLLM_E_NOMEM (no thread could be had), SLLM_E_INVALID (started before).
 *
 * Threads: one at a time a job. Blocks: no.
 */
sllm_status sllm_job_start(sllm_job *job, sllm_error *err);

/**
 * Wait for the end of a started job, for at most timeout_ms.
 * @param progress_out  May be NULL. Filled in every case.
 * @return SLLM_OK: every byte is in its place. SLLM_E_BUSY: not yet. Otherwise the job's first
 *         failure, SLLM_E_CANCELLED and SLLM_E_TIMEOUT (stalled for stall_ms) included.
 *
 * Threads: one at a time a job; sllm_job_cancel() may run beside it.
 */
sllm_status sllm_job_wait(sllm_job *job, uint32_t timeout_ms, sllm_progress *progress_out,
                          sllm_error *err);

/**
 * Read which chunks are in their place. Chunks are numbered in file order.
 * @param first      Number of the first chunk asked about.
 * @param count      How many.
 * @param done_out   Receives count bytes, 1 for done.
 * @return SLLM_OK or SLLM_E_INVALID.
 *
 * Threads: any. Blocks: no.
 */
sllm_status sllm_job_chunks_done(sllm_job *job, uint32_t first, uint32_t count, uint8_t *done_out,
                                 sllm_error *err);

/** Ask the threads to stop after the reads they are in. Any thread; returns at once. */
void sllm_job_cancel(sllm_job *job);

/**
 * End a job: cancel it if it runs, join its threads for at most timeout_ms, free it.
 * @return SLLM_OK. SLLM_E_BUSY: a thread sits in a read that does not return; the job and all
 *         that its extents point to must stay as they are. Call again, or leave them for ever.
 *
 * Threads: one at a time a job. NULL is fine.
 */
sllm_status sllm_job_close(sllm_job *job, uint32_t timeout_ms, sllm_error *err);
/* [cdef] */

#endif
