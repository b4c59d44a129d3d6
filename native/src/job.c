/* The life of a load: create, start, wait, close. */
#define _GNU_SOURCE
#include "job.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "align.h"
#include "device.h"
#include "error.h"
#include "os.h"
#include "ring.h"

#define DEFAULT_CHUNK_BYTES (8u << 20)
#define DEFAULT_THREADS 8u
#define DEFAULT_STALL_MS 60000u

static void free_job(sllm_job *job)
{
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
    job->sources = sllmi_sys.alloc((file_count + 1) * sizeof *job->sources);
    job->readers = sllmi_sys.alloc(job->reader_count * sizeof *job->readers);
    bool whole = job->sources != NULL && job->readers != NULL;
    if (job->device_count > 0) {
        job->devices = sllmi_sys.alloc(job->device_count * sizeof *job->devices);
        job->queues = sllmi_sys.alloc(job->device_count * sizeof *job->queues);
        job->copiers = sllmi_sys.alloc(job->device_count * sizeof *job->copiers);
        whole = whole && job->devices != NULL && job->queues != NULL && job->copiers != NULL;
    }
    return whole ? SLLM_OK : sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for a job");
}

static sllm_status open_sources(sllm_job *job, const sllm_file *files, uint32_t file_count,
                                sllm_error *err)
{
    for (uint32_t i = 0; i < file_count; i++) {
        job->source_count = i + 1; /* a source that half opened is closed, too */
        sllm_status status =
            sllmi_source_open(files[i].fd, files[i].path, (job->flags & SLLM_JOB_NO_DIRECT) == 0,
                              &job->sources[i], err);
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
    job->reader_count = options->threads != 0 ? options->threads : DEFAULT_THREADS;
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
    free_job(job);
    return status;
}

void sllmi_job_fail(sllm_job *job, const sllm_error *failure)
{
    pthread_mutex_lock(&job->lock);
    if (job->failure.status == SLLM_OK) {
        job->failure = *failure;
    }
    job->stop = true;
    pthread_cond_broadcast(&job->changed);
    pthread_mutex_unlock(&job->lock);
    if (job->ring != NULL) {
        sllmi_ring_wake(job->ring);
    }
    for (uint32_t i = 0; i < job->device_count; i++) {
        sllmi_queue_close(&job->queues[i]);
    }
}

/* Start one thread and count it as running, under the job's lock. */
static int start_worker(sllm_job *job, sllmi_worker *worker, uint32_t index, void *(*run)(void *),
                        uint32_t *running)
{
    worker->job = job;
    worker->index = index;
    ++*running;
    int rc = sllmi_sys.thread_create(&worker->thread, run, worker);
    if (rc != 0) {
        --*running;
    }
    return rc;
}

sllm_status sllm_job_start(sllm_job *job, sllm_error *err)
{
    if (job == NULL || job->pid != getpid()) {
        return sllmi_fail(err, job == NULL ? SLLM_E_INVALID : SLLM_E_FORKED, 0,
                          "sllm_job_start: not a job of this process");
    }
    if (job->started) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "the job was started before");
    }
    job->started = true;
    job->start_ns = sllmi_now_ns();
    job->moved_ns = job->start_ns;
    if (job->plan.chunk_count < job->reader_count) {
        job->reader_count = (uint32_t)job->plan.chunk_count;
    }
    uint32_t readers = 0;
    int rc = 0;
    pthread_mutex_lock(&job->lock); /* no thread may see the counts before all have started */
    for (uint32_t i = 0; rc == 0 && i < job->device_count; i++) {
        rc = start_worker(job, &job->copiers[i], i, sllmi_copier_run, &job->copiers_running);
        job->started_copiers += rc == 0;
    }
    for (uint32_t i = 0; rc == 0 && i < job->reader_count; i++) {
        rc = start_worker(job, &job->readers[i], i, sllmi_reader_run, &job->readers_running);
        readers += rc == 0;
    }
    /* Fewer readers than asked for are slower, not wrong. */
    bool usable = rc == 0 || (job->started_copiers == job->device_count && readers > 0);
    job->reader_count = readers;
    pthread_mutex_unlock(&job->lock);
    if (!usable) {
        sllm_error failure = {0};
        sllmi_fail(&failure, SLLM_E_NOMEM, rc, "cannot start a thread: %s", strerror(rc));
        sllmi_job_fail(job, &failure);
        return sllmi_fail(err, SLLM_E_NOMEM, rc, "%s", failure.message);
    }
    for (uint32_t i = 0; readers == 0 && i < job->device_count; i++) {
        sllmi_queue_close(&job->queues[i]); /* an empty load: nobody else will */
    }
    return SLLM_OK;
}

