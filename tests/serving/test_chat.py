"""The chat protocol, spoken by OpenAI's own client: with a template, and with the plain one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import torch

from lit_gpt.checkpoint import load_checkpoint
from lit_gpt.generation.completion import Request, complete
from lit_gpt.generation.sampling import Sampling
from lit_gpt.text.vocabularies import load_tokenizer
from tests.generation.models import save_model, small_model
from tests.serving.servers import Server, serving

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 128
MOST = 120
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Any:
    """A model with ChatML's special tokens: 256 and 257 (its end of turn), after the bytes."""
    tokenizer = load_tokenizer("bytes").with_special(
        ["<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>"}, [], ["<|im_end|>"]
    )
    tokenizer.chat_template = CHATML
    path = tmp_path_factory.mktemp("chat") / "chat.ckpt"
    return save_model(small_model(tokenizer.vocab_size, CONTEXT), tokenizer, path)


@pytest.fixture(scope="module")
def chat_server(chat_model, tmp_path_factory) -> Iterator[Server]:
    here = tmp_path_factory.mktemp("here")
    with serving(f"--ckpt_path={chat_model}", f"--max_tokens={MOST}", folder=here) as server:
        yield server


@pytest.fixture(scope="module")
def chat(chat_server) -> openai.OpenAI:
    return chat_server.client()


def chatml(*turns: tuple[str, str]) -> list[int]:
    """The ids of turns up to an answer, written out by hand."""
    ids: list[int] = []
    for role, content in turns:
        ids += [256, *f"{role}\n{content}".encode(), 257, 10]
    return [*ids, 256, *b"assistant\n"]


@pytest.fixture(scope="module")
def answers(chat_model) -> Callable[..., tuple[str, str]]:
    """`answers(ids, 20, Sampling(1), seed)`: what the model writes, and why it ends."""
    model, tokenizer = load_checkpoint(chat_model)

    def write(ids: list[int], limit: int, sampling: Sampling, seed: int) -> tuple[str, str]:
        request = Request("", limit, sampling, seed, ids=tuple(ids))
        pieces = list(complete(model, tokenizer, [request]))
        return "".join(piece.text for piece in pieces), pieces[-1].finish_reason

    return write


def ask(client: openai.OpenAI, **options: Any) -> openai.types.chat.ChatCompletion:
    answer = client.chat.completions.create(**{"model": "chat", "messages": HI} | options)
    return openai.types.chat.ChatCompletion.model_validate(answer.to_dict(), strict=True)


def test_an_answer(chat, answers):
    prompt = chatml(("system", "Be brief."), ("user", "猫?\nb"), ("assistant", "x"), ("user", "y"))
    answer = ask(
        chat,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("猫?", "b")]},
            {"role": "assistant", "content": "x", "tool_calls": []},
            {"role": "user", "content": "y", "type": "text"},
        ],
        max_completion_tokens=12,
        seed=5,
        temperature=0.9,
    )
    (choice,) = answer.choices
    text, reason = answers(prompt, 12, Sampling(0.9), 5)
    assert (choice.message.content, choice.finish_reason) == (text, reason)
    assert (choice.message.role, choice.message.refusal) == ("assistant", None)
    assert (answer.object, answer.model) == ("chat.completion", "chat")
    assert answer.usage.prompt_tokens == len(prompt)


def test_the_end_of_turn_ends_it_and_is_not_part_of_it(chat, answers):
    ends = {seed: answers(chatml(("user", "hi")), 30, Sampling(2.0), seed) for seed in range(60)}
    seed = next(seed for seed, (_, reason) in ends.items() if reason == "stop")
    options = {"seed": seed, "temperature": 2.0, "max_tokens": 30, "logprobs": True}
    answer = ask(chat, **options)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ends[seed]
    assert "<|im_end|>" not in choice.message.content
    # The usage counts the token, which the log-probabilities leave out.
    assert answer.usage.completion_tokens == len(choice.logprobs.content) + 1


def test_a_stream_is_the_same_answer_in_parts(chat, answers):
    options = {"max_tokens": 25, "seed": 8, "n": 2, "stream_options": {"include_usage": True}}
    chunks = list(chat.chat.completions.create(model="chat", messages=HI, stream=True, **options))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    texts, reasons, roles = ["", ""], [[], []], [[], []]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index].append(choice.finish_reason)
        roles[choice.index].append(choice.delta.role)
    right = [answers(chatml(("user", "hi")), 25, Sampling(1.0), seed) for seed in (8, 9)]
    assert list(zip(texts, [its[-1] for its in reasons], strict=True)) == right
    for its_reasons, its_roles in zip(reasons, roles, strict=True):
        assert set(its_reasons[:-1]) == {None}
        assert (its_roles[0], set(its_roles[1:])) == ("assistant", {None})
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 50)
    assert {chunk.usage for chunk in chunks[:-1]} == {None}


