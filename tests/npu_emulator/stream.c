/* Streams: each is a thread that runs its tasks in order; those of different streams overlap. */
#define _GNU_SOURCE
#include "emu.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#define STREAM_MAGIC 0x57E4A111u
#define MAX_STREAMS 256

static emu_stream *streams;
static pthread_mutex_t streams_lock = PTHREAD_MUTEX_INITIALIZER;
static int next_id;

emu_task *emu_new_task(enum task_kind kind)
{
    emu_task *task = calloc(1, sizeof *task);
    if (task == NULL) {
        abort();
    }
    task->kind = kind;
    return task;
}

/* The error of a task that failed here; after one, the stream's tasks that move bytes are skipped. */
static aclError run_task(emu_task *task, bool skipped)
{
    switch (task->kind) {
    case TASK_COPY: return skipped ? ACL_SUCCESS : emu_copy_run(task);
    case TASK_SET:
        if (!skipped) {
            memset(emu_shadow(task->target), task->value, task->bytes);
        }
        return ACL_SUCCESS;
    case TASK_RECORD:
    case TASK_WAIT: emu_event_run(task); return ACL_SUCCESS;
    case TASK_CALL: task->call(task->argument); return ACL_SUCCESS;
    }
    return ACL_SUCCESS;
}

static void *run_stream(void *argument)
{
    emu_stream *stream = argument;
    pthread_mutex_lock(&stream->lock);
    for (;;) {
        while (stream->head == NULL && !stream->stop) {
            pthread_cond_wait(&stream->filled, &stream->lock);
        }
        emu_task *task = stream->head;
        if (task == NULL) {
            break;
        }
        stream->head = task->next;
        if (stream->head == NULL) {
            stream->tail = &stream->head;
        }
        bool skipped = stream->error != ACL_SUCCESS;
        stream->telling = task->kind == TASK_RECORD;
        pthread_mutex_unlock(&stream->lock);
        aclError code = run_task(task, skipped);
        if (task->kind == TASK_RECORD && emu_settings.delay_us > 0) {
            /* An event may tell of its work before the stream does of its end. */
            emu_sleep_s((double)emu_settings.delay_us * 1e-6);
        }
        for (int i = 0; i < 2; i++) {
            if (task->ranges[i] != NULL) {
                task->ranges[i]->in_flight--;
            }
        }
        free(task);
        emu_counters.tasks++;
        pthread_mutex_lock(&stream->lock);
        stream->error = stream->error == ACL_SUCCESS ? code : stream->error;
        stream->finished++;
        stream->telling = 0;
        pthread_cond_broadcast(&stream->done);
    }
    pthread_mutex_unlock(&stream->lock);
    return NULL;
}

static emu_stream *new_stream(emu_context *context)
{
    emu_stream *stream = calloc(1, sizeof *stream);
    pthread_condattr_t monotonic;
    sigset_t all, before;
    if (stream == NULL) {
        abort();
    }
    stream->magic = STREAM_MAGIC;
    stream->context = context;
    stream->tail = &stream->head;
    pthread_mutex_init(&stream->lock, NULL);
    pthread_cond_init(&stream->filled, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&stream->done, &monotonic);
    pthread_condattr_destroy(&monotonic);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&stream->thread, NULL, run_stream, stream) != 0) {
        abort();
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_mutex_lock(&streams_lock);
    stream->id = next_id++;
    stream->next = streams;
    streams = stream;
    pthread_mutex_unlock(&streams_lock);
    return stream;
}

static emu_stream *default_stream(emu_context *context)
{
    pthread_mutex_lock(&emu_memory_lock);
    emu_stream *stream = context->default_stream;
    if (stream == NULL) {
        stream = new_stream(context);
        context->default_stream = stream;
    }
    pthread_mutex_unlock(&emu_memory_lock);
    return stream;
}

aclError emu_stream_of(void *handle, emu_stream **stream_out, const char *function)
{
    aclError code;
    emu_context *context = emu_current(function, &code);
    if (context == NULL) {
        return code;
    }
    if (handle == NULL) {
        *stream_out = default_stream(context);
        return ACL_SUCCESS;
    }
    pthread_mutex_lock(&streams_lock);
    emu_stream *stream = streams;
    while (stream != NULL && stream != handle) {
        stream = stream->next;
    }
    pthread_mutex_unlock(&streams_lock);
    if (stream == NULL || stream->magic != STREAM_MAGIC) {
        return emu_fail(RT_INVALID_HANDLE, "%s: %p is no live stream", function, handle);
    }
    if (stream->context != context) {
        return emu_fail(RT_STREAM_CONTEXT, "%s: a stream of device %d, a thread on device %d",
                        function, stream->context->device, context->device);
    }
    *stream_out = stream;
    return ACL_SUCCESS;
}

#define STREAM(handle, stream)                                                                     \
    emu_stream *stream;                                                                            \
    aclError stream##_code_ = emu_stream_of(handle, &stream, __func__);                            \
    if (stream##_code_ != ACL_SUCCESS) {                                                           \
        return stream##_code_;                                                                     \
    }

void emu_enqueue(emu_stream *stream, emu_task *task)
{
    pthread_mutex_lock(&stream->lock);
    *stream->tail = task;
    stream->tail = &task->next;
    stream->queued++;
    pthread_cond_signal(&stream->filled);
    pthread_mutex_unlock(&stream->lock);
}

