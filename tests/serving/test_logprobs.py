"""Token ids, log-probabilities, scored prompts and penalties of the completions protocol."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any

import openai
import pytest
import torch
from torch import Tensor

from lit_gpt.checkpoint import load_checkpoint
from lit_gpt.generation.sampling import Sampling
from lit_gpt.text.utf8 import unfinished_end
from lit_gpt.text.vocabularies import load_tokenizer
from tests.generation.models import save_model, small_model
from tests.serving.servers import CONTEXT, serving

CAT = list("猫 a".encode())  # the tokenizer's ids are bytes


@pytest.fixture(scope="module")
def logarithms(checkpoint) -> Callable[[Sequence[int]], Tensor]:
    """The log-probabilities (T, V) after each of some ids, by the model alone."""
    model, _ = load_checkpoint(checkpoint)

    @torch.inference_mode()
    def compute(ids: Sequence[int]) -> Tensor:
        return model(torch.tensor([ids]))[0].double().log_softmax(-1)

    return compute


def ask(client: openai.OpenAI, **options: Any) -> openai.types.Completion:
    answer = client.completions.create(model="version_7/best", **options)
    if not options.get("echo"):  # OpenAI's server has null for the first token, its types do not
        openai.types.Completion.model_validate(answer.to_dict(), strict=True)
    return answer


@pytest.mark.parametrize("prompt", ["猫 a", CAT, [CAT]])
def test_a_scored_prompt_is_what_the_model_says_of_it(client, logarithms, prompt):
    answer = ask(client, prompt=prompt, echo=True, max_tokens=0, logprobs=2)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("猫 a", "length")
    assert answer.usage.to_dict() == {
        "prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5,
    }  # fmt: skip
    assert choice.logprobs.tokens == ["bytes:\\xe7", "bytes:\\x8c", "bytes:\\xab", " ", "a"]
    assert choice.logprobs.text_offset == [0, 0, 0, 1, 2]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    right = logarithms(CAT)
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(
        [float(right[i, token]) for i, token in enumerate(CAT[1:])], abs=1e-5
    )
    for i, top in enumerate(choice.logprobs.top_logprobs[1:]):
        best = right[i].topk(2).values.tolist()
        own = float(right[i, CAT[i + 1]])
        assert sorted(top.values()) == pytest.approx(sorted({*best, own}), abs=1e-5)
        assert top[choice.logprobs.tokens[i + 1]] == choice.logprobs.token_logprobs[i + 1]


def test_a_prompt_may_have_one_token_more_than_the_context_if_it_is_scored(client, logarithms):
    """The model reads all but the last, which it predicts."""
    ids = [i % 90 + 32 for i in range(CONTEXT + 1)]
    for max_tokens in (0, 1):
        answer = ask(client, prompt=[ids, CAT], echo=True, max_tokens=max_tokens, logprobs=0)
        long, short = answer.choices
        assert len(long.logprobs.tokens) == CONTEXT + 1 + max_tokens
        right = logarithms(ids[:-1])
        assert long.logprobs.token_logprobs[1 : CONTEXT + 1] == pytest.approx(
            [float(right[i, token]) for i, token in enumerate(ids[1:])], abs=1e-4
        )
        assert [len(top) for top in short.logprobs.top_logprobs[1:]] == [1] * (4 + max_tokens)
    with pytest.raises(openai.BadRequestError, match="has 66 tokens, at most 65 are allowed"):
        ask(client, prompt=[*ids, 1], echo=True, max_tokens=0, logprobs=1)
    with pytest.raises(openai.BadRequestError, match="has 65 tokens, at most 64 are allowed"):
        ask(client, prompt=ids, max_tokens=1, logprobs=1)


def test_log_probabilities_of_what_is_written(client, logarithms, expected):
    """They are the model's, whatever the temperature: those of a prompt with the same text."""
    options = {"prompt": "猫 a", "max_tokens": 30, "seed": 4, "temperature": 1.5, "logprobs": 5}
    choice = ask(client, **options).choices[0]
    assert choice.text == expected("猫 a", 30, Sampling(1.5), 4)
    shown = choice.logprobs
    ids = [
        int(token[-2:], 16) if token.startswith("bytes:") else ord(token) for token in shown.tokens
    ]
    assert bytes(ids).decode(errors="replace") == choice.text
    right = logarithms([*CAT, *ids])[len(CAT) - 1 :]
    assert shown.token_logprobs == pytest.approx(
        [float(right[i, token]) for i, token in enumerate(ids)], abs=1e-4
    )
    assert [max(top.values()) for top in shown.top_logprobs] == pytest.approx(
        right[:-1].amax(-1).tolist(), abs=1e-4
    )
    assert {len(top) for top in shown.top_logprobs} <= {5, 6}
    assert shown.text_offset[0] == 0
    assert choice.text[shown.text_offset[-1] :] in (bytes(ids[-1:]).decode(errors="replace"), "")


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_stream_has_the_same_log_probabilities_in_parts(client, logprobs):
    options = {"prompt": "猫 a", "max_tokens": 20, "seed": 4, "logprobs": logprobs, "echo": True}
    whole = ask(client, **options).choices[0]
    text, parts = "", []
    for chunk in client.completions.create(model="version_7/best", stream=True, **options):
        text += chunk.choices[0].text
        parts.append(chunk.choices[0].logprobs)
    assert text == whole.text
    if logprobs is None:
        assert {*parts, whole.logprobs} == {None}
        return
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [one for part in parts for one in getattr(part, name)]
        assert joined == getattr(whole.logprobs, name)


