#define _GNU_SOURCE
#include "dl.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "os.h"

/* The complaint worth showing: that a library which is there cannot be loaded tells more than that
 * another one is not there. */
struct complaint {
    char text[512];
    bool of_a_file;
};

static void *try_open(const char *path, struct complaint *complaint)
{
    void *handle = sllmi_sys.dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL) {
        const char *text = dlerror();
        text = text == NULL ? "the loader gave no reason" : text;
        size_t length = strlen(path);
        bool of_a_file = strncmp(text, path, length) != 0 || strstr(text, "No such file") == NULL;
        if (complaint->text[0] == '\0' || (of_a_file && !complaint->of_a_file)) {
            (void)snprintf(complaint->text, sizeof complaint->text, "%s", text);
            complaint->of_a_file = of_a_file;
        }
    }
    return handle;
}

/* "$VARIABLE/rest" or a plain path, with a file name behind it. False: the variable is not set. */
static bool expand(const char *folder, const char *name, char *path, size_t path_bytes)
{
    const char *start = "";
    if (folder[0] == '$') {
        char variable[64];
        size_t length = strcspn(folder, "/") - 1;
        (void)snprintf(variable, sizeof variable, "%.*s", (int)length, folder + 1);
        start = getenv(variable);
        folder += length + 1;
        if (start == NULL || start[0] == '\0') {
            return false;
        }
    }
    int length = snprintf(path, path_bytes, "%s%s/%s", start, folder, name);
    return length > 0 && (size_t)length < path_bytes;
}

sllm_status sllmi_dl_open(const sllmi_dl_library *library, void **handle_out, sllm_error *err)
{
    struct complaint complaint = {0};
    void *handle = NULL;
    for (const char *const *name = library->names; handle == NULL && *name != NULL; name++) {
        handle = sllmi_sys.dlopen(*name, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    }
    for (const char *const *name = library->names; handle == NULL && *name != NULL; name++) {
        handle = try_open(*name, &complaint);
    }
    for (const char *const *folder = library->folders; handle == NULL && *folder != NULL;
         folder++) {
        for (const char *const *name = library->names; handle == NULL && *name != NULL; name++) {
            char path[PATH_MAX];
            if (expand(*folder, *name, path, sizeof path)) {
                handle = try_open(path, &complaint);
            }
        }
    }
    *handle_out = handle;
    return handle != NULL ? SLLM_OK
                          : sllmi_fail(err, SLLM_E_NO_DEVICE, 0, "cannot load %s: %s",
                                       library->what, complaint.text);
}

sllm_status sllmi_dl_resolve(const sllmi_dl_library *library, void *handle,
                             const sllmi_dl_symbol *symbols, size_t count, void *table,
                             sllm_error *err)
{
    for (size_t i = 0; i < count; i++) {
        void *address = sllmi_sys.dlsym(handle, symbols[i].name);
        if (address == NULL && symbols[i].required) {
            return sllmi_fail(err, SLLM_E_NO_DEVICE, 0, "%s has no `%s`: it is too old",
                              library->what, symbols[i].name);
        }
        /* A function's address as dlsym() has it. Source: POSIX, dlsym(), application usage. */
        memcpy((char *)table + symbols[i].offset, &address, sizeof address);
    }
    return SLLM_OK;
}
