"""The check against a vendor's header agrees with the right one, and finds what differs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.device.acl_header import differences

# The part of acl/acl.h that is compared, as CANN 8.5 has it.
HEADER = """\
#include <stddef.h>
#include <stdint.h>
typedef int aclError;
typedef void *aclrtStream;
typedef void *aclrtContext;
typedef void *aclrtEvent;
#define ACL_SUCCESS 0
#define ACL_ERROR_REPEAT_INITIALIZE 100002
#define ACL_ERROR_RT_MEMORY_ALLOCATION 207001
#define ACL_ERROR_RT_NO_DEVICE 207004
#define ACL_ERROR_RT_STREAM_SYNC_TIMEOUT 507046
#define ACL_ERROR_RT_EVENT_SYNC_TIMEOUT 507047
#define ACL_ERROR_RT_DRV_INTERNAL_ERROR 507899
#define ACL_ERROR_RT_SOCKET_CLOSE 507901
#define ACL_EVENT_CAPTURE_STREAM_PROGRESS 0x00000002U
typedef enum { ACL_MEMCPY_HOST_TO_HOST, ACL_MEMCPY_HOST_TO_DEVICE } aclrtMemcpyKind;
typedef enum {
    ACL_EVENT_RECORDED_STATUS_NOT_READY,
    ACL_EVENT_RECORDED_STATUS_COMPLETE
} aclrtEventRecordedStatus;
typedef enum { ACL_PKG_NAME_CANN, ACL_PKG_NAME_RUNTIME } aclCANNPackageName;
typedef struct aclCANNPackageVersion {
    char version[128];
    char majorVersion[64];
    char minorVersion[64];
    char releaseVersion[64];
    char patchVersion[64];
    char reserved[128];
} aclCANNPackageVersion;
aclError aclInit(const char *configPath);
const char *aclGetRecentErrMsg(void);
aclError aclrtGetDeviceCount(uint32_t *count);
aclError aclrtSetDevice(int32_t deviceId);
aclError aclrtGetDevice(int32_t *deviceId);
aclError aclrtGetCurrentContext(aclrtContext *context);
aclError aclrtSetCurrentContext(aclrtContext context);
aclError aclrtMallocHost(void **hostPtr, size_t size);
aclError aclrtFreeHost(void *hostPtr);
aclError aclrtCreateStream(aclrtStream *stream);
aclError aclrtDestroyStream(aclrtStream stream);
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout);
aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag);
aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream);
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status);
aclError aclrtDestroyEvent(aclrtEvent event);
aclError aclrtMemcpy(void *dst, size_t destMax, const void *src, size_t count,
                     aclrtMemcpyKind kind);
aclError aclrtMemcpyAsync(void *dst, size_t destMax, const void *src, size_t count,
                          aclrtMemcpyKind kind, aclrtStream stream);
aclError aclsysGetCANNVersion(aclCANNPackageName name, aclCANNPackageVersion *version);
aclError aclsysGetVersionStr(char *pkgName, char *versionStr);
"""


def said(folder: Path, header: str) -> str:
    (folder / "acl").mkdir()
    (folder / "acl" / "acl.h").write_text(header)
    return differences(folder)


def test_our_declarations_are_those_of_the_header(tmp_path: Path) -> None:
    assert said(tmp_path, HEADER) == ""


def test_an_older_header_may_lack_what_is_optional(tmp_path: Path) -> None:
    older = re.sub(r"aclError aclsysGetVersionStr.*\n", "", HEADER)
    assert said(tmp_path, older) == ""


@pytest.mark.parametrize(
    ("ours", "theirs", "name"),
    [
        ("size_t destMax, const void *src", "uint32_t destMax, const void *src", "aclrtMemcpy"),
        ("aclrtSetDevice(int32_t", "aclrtSetDevice(int64_t", "aclrtSetDevice"),
        ("REPEAT_INITIALIZE 100002", "REPEAT_INITIALIZE 100003", "ACL_ERROR_REPEAT_INITIALIZE"),
        ("char version[128]", "char version[256]", "aclCANNPackageVersion"),
        ("ACL_MEMCPY_HOST_TO_HOST, ", "", "ACL_MEMCPY_HOST_TO_DEVICE"),
        ("aclError aclrtFreeHost(void *hostPtr);\n", "", "aclrtFreeHost"),
    ],
)
def test_what_differs_is_named(ours: str, theirs: str, name: str, tmp_path: Path) -> None:
    assert ours in HEADER
    assert name in said(tmp_path, HEADER.replace(ours, theirs))
