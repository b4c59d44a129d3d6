/* Rounding to powers of two. */
#ifndef SLLMI_ALIGN_H
#define SLLMI_ALIGN_H

#include <stdint.h>

static inline uint64_t sllmi_align_down(uint64_t value, uint64_t power)
{
    return value & ~(power - 1);
}

static inline uint64_t sllmi_align_up(uint64_t value, uint64_t power)
{
    return (value + power - 1) & ~(power - 1);
}

static inline uint64_t sllmi_min(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline uint64_t sllmi_max(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

#endif
