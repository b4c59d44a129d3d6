/* The start of a load's life: what it is given is looked at, and planned. */
#define _GNU_SOURCE
#include "job.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "device.h"
#include "error.h"
#include "os.h"
#include "ring.h"

#define DEFAULT_CHUNK_BYTES (8u << 20)
#define DEFAULT_THREADS 16u
#define DEFAULT_DEVICE_THREADS 8u /* each fills two slots of pinned memory */
#define DEFAULT_STALL_MS 60000u

void sllmi_job_free(sllm_job *job)
{
    for (uint32_t i = 0; job->registered != NULL && i < job->source_count; i++) {
        sllm_registered_destroy(job->registered[i]);
    }
    for (uint32_t i = 0; job->sources != NULL && i < job->source_count; i++) {
        sllmi_source_close(&job->sources[i]);
    }
    for (uint32_t i = 0; job->queues != NULL && i < job->device_count; i++) {
        sllmi_queue_free(&job->queues[i]);
    }
    for (uint32_t i = 0; job->devices != NULL && i < job->device_count; i++) {
        sllm_device_close(job->devices[i]);
    }
    sllm_ring_destroy(job->ring);
    sllmi_plan_free(&job->plan);
    pthread_cond_destroy(&job->changed);
    pthread_mutex_destroy(&job->lock);
    free(job->registered);
    free(job->sources);
    free(job->queues);
    free(job->devices);
    free(job->readers);
    free(job->copiers);
    free(job->done);
    free(job->copies_left);
    free(job);
}

static sllm_status check_options(const sllm_job_options *options, sllm_error *err)
{
    if (options->size != sizeof *options) {
        return sllmi_fail(err, SLLM_E_INVALID, 0,
                          "sllm_job_options of %llu bytes, this library knows %zu",
                          (unsigned long long)options->size, sizeof *options);
    }
    if (options->chunk_bytes % SLLM_PAGE_BYTES != 0 || options->chunk_bytes > (1ull << 40)) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "a chunk of %llu bytes is no multiple of %u",
                          (unsigned long long)options->chunk_bytes, SLLM_PAGE_BYTES);
    }
    if (options->threads > SLLMI_MAX_THREADS || options->device_count > SLLMI_MAX_DEVICES) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "%u threads and %u devices: at most %u each",
                          options->threads, options->device_count, SLLMI_MAX_THREADS);
    }
    if (options->device_count > 0 && (options->flags & SLLM_JOB_MAPPED) != 0) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "a mapped file is no place on a device");
    }
    if (options->device_count > 0 && (options->devices == NULL || options->ring == NULL)) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "a load to a device needs devices and a ring");
    }
    return SLLM_OK;
}

/* What the caller lends to the job, once the options are known to be whole. */
static sllm_status check_loans(const sllm_job_options *options, uint64_t chunk_bytes,
                               sllm_error *err)
{
    for (uint32_t i = 0; i < options->device_count; i++) {
        const sllm_device *device = options->devices[i];
        if (device == NULL || device->pid != getpid()) {
            return sllmi_fail(err, device == NULL ? SLLM_E_INVALID : SLLM_E_FORKED, 0,
                              "device %u of the load is none of this process", i);
        }
    }
    if (options->device_count > 0 && !sllmi_ring_is_ours(options->ring)) {
        return sllmi_fail(err, SLLM_E_FORKED, 0, "the ring of the load is not of this process");
    }
    for (uint32_t i = 0; i < options->device_count; i++) {
        const sllm_device *device = options->devices[i];
        if (!sllmi_ring_feeds(options->ring, device)) {
            return sllmi_fail(err, SLLM_E_INVALID, 0,
                              "%s:%d copies from pinned memory, and the ring was not made for %s",
                              device->ops->name, device->ordinal, device->ops->name);
        }
    }
    if (options->device_count > 0 &&
        sllmi_ring_slot_bytes(options->ring) < chunk_bytes + SLLM_PAGE_BYTES) {
        return sllmi_fail(err, SLLM_E_INVALID, 0,
                          "slots of %llu bytes do not hold a chunk of %llu and a page",
                          (unsigned long long)sllmi_ring_slot_bytes(options->ring),
                          (unsigned long long)chunk_bytes);
    }
    return SLLM_OK;
}

