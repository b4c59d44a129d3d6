/* Extents → chunks: pure arithmetic. */
#ifndef SLLMI_PLAN_H
#define SLLMI_PLAN_H

#include <stdbool.h>
#include <stdint.h>

#include "sllm.h"

/* One read. In place (`host`), or into a slot from which its pieces go to devices. */
typedef struct sllmi_chunk {
    uint64_t offset; /* in the file; not aligned: the read takes the whole pages around it */
    uint64_t bytes;
    uint64_t first; /* index of the first extent, in plan order, that touches the chunk */
    uint32_t file;
    bool host;
} sllmi_chunk;

typedef struct sllmi_plan {
    sllm_extent *extents; /* sorted by place (host or device), file, offset */
    uint64_t extent_count;
    sllmi_chunk *chunks; /* sorted by file, offset */
    uint64_t chunk_count;
    uint64_t bytes; /* sum of the extents */
} sllmi_plan;

/* A part of a chunk that belongs to one device, in one run of addresses. */
typedef struct sllmi_piece {
    uint64_t target;
    uint64_t chunk_offset; /* from the chunk's first byte */
    uint64_t bytes;
} sllmi_piece;

/* Where a walk over a chunk's pieces stands. Start with {.extent = chunk->first}. */
typedef struct sllmi_piece_cursor {
    uint64_t extent;
} sllmi_piece_cursor;

/* Split at multiples of `chunk_bytes` in the file, merge what lies close together on its way to a
 * device. Copies the extents. SLLM_OK, SLLM_E_NOMEM, or SLLM_E_INVALID for more chunks than
 * can be counted in 32 bits; end it with sllmi_plan_free(). */
sllm_status sllmi_plan_build(const sllm_extent *extents, uint64_t extent_count,
                             uint64_t chunk_bytes, sllmi_plan *plan, sllm_error *err);
void sllmi_plan_free(sllmi_plan *plan);

/* Where a host chunk is read to. */
char *sllmi_plan_host_target(const sllmi_plan *plan, const sllmi_chunk *chunk);

/* The next piece of a staged chunk for `device`; extents that adjoin in the file and on the device
 * come as one. False at the end. */
bool sllmi_plan_next_piece(const sllmi_plan *plan, const sllmi_chunk *chunk, int32_t device,
                           sllmi_piece_cursor *cursor, sllmi_piece *piece);

/* Bit mask of the devices that want something of a staged chunk (devices 0 to 63). */
uint64_t sllmi_plan_devices(const sllmi_plan *plan, const sllmi_chunk *chunk);

#endif
