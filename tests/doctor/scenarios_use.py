"""Machines on which engines, stores, networks or disks are as no one wants them."""

from __future__ import annotations

import json

from sllmctl.doctor.checks.deep import COPY, COUNT, IMPORT, PIN
from sllmctl.doctor.checks.vllm import PATCHED
from sllmctl.doctor.machine import Options
from tests.doctor.scenario import scenario
from tests.doctor.smi_output import cards, render
from tests.doctor.tree import SITE, A, Tree, good, row_85, store, torch_npu

STORE = Options(profiles=("base", "store"))
CONVERT = Options(profiles=("convert",))
GLOG = f"{SITE[1:]}/sllm_store/libglog.so"
MODEL = "data/models/Qwen/Qwen3-8B"
PYTHON = "/usr/bin/python3 -c "


def with_store(t: Tree) -> None:
    """The first guide's machine: CANN 8.0.0, torch 2.4.0, sllm-store."""
    good(t, "8.0.0", "24.1.0")
    t.undist("vllm", "vllm_ascend")
    t.dist("torch", "2.4.0")
    torch_npu(t, "2.4.0.post2", "2.4.0")
    store(t)
    t.more["ports"] = [8073]


def source_tree(t: Tree) -> str:
    """An editable install: Python imports sllm_store from its source; back comes that folder."""
    source = "root/ServerlessLLM/sllm_store"
    url = json.dumps({"url": f"file:///{source}", "dir_info": {"editable": True}})
    t.dist("serverless_llm_store", "0.0.1", direct_url=url)
    (t.root / SITE[1:] / "sllm_store").rename(t.root / "root" / "moved")
    t.directory(source)
    (t.root / "root" / "moved").rename(t.root / source / "sllm_store")
    return source


def model(t: Tree, **files: str | bytes) -> None:
    t.file(f"{MODEL}/config.json", "{}")
    for name, content in files.items():
        t.file(f"{MODEL}/{name.replace('__', '.')}", content)


@scenario("sllm-store, all in order", base=with_store)
def good_store(t: Tree) -> None:
    pass


@scenario("the server of sllm-store is not running", {"STORE005": "info"}, base=with_store)
def no_server(t: Tree) -> None:
    t.more["ports"] = []


@scenario(
    "sllm-store on an untested CANN",
    {"CANN003": "warn"},
    base=lambda t: good(t, "8.2.RC1", "25.2.0"),
)
def untested(t: Tree) -> None:
    t.undist("vllm", "vllm_ascend")
    t.dist("torch", "2.5.1")
    torch_npu(t, "2.5.1.post1", "2.5.1")
    store(t)
    t.more["ports"] = [8073]


@scenario("grpcio older than the generated code", {"PY012": "fail"}, base=with_store)
def old_grpc(t: Tree) -> None:
    t.dist("grpcio", "1.44.0")


@scenario("sllm-store without its extensions", {"STORE001": "fail"}, base=with_store, says="_C")
def no_extensions(t: Tree) -> None:
    t.remove(f"{SITE[1:]}/sllm_store/_C.cpython-310-aarch64-linux-gnu.so")


@scenario("libglog.so is a broken link", {"STORE002": "fail"}, base=with_store, says="broken link")
def dangling_glog(t: Tree) -> None:
    t.link(GLOG, "/root/build/lib.linux-aarch64-cpython-310/sllm_store/libglog.so")


@scenario(
    "libglog.so is missing, the build has it",
    {"STORE002": "fail"},
    base=with_store,
    says="does not lie beside",
)
def missing_glog(t: Tree) -> None:
    source = source_tree(t)
    t.remove(f"{source}/sllm_store/libglog.so")
    t.elf(f"{source}/build/lib.linux-aarch64-cpython-310/sllm_store/libglog.so")


@scenario("libglog.so of another machine", {"STORE002": "fail"}, base=with_store, says="x86_64")
def foreign_glog(t: Tree) -> None:
    t.elf(GLOG, "x86_64")


@scenario("sllm-store built for the CPU", {"STORE003": "fail"}, base=with_store)
def cpu_store(t: Tree) -> None:
    for name in ("_C", "_checkpoint_store"):
        t.elf(
            f"{SITE[1:]}/sllm_store/{name}.cpython-310-aarch64-linux-gnu.so", needed=["libc10.so"]
        )


