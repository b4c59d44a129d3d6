/* Calls on threads of ours, with a deadline; fences made of a runtime's events; runtime libraries. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>

#include "aside.h"
#include "check.h"
#include "dl.h"
#include "error.h"
#include "fences.h"
#include "os.h"
#include "system.h"

static pthread_t caller;
static atomic_bool release, undone;

static sllm_status succeed(sllmi_request *request, sllm_error *err)
{
    (void)err;
    CHECK(!pthread_equal(pthread_self(), caller));
    request->memory = &caller;
    request->count = 7;
    return SLLM_OK;
}

static sllm_status refuse(sllmi_request *request, sllm_error *err)
{
    return sllmi_fail_device(err, SLLM_E_DEVICE, 507000, "%s:%d refuses", request->backend,
                             request->ordinal);
}

static sllm_status hang(sllmi_request *request, sllm_error *err)
{
    while (!release) {
        sllmi_sleep_ns(1000000);
    }
    return succeed(request, err);
}

static void undo(sllmi_request *request)
{
    CHECK(request->memory == &caller);
    undone = true;
}

static sllmi_request request_for(sllm_status (*run)(sllmi_request *, sllm_error *),
                                 uint32_t timeout_ms)
{
    caller = pthread_self();
    return (sllmi_request){.run = run,
                           .undo = undo,
                           .what = "pinning memory",
                           .backend = "fake",
                           .ordinal = 3,
                           .timeout_ms = timeout_ms};
}

TEST(a_call_happens_on_another_thread_and_its_results_come_back)
{
    sllmi_request request = request_for(succeed, 60000);
    sllm_error err;
    CHECK_OK(sllmi_aside(&request, &err), &err);
    CHECK(request.memory == &caller);
    CHECK_U64(request.count, 7);
    CHECK(!undone);
    request = request_for(refuse, 60000);
    CHECK_STATUS(sllmi_aside(&request, &err), &err, SLLM_E_DEVICE);
    CHECK_U64(err.device_code, 507000);
    CHECK_TEXT(err.message, "fake:3 refuses");
    CHECK(sllmi_aside(&request, NULL) == SLLM_E_DEVICE);
}

TEST(a_call_that_hangs_is_left_behind_and_what_it_brings_too_late_is_undone)
{
    sllmi_request request = request_for(hang, 20);
    sllm_error err;
    release = undone = false;
    CHECK_STATUS(sllmi_aside(&request, &err), &err, SLLM_E_TIMEOUT);
    CHECK_TEXT(err.message, "fake:3 did not answer for 20 ms: pinning memory");
    CHECK(request.memory == NULL);
    release = true;
    while (!undone) {
        sllmi_sleep_ns(1000000);
    }
}

TEST(without_memory_or_threads_nothing_is_called)
{
    sllmi_request request = request_for(succeed, 60000);
    sllm_error err;
    system_start();
    system_fail(SYSTEM_ALLOC, 1, 1, ENOMEM);
    CHECK_STATUS(sllmi_aside(&request, &err), &err, SLLM_E_NOMEM);
    system_fail(SYSTEM_THREAD_CREATE, 1, 1, EAGAIN);
    CHECK_STATUS(sllmi_aside(&request, &err), &err, SLLM_E_NOMEM);
    CHECK_TEXT(err.message, "cannot start a thread for pinning memory on fake:3");
    CHECK(request.memory == NULL);
    system_end();
}

static sllm_status look_at_signals(sllmi_request *request, sllm_error *err)
{
    (void)request, (void)err;
    sigset_t blocked;
    CHECK(pthread_sigmask(SIG_BLOCK, NULL, &blocked) == 0);
    CHECK(sigismember(&blocked, SIGINT) && sigismember(&blocked, SIGTERM) &&
          sigismember(&blocked, SIGALRM) && sigismember(&blocked, SIGUSR1));
    CHECK(!sigismember(&blocked, SIGSEGV) && !sigismember(&blocked, SIGBUS));
    return SLLM_OK;
}

TEST(a_thread_of_ours_takes_no_signal_but_of_its_own_faults)
{
    sllmi_request request = request_for(look_at_signals, 60000);
    sllm_error err;
    sigset_t before, after;
    CHECK(pthread_sigmask(SIG_BLOCK, NULL, &before) == 0);
    CHECK_OK(sllmi_aside(&request, &err), &err);
    CHECK(pthread_sigmask(SIG_BLOCK, NULL, &after) == 0);
    CHECK(sigismember(&before, SIGINT) == sigismember(&after, SIGINT));
}

/* ---- fences -------------------------------------------------------------------------------- */

