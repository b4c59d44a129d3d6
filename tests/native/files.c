#define _GNU_SOURCE
#include "files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"

static uint64_t word_at(uint64_t seed, uint64_t index)
{
    uint64_t z = (index + 1) * 0x9E3779B97F4A7C15u ^ seed * 0xD1B54A32D192ED03u;
    z = (z ^ (z >> 29)) * 0xBF58476D1CE4E5B9u;
    return z ^ (z >> 32);
}

static void fill(uint64_t seed, uint64_t offset, unsigned char *memory, uint64_t bytes)
{
    for (uint64_t done = 0; done < bytes;) {
        uint64_t word = word_at(seed, (offset + done) / 8);
        uint64_t skip = (offset + done) % 8;
        uint64_t part = 8 - skip < bytes - done ? 8 - skip : bytes - done;
        memcpy(memory + done, (const unsigned char *)&word + skip, part);
        done += part;
    }
}

test_file file_make(const char *name, uint64_t bytes, uint64_t seed)
{
    test_file file = {.bytes = bytes, .seed = seed};
    (void)snprintf(file.path, sizeof file.path, "%s/%s", check_directory, name);
    int fd = open(file.path, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
    if (fd < 0) {
        check_failed(__FILE__, __LINE__, "cannot make `%s`: %s", file.path, strerror(errno));
    }
    enum { STEP = 1 << 18 };
    static unsigned char buffer[STEP];
    for (uint64_t done = 0; done < bytes;) {
        uint64_t part = bytes - done < STEP ? bytes - done : STEP;
        fill(seed, done, buffer, part);
        CHECK_U64(pwrite(fd, buffer, part, (off_t)done), part);
        done += part;
    }
    close(fd);
    file.fd = open(file.path, O_RDONLY | O_CLOEXEC);
    CHECK(file.fd >= 0);
    return file;
}

void file_end(test_file *file)
{
    close(file->fd);
    unlink(file->path);
    file->fd = -1;
}

int file_matches(uint64_t seed, uint64_t offset, const void *memory, uint64_t bytes)
{
    unsigned char expected[4096];
    for (uint64_t done = 0; done < bytes;) {
        uint64_t part = bytes - done < sizeof expected ? bytes - done : sizeof expected;
        fill(seed, offset + done, expected, part);
        if (memcmp((const char *)memory + done, expected, part) != 0) {
            return 0;
        }
        done += part;
    }
    return 1;
}

void file_check(uint64_t seed, uint64_t offset, const void *memory, uint64_t bytes)
{
    if (file_matches(seed, offset, memory, bytes)) {
        return;
    }
    for (uint64_t i = 0; i < bytes; i++) {
        if (!file_matches(seed, offset + i, (const char *)memory + i, 1)) {
            check_failed(__FILE__, __LINE__, "wrong byte at %llu of the range at %llu (%llu bytes)",
                         (unsigned long long)i, (unsigned long long)offset,
                         (unsigned long long)bytes);
        }
    }
}

uint32_t open_descriptors(void)
{
    uint32_t count = 0;
    DIR *directory = opendir("/proc/self/fd");
    CHECK(directory != NULL);
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;) {
        count += entry->d_name[0] != '.';
    }
    closedir(directory);
    return count - 1; /* the directory's own */
}
