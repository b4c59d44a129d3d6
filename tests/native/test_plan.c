/* The plan: every byte wanted goes to its place once, by reads that keep to the grid. */
#include <stdlib.h>
#include <string.h>

#include "align.h"
#include "check.h"
#include "plan.h"

#define MAX_EXTENTS 160
#define MERGE_GAP 65536u

/* A part of a file that arrives at an address of a place (-1: host, else a device). */
typedef struct arrival {
    uint32_t file;
    int32_t place;
    uint64_t start, end, target;
} arrival;

static int by_arrival(const void *left, const void *right)
{
    const arrival *a = left, *b = right;
    if (a->place != b->place) {
        return a->place < b->place ? -1 : 1;
    }
    if (a->file != b->file) {
        return a->file < b->file ? -1 : 1;
    }
    if (a->start != b->start) {
        return a->start < b->start ? -1 : 1;
    }
    return (a->target > b->target) - (a->target < b->target);
}

/* Sort, and join what adjoins in file and address: two lists that say the same become equal. */
static uint64_t normalise(arrival *list, uint64_t count)
{
    qsort(list, count, sizeof *list, by_arrival);
    uint64_t kept = 0;
    for (uint64_t i = 0; i < count; i++) {
        arrival *last = kept == 0 ? NULL : &list[kept - 1];
        if (last != NULL && last->place == list[i].place && last->file == list[i].file &&
            last->end == list[i].start &&
            last->target + (last->end - last->start) == list[i].target) {
            last->end = list[i].end;
        } else {
            list[kept++] = list[i];
        }
    }
    return kept;
}

static uint64_t random_gap(check_random *random)
{
    switch (check_random_below(random, 5)) {
    case 0:
    case 1: return 0;
    case 2: return 1 + check_random_below(random, MERGE_GAP);
    case 3: return MERGE_GAP + check_random_below(random, 3);
    default: return check_random_below(random, 300000);
    }
}

static uint64_t random_bytes(check_random *random)
{
    uint64_t widest = 1ull << check_random_below(random, 20);
    return 1 + check_random_below(random, widest);
}

/* Extents of up to four devices and the host in up to three files, none overlapping another of its
 * own place; targets adjoin now and then. */
static uint64_t make_extents(check_random *random, int32_t devices, sllm_extent *extents)
{
    uint64_t count = 0;
    uint64_t target = 1ull << 40;
    uint32_t files = 1 + (uint32_t)check_random_below(random, 3);
    for (uint32_t file = 0; file < files; file++) {
        for (int32_t place = -1; place < devices; place++) {
            uint64_t at = check_random_below(random, 100000);
            uint64_t wanted = check_random_below(random, MAX_EXTENTS / 16);
            for (uint64_t i = 0; i < wanted && count < MAX_EXTENTS; i++) {
                uint64_t bytes = random_bytes(random);
                target += check_random_below(random, 2) * (1 + check_random_below(random, 5000));
                extents[count++] = (sllm_extent){
                    .file = file, .device = place, .offset = at, .bytes = bytes, .target = target};
                target += bytes;
                at += bytes + random_gap(random);
            }
        }
    }
    for (uint64_t i = count; i > 1; i--) {
        uint64_t other = check_random_below(random, i);
        sllm_extent kept = extents[i - 1];
        extents[i - 1] = extents[other];
        extents[other] = kept;
    }
    return count;
}

static void check_chunk(const sllmi_plan *plan, uint64_t index, uint64_t chunk_bytes)
{
    const sllmi_chunk *chunk = &plan->chunks[index];
    CHECK(chunk->bytes >= 1 && chunk->bytes <= chunk_bytes);
    CHECK_U64(chunk->offset / chunk_bytes, (chunk->offset + chunk->bytes - 1) / chunk_bytes);
    if (index > 0) {
        const sllmi_chunk *before = chunk - 1;
        CHECK(before->file < chunk->file ||
              (before->file == chunk->file && before->offset <= chunk->offset));
    }
}

