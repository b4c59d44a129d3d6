/* The Ascend runtime of this process: loaded once, started once, never ended. */
#ifndef SLLMI_ACL_H
#define SLLMI_ACL_H

#include <stdbool.h>
#include <stdint.h>

#include "acl_abi.h"
#include "sllm.h"

#define SLLMI_ACL_ALIGN_BYTES 64u /* what an asynchronous copy's addresses may have to be */

/* Load and start the runtime if that has not been done. SLLM_E_NO_DEVICE, SLLM_E_DEVICE, or
 * SLLM_E_FORKED in a child of the process that started it. */
sllm_status sllmi_acl_load(const sllmi_acl **acl_out, sllm_error *err);

/* CANN up to 8.0 wants both addresses of an asynchronous copy aligned to SLLMI_ACL_ALIGN_BYTES. */
bool sllmi_acl_wants_aligned(void);

/* Fill `err` for a call that failed on this thread just now: code, its name, and what the runtime
 * has to say. Out of memory is SLLM_E_NOMEM, anything else SLLM_E_DEVICE. */
sllm_status sllmi_acl_fail(const sllmi_acl *acl, int32_t ordinal, const char *function, int code,
                           sllm_error *err);

/* SLLM_OK, or SLLM_E_DEVICE when an earlier failure has made the device unusable here. */
sllm_status sllmi_acl_usable(int32_t ordinal, sllm_error *err);

#endif
