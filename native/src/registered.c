#define _GNU_SOURCE
#include "registered.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "align.h"
#include "error.h"
#include "os.h"

static sllm_status map_and_register(sllm_registered *registered, int fd, sllm_error *err)
{
    sllm_device *device = registered->device;
    if (sllmi_sys.fstat(fd, &registered->file) != 0) {
        return sllmi_fail(err, SLLM_E_IO, errno, "cannot stat a file to register: %s",
                          strerror(errno));
    }
    if (registered->file.st_size <= 0) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "an empty file cannot be registered");
    }
    registered->bytes = sllmi_align_up((uint64_t)registered->file.st_size, SLLM_PAGE_BYTES);
    registered->start = sllmi_sys.mmap(NULL, registered->bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (registered->start == MAP_FAILED) {
        registered->start = NULL;
        return sllmi_fail(err, SLLM_E_NOMEM, errno, "cannot map %llu bytes: %s",
                          (unsigned long long)registered->bytes, strerror(errno));
    }
    /* A child that is forked meanwhile does not keep the pages. */
    (void)sllmi_sys.madvise(registered->start, registered->bytes, MADV_DONTFORK);
    sllm_status status =
        device->ops->host_register(device->dev, registered->start, registered->bytes, err);
    if (status != SLLM_OK) {
        if (status != SLLM_E_TIMEOUT) { /* else the runtime may still be at it */
            sllmi_sys.munmap(registered->start, registered->bytes);
        }
        registered->start = NULL;
    }
    return status;
}

sllm_status sllm_registered_create(sllm_device *device, int fd, sllm_registered **registered_out,
                                   sllm_error *err)
{
    if (device == NULL || registered_out == NULL) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_registered_create: a NULL argument");
    }
    *registered_out = NULL;
    if (device->pid != getpid()) {
        return sllmi_fail(err, SLLM_E_FORKED, 0, "the device is not of this process");
    }
    if (device->ops->host_register == NULL) {
        return sllmi_fail(err, SLLM_E_UNSUPPORTED, 0, "%s registers no memory", device->ops->name);
    }
    sllm_registered *registered = sllmi_sys.alloc(sizeof *registered);
    if (registered == NULL) {
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory to register a file");
    }
    registered->device = device;
    registered->pid = getpid();
    registered->users = 1;
    sllm_status status = map_and_register(registered, fd, err);
    if (status != SLLM_OK) {
        free(registered);
        return status;
    }
    sllmi_device_keep(device);
    *registered_out = registered;
    return SLLM_OK;
}

void sllmi_registered_keep(sllm_registered *registered)
{
    atomic_fetch_add(&registered->users, 1);
}

bool sllmi_registered_feeds(const sllm_registered *registered, const sllm_device *device)
{
    return registered->device->ops == device->ops || (device->ops->caps & SLLMI_DEV_PINNED) == 0;
}

void sllm_registered_destroy(sllm_registered *registered)
{
    if (registered == NULL || registered->pid != getpid() ||
        atomic_fetch_sub(&registered->users, 1) != 1) {
        return;
    }
    sllm_device *device = registered->device;
    /* What the runtime still takes for registered must never be another mapping's address. */
    if (device->ops->host_unregister(device->dev, registered->start, NULL) == SLLM_OK) {
        sllmi_sys.munmap(registered->start, registered->bytes);
    }
    sllm_device_close(device);
    free(registered);
}
