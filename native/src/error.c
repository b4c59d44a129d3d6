#include "error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* A longer line loses its middle, which is some directory's: place and reason stand at the end. */
#define LINE_BYTES 5120
#define HEAD_BYTES 256
static const char ellipsis[] = "...";

/* Control characters become '?': those of ASCII, and U+0080 to U+009F, in UTF-8 0xC2 and the code,
 * some of which are escapes to some terminals. */
static void make_printable(char *line)
{
    for (unsigned char *c = (unsigned char *)line; *c != '\0'; c++) {
        if (*c < 0x20 || *c == 0x7f) {
            *c = '?';
        } else if (c[0] == 0xC2 && c[1] >= 0x80 && c[1] < 0xA0) {
            c[0] = c[1] = '?';
        }
    }
}

static sllm_status fill(sllm_error *err, sllm_status status, int os_errno, int device_code,
                        const char *format, va_list args)
{
    if (err != NULL) {
        int saved_errno = errno;
        char line[LINE_BYTES];
        (void)vsnprintf(line, sizeof line, format, args);
        make_printable(line);
        size_t length = strlen(line);
        if (length >= sizeof err->message) {
            size_t tail = sizeof err->message - HEAD_BYTES - sizeof ellipsis; /* and a NUL each */
            memcpy(line + HEAD_BYTES, ellipsis, sizeof ellipsis - 1);
            memmove(line + HEAD_BYTES + sizeof ellipsis - 1, line + length - tail, tail + 1);
        }
        memcpy(err->message, line, strlen(line) + 1);
        err->status = status;
        err->os_errno = os_errno;
        err->device_code = device_code;
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
