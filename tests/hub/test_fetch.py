"""Downloads with both real clients from a local server."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hub_server import MIB, NAME, content

from sllmctl.core.hub.cache import cache_root
from sllmctl.core.hub.fetch import fetch, find_cached
from sllmctl.errors import HubError

HUBS = ["huggingface", "modelscope"]
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def servers(hugging_face, modelscope):
    return {"huggingface": hugging_face, "modelscope": modelscope}


@pytest.mark.parametrize("hub", HUBS)
def test_the_needed_files_arrive_whole_and_no_others(hub, servers, model, wanted):
    servers[hub].add(NAME, model)
    steps = []
    download = fetch(NAME, hub=hub, progress=lambda *step: steps.append(step))
    assert (download.hub, download.name, list(download.files)) == (hub, NAME, wanted)
    assert servers[hub].fetched == set(wanted)
    for name in wanted:
        assert (download.path / name).read_bytes() == model[name]
    total = sum(len(model[name]) for name in wanted)
    assert steps[-1] == ("download", total, total)
    assert [step[1] for step in steps] == sorted(step[1] for step in steps)
    assert {(stage, of) for stage, _, of in steps} == {("download", total)}
    assert find_cached(NAME) == download.path


@pytest.mark.parametrize("hub", HUBS)
def test_a_second_fetch_transfers_nothing(hub, servers, model):
    servers[hub].add(NAME, model)
    first = fetch(NAME, hub=hub)
    before = dict(servers[hub].bytes_sent)
    steps = []
    assert fetch(NAME, hub=hub, progress=lambda *step: steps.append(step)) == first
    assert servers[hub].bytes_sent == before
    assert steps[0][1] == steps[0][2]


@pytest.mark.parametrize("hub", HUBS)
def test_patterns_narrow_what_is_fetched(hub, servers, model):
    servers[hub].add(NAME, model)
    download = fetch(
        NAME, hub=hub, include=["*.json", "*.bin"], exclude=["tokenizer/*", "*.index.json"]
    )
    assert list(download.files) == ["config.json", "pytorch_model.bin"]
    assert servers[hub].fetched - {"model.safetensors.index.json"} == set(download.files)


@pytest.mark.parametrize("hub", HUBS)
def test_a_file_whose_name_looks_like_a_pattern_is_fetched(hub, servers, model):
    odd = {"notes [1].txt": b"one", "chat*.json": b"{}", "a?.json": b"{}", "größe +&.txt": b"x"}
    servers[hub].add(NAME, {**model, **odd, "notes 1.txt": b"other"})
    download = fetch(NAME, hub=hub, exclude=["*.safetensors", "*.bin", "notes 1.txt"])
    for name, text in odd.items():
        assert (download.path / name).read_bytes() == text
    assert "notes 1.txt" not in servers[hub].fetched


@pytest.mark.parametrize("hub", HUBS)
def test_patterns_that_leave_nothing_are_named(hub, servers, model):
    servers[hub].add(NAME, model)
    with pytest.raises(HubError, match=r"no file of `acme/tiny-1.5b` .* --include \*\.gguf"):
        fetch(NAME, hub=hub, include=["*.gguf"])


@pytest.mark.parametrize("hub", HUBS)
def test_a_revision_is_fetched_and_a_wrong_one_named(hub, servers, model):
    servers[hub].add(NAME, model, branches=("main", "master", "v1.0"))
    download = fetch(NAME, hub=hub, revision="v1.0", include=["config.json"])
    assert (download.path / "config.json").read_bytes() == model["config.json"]
    with pytest.raises(HubError, match=r"revision `v2\.0`"):
        fetch(NAME, hub=hub, revision="v2.0")


def test_hugging_face_reports_the_commit_and_notes_it_for_the_branch(hugging_face, model):
    repository = hugging_face.add(NAME, model)
    download = fetch(NAME, hub="huggingface")
    assert download.revision == repository.commit
    ref = cache_root("huggingface") / "models--acme--tiny-1.5b" / "refs" / "main"
    assert ref.read_text() == repository.commit


@pytest.mark.parametrize("hub", HUBS)
def test_a_new_version_replaces_the_cached_one(hub, servers, model):
    servers[hub].add(NAME, model)
    fetch(NAME, hub=hub)
    newer = {**model, SHARD: content(6 * MIB, 99)}
    servers[hub].add(NAME, newer, commit="beef" * 10)
    assert (fetch(NAME, hub=hub).path / SHARD).read_bytes() == newer[SHARD]


@pytest.mark.parametrize("hub", HUBS)
def test_a_cut_connection_is_resumed_within_the_download(hub, servers, model):
    server = servers[hub]
    server.add(NAME, model)
    server.trouble.cut_at[SHARD] = [4 * MIB]
    download = fetch(NAME, hub=hub)
    assert (download.path / SHARD).read_bytes() == model[SHARD]
    assert len(server.ranges[SHARD]) == 2
    # A chunk of at most 1 MiB is lost with the connection.
    assert server.bytes_sent[SHARD] <= len(model[SHARD]) + MIB


@pytest.mark.parametrize("hub", HUBS)
def test_a_broken_off_download_goes_on_in_the_next_run(hub, servers, model, monkeypatch):
    server = servers[hub]
    server.add(NAME, model)
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "0")
    server.trouble.stall_at[SHARD] = 4 * MIB

    def stop_once_stalled(stage, done_bytes, total_bytes):
        if server.stalled.is_set() and done_bytes >= 9 * MIB:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, hub=hub, progress=stop_once_stalled)
    server.trouble.stall_at.clear()
    steps = []
    download = fetch(NAME, hub=hub, progress=lambda *step: steps.append(step))
    assert (download.path / SHARD).read_bytes() == model[SHARD]
    assert steps[0][1] >= 9 * MIB
    assert server.bytes_sent[SHARD] <= len(model[SHARD]) + MIB
    assert server.ranges[SHARD][-1] is not None
    assert not list(cache_root(hub).rglob("*.incomplete"))


def test_a_damaged_partial_file_is_found_and_fetched_again(hugging_face, model):
    hugging_face.add(NAME, model)
    fetch(NAME, hub="huggingface", exclude=[SHARD])
    blobs = cache_root("huggingface") / "models--acme--tiny-1.5b" / "blobs"
    with_digest = {path.name for path in blobs.iterdir()}
    download = fetch(NAME, hub="huggingface")
    (digest,) = {path.name for path in blobs.iterdir()} - with_digest
    (download.path / SHARD).unlink()
    (blobs / digest).unlink()
    (blobs / f"{digest}.sllmctl.incomplete").write_bytes(bytes(3 * MIB))
    assert (fetch(NAME, hub="huggingface").path / SHARD).read_bytes() == model[SHARD]


@pytest.mark.parametrize("hub", HUBS)
def test_a_download_that_cannot_go_on_says_how_far_it_came(hub, servers, model, monkeypatch):
    server = servers[hub]
    server.add(NAME, model)
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "0")

    def break_off(stage, done_bytes, total_bytes):
        server.trouble.status = 503

    with pytest.raises(HubError, match=r"broke off at .* of 12\.6 MB") as error:
        fetch(NAME, hub=hub, include=["model-*"], progress=break_off)
    assert "again" in error.value.hint


@pytest.mark.parametrize("hub", HUBS)
def test_a_disk_too_small_is_said_before_the_first_byte(hub, servers, model):
    servers[hub].add(NAME, model)
    asked = []

    def free_bytes(folder):
        asked.append(folder)
        return 5_000_000

    with pytest.raises(HubError, match=r"needs 12\.6 MB and .* has 5 MB free") as error:
        fetch(NAME, hub=hub, free_bytes=free_bytes)
    setting = {"huggingface": "HF_HOME", "modelscope": "MODELSCOPE_CACHE"}[hub]
    assert setting in error.value.hint
    assert cache_root(hub).is_relative_to(asked[0])
    assert servers[hub].fetched <= {"model.safetensors.index.json"}


@pytest.mark.parametrize("hub", HUBS)
def test_bytes_already_there_need_no_room(hub, servers, model):
    servers[hub].add(NAME, model)
    fetch(NAME, hub=hub, exclude=[SHARD])
    fetch(NAME, hub=hub, free_bytes=lambda _: len(model[SHARD]))


def test_the_token_opens_a_private_model_and_stays_with_the_hub(hugging_face, model, monkeypatch):
    hugging_face.add(NAME, model, token="hf_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(NAME, hub="huggingface")
    assert hugging_face.tokens_at_storage == {None}


def test_the_modelscope_token_opens_a_private_model(modelscope, model, monkeypatch):
    modelscope.add(NAME, model, token="ms-secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    assert fetch(NAME, hub="modelscope").hub == "modelscope"


@pytest.mark.parametrize("hub", HUBS)
def test_a_listing_with_an_unsafe_name_is_refused(hub, servers, model, tmp_path):
    servers[hub].add(NAME, {**model, "../../../../escaped.json": b"{}"})
    with pytest.raises(HubError, match="unsafe name"):
        fetch(NAME, hub=hub)
    assert not list(tmp_path.rglob("escaped.json"))


def test_the_clients_stay_out_of_the_process_that_fetches(hugging_face, model):
    hugging_face.add(NAME, model)
    code = (
        "import json, sys; from sllmctl.core.hub.fetch import fetch;"
        f"fetch({NAME!r}, hub='huggingface'); print(json.dumps(sorted(sys.modules)))"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
        timeout=60,
    ).stdout
    assert not {"huggingface_hub", "modelscope_hub", "torch", "requests"} & set(json.loads(output))
