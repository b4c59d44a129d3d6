#define _GNU_SOURCE
#include "aside.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "os.h"
#include "queue.h"

/* What caller and thread share; the last one of them frees it. */
struct task {
    pthread_mutex_t lock;
    pthread_cond_t ended;
    bool done, abandoned;
    sllmi_request request;
    sllm_status status;
    sllm_error failure;
};

static void free_task(struct task *task)
{
    pthread_cond_destroy(&task->ended);
    pthread_mutex_destroy(&task->lock);
    free(task);
}

static void *run_task(void *argument)
{
    struct task *task = argument;
    (void)pthread_setname_np(pthread_self(), "sllm-device");
    task->status = task->request.run(&task->request, &task->failure);
    pthread_mutex_lock(&task->lock);
    task->done = true;
    bool abandoned = task->abandoned;
    pthread_cond_signal(&task->ended);
    pthread_mutex_unlock(&task->lock);
    if (abandoned) {
        if (task->status == SLLM_OK && task->request.undo != NULL) {
            task->request.undo(&task->request);
        }
        free_task(task);
    }
    return NULL;
}

sllm_status sllmi_aside(sllmi_request *request, sllm_error *err)
{
    struct task *task = sllmi_sys.alloc(sizeof *task);
    if (task == NULL) {
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for %s on %s:%d", request->what,
                          request->backend, request->ordinal);
    }
    task->request = *request;
    pthread_mutex_init(&task->lock, NULL);
    sllmi_cond_init(&task->ended);
    pthread_t thread;
    int rc = sllmi_sys.thread_create(&thread, run_task, task);
    if (rc != 0) {
        free_task(task);
        return sllmi_fail(err, SLLM_E_NOMEM, rc, "cannot start a thread for %s on %s:%d: %s",
                          request->what, request->backend, request->ordinal, strerror(rc));
    }
    uint64_t deadline = sllmi_now_ns() + (uint64_t)request->timeout_ms * 1000000u;
    pthread_mutex_lock(&task->lock);
    while (!task->done && sllmi_cond_wait(&task->ended, &task->lock, deadline)) {
    }
    bool done = task->done;
    task->abandoned = !done;
    pthread_mutex_unlock(&task->lock);
    if (!done) {
        pthread_detach(thread);
        return sllmi_fail(err, SLLM_E_TIMEOUT, ETIMEDOUT, "%s:%d did not answer for %u ms: %s",
                          request->backend, request->ordinal, request->timeout_ms, request->what);
    }
    pthread_join(thread, NULL);
    *request = task->request;
    sllm_status status = task->status;
    if (status != SLLM_OK && err != NULL) {
        *err = task->failure;
    }
    free_task(task);
    return status;
}