static sllm_status check_extent(const sllm_job *job, const sllm_extent *extent, uint64_t number,
                                sllm_error *err)
{
    unsigned long long n = number;
    if (extent->file >= job->source_count || extent->bytes == 0 || extent->offset > INT64_MAX / 2 ||
        extent->bytes > INT64_MAX / 2 || extent->device < -1 ||
        extent->device >= (int32_t)job->device_count) {
        return sllmi_fail(err, SLLM_E_INVALID, 0,
                          "extent %llu (file %u, device %d, %llu bytes at %llu) is not one", n,
                          extent->file, extent->device, (unsigned long long)extent->bytes,
                          (unsigned long long)extent->offset);
    }
    if (extent->device < 0 && (extent->target - extent->offset) % SLLM_PAGE_BYTES != 0) {
        return sllmi_fail(err, SLLM_E_INVALID, 0,
                          "extent %llu: its address is not congruent to its offset modulo %u", n,
                          SLLM_PAGE_BYTES);
    }
    const sllmi_source *source = &job->sources[extent->file];
    if (extent->offset + extent->bytes > (uint64_t)source->at_open.st_size) {
        return sllmi_fail(err, SLLM_E_TRUNCATED, 0,
                          "`%s` ends at byte %lld, before byte %llu that is to be read",
                          source->path, (long long)source->at_open.st_size,
                          (unsigned long long)(extent->offset + extent->bytes));
    }
    return SLLM_OK;
}

static sllm_status allocate(sllm_job *job, uint32_t file_count, sllm_error *err)
{
    job->sources = sllmi_sys.alloc(((size_t)file_count + 1) * sizeof *job->sources);
    job->registered = sllmi_sys.alloc(((size_t)file_count + 1) * sizeof *job->registered);
    job->readers = sllmi_sys.alloc(job->reader_count * sizeof *job->readers);
    bool whole = job->sources != NULL && job->registered != NULL && job->readers != NULL;
    if (job->device_count > 0) {
        job->devices = sllmi_sys.alloc(job->device_count * sizeof *job->devices);
        job->queues = sllmi_sys.alloc(job->device_count * sizeof *job->queues);
        job->copiers = sllmi_sys.alloc(job->device_count * sizeof *job->copiers);
        whole = whole && job->devices != NULL && job->queues != NULL && job->copiers != NULL;
    }
    return whole ? SLLM_OK : sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for a job");
}

static sllm_status take_registered(sllm_job *job, uint32_t file, sllm_registered *registered,
                                   sllm_error *err)
{
    const sllmi_source *source = &job->sources[file];
    if (registered->pid != getpid()) {
        return sllmi_fail(err, SLLM_E_FORKED, 0, "`%s` was registered by another process",
                          source->path);
    }
    if (registered->file.st_dev != source->at_open.st_dev ||
        registered->file.st_ino != source->at_open.st_ino ||
        registered->file.st_size != source->at_open.st_size) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "what is registered for `%s` is another file",
                          source->path);
    }
    for (uint32_t i = 0; i < job->device_count; i++) {
        const sllm_device *device = job->devices[i];
        if (!sllmi_registered_feeds(registered, device)) {
            return sllmi_fail(err, SLLM_E_INVALID, 0, "`%s` is not registered for %s:%d",
                              source->path, device->ops->name, device->ordinal);
        }
    }
    sllmi_registered_keep(registered);
    job->registered[file] = registered;
    return SLLM_OK;
}