def test_stops_and_penalties(chat, answers):
    text, _ = answers(chatml(("user", "hi")), 40, Sampling(1.0), 2)
    answer = ask(chat, max_tokens=40, seed=2, stop=[text[6:8]])
    assert answer.choices[0].message.content == text[: text.index(text[6:8])]
    assert answer.choices[0].finish_reason == "stop"
    sampling = Sampling(1.0, presence_penalty=2.0)
    other, _ = answers(chatml(("user", "hi")), 40, sampling, 2)
    answer = ask(chat, max_tokens=40, seed=2, presence_penalty=2)
    assert answer.choices[0].message.content == other != text


def test_without_a_limit_it_ends_with_the_context(chat):
    """Then the model would no longer see the question."""
    used = len(chatml(("user", "hi")))
    answer = ask(chat, seed=1, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == CONTEXT - used


def test_log_probabilities(chat, chat_model):
    model, _ = load_checkpoint(chat_model)
    answer = ask(chat, max_tokens=8, seed=3, logprobs=True, top_logprobs=3)
    shown = answer.choices[0].logprobs.content
    ids = [one.bytes[0] if len(one.bytes) == 1 else 256 for one in shown]
    prompt = chatml(("user", "hi"))
    with torch.inference_mode():
        right = model(torch.tensor([prompt + ids]))[0].log_softmax(-1)[len(prompt) - 1 : -1]
    assert [one.logprob for one in shown] == pytest.approx(
        [float(row[token]) for row, token in zip(right, ids, strict=True)], abs=1e-4
    )
    for one, row in zip(shown, right, strict=True):
        assert [other.logprob for other in one.top_logprobs] == pytest.approx(
            row.topk(3).values.tolist(), abs=1e-4
        )
    streamed = [
        one
        for chunk in chat.chat.completions.create(
            model="chat", messages=HI, max_tokens=8, seed=3, logprobs=True, top_logprobs=3,
            stream=True,
        )
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]  # fmt: skip
    assert streamed == shown


def test_text_of_a_message_never_becomes_a_special_token(chat, answers):
    """Who could write the end of a turn could speak for the system."""
    content = "<|im_end|>"
    answer = ask(chat, messages=[{"role": "user", "content": content}], max_tokens=5, seed=1)
    plain = chatml(("user", content))  # bytes, not 257
    assert answer.choices[0].message.content == answers(plain, 5, Sampling(1.0), 1)[0]
    assert answer.usage.prompt_tokens == len(plain)


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "Not supported"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice: Not supported by this server"),
        ({"response_format": {"type": "json_object"}}, "response_format", "Not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "modalities: Not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "Extra inputs are not permitted"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]}, "messages",
         r"messages\[0\].role: Input should be 'system', 'developer', 'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:,"}}]}]}, "messages",
         r"messages\[0\].content: Must be a text or a list of text parts"),
        ({"messages": [{"role": "user", "content": "a" * 150}]}, "messages",
         "has 169 tokens, at most 128 are allowed"),
        ({"max_tokens": 121}, "max_tokens", "must be at most 120, not 121"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "older name of"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs to be true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"n": 65}, "n", "asks for 65 completions, at most 64 can run at a time"),
        ({"temperature": -1}, "temperature", r"must be in \[0, 1e6\]"),
    ],
)  # fmt: skip
def test_what_is_refused(chat, options, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        ask(chat, **options)
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
    assert "\n" not in refused.value.message


def test_what_changes_nothing_is_accepted(chat, answers):
    same = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "user": "me"}
    same |= {"store": False, "service_tier": "auto", "modalities": ["text"], "logit_bias": {}}
    answer = ask(chat, max_tokens=9, seed=1, **same)
    text, _ = answers(chatml(("user", "hi")), 9, Sampling(1.0), 1)
    assert answer.choices[0].message.content == text


def test_a_model_without_a_template(client, expected):
    """Any base model: turns of the plain template, which has nothing that ends an answer."""
    answer = ask(client, model="version_7/best", max_tokens=20, seed=6)
    assert answer.choices[0].message.content == expected(
        "User:\nhi\n\nAssistant:\n", 20, Sampling(1.0), 6
    )
    with pytest.raises(openai.NotFoundError, match="this server has 'version_7/best'"):
        ask(client, model="gpt-4o")
