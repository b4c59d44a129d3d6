"""Finding models in the hubs' caches by looking."""

from __future__ import annotations

import json

import pytest
from hub_server import NAME

from sllmctl.core.hub.cache import cache_root, find_snapshot
from sllmctl.core.hub.fetch import find_cached

COMMIT = "0123456789" * 4
WHOLE = {"config.json": "{}", "model.safetensors": "weights"}


def put(folder, files=WHOLE):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def put_hugging_face(commit=COMMIT, ref="main", files=WHOLE):
    repository = cache_root("huggingface") / "models--acme--tiny-1.5b"
    if ref is not None:
        put(repository / "refs", {ref: commit})
    return put(repository / "snapshots" / commit, files)


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert find_cached(NAME) is None
    assert not (tmp_path / "hf").exists()


def test_the_branch_names_the_hugging_face_snapshot():
    put_hugging_face("f" * 40, "v2")
    folder = put_hugging_face()
    assert find_cached(NAME) == folder
    assert find_snapshot(NAME, "huggingface", "v2").name == "f" * 40
    assert find_snapshot(NAME, "huggingface", COMMIT) == folder
    assert find_snapshot(NAME, "huggingface", "v3") is None


def test_a_snapshot_without_a_branch_is_found():
    folder = put_hugging_face(ref=None)
    assert find_cached(NAME) == folder


def test_a_snapshot_that_misses_a_shard_is_none():
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    files = {"model.safetensors.index.json": index, "model-1.safetensors": ""}
    folder = put_hugging_face(files=files)
    assert find_cached(NAME) is None
    put(folder, {"model-2.safetensors": ""})
    assert find_cached(NAME) == folder


def test_shard_names_alone_tell_that_one_is_missing():
    folder = put_hugging_face(files={"pytorch_model-00002-of-00002.bin": ""})
    assert find_cached(NAME) is None
    put(folder, {"pytorch_model-00001-of-00002.bin": ""})
    assert find_cached(NAME) == folder


def test_a_snapshot_without_weights_is_none():
    put_hugging_face(files={"config.json": "{}"})
    assert find_cached(NAME) is None


def test_a_dangling_link_is_no_file():
    folder = put_hugging_face(files={"config.json": "{}"})
    (folder / "model.safetensors").symlink_to("../../blobs/gone")
    assert find_cached(NAME) is None


@pytest.mark.parametrize(
    "place",
    [
        "models/acme--tiny-1.5b/snapshots/master",
        "models/acme--tiny-1.5b/snapshots/v1",
        "models/acme/tiny-1___5b",
        "hub/models/acme/tiny-1___5b",
    ],
)
def test_every_modelscope_layout_is_found(place):
    folder = put(cache_root("modelscope") / place)
    assert find_cached(NAME) == folder


def test_a_modelscope_revision_is_looked_up_by_name():
    snapshots = cache_root("modelscope") / "models" / "acme--tiny-1.5b" / "snapshots"
    put(snapshots / "master")
    folder = put(snapshots / "v1")
    assert find_snapshot(NAME, "modelscope", "v1") == folder
    assert find_snapshot(NAME, "modelscope", "v2") is None


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "../x", "..//x"])
def test_what_is_no_name_is_not_looked_up(name):
    assert find_cached(name) is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"HF_HUB_CACHE": "/c/hub", "HF_HOME": "/c"}, "/c/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
        ({"HF_HOME": "$BASE/hf", "BASE": "/base"}, "/base/hf/hub"),
        ({"HF_HOME": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/huggingface/hub"),
        ({"HF_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_client_puts_it(settings, expected, monkeypatch):
    for variable, value in settings.items():
        monkeypatch.setenv(variable, value)
    assert str(cache_root("huggingface")) == expected
