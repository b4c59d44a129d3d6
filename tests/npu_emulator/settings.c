/* Settings from the environment, failures on demand, and the counters that tests look at. */
#define _GNU_SOURCE
#include "emu.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_FAULTS 32
#define TEXT_BYTES 640

struct emu_settings emu_settings;
struct emu_counters emu_counters;

static pthread_once_t once = PTHREAD_ONCE_INIT;
static _Thread_local char message[512];
static _Thread_local bool message_set;

static struct fault {
    char function[64];
    long nth; /* 0: every call */
    aclError code;
    bool while_running;
    long seen;
} faults[MAX_FAULTS];
static int fault_count;
static atomic_bool fault_hit;
static pthread_mutex_t fault_lock = PTHREAD_MUTEX_INITIALIZER;

static pthread_mutex_t hold_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t hold_changed = PTHREAD_COND_INITIALIZER;
static bool held;

static double number(const char *name, double fallback)
{
    const char *text = getenv(name);
    return text != NULL && *text != '\0' ? strtod(text, NULL) : fallback;
}

static bool flag(const char *name)
{
    return number(name, 0) != 0;
}

static const char *text(const char *name, const char *fallback)
{
    const char *value = getenv(name);
    return value != NULL && *value != '\0' ? value : fallback;
}

/* "[async:]function:nth:code" */
static struct fault parse_fault(const char *rule)
{
    struct fault fault = {.nth = 1, .code = RT_DRV_INTERNAL_ERROR};
    fault.while_running = strncmp(rule, "async:", 6) == 0;
    rule += fault.while_running ? 6 : 0;
    size_t length = strcspn(rule, ":");
    (void)snprintf(fault.function, sizeof fault.function, "%.*s", (int)length, rule);
    const char *rest = rule + length;
    if (*rest == ':') {
        char *end;
        fault.nth = strtol(rest + 1, &end, 10);
        fault.code = *end == ':' ? atoi(end + 1) : fault.code;
    }
    return fault;
}

static void read_faults(void)
{
    char *rules = strdup(text("ACLEMU_FAIL", "")), *place = NULL;
    for (char *rule = strtok_r(rules, ",", &place); rule != NULL && fault_count < MAX_FAULTS;
         rule = strtok_r(NULL, ",", &place)) {
        faults[fault_count++] = parse_fault(rule);
    }
    free(rules);
}

static void read_settings(void)
{
    struct emu_settings *s = &emu_settings;
    s->devices = (uint32_t)number("ACLEMU_DEVICES", 2);
    s->devices = s->devices < EMU_MAX_DEVICES ? s->devices : EMU_MAX_DEVICES;
    s->window_bytes = (uint64_t)number("ACLEMU_WINDOW_MB", 65536) << 20;
    s->memory_bytes = (uint64_t)number("ACLEMU_HBM_MB", 4096) << 20;
    if (s->memory_bytes > s->window_bytes / 2) {
        s->memory_bytes = s->window_bytes / 2;
    }
    s->h2d_bytes_s = number("ACLEMU_H2D_MBPS", 0) * 1e6;
    s->d2h_bytes_s = number("ACLEMU_D2H_MBPS", 0) * 1e6;
    s->delay_us = (long)number("ACLEMU_DELAY_US", 0);
    s->align_bytes = (uint64_t)number("ACLEMU_ALIGN", 0);
    s->any_address = flag("ACLEMU_ANY_VA");
    s->check_source = flag("ACLEMU_CHECK_SRC");
    s->poison = flag("ACLEMU_POISON");
    s->abort_on_violation = flag("ACLEMU_ABORT");
    s->strict_init = flag("ACLEMU_STRICT_INIT");
    s->soc = text("ACLEMU_SOC", "Ascend910B3");
    s->version = text("ACLEMU_CANN_VERSION", "8.3.RC1");
    const char *pageable = text("ACLEMU_PAGEABLE", "sync");
    s->pageable = strcmp(pageable, "sync") == 0        ? PAGEABLE_SYNC
                  : strcmp(pageable, "undefined") == 0 ? PAGEABLE_UNDEFINED
                                                       : PAGEABLE_ERROR;
    const char *trace = text("ACLEMU_TRACE", "");
    if (*trace != '\0') {
        s->trace = strcmp(trace, "-") == 0 ? stderr : fopen(trace, "a");
    }
    read_faults();
    emu_memory_start();
    emu_runtime_start();
}

void emu_start(void)
{
    (void)pthread_once(&once, read_settings);
}

static void trace_line(const char *head, const char *format, va_list args)
{
    char line[TEXT_BYTES];
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int length = snprintf(line, sizeof line, "[aclemu %ld.%06ld t%ld] %s", (long)now.tv_sec,
                          now.tv_nsec / 1000, syscall(SYS_gettid), head);
    (void)vsnprintf(line + length, sizeof line - (size_t)length, format, args);
    (void)fprintf(emu_settings.trace, "%s\n", line);
    (void)fflush(emu_settings.trace);
}

void emu_trace(const char *format, ...)
{
    if (emu_settings.trace != NULL) {
        va_list args;
        va_start(args, format);
        trace_line("", format, args);
        va_end(args);
    }
}

