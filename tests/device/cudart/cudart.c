/* The CUDA runtime's names on the emulated Ascend runtime: devices, streams, events and copies keep
 * the same rules as far as a loader meets them. Linked with all of the emulator, whose failures and
 * counters serve here too; a failure injected into a function of this file has CUDA's code. */
#define _GNU_SOURCE
#include "cuda_abi.h"
#include "emu.h"

#define PAGE 4096u
#define CUDA_INVALID_VALUE 1
#define CUDA_INVALID_DEVICE 101
#define CUDA_UNKNOWN 999
#define EVENT_PROGRESS 2u
#define REGISTER_PINNED 0x10000000u

#define DECLARE(result, name, parameters) EMU_API result name parameters;
SLLMI_CUDA_FUNCTIONS(DECLARE)

aclError aclInit(const char *config_path);
aclError aclrtGetDeviceCount(uint32_t *count_out);
aclError aclrtSetDevice(int32_t device);
aclError aclrtGetDevice(int32_t *device_out);
aclError aclrtMalloc(void **memory_out, size_t bytes, uint32_t policy);
aclError aclrtFree(void *memory);
aclError aclrtMemcpy(void *target, size_t target_bytes, const void *source, size_t bytes,
                     uint32_t kind);
aclError aclrtSynchronizeStream(void *stream);
aclError aclrtMallocHost(void **memory_out, size_t bytes);
aclError aclrtFreeHost(void *memory);
aclError aclrtHostRegisterV2(void *memory, uint64_t bytes, uint32_t flags);
aclError aclrtHostUnregister(void *memory);
aclError aclrtCreateStream(void **stream_out);
aclError aclrtDestroyStream(void *stream);
aclError aclrtStreamQuery(void *stream, uint32_t *status_out);
aclError aclrtCreateEventExWithFlag(void **event_out, uint32_t flags);
aclError aclrtRecordEvent(void *event, void *stream);
aclError aclrtQueryEventStatus(void *event, uint32_t *status_out);
aclError aclrtDestroyEvent(void *event);
aclError aclrtMemcpyAsync(void *target, size_t target_bytes, const void *source, size_t bytes,
                          uint32_t kind, void *stream);

static _Thread_local int last_error;

/* What cudaGetLastError() tells of a call; "not ready" is no less an error to it. */
static int answer(int code)
{
    last_error = code == SLLMI_CUDA_SUCCESS ? last_error : code;
    return code;
}

#undef EMU_ENTER
#define EMU_ENTER(...)                                                                             \
    do {                                                                                           \
        aclError injected_ = emu_enter(__func__, __VA_ARGS__);                                     \
        if (injected_ != ACL_SUCCESS) {                                                            \
            return answer(injected_);                                                              \
        }                                                                                          \
    } while (0)

static int in_cuda(aclError code)
{
    switch (code) {
    case ACL_SUCCESS: return answer(SLLMI_CUDA_SUCCESS);
    case RT_MEMORY_ALLOCATION: return answer(SLLMI_CUDA_MEMORY_ALLOCATION);
    case RT_NO_DEVICE: return answer(SLLMI_CUDA_NO_DEVICE);
    case RT_INVALID_DEVICEID: return answer(CUDA_INVALID_DEVICE);
    case RT_PARAM_INVALID:
    case RT_INVALID_HANDLE: return answer(CUDA_INVALID_VALUE);
    default: return answer(CUDA_UNKNOWN);
    }
}

/* A thread that has set no device is on device 0. */
static void be_somewhere(void)
{
    int32_t device;
    if (aclrtGetDevice(&device) != ACL_SUCCESS) {
        (void)aclrtSetDevice(0);
    }
}

int cudaGetDeviceCount(int *count_out)
{
    EMU_ENTER("()");
    return in_cuda(aclrtGetDeviceCount((uint32_t *)count_out));
}

int cudaSetDevice(int device)
{
    EMU_ENTER("(%d)", device);
    return in_cuda(aclrtSetDevice(device));
}

int cudaGetDevice(int *device_out)
{
    EMU_ENTER("()");
    be_somewhere();
    return in_cuda(aclrtGetDevice(device_out));
}

int cudaGetLastError(void)
{
    int code = last_error;
    last_error = SLLMI_CUDA_SUCCESS;
    return code;
}

const char *cudaGetErrorName(int error)
{
    return error == SLLMI_CUDA_MEMORY_ALLOCATION ? "cudaErrorMemoryAllocation"
                                                 : "cudaErrorEmulated";
}

const char *cudaGetErrorString(int error)
{
    return error == SLLMI_CUDA_MEMORY_ALLOCATION ? "out of memory" : "an emulated failure";
}

