"""Machines whose network, hub, disk, memory or container is as no one wants it."""

from __future__ import annotations

import json

from sllmctl.doctor.machine import Options
from tests.doctor.scenario import scenario
from tests.doctor.scenarios_store import MODEL, model
from tests.doctor.smi_output import cards, render
from tests.doctor.tree import (
    Tree,
)

STORE = Options(profiles=("base", "store"))

CONVERT = Options(profiles=("convert",))


@scenario("a taken port", {"NET003": "info"}, says="8000")
def taken_port(t: Tree) -> None:
    t.file(
        "proc/net/tcp",
        "  sl  local_address rem_address   st\n"
        "   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000\n",
    )


@scenario(
    "no hub can be reached",
    {"NET004": "info"},
    options=Options(profiles=("convert",), network=True),
)
def no_hub(t: Tree) -> None:
    pass


@scenario("a mirror answers", options=Options(profiles=("convert",), network=True))
def mirror(t: Tree) -> None:
    t.env["HF_ENDPOINT"] = "https://hf-mirror.com"
    t.more["http"] = {"https://hf-mirror.com": [200, "<html>"]}


@scenario("a port of HCCL is taken", {"NET005": "warn"}, says="60000")
def hccl_taken(t: Tree) -> None:
    t.file(
        "proc/net/tcp",
        "  sl  local_address rem_address   st\n"
        "   0: 00000000:EA60 00000000:0000 0A 00000000:00000000\n",
    )


@scenario("ports of HCCL may be handed out", {"NET005": "info"})
def hccl_range(t: Tree) -> None:
    t.file("proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n")


@scenario("an endpoint without a scheme", {"HUB001": "fail"})
def bad_endpoint(t: Tree) -> None:
    t.env["HF_ENDPOINT"] = "hf-mirror.com"


@scenario("ModelScope asked for, not installed", {"HUB001": "fail"}, says="modelscope")
def no_modelscope(t: Tree) -> None:
    t.env["VLLM_USE_MODELSCOPE"] = "True"


@scenario("offline without the model", {"HUB002": "fail"}, options=Options(model="Qwen/Qwen3-8B"))
def offline(t: Tree) -> None:
    t.env["HF_HUB_OFFLINE"] = "1"


@scenario("offline with the model", options=Options(model="Qwen/Qwen3-8B"))
def cached(t: Tree) -> None:
    t.env["HF_HUB_OFFLINE"] = "1"
    t.directory("root/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/abc")


@scenario(
    "guide 2: a relative path, from elsewhere",
    {"HUB003": "warn"},
    options=Options(model="autodl-tmp/Qwen/Qwen3-8B"),
)
def relative(t: Tree) -> None:
    t.host["cwd"] = "/data"
    t.directory("root/autodl-tmp/Qwen/Qwen3-8B")


@scenario(
    "a shard is missing", {"HUB003": "fail"}, options=Options(model=f"/{MODEL}"), says="1 of 2"
)
def missing_shard(t: Tree) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    t.file(f"{MODEL}/config.json", "{}")
    t.file(f"{MODEL}/model.safetensors.index.json", json.dumps(index))
    t.file(f"{MODEL}/model-1.safetensors", b"\0" * 400)


