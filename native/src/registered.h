/* A file in memory, mapped and registered with a device: its copies may start there. */
#ifndef SLLMI_REGISTERED_H
#define SLLMI_REGISTERED_H

#include <stdatomic.h>
#include <stdint.h>
#include <sys/stat.h>

#include "device.h"

struct sllm_registered {
    sllm_device *device;
    char *start;
    uint64_t bytes;
    struct stat file;
    pid_t pid;
    atomic_uint users; /* the caller's handle, and jobs */
};

/* One more user; sllm_registered_destroy() ends that too. */
void sllmi_registered_keep(sllm_registered *registered);

/* Whether the copies of a device may start in it. */
bool sllmi_registered_feeds(const sllm_registered *registered, const sllm_device *device);

#endif