aclError emu_fault(const char *function, bool while_running)
{
    aclError code = ACL_SUCCESS;
    pthread_mutex_lock(&fault_lock);
    for (int i = 0; i < fault_count && code == ACL_SUCCESS; i++) {
        struct fault *fault = &faults[i];
        if (fault->while_running == while_running && strcmp(fault->function, function) == 0) {
            long call = ++fault->seen;
            if (fault->nth == 0 || fault->nth == call) {
                code = fault->code;
            }
        }
    }
    pthread_mutex_unlock(&fault_lock);
    if (code != ACL_SUCCESS) {
        fault_hit = true;
        emu_trace("fault in %s: %d", function, code);
    }
    return code;
}

aclError emu_enter(const char *function, const char *format, ...)
{
    emu_start();
    if (emu_settings.trace != NULL) {
        va_list args;
        va_start(args, format);
        trace_line(function, format, args);
        va_end(args);
    }
    aclError code = emu_fault(function, false);
    if (code != ACL_SUCCESS) {
        return emu_fail(code, "%s: injected", function);
    }
    if (emu_settings.strict_init && !emu_started()) {
        return emu_fail(ACL_UNINITIALIZE, "%s before aclInit", function);
    }
    return ACL_SUCCESS;
}

aclError emu_fail(aclError code, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int length = snprintf(message, sizeof message, "EZ9999: [aclemu] code %d: ", code);
    (void)vsnprintf(message + length, sizeof message - (size_t)length, format, args);
    va_end(args);
    message_set = true;
    emu_trace("  -> %s", message);
    return code;
}

void emu_violation(const char *format, ...)
{
    char line[TEXT_BYTES];
    va_list args;
    va_start(args, format);
    (void)vsnprintf(line, sizeof line, format, args);
    va_end(args);
    emu_counters.violations++;
    (void)fprintf(stderr, "[aclemu] VIOLATION: %s\n", line);
    if (emu_settings.abort_on_violation) {
        abort();
    }
}

void emu_wait_while_held(void)
{
    pthread_mutex_lock(&hold_lock);
    while (held) {
        pthread_cond_wait(&hold_changed, &hold_lock);
    }
    pthread_mutex_unlock(&hold_lock);
}

double emu_now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

void emu_sleep_s(double seconds)
{
    if (seconds > 0) {
        const struct timespec pause = {.tv_sec = (time_t)seconds,
                                       .tv_nsec =
                                           (long)((seconds - (double)(time_t)seconds) * 1e9)};
        nanosleep(&pause, NULL);
    }
}

struct timespec emu_deadline(int timeout_ms)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    at.tv_sec += timeout_ms / 1000;
    at.tv_nsec += timeout_ms % 1000 * 1000000L;
    if (at.tv_nsec >= 1000000000L) {
        at.tv_sec++;
        at.tv_nsec -= 1000000000L;
    }
    return at;
}

/* Clears itself, as in AscendCL; the text stays until this thread's next call. */
EMU_API const char *aclGetRecentErrMsg(void)
{
    static _Thread_local char shown[sizeof message];
    if (!message_set) {
        return NULL;
    }
    memcpy(shown, message, sizeof shown);
    message_set = false;
    return shown;
}

/* ---- for tests alone: no part of AscendCL -------------------------------------------------- */

/* A counter by its name, "used0" (bytes allocated on device 0) or "peak0"; UINT64_MAX for others. */
EMU_API uint64_t aclemuStat(const char *name)
{
    emu_start();
#define EMU_COUNTER(counter)                                                                       \
    if (strcmp(name, #counter) == 0) {                                                             \
        return emu_counters.counter;                                                               \
    }
    EMU_COUNTERS(EMU_COUNTER)
#undef EMU_COUNTER
    uint64_t value = UINT64_MAX;
    bool used = strncmp(name, "used", 4) == 0, peak = strncmp(name, "peak", 4) == 0;
    uint32_t device = used || peak ? (uint32_t)atoi(name + 4) : EMU_MAX_DEVICES;
    pthread_mutex_lock(&emu_memory_lock);
    if (device < EMU_MAX_DEVICES) {
        value = used ? emu_devices[device].used : emu_devices[device].peak;
    }
    pthread_mutex_unlock(&emu_memory_lock);
    return value;
}

/* Where the host can see what a device's address holds. */
EMU_API const void *aclemuPeek(const void *address)
{
    return emu_shadow(address);
}

/* From now on one rule of the form of ACLEMU_FAIL; NULL: none. */
EMU_API void aclemuFail(const char *rule)
{
    emu_start();
    pthread_mutex_lock(&fault_lock);
    fault_count = 0;
    if (rule != NULL) {
        faults[fault_count++] = parse_fault(rule);
    }
    fault_hit = false;
    pthread_mutex_unlock(&fault_lock);
}

/* Whether a rule has hit since aclemuFail(). */
EMU_API int aclemuFailed(void)
{
    return fault_hit;
}

/* While held, no asynchronous copy runs. */
EMU_API void aclemuHold(int hold)
{
    pthread_mutex_lock(&hold_lock);
    held = hold != 0;
    pthread_cond_broadcast(&hold_changed);
    pthread_mutex_unlock(&hold_lock);
}
