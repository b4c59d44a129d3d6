/* Events: a record is a task; waiting for one is waiting for its generation. */
#define _GNU_SOURCE
#include "emu.h"

#include <errno.h>
#include <stdlib.h>

#define EVENT_SYNC 1u
#define EVENT_DEFAULT 9u

struct emu_event {
    uint32_t flags;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t recorded, done; /* generations */
    struct timespec at;
    atomic_int users; /* the handle, and tasks */
    struct emu_event *next;
};

static emu_event *events; /* whose handles are live */
static pthread_mutex_t events_lock = PTHREAD_MUTEX_INITIALIZER;

static void release(emu_event *event)
{
    if (atomic_fetch_sub(&event->users, 1) == 1) {
        pthread_cond_destroy(&event->changed);
        pthread_mutex_destroy(&event->lock);
        free(event);
    }
}

void emu_event_run(emu_task *task)
{
    emu_event *event = task->event;
    pthread_mutex_lock(&event->lock);
    if (task->kind == TASK_RECORD) {
        clock_gettime(CLOCK_MONOTONIC, &event->at);
        event->done = task->generation > event->done ? task->generation : event->done;
        pthread_cond_broadcast(&event->changed);
    } else {
        while (event->done < task->generation) {
            pthread_cond_wait(&event->changed, &event->lock);
        }
    }
    pthread_mutex_unlock(&event->lock);
    release(event);
}

