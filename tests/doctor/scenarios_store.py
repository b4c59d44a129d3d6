"""Machines with sllm-store, and what can be wrong with it."""

from __future__ import annotations

import json

from sllmctl.doctor.machine import Options
from tests.doctor.scenario import scenario
from tests.doctor.tree import SITE, A, Tree, good, server, store, torch_npu

GLOG = f"{SITE[1:]}/sllm_store/libglog.so"

MODEL = "data/models/Qwen/Qwen3-8B"


def with_store(t: Tree) -> None:
    """The first guide's machine: CANN 8.0.0, torch 2.4.0, sllm-store."""
    good(t, "8.0.0", "24.1.0")
    t.undist("vllm", "vllm_ascend")
    t.dist("torch", "2.4.0")
    torch_npu(t, "2.4.0.post2", "2.4.0")
    store(t)


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
    for name in ("config", "no_split_modules", "tied_no_split_modules"):
        t.file(f"{MODEL}/{name}.json", "{}")
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
    {"STORE001": "info", "STORE002": "fail"},
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


@scenario("little memory may be locked", {"MEM002": "info"}, base=with_store, says="64 KB")
def little_memlock(t: Tree) -> None:
    t.host["memlock_bytes"] = 65536


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
    "4GB, which sllm-store reads as 4 GiB",
    base=with_store,
    options=Options(pool_bytes=4 * 10**9, pool_text="4GB"),
)
def binary_units(t: Tree) -> None:
    pass


@scenario(
    "a size that sllm-store cannot read",
    {"STORE006": "info"},
    base=with_store,
    says="4GiB",
    options=Options(pool_bytes=4 << 30, pool_text="4GiB"),
)
def other_units(t: Tree) -> None:
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


@scenario("an index of the store, infinite", {"STORE007": "fail"}, base=with_store,
          says="cannot be read", options=Options(model=f"/{MODEL}"))  # fmt: skip
def infinite_index(t: Tree) -> None:
    model(t, tensor_index__json='{"a": [1e999, 2]}')


@scenario("an index of the store, negative", {"STORE007": "fail"}, base=with_store,
          says="cannot be read", options=Options(model=f"/{MODEL}"))  # fmt: skip
def negative_index(t: Tree) -> None:
    model(t, tensor_index__json='{"a": [-5, 2]}')


@scenario("an index of the store, nested", {"STORE007": "fail"}, base=with_store,
          says="cannot be read", options=Options(model=f"/{MODEL}"))  # fmt: skip
def nested_index(t: Tree) -> None:
    model(t, tensor_index__json="[[" * 100_000)


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


@scenario("a server of sllm-store in another container", {"STORE008": "warn"}, base=with_store)
def unseen_server(t: Tree) -> None:
    t.remove("proc/4711")
    del t.nodes["/proc/4711"]


@scenario("a server with process ids of its own", {"STORE008": "warn"}, base=with_store)
def other_ids(t: Tree) -> None:
    t.link("proc/4711/ns/pid", "pid:[4026532999]")


@scenario("a server of another user", {"STORE008": "warn"}, base=with_store, says="1001")
def other_user(t: Tree) -> None:
    server(t, user=1001)
    t.host |= {"euid": 1002, "groups": [1000, 1002]}


@scenario("a server that sees another card", {"STORE008": "warn"}, base=with_store, says="0 and -")
def other_card(t: Tree) -> None:
    t.file("proc/4711/environ", "ASCEND_RT_VISIBLE_DEVICES=0\0")


@scenario("sllm-store on a CANN to come", {"CANN003": "info", "DRV008": "info", "PY006": "info"},
          base=lambda t: good(t, "9.5.0", "27.0.0"))  # fmt: skip
def new_cann(t: Tree) -> None:
    untested(t)
    t.dist("torch", "2.14.0")
    torch_npu(t, "2.14.0", "2.14.0")


@scenario("sllm-store of another transformers", {"PY012": "info"}, base=with_store)
def other_transformers(t: Tree) -> None:
    t.dist("serverless_llm_store", "0.0.1", requires=["transformers==4.47.1", "accelerate==1.2.1"])
    t.dist("transformers", "4.57.0")


def _extensions(t: Tree, runpath: str) -> None:
    for name in ("_C", "_checkpoint_store"):
        t.elf(
            f"{SITE[1:]}/sllm_store/{name}.cpython-310-aarch64-linux-gnu.so",
            needed=["libtorch_npu.so"],
            runpath=runpath,
        )


@scenario("extensions of another environment", {"STORE003": "warn"}, base=with_store)
def other_runpath(t: Tree) -> None:
    _extensions(t, "$ORIGIN:/root/miniconda3/envs/sllm-worker/lib/python3.10/site-packages/torch")


@scenario("extensions whose build is gone", {"STORE003": "info"}, base=with_store, says="gone")
def gone_runpath(t: Tree) -> None:
    _extensions(t, "/root/ServerlessLLM/build/lib:$ORIGIN")


@scenario("a model without what lies beside it", {"STORE007": "info"}, base=with_store,
          options=Options(model=f"/{MODEL}"))  # fmt: skip
def bare_model(t: Tree) -> None:
    converted(t)
    t.remove(f"{MODEL}/no_split_modules.json")


@scenario("sllm-store without NNAL", {"NNAL001": "info"}, base=with_store)
def store_without_nnal(t: Tree) -> None:
    t.remove(f"{A}/nnal")
    del t.env["ATB_HOME_PATH"]
    t.env["LD_LIBRARY_PATH"] = ":".join(
        e for e in t.env["LD_LIBRARY_PATH"].split(":") if "nnal" not in e
    )


@scenario("engine settings of the kernel", {"MEM004": "info"}, base=with_store, says="swappiness")
def slow_kernel(t: Tree) -> None:
    t.file("proc/sys/vm/swappiness", "60\n")
    t.file("proc/sys/kernel/numa_balancing", "1\n")
    t.file("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n")
    t.file("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "powersave\n")
    t.change("proc/meminfo", "SwapTotal: 0 kB", "SwapTotal: 8388608 kB\nSwapFree: 4194304 kB")


@scenario("few open files", {"IO004": "warn"}, base=with_store, says="1024")
def few_files(t: Tree) -> None:
    t.host["open_files"] = 1024
