"""Completion: ragged batches, stops, the end of a document, traces."""

from __future__ import annotations

import pytest
import torch

from lit_gpt.generation.completion import Completion, Request, complete, encode_prompt
from lit_gpt.generation.sampling import Sampling, generate
from lit_gpt.text.utf8 import stream_text
from lit_gpt.text.vocabularies import load_tokenizer
from tests.generation.models import small_model

PROMPTS = ["a", "农夫山泉", "", "the cat sat on the mat", "xyz " * 20]


def texts_of(model, tokenizer, requests) -> list[str]:
    texts = [""] * len(requests)
    for piece in complete(model, tokenizer, requests):
        texts[piece.index] += piece.text
    return texts


@pytest.mark.parametrize("style", ["classic", "modern", "fast"])
@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1), Sampling(0.9, 20, 0.9, 1.2, 0.01)])
def test_other_requests_in_a_batch_change_nothing(style, sampling):
    """Prompts of all lengths, beyond the context too, with seeds and lengths of their own."""
    model, tokenizer = small_model(style=style), load_tokenizer("bytes")
    requests = [Request(p, 7 + 9 * i, sampling, seed=i) for i, p in enumerate(PROMPTS)]
    together = texts_of(model, tokenizer, requests)
    assert together == [texts_of(model, tokenizer, [request])[0] for request in requests]
    assert len(set(together)) == len(together)


def test_prompts_of_all_lengths_are_read_at_once():
    """The short one is done in the same step."""
    model, tokenizer = small_model(), load_tokenizer("bytes")
    requests, looks = [Request("a", 1), Request("b" * 16, 2)], []
    model.embedding.register_forward_pre_hook(lambda _, args: looks.append(args[0].shape))
    together = texts_of(model, tokenizer, requests)
    assert looks == [(2, 16), (1, 8)]  # the window slides before the last
    assert together == [texts_of(model, tokenizer, [request])[0] for request in requests]


def test_one_request_gives_the_text_of_generate():
    model, tokenizer = small_model(), load_tokenizer("bytes")
    ids = torch.tensor([encode_prompt(tokenizer, "the cat")])
    new = generate(model, ids, 40, Sampling(1), 5, tokenizer)
    expected = "".join(stream_text(tokenizer, (int(i) for i in new)))
    assert texts_of(model, tokenizer, [Request("the cat", 40, Sampling(1), 5)]) == [expected]


def test_requests_with_different_options_share_a_batch():
    model, tokenizer = small_model(), load_tokenizer("bytes")
    samplings = [Sampling(0), Sampling(1), Sampling(1, top_k=2), Sampling(0)]
    requests = [Request("ab", 20, sampling, seed=4) for sampling in samplings]
    texts = texts_of(model, tokenizer, requests)
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3
    assert texts == [texts_of(model, tokenizer, [request])[0] for request in requests]


def test_pieces_count_tokens_and_the_last_has_the_reason():
    model, tokenizer = small_model(), load_tokenizer("bytes")
    pieces = list(complete(model, tokenizer, [Request("ab", 3), Request("abcd", 5)]))
    of_first = [(p.num_tokens, p.finish_reason) for p in pieces if p.index == 0]
    of_second = [(p.num_tokens, p.finish_reason) for p in pieces if p.index == 1]
    assert of_first == [(1, None), (2, None), (3, "length")]
    assert of_second == [(n, "length" if n == 5 else None) for n in range(1, 6)]


def test_unwanted_requests_are_dropped():
    model, tokenizer = small_model(), load_tokenizer("bytes")
    requests, seen = [Request("ab", 20, Sampling(1), seed=i) for i in range(3)], []
    unwanted: set[int] = set()
    for piece in complete(model, tokenizer, requests, lambda i: i not in unwanted):
        seen.append(piece)
        if piece.num_tokens == 5:
            unwanted.add(1)
    assert [max(p.num_tokens for p in seen if p.index == i) for i in range(3)] == [20, 5, 20]
    text = "".join(piece.text for piece in seen if piece.index == 2)
    assert text == texts_of(model, tokenizer, [requests[2]])[0]


def pieces_of(text: str, stop: tuple[str, ...], max_new_tokens: int = 99) -> list[tuple]:
    """Texts and reasons, where the model writes that text in bytes."""
    tokenizer = load_tokenizer("bytes").with_end_of_text()
    completion = Completion(0, Request("", max_new_tokens, stop=stop), tokenizer)
    pieces = []
    for token in [*tokenizer.encode(text).tolist(), tokenizer.end_of_text]:
        pieces.append(completion.add(token))
        if completion.is_finished:
            break
    return [(piece.text, piece.finish_reason) for piece in pieces]


