/* The emulated runtime, as the tests see it: counters, failures, devices' memory.
 *
 * EMULATED_BACKEND says which backend is tested: "npu", or "cuda" on the same emulator under other
 * names. */
#ifndef EMULATOR_H
#define EMULATOR_H

#include <stdbool.h>
#include <stdint.h>

#include "acl_abi.h"
#include "loads.h"

const char *backend(void); /* "npu" or "cuda" */
bool is_cuda(void);
const char *device_name(int ordinal); /* such as "npu:0"; until the next call */

/* Memory of devices, made and seen without a device set on the calling thread. */
extern const load_memory emulator_memory;

/* Some functions of the library that the backend uses too; nothing of it is started. */
const sllmi_acl *emulator(void);

uint64_t emulator_stat(const char *name);
/* "[async:]function:nth:code"; NULL: none. */
void emulator_fail(const char *rule);
bool emulator_failed(void);
/* No asynchronous copy runs while held. */
void emulator_hold(bool held);
/* The calling thread's device; -1: none. */
int emulator_thread_device(void);

/* What holds after any use: no rule broken, every asynchronous copy from pinned memory. */
void emulator_check(void);
/* Nothing was left behind. */
void emulator_check_empty(void);

/* Run something on a thread of its own, which ends with it. No error is left to it that CUDA would
 * tell of to whoever asks next: torch asks after every kernel. */
void on_a_thread(void (*run)(void *), void *argument);

#endif
