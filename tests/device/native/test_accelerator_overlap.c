/* Copies overlap reads: with a disk and a link that are both slow, a load takes as long as the
 * slower of them alone. The link's rate is the environment's: ACLEMU_H2D_MBPS. */
#define _GNU_SOURCE
#include <stdio.h>
#include <unistd.h>

#include "check.h"
#include "emulator.h"
#include "os.h"

#define CHUNK_BYTES (256u << 10)
#define CHUNKS 40u
#define ATTEMPTS 20

static uint64_t disk_bytes_s; /* 0: as fast as it is */

static ssize_t slow_pread(int fd, void *buffer, size_t bytes, off_t offset)
{
    uint64_t end = disk_bytes_s == 0 ? 0 : sllmi_now_ns() + bytes * 1000000000u / disk_bytes_s;
    ssize_t got = pread(fd, buffer, bytes, offset);
    uint64_t now = sllmi_now_ns();
    if (now < end) {
        sllmi_sleep_ns(end - now);
    }
    return got;
}

static void make_load(test_load *load, int32_t device)
{
    const uint64_t sizes[] = {CHUNKS * CHUNK_BYTES, 0};
    *load = load_of_files(sizes);
    load->options.chunk_bytes = CHUNK_BYTES;
    load->options.threads = 1;
    load->options.flags = SLLM_JOB_NO_DIRECT;
    if (device >= 0) {
        load_use_backend(load, backend(), &emulator_memory, 1, 4, CHUNK_BYTES);
    }
    load_add(load, 0, device, 0, CHUNKS * CHUNK_BYTES);
}

/* Load, and keep the shortest time in seconds that it took: other programs only make it longer. */
static void take_time(test_load *load, uint64_t rate, double *shortest)
{
    sllm_progress progress;
    sllm_error err;
    disk_bytes_s = rate;
    load_forget(load);
    uint64_t start = sllmi_now_ns();
    sllm_job *job = load_start(load);
    CHECK_OK(load_wait(job, &progress, &err), &err);
    double taken = (double)(sllmi_now_ns() - start) / 1e9;
    *shortest = taken < *shortest ? taken : *shortest;
    load_close(job);
    load_check(load);
}

TEST(a_load_takes_as_long_as_the_slower_of_disk_and_link)
{
    static const uint64_t rates[] = {48000000, 64000000, 96000000}; /* beside a link of 64 MB/s */
    test_load to_host, to_device;
    make_load(&to_host, -1);
    make_load(&to_device, 0);
    sllmi_sys.pread = slow_pread;
    for (int i = 0; i < 3; i++) {
        double disk = 60, link = 60, both = 60;
        bool overlap = false;
        for (int attempt = 0; attempt < ATTEMPTS && !overlap; attempt++) {
            take_time(&to_host, rates[i], &disk);
            take_time(&to_device, 0, &link);
            take_time(&to_device, rates[i], &both);
            double slower = disk > link ? disk : link;
            overlap = both <= 1.1 * slower && disk + link > 1.4 * slower;
        }
        if (!overlap) {
            check_failed(__FILE__, __LINE__, "%.3f s, and %.3f s for the disk alone, %.3f the link",
                         both, disk, link);
        }
    }
    sllmi_sys.pread = pread;
    load_end(&to_host);
    load_end(&to_device);
    emulator_check_empty();
}