def test_text_ends_before_a_stop():
    assert pieces_of("a\n\nb", ("\n\n",)) == [("a", None), ("", None), ("", "stop")]
    assert pieces_of("ab", ("b", "ab")) == [("", None), ("", "stop")]
    assert pieces_of("xaab!", ("aab",))[-1] == ("", "stop")
    assert "".join(text for text, _ in pieces_of("xaab!", ("aab",))) == "x"
    assert "".join(text for text, _ in pieces_of("aaab", ("aab",))) == "a"
    assert "".join(text for text, _ in pieces_of("甲。乙", ("。",))) == "甲"


def test_text_that_only_begins_a_stop_is_kept():
    assert pieces_of("ab!", ("abc",)) == [("", None), ("", None), ("ab!", None), ("", "stop")]
    assert pieces_of("ab", ("abc",)) == [
        ("", None),
        ("", None),
        ("ab", "stop"),
    ]  # the document's end
    assert pieces_of("ab!", ("abc", "b?")) == [("", None), ("", None), ("ab!", None), ("", "stop")]
    assert pieces_of("ab", ("abc",), max_new_tokens=2) == [("", None), ("ab", "length")]


def test_only_whole_characters_are_written():
    assert pieces_of("猫", ()) == [("", None), ("", None), ("猫", None), ("", "stop")]
    assert pieces_of("猫", (), max_new_tokens=2) == [("", None), ("", "length")]


def test_an_encoded_prompt_is_never_empty():
    tokenizer = load_tokenizer("bytes")
    assert encode_prompt(tokenizer, "") == [10]
    assert encode_prompt(tokenizer.with_end_of_text(), "") == [256]
    assert encode_prompt(tokenizer.with_end_of_text(), "a") == [97]
    unlearnt = tokenizer.with_end_of_text().with_end_used(False)
    assert encode_prompt(unlearnt, "") == [10]


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1)])
def test_an_end_of_text_is_only_drawn_where_the_model_has_learnt_it(sampling):
    """Its row was never trained otherwise, and may have any logit: here, the highest."""
    model = small_model(257)
    model.head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([256]), 1e3)
    )
    tokenizer = load_tokenizer("bytes").with_end_of_text()
    request = [Request("the", 20, sampling)]
    (piece,) = complete(model, tokenizer, request)
    assert (piece.text, piece.finish_reason) == ("", "stop")
    pieces = list(complete(model, tokenizer.with_end_used(False), request))
    assert (len(pieces), pieces[-1].finish_reason) == (20, "length")


def test_a_trace_has_the_models_probabilities_and_those_drawn_with():
    model, tokenizer = small_model(), load_tokenizer("bytes")
    sampling = Sampling(0.5, top_k=2)
    pieces = list(complete(model, tokenizer, [Request("the", 4, sampling, trace=True)]))
    ids = encode_prompt(tokenizer, "the")
    for piece in pieces:
        choice, logits = piece.choice, model(torch.tensor([ids]))[0, -1].detach()
        logits[~torch.from_numpy(tokenizer.may_follow(b""))] = -torch.inf
        best = logits.softmax(-1).sort(descending=True)
        assert [i for i, _ in choice.likeliest] == best.indices[:5].tolist()
        assert [p for _, p in choice.likeliest] == pytest.approx(best.values[:5].tolist(), rel=1e-4)
        assert choice.probability == pytest.approx(
            float(logits.softmax(-1)[choice.token]), rel=1e-4
        )
        two = (best.values[:2] ** 2 / (best.values[:2] ** 2).sum()).tolist()  # temperature 0.5
        place = best.indices[:2].tolist().index(choice.token)
        assert choice.drawn_with == pytest.approx(two[place], rel=1e-4)
        ids.append(choice.token)
    assert len(pieces) == 4


def test_only_requests_with_trace_are_traced():
    model, tokenizer = small_model(), load_tokenizer("bytes")
    requests = [Request("a", 3), Request("a", 3, trace=True)]
    traced = [piece.choice is not None for piece in complete(model, tokenizer, requests)]
    assert traced == [False, True] * 3


def test_a_greedy_trace_is_certain():
    model, tokenizer = small_model(), load_tokenizer("bytes")
    for piece in complete(model, tokenizer, [Request("the", 4, Sampling(0), trace=True)]):
        assert piece.choice.drawn_with == 1
        assert piece.choice.token == piece.choice.likeliest[0][0]