static sllm_status open_sources(sllm_job *job, const sllm_file *files, uint32_t file_count,
                                sllm_error *err)
{
    for (uint32_t i = 0; i < file_count; i++) {
        job->source_count = i + 1; /* a source that half opened is closed, too */
        bool direct = (job->flags & (SLLM_JOB_NO_DIRECT | SLLM_JOB_MAPPED)) == 0;
        sllm_status status =
            sllmi_source_open(files[i].fd, files[i].path, direct, &job->sources[i], err);
        if (status == SLLM_OK && files[i].registered != NULL) {
            status = take_registered(job, i, files[i].registered, err);
        }
        if (status != SLLM_OK) {
            return status;
        }
    }
    return SLLM_OK;
}

static sllm_status plan_job(sllm_job *job, const sllm_extent *extents, uint64_t extent_count,
                            sllm_error *err)
{
    for (uint64_t i = 0; i < extent_count; i++) {
        sllm_status status = check_extent(job, &extents[i], i, err);
        if (status != SLLM_OK) {
            return status;
        }
    }
    sllm_status status = sllmi_plan_build(extents, extent_count, job->chunk_bytes, &job->plan, err);
    if (status != SLLM_OK) {
        return status;
    }
    job->done = sllmi_sys.alloc((job->plan.chunk_count + 1) * sizeof *job->done);
    job->copies_left = sllmi_sys.alloc((job->plan.chunk_count + 1) * sizeof *job->copies_left);
    if (job->done == NULL || job->copies_left == NULL) {
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for %llu chunks",
                          (unsigned long long)job->plan.chunk_count);
    }
    return SLLM_OK;
}

sllm_status sllm_job_create(const sllm_file *files, uint32_t file_count, const sllm_extent *extents,
                            uint64_t extent_count, const sllm_job_options *options,
                            sllm_job **job_out, sllm_error *err)
{
    if (job_out == NULL) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_job_create: job_out is NULL");
    }
    *job_out = NULL;
    const sllm_job_options defaults = {.size = sizeof defaults};
    if (options == NULL) {
        options = &defaults;
    }
    if ((files == NULL && file_count > 0) || (extents == NULL && extent_count > 0)) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_job_create: a NULL array");
    }
    sllm_status status = check_options(options, err);
    uint64_t chunk_bytes = options->chunk_bytes != 0 ? options->chunk_bytes : DEFAULT_CHUNK_BYTES;
    if (status == SLLM_OK) {
        status = check_loans(options, chunk_bytes, err);
    }
    if (status != SLLM_OK) {
        return status;
    }
    sllm_job *job = sllmi_sys.alloc(sizeof *job);
    if (job == NULL) {
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for a job");
    }
    pthread_mutex_init(&job->lock, NULL);
    sllmi_cond_init(&job->changed);
    job->pid = getpid();
    job->flags = options->flags;
    job->chunk_bytes = chunk_bytes;
    job->reader_count = options->threads != 0       ? options->threads
                        : options->device_count > 0 ? DEFAULT_DEVICE_THREADS
                                                    : DEFAULT_THREADS;
    job->stall_ms = options->stall_ms != 0 ? options->stall_ms : DEFAULT_STALL_MS;
    job->device_count = options->device_count;
    status = allocate(job, file_count, err);
    if (status != SLLM_OK) {
        goto failed;
    }
    if (job->device_count > 0) {
        job->ring = options->ring;
        sllmi_ring_keep(job->ring);
    }
    for (uint32_t i = 0; i < job->device_count; i++) {
        job->devices[i] = options->devices[i];
        sllmi_device_keep(job->devices[i]);
    }
    for (uint32_t i = 0; i < job->device_count; i++) {
        status = sllmi_queue_init(&job->queues[i], sllmi_ring_slot_count(job->ring), err);
        if (status != SLLM_OK) {
            goto failed;
        }
    }
    status = open_sources(job, files, file_count, err);
    if (status == SLLM_OK) {
        status = plan_job(job, extents, extent_count, err);
    }
    if (status != SLLM_OK) {
        goto failed;
    }
    *job_out = job;
    return SLLM_OK;
failed:
    sllmi_job_free(job);
    return status;
}
