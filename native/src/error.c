#include "error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static sllm_status fill(sllm_error *err, sllm_status status, int os_errno, int device_code,
                        const char *format, va_list args)
{
    if (err != NULL) {
        int saved_errno = errno;
        err->status = status;
        err->os_errno = os_errno;
        err->device_code = device_code;
        (void)vsnprintf(err->message, sizeof err->message, format, args);
        for (char *c = err->message; *c != '\0'; c++) {
            if ((unsigned char)*c < 0x20 || *c == 0x7f) {
                *c = '?';
            }
        }
        errno = saved_errno;
    }
    return status;
}

sllm_status sllmi_fail(sllm_error *err, sllm_status status, int os_errno, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fill(err, status, os_errno, 0, format, args);
    va_end(args);
    return status;
}

sllm_status sllmi_fail_device(sllm_error *err, sllm_status status, int device_code,
                              const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fill(err, status, 0, device_code, format, args);
    va_end(args);
    return status;
}

const char *sllmi_errno_name(int os_errno)
{
    /* strerrorname_np() needs glibc 2.32; these are the ones that open, read and map give. */
    switch (os_errno) {
    case EIO: return "EIO";
    case EAGAIN: return "EAGAIN";
    case ENOMEM: return "ENOMEM";
    case EACCES: return "EACCES";
    case EPERM: return "EPERM";
    case EBADF: return "EBADF";
    case EINVAL: return "EINVAL";
    case ENOENT: return "ENOENT";
    case EMFILE: return "EMFILE";
    case ENFILE: return "ENFILE";
    case EISDIR: return "EISDIR";
    case ESTALE: return "ESTALE";
    case ENODEV: return "ENODEV";
    case ENXIO: return "ENXIO";
    case ETIMEDOUT: return "ETIMEDOUT";
    case EOPNOTSUPP: return "EOPNOTSUPP";
    case ENOSYS: return "ENOSYS";
    default: return "system error";
    }
}
