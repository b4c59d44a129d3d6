/* Filling the caller's sllm_error. */
#ifndef SLLMI_ERROR_H
#define SLLMI_ERROR_H

#include "sllm.h"

/* Fill `err` (may be NULL) with a formatted line and return `status`. Control characters, as a
 * hostile file name may hold, become '?'; of a line too long the middle is left out. Keeps errno. */
sllm_status sllmi_fail(sllm_error *err, sllm_status status, int os_errno, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* The same for a failed device call: `device_code` is the runtime's own number. */
sllm_status sllmi_fail_device(sllm_error *err, sllm_status status, int device_code,
                              const char *format, ...) __attribute__((format(printf, 4, 5)));

/* The symbol of a system error number, such as "EIO"; "errno 999" text is the caller's to add. */
const char *sllmi_errno_name(int os_errno);

#endif
