"""HUB: where models come from, and whether the one that is asked for is whole."""

from __future__ import annotations

import os
import posixpath

from sllmctl.core.config import is_true
from sllmctl.doctor.check import Finding, check, dist, env, fail, file, ok, say, skip, warn
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.probe import parse_json

_POINTER = "version https://git-lfs"


@check(
    "HUB001",
    title="the settings of the hubs are right",
    why="a wrong endpoint fails far from here, with a time-out",
    looks_at="HF_ENDPOINT; VLLM_USE_MODELSCOPE and SGLANG_USE_MODELSCOPE with modelscope installed",
    profiles="base convert",
)
def settings(m: Machine) -> Finding:
    endpoint = m.env.get("HF_ENDPOINT", "")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        return fail(
            say("HF_ENDPOINT has no scheme"),
            env("HF_ENDPOINT", endpoint),
            fix=f"export HF_ENDPOINT=https://{endpoint}",
        )
    if endpoint.endswith("/"):
        return warn(
            say("HF_ENDPOINT ends with a slash"),
            env("HF_ENDPOINT", endpoint),
            fix=f"export HF_ENDPOINT={endpoint.rstrip('/')}",
        )
    for name in ("VLLM_USE_MODELSCOPE", "SGLANG_USE_MODELSCOPE"):
        if is_true(m.env.get(name)) and not m.dists.get("modelscope"):
            return fail(
                say("{name} is set, but modelscope is not installed", name=name),
                env(name, m.env[name]),
                dist("modelscope", "missing"),
                fix="pip install modelscope",
            )
    return ok(say("the settings of the hubs are right"))


def hub_cache(m: Machine) -> str:
    """Where downloads of the Hugging Face hub are kept."""
    home = m.env.get("HF_HOME") or f"{m.probe.host.home}/.cache/huggingface"
    return m.env.get("HF_HUB_CACHE") or f"{home}/hub"


def _is_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith(("/", ".", "~"))


@check(
    "HUB002",
    title="the hub's cache can be used, and offline has the model",
    why="a download goes to the cache; offline, a model that is not there cannot be loaded",
    looks_at="write access to HF_HUB_CACHE, HF_HOME or ~/.cache/huggingface; HF_HUB_OFFLINE and "
    "TRANSFORMERS_OFFLINE, and the cache for --model",
    profiles="base convert",
)
def offline(m: Machine) -> Finding:
    on = [n for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if is_true(m.env.get(n))]
    model = m.options.model
    cache = hub_cache(m)
    place = m.nearest(cache)
    if not on and place and not m.probe.may(place, os.W_OK | os.X_OK):
        return warn(
            say("downloads cannot be kept: this user may not write to {path}", path=place),
            file(place, "no write access"),
            fix="export HF_HOME=/a/directory/of/yours",
        )
    if not on or not _is_id(model) or m.model_path:
        return ok(say("nothing is asked of a hub that is switched off"))
    path = f"{cache}/models--{model.replace('/', '--')}"
    if m.probe.listdir(f"{path}/snapshots"):
        return ok(say("{model} is in the cache", model=model), file(path))
    return fail(
        say("{model} is not in the cache, and {name} forbids fetching it", model=model, name=on[0]),
        env(on[0], m.env[on[0]]),
        file(path, "missing"),
        fix=f"{on[0]}=0 sllmctl convert {model}",
    )


@check(
    "HUB003",
    title="the model's directory is there and whole",
    why="a relative path that does not exist is taken for a hub name",
    looks_at="--model: the path, or the name below the storage path; config.json, every shard of "
    "the index, and files that are only pointers of git-lfs",
    profiles="base convert",
)
def model_path(m: Machine) -> Finding:
    model = m.options.model
    if not model:
        return skip(say("--model was not given"))
    path = m.model_path
    if not path:
        path = posixpath.join(m.probe.host.cwd, model)
        elsewhere = posixpath.join(m.probe.host.home, model)
        if not model.startswith(("/", "~")) and m.probe.is_dir(elsewhere):
            return warn(
                say("{model} is relative, and not there from here", model=model),
                file(path, "missing"),
                file(elsewhere, "there"),
                fix=f"export MODEL_PATH={elsewhere}  # give the absolute path",
            )
        if m.probe.exists(path):
            return fail(
                say("{path} is a file, not the directory of a model", path=path),
                file(path),
                advice=say("give the directory that the file lies in"),
            )
        if _is_id(model):
            return ok(say("{model} is a hub name", model=model))
        return fail(
            say("there is no {path}", path=path),
            file(path, "missing"),
            advice=say("give the absolute path of the model"),
        )
    if not m.probe.exists(f"{path}/config.json"):
        return fail(
            say("the model has no config.json"),
            file(f"{path}/config.json", "missing"),
            advice=say("download the model again, with its configuration"),
        )
    shards, unreadable = _shards(m, path)
    if unreadable:
        return fail(
            say("{path} cannot be read", path=unreadable),
            file(unreadable),
            advice=say("finish the download"),
        )
    missing = [name for name in shards if not m.probe.exists(f"{path}/{name}")]
    if missing:
        return fail(
            say("{count} of {total} shards are missing: {name}",
                count=len(missing), total=len(shards), name=missing[0]),
            *(file(f"{path}/{name}", "missing") for name in missing[:4]),
            advice=say("finish the download"),
        )  # fmt: skip
    for name in shards:
        node = m.probe.stat(f"{path}/{name}")
        text = m.probe.read_text(f"{path}/{name}", 200) if node and node.size < 200 else ""
        if text and text.startswith(_POINTER):
            return fail(
                say("{name} is a pointer of git-lfs, not the file", name=name),
                file(f"{path}/{name}", f"{node.size if node else 0} bytes"),
                fix=f"git -C {path} lfs pull",
            )
    return ok(say("the model's directory is whole"), file(path))


def _shards(m: Machine, path: str) -> tuple[list[str], str]:
    """The shards that are there or should be, and an index that cannot be read, or ""."""
    names = [n for n in m.probe.listdir(path) if n.endswith(".safetensors")]
    for index in m.probe.glob(f"{path}/*.safetensors.index.json"):
        document = parse_json(m.probe.read_text(index, 64 << 20) or "")
        listed = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(listed, dict):
            return [], index
        names += [name for name in listed.values() if isinstance(name, str)]
    return sorted(set(names)), ""
