/* Address ranges and physical memory apart, as torch_npu's expandable segments want them. */
#define _GNU_SOURCE
#include "emu.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PHYSICAL_MAGIC 0x9A111A11u

typedef struct physical_property {
    int handle_type, allocation_type, attribute;
    struct {
        uint32_t id, kind;
    } location;
    uint64_t reserved;
} physical_property;

typedef struct physical {
    uint32_t magic;
    int fd;
    uint32_t device;
    uint64_t bytes;
    bool imported;
} physical;

static uint64_t whole_pages(uint64_t bytes)
{
    return (bytes + EMU_HUGE_BYTES - 1) & ~(uint64_t)(EMU_HUGE_BYTES - 1);
}

static physical *new_physical(int fd, uint32_t device, uint64_t bytes, bool imported)
{
    physical *memory = calloc(1, sizeof *memory);
    if (memory == NULL || fd < 0) {
        abort();
    }
    *memory = (physical){
        .magic = PHYSICAL_MAGIC, .fd = fd, .device = device, .bytes = bytes, .imported = imported};
    return memory;
}

EMU_API aclError aclrtMemGetAllocationGranularity(physical_property *property, uint32_t option,
                                                  size_t *bytes_out)
{
    (void)property;
    EMU_ENTER("(%u)", option);
    *bytes_out = EMU_HUGE_BYTES;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtReserveMemAddress(void **address_out, size_t bytes, size_t align,
                                        void *wanted, uint64_t flags)
{
    (void)align, (void)wanted, (void)flags;
    EMU_ENTER("(%zu)", bytes);
    EMU_CONTEXT(context)
    emu_device *device = &emu_devices[context->device];
    uint64_t span = whole_pages(bytes);
    pthread_mutex_lock(&emu_memory_lock);
    uint64_t at = device->next_import;
    bool room = span > 0 && at + span <= emu_settings.window_bytes;
    device->next_import += room ? span : 0;
    pthread_mutex_unlock(&emu_memory_lock);
    if (!room) {
        return emu_fail(RT_MEMORY_ALLOCATION, "aclrtReserveMemAddress(%zu)", bytes);
    }
    *address_out = (void *)(uintptr_t)(device->address + at);
    return ACL_SUCCESS;
}

EMU_API aclError aclrtReleaseMemAddress(void *address)
{
    EMU_ENTER("(%p)", address);
    return emu_device_of(address) >= 0 ? ACL_SUCCESS : emu_fail(RT_PARAM_INVALID, "not reserved");
}

EMU_API aclError aclrtMallocPhysical(void **handle_out, size_t bytes,
                                     const physical_property *property, uint64_t flags)
{
    (void)flags;
    EMU_ENTER("(%zu)", bytes);
    if (handle_out == NULL || bytes == 0 || property == NULL ||
        property->location.id >= emu_settings.devices) {
        return emu_fail(RT_PARAM_INVALID, "aclrtMallocPhysical");
    }
    emu_device *device = &emu_devices[property->location.id];
    pthread_mutex_lock(&emu_memory_lock);
    bool room = device->used + bytes <= emu_settings.memory_bytes;
    device->used += room ? bytes : 0;
    pthread_mutex_unlock(&emu_memory_lock);
    if (!room) {
        return emu_fail(RT_MEMORY_ALLOCATION, "aclrtMallocPhysical(%zu)", bytes);
    }
    int fd = memfd_create("aclemu-physical", MFD_CLOEXEC);
    if (ftruncate(fd, (off_t)bytes) != 0) {
        return emu_fail(RT_DRV_INTERNAL_ERROR, "aclrtMallocPhysical(%zu)", bytes);
    }
    *handle_out = new_physical(fd, property->location.id, bytes, false);
    return ACL_SUCCESS;
}

EMU_API aclError aclrtFreePhysical(void *handle)
{
    EMU_ENTER("(%p)", handle);
    physical *memory = handle;
    if (memory == NULL || memory->magic != PHYSICAL_MAGIC) {
        return emu_fail(RT_INVALID_HANDLE, "aclrtFreePhysical");
    }
    if (!memory->imported) {
        pthread_mutex_lock(&emu_memory_lock);
        emu_devices[memory->device].used -= memory->bytes;
        pthread_mutex_unlock(&emu_memory_lock);
    }
    (void)close(memory->fd);
    memory->magic = 0;
    free(memory);
    return ACL_SUCCESS;
}

EMU_API aclError aclrtMapMem(void *address, size_t bytes, size_t offset, void *handle,
                             uint64_t flags)
{
    (void)flags;
    EMU_ENTER("(%p, %zu)", address, bytes);
    physical *memory = handle;
    int device = emu_device_of(address);
    if (memory == NULL || memory->magic != PHYSICAL_MAGIC || device < 0 || offset != 0 ||
        bytes > memory->bytes) {
        return emu_fail(RT_PARAM_INVALID, "aclrtMapMem");
    }
    if (mmap(emu_shadow(address), bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory->fd,
             0) == MAP_FAILED) {
        return emu_fail(RT_DRV_INTERNAL_ERROR, "aclrtMapMem");
    }
    emu_range *range = emu_new_range((uintptr_t)address, bytes, RANGE_PHYSICAL);
    pthread_mutex_lock(&emu_memory_lock);
    emu_insert(&emu_devices[device].live, range);
    pthread_mutex_unlock(&emu_memory_lock);
    return ACL_SUCCESS;
}

EMU_API aclError aclrtUnmapMem(void *address)
{
    EMU_ENTER("(%p)", address);
    int device = emu_device_of(address);
    emu_range *range = NULL;
    pthread_mutex_lock(&emu_memory_lock);
    if (device >= 0) {
        range = emu_find_start(emu_devices[device].live, (uintptr_t)address);
    }
    if (range != NULL && range->kind == RANGE_PHYSICAL) {
        emu_unlink(&emu_devices[device].live, range);
    } else {
        range = NULL;
    }
    pthread_mutex_unlock(&emu_memory_lock);
    if (range == NULL) {
        return emu_fail(RT_PARAM_INVALID, "aclrtUnmapMem(%p): not mapped", address);
    }
    (void)mmap(emu_shadow(address), range->end - range->start, PROT_NONE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    emu_end_range(range, __func__);
    return ACL_SUCCESS;
}

EMU_API aclError aclrtMemExportToShareableHandle(void *handle, uint32_t kind, uint64_t flags,
                                                 uint64_t *shared_out)
{
    EMU_ENTER("(%p, %u, %lu)", handle, kind, (unsigned long)flags);
    const physical *memory = handle;
    if (memory == NULL || memory->magic != PHYSICAL_MAGIC || shared_out == NULL) {
        return emu_fail(RT_PARAM_INVALID, "aclrtMemExportToShareableHandle");
    }
    *shared_out = (uint64_t)getpid() << 32 | (uint32_t)memory->fd;
    return ACL_SUCCESS;
}

EMU_API aclError aclrtMemSetPidToShareableHandle(uint64_t shared, int32_t *pids, size_t count)
{
    (void)pids;
    EMU_ENTER("(%lx, %zu)", (unsigned long)shared, count);
    return ACL_SUCCESS;
}

EMU_API aclError aclrtMemImportFromShareableHandle(uint64_t shared, int32_t device,
                                                   void **handle_out)
{
    EMU_ENTER("(%lx, %d)", (unsigned long)shared, device);
    char path[64];
    struct stat facts;
    if (shared >> 32 == (uint64_t)getpid()) {
        return emu_fail(RT_PARAM_INVALID, "importing one's own memory is not supported");
    }
    (void)snprintf(path, sizeof path, "/proc/%u/fd/%u", (unsigned)(shared >> 32), (unsigned)shared);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &facts) != 0) {
        return emu_fail(RT_IPC_ERROR, "the exporter is gone");
    }
    *handle_out = new_physical(fd, (uint32_t)device, (uint64_t)facts.st_size, true);
    return ACL_SUCCESS;
}
