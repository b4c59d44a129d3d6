/* The queue of filled slots. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "check.h"
#include "os.h"
#include "queue.h"
#include "system.h"

TEST(items_come_out_in_the_order_they_went_in_around_the_end_of_the_buffer)
{
    sllmi_queue queue;
    sllm_error err;
    CHECK_OK(sllmi_queue_init(&queue, 5, &err), &err);
    check_random random = check_random_start(0);
    uint64_t in = 1, out = 1;
    for (int i = 0; i < 2000; i++) {
        if (in - out < 5 && (in == out || check_random_below(&random, 2) == 0)) {
            sllmi_queue_push(&queue, (void *)(uintptr_t)in++);
        } else {
            CHECK_U64((uintptr_t)sllmi_queue_pop(&queue, 0), out++);
        }
    }
    sllmi_queue_free(&queue);
}

TEST(an_empty_queue_gives_nothing_at_once_and_after_its_time)
{
    sllmi_queue queue;
    sllm_error err;
    CHECK_OK(sllmi_queue_init(&queue, 2, &err), &err);
    CHECK(sllmi_queue_pop(&queue, 0) == NULL);
    uint64_t start = sllmi_now_ns();
    CHECK(sllmi_queue_pop(&queue, 20) == NULL);
    CHECK(sllmi_now_ns() - start >= 20000000u);
    CHECK(!sllmi_queue_ended(&queue));
    sllmi_queue_free(&queue);
}

TEST(a_closed_queue_gives_what_it_holds_and_then_ends)
{
    sllmi_queue queue;
    sllm_error err;
    int item;
    CHECK_OK(sllmi_queue_init(&queue, 2, &err), &err);
    sllmi_queue_push(&queue, &item);
    sllmi_queue_close(&queue);
    CHECK(!sllmi_queue_ended(&queue));
    CHECK(sllmi_queue_pop(&queue, 60000) == &item);
    CHECK(sllmi_queue_ended(&queue));
    CHECK(sllmi_queue_pop(&queue, 60000) == NULL); /* at once, or the alarm rings */
    sllmi_queue_free(&queue);
}

TEST(a_queue_that_never_was_can_be_freed)
{
    sllmi_queue queue = {0};
    sllmi_queue_free(&queue);
    sllm_error err;
    system_start();
    system_fail(SYSTEM_ALLOC, 1, 1, 12);
    CHECK_STATUS(sllmi_queue_init(&queue, 7, &err), &err, SLLM_E_NOMEM);
    system_end();
    sllmi_queue_free(&queue);
}

enum { PRODUCERS = 4, ITEMS = 2000 };

struct exchange {
    sllmi_queue queue;
    pthread_mutex_t lock;
    pthread_cond_t space;
    uint32_t room;
    atomic_uint next;
    unsigned char *seen;
};

static void *produce(void *argument)
{
    struct exchange *exchange = argument;
    for (;;) {
        uint32_t item = exchange->next++;
        if (item >= ITEMS) {
            return NULL;
        }
        pthread_mutex_lock(&exchange->lock); /* a slot for each item, as the ring gives them */
        while (exchange->room == 0) {
            pthread_cond_wait(&exchange->space, &exchange->lock);
        }
        exchange->room--;
        pthread_mutex_unlock(&exchange->lock);
        exchange->seen[item] = 1;
        sllmi_queue_push(&exchange->queue, &exchange->seen[item]);
    }
}

static void *consume(void *argument)
{
    struct exchange *exchange = argument;
    while (!sllmi_queue_ended(&exchange->queue)) {
        unsigned char *item = sllmi_queue_pop(&exchange->queue, 50);
        if (item == NULL) {
            continue;
        }
        CHECK_U64(*item, 1);
        *item = 2;
        pthread_mutex_lock(&exchange->lock);
        exchange->room++;
        pthread_cond_signal(&exchange->space);
        pthread_mutex_unlock(&exchange->lock);
    }
    return NULL;
}

TEST(many_producers_lose_nothing_and_what_they_wrote_is_seen)
{
    struct exchange exchange = {.lock = PTHREAD_MUTEX_INITIALIZER,
                                .space = PTHREAD_COND_INITIALIZER,
                                .room = 3,
                                .seen = calloc(ITEMS, 1)};
    sllm_error err;
    CHECK_OK(sllmi_queue_init(&exchange.queue, 3, &err), &err);
    pthread_t producers[PRODUCERS], consumer;
    CHECK(pthread_create(&consumer, NULL, consume, &exchange) == 0);
    for (int i = 0; i < PRODUCERS; i++) {
        CHECK(pthread_create(&producers[i], NULL, produce, &exchange) == 0);
    }
    for (int i = 0; i < PRODUCERS; i++) {
        pthread_join(producers[i], NULL);
    }
    sllmi_queue_close(&exchange.queue);
    pthread_join(consumer, NULL);
    for (int i = 0; i < ITEMS; i++) {
        CHECK_U64(exchange.seen[i], 2);
    }
    sllmi_queue_free(&exchange.queue);
    free(exchange.seen);
}