@scenario(
    "a pointer of git-lfs", {"HUB003": "fail"}, options=Options(model=f"/{MODEL}"), says="git-lfs"
)
def pointer(t: Tree) -> None:
    model(t, model__safetensors="version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


@scenario("a model that is not there", {"HUB003": "fail"}, options=Options(model="/data/none"))
def no_model(t: Tree) -> None:
    pass


@scenario("a file in place of a model's directory", {"HUB003": "fail"}, says="is a file",
          options=Options(model="/data/x.safetensors"))  # fmt: skip
def model_file(t: Tree) -> None:
    t.file("data/x.safetensors")


@scenario(
    "a model by its name, with a shard missing",
    {"HUB003": "fail"},
    says="1 of 1",
    options=Options(model="Qwen/Qwen3-8B", storage_path="/data/models"),
)
def model_name(t: Tree) -> None:
    t.file(f"{MODEL}/config.json", "{}")
    t.file(f"{MODEL}/model.safetensors.index.json", '{"weight_map": {"a": "a.safetensors"}}')


@scenario("a model below the home directory", options=Options(model="~/models/m"))
def model_home(t: Tree) -> None:
    t.file("root/models/m/config.json", "{}")


@scenario("a small /dev/shm", {"MEM003": "fail"})
def small_shm(t: Tree) -> None:
    t.more["space"]["/dev/shm"] = [64 << 20, 64 << 20, 0, 0]


@scenario("a full disk", {"IO001": "fail"}, options=Options(storage_path="/data/models"))
def full_disk(t: Tree) -> None:
    t.more["space"]["/data"] = [4 << 40, 200 << 20, 1 << 26, 1 << 25]


@scenario("a disk that is nearly full", {"IO001": "warn"}, options=Options(storage_path="/data"))
def nearly_full(t: Tree) -> None:
    t.more["space"]["/data"] = [1 << 40, 30 << 30, 1 << 26, 1 << 25]


@scenario(
    "a storage path of somebody else",
    {"IO004": "warn"},
    options=Options(storage_path="/data/models"),
)
def not_writable(t: Tree) -> None:
    t.nodes["/data/models"] = {"kind": "dir", "mode": 0o755, "uid": 0, "gid": 0}
    t.host |= {"euid": 1001, "groups": [1000, 1001], "dac_override": False}


@scenario("a container as it should be")
def good_container(t: Tree) -> None:
    t.file(".dockerenv")
    t.file("usr/local/bin/npu-smi")
    t.file("usr/local/dcmi/libdcmi.so")


@scenario("a container without npu-smi", {"CTR001": "info", "DRV009": "warn"})
def container_without_tool(t: Tree) -> None:
    t.file(".dockerenv")
    t.command("npu-smi info", code=127)


@scenario("a container started with NODRV", {"CTR001": "fail"}, says="NODRV")
def no_driver(t: Tree) -> None:
    t.file(".dockerenv")
    t.env["ASCEND_RUNTIME_OPTIONS"] = "NODRV"


@scenario("the container's variable in a process", {"CTR002": "warn"})
def wrong_variable(t: Tree) -> None:
    t.env["ASCEND_VISIBLE_DEVICES"] = "0,1"


@scenario(
    "guide 2: the client's port is not the server's",
    {"SRV001": "fail"},
    says="30000",
    options=Options(base_url="http://localhost:3000/v1", served_model="Qwen3-8B"),
)
def wrong_port(t: Tree) -> None:
    t.more["ports"] = [30000]


def _serving(t: Tree, name: str) -> None:
    t.more["ports"] = [30000]
    listed = {"object": "list", "data": [{"id": name}]}
    t.more["http"] = {"http://localhost:30000/v1/models": [200, json.dumps(listed)]}


@scenario(
    "guide 2: the model has its path for a name",
    {"SRV002": "fail"},
    says="autodl-tmp",
    options=Options(base_url="http://localhost:30000/v1", served_model="Qwen3-8B"),
)
def wrong_name(t: Tree) -> None:
    _serving(t, "autodl-tmp/Qwen/Qwen3-8B")


@scenario(
    "a server as its clients expect it",
    options=Options(base_url="http://localhost:30000/v1", served_model="Qwen3-8B"),
)
def right_name(t: Tree) -> None:
    _serving(t, "Qwen3-8B")


@scenario("an empty machine", {"PY003": "fail", "IO003": "info"}, base=lambda t: t, options=CONVERT)
def empty(t: Tree) -> None:
    t.directory("models")
    t.host["cwd"] = "/"
    t.file("proc/self/mountinfo", "1 0 0:1 / / rw - overlay overlay rw\n")
    t.command("npu-smi info", render("25.2.0", cards(1)))


@scenario("an endpoint with a slash", {"HUB001": "warn"}, says="slash")
def slash(t: Tree) -> None:
    t.env["HF_ENDPOINT"] = "https://hf-mirror.com/"


@scenario("a hub's cache that cannot be written", {"HUB002": "warn"})
def closed_cache(t: Tree) -> None:
    t.nodes["/root"] = {"kind": "dir", "mode": 0o555, "uid": 0, "gid": 0}
    t.host |= {"euid": 1001, "groups": [1000, 1001], "dac_override": False, "cwd": "/data"}


@scenario("a disk that turns", {"IO003": "info"}, options=Options(storage_path="/data/models"))
def turning(t: Tree) -> None:
    t.file("sys/block/sda/queue/rotational", "1\n")
    t.directory("sys/block/sda/sda1")
    t.link("sys/dev/block/259:0", "../../block/sda/sda1")


@scenario("a full /tmp", {"IO001": "warn"}, says="/tmp")
def full_tmp(t: Tree) -> None:
    t.more["space"]["/tmp"] = [1 << 30, 1 << 20, 0, 0]


@scenario("a private umask", {"IO004": "info"})
def private(t: Tree) -> None:
    t.change("proc/self/status", "Umask:\t0022", "Umask:\t0077")


@scenario("no /dev/shm", {"MEM003": "fail"}, says="there is no")
def no_shm(t: Tree) -> None:
    t.remove("dev/shm")


@scenario("a small /dev/shm, and one card", {"MEM003": "warn"})
def small_shm_one_card(t: Tree) -> None:
    t.more["space"]["/dev/shm"] = [64 << 20, 64 << 20, 0, 0]
    t.nodes = {name: node for name, node in t.nodes.items() if name[-1] not in "1234567"}
    t.command("npu-smi info", render("25.0.rc1.1", cards(1)))


@scenario("an old Docker's filter", {"CTR003": "info"}, says="4.19")
def filtered(t: Tree) -> None:
    good_container(t)
    t.host["kernel"] = "4.19.90-2107.6.0.oe1"
    t.change("proc/self/status", "Seccomp:\t0", "Seccomp:\t2")