static double seconds_since(uint64_t start_ns, uint64_t end_ns)
{
    return end_ns > start_ns ? (double)(end_ns - start_ns) / 1e9 : 0;
}

static void fill_progress(sllm_job *job, sllm_progress *progress)
{
    *progress = (sllm_progress){
        .bytes_total = job->plan.bytes,
        .bytes_disk = job->bytes_disk,
        .bytes_cache = job->bytes_cache,
        .bytes_done = job->bytes_done,
        .chunks_total = (uint32_t)job->plan.chunk_count,
        .chunks_done = (uint32_t)job->chunks_done,
        .read_s = seconds_since(job->start_ns, job->read_end_ns),
        .copy_s = seconds_since(job->start_ns, job->copy_end_ns),
    };
    if (job->device_count == 0) {
        progress->copy_s = progress->read_s;
    }
}

/* What the job is at: the first read or copy that a thread has in hand. */
static void fail_stalled(sllm_job *job)
{
    sllm_error failure = {0};
    sllmi_fail(&failure, SLLM_E_TIMEOUT, ETIMEDOUT, "nothing moved for %u ms", job->stall_ms);
    for (uint32_t i = 0; i < job->started_copiers; i++) {
        const sllm_device *device = job->devices[i];
        uint64_t in_hand = job->copiers[i].chunk;
        if (in_hand == SLLMI_STARTING) {
            sllmi_fail(&failure, SLLM_E_TIMEOUT, ETIMEDOUT,
                       "nothing moved for %u ms while starting %s:%d", job->stall_ms,
                       device->ops->name, device->ordinal);
        } else if (in_hand != 0) {
            const sllmi_chunk *chunk = &job->plan.chunks[in_hand - 1];
            sllmi_fail(&failure, SLLM_E_TIMEOUT, ETIMEDOUT,
                       "nothing moved for %u ms while copying `%s` at byte %llu to %s:%d",
                       job->stall_ms, job->sources[chunk->file].path,
                       (unsigned long long)chunk->offset, device->ops->name, device->ordinal);
        }
        if (in_hand != 0) {
            break;
        }
    }
    for (uint32_t i = 0; i < job->reader_count; i++) {
        uint64_t in_hand = job->readers[i].chunk;
        if (in_hand != 0) {
            const sllmi_chunk *chunk = &job->plan.chunks[in_hand - 1];
            sllmi_fail(&failure, SLLM_E_TIMEOUT, ETIMEDOUT,
                       "nothing moved for %u ms while reading `%s` at byte %llu", job->stall_ms,
                       job->sources[chunk->file].path, (unsigned long long)chunk->offset);
            break;
        }
    }
    sllmi_job_fail(job, &failure);
}

/* Wait under the job's lock until it ends, fails, stalls, or the deadline has come. True: stalled. */
static bool await_end(sllm_job *job, uint64_t deadline_ns)
{
    uint64_t stall_ns = (uint64_t)job->stall_ms * 1000000u;
    while (job->failure.status == SLLM_OK && job->readers_running + job->copiers_running > 0) {
        uint64_t until = sllmi_min(deadline_ns, job->moved_ns + stall_ns);
        if (!sllmi_cond_wait(&job->changed, &job->lock, until)) {
            uint64_t moved = job->moved_ns; /* before the clock is read: threads move on */
            uint64_t now = sllmi_now_ns();
            if (now >= moved + stall_ns) {
                return true;
            }
            if (now >= deadline_ns) {
                return false;
            }
        }
    }
    return false;
}