static int events[SLLMI_MAX_FENCES];
static uint64_t made, recorded, passed, destroyed;

static sllm_status make_event(void *queue, void **event_out, sllm_error *err)
{
    (void)queue, (void)err;
    *event_out = &events[made++];
    return SLLM_OK;
}

static sllm_status record_event(void *queue, void *event, sllm_error *err)
{
    (void)queue, (void)err;
    *(int *)event = (int)++recorded;
    return SLLM_OK;
}

static sllm_status query_event(void *queue, void *event, bool *passed_out, sllm_error *err)
{
    (void)queue, (void)err;
    *passed_out = (uint64_t)*(int *)event <= passed;
    return SLLM_OK;
}

static void destroy_event(void *queue, void *event)
{
    (void)queue, (void)event;
    destroyed++;
}

static const sllmi_event_ops event_ops = {
    .create = make_event, .record = record_event, .query = query_event, .destroy = destroy_event};

TEST(fences_pass_in_order_use_their_events_again_and_have_an_end)
{
    static sllmi_fences fences;
    sllm_error err;
    uint64_t fence;
    fences = (sllmi_fences){.ops = &event_ops};
    made = recorded = passed = destroyed = 0;
    for (uint64_t i = 1; i <= SLLMI_MAX_FENCES; i++) {
        CHECK_OK(sllmi_fences_add(&fences, &fence, &err), &err);
        CHECK_U64(fence, i);
    }
    CHECK_STATUS(sllmi_fences_add(&fences, &fence, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllmi_fences_wait(&fences, 1, 0, &err), &err, SLLM_E_BUSY);
    passed = 600;
    CHECK_OK(sllmi_fences_wait(&fences, 600, 0, &err), &err);
    CHECK_OK(sllmi_fences_wait(&fences, 3, 0, &err), &err);
    uint64_t start = sllmi_now_ns();
    CHECK_STATUS(sllmi_fences_wait(&fences, 601, 20, &err), &err, SLLM_E_BUSY);
    CHECK(sllmi_now_ns() - start >= 20000000u);
    for (uint64_t i = 1; i <= 600; i++) {
        CHECK_OK(sllmi_fences_add(&fences, &fence, &err), &err);
    }
    CHECK_U64(made, SLLMI_MAX_FENCES);
    passed = recorded;
    CHECK_OK(sllmi_fences_wait(&fences, fence, 0, &err), &err);
    sllmi_fences_end(&fences);
    CHECK_U64(destroyed, SLLMI_MAX_FENCES);
}

/* ---- libraries ----------------------------------------------------------------------------- */

struct functions {
    int (*compress)(void);
    size_t (*strlen)(const char *);
};

TEST(a_library_is_found_by_any_of_its_names_and_a_name_may_be_optional)
{
    static const char *const names[] = {"libno-such-library.so", "libc.so.6", NULL};
    static const char *const nowhere[] = {"$NO_SUCH_VARIABLE/lib64", "/no/such/folder", NULL};
    static const char *const missing[] = {"libno-such-library.so", NULL};
    sllmi_dl_library library = {.what = "a library", .names = names, .folders = nowhere};
    const sllmi_dl_symbol symbols[] = {
        {"no_such_function", offsetof(struct functions, compress), false},
        {"strlen", offsetof(struct functions, strlen), true},
    };
    struct functions functions;
    sllm_error err;
    void *handle;
    CHECK_OK(sllmi_dl_open(&library, &handle, &err), &err);
    CHECK_OK(sllmi_dl_resolve(&library, handle, symbols, 2, &functions, &err), &err);
    CHECK(functions.compress == NULL);
    CHECK_U64(functions.strlen("seven.."), 7);
    const sllmi_dl_symbol needed = {"no_such_function", 0, true};
    CHECK_STATUS(sllmi_dl_resolve(&library, handle, &needed, 1, &functions, &err), &err,
                 SLLM_E_NO_DEVICE);
    CHECK_TEXT(err.message, "a library has no `no_such_function`");
    library.names = missing;
    CHECK_STATUS(sllmi_dl_open(&library, &handle, &err), &err, SLLM_E_NO_DEVICE);
    CHECK(handle == NULL);
    CHECK_TEXT(err.message, "cannot load a library: libno-such-library.so: cannot open");
}
