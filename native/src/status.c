#include "sllm.h"

int sllm_abi_version(void)
{
    return SLLM_ABI_VERSION;
}

const char *sllm_status_name(int status)
{
    switch ((sllm_status)status) {
    case SLLM_OK: return "SLLM_OK";
    case SLLM_E_INVALID: return "SLLM_E_INVALID";
    case SLLM_E_NOMEM: return "SLLM_E_NOMEM";
    case SLLM_E_IO: return "SLLM_E_IO";
    case SLLM_E_TRUNCATED: return "SLLM_E_TRUNCATED";
    case SLLM_E_CHANGED: return "SLLM_E_CHANGED";
    case SLLM_E_CANCELLED: return "SLLM_E_CANCELLED";
    case SLLM_E_TIMEOUT: return "SLLM_E_TIMEOUT";
    case SLLM_E_NO_DEVICE: return "SLLM_E_NO_DEVICE";
    case SLLM_E_DEVICE: return "SLLM_E_DEVICE";
    case SLLM_E_UNSUPPORTED: return "SLLM_E_UNSUPPORTED";
    case SLLM_E_FORKED: return "SLLM_E_FORKED";
    case SLLM_E_BUSY: return "SLLM_E_BUSY";
    }
    return "SLLM_E_?";
}
