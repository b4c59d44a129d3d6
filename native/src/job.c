/* The life of a load: start, wait, close. */
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
    sllmi_job_free(job);
    return SLLM_OK;
}