/* A host chunk lies within one extent. */
static arrival host_arrival(const sllmi_plan *plan, const sllmi_chunk *chunk)
{
    const sllm_extent *extent = &plan->extents[chunk->first];
    CHECK(extent->device < 0 && extent->file == chunk->file);
    CHECK(extent->offset <= chunk->offset);
    CHECK(chunk->offset + chunk->bytes <= extent->offset + extent->bytes);
    return (arrival){.file = chunk->file,
                     .place = -1,
                     .start = chunk->offset,
                     .end = chunk->offset + chunk->bytes,
                     .target = (uint64_t)(uintptr_t)sllmi_plan_host_target(plan, chunk)};
}

static uint64_t staged_arrivals(const sllmi_plan *plan, const sllmi_chunk *chunk, int32_t devices,
                                arrival *list)
{
    uint64_t count = 0;
    uint64_t mask = 0;
    for (int32_t device = 0; device < devices; device++) {
        sllmi_piece_cursor cursor = {.extent = chunk->first};
        sllmi_piece piece, before = {0};
        for (bool first = true; sllmi_plan_next_piece(plan, chunk, device, &cursor, &piece);
             first = false) {
            CHECK(piece.bytes >= 1 && piece.chunk_offset + piece.bytes <= chunk->bytes);
            CHECK(first || before.chunk_offset + before.bytes != piece.chunk_offset ||
                  before.target + before.bytes != piece.target); /* else one copy too many */
            uint64_t start = chunk->offset + piece.chunk_offset;
            list[count++] = (arrival){.file = chunk->file,
                                      .place = device,
                                      .start = start,
                                      .end = start + piece.bytes,
                                      .target = piece.target};
            mask |= 1ull << device;
            before = piece;
        }
    }
    CHECK_U64(sllmi_plan_devices(plan, chunk), mask);
    return count;
}

/* Staged chunks: none overlaps another, a gap above the rule is never read along, one below it
 * never splits a read, and no chunk starts or ends with bytes of a gap that splits. */
static void check_staged(const sllmi_plan *plan, const sllm_extent *extents, uint64_t count,
                         uint64_t chunk_bytes)
{
    const sllmi_chunk *before = NULL;
    for (uint64_t i = 0; i < plan->chunk_count; i++) {
        const sllmi_chunk *chunk = &plan->chunks[i];
        if (chunk->host) {
            continue;
        }
        if (before != NULL && before->file == chunk->file) {
            CHECK(before->offset + before->bytes <= chunk->offset);
            bool adjoin = before->offset + before->bytes == chunk->offset;
            CHECK(adjoin || chunk->offset - (before->offset + before->bytes) > MERGE_GAP);
            CHECK(!adjoin || chunk->offset % chunk_bytes == 0);
        }
        before = chunk;
        /* The widest hole in it. */
        uint64_t at = chunk->offset, end = chunk->offset + chunk->bytes;
        while (at < end) {
            uint64_t next = end, covered = at;
            for (uint64_t e = 0; e < count; e++) {
                const sllm_extent *x = &extents[e];
                if (x->device < 0 || x->file != chunk->file) {
                    continue;
                }
                if (x->offset <= at && x->offset + x->bytes > covered) {
                    covered = x->offset + x->bytes;
                } else if (x->offset > at) {
                    next = sllmi_min(next, x->offset);
                }
            }
            CHECK(covered > at || next - at <= MERGE_GAP);
            at = covered > at ? covered : next;
        }
    }
}

static void check_plan(check_random *random, uint64_t chunk_bytes)
{
    static sllm_extent extents[MAX_EXTENTS];
    int32_t devices = (int32_t)check_random_below(random, 5);
    uint64_t count = make_extents(random, devices, extents);
    sllmi_plan plan;
    sllm_error err;
    CHECK_OK(sllmi_plan_build(extents, count, chunk_bytes, &plan, &err), &err);

    uint64_t capacity = count + 1, bytes = 0, arrived = 0;
    for (uint64_t i = 0; i < plan.chunk_count; i++) {
        capacity += count + 1;
    }
    arrival *wanted = calloc(count + 1, sizeof *wanted);
    arrival *got = calloc(capacity, sizeof *got);
    for (uint64_t i = 0; i < count; i++) {
        const sllm_extent *x = &extents[i];
        wanted[i] = (arrival){x->file, x->device, x->offset, x->offset + x->bytes, x->target};
        bytes += x->bytes;
    }
    for (uint64_t i = 0; i < plan.chunk_count; i++) {
        check_chunk(&plan, i, chunk_bytes);
        if (plan.chunks[i].host) {
            got[arrived++] = host_arrival(&plan, &plan.chunks[i]);
        } else {
            arrived += staged_arrivals(&plan, &plan.chunks[i], devices, got + arrived);
        }
    }
    CHECK_U64(plan.bytes, bytes);
    uint64_t normal = normalise(wanted, count);
    CHECK_U64(normalise(got, arrived), normal);
    for (uint64_t i = 0; i < normal; i++) {
        CHECK_U64(got[i].place, wanted[i].place);
        CHECK_U64(got[i].file, wanted[i].file);
        CHECK_U64(got[i].start, wanted[i].start);
        CHECK_U64(got[i].end, wanted[i].end);
        CHECK_U64(got[i].target, wanted[i].target);
    }
    check_staged(&plan, extents, count, chunk_bytes);
    free(wanted);
    free(got);
    sllmi_plan_free(&plan);
}

