/* Host memory: fresh pages for a job to fill, or a private view of a file. */
#define _GNU_SOURCE
#include "sllm.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "align.h"
#include "error.h"
#include "os.h"

/* Huge pages above this are not worth their rounding: aarch64 kernels with 64 KiB pages have huge
 * pages of 512 MiB. */
#define HUGE_PAGE_MAX_BYTES (32u << 20)
#define HUGE_PAGE_DEFAULT_BYTES (2u << 20)

struct sllm_memory {
    char *mapping; /* what munmap() gets */
    size_t mapping_bytes;
    char *address; /* the range's first byte */
    uint64_t bytes;
    bool writable;
};

static uint64_t page_bytes(void)
{
    return sllmi_max((uint64_t)sysconf(_SC_PAGESIZE), SLLM_PAGE_BYTES);
}

/* The alignment that lets the kernel use huge pages, or the page size where there are none. */
static uint64_t huge_page_bytes(void)
{
    static _Atomic uint64_t known;
    uint64_t value = known;
    if (value == 0) {
        unsigned long long pmd = HUGE_PAGE_DEFAULT_BYTES;
        FILE *file = fopen("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", "re");
        if (file != NULL) {
            if (fscanf(file, "%llu", &pmd) != 1) {
                pmd = HUGE_PAGE_DEFAULT_BYTES;
            }
            fclose(file);
        }
        value = (pmd & (pmd - 1)) == 0 && pmd > page_bytes() && pmd <= HUGE_PAGE_MAX_BYTES
                    ? pmd
                    : page_bytes();
        known = value;
    }
    return value;
}

/* Reserve address space whose start is `skew` past a multiple of `power`. Unreadable until mapped
 * over or made accessible. */
static char *reserve(uint64_t bytes, uint64_t power, uint64_t skew)
{
    uint64_t slack = power > page_bytes() ? power : 0;
    char *raw = sllmi_sys.mmap(NULL, bytes + slack, PROT_NONE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) {
        return NULL;
    }
    if (slack == 0) {
        return raw;
    }
    uint64_t start = sllmi_align_down((uintptr_t)raw, power) + skew;
    if (start < (uintptr_t)raw) {
        start += power;
    }
    uint64_t head = start - (uintptr_t)raw;
    if (head > 0) {
        sllmi_sys.munmap(raw, head);
    }
    if (slack > head) {
        sllmi_sys.munmap(raw + head + bytes, slack - head);
    }
    return raw + head;
}

static sllm_memory *new_memory(char *mapping, uint64_t mapping_bytes, uint64_t skew, uint64_t bytes,
                               bool writable)
{
    sllm_memory *memory = sllmi_sys.alloc(sizeof *memory);
    if (memory != NULL) {
        *memory = (sllm_memory){.mapping = mapping,
                                .mapping_bytes = mapping_bytes,
                                .address = mapping + skew,
                                .bytes = bytes,
                                .writable = writable};
    }
    return memory;
}

sllm_status sllm_memory_create(uint64_t bytes, uint64_t file_offset, sllm_memory **memory_out,
                               sllm_error *err)
{
    if (memory_out == NULL) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_memory_create: memory_out is NULL");
    }
    *memory_out = NULL;
    if (bytes == 0 || bytes > INT64_MAX / 2) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_memory_create: %llu bytes asked for",
                          (unsigned long long)bytes);
    }
    uint64_t huge = huge_page_bytes();
    uint64_t skew = file_offset % SLLM_PAGE_BYTES;
    bool large = bytes >= 2 * huge;
    /* A large mapping ends with a whole huge page, else its tail would be 4 KiB pages. */
    uint64_t mapping_bytes = sllmi_align_up(skew + bytes, large ? huge : page_bytes());
    char *mapping = reserve(mapping_bytes, large ? huge : page_bytes(), 0);
    /* Not mapped anew: a fixed mapping that fails may leave a hole for others to map into. */
    if (mapping == NULL ||
        sllmi_sys.mprotect(mapping, mapping_bytes, PROT_READ | PROT_WRITE) != 0) {
        int os_errno = errno;
        if (mapping != NULL) {
            sllmi_sys.munmap(mapping, mapping_bytes);
        }
        return sllmi_fail(err, SLLM_E_NOMEM, os_errno, "cannot reserve %llu bytes of memory: %s",
                          (unsigned long long)bytes, strerror(os_errno));
    }
    if (large) {
        (void)sllmi_sys.madvise(mapping, mapping_bytes, MADV_HUGEPAGE);
    }
    *memory_out = new_memory(mapping, mapping_bytes, skew, bytes, true);
    if (*memory_out == NULL) {
        sllmi_sys.munmap(mapping, mapping_bytes);
        return sllmi_fail(err, SLLM_E_NOMEM, ENOMEM, "out of memory for a handle");
    }
    return SLLM_OK;
}