def test_echo_alone(client):
    answer = ask(client, prompt=["猫 a", "b"], echo=True, max_tokens=0)
    assert [choice.text for choice in answer.choices] == ["猫 a", "b"]
    assert [choice.logprobs for choice in answer.choices] == [None, None]


def test_prompts_of_ids_are_those_of_text(client, expected):
    answer = ask(client, prompt=[CAT, [98]], max_tokens=20, seed=3, n=2, echo=True)
    assert [choice.text for choice in answer.choices] == [
        prompt + expected(prompt, 20, Sampling(1.0), seed)
        for prompt in ("猫 a", "b")
        for seed in (3, 4)
    ]
    assert answer.usage.prompt_tokens == 6


@pytest.mark.parametrize(("frequency", "presence"), [(1.5, 0.0), (0.0, 2.0), (-1.0, 0.5)])
def test_penalties_are_those_of_openai(client, checkpoint, frequency, presence):
    """The prompt's tokens don't count, and each that was generated counts every time."""
    model, tokenizer = load_checkpoint(checkpoint)
    written: list[int] = []
    with torch.inference_mode():
        for _ in range(30):
            logits = model(torch.tensor([[*b"aaa", *written]]))[0, -1]
            for token in set(written):
                logits[token] -= frequency * written.count(token) + presence
            begun = unfinished_end(bytes(written[-3:]))
            logits[~torch.from_numpy(tokenizer.may_follow(begun))] = -torch.inf
            written.append(int(logits.argmax()))
    options = {"prompt": "aaa", "max_tokens": 30, "temperature": 0}
    penalties = {"frequency_penalty": frequency, "presence_penalty": presence}
    text = ask(client, **options, **penalties).choices[0].text
    assert text == codecs.getincrementaldecoder("utf-8")().decode(bytes(written))
    if max(frequency, presence) > 1:
        assert text != ask(client, **options).choices[0].text


def test_tokens_that_only_start_a_prompt_are_scored_with_it_but_not_shown(tmp_path):
    """Such as Llama's <s>: the text does not have it, and its first token has a predecessor."""
    tokenizer = load_tokenizer("bytes").with_special(["<s>"], {"bos_token": "<s>"}, ["<s>"], [])
    model = small_model(tokenizer.vocab_size)
    path = save_model(model, tokenizer, tmp_path / "start.ckpt")
    here = tmp_path / "here"
    here.mkdir()
    with serving(f"--ckpt_path={path}", folder=here) as server:
        options = {"model": "start", "echo": True, "max_tokens": 0, "logprobs": 0}
        create = server.client().completions.create
        text = create(prompt=["ab", ""], **options)
        ids = create(prompt=[256, *b"ab"], **options).choices[0]
    assert ids.text == "<s>ab"
    assert ids.logprobs.tokens == ["<s>", "a", "b"]
    assert ids.logprobs.text_offset == [0, 3, 4]
    shown, empty = (choice.logprobs for choice in text.choices)
    assert text.choices[0].text == "ab"
    assert shown.tokens == ["a", "b"]
    assert shown.text_offset == [0, 1]
    assert shown.token_logprobs == ids.logprobs.token_logprobs[1:]
    assert empty.tokens == []
    assert text.usage.prompt_tokens == 4
    with torch.inference_mode():
        right = model(torch.tensor([[256, *b"ab"]]))[0].log_softmax(-1)
    assert shown.token_logprobs == pytest.approx(
        [float(right[0, 97]), float(right[1, 98])], abs=1e-5
    )
