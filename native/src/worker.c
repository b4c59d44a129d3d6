/* The threads of a job: readers take chunks in file order, one copier a device empties slots. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "align.h"
#include "device.h"
#include "error.h"
#include "job.h"
#include "os.h"
#include "ring.h"

/* How long a copier waits for a copy before it looks for the next slot: a device whose queue runs dry
 * idles. */
#define COPY_WAIT_MS 1u

static void name_thread(const char *role, uint32_t index)
{
    char name[16]; /* the kernel keeps 15 characters */
    (void)snprintf(name, sizeof name, "sllm-%s-%u", role, index % 1000);
    (void)pthread_setname_np(pthread_self(), name);
}

static void moved(sllm_job *job)
{
    job->moved_ns = sllmi_now_ns();
}

static void chunk_in_place(sllm_job *job, uint64_t index)
{
    job->done[index] = 1;
    job->chunks_done++;
    moved(job);
}

static sllm_status read_chunk(sllmi_worker *worker, uint64_t index, char *target, sllm_error *err)
{
    sllm_job *job = worker->job;
    const sllmi_chunk *chunk = &job->plan.chunks[index];
    sllmi_read_counts counts = {0};
    worker->chunk = index + 1;
    sllmi_source *source = &job->sources[chunk->file];
    sllm_status status;
    if ((job->flags & SLLM_JOB_MAPPED) != 0) {
        status = sllmi_source_bring_in(source, chunk->offset, chunk->bytes, target, err);
        counts.disk = chunk->bytes;
    } else {
        status = sllmi_source_read(source, chunk->offset, chunk->bytes, target,
                                   (job->flags & SLLM_JOB_NO_CACHE) == 0, &counts, err);
    }
    worker->chunk = 0;
    job->bytes_disk += counts.disk;
    job->bytes_cache += counts.cache;
    moved(job);
    return status;
}

/* Read a chunk into a slot, or find it where its file is registered, and hand it to every device
 * that wants some of it. */
static sllm_status stage_chunk(sllmi_worker *worker, uint64_t index, sllm_error *err)
{
    sllm_job *job = worker->job;
    const sllmi_chunk *chunk = &job->plan.chunks[index];
    uint64_t devices = sllmi_plan_devices(&job->plan, chunk);
    if (devices == 0) { /* all of it lies in a gap */
        chunk_in_place(job, index);
        return SLLM_OK;
    }
    sllmi_slot *slot = NULL;
    while (slot == NULL) {
        if (job->stop) {
            return SLLM_OK;
        }
        slot = sllmi_ring_acquire(job->ring, SLLMI_POLL_MS, &job->stop);
    }
    slot->chunk = index;
    slot->users = 1;
    const sllm_registered *registered = job->registered[chunk->file];
    if (registered != NULL) { /* the slot alone limits the copies under way */
        slot->bytes = registered->start + chunk->offset;
        job->bytes_cache += chunk->bytes;
        moved(job);
    } else {
        char *target = slot->memory + chunk->offset % SLLM_PAGE_BYTES;
        slot->bytes = target;
        sllm_status status = read_chunk(worker, index, target, err);
        if (status != SLLM_OK) {
            sllmi_ring_release(job->ring, slot);
            return status;
        }
    }
    uint32_t wanted = (uint32_t)__builtin_popcountll(devices);
    job->copies_left[index] = wanted;
    slot->users = wanted;
    for (uint32_t i = 0; i < job->device_count; i++) {
        if ((devices >> i) & 1) {
            sllmi_queue_push(&job->queues[i], slot);
        }
    }
    return SLLM_OK;
}

static void reader_ended(sllm_job *job)
{
    pthread_mutex_lock(&job->lock);
    bool last = --job->readers_running == 0;
    if (last) {
        job->read_end_ns = sllmi_now_ns();
    }
    pthread_cond_broadcast(&job->changed);
    pthread_mutex_unlock(&job->lock);
    /* A copier ends when its queue is closed and empty. */
    for (uint32_t i = 0; last && i < job->device_count; i++) {
        sllmi_queue_close(&job->queues[i]);
    }
}

void *sllmi_reader_run(void *argument)
{
    sllmi_worker *worker = argument;
    sllm_job *job = worker->job;
    name_thread("read", worker->index);
    while (!job->stop) {
        uint64_t index = job->next_chunk++;
        if (index >= job->plan.chunk_count) {
            break;
        }
        const sllmi_chunk *chunk = &job->plan.chunks[index];
        sllm_error failure = {0};
        sllm_status status;
        if (chunk->host) {
            status = read_chunk(worker, index, sllmi_plan_host_target(&job->plan, chunk), &failure);
            if (status == SLLM_OK) {
                job->bytes_done += chunk->bytes;
                chunk_in_place(job, index);
            }
        } else {
            status = stage_chunk(worker, index, &failure);
        }
        if (status != SLLM_OK) {
            sllmi_job_fail(job, &failure);
            break;
        }
    }
    reader_ended(job);
    return NULL;
}

/* Copies under way: a slot returns to the ring when the fence after its copies has passed. */
struct flight {
    sllmi_slot *slot;
    uint64_t fence;
    uint64_t bytes;
};

