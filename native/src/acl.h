/* The Ascend runtime of this process: loaded once, started once, never ended. */
#ifndef SLLMI_ACL_H
#define SLLMI_ACL_H

#include <stdbool.h>
#include <stdint.h>

#include "acl_abi.h"
#include "sllm.h"

#define SLLMI_ACL_ALIGN_BYTES 64u /* what an asynchronous copy's addresses may have to be */

extern sllmi_acl sllmi_acl_api; /* to be called after sllmi_acl_load(), and never written to */

/* Load and start the runtime if that has not been done. SLLM_E_NO_DEVICE, SLLM_E_DEVICE, or
 * SLLM_E_FORKED in a child of the process that started it. */
sllm_status sllmi_acl_load(sllm_error *err);

/* CANN up to 8.0 wants both addresses of an asynchronous copy aligned to SLLMI_ACL_ALIGN_BYTES. */
bool sllmi_acl_wants_aligned(void);

/* What a call on this thread answered just now. Of a failure `err` tells code, name, and what the
 * runtime has to say; out of memory is SLLM_E_NOMEM, no device SLLM_E_NO_DEVICE, anything else
 * SLLM_E_DEVICE. An ordinal of -1 is none. */
sllm_status sllmi_acl_status(int32_t ordinal, const char *function, int code, sllm_error *err);
#define SLLMI_ACL_CALL(ordinal, err, function, ...)                                                \
    sllmi_acl_status(ordinal, #function, sllmi_acl_api.function(__VA_ARGS__), err)

/* SLLM_OK, or SLLM_E_DEVICE when an earlier failure has made the device unusable here. */
sllm_status sllmi_acl_usable(int32_t ordinal, sllm_error *err);

#endif