static aclError create(void **event_out, uint32_t flags, const char *function)
{
    aclError code;
    pthread_condattr_t monotonic;
    if (emu_current(function, &code) == NULL) {
        return code;
    }
    emu_event *event = calloc(1, sizeof *event);
    if (event == NULL) {
        abort();
    }
    event->flags = flags;
    event->users = 1;
    pthread_mutex_init(&event->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&event->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_lock(&events_lock);
    event->next = events;
    events = event;
    pthread_mutex_unlock(&events_lock);
    *event_out = event;
    emu_counters.events++;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtCreateEvent(void **event_out)
{
    EMU_ENTER("()");
    return create(event_out, EVENT_DEFAULT, __func__);
}

EMU_API aclError aclrtCreateEventWithFlag(void **event_out, uint32_t flags)
{
    EMU_ENTER("(%u)", flags);
    return create(event_out, flags, __func__);
}

EMU_API aclError aclrtCreateEventExWithFlag(void **event_out, uint32_t flags)
{
    EMU_ENTER("(%u)", flags);
    return create(event_out, flags, __func__);
}

static bool is_live(const void *handle)
{
    pthread_mutex_lock(&events_lock);
    const emu_event *event = events;
    while (event != NULL && event != handle) {
        event = event->next;
    }
    pthread_mutex_unlock(&events_lock);
    return event != NULL;
}

#define EVENT(handle, event)                                                                       \
    emu_event *event = handle;                                                                     \
    if (!is_live(event)) {                                                                         \
        return emu_fail(RT_INVALID_HANDLE, "%s: %p is no event", __func__, handle);                \
    }

EMU_API aclError aclrtDestroyEvent(void *handle)
{
    EMU_ENTER("(%p)", handle);
    EVENT(handle, event)
    pthread_mutex_lock(&events_lock);
    emu_event **place = &events;
    while (*place != event) {
        place = &(*place)->next;
    }
    *place = event->next;
    pthread_mutex_unlock(&events_lock);
    release(event);
    emu_counters.events--;
    return ACL_SUCCESS;
}

static void enqueue(emu_stream *stream, emu_event *event, enum task_kind kind, uint64_t generation)
{
    emu_task *task = emu_new_task(kind);
    task->event = event;
    task->generation = generation;
    event->users++;
    emu_enqueue(stream, task);
}

EMU_API aclError aclrtRecordEvent(void *handle, void *stream_handle)
{
    EMU_ENTER("(%p, %p)", handle, stream_handle);
    EVENT(handle, event)
    emu_stream *stream;
    aclError code = emu_stream_of(stream_handle, &stream, __func__);
    if (code == ACL_SUCCESS) {
        pthread_mutex_lock(&event->lock);
        uint64_t generation = ++event->recorded;
        pthread_mutex_unlock(&event->lock);
        enqueue(stream, event, TASK_RECORD, generation);
    }
    return code;
}

EMU_API aclError aclrtResetEvent(void *handle, void *stream_handle)
{
    EMU_ENTER("(%p, %p)", handle, stream_handle);
    EVENT(handle, event)
    (void)event;
    emu_stream *stream;
    return emu_stream_of(stream_handle, &stream, __func__);
}

EMU_API aclError aclrtStreamWaitEvent(void *stream_handle, void *handle)
{
    EMU_ENTER("(%p, %p)", stream_handle, handle);
    EVENT(handle, event)
    emu_stream *stream;
    aclError code = emu_stream_of(stream_handle, &stream, __func__);
    if (code != ACL_SUCCESS) {
        return code;
    }
    if ((event->flags & EVENT_SYNC) == 0) {
        return emu_fail(RT_PARAM_INVALID, "aclrtStreamWaitEvent: an event without ACL_EVENT_SYNC");
    }
    pthread_mutex_lock(&event->lock);
    uint64_t generation = event->recorded;
    pthread_mutex_unlock(&event->lock);
    enqueue(stream, event, TASK_WAIT, generation);
    return ACL_SUCCESS;
}

static bool is_done(emu_event *event)
{
    pthread_mutex_lock(&event->lock);
    bool done = event->done >= event->recorded;
    pthread_mutex_unlock(&event->lock);
    return done;
}

EMU_API aclError aclrtQueryEventStatus(void *handle, uint32_t *status_out)
{
    EMU_ENTER("(%p)", handle);
    EVENT(handle, event)
    *status_out = is_done(event);
    return ACL_SUCCESS;
}

/* The deprecated one answers the other way round. */
EMU_API aclError aclrtQueryEvent(void *handle, uint32_t *status_out)
{
    EMU_ENTER("(%p)", handle);
    EVENT(handle, event)
    *status_out = !is_done(event);
    return ACL_SUCCESS;
}

EMU_API aclError aclrtQueryEventWaitStatus(void *handle, uint32_t *status_out)
{
    EMU_ENTER("(%p)", handle);
    EVENT(handle, event)
    *status_out = !is_done(event);
    return ACL_SUCCESS;
}

static aclError await(emu_event *event, int timeout_ms)
{
    struct timespec deadline = emu_deadline(timeout_ms < 0 ? 0 : timeout_ms);
    aclError code = ACL_SUCCESS;
    pthread_mutex_lock(&event->lock);
    uint64_t generation = event->recorded;
    while (event->done < generation && code == ACL_SUCCESS) {
        if (timeout_ms < 0) {
            pthread_cond_wait(&event->changed, &event->lock);
        } else if (pthread_cond_timedwait(&event->changed, &event->lock, &deadline) == ETIMEDOUT &&
                   event->done < generation) {
            code = RT_EVENT_SYNC_TIMEOUT;
        }
    }
    pthread_mutex_unlock(&event->lock);
    return code;
}

EMU_API aclError aclrtSynchronizeEvent(void *handle)
{
    EMU_ENTER("(%p)", handle);
    EVENT(handle, event)
    return await(event, -1);
}

EMU_API aclError aclrtSynchronizeEventWithTimeout(void *handle, int32_t timeout_ms)
{
    EMU_ENTER("(%p, %d)", handle, timeout_ms);
    EVENT(handle, event)
    aclError code = await(event, timeout_ms);
    return code == ACL_SUCCESS ? code : emu_fail(code, "the event came too late");
}

EMU_API aclError aclrtEventElapsedTime(float *ms_out, void *start, void *end)
{
    EMU_ENTER("(%p, %p)", start, end);
    EVENT(start, first)
    EVENT(end, last)
    if (first->done == 0 || last->done == 0) {
        return emu_fail(RT_EVENT_TIMESTAMP_INVALID, "an event that has not been recorded");
    }
    *ms_out = (float)((double)(last->at.tv_sec - first->at.tv_sec) * 1e3 +
                      (double)(last->at.tv_nsec - first->at.tv_nsec) * 1e-6);
    return ACL_SUCCESS;
}
