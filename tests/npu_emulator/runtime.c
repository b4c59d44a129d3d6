/* Initialisation, versions, devices and contexts. A context is a property of the thread. */
#define _GNU_SOURCE
#include "emu.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CONTEXT_MAGIC 0xC0417E87u

static emu_context primary[EMU_MAX_DEVICES];
static _Thread_local emu_context *current;
static atomic_int init_count;
static atomic_int default_device = -1; /* of the configuration that aclInit() was given */

bool emu_started(void)
{
    return init_count > 0;
}

static bool is_device(int32_t device)
{
    return device >= 0 && (uint32_t)device < emu_settings.devices;
}

void emu_runtime_start(void)
{
    for (uint32_t i = 0; i < emu_settings.devices; i++) {
        primary[i].magic = CONTEXT_MAGIC;
        primary[i].device = (int)i;
        primary[i].primary = true;
    }
}

static void use_primary(int32_t device)
{
    primary[device].references++;
    current = &primary[device];
}

emu_context *emu_current(const char *function, aclError *code_out)
{
    if (current == NULL && is_device(default_device)) {
        use_primary(default_device);
    }
    *code_out = current != NULL
                    ? ACL_SUCCESS
                    : emu_fail(RT_CONTEXT_NULL,
                               "%s: no context on this thread (call aclrtSetDevice)", function);
    return current;
}

/* {"defaultDevice": {"default_device": "0"}} */
static aclError read_config(const char *path)
{
    char text[4096];
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        return emu_fail(ACL_INVALID_FILE, "aclInit: cannot read %s", path);
    }
    size_t length = fread(text, 1, sizeof text - 1, file);
    text[length] = '\0';
    (void)fclose(file);
    const char *key = strstr(text, "\"default_device\"");
    const char *value = key == NULL ? NULL : strchr(key + strlen("\"default_device\""), '"');
    if (value != NULL) {
        default_device = atoi(value + 1);
    }
    return ACL_SUCCESS;
}

EMU_API aclError aclInit(const char *config_path)
{
    emu_start();
    emu_trace("aclInit(%s)", config_path == NULL ? "NULL" : config_path);
    aclError code = emu_fault("aclInit", false);
    if (code != ACL_SUCCESS) {
        return emu_fail(code, "aclInit: injected");
    }
    if (atomic_fetch_add(&init_count, 1) > 0) {
        return ACL_REPEAT_INITIALIZE;
    }
    if (config_path != NULL && *config_path != '\0') {
        code = read_config(config_path);
    }
    if (code != ACL_SUCCESS) {
        init_count = 0;
    }
    return code;
}

/* Whoever shares the process with torch must not: it ends the runtime for both. */
EMU_API aclError aclFinalize(void)
{
    emu_start();
    emu_trace("aclFinalize");
    for (uint32_t i = 0; i < emu_settings.devices; i++) {
        (void)emu_drain_device((int)i);
    }
    init_count = 0;
    return ACL_SUCCESS;
}

EMU_API const char *aclrtGetSocName(void)
{
    emu_start();
    return emu_settings.devices > 0 ? emu_settings.soc : NULL;
}

EMU_API aclError aclrtGetVersion(int32_t *major_out, int32_t *minor_out, int32_t *patch_out)
{
    *major_out = 1;
    *minor_out = 14;
    *patch_out = 0;
    return ACL_SUCCESS;
}

#if EMU_CANN >= 810
typedef struct package_version {
    char version[128], major[64], minor[64], release[64], patch[64], reserved[128];
} package_version;

EMU_API aclError aclsysGetCANNVersion(uint32_t package, package_version *out)
{
    EMU_ENTER("(%u)", package);
    *out = (package_version){0};
    (void)snprintf(out->version, sizeof out->version, "%s", emu_settings.version);
    (void)snprintf(out->major, sizeof out->major, "%.1s", emu_settings.version);
    (void)snprintf(out->minor, sizeof out->minor, "%.1s",
                   strlen(emu_settings.version) > 2 ? emu_settings.version + 2 : "0");
    return ACL_SUCCESS;
}
#endif