TEST(every_byte_of_random_extents_arrives_once_and_reads_keep_to_the_grid)
{
    check_random random = check_random_start(0);
    uint64_t rounds = check_rounds(3000);
    for (uint64_t round = 0; round < rounds; round++) {
        uint64_t chunk_bytes = SLLM_PAGE_BYTES << check_random_below(&random, 13);
        check_plan(&random, chunk_bytes);
    }
}

TEST(a_chunk_size_that_is_no_power_of_two_makes_a_grid_too)
{
    check_random random = check_random_start(1);
    uint64_t rounds = check_rounds(1000);
    for (uint64_t round = 0; round < rounds; round++) {
        check_plan(&random, SLLM_PAGE_BYTES * (1 + check_random_below(&random, 50)));
    }
}

TEST(no_extents_are_a_plan_of_nothing)
{
    sllmi_plan plan;
    sllm_error err;
    CHECK_OK(sllmi_plan_build(NULL, 0, 16u << 20, &plan, &err), &err);
    CHECK_U64(plan.chunk_count, 0);
    CHECK_U64(plan.bytes, 0);
    sllmi_plan_free(&plan);
}

TEST(two_devices_that_want_the_same_bytes_share_the_read)
{
    const sllm_extent extents[] = {
        {.device = 1, .offset = 100, .bytes = 50000, .target = 7 << 20},
        {.device = 0, .offset = 100, .bytes = 50000, .target = 9 << 20},
    };
    sllmi_plan plan;
    sllm_error err;
    CHECK_OK(sllmi_plan_build(extents, 2, 16u << 20, &plan, &err), &err);
    CHECK_U64(plan.chunk_count, 1);
    CHECK_U64(plan.chunks[0].bytes, 50000);
    CHECK_U64(sllmi_plan_devices(&plan, &plan.chunks[0]), 3);
    sllmi_plan_free(&plan);
}

TEST(a_chunk_that_lies_in_a_gap_belongs_to_nobody)
{
    const sllm_extent extents[] = {
        {.device = 0, .offset = 0, .bytes = 10, .target = 0},
        {.device = 0, .offset = 20000, .bytes = 10, .target = 10},
    };
    sllmi_plan plan;
    sllm_error err;
    CHECK_OK(sllmi_plan_build(extents, 2, SLLM_PAGE_BYTES, &plan, &err), &err);
    uint64_t nobody = 0;
    for (uint64_t i = 0; i < plan.chunk_count; i++) {
        nobody += sllmi_plan_devices(&plan, &plan.chunks[i]) == 0;
    }
    CHECK_U64(plan.chunk_count, 5);
    CHECK_U64(nobody, 3);
    sllmi_plan_free(&plan);
}

TEST(a_sparse_file_of_exbibytes_is_refused_and_not_counted_for_ever)
{
    const sllm_extent extent = {.device = -1, .offset = 0, .bytes = INT64_MAX / 2, .target = 0};
    sllmi_plan plan;
    sllm_error err;
    CHECK_STATUS(sllmi_plan_build(&extent, 1, SLLM_PAGE_BYTES, &plan, &err), &err, SLLM_E_INVALID);
    CHECK_TEXT(err.message, "chunks");
    CHECK_U64(plan.chunk_count, 0);
}
