"""A dict of loaded tensors behaves like any other dict of tensors."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sllmctl
from sllmctl.transformers import load_model
from tests.models import same_bits

# What torch.save and pickle add to a tensor's bytes.
OVERHEAD_BYTES = 4096


@pytest.fixture(params=["auto", "never"], ids=["mapped", "copied"])
def directory(request: pytest.FixtureRequest, converted: Any, monkeypatch: Any) -> Path:
    """A checkpoint whose files are mapped, or copied, by the next load."""
    monkeypatch.setenv("SLLMCTL_MAP", request.param)
    path: Path = converted("qwen3")
    for file in path.glob("*.safetensors"):
        file.read_bytes()
    return path


@pytest.fixture
def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Its tensors."""
    return sllmctl.load_tensors(directory)


@pytest.fixture
def expected(directory: Path) -> dict[str, torch.Tensor]:
    """Its tensors, by safetensors."""
    return {k: t for file in directory.glob("*.safetensors") for k, t in load_file(file).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def test_torch_save_writes_one_tensor_alone(tensors: Any) -> None:
    for tensor in tensors.values():
        file = io.BytesIO()
        torch.save(tensor, file)
        assert file.tell() < tensor.nbytes + OVERHEAD_BYTES
        file.seek(0)
        assert same_bits(torch.load(file, weights_only=True), tensor)


def test_pickle_carries_one_tensor_alone(tensors: Any) -> None:
    for tensor in tensors.values():
        data = pickle.dumps(tensor)
        assert len(data) < tensor.nbytes + OVERHEAD_BYTES
        assert same_bits(pickle.loads(data), tensor)


def test_deepcopy_copies_one_tensor_alone(tensors: Any) -> None:
    for tensor in tensors.values():
        twin = copy.deepcopy(tensor)
        assert same_bits(twin, tensor)
        assert twin.untyped_storage().nbytes() == tensor.nbytes
        twin.zero_()
        assert tensor.any()


def test_safetensors_saves_the_dict(tensors: Any, expected: Any, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "all.safetensors")
    assert equal(load_file(tmp_path / "all.safetensors"), expected)


def test_save_pretrained_saves_the_model(directory: Path, expected: Any, tmp_path: Path) -> None:
    load_model(directory).save_pretrained(tmp_path)
    assert equal(load_file(tmp_path / "model.safetensors"), expected)


def test_share_memory_moves_each_tensor_for_itself(tensors: Any, expected: Any) -> None:
    for tensor in tensors.values():
        tensor.share_memory_()
        assert tensor.is_shared()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert equal(tensors, expected)


def test_writes_reach_neither_file_nor_neighbours(
    directory: Path, tensors: Any, expected: Any
) -> None:
    again = sllmctl.load_tensors(directory)
    for tensor in list(tensors.values())[::2]:
        tensor.fill_(1)
    untouched = list(tensors)[1::2]
    assert all(same_bits(tensors[name], expected[name]) for name in untouched)
    assert equal(again, expected)
    assert equal(sllmctl.load_tensors(directory), expected)


def test_a_write_does_not_disturb_the_gradient_of_a_neighbour(tensors: Any) -> None:
    first, second = tensors["model.layers.0.mlp.up_proj.weight"], tensors["lm_head.weight"]
    first.requires_grad_()
    loss = (first * first).sum()
    second.add_(1)
    loss.backward()
    assert torch.equal(first.grad, 2 * first.detach())


def test_a_write_after_its_use_is_noticed_by_autograd(tensors: Any) -> None:
    first = tensors["model.norm.weight"].requires_grad_()
    loss = (first * first).sum()
    with torch.no_grad():
        first.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_tensor_outlives_the_rest(tensors: Any, expected: Any) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    last = tensors[name]
    view = last[3:9].t()
    del last
    tensors.clear()
    gc.collect()
    assert same_bits(view, expected[name][3:9].t())


def test_a_trained_step_stays_in_the_model(directory: Path, expected: Any) -> None:
    model = load_model(directory)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(input_ids=torch.arange(3, 40).unsqueeze(0)).logits.float().logsumexp(-1).sum().backward()
    optimizer.step()
    assert not same_bits(model.state_dict()["lm_head.weight"], expected["lm_head.weight"])
    assert equal(sllmctl.load_tensors(directory), expected)


WORKER = """
import sys
import torch
import torch.multiprocessing as mp
import sllmctl

def work(queue, tensors, sums):
    assert {name: tensor.double().sum().item() for name, tensor in tensors.items()} == sums
    tensors["lm_head.weight"].fill_(3)
    queue.put("done")

if __name__ == "__main__":
    torch.set_num_threads(1)  # a forked child has none of its parent's OpenMP threads
    tensors = sllmctl.load_tensors(sys.argv[1])
    sums = {name: tensor.double().sum().item() for name, tensor in tensors.items()}
    context = mp.get_context(sys.argv[2])
    queue = context.Queue()
    worker = context.Process(target=work, args=(queue, tensors, sums))
    worker.start()
    print(queue.get())
    worker.join()
    sys.exit(worker.exitcode)
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "dev", "-W", "error"]
    return subprocess.run(
        [*command, *arguments] if not code else [*command, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_worker_process_reads_the_tensors(directory: Path, method: str, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = run("", str(script), str(directory), method)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


EXITS = {
    "tensors first": "del tensors; gc.collect()",
    "modules first": "[sys.modules.pop(m) for m in list(sys.modules) if m.startswith('sllmctl')]",
    "at once": "import os; os._exit(0)",
    "in the hands of all that runs late": (
        "import atexit, threading\n"
        "atexit.register(lambda: tensors[name].sum().item())\n"
        "class Late:\n"
        "  def __del__(self, tensor=tensors[name]): tensor.sum()\n"
        "late = Late()\n"
        "cycle = [tensors, Late()]; cycle.append(cycle); del cycle\n"
        "main = threading.main_thread()\n"
        "threading.Thread(target=lambda: (main.join(), tensors[name].sum())).start()"
    ),
    "from a fork": (
        "import os\n"
        "torch.set_num_threads(1)\n"
        "child = os.fork()\n"
        "if child: assert os.waitpid(child, 0)[1] == 0\n"
        "tensors[name].add_(1)"
    ),
    "with a view left": (
        "view = tensors[name][1:]\n"
        "array = tensors['model.norm.weight'].view(dtype=torch.int16).numpy()\n"
        "del tensors"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", EXITS)
def test_an_interpreter_exits_quietly_in_any_order(directory: Path, way: str) -> None:
    start = (
        "import gc, sys, torch, sllmctl\n"
        "tensors = sllmctl.load_tensors(sys.argv[1])\n"
        "name = 'lm_head.weight'\n"
    )
    done = run(start + EXITS[way], str(directory))
    assert (done.returncode, done.stderr) == (0, "")
