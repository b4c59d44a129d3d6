#include "plan.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "align.h"
#include "error.h"
#include "os.h"

/* Bytes nobody wants are read along when that saves a read: below this, a request costs more. */
#define MERGE_GAP_BYTES (64u << 10)
#define MAX_CHUNKS UINT32_MAX /* what sllm_progress can count */

static uint64_t end_of(const sllm_extent *extent)
{
    return extent->offset + extent->bytes;
}

static int by_place(const void *left, const void *right)
{
    const sllm_extent *a = left, *b = right;
    bool a_host = a->device < 0, b_host = b->device < 0;
    if (a_host != b_host) {
        return a_host ? -1 : 1;
    }
    if (a->file != b->file) {
        return a->file < b->file ? -1 : 1;
    }
    if (a->offset != b->offset) {
        return a->offset < b->offset ? -1 : 1;
    }
    return (a->device > b->device) - (a->device < b->device);
}

static int by_offset(const void *left, const void *right)
{
    const sllmi_chunk *a = left, *b = right;
    if (a->file != b->file) {
        return a->file < b->file ? -1 : 1;
    }
    return (a->offset > b->offset) - (a->offset < b->offset);
}

/* Append the chunks of one run [start, end) of a file; with `chunks` NULL only count them. */
static uint64_t split(sllmi_chunk *chunks, uint64_t at, sllmi_chunk run, uint64_t chunk_bytes)
{
    uint64_t end = run.offset + run.bytes;
    if (chunks == NULL) { /* a sparse file may have more of them than could be counted one by one */
        return at + (end - 1) / chunk_bytes - run.offset / chunk_bytes + 1;
    }
    for (uint64_t start = run.offset; start < end; at++) {
        uint64_t stop = sllmi_min(end, start - start % chunk_bytes + chunk_bytes);
        chunks[at] = run;
        chunks[at].offset = start;
        chunks[at].bytes = stop - start;
        start = stop;
    }
    return at;
}

/* Walk the sorted extents and split every run of them; with `chunks` NULL only count. */
static uint64_t split_all(const sllmi_plan *plan, uint64_t chunk_bytes, sllmi_chunk *chunks)
{
    uint64_t at = 0;
    for (uint64_t i = 0; i < plan->extent_count && at <= MAX_CHUNKS;) {
        const sllm_extent *extent = &plan->extents[i];
        sllmi_chunk run = {.offset = extent->offset,
                           .bytes = extent->bytes,
                           .first = i,
                           .file = extent->file,
                           .host = extent->device < 0};
        for (i++; i < plan->extent_count && !run.host; i++) {
            const sllm_extent *next = &plan->extents[i];
            if (next->file != run.file || next->offset > run.offset + run.bytes + MERGE_GAP_BYTES) {
                break;
            }
            run.bytes = sllmi_max(run.bytes, end_of(next) - run.offset);
        }
        at = split(chunks, at, run, chunk_bytes);
    }
    return at;
}

/* A chunk knows only its run's first extent yet: move that forward, past what ends before it. */
static void find_first_extents(sllmi_plan *plan)
{
    for (uint64_t i = 1; i < plan->chunk_count; i++) {
        sllmi_chunk *chunk = &plan->chunks[i];
        if (chunk->host) {
            continue;
        }
        uint64_t first = chunk->first;
        if (!chunk[-1].host && chunk[-1].file == chunk->file && chunk[-1].first > first) {
            first = chunk[-1].first;
        }
        while (end_of(&plan->extents[first]) <= chunk->offset) {
            first++;
        }
        chunk->first = first;
    }
}

sllm_status sllmi_plan_build(const sllm_extent *extents, uint64_t extent_count,
                             uint64_t chunk_bytes, sllmi_plan *plan, sllm_error *err)
{
    *plan = (sllmi_plan){.extent_count = extent_count};
    if (extent_count == 0) {
        return SLLM_OK;
    }
    plan->extents = sllmi_sys.alloc(extent_count * sizeof *plan->extents);
    if (plan->extents != NULL) {
        memcpy(plan->extents, extents, extent_count * sizeof *plan->extents);
        qsort(plan->extents, extent_count, sizeof *plan->extents, by_place);
        for (uint64_t i = 0; i < extent_count; i++) {
            plan->bytes += extents[i].bytes;
        }
        plan->chunk_count = split_all(plan, chunk_bytes, NULL);
        if (plan->chunk_count > MAX_CHUNKS) {
            sllmi_plan_free(plan);
            return sllmi_fail(err, SLLM_E_INVALID, 0,
                              "chunks of %llu bytes are too small: there would be more than %u",
                              (unsigned long long)chunk_bytes, MAX_CHUNKS);
        }
        plan->chunks = sllmi_sys.alloc(plan->chunk_count * sizeof *plan->chunks);
    }
    if (plan->chunks == NULL) {
        sllmi_plan_free(plan);
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for the plan of %llu extents",
                          (unsigned long long)extent_count);
    }
    split_all(plan, chunk_bytes, plan->chunks);
    find_first_extents(plan);
    qsort(plan->chunks, plan->chunk_count, sizeof *plan->chunks, by_offset);
    return SLLM_OK;
}

void sllmi_plan_free(sllmi_plan *plan)
{
    free(plan->extents);
    free(plan->chunks);
    *plan = (sllmi_plan){0};
}

char *sllmi_plan_host_target(const sllmi_plan *plan, const sllmi_chunk *chunk)
{
    const sllm_extent *extent = &plan->extents[chunk->first];
    return (char *)(uintptr_t)(extent->target + (chunk->offset - extent->offset));
}

bool sllmi_plan_next_piece(const sllmi_plan *plan, const sllmi_chunk *chunk, int32_t device,
                           sllmi_piece_cursor *cursor, sllmi_piece *piece)
{
    uint64_t chunk_end = chunk->offset + chunk->bytes;
    bool open = false;
    for (; cursor->extent < plan->extent_count; cursor->extent++) {
        const sllm_extent *extent = &plan->extents[cursor->extent];
        if (extent->file != chunk->file || extent->offset >= chunk_end) {
            break;
        }
        uint64_t start = sllmi_max(extent->offset, chunk->offset);
        uint64_t end = sllmi_min(end_of(extent), chunk_end);
        if (extent->device != device || start >= end) {
            continue;
        }
        uint64_t target = extent->target + (start - extent->offset);
        if (!open) {
            *piece = (sllmi_piece){
                .target = target, .chunk_offset = start - chunk->offset, .bytes = end - start};
            open = true;
        } else if (piece->target + piece->bytes == target &&
                   chunk->offset + piece->chunk_offset + piece->bytes == start) {
            piece->bytes += end - start;
        } else {
            return true; /* the cursor stays on the extent that starts the next piece */
        }
    }
    return open;
}

uint64_t sllmi_plan_devices(const sllmi_plan *plan, const sllmi_chunk *chunk)
{
    uint64_t mask = 0;
    for (uint64_t i = chunk->first; i < plan->extent_count; i++) {
        const sllm_extent *extent = &plan->extents[i];
        if (extent->file != chunk->file || extent->offset >= chunk->offset + chunk->bytes) {
            break;
        }
        if (end_of(extent) > chunk->offset) {
            mask |= 1ull << extent->device;
        }
    }
    return mask;
}
