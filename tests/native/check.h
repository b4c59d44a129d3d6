/* A test harness: a program is its TESTs; the first CHECK that fails ends it with status 1.
 *
 * PROGRAM DIRECTORY [PART]: run all tests, or those whose name holds PART, with files below
 * DIRECTORY. SLLM_TEST_SEED (a number) gives other random cases, SLLM_TEST_ROUNDS more of them. */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>
#include <stdint.h>

#include "sllm.h"

extern const char *check_directory;

void check_register(const char *name, void (*run)(void));
void check_failed(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4), noreturn));
/* End this test here, and say why it cannot tell anything on this machine. */
void check_skip(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

#define TEST(sentence)                                                                             \
    static void sentence(void);                                                                    \
    __attribute__((constructor)) static void register_##sentence(void)                             \
    {                                                                                              \
        check_register(#sentence, sentence);                                                       \
    }                                                                                              \
    static void sentence(void)

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            check_failed(__FILE__, __LINE__, "%s", #condition);                                    \
        }                                                                                          \
    } while (0)

#define CHECK_U64(actual, expected)                                                                \
    do {                                                                                           \
        uint64_t actual_ = (uint64_t)(actual), expected_ = (uint64_t)(expected);                   \
        if (actual_ != expected_) {                                                                \
            check_failed(__FILE__, __LINE__, "%s is %llu, not %llu", #actual,                      \
                         (unsigned long long)actual_, (unsigned long long)expected_);              \
        }                                                                                          \
    } while (0)

#define CHECK_TEXT(text, part) check_text(__FILE__, __LINE__, (text), (part))

/* A status, and that `err` agrees with it: one line of text for a failure. */
#define CHECK_STATUS(status, err, expected)                                                        \
    check_status(__FILE__, __LINE__, (status), (err), (expected))
#define CHECK_OK(status, err) CHECK_STATUS((status), (err), SLLM_OK)

void check_text(const char *file, int line, const char *text, const char *part);
void check_status(const char *file, int line, sllm_status status, const sllm_error *err,
                  sllm_status expected);

/* A pseudo-random sequence, the same in every run with one seed. */
typedef struct check_random {
    uint64_t state;
} check_random;

check_random check_random_start(uint64_t stream);
uint64_t check_random_next(check_random *random);
uint64_t check_random_below(check_random *random, uint64_t limit);

/* `count`, times SLLM_TEST_ROUNDS. */
uint64_t check_rounds(uint64_t count);

#endif
