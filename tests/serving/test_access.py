"""Who may use the server: the key, other machines, and the page, which asks for the key."""

from __future__ import annotations

import httpx
import openai
import pytest

from lit_gpt.__main__ import main
from lit_gpt.generation.sampling import Sampling
from tests.serving.servers import serving

KEY = "sk-Zm9vYmFy_42"


@pytest.fixture(scope="module")
def guarded(checkpoint, tmp_path_factory):
    argv = f"--ckpt_path={checkpoint}", "--host=0.0.0.0", f"--api_key={KEY}"
    with serving(*argv, folder=tmp_path_factory.mktemp("here")) as server:
        server.url = f"http://127.0.0.1:{server.port}"
        yield server


def test_clients_send_the_key(guarded, expected):
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0)
    answer = client.completions.create(model="version_7/best", prompt="ab", seed=1)
    assert answer.choices[0].text == expected("ab", 16, Sampling(1.0), 1)
    assert client.models.list().data[0].id == "version_7/best"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer none",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}x",
        f"Bearer {KEY.lower()}",
        f"Basic {KEY}",
        KEY,
        "Bearer ké".encode("latin-1"),
    ],
)
def test_others_are_refused(guarded, header):
    headers = {} if header is None else {"Authorization": header}
    for method, path in (
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/version_7/best"),
        ("GET", "/nothing"),
        ("GET", "//"),
    ):
        response = httpx.request(method, guarded.url + path, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert KEY not in response.text
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="none").models.list()


def test_it_is_compared_in_constant_time(monkeypatch):
    from lit_gpt.serving import access

    compared = []
    monkeypatch.setattr(access.hmac, "compare_digest", lambda *pair: compared.append(pair) or True)
    guard = access.KeyGuard(None, KEY)
    scope = {"type": "http", "path": "/v1/models", "headers": [(b"authorization", b"bEARER x")]}
    assert guard.error(scope) is None
    assert compared == [(b"x", KEY.encode())]


def test_the_key_may_be_in_the_environment(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_GPT_API_KEY", KEY)
    with serving(f"--ckpt_path={checkpoint}", folder=tmp_path) as server:
        assert server.post({"prompt": "a"}).status_code == 401
        assert server.post({"prompt": "a"}, Authorization=f"Bearer {KEY}").status_code == 200
        # The other protections stay.
        right = {"Authorization": f"Bearer {KEY}"}
        assert server.post({"prompt": "a"}, Host="evil.example", **right).status_code == 403
        assert server.post({"prompt": "a"}, Origin="http://evil", **right).status_code == 403
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_key_is_printed_nowhere(checkpoint, tmp_path, capfd):
    with pytest.raises(SystemExit, match="0"):
        main(["serve", f"--api_key={KEY}", "--port=0", "--print_config"])
    printed = capfd.readouterr().out
    assert "api_key: '*****" in printed
    assert KEY not in printed
    with serving(f"--ckpt_path={checkpoint}", f"--api_key={KEY}", folder=tmp_path) as server:
        page = httpx.get(server.url).text
    assert "API key" in page
    assert KEY not in page + server.line + capfd.readouterr().err


@pytest.mark.parametrize("key", ["", "a b", "ключ", "a\n"])
def test_a_key_that_cannot_be_sent(key, capsys):
    assert main(["serve", f"--api_key={key}", "--port=0"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --api_key: must be ASCII without spaces; python -c 'import")
    assert err.count("\n") == 1
    assert key.strip() == "" or key not in err


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_need_a_key_unless_it_is_meant(checkpoint, host, capsys, monkeypatch):
    monkeypatch.delenv("LIT_GPT_API_KEY", raising=False)
    assert main(["serve", f"--ckpt_path={checkpoint}", f"--host={host}", "--port=0"]) == 2
    assert capsys.readouterr().err == (
        f"error: --host {host!r}: lets everyone who can reach this machine use the model; "
        "give --api_key or set LIT_GPT_API_KEY; if that is intended, add --allow_anyone\n"
    )


def test_the_page_asks_for_the_key_once(guarded, browser, expected):
    from playwright.sync_api import expect

    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(guarded.url)
    page.fill("#prompt", "ab")
    page.fill("#seed", "1")
    page.fill("[name=temperature]", "1")
    page.fill("[name=max_tokens]", "16")
    page.fill("#key", "wrong")
    page.click("#write")
    expect(page.locator("#status.error")).to_contain_text("Incorrect API key", timeout=20_000)
    page.fill("#key", KEY)
    page.click("#write")
    expect(page.locator("#status")).to_contain_text("16 tokens in", timeout=20_000)
    assert page.text_content("#answer") == "ab" + expected("ab", 16, Sampling(1.0), 1)
    assert page.evaluate("({...sessionStorage})") == {"api_key": KEY}
    assert page.evaluate("localStorage.length") == 0
    page.reload()
    assert not page.is_visible("#key-field")
    page.fill("#prompt", "ab")
    page.click("#write")
    expect(page.locator("#status")).to_contain_text("tokens in", timeout=20_000)
    assert not any(KEY in url for url in asked)
    other = browser.new_context().new_page()  # another session is asked again
    other.goto(guarded.url)
    assert other.is_visible("#key-field")
