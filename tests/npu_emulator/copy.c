/* Copies, and what AscendCL asks of the addresses that take part in them. */
#define _GNU_SOURCE
#include "emu.h"

#include <string.h>
#include <unistd.h>

#define SUM_SAMPLES 65536u

uint64_t emu_sum(const void *bytes, size_t count)
{
    const uint8_t *at = bytes;
    uint64_t sum = 1469598103934665603u;
    size_t step = count > SUM_SAMPLES ? count / SUM_SAMPLES : 1;
    for (size_t i = 0; i < count; i += step) {
        sum = (sum ^ at[i]) * 1099511628211u; /* FNV-1a */
    }
    return sum;
}

/* Copies of one device take turns when there is a rate to keep. */
static void move(void *target, const void *source, size_t bytes)
{
    int to = emu_device_of(target), from = emu_device_of(source);
    double rate = to >= 0 && from < 0   ? emu_settings.h2d_bytes_s
                  : from >= 0 && to < 0 ? emu_settings.d2h_bytes_s
                                        : 0;
    pthread_mutex_t *engine = rate > 0 ? &emu_devices[to >= 0 ? to : from].engine : NULL;
    if (engine != NULL) {
        pthread_mutex_lock(engine);
    }
    double start = emu_now_s();
    memmove(emu_shadow(target), emu_shadow(source), bytes);
    if (engine != NULL) {
        emu_sleep_s((double)bytes / rate - (emu_now_s() - start));
        pthread_mutex_unlock(engine);
    }
    if (to >= 0 && from < 0) {
        emu_counters.h2d_bytes += bytes;
    } else if (from >= 0 && to < 0) {
        emu_counters.d2h_bytes += bytes;
    } else {
        emu_counters.d2d_bytes += bytes;
    }
}

aclError emu_copy_run(const emu_task *task)
{
    aclError code = emu_fault("aclrtMemcpyAsync", true);
    emu_wait_while_held();
    if (emu_settings.delay_us > 0) {
        emu_sleep_s((double)emu_settings.delay_us * 1e-6);
    }
    if (code != ACL_SUCCESS) {
        return code;
    }
    if (emu_settings.check_source && emu_device_of(task->source) < 0 &&
        emu_sum(task->source, task->bytes) != task->source_sum) {
        emu_violation("the source %p of a copy changed before the copy ran", task->source);
    }
    move(task->target, task->source, task->bytes);
    return ACL_SUCCESS;
}

/* The live range that an address and its bytes lie in. */
static emu_range *range_of(const void *address, size_t bytes)
{
    int device = emu_device_of(address);
    pthread_mutex_lock(&emu_memory_lock);
    emu_range *range = emu_find(device >= 0 ? emu_devices[device].live : emu_host_ranges,
                                (uintptr_t)address, bytes);
    pthread_mutex_unlock(&emu_memory_lock);
    return range;
}

static enum copy_kind kind_of(const void *target, const void *source)
{
    bool to = emu_device_of(target) >= 0, from = emu_device_of(source) >= 0;
    return from ? (to ? COPY_D2D : COPY_D2H) : (to ? COPY_H2D : COPY_H2H);
}

static enum copy_kind plain_kind(uint32_t kind)
{
    switch ((enum copy_kind)kind) {
    case COPY_INNER:
    case COPY_INTER: return COPY_D2D;
    case COPY_BUFFER: return COPY_H2D;
    default: return (enum copy_kind)kind;
    }
}

static aclError check(const char *function, void *target, size_t target_bytes, const void *source,
                      size_t bytes, emu_range **ranges)
{
    if (target == NULL || source == NULL) {
        return emu_fail(ACL_INVALID_PARAM, "%s: a NULL pointer", function);
    }
    if (bytes > target_bytes) {
        return emu_fail(RT_PARAM_INVALID, "%s: %zu bytes to a place of %zu", function, bytes,
                        target_bytes);
    }
    ranges[0] = range_of(target, bytes);
    ranges[1] = range_of(source, bytes);
    if ((emu_device_of(target) >= 0 && ranges[0] == NULL) ||
        (emu_device_of(source) >= 0 && ranges[1] == NULL)) {
        emu_violation("%s: %p from %p, %zu bytes: outside every live allocation", function, target,
                      source, bytes);
        return emu_fail(RT_PARAM_INVALID, "%s: device memory that is not allocated", function);
    }
    return ACL_SUCCESS;
}

