"""Which hub is asked, and what is said when one cannot be reached or refuses."""

from __future__ import annotations

import shutil
import socket
import threading

import pytest
from hub_server import NAME

from sllmctl.core.hub import fetch as hub_module
from sllmctl.core.hub.fetch import fetch
from sllmctl.errors import ConfigError, HubError

HUBS = ["huggingface", "modelscope"]


@pytest.fixture
def everywhere(hugging_face, modelscope, model):
    hugging_face.add(NAME, model)
    modelscope.add(NAME, model)


def test_auto_asks_hugging_face_alone_when_it_answers(everywhere, modelscope, caplog):
    assert fetch(NAME).hub == "huggingface"
    assert modelscope.requests == []
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("variable", "value"),
    [("SLLMCTL_HUB", "modelscope"), ("VLLM_USE_MODELSCOPE", "True"), ("VLLM_USE_MODELSCOPE", "1")],
)
def test_a_variable_chooses_modelscope(everywhere, hugging_face, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert fetch(NAME).hub == "modelscope"
    assert hugging_face.requests == []


def test_an_argument_goes_before_the_variables(everywhere, monkeypatch):
    monkeypatch.setenv("SLLMCTL_HUB", "modelscope")
    assert fetch(NAME, hub="huggingface").hub == "huggingface"
    monkeypatch.setenv("SLLMCTL_HUB", "huggingface")
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    assert fetch(NAME).hub == "huggingface"


def test_auto_moves_on_when_the_connection_is_refused(everywhere, dead_url, monkeypatch, caplog):
    monkeypatch.setenv("HF_ENDPOINT", dead_url)
    assert fetch(NAME).hub == "modelscope"
    assert "cannot reach Hugging Face" in caplog.text
    assert "ModelScope" in caplog.text


def test_auto_moves_on_when_the_name_does_not_resolve(everywhere, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert fetch(NAME).hub == "modelscope"


def test_auto_moves_on_when_no_answer_comes_in_time(everywhere, hugging_face, monkeypatch):
    hugging_face.trouble.silent = True
    monkeypatch.setattr(hub_module, "FALLBACK_DEADLINE_S", 1.0)
    assert fetch(NAME).hub == "modelscope"


def test_auto_moves_on_when_the_proxy_is_dead(everywhere, dead_url, monkeypatch, hugging_face):
    monkeypatch.setenv("HTTP_PROXY", dead_url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert fetch(NAME).hub == "modelscope"


def test_a_cached_copy_goes_before_another_hub(
    everywhere, dead_url, modelscope, monkeypatch, caplog
):
    first = fetch(NAME)
    monkeypatch.setenv("HF_ENDPOINT", dead_url)
    assert fetch(NAME) == first
    assert modelscope.requests == []
    assert "from its cache" in caplog.text


def test_auto_stays_with_hugging_face_on_404(modelscope, model, monkeypatch):
    modelscope.add(NAME, model)
    monkeypatch.setenv("HF_TOKEN", "hf_some")
    with pytest.raises(HubError, match=f"Hugging Face has no model `{NAME}`") as error:
        fetch(NAME)
    assert "--hub modelscope" in error.value.hint
    assert modelscope.requests == []


def test_auto_stays_with_hugging_face_on_401(modelscope, model):
    modelscope.add(NAME, model)
    with pytest.raises(HubError, match=f"no public model `{NAME}`") as error:
        fetch(NAME)
    assert "HF_TOKEN" in error.value.hint
    assert modelscope.requests == []


def test_auto_stays_with_hugging_face_for_a_gated_model(
    everywhere, hugging_face, modelscope, model
):
    hugging_face.add(NAME, model, gated=True)
    with pytest.raises(HubError, match="gated on Hugging Face") as error:
        fetch(NAME)
    assert f"{hugging_face.url}/{NAME}" in error.value.hint
    assert modelscope.requests == []


def test_auto_stays_with_hugging_face_for_a_revision(everywhere, dead_url, modelscope, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", dead_url)
    with pytest.raises(HubError, match=f"cannot reach Hugging Face at {dead_url}"):
        fetch(NAME, revision="main")
    assert modelscope.requests == []


def test_auto_stays_with_hugging_face_when_it_is_out_of_order(everywhere, hugging_face, modelscope):
    hugging_face.trouble.status = 503
    with pytest.raises(HubError, match="cannot serve"):
        fetch(NAME)
    assert modelscope.requests == []


def test_both_hubs_out_of_reach_are_both_named(dead_url, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", dead_url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", dead_url)
    with pytest.raises(HubError, match=r"cannot reach Hugging Face .* cannot reach ModelScope"):
        fetch(NAME)


@pytest.mark.parametrize(
    ("hub", "mirror"), list(zip(HUBS, ["HF_ENDPOINT", "MODELSCOPE_ENDPOINT"], strict=True))
)
def test_a_hub_out_of_reach_has_its_mirror_setting_named(hub, mirror, dead_url, monkeypatch):
    monkeypatch.setenv(mirror, dead_url)
    with pytest.raises(HubError, match=f"at {dead_url}: Connection refused") as error:
        fetch(NAME, hub=hub)
    assert mirror in error.value.hint


def test_a_model_unknown_to_modelscope_is_said(modelscope):
    with pytest.raises(HubError, match=f"ModelScope has no model `{NAME}`") as error:
        fetch(NAME, hub="modelscope")
    assert "--hub huggingface" in error.value.hint


def test_a_refused_modelscope_token_is_said(modelscope, model, monkeypatch):
    modelscope.add(NAME, model, token="right")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "wrong")
    with pytest.raises(HubError, match="ModelScope refused the access token") as error:
        fetch(NAME, hub="modelscope")
    assert "MODELSCOPE_API_TOKEN" in error.value.hint


def test_a_refused_token_points_to_the_login_that_exists(hugging_face, model, monkeypatch):
    hugging_face.add(NAME, model, token="right")
    monkeypatch.setenv("HF_TOKEN", "wrong-secret")
    monkeypatch.setattr(
        shutil,
        "which",
        lambda program, path=None: program if program == "huggingface-cli" else None,
    )
    with pytest.raises(HubError, match="refused the access token") as error:
        fetch(NAME, hub="huggingface")
    assert error.value.hint == "set HF_TOKEN, or run `huggingface-cli login`"
    assert "wrong-secret" not in f"{error.value}{error.value.hint}"


@pytest.mark.parametrize("hub", HUBS)
def test_a_dead_proxy_is_named_without_its_password(hub, dead_url, monkeypatch):
    address = dead_url.replace("http://", "http://user:pa55word@")
    monkeypatch.setenv("HTTP_PROXY", address)
    with pytest.raises(
        HubError, match=r"cannot reach .* proxy http://\*\*\*@.* \(HTTP_PROXY\)"
    ) as error:
        fetch(NAME, hub=hub)
    assert "NO_PROXY" in error.value.hint
    assert "pa55word" not in f"{error.value}{error.value.hint}"


@pytest.mark.parametrize("hub", HUBS)
def test_a_proxy_that_wants_a_login_is_named(hub, proxy, monkeypatch):
    proxy.refuse = 407
    monkeypatch.setenv("http_proxy", proxy.url)
    with pytest.raises(HubError, match=rf"the proxy {proxy.url} \(http_proxy\) refused"):
        fetch(NAME, hub=hub)


@pytest.mark.parametrize(
    ("hub", "setting"), list(zip(HUBS, ["HF_ENDPOINT", "MODELSCOPE_ENDPOINT"], strict=True))
)
def test_a_proxy_that_refuses_a_tunnel_is_named(hub, setting, proxy, monkeypatch):
    proxy.refuse = 403
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    monkeypatch.setenv(setting, "https://hub.invalid")
    with pytest.raises(HubError, match=rf"the proxy {proxy.url} \(HTTPS_PROXY\) refused"):
        fetch(NAME, hub=hub)


@pytest.mark.parametrize("hub", HUBS)
def test_a_proxy_that_works_is_used(hub, everywhere, proxy, monkeypatch, wanted):
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    assert list(fetch(NAME, hub=hub).files) == wanted
    assert len(proxy.forwarded) >= len(wanted)


@pytest.mark.parametrize("hub", HUBS)
def test_no_proxy_goes_around_a_dead_one(hub, everywhere, dead_url, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", dead_url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    assert fetch(NAME, hub=hub).hub == hub


@pytest.mark.parametrize(
    ("hub", "setting"), list(zip(HUBS, ["HF_ENDPOINT", "MODELSCOPE_ENDPOINT"], strict=True))
)
def test_a_failing_handshake_is_no_reason_to_ask_another_hub(
    hub, setting, everywhere, hugging_face, modelscope, monkeypatch
):
    # A server without TLS at an https address ends the handshake with an error of its own kind.
    server = {"huggingface": hugging_face, "modelscope": modelscope}[hub]
    monkeypatch.setenv(setting, server.url.replace("http:", "https:"))
    with pytest.raises(HubError, match="no secure connection") as error:
        fetch(NAME, hub="auto" if hub == "huggingface" else hub)
    assert "SSL_CERT_FILE" in error.value.hint


def test_auto_moves_on_when_the_handshake_is_cut_off(everywhere, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up():
            for _ in range(8):
                try:
                    listener.accept()[0].close()
                except OSError:
                    return

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"https://127.0.0.1:{listener.getsockname()[1]}")
        assert fetch(NAME).hub == "modelscope"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    assert not thread.is_alive()


def test_an_address_without_a_scheme_is_said(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.example")
    with pytest.raises(HubError, match="not the address of a hub"):
        fetch(NAME)


def test_a_missing_client_names_the_package(everywhere, monkeypatch, tmp_path):
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "modelscope_hub.py").write_text("raise ImportError('not here')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "shadow"))
    with pytest.raises(HubError, match="client cannot be loaded") as error:
        fetch(NAME, hub="modelscope")
    assert "pip install" in error.value.hint


def test_a_client_that_dies_is_told_from_one_that_fails(everywhere, monkeypatch, tmp_path):
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "modelscope_hub.py").write_text(
        "import os, signal, sys\nprint('last words', file=sys.stderr)\n"
        "os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "shadow"))
    with pytest.raises(HubError, match=r"stopped unexpectedly \(signal 11: last words\)"):
        fetch(NAME, hub="modelscope")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("hub", HUBS)
def test_offline_uses_the_cache_and_asks_nobody(
    variable, hub, everywhere, hugging_face, modelscope, monkeypatch
):
    first = fetch(NAME, hub=hub)
    monkeypatch.setenv(variable, "1")
    hugging_face.requests.clear()
    modelscope.requests.clear()
    assert fetch(NAME) == first
    assert fetch(NAME, hub=hub) == first
    assert hugging_face.requests + modelscope.requests == []


def test_offline_without_a_cached_copy_names_the_variable(everywhere, hugging_face, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids"):
        fetch(NAME)
    assert hugging_face.requests == []


def test_offline_switched_off_is_online(everywhere, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
    assert fetch(NAME).hub == "huggingface"


@pytest.mark.parametrize(
    "name",
    ["gpt2", "a/b/c", "../etc/passwd", "a/..", "a/b--c", "a/.b", "-a/b", "a/b.git", "a/b c", "a/"],
)
def test_what_is_no_name_is_refused_before_anything_is_asked(name, hugging_face):
    with pytest.raises(ConfigError, match="not a model name"):
        fetch(name)
    assert hugging_face.requests == []


def test_an_unknown_hub_is_refused_with_its_source(monkeypatch):
    with pytest.raises(ConfigError, match="--hub: `civitai`"):
        fetch(NAME, hub="civitai")
    monkeypatch.setenv("SLLMCTL_HUB", "civitai")
    with pytest.raises(ConfigError, match="SLLMCTL_HUB: `civitai`"):
        fetch(NAME)


@pytest.mark.parametrize("revision", ["", "../main", "a..b", "/main", "a b", "-x"])
def test_what_is_no_revision_is_refused(revision):
    with pytest.raises(ConfigError, match="not a revision"):
        fetch(NAME, revision=revision)
