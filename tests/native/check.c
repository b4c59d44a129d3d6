#define _GNU_SOURCE
#include "check.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_TESTS 64
#define TIME_LIMIT_S 300u

const char *check_directory;

static struct {
    const char *name;
    void (*run)(void);
} tests[MAX_TESTS];
static int test_count;
static const char *running = "nothing";
static uint64_t seed = 1;
static jmp_buf skipped;

void check_register(const char *name, void (*run)(void))
{
    if (test_count == MAX_TESTS) {
        abort();
    }
    tests[test_count].name = name;
    tests[test_count++].run = run;
}

void check_failed(const char *file, int line, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    (void)fprintf(stderr, "FAILED %s (seed %llu)\n  %s:%d: ", running, (unsigned long long)seed,
                  file, line);
    (void)vfprintf(stderr, format, args);
    (void)fputc('\n', stderr);
    va_end(args);
    _exit(1); /* threads may hang: no exit handler could be waited for */
}

void check_skip(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    (void)printf("skipped %s: ", running);
    (void)vprintf(format, args);
    (void)putchar('\n');
    va_end(args);
    longjmp(skipped, 1);
}

void check_text(const char *file, int line, const char *text, const char *part)
{
    if (strstr(text, part) == NULL) {
        check_failed(file, line, "`%s` does not hold `%s`", text, part);
    }
}

void check_status(const char *file, int line, sllm_status status, const sllm_error *err,
                  sllm_status expected)
{
    if (status != expected) {
        check_failed(file, line, "%s, not %s: %s", sllm_status_name(status),
                     sllm_status_name(expected), err == NULL ? "" : err->message);
    }
    if (status == SLLM_OK || err == NULL) {
        return;
    }
    if (err->status != (int32_t)status) {
        check_failed(file, line, "returned %s, and the error says %s", sllm_status_name(status),
                     sllm_status_name(err->status));
    }
    if (err->message[0] == '\0' || strpbrk(err->message, "\n\r\x1b") != NULL ||
        memchr(err->message, '\0', sizeof err->message) == NULL) {
        check_failed(file, line, "the message is not one line: `%s`", err->message);
    }
}

static uint64_t number_from_environment(const char *name, uint64_t fallback)
{
    const char *text = getenv(name);
    return text == NULL || *text == '\0' ? fallback : strtoull(text, NULL, 0);
}

check_random check_random_start(uint64_t stream)
{
    return (check_random){.state = seed * 0x9E3779B97F4A7C15u ^ (stream + 1) << 17};
}

uint64_t check_random_next(check_random *random)
{
    /* splitmix64. Source: prng.di.unimi.it. */
    uint64_t z = random->state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

uint64_t check_random_below(check_random *random, uint64_t limit)
{
    return limit == 0 ? 0 : check_random_next(random) % limit;
}

uint64_t check_rounds(uint64_t count)
{
    return count * number_from_environment("SLLM_TEST_ROUNDS", 1);
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        (void)fprintf(stderr, "usage: %s DIRECTORY [PART OF A TEST'S NAME]\n", argv[0]);
        return 2;
    }
    check_directory = argv[1];
    seed = number_from_environment("SLLM_TEST_SEED", 1);
    (void)setvbuf(stdout, NULL, _IOLBF, 0);
    alarm((unsigned)(TIME_LIMIT_S * check_rounds(1))); /* a hang is a failure */
    for (int i = 0; i < test_count; i++) {
        if (argc > 2 && strstr(tests[i].name, argv[2]) == NULL) {
            continue;
        }
        running = tests[i].name;
        if (setjmp(skipped) == 0) {
            tests[i].run();
            (void)printf("ok %s\n", running);
        }
    }
    return 0;
}
