/* A backend for tests: devices whose memory is host memory, whose copies run late, in any order and
 * on threads of their own. It ends the program when the contract of device.h is broken: a source
 * that changes before its fence has passed, a thread that was not bound, something never given
 * back. */
#ifndef FAKE_DEVICE_H
#define FAKE_DEVICE_H

#include <stdbool.h>
#include <stdint.h>

#include "sllm.h"

typedef enum fake_slot {
    FAKE_PROBE,
    FAKE_OPEN,
    FAKE_BIND_THREAD,
    FAKE_HOST_ALLOC,
    FAKE_QUEUE_OPEN,
    FAKE_COPY,
    FAKE_FENCE,
    FAKE_WAIT,
    FAKE_DRAIN,
    FAKE_QUEUE_ADOPT,
    FAKE_SLOTS
} fake_slot;

extern const char *const fake_slot_names[FAKE_SLOTS];

#define FAKE_DEVICE_CODE 507000 /* plus the slot: the device_code of a failure */

/* Any number of devices; a copy takes up to delay_us. */
void fake_start(uint32_t delay_us);
/* Check that everything was given back. */
void fake_end(void);

/* Call number `nth` (from 1) of a slot fails. */
void fake_fail(fake_slot slot, uint64_t nth);
uint64_t fake_calls(fake_slot slot);
/* Whether the call that was to fail has come. */
bool fake_failed(void);

/* No copy ends while held. */
void fake_hold(bool held);

sllm_device *fake_open(int32_t ordinal);
sllm_status fake_open_or_fail(int32_t ordinal, sllm_device **device_out, sllm_error *err);

/* Bytes that copies have moved. */
uint64_t fake_copied_bytes(void);

#endif
