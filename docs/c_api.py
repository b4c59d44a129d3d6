"""`docs/reference/c-api.md` from `native/include/sllm.h`: its declarations and their comments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HEADER = Path(__file__).parents[1] / "native" / "include" / "sllm.h"
_ITEM = re.compile(
    r"/\* -{4} (?P<section>.*?) -+ \*/"
    r"|/\*\*?(?P<comment>.*?)\*/\n"
    r"|(?P<code>typedef (?:enum|struct) \w+ \{.*?\} \w+;|#define [^\n]+|[a-z][^;{]*;)",
    re.DOTALL,
)
_FUNCTION = re.compile(r"\b(sllm_\w+)\(")
_STATUS = re.compile(r"^\s*(SLLM_\w+) = (-?\d+),?\s*(?:/\* (.*?) \*/)?$", re.MULTILINE)
_NAMES = re.compile(r"(?:\w+, )*\w+")
_TAG = re.compile(r"^(?=@param|@return|Threads:)", re.MULTILINE)

EXAMPLE = """\
Every byte of a file into memory, in the shape of a complete program:

```c
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>

#include "sllm.h"

int main(int argc, char **argv)
{
    sllm_error error = {0};
    sllm_memory *memory = NULL;
    sllm_job *job = NULL;
    struct stat facts;
    int fd = argc > 1 ? open(argv[1], O_RDONLY) : -1;
    if (fd < 0 || fstat(fd, &facts) != 0) {
        return 2;
    }
    uint64_t bytes = (uint64_t)facts.st_size;
    sllm_status status = sllm_memory_create(bytes, 0, &memory, &error);
    if (status == SLLM_OK) {
        sllm_file file = {.fd = fd, .path = argv[1]};
        sllm_extent all = {.device = -1,
                           .bytes = bytes,
                           .target = (uint64_t)(uintptr_t)sllm_memory_address(memory)};
        status = sllm_job_create(&file, 1, &all, 1, NULL, &job, &error);
    }
    if (status == SLLM_OK) {
        status = sllm_job_start(job, &error);
    }
    sllm_progress progress = {0};
    while (status == SLLM_OK &&
           (status = sllm_job_wait(job, 200, &progress, &error)) == SLLM_E_BUSY) {
        status = SLLM_OK; /* the place to show progress, or to call sllm_job_cancel() */
    }
    if (status == SLLM_OK) {
        printf("%llu bytes, of which %llu from the page cache\\n",
               (unsigned long long)progress.bytes_done, (unsigned long long)progress.bytes_cache);
    } else {
        fprintf(stderr, "%s\\n", error.message);
    }
    if (sllm_job_close(job, 1000, NULL) == SLLM_OK) {
        sllm_memory_destroy(memory); /* else a thread may still write there */
    }
    return status == SLLM_OK ? 0 : 1;
}
```

```sh
cc -std=gnu11 -pthread -Inative/include example.c native/src/*.c -o example -ldl
```"""


class Item(NamedTuple):
    """A declaration of the interface, the comment before it, and the section that it is in."""

    section: str
    comment: str
    code: str

    @property
    def function(self) -> str | None:
        """The name of the function that this declares, if it is one."""
        found = None if self.code.startswith(("typedef", "#")) else _FUNCTION.search(self.code)
        return found[1] if found else None


def items() -> Iterator[Item]:
    """Everything between the marks of the interface, in order."""
    interface = HEADER.read_text().split("/* [cdef] */")[1]
    section = comment = ""
    for match in _ITEM.finditer(interface):
        if match["section"]:
            section, comment = match["section"].strip(), ""
        elif match["comment"]:
            comment = _plain(match["comment"])
        else:
            yield Item(section, comment, match["code"])
            comment = ""


def statuses() -> list[tuple[str, int, str]]:
    """Name, number and meaning of every status code."""
    (enum,) = (item.code for item in items() if item.code.startswith("typedef enum"))
    return [(name, int(number), text or "done") for name, number, text in _STATUS.findall(enum)]


def paragraphs() -> Iterator[str]:
    """The parts of the page, without its notice."""
    opening = re.match(r"/\*\*(.*?)\*/", HEADER.read_text(), re.DOTALL)
    assert opening is not None
    yield "# C library"
    yield (
        "`native/include/sllm.h` is the interface of the library under `sllmctl`; this page is "
        "made from that header. The Python package has the library compiled in. A C or C++ program "
        "compiles `native/src` along with its own files; it needs pthreads and dlopen, but neither "
        "CANN nor CUDA."
    )
    yield from map(_join, _plain(opening[1]).split("\n\n")[1:])
    yield (
        "Three backends are compiled in: `cpu`, `npu` and `cuda`. The last two look for their "
        "runtime library when a device is opened. Their tests run on emulated runtimes: nothing "
        "here has been measured on an NPU."
    )
    yield "## Example"
    yield EXAMPLE
    yield "## Status codes"
    rows = [f"| `{name}` | {number} | {text} |" for name, number, text in statuses()]
    yield "\n".join(["| status | number | meaning |", "| --- | ---: | --- |", *rows])
    section = ""
    bare: list[str] = []  # declarations that need no words: they share a block
    for item in items():
        if item.code.startswith("typedef enum"):
            continue
        if bare and (item.comment or item.section != section):
            yield _block(bare)
            bare = []
        if item.section != section:
            section = item.section
            yield f"## {section[0].upper()}{section[1:]}"
        if not item.comment:
            bare.append(item.code)
            continue
        if item.function is not None:
            yield f"### `{item.function}`"
        yield _block([item.code])
        yield from _comment(item.comment)
    if bare:
        yield _block(bare)


def _block(declarations: list[str]) -> str:
    return "\n".join(["```c", *declarations, "```"])


def _comment(comment: str) -> Iterator[str]:
    """A comment as prose, with its parameters as a list."""
    first, *tagged = _TAG.split(comment)
    yield from (_join(part) for part in first.strip().split("\n\n") if part)
    parameters = []
    for tag in tagged:
        kind, _, text = tag.strip().partition(" ")
        if kind == "@param":
            names = _NAMES.match(text)
            assert names is not None
            quoted = re.sub(r"\w+", r"`\g<0>`", names[0])
            parameters.append(f"- {quoted}: {_join(text[names.end() :])}")
        else:
            if parameters:
                yield "\n".join(parameters)
                parameters = []
            yield (
                f"**Returns** {_join(text)}" if kind == "@return" else f"**Threads:** {_join(text)}"
            )
    if parameters:
        yield "\n".join(parameters)


def _join(text: str) -> str:
    return " ".join(text.split())


def _plain(comment: str) -> str:
    """A comment's text without its stars."""
    lines = [re.sub(r"^\s*\* ?", "", line).rstrip() for line in comment.strip().splitlines()]
    return "\n".join(lines).strip()
