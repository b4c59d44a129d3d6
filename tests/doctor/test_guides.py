"""Every trouble that deployment guides for Ascend run into is found, by the right check."""

from __future__ import annotations

import pytest

from sllmctl.doctor.log_signatures import read_log
from sllmctl.doctor.tables import load_tables
from tests.doctor.scenario import SCENARIOS, examined, findings

# What a guide says or leaves out: the machine that comes of it, and the check that says so.
TROUBLES = {
    "the card is not healthy in npu-smi info": ("a card in alarm", "DRV009"),
    "others hold the card's memory": ("cards in use", "DRV012"),
    "another CANN than the tested one": ("sllm-store on an untested CANN", "CANN003"),
    "a driver too old for CANN": ("a driver too old for CANN", "DRV008"),
    "the firmware is of another release": ("ascend-dmi finds the firmware wrong", "DRV006"),
    "set_env.sh not sourced": ("nothing sourced", "ENV001"),
    "ASCEND_TOOLKIT_HOME exported for another version": (
        "exports of a guide beside set_env.sh", "ENV002"),
    "ASCEND_AICPU_PATH exported as <root>/aicpu": (
        "exports of a guide beside set_env.sh", "ENV003"),
    "LD_LIBRARY_PATH extended when it was empty": (
        "an empty entry in LD_LIBRARY_PATH", "ENV005"),
    "PYTHONPATH overwritten": ("PYTHONPATH overwritten", "ENV008"),
    "logs at INFO on the screen": ("a flood of logs", "ENV007"),
    "torch_npu of another torch": ("torch 2.4.0 with torch_npu 2.5.1", "PY005"),
    "torch 2.5.1 on CANN 8.0.0": ("guide 1: CANN 8.0.0 with torch 2.5.1 and NNAL 8.1.RC1", "PY006"),
    "torch installed before the environment was made": (
        "packages in another environment", "PY002"),
    "gcc of conda, an older libstdc++": ("libstdc++ too old", "PY010"),
    "an old compiler, a cmake too new": ("an old compiler", "PY016"),
    "no wheel.bdist_wheel": ("the tools for building, without wheel", "PY016"),
    "built without USE_CANN": ("sllm-store built for the CPU", "STORE003"),
    "about to build without USE_CANN": ("a source built without USE_CANN", "STORE004"),
    "requirements that change torch after the build": (
        "a source that builds with another torch", "STORE004"),
    "rm -rf build kills the target of the link": ("libglog.so is a broken link", "STORE002"),
    "libglog.so only in the build": ("libglog.so is missing, the build has it", "STORE002"),
    "pip install -e": ("libglog.so is missing, the build has it", "STORE001"),
    "the model was not converted": ("safetensors given to sllm-store", "STORE007"),
    "no room for the converted model": ("a full disk", "IO001"),
    "a disk without O_DIRECT": ("checkpoints on a file system without O_DIRECT", "IO002"),
    "quotes in ASCEND_RT_VISIBLE_DEVICES": ('ASCEND_RT_VISIBLE_DEVICES="0"', "ENV006"),
    "the container's variable in a process": ("the container's variable in a process", "CTR002"),
    "a pool smaller than the model": ("a pool smaller than the model", "STORE006"),
    "a pool larger than memory": ("a container of 16 GiB with a pool of 32 GiB", "MEM001"),
    "memlock too small": ("a container of 16 GiB with a pool of 32 GiB", "MEM002"),
    "vllm of another release": ("vllm of another release", "VLLM001"),
    "vllm-ascend on the store's CANN": ("guide 1, with vLLM installed", "VLLM002"),
    "vllm-ascend from pip, without its native part": (
        "vllm-ascend without its native part", "VLLM004"),
    "a patch applied by half": ("a patch applied by half", "VLLM006"),
    "NNAL missing": ("no NNAL", "NNAL001"),
    "NNAL of another version": ("guide 1, with vLLM installed", "NNAL002"),
    "NNAL not sourced in this terminal": ("nothing sourced", "NNAL003"),
    "NNAL of the other C++ ABI": ("NNAL of the other ABI", "NNAL004"),
    "a package for another machine": ("CANN of another machine", "CANN006"),
    "torchvision of another torch": ("torchvision of another torch", "PY007"),
    "numpy 2": ("numpy 2 on CANN 8.1", "PY008"),
    "necessary packages missing": ("what CANN imports is missing", "PY013"),
    "grpcio of another time": ("grpcio older than the generated code", "PY012"),
    "gRPC through the proxy": ("gRPC through a proxy", "NET001"),
    "NO_PROXY in upper case alone": ("no_proxy in upper case alone", "NET001"),
    "HTTP through the proxy": ("gRPC through a proxy", "NET002"),
    "the server is not running": ("the server of sllm-store is not running", "STORE005"),
    "torch_npu 2.6.0.post3 on CANN 8.2.RC1": (
        "guide 2: torch_npu 2.6.0.post3 on CANN 8.2.RC1, a stub first", "PY006"),
    "a stub in LD_LIBRARY_PATH": (
        "guide 2: torch_npu 2.6.0.post3 on CANN 8.2.RC1, a stub first", "ENV004"),
    "another Python than 3.11": ("SGLang on another Python", "SGL001"),
    "cards that are no A2 or A3": ("310P cards under SGLang", "DRV011"),
    "a mirror of pip without encryption": ("an index without encryption", "PY015"),
    "a mirror without the CPU build": ("a mirror of pip on x86_64", "PY015"),
    "torch for CUDA": ("torch for CUDA", "PY003"),
    "build.sh for A3 on A2": ("deep_ep built for A3", "SGL003"),
    "sgl-kernel-npu cloned without a tag": (
        "guide 2: sgl-kernel-npu cloned without a tag", "SGL004"),
    "deep_ep_cpp not linked": ("deep_ep_cpp out of reach", "SGL002"),
    "ModelScope asked for, not installed": ("ModelScope asked for, not installed", "HUB001"),
    "a relative model path from elsewhere": ("guide 2: a relative path, from elsewhere", "HUB003"),
    "port 3000 for 30000": ("guide 2: the client's port is not the server's", "SRV001"),
    "a port taken": ("a taken port", "NET003"),
    "the model's path for its name": ("guide 2: the model has its path for a name", "SRV002"),
    "Chinese in another encoding": ("text in another encoding", "ENV011"),
}  # fmt: skip

LINES = {
    "OSError: /root/sllm_store/libglog.so: cannot open shared object file: No such file": "L27",
    "ERROR: Invalid requirement: 'torch-npu==2.4.0.post2.'": "L23",
    "ImportError: libatb.so: cannot open shared object file: No such file or directory": "L01",
    "grpc: failed to connect to all addresses; last error: UNKNOWN": "L28",
    "[ERROR]: stub library cannot be used for execution, please check": "L19",
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_trouble_of_the_guides_is_found(trouble: str) -> None:
    name, check_id = TROUBLES[trouble]
    assert check_id in findings(examined(name))
    assert check_id in SCENARIOS[name].expect


@pytest.mark.parametrize("line", LINES)
def test_an_error_of_the_guides_is_explained(line: str) -> None:
    log = [line, "[ERROR] 2025-06-09-23:13:26 (PID:1, Device:-1, RankID:-1) ERR99999 UNKNOWN"]
    assert [match.id for match in read_log(log, load_tables())] == [LINES[line]]