#if EMU_CANN >= 850
EMU_API aclError aclsysGetVersionStr(const char *package, char *version_out)
{
    EMU_ENTER("(%s)", package);
    (void)snprintf(version_out, 128, "%s", emu_settings.version);
    return ACL_SUCCESS;
}

EMU_API aclError aclFinalizeReference(uint64_t *left_out)
{
    int count = init_count;
    if (count > 0) {
        init_count--;
    }
    if (left_out != NULL) {
        *left_out = count > 0 ? (uint64_t)count - 1 : 0;
    }
    return ACL_SUCCESS;
}
#endif

EMU_API aclError aclrtGetDeviceCount(uint32_t *count_out)
{
    EMU_ENTER("()");
    *count_out = emu_settings.devices;
    return emu_settings.devices > 0 ? ACL_SUCCESS : emu_fail(RT_NO_DEVICE, "there is no device");
}

EMU_API aclError aclrtSetDevice(int32_t device)
{
    EMU_ENTER("(%d)", device);
    if (!is_device(device)) {
        return emu_fail(RT_INVALID_DEVICEID, "device %d of %u", device, emu_settings.devices);
    }
    use_primary(device);
    emu_counters.set_devices++;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtGetDevice(int32_t *device_out)
{
    EMU_ENTER("()");
    if (current == NULL) {
        return emu_fail(RT_CONTEXT_NULL, "aclrtGetDevice: no device set on this thread");
    }
    *device_out = current->device;
    return ACL_SUCCESS;
}

static aclError reset(int32_t device, bool force, const char *function)
{
    if (!is_device(device)) {
        return emu_fail(RT_INVALID_DEVICEID, "%s: device %d", function, device);
    }
    emu_context *context = &primary[device];
    if (context->references == 0) {
        return emu_fail(RT_CONTEXT_NULL, "%s: device %d was not set", function, device);
    }
    context->references = force ? 0 : context->references - 1;
    if (context->references == 0) {
        (void)emu_drain_device(device);
        current = current == context ? NULL : current;
    }
    return ACL_SUCCESS;
}

EMU_API aclError aclrtResetDevice(int32_t device)
{
    EMU_ENTER("(%d)", device);
    return reset(device, false, __func__);
}

EMU_API aclError aclrtResetDeviceForce(int32_t device)
{
    EMU_ENTER("(%d)", device);
    return reset(device, true, __func__);
}

EMU_API aclError aclrtCreateContext(void **context_out, int32_t device)
{
    EMU_ENTER("(%d)", device);
    if (!is_device(device)) {
        return emu_fail(RT_INVALID_DEVICEID, "device %d", device);
    }
    emu_context *context = calloc(1, sizeof *context);
    if (context == NULL) {
        abort();
    }
    context->magic = CONTEXT_MAGIC;
    context->device = device;
    *context_out = current = context;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtDestroyContext(void *handle)
{
    EMU_ENTER("(%p)", handle);
    emu_context *context = handle;
    if (context == NULL || context->magic != CONTEXT_MAGIC || context->primary) {
        return emu_fail(RT_INVALID_HANDLE, "no context of aclrtCreateContext");
    }
    current = current == context ? NULL : current;
    context->magic = 0; /* never freed: other threads may have it as theirs */
    return ACL_SUCCESS;
}

EMU_API aclError aclrtSetCurrentContext(void *handle)
{
    EMU_ENTER("(%p)", handle);
    emu_context *context = handle;
    if (context == NULL || context->magic != CONTEXT_MAGIC) {
        return emu_fail(RT_CONTEXT_NULL, "aclrtSetCurrentContext(%p)", handle);
    }
    current = context;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtGetCurrentContext(void **context_out)
{
    EMU_ENTER("()");
    if (current == NULL) {
        return emu_fail(RT_CONTEXT_NULL, "aclrtGetCurrentContext: none");
    }
    *context_out = current;
    return ACL_SUCCESS;
}

/* ---- for tests alone: no part of AscendCL -------------------------------------------------- */

/* The device of the calling thread; -1: none. */
EMU_API int aclemuThreadDevice(void)
{
    return current == NULL ? -1 : current->device;
}
