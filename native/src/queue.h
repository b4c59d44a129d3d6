/* The bounded queue of filled slots from readers to one copier. */
#ifndef SLLMI_QUEUE_H
#define SLLMI_QUEUE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "sllm.h"

typedef struct sllmi_queue {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    void **items;
    uint32_t capacity, head, count;
    bool closed;
} sllmi_queue;

/* A condition on the monotonic clock. */
void sllmi_cond_init(pthread_cond_t *cond);
/* Wait until a time of sllmi_now_ns(). False when it has come. */
bool sllmi_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t deadline_ns);

/* `capacity` is the number of slots there are, so that a push never waits. */
sllm_status sllmi_queue_init(sllmi_queue *queue, uint32_t capacity, sllm_error *err);
void sllmi_queue_free(sllmi_queue *queue); /* a zeroed queue too */
void sllmi_queue_push(sllmi_queue *queue, void *item);
/* The oldest item; NULL after timeout_ms, or at once when the queue is closed and empty. */
void *sllmi_queue_pop(sllmi_queue *queue, uint32_t timeout_ms);
/* Nothing more will come. */
void sllmi_queue_close(sllmi_queue *queue);
/* Closed, and nothing left in it. */
bool sllmi_queue_ended(sllmi_queue *queue);

#endif
