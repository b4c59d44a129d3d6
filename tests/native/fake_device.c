#define _GNU_SOURCE
#include "fake_device.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "device.h"
#include "error.h"
#include "os.h"
#include "queue.h"

#define MAX_DEVICES 64

const char *const fake_slot_names[FAKE_SLOTS] = {
    "probe", "open",  "bind_thread", "host_alloc", "queue_open",
    "copy",  "fence", "wait",        "drain",      "queue_adopt"};

typedef struct fake_dev {
    int32_t ordinal;
} fake_dev;

typedef struct fake_copy {
    char *target;
    const char *source;
    size_t bytes;
    uint64_t sum;
    bool done;
} fake_copy;

typedef struct fake_queue {
    fake_dev *dev;
    pthread_t owner, thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    fake_copy *copies;
    uint64_t count, capacity;
    uint64_t landed;   /* all copies below are done */
    uint64_t released; /* all copies below were seen to be done: their sources may change */
    bool closing;
    bool gave_up; /* drain() failed: the copies are over, in whatever state */
    bool adopted; /* its thread is the caller's, which nobody bound */
    check_random random;
} fake_queue;

static fake_dev devices[MAX_DEVICES];
static _Atomic uint64_t calls[FAKE_SLOTS];
static struct {
    fake_slot slot;
    uint64_t nth;
} fault;
static atomic_bool failed, hold;
static atomic_int open_devices, open_queues, host_blocks;
static _Atomic uint64_t copied_bytes;
static uint32_t longest_delay_us;
static _Thread_local fake_dev *bound;

static sllm_status count(fake_slot slot, const fake_dev *dev, sllm_error *err)
{
    uint64_t number = ++calls[slot];
    if (fault.nth != number || fault.slot != slot) {
        return SLLM_OK;
    }
    failed = true;
    return sllmi_fail_device(err, SLLM_E_DEVICE, FAKE_DEVICE_CODE + (int)slot,
                             "fake:%d: call %llu of %s failed", dev == NULL ? -1 : dev->ordinal,
                             (unsigned long long)number, fake_slot_names[slot]);
}

static uint64_t checksum(const char *bytes, size_t length)
{
    uint64_t sum = length;
    for (; length >= 8; bytes += 8, length -= 8) {
        uint64_t word;
        memcpy(&word, bytes, 8);
        sum = (sum ^ word) * 0x100000001B3u;
        sum ^= sum >> 29;
    }
    for (size_t i = 0; i < length; i++) {
        sum = (sum ^ (unsigned char)bytes[i]) * 0x100000001B3u;
    }
    return sum;
}

static void check_source(const fake_copy *copy)
{
    CHECK_U64(checksum(copy->source, copy->bytes), copy->sum);
}

static sllm_status fake_probe(int32_t *count_out, sllm_error *err)
{
    *count_out = MAX_DEVICES;
    return count(FAKE_PROBE, NULL, err);
}

static sllm_status fake_dev_open(int32_t ordinal, void **dev_out, sllm_error *err)
{
    devices[ordinal].ordinal = ordinal;
    sllm_status status = count(FAKE_OPEN, &devices[ordinal], err);
    if (status == SLLM_OK) {
        open_devices++;
        *dev_out = &devices[ordinal];
    }
    return status;
}

static void fake_dev_close(void *dev)
{
    if (dev != NULL) {
        open_devices--;
    }
}

static sllm_status fake_bind_thread(void *dev, sllm_error *err)
{
    sllm_status status = count(FAKE_BIND_THREAD, dev, err);
    bound = status == SLLM_OK ? dev : NULL;
    return status;
}

static sllm_status fake_host_alloc(void *dev, size_t bytes, void **ptr_out, sllm_error *err)
{
    *ptr_out = NULL;
    sllm_status status = count(FAKE_HOST_ALLOC, dev, err);
    if (status == SLLM_OK) {
        CHECK(posix_memalign(ptr_out, SLLM_PAGE_BYTES, bytes) == 0);
        memset(*ptr_out, 0xCC, bytes);
        host_blocks++;
    }
    return status;
}

static sllm_status fake_host_free(void *dev, void *ptr)
{
    CHECK(dev != NULL && ptr != NULL);
    host_blocks--;
    free(ptr);
    return SLLM_OK;
}

/* Some copy that is not done. */
static fake_copy *pick(fake_queue *queue)
{
    fake_copy *picked = NULL;
    uint64_t seen = 0;
    for (uint64_t i = queue->landed; i < queue->count; i++) {
        if (!queue->copies[i].done && check_random_below(&queue->random, ++seen) == 0) {
            picked = &queue->copies[i];
        }
    }
    return picked;
}

