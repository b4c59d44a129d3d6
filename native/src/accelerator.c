#define _GNU_SOURCE
#include "accelerator.h"

#include <errno.h>
#include <stdlib.h>

#include "aside.h"
#include "error.h"
#include "os.h"

#define START_TIMEOUT_MS 120000u /* the first call of a machine starts its driver's processes */
#define CALL_TIMEOUT_MS 60000u

static sllmi_request request_for(const sllmi_accelerator_ops *ops, int32_t ordinal,
                                 sllm_status (*run)(sllmi_request *, sllm_error *),
                                 const char *what, uint32_t timeout_ms)
{
    return (sllmi_request){.run = run,
                           .what = what,
                           .backend = ops->name,
                           .ordinal = ordinal,
                           .timeout_ms = timeout_ms,
                           .ops = ops};
}

static sllm_status count(sllmi_request *request, sllm_error *err)
{
    return request->ops->count(&request->count, err);
}

static sllm_status use_device(const sllmi_accelerator_ops *ops, int32_t ordinal, sllm_error *err)
{
    sllm_status status = ops->usable == NULL ? SLLM_OK : ops->usable(ordinal, err);
    return status == SLLM_OK ? ops->set_device(ordinal, err) : status;
}

static sllm_status start(sllmi_request *request, sllm_error *err)
{
    return use_device(request->ops, request->ordinal, err);
}

static sllm_status pin(sllmi_request *request, sllm_error *err)
{
    sllm_status status = start(request, err);
    return status == SLLM_OK
               ? request->ops->pin(request->ordinal, request->bytes, &request->memory, err)
               : status;
}

static sllm_status unpin(sllmi_request *request, sllm_error *err)
{
    sllm_status status = request->ops->set_device(request->ordinal, err);
    request->ops->unpin(request->memory); /* a device that fails is no reason to keep it */
    return status;
}

static void unpin_late(sllmi_request *request)
{
    (void)unpin(request, NULL);
}

static sllm_status register_memory(sllmi_request *request, sllm_error *err)
{
    sllm_status status = start(request, err);
    return status == SLLM_OK
               ? request->ops->host_register(request->ordinal, request->memory, request->bytes, err)
               : status;
}

static sllm_status unregister_memory(sllmi_request *request, sllm_error *err)
{
    sllm_status status = request->ops->set_device(request->ordinal, err);
    return status == SLLM_OK ? request->ops->host_unregister(request->ordinal, request->memory, err)
                             : status;
}

static void unregister_late(sllmi_request *request)
{
    (void)unregister_memory(request, NULL);
}

sllm_status sllmi_accelerator_probe(const sllmi_accelerator_ops *ops, int32_t *count_out,
                                    sllm_error *err)
{
    sllmi_request request = request_for(ops, 0, count, "counting devices", START_TIMEOUT_MS);
    sllm_status status = sllmi_aside(&request, err);
    *count_out = status == SLLM_OK ? request.count : 0;
    return status;
}

sllm_status sllmi_accelerator_open(const sllmi_accelerator_ops *ops, int32_t ordinal,
                                   void **dev_out, sllm_error *err)
{
    *dev_out = NULL;
    sllmi_request request =
        request_for(ops, ordinal, start, "starting the device", START_TIMEOUT_MS);
    sllmi_accelerator *device = sllmi_sys.alloc(sizeof *device);
    if (device == NULL) {
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for %s:%d", ops->name, ordinal);
    }
    *device = (sllmi_accelerator){.ops = ops, .ordinal = ordinal};
    sllm_status status = sllmi_aside(&request, err);
    if (status != SLLM_OK) {
        free(device);
        return status;
    }
    *dev_out = device;
    return SLLM_OK;
}

void sllmi_accelerator_close(void *dev)
{
    free(dev);
}

sllm_status sllmi_accelerator_bind_thread(void *dev, sllm_error *err)
{
    const sllmi_accelerator *device = dev;
    return use_device(device->ops, device->ordinal, err);
}

sllm_status sllmi_accelerator_host_alloc(void *dev, size_t bytes, void **ptr_out, sllm_error *err)
{
    const sllmi_accelerator *device = dev;
    sllmi_request request =
        request_for(device->ops, device->ordinal, pin, "pinning memory", CALL_TIMEOUT_MS);
    request.undo = unpin_late;
    request.bytes = bytes;
    sllm_status status = sllmi_aside(&request, err);
    *ptr_out = status == SLLM_OK ? request.memory : NULL;
    return status;
}

sllm_status sllmi_accelerator_host_free(void *dev, void *ptr)
{
    const sllmi_accelerator *device = dev;
    sllmi_request request =
        request_for(device->ops, device->ordinal, unpin, "unpinning memory", CALL_TIMEOUT_MS);
    request.memory = ptr;
    return sllmi_aside(&request, NULL) == SLLM_E_TIMEOUT ? SLLM_E_TIMEOUT : SLLM_OK;
}

sllm_status sllmi_accelerator_host_register(void *dev, void *memory, size_t bytes, sllm_error *err)
{
    const sllmi_accelerator *device = dev;
    sllmi_request request = request_for(device->ops, device->ordinal, register_memory,
                                        "registering memory", CALL_TIMEOUT_MS);
    request.undo = unregister_late;
    request.memory = memory;
    request.bytes = bytes;
    return sllmi_aside(&request, err);
}

sllm_status sllmi_accelerator_host_unregister(void *dev, void *memory, sllm_error *err)
{
    const sllmi_accelerator *device = dev;
    sllmi_request request = request_for(device->ops, device->ordinal, unregister_memory,
                                        "unregistering memory", CALL_TIMEOUT_MS);
    request.memory = memory;
    return sllmi_aside(&request, err);
}
