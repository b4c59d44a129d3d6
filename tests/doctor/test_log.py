"""Lines of error logs, as people find them, lead to their causes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from sllmctl.doctor.log_signatures import LINE_CHARS, _prepared, lines_of, read_log
from sllmctl.doctor.tables import load_tables
from tests.doctor.conftest import Doctor

TABLES = load_tables()
LINES = {
    "L01": "OSError: libatb.so: cannot open shared object file: No such file or directory",
    "L02": "ImportError: x.so: undefined symbol: _ZN3atb15CreateOperationINS_5infer",
    "L03": "libtbe_adapter.so: undefined symbol: _ZN3Mki2DlC1ERKNSt7__cxx1112basic_string",
    "L04": "ImportError: /x/libtorch_npu.so: undefined symbol: _ZN3c1010ValueErrorC1E",
    "L05": "ImportError: libascend_hal.so: cannot open shared object file: No such file",
    "L06": "ImportError: libhccl.so: cannot open shared object file. Please run 'source'",
    "L07": "RuntimeError: Failed to load the backend extension: torch_npu. You can disable",
    "L08": "RuntimeError: Failed to infer device type",
    "L09": "dcmi model initialized failed, because the device is used. ret is -8020",
    "L10": "dcmi module initialize failed. ret is -8005",
    "L11": "RuntimeError: aclInit failed, error code is 507899",
    "L12": "EE9999: E30006 Failed to verify the OPP",
    "L13": "AclSetCompileopt(aclCompileOpt::ACL_PRECISION_MODE) error code is 500001",
    "L14": "ModuleNotFoundError: No module named 'tbe.common'",
    "L15": "call aclnnAdd failed, error code 561103",
    "L16": "EZ9999: Parse dynamic kernel config fail",
    "L17": "ASCEND_RT_VISIBLE_DEVICES:4 error, input data rang[0-2)",
    "L18": "rtSetDevice failed, retCode=107001",
    "L19": "[ERROR]: stub library cannot be used for execution, please check",
    "L20": "F0609 aclrtMallocHost failed: 207001",
    "L21": "open() failed for /m/tensor.data_0, errno: 22, error: Invalid argument",
    "L22": "PinnedMemoryPool size not multiple of chunk_size",
    "L23": "ERROR: No matching distribution found for torch-npu==2.4.0.post2.",
    "L24": "/lib/libstdc++.so.6: version `GLIBCXX_3.4.30' not found (required by x)",
    "L25": "/lib/libc.so.6: version `GLIBC_2.32' not found",
    "L26": "libgomp.so.1: cannot allocate memory in static TLS block",
    "L27": "OSError: /p/sllm_store/libglog.so: cannot open shared object file",
    "L28": "status = StatusCode.UNAVAILABLE failed to connect to all addresses",
    "L29": "A module that was compiled using NumPy 1.x cannot be run in NumPy 2.1.0",
    "L30": "ImportError: cannot import name 'Language' from 'triton.backends.compiler'",
    "L31": "EJ0003: Failed to bind the IP port. Reason: The IP address and port have been bound",
    "L32": "Bus error (core dumped)",
    "L33": "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name'",
    "L34": "HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded",
    "L35": "packaging.version.InvalidVersion: Invalid version: 'dev'",
    "L36": "libtorch_npu.so not found. Ensure torch_npu is installed.",
    "L37": "[WARNING] CANN requested but not available, falling back...",
    "L38": "ModuleNotFoundError: No module named 'deep_ep_cpp'",
    "L39": "OSError: libvllm_ascend_kernels.so: cannot open shared object file",
    "L40": "[WARNING]The driver package may not be completely installed, which may cause",
    "L41": "halHostRegister failed, ret 65534",
    "L42": "Check owner failed, please check env ASCEND_HOME_PATH is set.",
    "L46": "The model `Qwen3-8B` does not exist.",
    "L47": "requests: [Errno 111] Connection refused to localhost:3000",
    "L48": "EE9999 error code 207008 stream resources insufficient",
    "L49": "ImportError: libtorch_npu.so: cannot open shared object file: No such file",
    "L50": "ModuleNotFoundError: No module named 'torch_npu'",
    "L51": "ModuleNotFoundError: No module named 'attr'",
    "L52": "AttributeError: module 'torch_npu' has no attribute 'npu_rope'",
    "L53": "open /dev/davinci0: Permission denied",
    "L54": "RuntimeError: npu:0 error code is 507008",
    "L55": "bash: npu-smi: command not found",
    "L56": "ImportError: libascend_transport.so: cannot open shared object file",
    "L57": "ERROR: ResolutionImpossible: for help visit https://pip.pypa.io",
    "L58": "Unsupported soc_version: 104",
    "L59": "ValueError: 'serverless_llm' is not a valid LoadFormat",
}


def test_every_signature_has_a_line() -> None:
    assert set(LINES) == {signature.id for signature in TABLES.signatures}


@pytest.mark.parametrize("name", LINES)
def test_a_known_line_leads_to_its_cause(name: str) -> None:
    assert [match.id for match in read_log([LINES[name]], TABLES)] == [name]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("AttributeError: `np.float_` was removed in the NumPy 2.0 release.", "L29"),
        ("drv: Resource_Busy(EL0005)", "L11"),
        ("RuntimeError: 0 active drivers ([]). There should only be one.", "L30"),
        ("OSError: [Errno 28] No space left on device: '/dev/shm/psm_1'", "L32"),
        ("openai.APIConnectionError: Connect error: connection refused", "L47"),
        ("aclInit failed: 507899", "L11"),
        ("aclnnAdd: kernel not found, 561103", "L15"),
        ("E aclrtMallocHost 64 MiB, 207001", "L20"),
        ("vllm: error: argument --load-format: invalid choice: 'serverless_llm'", "L59"),
        ("PermissionError: [Errno 13] Permission denied: '/dev/davinci_manager'", "L53"),
        ("x.whl is not a supported wheel on this platform.", "L25"),
        ("CANN toolkit not found at /usr/local/Ascend", "L36"),
        ("ERROR: Could not find a version that satisfies the requirement torch-npu==9", "L23"),
    ],
)
def test_other_wordings_are_known_too(line: str, name: str) -> None:
    assert [match.id for match in read_log([line], TABLES)] == [name]


@pytest.mark.parametrize(
    "line",
    [
        "allocated 207001 bytes for pid 561103",
        "INFO: loaded 507899 tensors, 500001 of them small",
        "The current CANN and HDK(driver) versions require processing for 32 padding size",
        "GET /v1/models HTTP/1.1 200 OK",
        "INFO 11-22 worker.py] model loaded in 3.2 s",
    ],
)
def test_numbers_and_harmless_lines_are_no_errors(line: str) -> None:
    assert read_log([line], TABLES) == []


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (r"soc\W{1,4}104\b", "soc: 104"), (r"a.{0,40}bcd", "a..bcd"), (r"x{2,3}y", "xxxy"),
        (r"[ab]{2}c", "abc"), (r"(ab){2}c", "ababc"), (r"ab?c*de+f", "adeef"), (r"a\{2\}", "a{2}"),
    ],
)  # fmt: skip
def test_what_a_line_must_hold_is_no_more_than_its_pattern_asks(pattern: str, line: str) -> None:
    words, whole = _prepared(pattern)
    assert whole.search(line)
    assert any(word in line for word in words)


def test_a_signature_is_told_once_with_its_count() -> None:
    (match,) = read_log([LINES["L32"], "x", LINES["L32"]], TABLES)
    assert (match.line_number, match.count) == (1, 2)


def test_err99999_points_to_the_exception_before_it() -> None:
    log = [
        "Traceback (most recent call last):",
        '  File "x.py", line 1, in <module>',
        "ValueError: something of my own",
        "[ERROR] 2025-06-09-23:13:26 (PID:1, Device:-1, RankID:-1) ERR99999 UNKNOWN applicaiton",
    ]
    (match,) = read_log(log, TABLES)
    assert (match.line_number, match.line) == (3, "ValueError: something of my own")


def test_the_trailer_of_torch_npu_is_decoded() -> None:
    (match,) = read_log(["[ERROR] 2025 (PID:1, Device:0, RankID:0) ERR02200 DIST call"], TABLES)
    assert str(match.cause) == "torch_npu (DIST): a call of the HCCL API failed"


GUIDE = """Traceback (most recent call last):
  File "/root/ServerlessLLM/sllm_store/sllm_store/server.py", line 13, in <module>
    ctypes.CDLL(os.path.join(sllm_store.__path__[0], "libglog.so"))
