/* Devices' memory. A device is a memory file, seen twice: through a window that the host faults on,
 * as on a real one, and through a shadow that the emulator alone uses. */
#define _GNU_SOURCE
#include "emu.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define FIRST_WINDOW 0x120000000000u
#define SMALL_ALIGN 512u
#define PAGE 4096u

emu_device emu_devices[EMU_MAX_DEVICES];
pthread_mutex_t emu_memory_lock = PTHREAD_MUTEX_INITIALIZER;

static void *reserve(uint64_t address, int more_flags)
{
    return mmap((void *)(uintptr_t)address, emu_settings.window_bytes, PROT_NONE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | more_flags, -1, 0);
}

static void die(const char *what)
{
    perror(what);
    abort();
}

static void start_device(uint32_t index)
{
    emu_device *device = &emu_devices[index];
    void *window = MAP_FAILED;
    char name[32];
    pthread_mutex_init(&device->engine, NULL);
    if (!emu_settings.any_address) {
        window = reserve(FIRST_WINDOW + index * emu_settings.window_bytes, MAP_FIXED_NOREPLACE);
    }
    if (window == MAP_FAILED) { /* taken, or a sanitizer's: let the kernel choose */
        window = reserve(0, 0);
    }
    device->address = (uintptr_t)window;
    device->shadow = reserve(0, 0);
    (void)snprintf(name, sizeof name, "aclemu-%u", index);
    device->fd = memfd_create(name, MFD_CLOEXEC);
    if (window == MAP_FAILED || device->shadow == MAP_FAILED || device->fd < 0 ||
        ftruncate(device->fd, (off_t)emu_settings.memory_bytes) != 0 ||
        mmap(device->shadow, emu_settings.memory_bytes, PROT_READ | PROT_WRITE,
             MAP_SHARED | MAP_FIXED, device->fd, 0) == MAP_FAILED) {
        die("[aclemu] device memory");
    }
    device->next_import = emu_settings.window_bytes / 2;
}

void emu_memory_start(void)
{
    for (uint32_t i = 0; i < emu_settings.devices; i++) {
        start_device(i);
    }
}

int emu_device_of(const void *address)
{
    uint64_t at = (uintptr_t)address;
    for (uint32_t i = 0; i < emu_settings.devices; i++) {
        uint64_t window = emu_devices[i].address;
        if (at >= window && at < window + emu_settings.window_bytes) {
            return (int)i;
        }
    }
    return -1;
}

uint8_t *emu_shadow(const void *address)
{
    int device = emu_device_of(address);
    return device < 0
               ? (uint8_t *)(uintptr_t)address
               : emu_devices[device].shadow + ((uintptr_t)address - emu_devices[device].address);
}

emu_range *emu_find(emu_range *list, uint64_t start, uint64_t bytes)
{
    while (list != NULL && (start < list->start || start + bytes > list->end)) {
        list = list->next;
    }
    return list;
}

emu_range *emu_find_start(emu_range *list, uint64_t start)
{
    while (list != NULL && list->start != start) {
        list = list->next;
    }
    return list;
}

void emu_insert(emu_range **list, emu_range *range)
{
    while (*list != NULL && (*list)->start < range->start) {
        list = &(*list)->next;
    }
    range->next = *list;
    *list = range;
}

void emu_unlink(emu_range **list, emu_range *range)
{
    while (*list != NULL && *list != range) {
        list = &(*list)->next;
    }
    if (*list != NULL) {
        *list = range->next;
    }
}

emu_range *emu_new_range(uint64_t start, uint64_t bytes, enum range_kind kind)
{
    emu_range *range = calloc(1, sizeof *range);
    if (range == NULL) {
        die("[aclemu] range");
    }
    range->start = start;
    range->end = start + bytes;
    range->kind = kind;
    return range;
}

void emu_end_range(emu_range *range, const char *function)
{
    if (range->in_flight != 0) {
        emu_violation("%s: %#lx while %d tasks use it", function, (unsigned long)range->start,
                      range->in_flight);
        return; /* they still count themselves out */
    }
    free(range);
}

static uint64_t align_up(uint64_t value, uint64_t power)
{
    return (value + power - 1) & ~(power - 1);
}

