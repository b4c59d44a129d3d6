"""Planted secrets appear in no output."""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from sllmctl.doctor.document import SCHEMA
from sllmctl.doctor.host import Host
from sllmctl.doctor.redact import Redactor
from tests.doctor.conftest import Doctor

SECRETS = {
    "http_proxy": "http://alice:s3cr3t-pa@ss@proxy.corp:3128",
    "no_proxy": "bob:hunter2secret@intern.corp",
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrSt",
    "HF_ENDPOINT": "https://u1:p4ssw0rdX@hf.corp",
    "MODELSCOPE_API_TOKEN": "0b8d0c1e-plain-uuid-token",
    "VLLM_API_KEY": "sk-live0123456789abcdef",
    "LD_PRELOAD": "/opt/ghp_0123456789abcdefABCDEF/lib.so",
    "PYTHONPATH": "/srv/AKIAIOSFODNN7EXAMPLE/site:/x/eyJhbGciOi.eyJzdWIiOiIx.c2ln",
    "ASCEND_PROCESS_LOG_PATH": "/logs?password=tr0ub4dor",
    "PRIVATE_THING": "never-collected",
}
LEAKS = [
    "s3cr3t", "pa@ss", "ss@proxy", "hunter2", "hf_AbCd", "p4ssw0rdX", "plain-uuid-token",
    "sk-live", "ghp_0123", "AKIAIOS", "eyJhbGci", "tr0ub4dor", "never-collected",
]  # fmt: skip
WHO = ["10.20.30.40", "fe80::1234", "npu-host", "/home/alice"]


@pytest.fixture
def leaky(machine: Callable[[str], Path]) -> Path:
    root = machine("healthy 8.1.RC1")
    path = root / "machine.json"
    document = json.loads(path.read_text())
    env = document["host"]["env"]
    env |= {**SECRETS, "LD_LIBRARY_PATH": env["LD_LIBRARY_PATH"] + "::/home/alice/lib:/10.20.30.40"}
    env["PYTHONPATH"] += ":" + SECRETS["PYTHONPATH"]
    env["HCCL_IF_IP"] = "10.20.30.40"
    env["GLOO_SOCKET_IFNAME"] = "fe80::1234"
    document["host"] |= {"home": "/home/alice", "user": "alice", "name": "npu-host"}
    path.write_text(json.dumps(document))
    log = "\n".join(f"error: {name}={value} on npu-host" for name, value in SECRETS.items())
    line = "OSError: libatb.so: cannot open shared object file"
    line += f" {SECRETS['http_proxy']} {SECRETS['HF_TOKEN']} 10.20.30.40"
    (root / "error.log").write_text(f"{log}\n{line}\n")
    names = [name for name in SECRETS if name != "PRIVATE_THING"]
    other = ", ".join(json.dumps({"name": name, "value": SECRETS[name]}) for name in names)
    (root / "other.json").write_text(
        f'{{"schema": "{SCHEMA}", "host": {{"kernel": "\\u001b[0;10.20.30.40"}}, '
        f'"facts": {{"environment": [{other}]}}, "checks": []}}'
    )
    return root


@pytest.mark.parametrize(
    ("arguments", "hidden"),
    [
        ([], []), (["-v"], []), (["--lang", "zh", "-v"], []), (["--json"], WHO),
        (["--report", "-"], WHO), (["--log", "LOG"], []), (["--log", "LOG", "--json"], WHO),
        (["--profile", "all", "--json"], WHO), (["--fix", "--dry-run"], []),
        (["--fix", "--yes"], []), (["--fix", "--yes", "--json"], WHO),
        (["--fix", "--dry-run", "--json"], WHO), (["--compare", "OTHER"], WHO),
        (["--compare", "OTHER", "--json"], WHO), (["--strict", "--quiet"], []),
        (["--only", "ENV", "--skip", "ENV001", "-v"], []),
    ],
)  # fmt: skip
def test_planted_secrets_appear_nowhere(
    doctor: Doctor, leaky: Path, arguments: list[str], hidden: list[str]
) -> None:
    files = {"LOG": str(leaky / "error.log"), "OTHER": str(leaky / "other.json")}
    words = [files.get(word, word) for word in arguments]
    done = doctor("--root", leaky, *words)
    assert done.exit_code in (0, 3), done.output
    text = done.stdout + done.stderr
    assert not [leak for leak in LEAKS + hidden if leak in text]
    assert "\x1b" not in text
    assert "***" in text or "--fix" in arguments or "--quiet" in arguments


def test_the_script_of_a_mended_environment_is_its_owners_alone(
    doctor: Doctor, leaky: Path
) -> None:
    assert doctor("--root", leaky, "--fix", "--yes").exit_code == 0
    script = leaky / "root/sllmctl-env.sh"
    assert "/home/alice/lib" in script.read_text()  # it must work: nothing in it is hidden
    assert script.stat().st_mode & 0o077 == 0


def test_a_report_keeps_what_helps() -> None:
    redact = Redactor(Host(user="alice", name="npu-host", home="/home/alice"))
    for text in (
        "127.0.0.1:8073", "0.0.0.0", "::1", "firmware 7.7.0.1.231", "0000:C1:00.0",
        "torch 2.5.1", "[7.0.0,7.7.99]", "libc10.so: std::string", "2025-06-09-23:13:26",
    ):  # fmt: skip
        assert redact(text) == text
    assert redact("/home/alice/lib of alice on npu-host") == "~/lib of <user> on <host>"
    assert redact("/home/alicent") == "/home/alicent"
    assert redact("Serial Number : 1025C9000000") == "Serial Number : <id>"
    assert redact("de:ad:be:ef:00:01") == "<id>"


@pytest.mark.parametrize(
    "text",
    [
        "http://u:p,s3cr3t@h:1", "http://u:p;s3cr3t@h:1", "http://u:p's3cr3t@h:1",
        'http://u:p"s3cr3t@h:1', "u:p/s3cr3t@proxy:8080", "u:p,s3cr3t@proxy:8080",
        "--api-key s3cr3t --port 1", "--password 's3cr3t x'", "vllm serve --hf-token=s3cr3t",
        "Authorization: Token s3cr3t", "-H 'Authorization: Digest a=\"b\", s3cr3t'",
        "Cookie: a=b; s3cr3t=c", "https://h/?X-Amz-Signature=s3cr3t&a=1", "https://h/?sig=s3cr3t",
        "AIzas3cr3t9tSrke72PouQMnMX",
    ],
)  # fmt: skip
def test_secrets_of_every_form_are_hidden(text: str) -> None:
    assert "s3cr3t" not in Redactor(Host())(text)


@pytest.mark.parametrize(
    "text",
    [
        "the token expired", "npu:0 at 127.0.0.1:8073", "http://localhost:8000/v1/models",
        "--tokenizer ./t", "symbol: _ZN3atb15CreateOperationE@LIBATB", "hidden_size: 4096",
    ],
)  # fmt: skip
def test_what_is_no_secret_is_kept(text: str) -> None:
    assert Redactor(Host())(text) == text


@pytest.mark.parametrize(
    "word", ["--token ", "a:b", "a", ":", "1:", "://", "token", "eyJ", "a.", "-"]
)
def test_a_very_long_value_is_read_in_one_go(word: str) -> None:
    """Steps that grow with the square of the length would take minutes here."""
    text = word * ((1 << 17) // len(word))
    assert "s3cr3t" not in Redactor(Host())(text + " token=s3cr3t")


def test_a_user_is_known_by_number_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service has no USER: its name must not stand in a report for all that."""
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert Host.here().user == pwd.getpwuid(os.getuid()).pw_name