EMU_API aclError aclrtMemcpy(void *target, size_t target_bytes, const void *source, size_t bytes,
                             uint32_t kind)
{
    EMU_ENTER("(%p, %zu, %p, %zu, %u)", target, target_bytes, source, bytes, kind);
    EMU_CONTEXT(context)
    (void)context;
    emu_range *ranges[2];
    aclError code =
        bytes == 0 ? ACL_SUCCESS : check(__func__, target, target_bytes, source, bytes, ranges);
    if (code == ACL_SUCCESS && bytes > 0) {
        move(target, source, bytes);
        emu_counters.sync_copies++;
    }
    return code;
}

static aclError copy_async(const char *function, void *target, size_t target_bytes,
                           const void *source, size_t bytes, uint32_t kind, void *stream_handle)
{
    emu_stream *stream;
    emu_range *ranges[2];
    aclError code = emu_stream_of(stream_handle, &stream, function);
    if (code != ACL_SUCCESS || bytes == 0) {
        return code;
    }
    code = check(function, target, target_bytes, source, bytes, ranges);
    if (code != ACL_SUCCESS) {
        return code;
    }
    enum copy_kind asked = plain_kind(kind), real = kind_of(target, source);
    if (asked != COPY_DEFAULT && asked != real) {
        return emu_fail(RT_PARAM_INVALID, "%s: kind %u, and the addresses are of kind %d", function,
                        kind, real);
    }
    if (real == COPY_H2H) {
        return emu_fail(RT_FEATURE_NOT_SUPPORT, "%s: from host to host", function);
    }
    bool pageable = ranges[0] == NULL || ranges[1] == NULL;
    if (pageable && emu_settings.pageable == PAGEABLE_ERROR) {
        return emu_fail(RT_INVALID_MEMORY_TYPE, "%s: host memory is not pinned", function);
    }
    uint64_t align = emu_settings.align_bytes;
    if (align != 0 && (((uintptr_t)target | (uintptr_t)source) & (align - 1)) != 0) {
        emu_violation("%s: %p from %p: not at %d bytes", function, target, source, (int)align);
    }
    emu_task *task = emu_new_task(TASK_COPY);
    task->target = target;
    task->source = source;
    task->bytes = bytes;
    for (int i = 0; i < 2; i++) {
        task->ranges[i] = ranges[i];
        if (ranges[i] != NULL) {
            ranges[i]->in_flight++;
        }
    }
    if (emu_settings.check_source && emu_device_of(source) < 0) {
        task->source_sum = emu_sum(source, bytes);
    }
    if (pageable && emu_settings.pageable == PAGEABLE_UNDEFINED) {
        emu_violation("%s: %p from %p: host memory is not pinned", function, target, source);
        task->kind = TASK_SET;
        task->value = 0xEE;
        task->bytes = emu_device_of(target) < 0 ? 0 : bytes;
    }
    emu_enqueue(stream, task);
    if (!pageable) {
        emu_counters.async_pinned++;
        return ACL_SUCCESS;
    }
    emu_counters.async_pageable++;
    return emu_settings.pageable == PAGEABLE_SYNC ? emu_drain(stream, -1) : ACL_SUCCESS;
}

EMU_API aclError aclrtMemcpyAsync(void *target, size_t target_bytes, const void *source,
                                  size_t bytes, uint32_t kind, void *stream)
{
    EMU_ENTER("(%p, %zu, %p, %zu, %u, %p)", target, target_bytes, source, bytes, kind, stream);
    return copy_async(__func__, target, target_bytes, source, bytes, kind, stream);
}