aclError emu_drain(emu_stream *stream, int timeout_ms)
{
    struct timespec deadline = emu_deadline(timeout_ms < 0 ? 0 : timeout_ms);
    aclError code = ACL_SUCCESS;
    pthread_mutex_lock(&stream->lock);
    uint64_t until = stream->queued;
    while (stream->finished < until && code == ACL_SUCCESS) {
        if (timeout_ms < 0) {
            pthread_cond_wait(&stream->done, &stream->lock);
        } else if (pthread_cond_timedwait(&stream->done, &stream->lock, &deadline) == ETIMEDOUT &&
                   stream->finished < until) {
            code = RT_STREAM_SYNC_TIMEOUT;
        }
    }
    code = code == ACL_SUCCESS ? stream->error : code;
    pthread_mutex_unlock(&stream->lock);
    return code;
}

aclError emu_drain_device(int device)
{
    emu_stream *found[MAX_STREAMS];
    aclError code = ACL_SUCCESS;
    int count = 0;
    pthread_mutex_lock(&streams_lock);
    for (emu_stream *stream = streams; stream != NULL && count < MAX_STREAMS;
         stream = stream->next) {
        if (stream->context->device == device) {
            found[count++] = stream;
        }
    }
    pthread_mutex_unlock(&streams_lock);
    for (int i = 0; i < count; i++) {
        aclError one = emu_drain(found[i], -1);
        code = code == ACL_SUCCESS ? one : code;
    }
    return code;
}

static aclError create(void **stream_out, const char *function)
{
    aclError code;
    emu_context *context = emu_current(function, &code);
    if (context == NULL) {
        return code;
    }
    *stream_out = new_stream(context);
    emu_counters.streams++;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtCreateStream(void **stream_out)
{
    EMU_ENTER("()");
    return create(stream_out, __func__);
}

EMU_API aclError aclrtCreateStreamWithConfig(void **stream_out, uint32_t priority, uint32_t flags)
{
    EMU_ENTER("(%u, %u)", priority, flags);
    return create(stream_out, __func__);
}

static aclError destroy(void *handle, const char *function)
{
    emu_stream *stream;
    aclError code = emu_stream_of(handle, &stream, function);
    if (code != ACL_SUCCESS || handle == NULL) {
        return code != ACL_SUCCESS ? code : emu_fail(RT_PARAM_INVALID, "%s(NULL)", function);
    }
    pthread_mutex_lock(&stream->lock);
    if (stream->finished + stream->telling < stream->queued) {
        emu_counters.busy_streams_destroyed++;
    }
    stream->stop = true;
    pthread_cond_signal(&stream->filled);
    pthread_mutex_unlock(&stream->lock);
    pthread_join(stream->thread, NULL);
    pthread_mutex_lock(&streams_lock);
    emu_stream **place = &streams;
    while (*place != stream) {
        place = &(*place)->next;
    }
    *place = stream->next;
    pthread_mutex_unlock(&streams_lock);
    pthread_cond_destroy(&stream->filled);
    pthread_cond_destroy(&stream->done);
    pthread_mutex_destroy(&stream->lock);
    stream->magic = 0;
    free(stream);
    emu_counters.streams--;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtDestroyStream(void *stream)
{
    EMU_ENTER("(%p)", stream);
    return destroy(stream, __func__);
}

EMU_API aclError aclrtDestroyStreamForce(void *stream)
{
    EMU_ENTER("(%p)", stream);
    return destroy(stream, __func__);
}

EMU_API aclError aclrtSynchronizeStream(void *handle)
{
    EMU_ENTER("(%p)", handle);
    STREAM(handle, stream)
    aclError code = emu_drain(stream, -1);
    return code == ACL_SUCCESS ? code : emu_fail(code, "a task of stream %d failed", stream->id);
}

EMU_API aclError aclrtSynchronizeStreamWithTimeout(void *handle, int32_t timeout_ms)
{
    EMU_ENTER("(%p, %d)", handle, timeout_ms);
    STREAM(handle, stream)
    aclError code = emu_drain(stream, timeout_ms);
    return code == ACL_SUCCESS ? code
                               : emu_fail(code, "stream %d: late, or a task failed", stream->id);
}

EMU_API aclError aclrtStreamQuery(void *handle, uint32_t *status_out)
{
    EMU_ENTER("(%p)", handle);
    STREAM(handle, stream)
    pthread_mutex_lock(&stream->lock);
    *status_out = stream->finished < stream->queued;
    pthread_mutex_unlock(&stream->lock);
    return ACL_SUCCESS;
}

EMU_API aclError aclrtStreamGetId(void *handle, int32_t *id_out)
{
    EMU_ENTER("(%p)", handle);
    STREAM(handle, stream)
    *id_out = stream->id;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtSynchronizeDevice(void)
{
    EMU_ENTER("()");
    EMU_CONTEXT(context)
    aclError code = emu_drain_device(context->device);
    return code == ACL_SUCCESS ? code
                               : emu_fail(code, "a task of device %d failed", context->device);
}

EMU_API aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout_ms)
{
    (void)timeout_ms;
    return aclrtSynchronizeDevice();
}

EMU_API aclError aclrtLaunchHostFunc(void *handle, void (*call)(void *), void *argument)
{
    EMU_ENTER("(%p)", handle);
    STREAM(handle, stream)
    emu_task *task = emu_new_task(TASK_CALL);
    task->call = call;
    task->argument = argument;
    emu_enqueue(stream, task);
    return ACL_SUCCESS;
}

EMU_API aclError aclrtLaunchCallback(void (*call)(void *), void *argument, uint32_t blocking,
                                     void *handle)
{
    (void)blocking;
    return aclrtLaunchHostFunc(handle, call, argument);
}
