"""The server: the official openai client, curl, raw sockets and Chromium talk to a real one."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import openai
import pytest
import torch

from lit_gpt.__main__ import main
from lit_gpt.checkpoint import load_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.generation.completion import Request
from lit_gpt.generation.sampling import Sampling
from lit_gpt.serving.batching import Batcher, Failure
from lit_gpt.serving.serve import listen
from tests.serving.servers import LONG, serving


def test_it_prints_what_it_serves_and_where(server, client, checkpoint):
    assert server.line == f"Serving {checkpoint} at http://127.0.0.1:{server.port} (Ctrl-C stops)\n"
    assert [model.id for model in client.models.list()] == ["version_7/best"]
    assert client.models.retrieve("version_7/best").owned_by == "lit_gpt"
    with pytest.raises(openai.NotFoundError, match=r"'gpt-4' not found, .* has 'version_7/best'"):
        client.models.retrieve("gpt-4")


def test_the_text_is_what_generate_writes(client, checkpoint, capsys):
    options = ["--prompt=猫 sat", "--max_new_tokens=40", "--temperature=0.9", "--seed=5", "--json"]
    assert main(["generate", f"--ckpt_path={checkpoint}", *options]) == 0
    printed = capsys.readouterr().out
    answer = client.completions.create(
        model="version_7/best", prompt="猫 sat", max_tokens=40, temperature=0.9, seed=5
    )
    assert answer.choices[0].text == json.loads(printed)["text"]
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 40)
    assert answer.usage.total_tokens == 47
    assert (answer.object, answer.model) == ("text_completion", "version_7/best")
    openai.types.Completion.model_validate(answer.to_dict(), strict=True)


def test_the_defaults_are_those_of_openai(client, expected):
    """16 tokens at temperature 1, with a new seed each time."""
    answer = client.completions.create(model="version_7/best", prompt="ab", seed=1)
    assert answer.choices[0].text == expected("ab", 16, Sampling(1.0), 1)
    prompts = ["ab"] * 6
    answer = client.completions.create(model="version_7/best", prompt=prompts, max_tokens=30)
    assert len({choice.text for choice in answer.choices}) == 6


def test_a_stream_is_the_same_text_in_parts(client, expected):
    options = {"prompt": "the 猫", "max_tokens": 60, "seed": 8, "n": 2}
    parts, texts, reasons = [], ["", ""], [None, None]
    with client.completions.create(
        model="version_7/best", stream=True, stream_options={"include_usage": True}, **options
    ) as stream:
        for chunk in stream:
            parts.append(chunk)
            for choice in chunk.choices:
                assert reasons[choice.index] is None
                texts[choice.index] += choice.text
                reasons[choice.index] = choice.finish_reason
    assert texts == [expected("the 猫", 60, Sampling(1.0), seed) for seed in (8, 9)]
    assert reasons == ["length", "length"]
    assert len(parts) > 40
    assert len({part.id for part in parts}) == 1
    assert parts[-1].choices == []
    assert parts[-1].usage.completion_tokens == 120
    assert {part.usage for part in parts[:-1]} == {None}


def test_several_prompts_with_several_choices_each(client, expected):
    answer = client.completions.create(
        model="version_7/best", prompt=["a", "", "甲乙"], n=2, seed=3, max_tokens=20
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [
        expected(prompt, 20, Sampling(1.0), seed) for prompt in ("a", "", "甲乙") for seed in (3, 4)
    ]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1 + 1 + 6, 120)


def test_stops_and_echo(client, expected):
    text = expected("ab", 40, Sampling(1.0), 2)
    stop = text[10:12]
    for stream in (False, True):
        answer = client.completions.create(
            model="version_7/best", prompt="ab", max_tokens=40, seed=2, stream=stream,
            stop=[stop, "never"], echo=True,
        )  # fmt: skip
        choices = [part.choices[0] for part in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == "ab" + text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_a_tiny_top_p_takes_the_likeliest(client, expected):
    answer = client.completions.create(model="version_7/best", prompt="ab", top_p=1e-50)
    assert answer.choices[0].text == expected("ab", 16, Sampling(0), 1)


def test_options_beyond_openais(client, expected):
    extra = {"top_k": 5, "min_p": 0.2, "repetition_penalty": 1.5}
    answer = client.completions.create(
        model="version_7/best", prompt="ab", max_tokens=30, seed=2, temperature=1.5, top_p=0.9,
        extra_body=extra,
    )  # fmt: skip
    assert answer.choices[0].text == expected("ab", 30, Sampling(1.5, 5, 0.9, 1.5, 0.2), 2)
    assert answer.choices[0].text != expected("ab", 30, Sampling(1.5, None, 0.9), 2)
    plain = {"logprobs": None, "best_of": 1, "logit_bias": {}, "suffix": None, "user": "me"}
    answer = client.completions.create(
        model="version_7/best", prompt="ab", seed=1, presence_penalty=0, **plain
    )
    assert answer.choices[0].text == expected("ab", 16, Sampling(1.0), 1)


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"logprobs": 6}, "logprobs", "logprobs: Input should be less than or equal to 5"),
        ({"logprobs": True}, "logprobs", "logprobs: Input should be a valid integer"),
        ({"suffix": "x"}, "suffix", "suffix: Not supported by this server: leave it out"),
        ({"best_of": 2}, "best_of", "best_of: Not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias: Not supported"),
        ({"presence_penalty": 2.1}, "presence_penalty", r"must be in \[-2, 2\]"),
        ({"frequency_penalty": -3}, "frequency_penalty", r"must be in \[-2, 2\]"),
        ({"extra_body": {"tpo_p": 1}}, "tpo_p", "tpo_p: Extra inputs are not permitted"),
        ({"temperature": -1}, "temperature", r"temperature -1.0: must be in \[0, 1e6\]"),
        ({"temperature": 1e39}, "temperature", r"temperature 1e\+39: must be in \[0, 1e6\]"),
        ({"temperature": "hot"}, "temperature", "temperature: Input should be a valid number"),
        ({"top_p": 0}, "top_p", r"top_p 0.0: must be in \(0, 1\]"),
        ({"extra_body": {"min_p": 2}}, "min_p", r"min_p 2.0: must be in \[0, 1\]"),
        ({"extra_body": {"top_k": 0}}, "top_k", "top_k 0: must be at least 1"),
        ({"extra_body": {"top_k": 1.5}}, "top_k", "top_k: Input should be a valid integer"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty", "must be in"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens 0: must be at least 1"),
        ({"max_tokens": True}, "max_tokens", "max_tokens: Input should be a valid integer"),
        ({"max_tokens": LONG + 1}, "max_tokens", f"must be at most {LONG}, not {LONG + 1}"),
        ({"n": 0}, "n", "n: Input should be greater than or equal to 1"),
        ({"n": 65}, "n", "n: asks for 65 completions, at most 64 can run at a time"),
        ({"prompt": ["a"] * 65}, "prompt", "prompt: asks for 65 completions, at most 64"),
        ({"prompt": ["a"] * 2048, "n": 128}, "n", "n: asks for 262144 completions"),
        ({"prompt": ["a"] * 2049}, "prompt", "prompt: List should have at most 2048 prompts"),
        ({"seed": -1}, "seed", r"seed .*: must be in \[0, 2\*\*63\)"),
        ({"seed": 2**63 - 1, "n": 2}, "seed", r"seed .*: must be in \[0, 2\*\*63\)"),
        ({"stop": ""}, "stop", "stop: must not be empty"),
        ({"stop": list("abcdefghijklmnopq")}, "stop", "at most 16 items"),
        ({"stream_options": {"what": 1}}, "stream_options", "stream_options.what: Extra inputs"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [1, 256]}, "prompt", r"prompt: token id 256 must be in \[0, 256\)"),
        ({"prompt": [[1], [-1]]}, "prompt", r"prompt: token id -1 must be in \[0, 256\)"),
        ({"prompt": [[1], "a"]}, "prompt", "prompt: Input should be a valid text, token ids, or"),
        ({"prompt": [1, 2.5]}, "prompt", "prompt: Input should be a valid text, token ids, or"),
        ({"prompt": [[]]}, "prompt", "at least 1 item"),
        ({"prompt": None}, "prompt", "prompt: Field required"),
        ({"prompt": {"a": 1}}, "prompt", "prompt: Input should be a valid "),
    ],
)  # fmt: skip
def test_errors_name_the_parameter(client, options, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.completions.create(**{"model": "version_7/best", "prompt": "a"} | options)
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")


def test_a_prompt_that_is_too_long(client, expected):
    long = "猫" * 21 + "a"  # 64 bytes
    answer = client.completions.create(model="version_7/best", prompt=long, seed=1)
    assert answer.choices[0].text == expected(long, 16, Sampling(1.0), 1)
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="has 65 tokens, at most 64") as refused:
            client.completions.create(
                model="version_7/best", prompt=["a", long + "b"], stream=stream
            )
        assert refused.value.code == "context_length_exceeded"
        assert refused.value.param == "prompt"


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="this server has 'version_7/best'") as refused:
        client.completions.create(model="gpt-3.5-turbo-instruct", prompt="a")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("{", 400, "The body must be a JSON object: Invalid JSON: EOF"),
        ("", 400, "Invalid JSON"),
        ("[1]", 400, "The body must be a JSON object"),
        (b'{"prompt": "\xff"}', 400, "Invalid JSON"),
        ('{"prompt": "a\\ud800"}', 400, "Invalid JSON"),
        ('{"prompt": "a", "temperature": NaN}', 400, "temperature"),
        ('{"prompt": "a", "temperature": 1e999}', 400, "temperature inf: must be in [0, 1e6]"),
        ('{"prompt": ' + "[" * 100_000, 400, "Invalid JSON: recursion limit"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", 400, "number out of range"),
        ('{"prompt": "' + "a" * (1 << 20) + '"}', 413, "more than 1,048,576 bytes"),
        ('{"prompt": "' + "a" * (1 << 23) + '"}', 413, "more than 1,048,576 bytes"),
    ],
)  # fmt: skip
def test_malformed_and_large_bodies(server, body, status, message):
    response = server.post(body)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert message in response.json()["error"]["message"]


def test_other_paths_and_methods(server):
    response = httpx.get(f"{server.url}/v1/embeddings")
    assert response.status_code == 404
    assert response.json()["error"]["message"].startswith("GET /v1/embeddings: Not Found")
    response = httpx.get(f"{server.url}/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_gets_the_text_exactly(server, expected):
    """A prompt in several scripts, with characters that JSON and HTML escape."""
    prompt = 'naïve "猫" \\ <b>&\t\x00 🙂\n'
    body = json.dumps({"prompt": prompt, "seed": 4, "max_tokens": 50, "echo": True})
    command = ["curl", "-sS", f"{server.url}/v1/completions", "-d", body]
    answer = json.loads(subprocess.run(command, capture_output=True, timeout=60).stdout)
    text = prompt + expected(prompt, 50, Sampling(1.0), 4)
    assert answer["choices"][0]["text"] == text
    body = json.dumps({**json.loads(body), "stream": True})
    streamed = subprocess.run([*command[:-1], body], capture_output=True, timeout=60).stdout
    lines = streamed.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    parts = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(part["choices"][0]["text"] for part in parts) == text


def test_50_concurrent_requests_get_what_each_would_alone(server, client, expected):
    def ask(i: int) -> str:
        options = {"prompt": f"{i}: " + "ab" * (i % 9), "max_tokens": 20 + i % 30, "seed": i}
        options |= {"temperature": 0.5 + i % 3 / 2, "stream": i % 2 == 1}
        answer = client.completions.create(model="version_7/best", **options)
        parts = answer if i % 2 else [answer]
        return "".join(part.choices[0].text for part in parts)

    with ThreadPoolExecutor(50) as pool:
        texts = list(pool.map(ask, range(50)))
    assert texts == [
        expected(f"{i}: " + "ab" * (i % 9), 20 + i % 30, Sampling(0.5 + i % 3 / 2), i)
        for i in range(50)
    ]
    assert server.counts() == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_place(server, expected, stream):
    """While others are served, and also while it waits for its turn."""
    body = {"prompt": "a", "max_tokens": LONG, "stream": stream}
    with closing(server.hang_up({**body, "n": 40})) as many, closing(server.hang_up(body)) as one:
        server.wait_for((32, 9))
        one.close()
        server.wait_for((32, 8))
        many.close()
        server.wait_for((0, 0))
    answer = server.post({"prompt": "ab", "seed": 1}).json()
    assert answer["choices"][0]["text"] == expected("ab", 16, Sampling(1.0), 1)


def test_a_disconnect_leaves_other_requests_running(server, client, expected):
    with client.completions.create(
        model="version_7/best", prompt="ab", max_tokens=1000, seed=1, stream=True
    ) as stream:
        text = next(stream).choices[0].text
        with closing(server.hang_up({"prompt": "a", "max_tokens": LONG, "n": 3})):
            server.wait_for((4, 0))
        text += "".join(part.choices[0].text for part in stream)
    assert text == expected("ab", 1000, Sampling(1.0), 1)


def test_a_short_request_does_not_wait_for_a_long_one(server, expected):
    with closing(server.hang_up({"prompt": "a", "max_tokens": LONG})):
        server.wait_for((1, 0))
        answer = server.post({"prompt": "ab", "seed": 1}).json()
        assert answer["choices"][0]["text"] == expected("ab", 16, Sampling(1.0), 1)
        assert server.counts() == (1, 0)
    server.wait_for((0, 0))


def test_a_client_that_disconnects_while_sending(server):
    """The server prints nothing about it, which the `server` fixture checks at its end."""
    with closing(socket.create_connection(("127.0.0.1", server.port))) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"
        connection.sendall(head + b'{"prompt')
        time.sleep(0.1)
    assert server.counts() == (0, 0)


def test_too_many_requests_are_told_to_retry(checkpoint, tmp_path, expected):
    argv = "--max_concurrent=3", "--max_batch_size=2", "--max_prompt_tokens=4"
    with serving(f"--ckpt_path={checkpoint}", *argv, folder=tmp_path) as server:
        ask = {"prompt": "ab", "max_tokens": 2048, "seed": 1}
        with closing(server.hang_up({**ask, "n": 3})):
            server.wait_for((2, 1))
            with pytest.raises(openai.RateLimitError, match="3 of at most 3 requests") as refused:
                server.client().completions.create(model="version_7/best", prompt="a")
            assert refused.value.response.headers["retry-after"] == "1"
        server.wait_for((0, 0))
        ask["max_tokens"] = 200
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: server.post(ask), range(12)))
        right = [answer.json() for answer in answers if answer.status_code == 200]
        text = expected("ab", 200, Sampling(1.0), 1)
        assert [answer["choices"][0]["text"] for answer in right] == [text] * len(right)
        assert {answer.status_code for answer in answers} <= {200, 429}
        assert len(right) >= 3
        # The client retries until there is room.
        patient = server.client().with_options(max_retries=20)
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(patient.completions.create, model="version_7/best", **ask)] * 6
            assert {answer.result().choices[0].text for answer in asked} == {text}
        assert "has 5 tokens, at most 4" in server.post({"prompt": "abcde"}).text
        assert (
            "must be at most 2048, not 2049"
            in server.post({"prompt": "a", "max_tokens": 2049}).text
        )


def test_pages_of_other_sites_are_refused(server):
    body = {"prompt": "a", "max_tokens": 1}
    assert server.post(body, Origin=server.url).status_code == 200
    for own in ("localhost", f"LOCALHOST:{server.port}", "[::1]:80"):
        assert server.post(body, Host=own).status_code == 200
    for origin in ("http://evil.example", "null", "http://[", f"http://127.0.0.1:{server.port}1"):
        response = server.post(body, Origin=origin)
        assert response.status_code == 403
        assert response.json()["error"]["type"] == "permission_error"
    for host in ("evil.example", f"evil.example:{server.port}", "[", "", "127.0.0.1.evil.example"):
        assert server.post(body, Host=host).status_code in (400, 403)
    assert "access-control-allow-origin" not in server.post(body).headers


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_and_all_requests(checkpoint, tmp_path, number, status):
    """Open to other machines, with the newest checkpoint."""
    argv = f"--logs={checkpoint.parents[2]}", "--host=0.0.0.0", f"--max_tokens={LONG}"
    argv = (*argv, "--allow_anyone")
    with serving(*argv, folder=tmp_path) as server:
        url = f"http://127.0.0.1:{server.port}/v1/completions"
        with ThreadPoolExecutor() as pool, httpx.Client() as idle:
            idle.get(url)  # a connection that stays open
            ask = {"prompt": "a", "max_tokens": LONG, "n": 20}
            whole = pool.submit(httpx.post, url, json=ask, timeout=60)
            stream = pool.submit(httpx.post, url, json={**ask, "stream": True}, timeout=60)
            server.url = f"http://127.0.0.1:{server.port}"
            server.wait_for((40, 0))
            half = socket.create_connection(("127.0.0.1", server.port))  # of its body
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{")
            deaf = server.hang_up({**ask, "stream": True}, window=4096)  # it never reads
            server.wait_for((60, 0))
            assert httpx.get(server.url, headers={"Host": "any.example"}).status_code == 200
            assert server.stop(number) == (
                status,
                f"Warning: anyone can use this server (host 0.0.0.0, no key)\nUsing {checkpoint}\n",
            )
            assert whole.result().status_code == 500
            assert whole.result().json()["error"]["message"] == "the server is stopping"
            assert '"message": "the server is stopping"' in stream.result().text
            assert "[DONE]" not in stream.result().text
            half.close()
            deaf.close()


def test_errors_at_the_start_are_one_line(server, checkpoint, tmp_path, capsys):
    def error(*argv: str) -> str:
        assert main(["serve", *argv]) == 2
        return capsys.readouterr().err

    path = f"--ckpt_path={checkpoint}"
    assert error(path, f"--port={server.port}") == (
        f"error: cannot listen on 127.0.0.1, port {server.port} (Address already in use); "
        "choose another --port (0: any free one) or --host\n"
    )
    assert error("--port=0", f"--logs={tmp_path}").startswith("error: no checkpoint below")
    for name in ("max_batch_size", "max_concurrent", "max_tokens", "max_prompt_tokens"):
        assert error(f"--{name}=0") == f"error: --{name} 0: must be at least 1\n"
    for host, port in (("127.0.0.1", 70000), ("not.a.host.invalid", 0), ("a" * 80, 0), ("::g", 0)):
        with pytest.raises(UserError, match=f"cannot listen on {host}, port {port} "):
            listen(host, port)


@pytest.mark.parametrize("package", ["uvicorn", "starlette", "pydantic"])
def test_missing_packages_are_named_with_the_way_to_install_them(package, monkeypatch, capsys):
    for name in list(sys.modules):
        if name.startswith(("lit_gpt.serving.", "uvicorn.", "starlette.", "pydantic.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["serve", "--port=0"]) == 2
    hint = 'install it with pip install -e ".[serve]"'
    assert capsys.readouterr().err == f"error: serving needs {package}; {hint}\n"


def test_a_batch_that_fails_leaves_the_others_alone(checkpoint, capfd):
    """Here the device only has room for small batches."""
    model, tokenizer = load_checkpoint(checkpoint)

    def too_small(module: Any, args: Any) -> None:
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("no room")

    model.embedding.register_forward_pre_hook(too_small)
    batcher = Batcher(model, tokenizer, max_concurrent=9, max_batch_size=9)

    async def ask(n: int) -> list[str]:
        job = batcher.submit([Request("ab", 5)] * n)
        return [piece.text async for piece in job.pieces()]

    async def ask_both() -> None:
        with pytest.raises(Failure, match=r"the model failed \(OutOfMemoryError\)"):
            await ask(3)
        assert len(await ask(2)) == 10
        assert batcher.counts() == (0, 0)

    batcher.start()
    try:
        asyncio.run(ask_both())
    finally:
        batcher.stop()
        batcher.join()
    assert "no room" in capfd.readouterr().err


def until(page: Any, selector: str, text: Any) -> None:
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(text, timeout=20_000)


def test_the_page_writes_what_the_model_writes(server, browser, expected, tmp_path):
    page = browser.new_page(color_scheme="dark")
    problems, asked = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    assert page.title() == "version_7/best - lit_gpt"
    assert "a context of 64 tokens, a vocabulary of 256 (bytes)" in page.inner_text("header")
    page.fill("#prompt", "<b>猫</b> ")
    page.fill("[name=temperature]", "1.5")
    page.fill("[name=max_tokens]", "40")
    page.fill("[name=top_k]", "20")
    page.fill("#seed", "4")
    assert page.inner_text("label:has([name=temperature]) span") == "1.5"
    assert page.inner_text("label:has([name=min_p]) span") == "off"
    page.keyboard.press("Control+Enter")
    until(page, "#status", re.compile(" in "))
    text = expected("<b>猫</b> ", 40, Sampling(1.5, 20), 4)
    assert page.text_content("#answer") == "<b>猫</b> " + text
    assert page.text_content("#status").startswith("40 tokens in ")
    assert page.locator("#answer b").count() == 0
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    # The text has the dark scheme.s color.
    assert (
        page.eval_on_selector("#answer", "e => getComputedStyle(e).color") == "rgb(242, 241, 236)"
    )
    assert asked == [f"{server.url}/", f"{server.url}/v1/completions"]
    assert problems == []


def test_the_page_stops_and_shows_errors(server, browser):
    page = browser.new_page(viewport={"width": 360, "height": 800})
    page.goto(server.url)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.fill("[name=max_tokens]", str(LONG))
    page.click("#write")
    server.wait_for((1, 0))
    until(page, "#answer", re.compile(".{20}"))
    page.click("#stop-writing")
    server.wait_for((0, 0))
    until(page, "#status", "stopped")
    page.fill("#prompt", "a" * 65)
    page.click("#write")
    until(page, "#status.error", "prompt: has 65 tokens, at most 64 are allowed")
    page.fill("#prompt", "a")
    page.fill("#stop", r"\n")
    page.fill("[name=max_tokens]", "30")
    with page.expect_request("**/v1/completions") as request:
        page.click("#write")
    assert request.value.post_data_json["stop"] == "\n"
    until(page, "#status", re.compile(" in "))
