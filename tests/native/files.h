/* Files with known bytes. */
#ifndef FILES_H
#define FILES_H

#include <stdint.h>

typedef struct test_file {
    int fd; /* read-only */
    char path[512];
    uint64_t bytes;
    uint64_t seed;
} test_file;

/* Write a file below check_directory; its bytes depend on `seed` and the offset alone. */
test_file file_make(const char *name, uint64_t bytes, uint64_t seed);
/* Close and remove it. */
void file_end(test_file *file);

/* Fails unless the memory holds [offset, offset + bytes) of a file with that seed. */
void file_check(uint64_t seed, uint64_t offset, const void *memory, uint64_t bytes);
/* The same as a question. */
int file_matches(uint64_t seed, uint64_t offset, const void *memory, uint64_t bytes);

/* How many descriptors this process has open. */
uint32_t open_descriptors(void);

#endif
