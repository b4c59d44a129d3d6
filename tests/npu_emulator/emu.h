/* What the emulator's parts share. The public face is AscendCL's own: see README.md. */
#ifndef EMU_H
#define EMU_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#define EMU_API __attribute__((visibility("default")))

#ifndef EMU_CANN
#define EMU_CANN 900 /* whose names there are: 800 is CANN 8.0, 810, 830, 850, 900 */
#endif

typedef int aclError;

/* Source: acl/acl_base.h and acl/error_codes/rt_error_codes.h. */
enum {
    ACL_SUCCESS = 0,
    ACL_INVALID_PARAM = 100000,
    ACL_UNINITIALIZE = 100001,
    ACL_REPEAT_INITIALIZE = 100002,
    ACL_INVALID_FILE = 100003,
    ACL_WAIT_CALLBACK_TIMEOUT = 100036,
    RT_PARAM_INVALID = 107000,
    RT_INVALID_DEVICEID = 107001,
    RT_CONTEXT_NULL = 107002,
    RT_STREAM_CONTEXT = 107003,
    RT_EVENT_TIMESTAMP_INVALID = 107006,
    RT_INVALID_MEMORY_TYPE = 107016,
    RT_INVALID_HANDLE = 107017,
    RT_FEATURE_NOT_SUPPORT = 207000,
    RT_MEMORY_ALLOCATION = 207001,
    RT_NO_DEVICE = 207004,
    RT_IPC_ERROR = 507022,
    RT_STREAM_SYNC_TIMEOUT = 507046,
    RT_EVENT_SYNC_TIMEOUT = 507047,
    RT_DRV_INTERNAL_ERROR = 507899,
    HOST_MEMORY_ALREADY_REGISTERED = 507910,
    HOST_MEMORY_NOT_REGISTERED = 507911,
};

enum copy_kind {
    COPY_H2H,
    COPY_H2D,
    COPY_D2H,
    COPY_D2D,
    COPY_DEFAULT,
    COPY_BUFFER,
    COPY_INNER,
    COPY_INTER
};
enum pageable_rule { PAGEABLE_SYNC, PAGEABLE_UNDEFINED, PAGEABLE_ERROR };

#define EMU_MAX_DEVICES 16u
#define EMU_HUGE_BYTES (2u << 20)

/* ---- settings.c: the environment, and the counters that tests look at ---------------------- */

struct emu_settings {
    uint32_t devices;
    uint64_t window_bytes; /* of addresses, for one device */
    uint64_t memory_bytes; /* of one device; its upper half of the window is for imports */
    double h2d_bytes_s, d2h_bytes_s; /* 0: as fast as memcpy */
    long delay_us;                   /* before every asynchronous copy */
    uint64_t align_bytes;            /* both addresses of an asynchronous copy; 0: no rule */
    enum pageable_rule pageable;
    bool any_address, check_source, poison, abort_on_violation, strict_init;
    const char *soc, *version;
    FILE *trace;
};
extern struct emu_settings emu_settings;

/* X(name): counters of aclemuStat(). */
#define EMU_COUNTERS(X)                                                                            \
    X(h2d_bytes)                                                                                   \
    X(d2h_bytes)                                                                                   \
    X(d2d_bytes)                                                                                   \
    X(async_pinned)                                                                                \
    X(async_pageable)                                                                              \
    X(sync_copies)                                                                                 \
    X(mallocs)                                                                                     \
    X(frees)                                                                                       \
    X(host_mallocs)                                                                                \
    X(host_frees)                                                                                  \
    X(pinned_bytes)                                                                                \
    X(registrations)                                                                               \
    X(registered_bytes)                                                                            \
    X(streams)                                                                                     \
    X(busy_streams_destroyed)                                                                      \
    X(events)                                                                                      \
    X(set_devices)                                                                                 \
    X(violations)                                                                                  \
    X(tasks)
struct emu_counters {
#define EMU_FIELD(name) _Atomic uint64_t name;
    EMU_COUNTERS(EMU_FIELD)
#undef EMU_FIELD
};
extern struct emu_counters emu_counters;

