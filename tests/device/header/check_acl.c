/* Our idea of AscendCL against an installed one: compiles, or says where they differ. */
#include <stdbool.h>
#include <stddef.h>

#include "acl/acl.h"
#include "acl_abi.h"

#define SAME(ours, theirs) _Static_assert((ours) == (theirs), #ours " is not " #theirs)

SAME(SLLMI_ACL_SUCCESS, ACL_SUCCESS);
SAME(SLLMI_ACL_REPEAT_INITIALIZE, ACL_ERROR_REPEAT_INITIALIZE);
SAME(SLLMI_ACL_MEMORY_ALLOCATION, ACL_ERROR_RT_MEMORY_ALLOCATION);
SAME(SLLMI_ACL_NO_DEVICE, ACL_ERROR_RT_NO_DEVICE);
SAME(SLLMI_ACL_STREAM_SYNC_TIMEOUT, ACL_ERROR_RT_STREAM_SYNC_TIMEOUT);
SAME(SLLMI_ACL_EVENT_SYNC_TIMEOUT, ACL_ERROR_RT_EVENT_SYNC_TIMEOUT);
SAME(SLLMI_ACL_DRV_INTERNAL_ERROR, ACL_ERROR_RT_DRV_INTERNAL_ERROR);
SAME(SLLMI_ACL_SOCKET_CLOSE, ACL_ERROR_RT_SOCKET_CLOSE);
SAME(SLLMI_ACL_MEMCPY_HOST_TO_DEVICE, ACL_MEMCPY_HOST_TO_DEVICE);
SAME(SLLMI_ACL_EVENT_CAPTURE_STREAM_PROGRESS, ACL_EVENT_CAPTURE_STREAM_PROGRESS);
SAME(SLLMI_ACL_EVENT_RECORDED_STATUS_COMPLETE, ACL_EVENT_RECORDED_STATUS_COMPLETE);
SAME(SLLMI_ACL_PKG_NAME_CANN, ACL_PKG_NAME_CANN);

SAME(sizeof(aclError), sizeof(int));
SAME(sizeof(aclrtMemcpyKind), sizeof(unsigned));
SAME(sizeof(aclrtEventRecordedStatus), sizeof(unsigned));
SAME(sizeof(aclrtStream), sizeof(void *));
SAME(sizeof(aclrtEvent), sizeof(void *));
SAME(sizeof(sllmi_acl_package_version), sizeof(aclCANNPackageVersion));
SAME(offsetof(sllmi_acl_package_version, major), offsetof(aclCANNPackageVersion, majorVersion));
SAME(offsetof(sllmi_acl_package_version, minor), offsetof(aclCANNPackageVersion, minorVersion));

/* Enumerations are unsigned where none of their values is negative, and handles are `void *`: our
 * declarations are compatible with theirs, or an error. What a release lacks is new to it. */
#define sllmi_acl_package_version aclCANNPackageVersion

#define AGAIN(required, result, name, parameters) result name parameters;
#define THERE_true(name) _Static_assert(sizeof(&name) == sizeof(void *), #name);
#define THERE_false(name)
#define THERE(required, result, name, parameters) THERE_##required(name)

SLLMI_ACL_FUNCTIONS(THERE)
SLLMI_ACL_FUNCTIONS(AGAIN)