sllm_status sllm_memory_map(int fd, const char *path, uint64_t file_offset, uint64_t bytes,
                            sllm_memory **memory_out, sllm_error *err)
{
    if (memory_out == NULL) {
        return sllmi_fail(err, SLLM_E_INVALID, 0, "sllm_memory_map: memory_out is NULL");
    }
    *memory_out = NULL;
    if (path == NULL || bytes == 0 || bytes > INT64_MAX / 2 || file_offset > INT64_MAX / 2) {
        return sllmi_fail(err, SLLM_E_INVALID, 0,
                          "sllm_memory_map: a range of %llu bytes at %llu is not one",
                          (unsigned long long)bytes, (unsigned long long)file_offset);
    }
    struct stat facts;
    if (sllmi_sys.fstat(fd, &facts) != 0) {
        int os_errno = errno;
        return sllmi_fail(err, SLLM_E_IO, os_errno, "cannot stat `%s`: %s (%s)", path,
                          strerror(os_errno), sllmi_errno_name(os_errno));
    }
    if (file_offset + bytes > (uint64_t)facts.st_size) {
        return sllmi_fail(err, SLLM_E_TRUNCATED, 0,
                          "`%s` ends at byte %llu, before byte %llu that is to be mapped", path,
                          (unsigned long long)facts.st_size,
                          (unsigned long long)(file_offset + bytes));
    }
    /* Address and file offset agree modulo the huge page: without that no huge mapping is made. */
    uint64_t start = sllmi_align_down(file_offset, page_bytes());
    uint64_t skew = file_offset - start;
    uint64_t huge = huge_page_bytes();
    uint64_t mapping_bytes = sllmi_align_up(skew + bytes, page_bytes());
    char *mapping = reserve(mapping_bytes, huge, start % huge);
    if (mapping == NULL) {
        int os_errno = errno;
        return sllmi_fail(err, SLLM_E_NOMEM, os_errno,
                          "cannot reserve %llu bytes of address space for `%s`: %s",
                          (unsigned long long)bytes, path, strerror(os_errno));
    }
    bool writable = false;
    int flags = MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED;
    void *mapped = sllmi_sys.mmap(mapping, mapping_bytes, PROT_READ, flags, fd, (off_t)start);
    if (mapped != MAP_FAILED) {
        /* Strict overcommit counts a writable private mapping in full, and may refuse. */
        writable = sllmi_sys.mprotect(mapping, mapping_bytes, PROT_READ | PROT_WRITE) == 0;
        *memory_out = new_memory(mapping, mapping_bytes, skew, bytes, writable);
    }
    if (*memory_out == NULL) {
        int os_errno = errno;
        sllmi_sys.munmap(mapping, mapping_bytes);
        return sllmi_fail(err, os_errno == ENOMEM ? SLLM_E_NOMEM : SLLM_E_IO, os_errno,
                          "cannot map `%s`: %s (%s)", path, strerror(os_errno),
                          sllmi_errno_name(os_errno));
    }
    return SLLM_OK;
}

void *sllm_memory_address(const sllm_memory *memory)
{
    return memory == NULL ? NULL : memory->address;
}

uint64_t sllm_memory_bytes(const sllm_memory *memory)
{
    return memory == NULL ? 0 : memory->bytes;
}

int sllm_memory_writable(const sllm_memory *memory)
{
    return memory != NULL && memory->writable;
}

int sllm_memory_advise_huge(sllm_memory *memory)
{
    return memory != NULL &&
           sllmi_sys.madvise(memory->mapping, memory->mapping_bytes, MADV_HUGEPAGE) == 0;
}

int64_t sllm_memory_huge_bytes(const sllm_memory *memory, uint64_t offset, uint64_t bytes)
{
    if (memory == NULL || offset > memory->bytes || bytes > memory->bytes - offset) {
        return -1;
    }
    return sllmi_sys.huge_bytes(memory->address + offset, bytes);
}

sllm_status sllm_memory_place(sllm_memory *memory, uint64_t offset, int fd, uint64_t fd_offset,
                              uint64_t bytes, sllm_error *err)
{
    uint64_t page = page_bytes();
    uint64_t room = memory == NULL ? 0 : sllmi_align_up(memory->bytes, page);
    if (memory == NULL || memory->address != memory->mapping || bytes == 0 || offset > room ||
        bytes > room - offset || offset % page != 0 || fd_offset % page != 0) {
        return sllmi_fail(err, SLLM_E_INVALID, 0,
                          "sllm_memory_place: %llu bytes at %llu are no part of the memory",
                          (unsigned long long)bytes, (unsigned long long)offset);
    }
    int flags = MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED;
    char *place = memory->mapping + offset;
    /* In two steps, as in sllm_memory_map(): memory is counted when no mapping is in danger. */
    if (sllmi_sys.mmap(place, bytes, PROT_READ, flags, fd, (off_t)fd_offset) == MAP_FAILED ||
        (memory->writable && sllmi_sys.mprotect(place, bytes, PROT_READ | PROT_WRITE) != 0)) {
        int os_errno = errno;
        return sllmi_fail(err, SLLM_E_NOMEM, os_errno, "cannot map %llu bytes of a segment: %s",
                          (unsigned long long)bytes, strerror(os_errno));
    }
    return SLLM_OK;
}

void sllm_memory_destroy(sllm_memory *memory)
{
    if (memory != NULL) {
        sllmi_sys.munmap(memory->mapping, memory->mapping_bytes);
        free(memory);
    }
}
