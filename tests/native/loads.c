#define _GNU_SOURCE
#include "loads.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "align.h"
#include "fake_device.h"
#include "ring.h"

#define GUARD_BYTE 0xA5

test_load load_of_files(const uint64_t *sizes)
{
    test_load load = {.options = {.size = sizeof(sllm_job_options)}};
    for (; sizes[load.file_count] != 0; load.file_count++) {
        char name[32];
        (void)snprintf(name, sizeof name, "load-%u", load.file_count);
        CHECK(load.file_count < LOAD_FILES);
        load.files[load.file_count] =
            file_make(name, sizes[load.file_count], 1000 + load.file_count);
    }
    return load;
}

static void make_ring(test_load *load, uint32_t count, uint32_t slots, uint64_t chunk_bytes)
{
    sllm_error err;
    CHECK_OK(
        sllm_ring_create(load->devices[0], chunk_bytes + SLLM_PAGE_BYTES, slots, &load->ring, &err),
        &err);
    load->options.device_count = count;
    load->options.devices = load->devices;
    load->options.ring = load->ring;
    load->options.chunk_bytes = chunk_bytes;
}

void load_use_devices(test_load *load, uint32_t count, bool fake, uint32_t slots,
                      uint64_t chunk_bytes)
{
    sllm_error err;
    for (uint32_t i = 0; i < count; i++) {
        if (fake) {
            load->devices[i] = fake_open((int32_t)i);
        } else {
            CHECK_OK(sllm_device_open("cpu", 0, &load->devices[i], &err), &err);
        }
    }
    make_ring(load, count, slots, chunk_bytes);
}

void load_use_backend(test_load *load, const char *backend, const load_memory *memory,
                      uint32_t count, uint32_t slots, uint64_t chunk_bytes)
{
    sllm_error err;
    load->memory = memory;
    for (uint32_t i = 0; i < count; i++) {
        CHECK_OK(sllm_device_open(backend, (int32_t)i, &load->devices[i], &err), &err);
    }
    make_ring(load, count, slots, chunk_bytes);
}

static void *alloc_place(const test_load *load, int32_t device, uint64_t bytes)
{
    void *place = load->memory == NULL ? malloc(bytes) : load->memory->alloc(device, bytes);
    CHECK(place != NULL);
    return place;
}

static unsigned char *look(const test_load *load, const sllm_extent *extent)
{
    void *target = (void *)(uintptr_t)extent->target;
    return load->memory == NULL || extent->device < 0 ? target : load->memory->look(target);
}

void load_add(test_load *load, uint32_t file, int32_t device, uint64_t offset, uint64_t bytes)
{
    CHECK(load->extent_count < LOAD_EXTENTS);
    uint64_t i = load->extent_count++;
    sllm_extent *extent = &load->extents[i];
    *extent = (sllm_extent){.file = file, .device = device, .offset = offset, .bytes = bytes};
    if (device < 0) {
        sllm_memory *memory;
        sllm_error err;
        CHECK_OK(sllm_memory_create(bytes, offset, &memory, &err), &err);
        load->places[i] = memory;
        extent->target = (uint64_t)(uintptr_t)sllm_memory_address(memory);
    } else {
        uint64_t odd = i % 7; /* devices' targets need no alignment */
        load->places[i] = alloc_place(load, device, bytes + 2 * LOAD_GUARD + odd);
        extent->target = (uint64_t)(uintptr_t)load->places[i] + LOAD_GUARD + odd;
    }
    load_forget(load);
}

void load_add_random(test_load *load, check_random *random, int32_t devices, bool host)
{
    for (uint32_t file = 0; file < load->file_count; file++) {
        uint64_t size = load->files[file].bytes;
        for (int32_t device = host ? -1 : 0; device < devices; device++) {
            uint64_t at = check_random_below(random, size / 4 + 1);
            for (int i = 0; i < 10 && at < size; i++) {
                uint64_t bytes =
                    1 + check_random_below(random, 1ull << check_random_below(random, 17));
                bytes = sllmi_min(bytes, size - at);
                load_add(load, file, device, at, bytes);
                at += bytes;
                switch (check_random_below(random, 4)) {
                case 0: at += check_random_below(random, 100000); break;
                case 1: at += check_random_below(random, 5000); break;
                default: break; /* adjoins */
                }
            }
        }
    }
}