/* The first gap that is large enough; NULL: there is none. Under the lock. */
static emu_range *allocate(emu_device *device, uint64_t bytes, uint64_t align)
{
    uint64_t at = device->address, top = device->address + emu_settings.memory_bytes;
    for (emu_range *range = device->live; range != NULL && range->start < top;
         range = range->next) {
        if (align_up(at, align) + bytes <= range->start) {
            break;
        }
        at = range->end;
    }
    at = align_up(at, align);
    if (at + bytes > top) {
        return NULL;
    }
    emu_range *range = emu_new_range(at, bytes, RANGE_MALLOC);
    range->id = ++device->next_id;
    emu_insert(&device->live, range);
    device->used += bytes;
    device->peak = device->used > device->peak ? device->used : device->peak;
    return range;
}

static aclError device_malloc(void **memory_out, size_t bytes, uint64_t padding,
                              const char *function)
{
    if (memory_out == NULL || bytes == 0) {
        return emu_fail(ACL_INVALID_PARAM, "%s: a NULL pointer or no bytes", function);
    }
    aclError code;
    emu_context *context = emu_current(function, &code);
    if (context == NULL) {
        return code;
    }
    uint64_t rounded = align_up(bytes, 32) + padding;
    emu_device *device = &emu_devices[context->device];
    pthread_mutex_lock(&emu_memory_lock);
    emu_range *range =
        allocate(device, rounded, rounded >= EMU_HUGE_BYTES ? EMU_HUGE_BYTES : SMALL_ALIGN);
    pthread_mutex_unlock(&emu_memory_lock);
    if (range == NULL) {
        return emu_fail(RT_MEMORY_ALLOCATION, "%s: device %d has no room for %zu bytes", function,
                        context->device, bytes);
    }
    if (emu_settings.poison) {
        memset(device->shadow + (range->start - device->address), 0xA5, rounded);
    }
    *memory_out = (void *)(uintptr_t)range->start;
    emu_counters.mallocs++;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtMalloc(void **memory_out, size_t bytes, uint32_t policy)
{
    EMU_ENTER("(%zu, %u)", bytes, policy);
    return device_malloc(memory_out, bytes, 32, __func__);
}

EMU_API aclError aclrtMallocAlign32(void **memory_out, size_t bytes, uint32_t policy)
{
    EMU_ENTER("(%zu, %u)", bytes, policy);
    return device_malloc(memory_out, bytes, 0, __func__);
}

EMU_API aclError aclrtMallocCached(void **memory_out, size_t bytes, uint32_t policy)
{
    EMU_ENTER("(%zu, %u)", bytes, policy);
    return device_malloc(memory_out, bytes, 32, __func__);
}

EMU_API aclError aclrtMallocWithCfg(void **memory_out, size_t bytes, uint32_t policy, void *config)
{
    (void)config;
    EMU_ENTER("(%zu, %u)", bytes, policy);
    return device_malloc(memory_out, bytes, 32, __func__);
}

static void give_back(emu_device *device, emu_range *range)
{
    uint64_t bytes = range->end - range->start, offset = range->start - device->address;
    uint64_t start = align_up(offset, PAGE), end = (offset + bytes) & ~(uint64_t)(PAGE - 1);
    if (emu_settings.poison) {
        memset(device->shadow + offset, 0xDD, bytes);
    } else if (end > start) {
        (void)fallocate(device->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)start,
                        (off_t)(end - start));
    }
}

/* At once, as in AscendCL: what still uses the memory uses what is no longer its. */
EMU_API aclError aclrtFree(void *memory)
{
    EMU_ENTER("(%p)", memory);
    if (memory == NULL) {
        return emu_fail(ACL_INVALID_PARAM, "aclrtFree(NULL)");
    }
    int index = emu_device_of(memory);
    emu_range *range = NULL;
    pthread_mutex_lock(&emu_memory_lock);
    if (index >= 0) {
        range = emu_find_start(emu_devices[index].live, (uintptr_t)memory);
    }
    if (range != NULL && range->kind == RANGE_MALLOC) {
        emu_unlink(&emu_devices[index].live, range);
        emu_devices[index].used -= range->end - range->start;
    } else {
        range = NULL;
    }
    pthread_mutex_unlock(&emu_memory_lock);
    if (range == NULL) {
        return emu_fail(RT_PARAM_INVALID, "aclrtFree(%p): no live allocation", memory);
    }
    give_back(&emu_devices[index], range);
    emu_end_range(range, __func__);
    emu_counters.frees++;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtGetMemInfo(uint32_t kind, size_t *free_out, size_t *total_out)
{
    EMU_ENTER("(%u)", kind);
    EMU_CONTEXT(context);
    pthread_mutex_lock(&emu_memory_lock);
    *free_out = emu_settings.memory_bytes - emu_devices[context->device].used;
    pthread_mutex_unlock(&emu_memory_lock);
    *total_out = emu_settings.memory_bytes;
    return ACL_SUCCESS;
}