static void pause_for(uint64_t ns)
{
    const struct timespec delay = {.tv_sec = (time_t)(ns / 1000000000u),
                                   .tv_nsec = (long)(ns % 1000000000u)};
    nanosleep(&delay, NULL);
}

static void *fake_queue_run(void *argument)
{
    fake_queue *queue = argument;
    pthread_mutex_lock(&queue->lock);
    for (;;) {
        fake_copy *picked = pick(queue);
        if (picked == NULL && queue->closing) {
            break;
        }
        if (picked == NULL || hold) {
            (void)sllmi_cond_wait(&queue->changed, &queue->lock, sllmi_now_ns() + 5000000u);
            continue;
        }
        fake_copy copy = *picked;
        uint64_t number = (uint64_t)(picked - queue->copies);
        uint64_t delay_us = check_random_below(&queue->random, longest_delay_us + 1u);
        pthread_mutex_unlock(&queue->lock);
        if (delay_us > 0) {
            pause_for(delay_us * 1000);
        }
        check_source(&copy);
        memcpy(copy.target, copy.source, copy.bytes);
        check_source(&copy);
        copied_bytes += copy.bytes;
        pthread_mutex_lock(&queue->lock);
        queue->copies[number].done = true; /* the array may have moved */
        while (queue->landed < queue->count && queue->copies[queue->landed].done) {
            queue->landed++;
        }
        pthread_cond_broadcast(&queue->changed);
    }
    pthread_mutex_unlock(&queue->lock);
    return NULL;
}

static sllm_status make_queue(fake_slot slot, void *dev, void **queue_out, sllm_error *err)
{
    *queue_out = NULL;
    sllm_status status = count(slot, dev, err);
    if (status != SLLM_OK) {
        return status;
    }
    fake_queue *queue = calloc(1, sizeof *queue);
    CHECK(queue != NULL);
    queue->dev = dev;
    queue->owner = pthread_self();
    queue->adopted = slot == FAKE_QUEUE_ADOPT;
    queue->random = check_random_start((uint64_t)queue->dev->ordinal + calls[slot]);
    pthread_mutex_init(&queue->lock, NULL);
    sllmi_cond_init(&queue->changed);
    CHECK(pthread_create(&queue->thread, NULL, fake_queue_run, queue) == 0);
    open_queues++;
    *queue_out = queue;
    return SLLM_OK;
}

static sllm_status fake_queue_open(void *dev, void **queue_out, sllm_error *err)
{
    CHECK(bound == dev);
    return make_queue(FAKE_QUEUE_OPEN, dev, queue_out, err);
}

static sllm_status fake_queue_adopt(void *dev, uint64_t stream, void **queue_out, sllm_error *err)
{
    CHECK(stream == 0);
    CHECK(bound == NULL);
    return make_queue(FAKE_QUEUE_ADOPT, dev, queue_out, err);
}

/* Under the queue's lock: whoever asked learns that the copies below `end` are done. */
static void release_sources(fake_queue *queue, uint64_t end)
{
    for (; queue->released < end; queue->released++) {
        check_source(&queue->copies[queue->released]);
    }
}

static void check_thread(const fake_queue *queue)
{
    CHECK(bound == (queue->adopted ? NULL : queue->dev));
    CHECK(pthread_equal(queue->owner, pthread_self()));
}

static void fake_queue_close(void *argument)
{
    fake_queue *queue = argument;
    if (queue == NULL) {
        return;
    }
    check_thread(queue);
    pthread_mutex_lock(&queue->lock);
    CHECK(queue->gave_up || queue->landed == queue->count); /* it was drained */
    queue->closing = true;
    pthread_cond_broadcast(&queue->changed);
    pthread_mutex_unlock(&queue->lock);
    pthread_join(queue->thread, NULL);
    CHECK_U64(queue->landed, queue->count);
    release_sources(queue, queue->count);
    pthread_cond_destroy(&queue->changed);
    pthread_mutex_destroy(&queue->lock);
    free(queue->copies);
    free(queue);
    open_queues--;
}

