/* One load: what its threads share. */
#ifndef SLLMI_JOB_H
#define SLLMI_JOB_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "io.h"
#include "plan.h"
#include "queue.h"
#include "registered.h"
#include "sllm.h"

#define SLLMI_MAX_THREADS 64u
#define SLLMI_MAX_DEVICES 64u
#define SLLMI_POLL_MS 100u /* how long a worker waits before it looks at `stop` again */

#define SLLMI_STARTING UINT64_MAX /* instead of a chunk: the device is being opened */

typedef struct sllmi_worker {
    sllm_job *job;
    pthread_t thread;
    uint32_t index;         /* of the reader, or of the device */
    _Atomic uint64_t chunk; /* the one that is read or copied, plus 1; 0: none */
} sllmi_worker;

struct sllm_job {
    pid_t pid;
    sllmi_plan plan;
    sllmi_source *sources;
    sllm_registered **registered; /* one a source; NULL: it is read into slots */
    uint32_t source_count;
    uint64_t chunk_bytes;
    uint32_t flags;
    uint32_t stall_ms;
    sllm_ring *ring;
    sllm_device **devices;
    uint32_t device_count;
    sllmi_queue *queues; /* one a device */
    sllmi_worker *readers;
    uint32_t reader_count;    /* threads asked for; after start, threads there are */
    sllmi_worker *copiers;    /* one a device */
    uint32_t started_copiers; /* threads to join */
    bool started;
    uint64_t start_ns;

    atomic_bool stop; /* set by the first failure, a cancel, or the end */
    _Atomic uint64_t next_chunk;
    _Atomic uint64_t bytes_disk, bytes_cache, bytes_done;
    _Atomic uint64_t chunks_done;
    _Atomic uint64_t moved_ns; /* when anything moved last */
    _Atomic uint64_t read_end_ns, copy_end_ns;
    atomic_uchar *done;       /* one a chunk */
    atomic_uint *copies_left; /* devices that still want a staged chunk */

    pthread_mutex_t lock;
    pthread_cond_t changed; /* a thread ended, or `failure` was set */
    uint32_t readers_running, copiers_running;
    sllm_error failure; /* the first; status SLLM_OK: none */
};

/* Of a job whose threads are gone, or that half came to be. */
void sllmi_job_free(sllm_job *job);
/* Record the first failure and stop everything. */
void sllmi_job_fail(sllm_job *job, const sllm_error *failure);

void *sllmi_reader_run(void *worker);
void *sllmi_copier_run(void *worker);

#endif
