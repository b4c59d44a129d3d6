/* The part of the CUDA runtime that is used: prototypes and constants.
 *
 * Source: NVIDIA's CUDA Runtime API reference, 11.0 to 13; cudaError_t and cudaMemcpyKind are
 * 32-bit enumerations, handles are pointers. */
#ifndef SLLMI_CUDA_ABI_H
#define SLLMI_CUDA_ABI_H

#include <stddef.h>

#define SLLMI_CUDA_SUCCESS 0
#define SLLMI_CUDA_MEMORY_ALLOCATION 2
#define SLLMI_CUDA_INSUFFICIENT_DRIVER 35
#define SLLMI_CUDA_NO_DEVICE 100
#define SLLMI_CUDA_NOT_READY 600

#define SLLMI_CUDA_MEMCPY_HOST_TO_DEVICE 1
#define SLLMI_CUDA_HOST_ALLOC_PORTABLE 1u
#define SLLMI_CUDA_HOST_REGISTER_PORTABLE 1u
#define SLLMI_CUDA_HOST_REGISTER_READ_ONLY 8u
#define SLLMI_CUDA_STREAM_NON_BLOCKING 1u
#define SLLMI_CUDA_EVENT_DISABLE_TIMING 2u

/* X(result, name, parameters): the functions that are looked up, all required. */
#define SLLMI_CUDA_FUNCTIONS(X)                                                                    \
    X(int, cudaGetDeviceCount, (int *count_out))                                                   \
    X(int, cudaSetDevice, (int device))                                                            \
    X(int, cudaGetDevice, (int *device_out))                                                       \
    X(int, cudaGetLastError, (void))                                                               \
    X(const char *, cudaGetErrorName, (int error))                                                 \
    X(const char *, cudaGetErrorString, (int error))                                               \
    X(int, cudaHostAlloc, (void **memory_out, size_t bytes, unsigned flags))                       \
    X(int, cudaFreeHost, (void *memory))                                                           \
    X(int, cudaHostRegister, (void *memory, size_t bytes, unsigned flags))                         \
    X(int, cudaHostUnregister, (void *memory))                                                     \
    X(int, cudaStreamCreateWithFlags, (void **stream_out, unsigned flags))                         \
    X(int, cudaStreamDestroy, (void *stream))                                                      \
    X(int, cudaStreamQuery, (void *stream))                                                        \
    X(int, cudaEventCreateWithFlags, (void **event_out, unsigned flags))                           \
    X(int, cudaEventRecord, (void *event, void *stream))                                           \
    X(int, cudaEventQuery, (void *event))                                                          \
    X(int, cudaEventDestroy, (void *event))                                                        \
    X(int, cudaMemcpyAsync,                                                                        \
      (void *target, const void *source, size_t bytes, int kind, void *stream))

typedef struct sllmi_cuda {
#define SLLMI_CUDA_FIELD(result, name, parameters) result(*name) parameters;
    SLLMI_CUDA_FUNCTIONS(SLLMI_CUDA_FIELD)
#undef SLLMI_CUDA_FIELD
} sllmi_cuda;

#endif