EMU_API aclError aclrtMemcpyAsyncWithCondition(void *target, size_t target_bytes,
                                               const void *source, size_t bytes, uint32_t kind,
                                               void *stream)
{
    EMU_ENTER("(%p, %zu, %p, %zu, %u, %p)", target, target_bytes, source, bytes, kind, stream);
    return copy_async(__func__, target, target_bytes, source, bytes, kind, stream);
}

EMU_API aclError aclrtMemset(void *target, size_t target_bytes, int32_t value, size_t bytes)
{
    EMU_ENTER("(%p, %zu, %d, %zu)", target, target_bytes, value, bytes);
    EMU_CONTEXT(context)
    (void)context;
    if (bytes > target_bytes) {
        return emu_fail(RT_PARAM_INVALID, "aclrtMemset: %zu bytes to a place of %zu", bytes,
                        target_bytes);
    }
    memset(emu_shadow(target), value, bytes);
    return ACL_SUCCESS;
}

EMU_API aclError aclrtMemsetAsync(void *target, size_t target_bytes, int32_t value, size_t bytes,
                                  void *stream_handle)
{
    EMU_ENTER("(%p, %zu, %d, %zu, %p)", target, target_bytes, value, bytes, stream_handle);
    emu_stream *stream;
    aclError code = emu_stream_of(stream_handle, &stream, __func__);
    if (code != ACL_SUCCESS) {
        return code;
    }
    if (bytes > target_bytes) {
        return emu_fail(RT_PARAM_INVALID, "aclrtMemsetAsync: %zu bytes to a place of %zu", bytes,
                        target_bytes);
    }
    emu_task *task = emu_new_task(TASK_SET);
    task->target = target;
    task->value = value;
    task->bytes = bytes;
    emu_enqueue(stream, task);
    return ACL_SUCCESS;
}

#if EMU_CANN >= 830
/* One step of a batch: its copies are unordered, all of one direction. */
static aclError batch(void **targets, size_t *target_bytes, void **sources, size_t *bytes,
                      size_t count, size_t *fail_out, bool async, void *stream)
{
    enum copy_kind first = count > 0 ? kind_of(targets[0], sources[0]) : COPY_H2D;
    for (size_t i = 0; i < count; i++) {
        enum copy_kind kind = kind_of(targets[i], sources[i]);
        aclError code =
            kind != first || (kind != COPY_H2D && kind != COPY_D2H)
                ? emu_fail(RT_PARAM_INVALID, "a batch goes all to the device, or all from it")
            : async ? copy_async("aclrtMemcpyBatchAsync", targets[i], target_bytes[i], sources[i],
                                 bytes[i], COPY_DEFAULT, stream)
                    : aclrtMemcpy(targets[i], target_bytes[i], sources[i], bytes[i], COPY_DEFAULT);
        if (code != ACL_SUCCESS) {
            *fail_out = i;
            return code;
        }
    }
    return ACL_SUCCESS;
}

EMU_API aclError aclrtMemcpyBatch(void **targets, size_t *target_bytes, void **sources,
                                  size_t *bytes, size_t count, void *attributes, size_t *indexes,
                                  size_t attribute_count, size_t *fail_out)
{
    EMU_ENTER("(%zu)", count);
    *fail_out = SIZE_MAX;
    if (attributes == NULL || indexes == NULL || attribute_count == 0 || indexes[0] != 0) {
        return emu_fail(ACL_INVALID_PARAM, "aclrtMemcpyBatch: no attributes");
    }
    return batch(targets, target_bytes, sources, bytes, count, fail_out, false, NULL);
}

EMU_API aclError aclrtMemcpyBatchAsync(void **targets, size_t *target_bytes, void **sources,
                                       size_t *bytes, size_t count, void *attributes,
                                       size_t *indexes, size_t attribute_count, size_t *fail_out,
                                       void *stream)
{
    EMU_ENTER("(%zu, %p)", count, stream);
    *fail_out = SIZE_MAX;
    if (attributes == NULL || indexes == NULL || attribute_count == 0 || indexes[0] != 0) {
        return emu_fail(ACL_INVALID_PARAM, "aclrtMemcpyBatchAsync: no attributes");
    }
    return batch(targets, target_bytes, sources, bytes, count, fail_out, true, stream);
}
#endif
