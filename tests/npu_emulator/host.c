/* Pinned and registered host memory. Everything else is pageable. */
#define _GNU_SOURCE
#include "emu.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096u
#define REGISTER_MAPPED 0x2u
#define REGISTER_PINNED 0x10000000u
#define ODD_BYTES 64u /* aclrtMallocHost promises no more alignment than that, and gives no more */

emu_range *emu_host_ranges;

static uint64_t mapping_bytes(uint64_t bytes)
{
    return (bytes + ODD_BYTES + PAGE - 1) & ~(uint64_t)(PAGE - 1);
}

EMU_API aclError aclrtMallocHost(void **memory_out, size_t bytes)
{
    EMU_ENTER("(%zu)", bytes);
    if (memory_out == NULL || bytes == 0) {
        return emu_fail(ACL_INVALID_PARAM, "aclrtMallocHost: a NULL pointer or no bytes");
    }
    EMU_CONTEXT(context);
    (void)context;
    void *memory = mmap(NULL, mapping_bytes(bytes), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return emu_fail(RT_MEMORY_ALLOCATION, "aclrtMallocHost(%zu)", bytes);
    }
    emu_range *range = emu_new_range((uintptr_t)memory + ODD_BYTES, bytes, RANGE_HOST);
    pthread_mutex_lock(&emu_memory_lock);
    emu_insert(&emu_host_ranges, range);
    pthread_mutex_unlock(&emu_memory_lock);
    *memory_out = (void *)(uintptr_t)range->start;
    emu_counters.host_mallocs++;
    emu_counters.pinned_bytes += bytes;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtFreeHost(void *memory)
{
    EMU_ENTER("(%p)", memory);
    pthread_mutex_lock(&emu_memory_lock);
    emu_range *range = emu_find_start(emu_host_ranges, (uintptr_t)memory);
    if (range != NULL && range->kind == RANGE_HOST) {
        emu_unlink(&emu_host_ranges, range);
    } else {
        range = NULL;
    }
    pthread_mutex_unlock(&emu_memory_lock);
    if (range == NULL) {
        return emu_fail(RT_PARAM_INVALID, "aclrtFreeHost(%p): not of aclrtMallocHost", memory);
    }
    uint64_t bytes = range->end - range->start;
    (void)munmap((void *)(uintptr_t)(range->start - ODD_BYTES), mapping_bytes(bytes));
    emu_end_range(range, __func__);
    emu_counters.host_frees++;
    emu_counters.pinned_bytes -= bytes;
    return ACL_SUCCESS;
}

typedef struct location {
    uint32_t id, kind; /* 0 host, 1 device, 2 unregistered */
} location;
typedef struct pointer_attributes {
    location location;
    uint32_t page_bytes, reserved[4];
} pointer_attributes;

#if EMU_CANN >= 810
EMU_API aclError aclrtMallocHostWithCfg(void **memory_out, uint64_t bytes, void *config)
{
    (void)config;
    return aclrtMallocHost(memory_out, bytes);
}

static aclError register_host(void *memory, uint64_t bytes, uint32_t flags, const char *function)
{
    if (memory == NULL || bytes == 0) {
        return emu_fail(ACL_INVALID_PARAM, "%s: a NULL pointer or no bytes", function);
    }
    if ((uintptr_t)memory % PAGE != 0) {
        return emu_fail(RT_PARAM_INVALID, "%s: %p is not at a page", function, memory);
    }
    uint64_t start = (uintptr_t)memory, end = start + bytes;
    aclError code = ACL_SUCCESS;
    pthread_mutex_lock(&emu_memory_lock);
    for (emu_range *range = emu_host_ranges; range != NULL; range = range->next) {
        if (range->start < end && start < range->end) {
            code = range->kind == RANGE_REGISTERED ? HOST_MEMORY_ALREADY_REGISTERED
                   : flags & REGISTER_PINNED       ? RT_PARAM_INVALID
                                                   : code;
        }
    }
    if (code == ACL_SUCCESS) {
        emu_insert(&emu_host_ranges, emu_new_range(start, bytes, RANGE_REGISTERED));
        emu_counters.registrations++;
        emu_counters.registered_bytes += bytes;
    }
    pthread_mutex_unlock(&emu_memory_lock);
    return code == ACL_SUCCESS ? code : emu_fail(code, "%s: %p is pinned", function, memory);
}

EMU_API aclError aclrtHostRegister(void *memory, uint64_t bytes, uint32_t kind, void **device_out)
{
    EMU_ENTER("(%p, %lu, %u)", memory, (unsigned long)bytes, kind);
    EMU_CONTEXT(context);
    (void)context;
    aclError code = register_host(memory, bytes, REGISTER_MAPPED, __func__);
    if (code == ACL_SUCCESS && device_out != NULL) {
        *device_out = memory;
    }
    return code;
}

EMU_API aclError aclrtHostUnregister(void *memory)
{
    EMU_ENTER("(%p)", memory);
    pthread_mutex_lock(&emu_memory_lock);
    emu_range *range = emu_host_ranges;
    while (range != NULL &&
           (range->start != (uintptr_t)memory || range->kind != RANGE_REGISTERED)) {
        range = range->next;
    }
    if (range != NULL) {
        emu_unlink(&emu_host_ranges, range);
    }
    pthread_mutex_unlock(&emu_memory_lock);
    if (range == NULL) {
        return emu_fail(HOST_MEMORY_NOT_REGISTERED, "aclrtHostUnregister(%p)", memory);
    }
    emu_counters.registered_bytes -= range->end - range->start;
    emu_end_range(range, __func__);
    return ACL_SUCCESS;
}

EMU_API aclError aclrtPointerGetAttributes(const void *address, pointer_attributes *out)
{
    EMU_ENTER("(%p)", address);
    int device = emu_device_of(address);
    *out = (pointer_attributes){.page_bytes = PAGE};
    if (device >= 0) {
        out->location = (location){.id = (uint32_t)device, .kind = 1};
        out->page_bytes = EMU_HUGE_BYTES;
        return ACL_SUCCESS;
    }
    pthread_mutex_lock(&emu_memory_lock);
    out->location.kind = emu_find(emu_host_ranges, (uintptr_t)address, 1) != NULL ? 0 : 2;
    pthread_mutex_unlock(&emu_memory_lock);
    return ACL_SUCCESS;
}
#endif

#if EMU_CANN >= 850
EMU_API aclError aclrtHostRegisterV2(void *memory, uint64_t bytes, uint32_t flags)
{
    EMU_ENTER("(%p, %lu, %x)", memory, (unsigned long)bytes, flags);
    EMU_CONTEXT(context);
    (void)context;
    return register_host(memory, bytes, flags, __func__);
}

EMU_API aclError aclrtHostGetDevicePointer(void *memory, void **device_out, uint32_t flags)
{
    EMU_ENTER("(%p, %u)", memory, flags);
    pthread_mutex_lock(&emu_memory_lock);
    bool known = emu_find(emu_host_ranges, (uintptr_t)memory, 1) != NULL;
    pthread_mutex_unlock(&emu_memory_lock);
    if (!known) {
        return emu_fail(HOST_MEMORY_NOT_REGISTERED, "aclrtHostGetDevicePointer(%p)", memory);
    }
    *device_out = memory;
    return ACL_SUCCESS;
}
#endif
