#define _GNU_SOURCE
#include "acl.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dl.h"
#include "error.h"

#define MAX_DEVICES 64
#define TEXT_BYTES 512

static const char *const names[] = {"libascendcl.so", "libacl_rt.so", NULL};
static const char *const folders[] = {
    "$ASCEND_HOME_PATH/lib64",
    "$ASCEND_TOOLKIT_HOME/lib64",
    "/usr/local/Ascend/cann/lib64",
    "/usr/local/Ascend/ascend-toolkit/latest/lib64",
    NULL,
};
static const sllmi_dl_library library = {
    .what = "the Ascend runtime (AscendCL)", .names = names, .folders = folders};

#define SYMBOL(needed, result, function, parameters)                                               \
    {.name = #function, .offset = offsetof(sllmi_acl, function), .required = needed},
static const sllmi_dl_symbol symbols[] = {SLLMI_ACL_FUNCTIONS(SYMBOL)};
#undef SYMBOL

/* Names of the codes that a loader may meet. Source: acl/error_codes/rt_error_codes.h and
 * acl/acl_base.h. */
static const struct {
    int code;
    const char *name;
} codes[] = {
    {100000, "ACL_ERROR_INVALID_PARAM"},
    {100001, "ACL_ERROR_UNINITIALIZE"},
    {100003, "ACL_ERROR_INVALID_FILE"},
    {107000, "ACL_ERROR_RT_PARAM_INVALID"},
    {107001, "ACL_ERROR_RT_INVALID_DEVICEID"},
    {107002, "ACL_ERROR_RT_CONTEXT_NULL"},
    {107003, "ACL_ERROR_RT_STREAM_CONTEXT"},
    {107008, "ACL_ERROR_RT_ADDR_UNALIGNED"},
    {107016, "ACL_ERROR_RT_INVALID_MEMORY_TYPE"},
    {107017, "ACL_ERROR_RT_INVALID_HANDLE"},
    {107019, "ACL_ERROR_RT_WAIT_TIMEOUT"},
    {107020, "ACL_ERROR_RT_TASK_TIMEOUT"},
    {107022, "ACL_ERROR_RT_DEVICE_TASK_ABORT"},
    {107023, "ACL_ERROR_RT_STREAM_ABORT"},
    {207000, "ACL_ERROR_RT_FEATURE_NOT_SUPPORT"},
    {207001, "ACL_ERROR_RT_MEMORY_ALLOCATION"},
    {207002, "ACL_ERROR_RT_MEMORY_FREE"},
    {207004, "ACL_ERROR_RT_NO_DEVICE"},
    {207005, "ACL_ERROR_RT_RESOURCE_ALLOC_FAIL"},
    {207006, "ACL_ERROR_RT_NO_PERMISSION"},
    {207007, "ACL_ERROR_RT_NO_EVENT_RESOURCE"},
    {207008, "ACL_ERROR_RT_NO_STREAM_RESOURCE"},
    {207018, "ACL_ERROR_RT_DEVICE_OOM"},
    {507000, "ACL_ERROR_RT_INTERNAL_ERROR"},
    {507001, "ACL_ERROR_RT_TS_ERROR"},
    {507010, "ACL_ERROR_RT_LOST_HEARTBEAT"},
    {507013, "ACL_ERROR_RT_SYS_DMA"},
    {507018, "ACL_ERROR_RT_AICPU_EXCEPTION"},
    {507033, "ACL_ERROR_RT_DEV_SETUP_ERROR"},
    {507046, "ACL_ERROR_RT_STREAM_SYNC_TIMEOUT"},
    {507047, "ACL_ERROR_RT_EVENT_SYNC_TIMEOUT"},
    {507052, "ACL_ERROR_RT_COPY_DATA"},
    {507053, "ACL_ERROR_RT_DEVICE_MEM_ERROR"},
    {507054, "ACL_ERROR_RT_HBM_MULTI_BIT_ECC_ERROR"},
    {507056, "ACL_ERROR_RT_LINK_ERROR"},
    {507899, "ACL_ERROR_RT_DRV_INTERNAL_ERROR"},
    {507901, "ACL_ERROR_RT_SOCKET_CLOSE"},
};

sllmi_acl sllmi_acl_api;

/* Whether the device answers nothing more in this process: what its own part of the runtime, its
 * driver or its link reports, but for the ends of waits. */
static bool is_fatal(int code)
{
    return (code / 100 == 5070 && code != SLLMI_ACL_STREAM_SYNC_TIMEOUT &&
            code != SLLMI_ACL_EVENT_SYNC_TIMEOUT) ||
           code == SLLMI_ACL_DRV_INTERNAL_ERROR || code == SLLMI_ACL_SOCKET_CLOSE;
}

static struct {
    pthread_mutex_t lock;
    pid_t pid; /* that started it; 0: none yet */
    bool wants_aligned;
    atomic_int fatal[MAX_DEVICES]; /* the code that made the device unusable */
} runtime = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* Decided by presence where a name tells: versions are written in many ways. The names are of 8.5
 * and of 8.1; what has neither is taken for old, which is slower and never wrong. */
static bool is_old(void)
{
    sllmi_acl_package_version version = {0};
    if (sllmi_acl_api.aclsysGetVersionStr != NULL) {
        return false;
    }
    if (sllmi_acl_api.aclsysGetCANNVersion == NULL ||
        sllmi_acl_api.aclsysGetCANNVersion(SLLMI_ACL_PKG_NAME_CANN, &version) !=
            SLLMI_ACL_SUCCESS) {
        return true;
    }
    int major = atoi(version.major), minor = atoi(version.minor);
    return major < 8 || (major == 8 && minor < 1);
}

static sllm_status start(sllm_error *err)
{
    void *handle;
    sllm_status status = sllmi_dl_open(&library, &handle, err);
    if (status == SLLM_OK) {
        status = sllmi_dl_resolve(&library, handle, symbols, sizeof symbols / sizeof symbols[0],
                                  &sllmi_acl_api, err);
    }
    if (status != SLLM_OK) {
        return status;
    }
    /* Never finalized: that would end the runtime for torch too, and at exit in no known order. */
    int code = sllmi_acl_api.aclInit(NULL);
    if (code != SLLMI_ACL_SUCCESS && code != SLLMI_ACL_REPEAT_INITIALIZE) {
        return sllmi_acl_status(-1, "aclInit", code, err);
    }
    runtime.wants_aligned = is_old();
    runtime.pid = getpid();
    return SLLM_OK;
}

sllm_status sllmi_acl_load(sllm_error *err)
{
    pthread_mutex_lock(&runtime.lock);
    sllm_status status = SLLM_OK;
    if (runtime.pid == 0) {
        status = start(err);
    } else if (runtime.pid != getpid()) {
        status = sllmi_fail(err, SLLM_E_FORKED, 0,
                            "the Ascend runtime was started by process %ld, which forked this one",
                            (long)runtime.pid);
    }
    pthread_mutex_unlock(&runtime.lock);
    return status;
}

bool sllmi_acl_wants_aligned(void)
{
    return runtime.wants_aligned;
}

/* The runtime's own words on one line; they are gone with its next call. */
static void recent_message(char *text)
{
    const char *message = sllmi_acl_api.aclGetRecentErrMsg();
    (void)snprintf(text, TEXT_BYTES, "%s", message == NULL ? "" : message);
    size_t length = 0;
    for (const char *from = text; *from != '\0'; from++) {
        bool space = *from == ' ' || *from == '\n' || *from == '\r' || *from == '\t';
        if (!space) {
            text[length++] = *from;
        } else if (length > 0 && text[length - 1] != ' ') {
            text[length++] = ' ';
        }
    }
    text[length > 0 && text[length - 1] == ' ' ? length - 1 : length] = '\0';
}

sllm_status sllmi_acl_status(int32_t ordinal, const char *function, int code, sllm_error *err)
{
    char text[TEXT_BYTES], device[24] = "npu";
    const char *name = "a code of its own";
    bool fatal = is_fatal(code);
    if (code == SLLMI_ACL_SUCCESS) {
        return SLLM_OK;
    }
    recent_message(text);
    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        if (codes[i].code == code) {
            name = codes[i].name;
        }
    }
    if (ordinal >= 0) {
        (void)snprintf(device, sizeof device, "npu:%d", ordinal);
    }
    if (fatal && ordinal >= 0 && ordinal < MAX_DEVICES) {
        runtime.fatal[ordinal] = code;
    }
    sllm_status status = code == SLLMI_ACL_MEMORY_ALLOCATION ? SLLM_E_NOMEM
                         : code == SLLMI_ACL_NO_DEVICE       ? SLLM_E_NO_DEVICE
                                                             : SLLM_E_DEVICE;
    return sllmi_fail_device(err, status, code, "%s: %s failed with %d (%s)%s%s%s", device,
                             function, code, name, text[0] == '\0' ? "" : ": ", text,
                             fatal ? "; this process cannot use the device any more" : "");
}

sllm_status sllmi_acl_usable(int32_t ordinal, sllm_error *err)
{
    int code = ordinal >= 0 && ordinal < MAX_DEVICES ? runtime.fatal[ordinal] : 0;
    return code == 0 ? SLLM_OK
                     : sllmi_fail_device(err, SLLM_E_DEVICE, code,
                                         "npu:%d failed with %d before: this process cannot use "
                                         "it any more",
                                         ordinal, code);
}
