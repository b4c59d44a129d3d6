/* Sharing device memory between processes: keys (CANN 8.3 and later). A key holds the exporter's
 * pid and descriptor; the importer opens that below /proc, as the same user may. */
#define _GNU_SOURCE
#include "emu.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define KEY_BYTES 65u
#define PAGE 4096u
#define KEY_FORMAT "acle%8x%4x%2x%12lx%12lx%1lx"

#if EMU_CANN >= 830
EMU_API aclError aclrtIpcMemGetExportKey(void *memory, size_t bytes, char *key, size_t key_bytes,
                                         uint64_t flags)
{
    EMU_ENTER("(%p, %zu)", memory, bytes);
    int device = emu_device_of(memory);
    emu_range *range = NULL;
    pthread_mutex_lock(&emu_memory_lock);
    if (device >= 0) {
        range = emu_find(emu_devices[device].live, (uintptr_t)memory, bytes);
    }
    pthread_mutex_unlock(&emu_memory_lock);
    if (range == NULL || key == NULL || key_bytes < KEY_BYTES) {
        return emu_fail(RT_PARAM_INVALID, "aclrtIpcMemGetExportKey: no live range, or no room");
    }
    (void)snprintf(key, key_bytes, "acle%08x%04x%02x%012lx%012lx%01lx", (unsigned)getpid(),
                   (unsigned)emu_devices[device].fd, (unsigned)device,
                   (unsigned long)((uintptr_t)memory - emu_devices[device].address),
                   (unsigned long)bytes, (unsigned long)(flags & 1));
    return ACL_SUCCESS;
}

EMU_API aclError aclrtIpcMemSetImportPid(const char *key, int32_t *pids, size_t count)
{
    (void)pids;
    EMU_ENTER("(%s, %zu)", key, count);
    return ACL_SUCCESS;
}

EMU_API aclError aclrtIpcMemImportByKey(void **memory_out, const char *key, uint64_t flags)
{
    EMU_ENTER("(%s, %lu)", key, (unsigned long)flags);
    EMU_CONTEXT(context)
    unsigned pid, fd, exporter;
    unsigned long offset, bytes, key_flags;
    char path[64];
    if (key == NULL ||
        sscanf(key, KEY_FORMAT, &pid, &fd, &exporter, &offset, &bytes, &key_flags) != 6) {
        return emu_fail(RT_PARAM_INVALID, "no key");
    }
    if ((pid_t)pid == getpid()) {
        return emu_fail(RT_PARAM_INVALID, "importing one's own memory is not supported");
    }
    (void)snprintf(path, sizeof path, "/proc/%u/fd/%u", pid, fd);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) {
        return emu_fail(RT_IPC_ERROR, "the exporter is gone");
    }
    emu_device *device = &emu_devices[context->device];
    uint64_t start = offset & ~(uint64_t)(PAGE - 1);
    uint64_t span = ((offset + bytes + PAGE - 1) & ~(uint64_t)(PAGE - 1)) - start;
    pthread_mutex_lock(&emu_memory_lock);
    uint64_t at = device->next_import;
    bool room = at + span <= emu_settings.window_bytes &&
                mmap(device->shadow + at, span, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                     file, (off_t)start) != MAP_FAILED;
    if (room) {
        device->next_import += (span + EMU_HUGE_BYTES - 1) & ~(uint64_t)(EMU_HUGE_BYTES - 1);
        emu_range *range = emu_new_range(device->address + at, span, RANGE_IMPORT);
        range->id = emu_sum(key, strlen(key));
        emu_insert(&device->live, range);
    }
    pthread_mutex_unlock(&emu_memory_lock);
    (void)close(file);
    if (!room) {
        return emu_fail(RT_MEMORY_ALLOCATION, "no room for an import");
    }
    *memory_out = (void *)(uintptr_t)(device->address + at + (offset - start));
    return ACL_SUCCESS;
}

static bool end_import(emu_device *device, uint64_t id)
{
    for (emu_range *range = device->live; range != NULL; range = range->next) {
        if (range->kind == RANGE_IMPORT && range->id == id) {
            (void)mmap(device->shadow + (range->start - device->address), range->end - range->start,
                       PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
            emu_unlink(&device->live, range);
            emu_end_range(range, "aclrtIpcMemClose");
            return true;
        }
    }
    return false;
}

EMU_API aclError aclrtIpcMemClose(const char *key)
{
    EMU_ENTER("(%s)", key);
    uint64_t id = emu_sum(key, strlen(key));
    bool ended = false;
    pthread_mutex_lock(&emu_memory_lock);
    for (uint32_t i = 0; i < emu_settings.devices && !ended; i++) {
        ended = end_import(&emu_devices[i], id);
    }
    pthread_mutex_unlock(&emu_memory_lock);
    return ACL_SUCCESS; /* the exporter's has nothing to end */
}
#endif