@scenario(
    "a pool smaller than the model",
    {"STORE006": "fail"},
    base=with_store,
    options=Options(pool_bytes=1 << 25, model=f"/{MODEL}"),
)
def small_pool(t: Tree) -> None:
    model(t, model__safetensors=b"\0" * (33 << 20), tensor_index__json="{}")


@scenario(
    "a container of 16 GiB with a pool of 32 GiB",
    {"MEM001": "fail", "MEM002": "warn"},
    base=with_store,
    options=Options(pool_bytes=32 << 30),
)
def small_container(t: Tree) -> None:
    t.host["memlock_bytes"] = 65536
    t.file("sys/fs/cgroup/memory.max", str(16 << 30))
    t.file("sys/fs/cgroup/memory.current", str(1 << 30))


@scenario(
    "a pool that is no multiple of the chunk",
    {"STORE006": "fail"},
    base=with_store,
    options=Options(pool_bytes=4 * 10**9),
)
def odd_pool(t: Tree) -> None:
    pass


@scenario("a pool as it should be", base=with_store, options=Options(pool_bytes=4 << 30))
def good_pool(t: Tree) -> None:
    pass


@scenario(
    "safetensors given to sllm-store",
    {"STORE007": "fail"},
    base=with_store,
    options=Options(model=f"/{MODEL}"),
)
def not_converted(t: Tree) -> None:
    model(t, model__safetensors=b"\0" * 4096)


@scenario(
    "a data file cut short",
    {"STORE007": "fail"},
    base=with_store,
    says="4096 of 8192",
    options=Options(model=f"/{MODEL}"),
)
def cut_short(t: Tree) -> None:
    index = {"a": [0, 4096, [2048], [1], "torch.float16"], "b": [4096, 4096, [2048], [1], "t"]}
    model(t, tensor_index__json=json.dumps(index), tensor__data_0=b"\0" * 4096)


@scenario("a model in the store's format", base=with_store, options=Options(model=f"/{MODEL}"))
def converted(t: Tree) -> None:
    index = {"a": [0, 4096, [2048], [1], "torch.float16"]}
    model(t, tensor_index__json=json.dumps(index), tensor__data_0=b"\0" * 4096)


@scenario(
    "checkpoints on a file system without O_DIRECT",
    {"IO002": "fail", "IO003": "info"},
    base=with_store,
    options=Options(storage_path="/dev/shm/models"),
)
def no_direct_io(t: Tree) -> None:
    t.directory("dev/shm/models")
    t.more["direct_io"] = {"/": True, "/dev/shm": False}


@scenario(
    "checkpoints on a network file system",
    {"IO003": "warn"},
    base=with_store,
    options=Options(storage_path="/mnt/models"),
)
def network_disk(t: Tree) -> None:
    t.directory("mnt/models")
    t.file(
        "proc/self/mountinfo",
        "20 1 253:0 / / rw - ext4 /dev/vda rw\n30 20 0:40 / /mnt rw - nfs4 server:/export rw\n",
    )


@scenario("gRPC through a proxy", {"NET001": "fail", "NET002": "warn"}, base=with_store)
def grpc_proxy(t: Tree) -> None:
    t.env["http_proxy"] = "http://proxy.example:3128"


@scenario("no_proxy in upper case alone", {"NET001": "fail"}, base=with_store)
def upper_no_proxy(t: Tree) -> None:
    t.env |= {"http_proxy": "http://p:3128", "NO_PROXY": "localhost,127.0.0.1"}


@scenario("a proxy, and loopback kept off it", base=with_store)
def good_proxy(t: Tree) -> None:
    t.env |= {"http_proxy": "http://p:3128", "no_proxy": "localhost,127.0.0.1,::1"}


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


@scenario("no NNAL", {"NNAL001": "fail"})
def no_nnal(t: Tree) -> None:
    t.remove(f"{A}/nnal")
    del t.env["ATB_HOME_PATH"]
    t.env["LD_LIBRARY_PATH"] = ":".join(
        e for e in t.env["LD_LIBRARY_PATH"].split(":") if "nnal" not in e
    )


