"""`sllmctl doctor` as a person, a script and a JSON reader see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import resources
from pathlib import Path

import pytest

from sllmctl.doctor.check import CHECKS
from sllmctl.doctor.document import SCHEMA
from sllmctl.errors import ConfigError
from tests.doctor.conftest import Doctor, update_golden

Make = Callable[[str], Path]
GOLDEN = Path(__file__).parent / "golden"
BROKEN = "guide 1, with vLLM installed"


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize(
    ("name", "scenario", "code"),
    [
        ("healthy", "healthy 8.1.RC1", 0),
        ("broken", BROKEN, 3),
        ("stubs", "guide 2: torch_npu 2.6.0.post3 on CANN 8.2.RC1, a stub first", 3),
        ("nothing", "no Ascend at all", 0),
    ],
)
def test_transcripts(
    doctor: Doctor, machine: Make, name: str, scenario: str, code: int, lang: str
) -> None:
    done = doctor("--root", machine(scenario), "--lang", lang)
    assert done.exit_code == code, done.output
    golden = GOLDEN / f"{name}.{lang}.txt"
    if update_golden():
        golden.write_text(done.stdout, encoding="utf-8")
    assert done.stdout == golden.read_text(encoding="utf-8")


def test_json_lists_every_check_and_says_why_one_was_left_out(
    doctor: Doctor, machine: Make
) -> None:
    done = doctor("--root", machine(BROKEN), "--json")
    document = json.loads(done.stdout)
    assert document["schema"] == SCHEMA
    assert document["exit_code"] == done.exit_code == 3
    assert [check["id"] for check in document["checks"]] == list(CHECKS)
    by_id = {check["id"]: check for check in document["checks"]}
    assert by_id["STORE001"]["skipped_because"] == "not part of the profile base, vllm"
    assert by_id["NNAL002"]["status"] == "fail"
    assert by_id["NNAL002"]["fix"]["command"].startswith("./Ascend-cann-nnal_8.0.0_linux-aarch64")
    assert sum(document["summary"].values()) == len(CHECKS)
    assert document["facts"]["cann"][0]["version"] == "8.0.0"
    rows = [row["row"] for row in document["advice"]]
    assert rows == ["vllm-ascend 0.7.3.post1", "vllm-ascend 0.8.4rc2"]


def test_only_and_skip_take_ids_and_their_beginnings(doctor: Doctor, machine: Make) -> None:
    root = machine(BROKEN)
    document = json.loads(doctor("--root", root, "--only", "NNAL,py00", "--json").stdout)
    ran = [check["id"] for check in document["checks"] if check["status"] != "skip"]
    assert {check[:4] for check in ran} == {"NNAL", "PY00"}
    done = doctor("--root", root, "--skip", "NNAL002,VLLM002")
    assert done.exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "NOPE"], ["--skip", "XYZ"], ["--explain", "NNAL"], ["--profile", "gpu"],
        ["--lang", "fr"], ["--root", "/nonexistent"],
        ["--root", "/usr"],
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_exit_2(doctor: Doctor, arguments: list[str]) -> None:
    assert doctor(*arguments).exit_code == 2


def test_strict_counts_warnings(doctor: Doctor, machine: Make) -> None:
    root = machine("a flood of logs")
    assert doctor("--root", root).exit_code == 0
    strict = doctor("--root", root, "--strict", "--quiet")
    assert (strict.exit_code, strict.stdout) == (3, "failed\n")


def test_list_and_explain(doctor: Doctor) -> None:
    listed = doctor("--list").stdout
    assert all(f"  {check} " in listed for check in CHECKS)
    done = doctor("--explain", "nnal002", "--lang", "zh")
    assert done.exit_code == 0
    assert "NNAL/ATB 与 CANN 同版本" in done.stdout


def test_a_part_of_the_checks_is_no_verdict_on_the_machine(doctor: Doctor, machine: Make) -> None:
    root = machine("nothing sourced")
    assert "What was checked is in order.\n" in doctor("--root", root, "--only", "PY005").stdout
    assert "Nothing was checked.\n" in doctor("--root", root, "--only", "HUB003").stdout


def test_what_was_not_checked_is_named_exactly(doctor: Doctor, machine: Make) -> None:
    text = doctor("--root", machine("a container without anything"), "--profile", "base").stdout
    assert "  DRV003 DRV009 DRV010 DRV012: needs DRV002\n" in text
    assert "  SVC001 ... SVC006: " in text
    first = text.partition("Do this first:\n")[2].splitlines()[0]
    assert "--device /dev/davinci0" in first and "-v /usr/local/bin/npu-smi" in first


def test_no_exec_runs_no_command(doctor: Doctor, machine: Make) -> None:
    document = json.loads(doctor("--root", machine("npu-smi hangs"), "--no-exec", "--json").stdout)
    by_id = {check["id"]: check for check in document["checks"]}
    assert by_id["DRV009"]["skipped_because"] == "needs commands, which --no-exec forbids"
    assert by_id["DEEP001"]["skipped_because"] == "touches devices: only with --deep"


def test_a_check_that_breaks_is_an_error_and_no_traceback(
    doctor: Doctor, machine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(machine: object) -> None:
        raise ZeroDivisionError("oh")

    from dataclasses import replace

    monkeypatch.setitem(CHECKS, "ENV005", replace(CHECKS["ENV005"], run=broken))
    done = doctor("--root", machine("healthy 8.1.RC1"))
    assert done.exit_code == 70
    assert "the check itself failed: ZeroDivisionError: oh" in done.stdout


def test_two_machines_side_by_side(doctor: Doctor, machine: Make, tmp_path: Path) -> None:
    root = machine("healthy 8.1.RC1")
    other = tmp_path / "other.json"
    other.write_text(doctor("--root", root, "--json").stdout)
    same = doctor("--root", root, "--compare", other)
    assert (same.exit_code, same.stdout) == (0, "both machines are alike\n")
    info = root / "usr/local/Ascend/driver/version.info"
    info.write_text(info.read_text().replace("Version=25.0.rc1.1", "Version=25.0.rc1.2"))
    done = doctor("--root", root, "--compare", other)
    assert done.exit_code == 3
    assert "driver  25.0.rc1.2  25.0.rc1.1" in done.stdout


def test_a_report_is_written_for_pasting(doctor: Doctor, machine: Make, tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    done = doctor("--root", machine(BROKEN), "--report", path)
    assert done.exit_code == 3
    text = path.read_text()
    assert "| NNAL002 | fail | NNAL 8.1.RC1 does not belong to CANN 8.0.0 |" in text
    assert "read it before you send it" in done.stderr


def test_this_machine_is_looked_at_in_a_second_and_without_torch() -> None:
    """Imports are what takes time: none of a library that a check only looks for."""
    script = (
        "import sys\n"
        "from sllmctl.cli import app\n"
        "try:\n    app(['doctor', '--json'])\n"
        "finally:\n    print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env={**os.environ, "LANG": "C.UTF-8"},
    )  # fmt: skip
    assert json.loads(done.stdout)["schema"] == SCHEMA
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert not loaded & {"torch", "torch_npu", "numpy", "transformers", "huggingface_hub"}


class _Models(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "autodl-tmp/Qwen/Qwen3-8B"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_real_server_is_asked_past_every_proxy(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with HTTPServer(("127.0.0.1", 0), _Models) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        done = doctor("--only", "SRV", "--base-url", url, "--served-model", "Qwen3-8B")
        server.shutdown()
        thread.join()
    assert done.exit_code == 3
    assert "the server has no model Qwen3-8B; it has autodl-tmp/Qwen/Qwen3-8B" in done.stdout
    closed = doctor("--only", "SRV001", "--base-url", url)
    assert closed.exit_code == 3


def test_no_byte_of_the_environment_ends_the_command() -> None:
    """Bytes that are no text, escape sequences, and a terminal that knows ASCII alone."""
    env = {
        **{os.fsencode(k): os.fsencode(v) for k, v in os.environ.items()},
        b"LD_PRELOAD": b"/opt/\xff\x1b[31m.so",
        b"PYTHONIOENCODING": b"ascii",
        b"LANG": b"zh_CN.UTF-8",
    }
    for arguments in ([], ["--lang", "zh", "-v"], ["--json"], ["--report", "-"]):
        done = subprocess.run(
            [sys.executable, "-m", "sllmctl", "doctor", "--only", "ENV", *arguments],
            capture_output=True, env=env, check=False,
        )  # fmt: skip
        assert done.returncode in (0, 3), done.stderr
        assert b"\x1b" not in done.stdout
        assert b"ENV010" in done.stdout


@pytest.mark.parametrize(("value", "found"), [(None, "pass"), ("0", "info"), ("1", "pass")])
def test_what_the_command_sets_for_itself_is_no_finding(value: str | None, found: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    if value is not None:
        env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = value
    done = subprocess.run(
        [sys.executable, "-m", "sllmctl", "doctor", "--only", "ENV009", "--json"],
        capture_output=True, env=env, check=True,
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert [c["status"] for c in document["checks"] if c["id"] == "ENV009"] == [found]
    seen = {e["name"]: e["value"] for e in document["facts"]["environment"]}
    assert seen.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == value


def test_a_terminal_without_chinese_gets_english() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sllmctl", "doctor", "--explain", "ENV005", "--lang", "zh"],
        capture_output=True, check=True, text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert "LD_LIBRARY_PATH is clean" in done.stdout


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "[" * 100_000, "\xff", '{"schema": ["x"]}', '{"schema": "sllmctl.doctor/9"}',
        *(
            f'{{"schema": "{SCHEMA}", {rest}}}'
            for rest in (
                '"host": [1]', '"facts": null', '"facts": {"cann": [1]}', '"checks": [{"id": 1}]',
                '"facts": {"environment": [{}]}', '"facts": {"packages": []}', '"checks": 3',
            )
        ),
    ],
)  # fmt: skip
def test_any_file_may_be_given_to_compare(
    doctor: Doctor, machine: Make, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(text.encode("latin-1"))
    done = doctor("--root", machine("no Ascend at all"), "--compare", path)
    assert isinstance(done.exception, ConfigError), done.exception
    assert "sllmctl doctor --json" in (done.exception.hint or "")


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "[" * 100_000, '{"host": 3}', '{"host": {"sys_path": 5}}', '{"nodes": 3}',
        '{"commands": []}', '{"ports": {}}', '{"host": {"env": []}}',
    ],
)  # fmt: skip
def test_a_damaged_machine_json_is_one_line(doctor: Doctor, tmp_path: Path, text: str) -> None:
    (tmp_path / "machine.json").write_text(text)
    done = doctor("--root", tmp_path)
    assert isinstance(done.exception, ConfigError), done.exception
    assert "describes no machine" in str(done.exception)


@pytest.mark.parametrize("change", ["rows", "pattern"])
def test_damaged_tables_are_one_line(doctor: Doctor, tmp_path: Path, change: str) -> None:
    tables = json.loads((resources.files("sllmctl.doctor") / "tables.json").read_text())
    if change == "rows":
        tables["sgl_kernel_npu"]["rows"] = []
    else:
        tables["signatures"]["rows"][0][1] = "("
    path = tmp_path / "tables.json"
    path.write_text(json.dumps(tables))
    done = doctor("--tables", path, "--list")
    assert done.exit_code == 0  # nothing of it is needed
    done = doctor("--tables", path, "--only", "ENV005")
    assert isinstance(done.exception, ConfigError), done.exception
