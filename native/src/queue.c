#define _GNU_SOURCE
#include "queue.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "error.h"
#include "os.h"

void sllmi_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &attributes);
    pthread_condattr_destroy(&attributes);
}

bool sllmi_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t deadline_ns)
{
    struct timespec deadline = {.tv_sec = (time_t)(deadline_ns / 1000000000u),
                                .tv_nsec = (long)(deadline_ns % 1000000000u)};
    return pthread_cond_timedwait(cond, lock, &deadline) != ETIMEDOUT;
}

sllm_status sllmi_queue_init(sllmi_queue *queue, uint32_t capacity, sllm_error *err)
{
    *queue = (sllmi_queue){.capacity = capacity};
    queue->items = sllmi_sys.alloc(capacity * sizeof *queue->items);
    if (queue->items == NULL) {
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for a queue of %u", capacity);
    }
    pthread_mutex_init(&queue->lock, NULL);
    sllmi_cond_init(&queue->changed);
    return SLLM_OK;
}

void sllmi_queue_free(sllmi_queue *queue)
{
    if (queue->items != NULL) {
        pthread_cond_destroy(&queue->changed);
        pthread_mutex_destroy(&queue->lock);
        free(queue->items);
        *queue = (sllmi_queue){0};
    }
}

void sllmi_queue_push(sllmi_queue *queue, void *item)
{
    pthread_mutex_lock(&queue->lock);
    queue->items[(queue->head + queue->count) % queue->capacity] = item;
    queue->count++;
    pthread_cond_signal(&queue->changed);
    pthread_mutex_unlock(&queue->lock);
}

void *sllmi_queue_pop(sllmi_queue *queue, uint32_t timeout_ms)
{
    uint64_t deadline = sllmi_now_ns() + (uint64_t)timeout_ms * 1000000u;
    void *item = NULL;
    pthread_mutex_lock(&queue->lock);
    while (queue->count == 0 && !queue->closed && timeout_ms > 0 &&
           sllmi_cond_wait(&queue->changed, &queue->lock, deadline)) {
    }
    if (queue->count > 0) {
        item = queue->items[queue->head];
        queue->head = (queue->head + 1) % queue->capacity;
        queue->count--;
    }
    pthread_mutex_unlock(&queue->lock);
    return item;
}

void sllmi_queue_close(sllmi_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    queue->closed = true;
    pthread_cond_broadcast(&queue->changed);
    pthread_mutex_unlock(&queue->lock);
}

bool sllmi_queue_ended(sllmi_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    bool ended = queue->closed && queue->count == 0;
    pthread_mutex_unlock(&queue->lock);
    return ended;
}