@scenario("NNAL of the other ABI", {"NNAL004": "fail"})
def other_abi(t: Tree) -> None:
    for name in ("ATB_HOME_PATH", "LD_LIBRARY_PATH"):
        t.env[name] = t.env[name].replace("cxx_abi_0", "cxx_abi_1")


@scenario("vllm of another release", {"VLLM001": "fail"}, says="0.7.3")
def other_vllm(t: Tree) -> None:
    t.dist("vllm", "0.9.1+empty")


@scenario("vllm from its main branch", {"VLLM001": "warn"})
def dev_vllm(t: Tree) -> None:
    t.dist("vllm", "0.1.dev1+gabcdef")


@scenario("vllm-ascend on another CANN", {"VLLM002": "fail", "PY006": "fail"}, base=row_85)
def other_row(t: Tree) -> None:
    t.dist("vllm", "0.20.2")
    t.dist("vllm_ascend", "0.20.2rc1", entry_points="[vllm.platform_plugins]\nascend = a:b\n")
    t.dist("torch", "2.10.0")
    torch_npu(t, "2.10.0", "2.10.0")


@scenario("no plugin registered", {"VLLM003": "fail"})
def no_plugin(t: Tree) -> None:
    t.dist("vllm_ascend", "0.7.3.post1")


@scenario("VLLM_PLUGINS without ascend", {"VLLM003": "fail"}, says="VLLM_PLUGINS")
def other_plugins(t: Tree) -> None:
    t.env["VLLM_PLUGINS"] = "lora_filesystem_resolver"


@scenario("vllm-ascend without its native part", {"VLLM004": "fail"})
def no_native(t: Tree) -> None:
    t.remove(f"{SITE[1:]}/vllm_ascend/vllm_ascend_C.cpython-310-aarch64-linux-gnu.so")


@scenario("vllm-ascend built for A3", {"VLLM004": "fail"}, says="A3")
def other_chip(t: Tree) -> None:
    t.file(f"{SITE[1:]}/vllm_ascend/_build_info.py", "__device_type__ = 'A3'\n")


@scenario("a patch applied by half", {"VLLM006": "fail"}, says="2 of 8")
def half_patched(t: Tree) -> None:
    for name in ("vllm/config.py", "vllm/worker/worker.py"):
        t.file(f"{SITE[1:]}/{name}", f"# {PATCHED[name]}\n")


@scenario("a patch applied whole")
def patched(t: Tree) -> None:
    for name, word in PATCHED.items():
        t.file(f"{SITE[1:]}/{name}", f"# {word}\n")


def with_sglang(t: Tree) -> None:
    """The second guide's machine, as it should have been."""
    good(t, "8.2.RC1", "25.2.0", abi=1)
    t.undist("vllm", "vllm_ascend")
    t.host["python"] = "3.11.9"
    t.dist("torch", "2.6.0")
    torch_npu(t, "2.6.0", "2.6.0")
    t.dist("torchvision", "0.21.0")
    t.dist("sglang", "0.5.3rc0")
    t.dist("sgl_kernel_npu", "0.1.0")
    t.dist("deep_ep", "1.0.0+607b0002.cann.8.2.RC1", files=["deep_ep/__init__.py"])
    t.elf(f"{SITE[1:]}/deep_ep/deep_ep_cpp.cpython-311-aarch64-linux-gnu.so")
    t.link(
        f"{SITE[1:]}/deep_ep_cpp.cpython-311-aarch64-linux-gnu.so",
        "deep_ep/deep_ep_cpp.cpython-311-aarch64-linux-gnu.so",
    )
    t.directory(f"{SITE[1:]}/deep_ep/vendors/hwcomputing/op_impl/ai_core/tbe/kernel/ascend910b")


@scenario("SGLang, all in order", base=with_sglang)
def good_sglang(t: Tree) -> None:
    pass


@scenario("SGLang on another Python", {"SGL001": "warn"}, base=with_sglang)
def sglang_python(t: Tree) -> None:
    t.host["python"] = "3.10.14"


@scenario("deep_ep of another CANN", {"SGL002": "fail"}, base=with_sglang, says="9.0.0")
def other_deep_ep(t: Tree) -> None:
    t.undist("deep_ep")
    t.dist("deep_ep", "1.0.0+607b0002.cann.9.0.0.b250")


