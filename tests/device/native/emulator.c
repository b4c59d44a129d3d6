#define _GNU_SOURCE
#include "emulator.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

#define MALLOC_HUGE_FIRST 0u

static pthread_once_t once = PTHREAD_ONCE_INIT;
static sllmi_acl acl;
static int (*acl_malloc)(void **, size_t, unsigned);
static int (*acl_free)(void *);
static uint64_t (*stat_of)(const char *);
static const void *(*peek)(const void *);
static void (*fail_next)(const char *);
static int (*has_failed)(void);
static void (*hold)(int);
static int (*thread_device)(void);
static int (*last_error)(void);

const char *backend(void)
{
    const char *name = getenv("EMULATED_BACKEND");
    return name == NULL ? "npu" : name;
}

bool is_cuda(void)
{
    return strcmp(backend(), "cuda") == 0;
}

const char *device_name(int ordinal)
{
    static char name[32];
    (void)snprintf(name, sizeof name, "%s:%d", backend(), ordinal);
    return name;
}

static void look_up(void *library, const char *name, void *slot)
{
    void *address = dlsym(library, name);
    CHECK(address != NULL);
    memcpy(slot, &address, sizeof address);
}

static void load_library(void)
{
    void *library = dlopen(is_cuda() ? "libcudart.so.13" : "libascendcl.so", RTLD_NOW | RTLD_LOCAL);
    CHECK(library != NULL);
    look_up(library, "aclrtMalloc", &acl_malloc);
    look_up(library, "aclrtFree", &acl_free);
    look_up(library, "aclrtSetDevice", &acl.aclrtSetDevice);
    look_up(library, "aclrtCreateStream", &acl.aclrtCreateStream);
    look_up(library, "aclrtDestroyStream", &acl.aclrtDestroyStream);
    look_up(library, "aclrtSynchronizeStreamWithTimeout", &acl.aclrtSynchronizeStreamWithTimeout);
    look_up(library, "aclemuStat", &stat_of);
    look_up(library, "aclemuPeek", &peek);
    look_up(library, "aclemuFail", &fail_next);
    look_up(library, "aclemuFailed", &has_failed);
    look_up(library, "aclemuHold", &hold);
    look_up(library, "aclemuThreadDevice", &thread_device);
    if (is_cuda()) {
        look_up(library, "cudaGetLastError", &last_error);
    }
}

const sllmi_acl *emulator(void)
{
    (void)pthread_once(&once, load_library);
    return &acl;
}

uint64_t emulator_stat(const char *name)
{
    (void)emulator();
    uint64_t value = stat_of(name);
    CHECK(value != UINT64_MAX);
    return value;
}

void emulator_fail(const char *rule)
{
    (void)emulator();
    fail_next(rule);
}

bool emulator_failed(void)
{
    return has_failed() != 0;
}

void emulator_hold(bool held)
{
    (void)emulator();
    hold(held);
}

int emulator_thread_device(void)
{
    (void)emulator();
    return thread_device();
}

void emulator_check(void)
{
    CHECK_U64(emulator_stat("violations"), 0);
    CHECK_U64(emulator_stat("async_pageable"), 0);
    CHECK_U64(emulator_stat("busy_streams_destroyed"), 0);
}

void emulator_check_empty(void)
{
    emulator_check();
    CHECK_U64(emulator_stat("streams"), 0);
    CHECK_U64(emulator_stat("events"), 0);
    CHECK_U64(emulator_stat("pinned_bytes"), 0);
    CHECK_U64(emulator_stat("registered_bytes"), 0);
    CHECK_U64(emulator_stat("used0"), 0);
    CHECK_U64(emulator_stat("used1"), 0);
}

struct errand {
    void (*run)(void *);
    void *argument;
};

static void *run_errand(void *argument)
{
    struct errand *errand = argument;
    errand->run(errand->argument);
    (void)emulator();
    CHECK_U64(is_cuda() ? last_error() : 0, 0);
    return NULL;
}

void on_a_thread(void (*run)(void *), void *argument)
{
    struct errand errand = {run, argument};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run_errand, &errand) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
}

struct allocation {
    int32_t device;
    uint64_t bytes;
    void *memory;
};

static void alloc_there(void *argument)
{
    struct allocation *allocation = argument;
    CHECK(emulator()->aclrtSetDevice(allocation->device) == 0);
    CHECK(acl_malloc(&allocation->memory, allocation->bytes, MALLOC_HUGE_FIRST) == 0);
}

static void *device_alloc(int32_t device, uint64_t bytes)
{
    struct allocation allocation = {.device = device, .bytes = bytes};
    on_a_thread(alloc_there, &allocation);
    return allocation.memory;
}

static void device_free(void *memory)
{
    CHECK(acl_free(memory) == 0);
}

static unsigned char *device_look(const void *address)
{
    return (unsigned char *)(uintptr_t)peek(address);
}

const load_memory emulator_memory = {
    .alloc = device_alloc, .free = device_free, .look = device_look};
