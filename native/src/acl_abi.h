/* The part of AscendCL that is used: prototypes, constants, layouts.
 *
 * Source: CANN's public headers acl/acl_base.h and acl/acl_rt.h, 8.1.RC1 to 9.1.0, which agree in
 * all of this; `make check-acl-header` asserts it against an installed CANN. Handles are pointers,
 * error codes and enumerations are 32 bits. */
#ifndef SLLMI_ACL_ABI_H
#define SLLMI_ACL_ABI_H

#include <stddef.h>
#include <stdint.h>

#define SLLMI_ACL_SUCCESS 0
#define SLLMI_ACL_REPEAT_INITIALIZE 100002
#define SLLMI_ACL_MEMORY_ALLOCATION 207001
#define SLLMI_ACL_NO_DEVICE 207004
#define SLLMI_ACL_STREAM_SYNC_TIMEOUT 507046
#define SLLMI_ACL_EVENT_SYNC_TIMEOUT 507047
#define SLLMI_ACL_DRV_INTERNAL_ERROR 507899
#define SLLMI_ACL_SOCKET_CLOSE 507901

#define SLLMI_ACL_MEMCPY_HOST_TO_DEVICE 1u
#define SLLMI_ACL_EVENT_CAPTURE_STREAM_PROGRESS 2u
#define SLLMI_ACL_EVENT_RECORDED_STATUS_COMPLETE 1u
#define SLLMI_ACL_PKG_NAME_CANN 0u

typedef struct sllmi_acl_package_version {
    char version[128];
    char major[64];
    char minor[64];
    char release[64];
    char patch[64];
    char reserved[128];
} sllmi_acl_package_version;

/* X(required, result, name, parameters): the functions that are looked up. */
#define SLLMI_ACL_FUNCTIONS(X)                                                                     \
    X(true, int, aclInit, (const char *config_path))                                               \
    X(true, const char *, aclGetRecentErrMsg, (void))                                              \
    X(true, int, aclrtGetDeviceCount, (uint32_t *count_out))                                       \
    X(true, int, aclrtSetDevice, (int32_t device))                                                 \
    X(true, int, aclrtGetDevice, (int32_t *device_out))                                            \
    X(true, int, aclrtGetCurrentContext, (void **context_out))                                     \
    X(true, int, aclrtSetCurrentContext, (void *context))                                          \
    X(true, int, aclrtMallocHost, (void **memory_out, size_t bytes))                               \
    X(true, int, aclrtFreeHost, (void *memory))                                                    \
    X(true, int, aclrtCreateStream, (void **stream_out))                                           \
    X(true, int, aclrtDestroyStream, (void *stream))                                               \
    X(true, int, aclrtSynchronizeStreamWithTimeout, (void *stream, int32_t timeout_ms))            \
    X(true, int, aclrtCreateEventExWithFlag, (void **event_out, uint32_t flag))                    \
    X(true, int, aclrtRecordEvent, (void *event, void *stream))                                    \
    X(true, int, aclrtQueryEventStatus, (void *event, unsigned *status_out))                       \
    X(true, int, aclrtDestroyEvent, (void *event))                                                 \
    X(true, int, aclrtMemcpy,                                                                      \
      (void *target, size_t target_bytes, const void *source, size_t bytes, unsigned kind))        \
    X(true, int, aclrtMemcpyAsync,                                                                 \
      (void *target, size_t target_bytes, const void *source, size_t bytes, unsigned kind,         \
       void *stream))                                                                              \
    X(false, int, aclsysGetCANNVersion,                                                            \
      (unsigned package, sllmi_acl_package_version *version_out))                                  \
    X(false, int, aclsysGetVersionStr, (char *package, char *version_out))

typedef struct sllmi_acl {
#define SLLMI_ACL_FIELD(required, result, name, parameters) result(*name) parameters;
    SLLMI_ACL_FUNCTIONS(SLLMI_ACL_FIELD)
#undef SLLMI_ACL_FIELD
} sllmi_acl;

#endif