@scenario("deep_ep_cpp out of reach", {"SGL002": "fail"}, base=with_sglang, says="deep_ep_cpp")
def unlinked(t: Tree) -> None:
    t.remove(f"{SITE[1:]}/deep_ep_cpp.cpython-311-aarch64-linux-gnu.so")


@scenario("deep_ep built for A3", {"SGL003": "fail"}, base=with_sglang)
def a3_deep_ep(t: Tree) -> None:
    kernel = f"{SITE[1:]}/deep_ep/vendors/hwcomputing/op_impl/ai_core/tbe/kernel"
    t.remove(f"{kernel}/ascend910b")
    t.directory(f"{kernel}/ascend910_93")


DEEP = Options(profiles=("base",), deep=True)


def _children(
    t: Tree,
    imported: int | None = 0,
    count: str = "8",
    copied: int | None = 0,
    pinned: int | None = 0,
) -> None:
    t.command(PYTHON + PIN, "ok\n", pinned, "RuntimeError: aclrtMallocHost failed: 207001\n")
    t.command(
        PYTHON + IMPORT,
        "2.5.1\n",
        imported,
        ""
        if imported == 0
        else "Traceback\nImportError: libhccl.so: cannot open shared object file\n"
        "[ERROR] 2025-06-09-23:13:26 (PID:1, Device:-1, RankID:-1) ERR99999 UNKNOWN\n",
    )
    t.command(PYTHON + COUNT, f"{count}\n")
    t.command(PYTHON + COPY, "copied\n", copied, "RuntimeError: 507899\n")


@scenario("devices that work", options=DEEP)
def deep(t: Tree) -> None:
    _children(t)


@scenario("torch_npu cannot be imported", {"DEEP001": "fail"}, options=DEEP, says="libhccl.so")
def no_import(t: Tree) -> None:
    _children(t, imported=1)


@scenario("cards that torch_npu does not see", {"DEEP002": "fail"}, options=DEEP)
def unseen(t: Tree) -> None:
    _children(t, count="7")


@scenario("a card that hangs", {"DEEP003": "fail"}, options=DEEP, says="does not end")
def hanging(t: Tree) -> None:
    _children(t, copied=None)


@scenario("memory that cannot be pinned", {"DEEP004": "fail"}, options=DEEP, says="207001")
def not_pinned(t: Tree) -> None:
    _children(t, pinned=1)


SOURCE = Options(profiles=("store",), source="/root/ServerlessLLM/sllm_store")


def _source(t: Tree, build: str = "2.5.1", environment: str = "/opt/npu") -> None:
    base = "root/ServerlessLLM/sllm_store"
    t.file(f"{base}/requirements-build.txt", f"cmake>=3.20\ntorch=={build}\n")
    t.file(f"{base}/requirements.txt", "grpcio==1.49.1\ntorch==2.5.1\ntorch-npu==2.5.1\n")
    t.file(f"{base}/CMakeLists.txt", f"set(Torch_DIR {environment}/lib/python3.10)\n")
    t.env["USE_CANN"] = "1"


@scenario(
    "a source that builds with another torch",
    {"STORE004": "warn"},
    base=with_store,
    options=SOURCE,
    says="torch 2.4.0",
)
def flip_flop(t: Tree) -> None:
    _source(t, build="2.4.0")


@scenario(
    "a source that names another environment",
    {"STORE004": "warn"},
    base=with_store,
    options=SOURCE,
    says="/root/miniconda3/envs/sllm-worker",
)
def foreign_path(t: Tree) -> None:
    _source(t, environment="/root/miniconda3/envs/sllm-worker")


@scenario(
    "a source built without USE_CANN",
    {"STORE004": "warn"},
    base=with_store,
    options=SOURCE,
    says="USE_CANN",
)
def no_use_cann(t: Tree) -> None:
    _source(t)
    del t.env["USE_CANN"]


@scenario("a source that can be built", base=with_store, options=SOURCE)
def good_source(t: Tree) -> None:
    _source(t)


@scenario("an empty machine", {"PY003": "fail", "IO003": "info"}, base=lambda t: t, options=CONVERT)
def empty(t: Tree) -> None:
    t.directory("models")
    t.host["cwd"] = "/"
    t.file("proc/self/mountinfo", "1 0 0:1 / / rw - overlay overlay rw\n")
    t.command("npu-smi info", render("25.2.0", cards(1)))
