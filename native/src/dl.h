/* A vendor's runtime library, found when it is wanted. */
#ifndef SLLMI_DL_H
#define SLLMI_DL_H

#include <stdbool.h>
#include <stddef.h>

#include "sllm.h"

typedef struct sllmi_dl_library {
    const char *what;           /* for messages, such as "the Ascend runtime" */
    const char *const *names;   /* best first; NULL ends the list */
    const char *const *folders; /* where the loader may not look: a path, or "$VARIABLE/rest" */
} sllmi_dl_library;

typedef struct sllmi_dl_symbol {
    const char *name;
    size_t offset; /* of its pointer in the table that sllmi_dl_resolve() fills */
    bool required;
} sllmi_dl_symbol;

/* The copy that the process has loaded already, under any of the names; else one that the loader
 * finds; else one in a folder. Never closed. SLLM_E_NO_DEVICE, with the loader's own words. */
sllm_status sllmi_dl_open(const sllmi_dl_library *library, void **handle_out, sllm_error *err);

/* Fill a table of function pointers; an optional one that is absent becomes NULL.
 * SLLM_E_NO_DEVICE, naming the first required symbol that is absent. */
sllm_status sllmi_dl_resolve(const sllmi_dl_library *library, void *handle,
                             const sllmi_dl_symbol *symbols, size_t count, void *table,
                             sllm_error *err);

#endif
