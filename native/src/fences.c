#include "fences.h"

#include "align.h"
#include "error.h"
#include "os.h"

/* Between two questions: first about what a small copy takes, later as long as costs no thread a
 * noticeable share of a processor. Runtimes' own waits with a deadline are not used: Ascend's logs
 * each that ends without success as an error, and CUDA has none. */
#define PAUSE_FIRST_NS 20000u
#define PAUSE_LAST_NS 500000u

sllm_status sllmi_fences_add(sllmi_fences *fences, uint64_t *fence_out, sllm_error *err)
{
    *fence_out = 0;
    if (fences->last - fences->passed >= SLLMI_MAX_FENCES) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "more than %u fences under way",
                          SLLMI_MAX_FENCES);
    }
    void **event = &fences->events[(fences->last + 1) % SLLMI_MAX_FENCES];
    sllm_status status = SLLM_OK;
    if (*event == NULL) {
        status = fences->ops->create(fences->queue, event, err);
    }
    if (status == SLLM_OK) {
        status = fences->ops->record(fences->queue, *event, err);
    }
    if (status == SLLM_OK) {
        *fence_out = ++fences->last;
        fences->behind = false;
    }
    return status;
}

sllm_status sllmi_fences_wait(sllmi_fences *fences, uint64_t fence, uint32_t timeout_ms,
                              sllm_error *err)
{
    uint64_t deadline = sllmi_now_ns() + (uint64_t)timeout_ms * 1000000u;
    uint64_t pause = PAUSE_FIRST_NS;
    while (fences->passed < fence) {
        bool passed = false;
        sllm_status status = fences->ops->query(
            fences->queue, fences->events[fence % SLLMI_MAX_FENCES], &passed, err);
        if (status != SLLM_OK) {
            return status;
        }
        if (passed) {
            fences->passed = fence;
            break;
        }
        uint64_t now = sllmi_now_ns();
        if (now >= deadline) {
            return sllmi_fail(err, SLLM_E_BUSY, 0, "the copies are not done yet");
        }
        sllmi_sleep_ns(sllmi_min(pause, deadline - now));
        pause = sllmi_min(2 * pause, PAUSE_LAST_NS);
    }
    return SLLM_OK;
}

sllm_status sllmi_fences_drain(sllmi_fences *fences, uint32_t timeout_ms, sllm_error *err)
{
    uint64_t fence;
    sllm_status status = fences->behind ? sllmi_fences_add(fences, &fence, err) : SLLM_OK;
    return status == SLLM_OK ? sllmi_fences_wait(fences, fences->last, timeout_ms, err) : status;
}

void sllmi_fences_end(sllmi_fences *fences)
{
    for (uint32_t i = 0; i < SLLMI_MAX_FENCES; i++) {
        if (fences->events[i] != NULL) {
            fences->ops->destroy(fences->queue, fences->events[i]);
        }
    }
}