static sllm_status fake_copy_start(void *argument, uint64_t dst, const void *src, size_t bytes,
                                   sllm_error *err)
{
    fake_queue *queue = argument;
    check_thread(queue);
    sllm_status status = count(FAKE_COPY, queue->dev, err);
    if (status != SLLM_OK) {
        return status;
    }
    fake_copy copy = {.target = (char *)(uintptr_t)dst,
                      .source = src,
                      .bytes = bytes,
                      .sum = checksum(src, bytes)};
    CHECK(bytes > 0);
    pthread_mutex_lock(&queue->lock);
    if (queue->count == queue->capacity) {
        queue->capacity = 2 * queue->capacity + 8;
        queue->copies = realloc(queue->copies, queue->capacity * sizeof *queue->copies);
        CHECK(queue->copies != NULL);
    }
    queue->copies[queue->count++] = copy;
    pthread_cond_broadcast(&queue->changed);
    pthread_mutex_unlock(&queue->lock);
    return SLLM_OK;
}

static sllm_status fake_fence(void *argument, uint64_t *fence_out, sllm_error *err)
{
    fake_queue *queue = argument;
    check_thread(queue);
    *fence_out = 0;
    sllm_status status = count(FAKE_FENCE, queue->dev, err);
    if (status == SLLM_OK) {
        *fence_out = queue->count; /* only the owner appends */
    }
    return status;
}

static sllm_status await_fence(fake_queue *queue, uint64_t fence, uint32_t timeout_ms,
                               sllm_error *err)
{
    CHECK(fence <= queue->count);
    uint64_t deadline = sllmi_now_ns() + (uint64_t)timeout_ms * 1000000u;
    bool in_time = true;
    pthread_mutex_lock(&queue->lock);
    while (queue->landed < fence && in_time) {
        in_time = sllmi_cond_wait(&queue->changed, &queue->lock, deadline);
    }
    bool passed = queue->landed >= fence;
    if (passed) {
        release_sources(queue, fence);
    }
    pthread_mutex_unlock(&queue->lock);
    return passed ? SLLM_OK : sllmi_fail(err, SLLM_E_BUSY, 0, "fake: not yet");
}

static sllm_status fake_wait(void *argument, uint64_t fence, uint32_t timeout_ms, sllm_error *err)
{
    fake_queue *queue = argument;
    check_thread(queue);
    sllm_status status = count(FAKE_WAIT, queue->dev, err);
    return status == SLLM_OK ? await_fence(queue, fence, timeout_ms, err) : status;
}

static sllm_status fake_drain(void *argument, uint32_t timeout_ms, sllm_error *err)
{
    fake_queue *queue = argument;
    check_thread(queue);
    sllm_status status = count(FAKE_DRAIN, queue->dev, err);
    if (status != SLLM_OK) {
        queue->gave_up = true;
        return status;
    }
    return await_fence(queue, queue->count, timeout_ms, err);
}

static const sllmi_device_ops fake_ops = {
    .abi = SLLMI_DEVICE_ABI,
    .name = "fake",
    .probe = fake_probe,
    .open = fake_dev_open,
    .close = fake_dev_close,
    .bind_thread = fake_bind_thread,
    .host_alloc = fake_host_alloc,
    .host_free = fake_host_free,
    .queue_open = fake_queue_open,
    .queue_close = fake_queue_close,
    .copy = fake_copy_start,
    .fence = fake_fence,
    .wait = fake_wait,
    .drain = fake_drain,
    .queue_adopt = fake_queue_adopt,
};

void fake_start(uint32_t delay_us)
{
    for (int i = 0; i < FAKE_SLOTS; i++) {
        calls[i] = 0;
    }
    fault.nth = 0;
    failed = hold = false;
    copied_bytes = 0;
    longest_delay_us = delay_us;
}

void fake_end(void)
{
    CHECK_U64(open_queues, 0);
    CHECK_U64(host_blocks, 0);
    CHECK_U64(open_devices, 0);
}

void fake_fail(fake_slot slot, uint64_t nth)
{
    fault.slot = slot;
    fault.nth = nth;
}

uint64_t fake_calls(fake_slot slot)
{
    return calls[slot];
}

bool fake_failed(void)
{
    return failed;
}

void fake_hold(bool held)
{
    hold = held;
}

sllm_status fake_open_or_fail(int32_t ordinal, sllm_device **device_out, sllm_error *err)
{
    return sllmi_device_open_ops(&fake_ops, ordinal, device_out, err);
}

sllm_device *fake_open(int32_t ordinal)
{
    sllm_device *device;
    sllm_error err;
    CHECK_OK(fake_open_or_fail(ordinal, &device, &err), &err);
    return device;
}

uint64_t fake_copied_bytes(void)
{
    return copied_bytes;
}