/* At a page, where the emulator's pinned memory is not; what that gave stands before. */
int cudaHostAlloc(void **memory_out, size_t bytes, unsigned flags)
{
    EMU_ENTER("(%zu, %u)", bytes, flags);
    void *raw;
    be_somewhere();
    aclError code = aclrtMallocHost(&raw, bytes + PAGE);
    if (code == ACL_SUCCESS) {
        *memory_out = (void *)(((uintptr_t)raw + sizeof raw + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
        ((void **)*memory_out)[-1] = raw;
    }
    return in_cuda(code);
}

int cudaFreeHost(void *memory)
{
    EMU_ENTER("(%p)", memory);
    return in_cuda(aclrtFreeHost(((void **)memory)[-1]));
}

/* As on a platform that can register what may only be read: without its flag it refuses that. */
int cudaHostRegister(void *memory, size_t bytes, unsigned flags)
{
    EMU_ENTER("(%p, %zu, %u)", memory, bytes, flags);
    be_somewhere();
    if (flags != (SLLMI_CUDA_HOST_REGISTER_PORTABLE | SLLMI_CUDA_HOST_REGISTER_READ_ONLY)) {
        return answer(CUDA_INVALID_VALUE);
    }
    return in_cuda(aclrtHostRegisterV2(memory, bytes, REGISTER_PINNED));
}

int cudaHostUnregister(void *memory)
{
    EMU_ENTER("(%p)", memory);
    return in_cuda(aclrtHostUnregister(memory));
}

int cudaStreamCreateWithFlags(void **stream_out, unsigned flags)
{
    EMU_ENTER("(%u)", flags);
    be_somewhere();
    return in_cuda(aclrtCreateStream(stream_out));
}

int cudaStreamDestroy(void *stream)
{
    EMU_ENTER("(%p)", stream);
    return in_cuda(aclrtDestroyStream(stream));
}

int cudaStreamQuery(void *handle)
{
    EMU_ENTER("(%p)", handle);
    emu_stream *stream;
    uint32_t busy;
    aclError code = aclrtStreamQuery(handle, &busy);
    if (code == ACL_SUCCESS && busy != 0) {
        return answer(SLLMI_CUDA_NOT_READY);
    }
    if (code == ACL_SUCCESS) {
        code = emu_stream_of(handle, &stream, __func__);
    }
    return in_cuda(code == ACL_SUCCESS ? emu_drain(stream, 0) : code);
}

int cudaEventCreateWithFlags(void **event_out, unsigned flags)
{
    EMU_ENTER("(%u)", flags);
    be_somewhere();
    return in_cuda(aclrtCreateEventExWithFlag(event_out, EVENT_PROGRESS));
}

int cudaEventRecord(void *event, void *stream)
{
    EMU_ENTER("(%p, %p)", event, stream);
    return in_cuda(aclrtRecordEvent(event, stream));
}

int cudaEventQuery(void *event)
{
    EMU_ENTER("(%p)", event);
    uint32_t done = 0;
    aclError code = aclrtQueryEventStatus(event, &done);
    return code == ACL_SUCCESS && done == 0 ? answer(SLLMI_CUDA_NOT_READY) : in_cuda(code);
}

int cudaEventDestroy(void *event)
{
    EMU_ENTER("(%p)", event);
    return in_cuda(aclrtDestroyEvent(event));
}

int cudaMemcpyAsync(void *target, const void *source, size_t bytes, int kind, void *stream)
{
    EMU_ENTER("(%p, %p, %zu, %d, %p)", target, source, bytes, kind, stream);
    return in_cuda(aclrtMemcpyAsync(target, bytes, source, bytes, (uint32_t)kind, stream));
}

/* ---- what only the figures of a machine want ----------------------------------------------- */

EMU_API int cudaRuntimeGetVersion(int *version_out)
{
    *version_out = 13000;
    return SLLMI_CUDA_SUCCESS;
}

EMU_API int cudaMalloc(void **memory_out, size_t bytes)
{
    be_somewhere();
    return in_cuda(aclrtMalloc(memory_out, bytes, 0));
}

EMU_API int cudaFree(void *memory)
{
    return in_cuda(aclrtFree(memory));
}

EMU_API int cudaMemcpy(void *target, const void *source, size_t bytes, int kind)
{
    be_somewhere();
    return in_cuda(aclrtMemcpy(target, bytes, source, bytes, (uint32_t)kind));
}

EMU_API int cudaStreamCreate(void **stream_out)
{
    return cudaStreamCreateWithFlags(stream_out, 0);
}

EMU_API int cudaStreamSynchronize(void *stream)
{
    return in_cuda(aclrtSynchronizeStream(stream));
}
