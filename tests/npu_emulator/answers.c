/* What torch_npu asks besides, and gets one answer for. */
#define _GNU_SOURCE
#include "emu.h"

#include <string.h>
#include <unistd.h>

#define OPTIONS 16u
#define RUN_MODE_HOST 1u

EMU_API aclError aclrtGetRunMode(uint32_t *mode_out)
{
    *mode_out = RUN_MODE_HOST;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtDeviceCanAccessPeer(int32_t *can_out, int32_t device, int32_t peer)
{
    EMU_ENTER("(%d, %d)", device, peer);
    *can_out = device != peer;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags)
{
    EMU_ENTER("(%d, %u)", peer, flags);
    return ACL_SUCCESS;
}

EMU_API aclError aclrtDeviceDisablePeerAccess(int32_t peer)
{
    EMU_ENTER("(%d)", peer);
    return ACL_SUCCESS;
}

EMU_API aclError aclrtDeviceGetBareTgid(int32_t *pid_out)
{
    *pid_out = getpid();
    return ACL_SUCCESS;
}

EMU_API aclError aclrtQueryDeviceStatus(int32_t device, uint32_t *status_out)
{
    EMU_ENTER("(%d)", device);
    *status_out = 0;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtSetOpExecuteTimeOut(uint32_t timeout_s)
{
    (void)timeout_s;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtSetOpWaitTimeout(uint32_t timeout_s)
{
    (void)timeout_s;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtSetDeviceSatMode(uint32_t mode)
{
    (void)mode;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtSetStreamFailureMode(void *stream, uint64_t mode)
{
    (void)stream, (void)mode;
    return ACL_SUCCESS;
}

static _Atomic int64_t options[OPTIONS];

EMU_API aclError aclrtSetSysParamOpt(uint32_t option, int64_t value)
{
    if (option >= OPTIONS) {
        return RT_PARAM_INVALID;
    }
    options[option] = value;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtGetSysParamOpt(uint32_t option, int64_t *value_out)
{
    if (option >= OPTIONS || value_out == NULL) {
        return RT_PARAM_INVALID;
    }
    *value_out = options[option];
    return ACL_SUCCESS;
}

EMU_API aclError aclrtCtxSetSysParamOpt(uint32_t option, int64_t value)
{
    return aclrtSetSysParamOpt(option, value);
}

EMU_API aclError aclrtCtxGetSysParamOpt(uint32_t option, int64_t *value_out)
{
    return aclrtGetSysParamOpt(option, value_out);
}

/* No callbacks ever come: torch_npu's thread that waits for them waits. */
EMU_API aclError aclrtProcessReport(int32_t timeout_ms)
{
    emu_sleep_s(timeout_ms > 0 ? timeout_ms / 1000.0 : 0.1);
    return ACL_WAIT_CALLBACK_TIMEOUT;
}

EMU_API aclError aclrtSubscribeReport(uint64_t thread, void *stream)
{
    (void)thread, (void)stream;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtUnSubscribeReport(uint64_t thread, void *stream)
{
    (void)thread, (void)stream;
    return ACL_SUCCESS;
}

EMU_API aclError aclSetCompileopt(uint32_t option, const char *value)
{
    (void)option, (void)value;
    return ACL_SUCCESS;
}

EMU_API uint64_t aclGetCompileoptSize(uint32_t option)
{
    (void)option;
    return 16;
}

EMU_API aclError aclGetCompileopt(uint32_t option, char *value_out, size_t bytes)
{
    (void)option;
    (void)snprintf(value_out, bytes, "disable");
    return ACL_SUCCESS;
}

/* Cores and cache of a plausible device. */
EMU_API aclError aclGetDeviceCapability(uint32_t device, uint32_t what, int64_t *value_out)
{
    (void)device;
    *value_out = what == 0 ? 20 : what == 1 ? 40 : 192 << 20;
    return ACL_SUCCESS;
}

#if EMU_CANN >= 850
EMU_API aclError aclrtFree(void *memory);
EMU_API aclError aclrtFreeHost(void *memory);
EMU_API aclError aclrtSynchronizeDevice(void);

EMU_API aclError aclrtFreeWithDevSync(void *memory)
{
    (void)aclrtSynchronizeDevice();
    return aclrtFree(memory);
}

EMU_API aclError aclrtFreeHostWithDevSync(void *memory)
{
    (void)aclrtSynchronizeDevice();
    return aclrtFreeHost(memory);
}
#endif