/* First thing in every call: reads the environment once, traces, and injects a failure. */
aclError emu_enter(const char *function, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
#define EMU_ENTER(...)                                                                             \
    do {                                                                                           \
        aclError injected_ = emu_enter(__func__, __VA_ARGS__);                                     \
        if (injected_ != ACL_SUCCESS) {                                                            \
            return injected_;                                                                      \
        }                                                                                          \
    } while (0)
void emu_start(void); /* what emu_enter() does once; cheap afterwards */
aclError emu_fault(const char *function, bool while_running); /* 0, or the code to fail with */
aclError emu_fail(aclError code, const char *format, ...) __attribute__((format(printf, 2, 3)));
void emu_violation(const char *format, ...) __attribute__((format(printf, 1, 2)));
void emu_trace(const char *format, ...) __attribute__((format(printf, 1, 2)));
void emu_wait_while_held(void); /* copies wait here: aclemuHold() */
bool emu_started(void);         /* aclInit() was called */
double emu_now_s(void);
void emu_sleep_s(double seconds);
struct timespec emu_deadline(int timeout_ms);

/* ---- memory.c: devices' memory ------------------------------------------------------------- */

enum range_kind { RANGE_MALLOC, RANGE_PHYSICAL, RANGE_IMPORT, RANGE_HOST, RANGE_REGISTERED };

typedef struct emu_range {
    uint64_t start, end, id;
    enum range_kind kind;
    atomic_int in_flight; /* queued tasks that use it */
    struct emu_range *next;
} emu_range;

typedef struct emu_device {
    int fd;           /* a memory file: what the device holds */
    uint64_t address; /* of its window; the host faults on it */
    uint8_t *shadow;  /* the same, for the emulator alone */
    emu_range *live;
    uint64_t used, peak, next_id, next_import;
    pthread_mutex_t engine; /* copies of one direction take turns when throttled */
} emu_device;
extern emu_device emu_devices[EMU_MAX_DEVICES];
extern pthread_mutex_t emu_memory_lock; /* all lists of ranges */

void emu_memory_start(void);
int emu_device_of(const void *address); /* -1: host memory */
uint8_t *emu_shadow(const void *address);
/* Under the lock. */
emu_range *emu_find(emu_range *list, uint64_t start, uint64_t bytes);
emu_range *emu_find_start(emu_range *list, uint64_t start);
void emu_insert(emu_range **list, emu_range *range);
void emu_unlink(emu_range **list, emu_range *range);
/* Out of its list already. Memory that is taken from tasks in flight is a violation. */
void emu_end_range(emu_range *range, const char *function);
emu_range *emu_new_range(uint64_t start, uint64_t bytes, enum range_kind kind);

/* ---- host.c: pinned and registered memory -------------------------------------------------- */

extern emu_range *emu_host_ranges;

/* ---- runtime.c: contexts ------------------------------------------------------------------- */

typedef struct emu_context {
    uint32_t magic;
    int device;
    bool primary;
    atomic_int references;
    struct emu_stream *_Atomic default_stream;
} emu_context;

void emu_runtime_start(void);
/* The thread's context, or that of aclInit()'s default device; NULL, and RT_CONTEXT_NULL. */
emu_context *emu_current(const char *function, aclError *code_out);
#define EMU_CONTEXT(context)                                                                       \
    aclError context##_code_;                                                                      \
    emu_context *context = emu_current(__func__, &context##_code_);                                \
    if (context == NULL) {                                                                         \
        return context##_code_;                                                                    \
    }

/* ---- stream.c ------------------------------------------------------------------------------ */

typedef struct emu_event emu_event;
enum task_kind { TASK_COPY, TASK_SET, TASK_RECORD, TASK_WAIT, TASK_CALL };

typedef struct emu_task {
    enum task_kind kind;
    void *target;
    const void *source;
    size_t bytes;
    uint64_t source_sum; /* of a host source, when it is to be checked */
    int value;
    emu_range *ranges[2]; /* in flight until the task has run */
    emu_event *event;
    uint64_t generation;
    void (*call)(void *);
    void *argument;
    struct emu_task *next;
} emu_task;

typedef struct emu_stream {
    uint32_t magic;
    emu_context *context;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t filled, done;
    emu_task *head, **tail;
    uint64_t queued, finished;
    unsigned telling; /* 1: the task in hand is an event, which is told of before it is finished */
    aclError error;   /* of the first task that failed; later ones are skipped */
    bool stop;
    int id;
    struct emu_stream *next;
} emu_stream;

/* A live stream of the thread's context; NULL is that context's default one. */
aclError emu_stream_of(void *handle, emu_stream **stream_out, const char *function);
emu_task *emu_new_task(enum task_kind kind);
void emu_enqueue(emu_stream *stream, emu_task *task);
/* Wait for what is queued now. A task's error, RT_STREAM_SYNC_TIMEOUT, or 0; -1: no deadline. */
aclError emu_drain(emu_stream *stream, int timeout_ms);
aclError emu_drain_device(int device);

/* ---- event.c ------------------------------------------------------------------------------- */

void emu_event_run(emu_task *task); /* a record or a wait, on a stream's thread */

/* ---- copy.c -------------------------------------------------------------------------------- */

aclError emu_copy_run(const emu_task *task); /* on a stream's thread */
uint64_t emu_sum(const void *bytes, size_t count);

#endif
