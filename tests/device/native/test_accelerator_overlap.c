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
#define ATTEMPTS 8 /* another program may have the processor */

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

static uint64_t nanoseconds(test_load *load, uint64_t rate)
{
    sllm_progress progress;
    sllm_error err;
    disk_bytes_s = rate;
    load_forget(load);
    uint64_t start = sllmi_now_ns();
    sllm_job *job = load_start(load);
    CHECK_OK(load_wait(job, &progress, &err), &err);
    uint64_t taken = sllmi_now_ns() - start;
    load_close(job);
    load_check(load);
    return taken;
}

TEST(a_load_takes_as_long_as_the_slower_of_disk_and_link)
{
    static const uint64_t rates[] = {48000000, 64000000, 96000000}; /* beside a link of 64 MB/s */
    test_load to_host, to_device;
    make_load(&to_host, -1);
    make_load(&to_device, 0);
    sllmi_sys.pread = slow_pread;
    for (int i = 0; i < 3; i++) {
        double ratio = 2;
        for (int attempt = 0; attempt < ATTEMPTS && ratio > 1.1; attempt++) {
            double disk = (double)nanoseconds(&to_host, rates[i]);
            double link = (double)nanoseconds(&to_device, 0);
            double both = (double)nanoseconds(&to_device, rates[i]);
            double slower = disk > link ? disk : link;
            ratio = both / slower < ratio ? both / slower : ratio;
            CHECK((disk + link) / slower > 1.5); /* else one of them was not slow at all */
        }
        if (ratio > 1.1) {
            check_failed(__FILE__, __LINE__, "%.2f times the slower stage", ratio);
        }
    }
    sllmi_sys.pread = pread;
    load_end(&to_host);
    load_end(&to_device);
    emulator_check_empty();
}