OSError: /root/ServerlessLLM/sllm_store/sllm_store/libglog.so: cannot open shared object file
[ERROR] 2025-06-09-23:13:26 (PID:2197687, Device:-1, RankID:-1) ERR99999 UNKNOWN applicaiton
"""


def test_the_command_explains_a_log_from_a_file_or_a_pipe(doctor: Doctor, tmp_path: Path) -> None:
    path = tmp_path / "error.log"
    path.write_text(GUIDE)
    done = doctor("--log", path)
    assert done.exit_code == 3
    assert "libglog.so does not lie beside sllm_store" in done.stdout
    assert "line 4: OSError" in done.stdout
    assert "ERR99999" not in done.stdout
    document = json.loads(doctor("--log", "-", "--json", text=GUIDE).stdout)
    assert document["schema"] == "sllmctl.doctor-log/1"
    assert [match["id"] for match in document["matches"]] == ["L27"]
    assert [check["id"] for check in document["checks"]] == ["STORE002"]


def test_an_unknown_log_says_so(doctor: Doctor) -> None:
    done = doctor("--log", "-", text="all is well\n")
    assert done.exit_code == 0
    assert done.stdout == "No line of this log is known.\n"


def test_a_line_without_an_end_takes_no_memory() -> None:
    class Endless(io.StringIO):
        asked: ClassVar[list[int]] = []

        def readline(self, size: int | None = -1) -> str:
            self.asked.append(-1 if size is None else size)
            return "x" * LINE_CHARS if len(self.asked) < 100 else ""

    assert [len(line) for line in lines_of(Endless())] == [LINE_CHARS]
    assert set(Endless.asked) == {LINE_CHARS}


def test_a_long_line_counts_as_one() -> None:
    log = io.StringIO("x" * 3 * LINE_CHARS + "\n" + LINES["L32"] + "\n")
    assert [match.line_number for match in read_log(lines_of(log), TABLES)] == [2]


def test_a_pipe_may_carry_any_bytes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sllmctl", "doctor", "--log", "-", "--json", "--no-exec"],
        input=b"\xff\xfe\0\n" + LINES["L32"].encode(), capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert [match["line_number"] for match in json.loads(done.stdout)["matches"]] == [2]
