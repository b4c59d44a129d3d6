/* Rounding, errors and names. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "align.h"
#include "check.h"
#include "device.h"
#include "error.h"

TEST(rounding_goes_to_the_next_multiple_and_leaves_multiples_alone)
{
    check_random random = check_random_start(0);
    for (int i = 0; i < 10000; i++) {
        uint64_t power = 1ull << check_random_below(&random, 40);
        uint64_t value = check_random_next(&random) >> 2;
        uint64_t down = sllmi_align_down(value, power), up = sllmi_align_up(value, power);
        CHECK(down <= value && value - down < power && down % power == 0);
        CHECK(up >= value && up - value < power && up % power == 0);
        CHECK_U64(sllmi_align_up(down, power), down);
        CHECK_U64(sllmi_min(down, up), down);
        CHECK_U64(sllmi_max(down, up), up);
    }
}

TEST(every_status_has_its_own_name)
{
    for (int status = SLLM_OK; status >= SLLM_E_BUSY; status--) {
        const char *name = sllm_status_name(status);
        CHECK(strncmp(name, status == SLLM_OK ? "SLLM_OK" : "SLLM_E_", 7) == 0);
        CHECK(strcmp(name, "SLLM_E_?") != 0);
        for (int other = SLLM_OK; other > status; other--) {
            CHECK(strcmp(name, sllm_status_name(other)) != 0);
        }
    }
    CHECK(strcmp(sllm_status_name(SLLM_E_BUSY - 1), "SLLM_E_?") == 0);
    CHECK(strcmp(sllm_status_name(1), "SLLM_E_?") == 0);
    CHECK(strcmp(sllm_status_name(INT32_MIN), "SLLM_E_?") == 0);
}

TEST(the_library_is_of_the_version_of_its_header)
{
    CHECK_U64(sllm_abi_version(), SLLM_ABI_VERSION);
}

TEST(a_failure_fills_every_field_and_keeps_errno)
{
    sllm_error err;
    memset(&err, 0x5a, sizeof err);
    errno = ENOENT;
    sllm_status status = sllmi_fail(&err, SLLM_E_IO, EIO, "cannot read `%s` at byte %d", "x", 7);
    CHECK_STATUS(status, &err, SLLM_E_IO);
    CHECK_U64(errno, ENOENT);
    CHECK_U64(err.os_errno, EIO);
    CHECK_U64(err.device_code, 0);
    CHECK(strcmp(err.message, "cannot read `x` at byte 7") == 0);
    status = sllmi_fail_device(&err, SLLM_E_DEVICE, 507018, "stream %d", 3);
    CHECK_STATUS(status, &err, SLLM_E_DEVICE);
    CHECK_U64(err.os_errno, 0);
    CHECK_U64(err.device_code, 507018);
}

TEST(nobody_need_listen_to_an_error)
{
    CHECK_U64(sllmi_fail(NULL, SLLM_E_IO, EIO, "%s", "x"), SLLM_E_IO);
    CHECK_U64(sllmi_fail_device(NULL, SLLM_E_DEVICE, 1, "%s", "x"), SLLM_E_DEVICE);
}

TEST(control_characters_of_a_hostile_name_do_not_reach_the_terminal)
{
    char name[256];
    for (int i = 0; i < 255; i++) {
        name[i] = (char)(i + 1);
    }
    name[255] = '\0';
    sllm_error err;
    sllmi_fail(&err, SLLM_E_IO, EIO, "%s", name);
    CHECK_U64(strlen(err.message), 255);
    for (int i = 0; i < 255; i++) {
        unsigned char before = (unsigned char)(i + 1), after = (unsigned char)err.message[i];
        CHECK(before < 0x20 || before == 0x7f ? after == '?' : after == before);
    }
}

TEST(the_c1_controls_of_a_hostile_name_do_not_reach_the_terminal_either)
{
    sllm_error err;
    /* U+009B starts an escape sequence on some terminals; U+00E9 is a letter. */
    sllmi_fail(&err, SLLM_E_IO, EIO, "%s",
               "a\xc2\x9b"
               "31mb caf\xc3\xa9 \xe4\xbd\xa0");
    CHECK(strcmp(err.message, "a??31mb caf\xc3\xa9 \xe4\xbd\xa0") == 0);
}

TEST(a_long_name_keeps_its_place_and_its_reason_in_the_message)
{
    char name[4096];
    memset(name, 'd', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    memcpy(name + sizeof name - 6, "shard", 5);
    sllm_error err;
    sllmi_fail(&err, SLLM_E_IO, EIO, "cannot read `%s` at byte %llu: %s", name, 4294967296ull,
               "EIO");
    CHECK_STATUS(err.status, &err, SLLM_E_IO);
    CHECK_U64(strlen(err.message), sizeof err.message - 1);
    CHECK_TEXT(err.message, "cannot read `ddd");
    CHECK_TEXT(err.message, "ddd...ddd");
    CHECK_TEXT(err.message, "shard` at byte 4294967296: EIO");
}

TEST(system_errors_have_their_symbols)
{
    CHECK(strcmp(sllmi_errno_name(EIO), "EIO") == 0);
    CHECK(strcmp(sllmi_errno_name(ENOMEM), "ENOMEM") == 0);
    CHECK(strcmp(sllmi_errno_name(EMFILE), "EMFILE") == 0);
    CHECK(strcmp(sllmi_errno_name(123456), "system error") == 0);
}

TEST(backends_are_listed_and_looked_up_by_name)
{
    sllm_error err;
    sllm_device *device = NULL;
    CHECK(strcmp(sllm_backend_name(0), "cpu") == 0);
    uint32_t count = 0;
    while (sllm_backend_name(count) != NULL) {
        count++;
    }
    CHECK(sllm_backend_name(count + 1) == NULL);
    CHECK_OK(sllm_device_open("cpu", 0, &device, &err), &err);
    sllm_device_close(device);
    sllm_device_close(NULL);
    CHECK_STATUS(sllm_device_open("cpu", 1, &device, &err), &err, SLLM_E_NO_DEVICE);
    CHECK_TEXT(err.message, "cpu:1");
    CHECK(device == NULL);
    CHECK_STATUS(sllm_device_open("cpu", -1, &device, &err), &err, SLLM_E_NO_DEVICE);
    CHECK_STATUS(sllm_device_open("tpu", 0, &device, &err), &err, SLLM_E_NO_DEVICE);
    CHECK_TEXT(err.message, "tpu");
    CHECK_STATUS(sllm_device_open(NULL, 0, &device, &err), &err, SLLM_E_INVALID);
    CHECK_STATUS(sllm_device_open("cpu", 0, NULL, &err), &err, SLLM_E_INVALID);
}
