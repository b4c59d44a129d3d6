#include "device.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "error.h"
#include "os.h"

static const sllmi_device_ops *const backends[] = {&sllmi_device_cpu, &sllmi_device_npu,
                                                   &sllmi_device_cuda};

#define BACKEND_COUNT (sizeof backends / sizeof backends[0])

const char *sllm_backend_name(uint32_t index)
{
    return index < BACKEND_COUNT ? backends[index]->name : NULL;
}

sllm_status sllmi_device_open_ops(const sllmi_device_ops *ops, int32_t ordinal,
                                  sllm_device **device_out, sllm_error *err)
{
    *device_out = NULL;
    int32_t count = 0;
    sllm_status status = ops->probe(&count, err);
    if (status != SLLM_OK) {
        return status;
    }
    if (ordinal < 0 || ordinal >= count) {
        const char *visible = ops->visibility == NULL ? NULL : getenv(ops->visibility);
        return sllmi_fail(err, SLLM_E_NO_DEVICE, 0, "there is no device %s:%d: %d found%s%s%s%s",
                          ops->name, ordinal, count, visible == NULL ? "" : ", and ",
                          visible == NULL ? "" : ops->visibility, visible == NULL ? "" : " is ",
                          visible == NULL      ? ""
                          : visible[0] == '\0' ? "empty: it hides them all"
                                               : visible);
    }
    sllm_device *device = sllmi_sys.alloc(sizeof *device);
    if (device == NULL) {
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for device %s:%d", ops->name,
                          ordinal);
    }
    *device = (sllm_device){.ops = ops, .ordinal = ordinal, .pid = getpid(), .users = 1};
    status = ops->open(ordinal, &device->dev, err);
    if (status != SLLM_OK) {
        free(device);
        return status;
    }
    *device_out = device;
    return SLLM_OK;
}

sllm_status sllm_device_open(const char *backend, int32_t ordinal, sllm_device **device_out,
                             sllm_error *err)
{
    if (backend == NULL || device_out == NULL) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_device_open: a NULL argument");
    }
    *device_out = NULL;
    for (size_t i = 0; i < BACKEND_COUNT; i++) {
        if (strcmp(backends[i]->name, backend) == 0) {
            return sllmi_device_open_ops(backends[i], ordinal, device_out, err);
        }
    }
    return sllmi_fail(err, SLLM_E_NO_DEVICE, 0, "there is no backend `%s`", backend);
}

void sllmi_device_keep(sllm_device *device)
{
    atomic_fetch_add(&device->users, 1);
}

void sllm_device_close(sllm_device *device)
{
    if (device != NULL && device->pid == getpid() && atomic_fetch_sub(&device->users, 1) == 1) {
        device->ops->close(device->dev);
        free(device);
    }
}