sllm_status load_create(test_load *load, sllm_job **job_out, sllm_error *err)
{
    sllm_file files[LOAD_FILES];
    for (uint32_t i = 0; i < load->file_count; i++) {
        files[i] = (sllm_file){.fd = load->files[i].fd,
                               .path = load->files[i].path,
                               .registered = load->registered[i]};
    }
    return sllm_job_create(files, load->file_count, load->extents, load->extent_count,
                           &load->options, job_out, err);
}

sllm_job *load_start(test_load *load)
{
    sllm_job *job;
    sllm_error err;
    CHECK_OK(load_create(load, &job, &err), &err);
    CHECK_OK(sllm_job_start(job, &err), &err);
    return job;
}

sllm_status load_wait(sllm_job *job, sllm_progress *progress, sllm_error *err)
{
    sllm_status status;
    do {
        status = sllm_job_wait(job, 200, progress, err);
        CHECK(progress->bytes_done <= progress->bytes_total);
        CHECK(progress->chunks_done <= progress->chunks_total);
    } while (status == SLLM_E_BUSY);
    return status;
}

void load_close(sllm_job *job)
{
    sllm_error err;
    CHECK_OK(sllm_job_close(job, 250000, &err), &err);
}

void load_check(const test_load *load)
{
    for (uint64_t i = 0; i < load->extent_count; i++) {
        const sllm_extent *extent = &load->extents[i];
        const unsigned char *target = look(load, extent);
        file_check(load->files[extent->file].seed, extent->offset, target, extent->bytes);
        for (int k = 0; extent->device >= 0 && k < LOAD_GUARD; k++) {
            CHECK_U64(target[-1 - k], GUARD_BYTE);
            CHECK_U64(target[extent->bytes + (uint64_t)k], GUARD_BYTE);
        }
    }
}

void load_forget(test_load *load)
{
    for (uint64_t i = 0; i < load->extent_count; i++) {
        const sllm_extent *extent = &load->extents[i];
        unsigned char *target = look(load, extent);
        if (extent->device < 0) {
            memset(target, 0, extent->bytes);
        } else {
            memset(target - LOAD_GUARD, GUARD_BYTE, extent->bytes + 2 * LOAD_GUARD);
        }
    }
}

void load_check_ring(const test_load *load)
{
    if (load->ring == NULL) {
        return;
    }
    sllmi_slot *slots[1024];
    uint32_t count = sllmi_ring_slot_count(load->ring);
    atomic_bool stop = false;
    for (uint32_t i = 0; i < count; i++) {
        slots[i] = sllmi_ring_acquire(load->ring, 0, &stop);
        CHECK(slots[i] != NULL);
        slots[i]->users = 1;
    }
    CHECK(sllmi_ring_acquire(load->ring, 0, &stop) == NULL);
    for (uint32_t i = 0; i < count; i++) {
        sllmi_ring_release(load->ring, slots[i]);
    }
}

void load_end(test_load *load)
{
    load_check_ring(load);
    sllm_ring_destroy(load->ring);
    for (uint32_t i = 0; i < load->options.device_count; i++) {
        sllm_device_close(load->devices[i]);
    }
    for (uint64_t i = 0; i < load->extent_count; i++) {
        if (load->extents[i].device < 0) {
            sllm_memory_destroy(load->places[i]);
        } else if (load->memory != NULL) {
            load->memory->free(load->places[i]);
        } else {
            free(load->places[i]);
        }
    }
    for (uint32_t i = 0; i < load->file_count; i++) {
        file_end(&load->files[i]);
    }
}
