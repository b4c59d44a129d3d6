/* Loads whose every byte is checked: files, extents with places for them, a job. */
#ifndef LOADS_H
#define LOADS_H

#include <stdint.h>

#include "check.h"
#include "files.h"
#include "sllm.h"

#define LOAD_FILES 4
#define LOAD_EXTENTS 256
#define LOAD_DEVICES 4
#define LOAD_GUARD 64 /* bytes around a place on a device that must stay as they are */

/* Where extents on devices lie. */
typedef struct load_memory {
    void *(*alloc)(int32_t device, uint64_t bytes);
    void (*free)(void *memory);
    unsigned char *(*look)(const void *address); /* where the host sees it */
} load_memory;

typedef struct test_load {
    test_file files[LOAD_FILES];
    uint32_t file_count;
    sllm_extent extents[LOAD_EXTENTS];
    void *places[LOAD_EXTENTS]; /* host: the sllm_memory; device: its allocation */
    uint64_t extent_count;
    sllm_registered *registered[LOAD_FILES]; /* the test's own to end */
    const load_memory *memory;               /* NULL: the host's heap */
    sllm_device *devices[LOAD_DEVICES];
    sllm_ring *ring;
    sllm_job_options options; /* set what is to differ from the defaults */
} test_load;

/* `sizes` ends with 0. */
test_load load_of_files(const uint64_t *sizes);
/* Open `count` devices (fake, or else of the cpu backend) and a ring for chunk_bytes. */
void load_use_devices(test_load *load, uint32_t count, bool fake, uint32_t slots,
                      uint64_t chunk_bytes);
/* Devices 0 to count - 1 of a backend, with their memory. */
void load_use_backend(test_load *load, const char *backend, const load_memory *memory,
                      uint32_t count, uint32_t slots, uint64_t chunk_bytes);
void load_add(test_load *load, uint32_t file, int32_t device, uint64_t offset, uint64_t bytes);
/* Extents of the given devices and of the host, as a seed has it: gaps, overlaps between devices,
 * odd places. */
void load_add_random(test_load *load, check_random *random, int32_t devices, bool host);

sllm_status load_create(test_load *load, sllm_job **job_out, sllm_error *err);
/* Create and start. */
sllm_job *load_start(test_load *load);
/* Wait for the end; SLLM_E_BUSY never comes back. */
sllm_status load_wait(sllm_job *job, sllm_progress *progress, sllm_error *err);
void load_close(sllm_job *job);

/* Every byte is in its place, and nothing around it was touched. */
void load_check(const test_load *load);
/* Forget what was loaded, so that the same load can be checked again. */
void load_forget(test_load *load);
/* All slots are in the ring. */
void load_check_ring(const test_load *load);
void load_end(test_load *load);

#endif