sllm_status sllm_job_wait(sllm_job *job, uint32_t timeout_ms, sllm_progress *progress_out,
                          sllm_error *err)
{
    if (progress_out != NULL) {
        *progress_out = (sllm_progress){0};
    }
    if (job == NULL || job->pid != getpid()) {
        return sllmi_fail(err, job == NULL ? SLLM_E_INVALID : SLLM_E_FORKED, 0,
                          "sllm_job_wait: not a job of this process");
    }
    if (!job->started) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "the job was not started");
    }
    pthread_mutex_lock(&job->lock);
    bool stalled = await_end(job, sllmi_now_ns() + (uint64_t)timeout_ms * 1000000u);
    if (stalled) {
        pthread_mutex_unlock(&job->lock);
        fail_stalled(job);
        pthread_mutex_lock(&job->lock);
    }
    bool running = job->readers_running + job->copiers_running > 0;
    sllm_error failure = job->failure; /* of a stall ours, or one that came just before */
    pthread_mutex_unlock(&job->lock);
    sllm_status status = (sllm_status)failure.status;
    if (status != SLLM_OK) {
        sllmi_fail(err, status, failure.os_errno, "%s", failure.message);
        if (err != NULL) {
            err->device_code = failure.device_code;
        }
    } else if (running) {
        status = sllmi_fail(err, SLLM_E_BUSY, 0, "the job is still running");
    } else if (job->plan.chunk_count != job->chunks_done) {
        status = sllmi_fail(err, SLLM_E_CANCELLED, 0, "the load was cancelled");
    }
    for (uint32_t i = 0; status == SLLM_OK && i < job->source_count; i++) {
        status = sllmi_source_check(&job->sources[i], err);
    }
    if (progress_out != NULL) {
        fill_progress(job, progress_out);
    }
    return status;
}

sllm_status sllm_job_chunks_done(sllm_job *job, uint32_t first, uint32_t count, uint8_t *done_out,
                                 sllm_error *err)
{
    if (job != NULL && job->pid != getpid()) {
        return sllmi_fail(err, SLLM_E_FORKED, 0, "sllm_job_chunks_done: not a job of this process");
    }
    if (job == NULL || done_out == NULL || first > job->plan.chunk_count ||
        count > job->plan.chunk_count - first) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "chunks %u to %u are not all there", first,
                          first + count);
    }
    for (uint32_t i = 0; i < count; i++) {
        done_out[i] = job->done[first + i];
    }
    return SLLM_OK;
}

void sllm_job_cancel(sllm_job *job)
{
    if (job != NULL && job->pid == getpid()) {
        sllm_error failure = {0};
        sllmi_fail(&failure, SLLM_E_CANCELLED, ECANCELED, "the load was cancelled");
        sllmi_job_fail(job, &failure);
    }
}

sllm_status sllm_job_close(sllm_job *job, uint32_t timeout_ms, sllm_error *err)
{
    if (job == NULL) {
        return SLLM_OK;
    }
    if (job->pid != getpid()) {
        return sllmi_fail(err, SLLM_E_FORKED, 0, "sllm_job_close: not a job of this process");
    }
    sllm_job_cancel(job);
    uint64_t deadline = sllmi_now_ns() + (uint64_t)timeout_ms * 1000000u;
    pthread_mutex_lock(&job->lock);
    bool in_time = true;
    while (in_time && job->readers_running + job->copiers_running > 0) {
        in_time = sllmi_cond_wait(&job->changed, &job->lock, deadline);
    }
    bool running = job->readers_running + job->copiers_running > 0;
    pthread_mutex_unlock(&job->lock);
    if (running) {
        return sllmi_fail(err, SLLM_E_BUSY, 0,
                          "a thread is still inside the system: the job stays, and its memory");
    }
    for (uint32_t i = 0; job->started && i < job->reader_count; i++) {
        pthread_join(job->readers[i].thread, NULL);
    }
    for (uint32_t i = 0; i < job->started_copiers; i++) {
        pthread_join(job->copiers[i].thread, NULL);
    }
    /* Slots that no copier took go back to the ring. */
    for (uint32_t i = 0; i < job->device_count; i++) {
        sllmi_slot *slot;
        while ((slot = sllmi_queue_pop(&job->queues[i], 0)) != NULL) {
            sllmi_ring_release(job->ring, slot);
        }
    }
    free_job(job);
    return SLLM_OK;
}