struct copier {
    sllm_job *job;
    const sllmi_device_ops *ops;
    void *queue;
    int32_t device;
    struct flight *flights; /* a ring buffer, as long as the ring has slots */
    uint32_t capacity, head, count;
};

static sllm_status start_copies(struct copier *copier, sllmi_slot *slot, sllm_error *err)
{
    sllm_job *job = copier->job;
    const sllmi_chunk *chunk = &job->plan.chunks[slot->chunk];
    struct flight *flight = &copier->flights[(copier->head + copier->count) % copier->capacity];
    flight->slot = slot;
    flight->bytes = 0;
    copier->count++; /* from here on drain() and land() see to the slot */
    sllmi_piece_cursor cursor = {.extent = chunk->first};
    sllmi_piece piece;
    while (sllmi_plan_next_piece(&job->plan, chunk, copier->device, &cursor, &piece)) {
        sllm_status status = copier->ops->copy(copier->queue, piece.target,
                                               slot->bytes + piece.chunk_offset, piece.bytes, err);
        if (status != SLLM_OK) {
            return status;
        }
        flight->bytes += piece.bytes;
    }
    return copier->ops->fence(copier->queue, &flight->fence, err);
}

/* The oldest flight is over. */
static void land(struct copier *copier, bool arrived)
{
    sllm_job *job = copier->job;
    struct flight *flight = &copier->flights[copier->head];
    copier->head = (copier->head + 1) % copier->capacity;
    copier->count--;
    if (arrived) {
        uint64_t index = flight->slot->chunk;
        job->bytes_done += flight->bytes;
        if (atomic_fetch_sub(&job->copies_left[index], 1) == 1) {
            chunk_in_place(job, index);
        }
        moved(job);
    }
    sllmi_ring_release(job->ring, flight->slot);
}

static sllm_status copy_all(struct copier *copier, sllmi_worker *worker, sllm_error *err)
{
    sllm_job *job = copier->job;
    sllmi_queue *filled = &job->queues[copier->device];
    while (!job->stop) {
        struct flight *oldest = &copier->flights[copier->head];
        worker->chunk = copier->count == 0 ? 0 : oldest->slot->chunk + 1;
        /* Start what is ready; wait for the oldest copy only when nothing else is to be done. */
        sllmi_slot *slot = sllmi_queue_pop(filled, copier->count == 0 ? SLLMI_POLL_MS : 0);
        if (slot != NULL) {
            worker->chunk = slot->chunk + 1;
            sllm_status status = start_copies(copier, slot, err);
            if (status != SLLM_OK) {
                return status;
            }
        } else if (copier->count > 0) {
            sllm_status status = copier->ops->wait(copier->queue, oldest->fence, COPY_WAIT_MS, err);
            if (status == SLLM_OK) {
                land(copier, true);
            } else if (status != SLLM_E_BUSY) {
                return status;
            }
        } else if (sllmi_queue_ended(filled)) {
            break;
        }
    }
    return SLLM_OK;
}

/* Wait for the copies under way: only then may their slots be used again. It is also where the
 * device says whether one of them failed. */
static void end_copies(struct copier *copier)
{
    sllm_error failure = {0};
    sllm_status status;
    do {
        status = copier->ops->drain(copier->queue, SLLMI_POLL_MS, &failure);
    } while (status == SLLM_E_BUSY);
    if (status != SLLM_OK) {
        sllmi_job_fail(copier->job, &failure);
    }
    copier->ops->queue_close(copier->queue);
}

void *sllmi_copier_run(void *argument)
{
    sllmi_worker *worker = argument;
    sllm_job *job = worker->job;
    sllm_device *device = job->devices[worker->index];
    struct copier copier = {.job = job,
                            .ops = device->ops,
                            .device = (int32_t)worker->index,
                            .capacity = sllmi_ring_slot_count(job->ring)};
    sllm_error failure = {0};
    name_thread("copy", worker->index);
    sllm_status status = SLLM_OK;
    worker->chunk = SLLMI_STARTING;
    copier.flights = sllmi_sys.alloc(copier.capacity * sizeof *copier.flights);
    if (copier.flights == NULL) {
        status = sllmi_fail(&failure, SLLM_E_NOMEM, ENOMEM, "out of memory for copies to %s:%d",
                            device->ops->name, device->ordinal);
    }
    if (status == SLLM_OK) {
        status = device->ops->bind_thread(device->dev, &failure);
    }
    if (status == SLLM_OK) {
        status = device->ops->queue_open(device->dev, &copier.queue, &failure);
    }
    if (status == SLLM_OK) {
        status = copy_all(&copier, worker, &failure);
    }
    if (status != SLLM_OK) {
        sllmi_job_fail(job, &failure);
    }
    if (copier.queue != NULL) {
        end_copies(&copier);
    }
    while (copier.count > 0) {
        land(&copier, false);
    }
    free(copier.flights);
    worker->chunk = 0;

    pthread_mutex_lock(&job->lock);
    if (--job->copiers_running == 0) {
        job->copy_end_ns = sllmi_now_ns();
    }
    pthread_cond_broadcast(&job->changed);
    pthread_mutex_unlock(&job->lock);
    return NULL;
}
