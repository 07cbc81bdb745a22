"""Continuous batching: requests join those that run, and leave, at any token."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import torch

from lit_gpt.generation.completion import Batch, Request, complete
from lit_gpt.generation.rows import Rows
from lit_gpt.generation.sampling import Sampling
from lit_gpt.model import GPT
from lit_gpt.serving import batching
from lit_gpt.serving.app import Service, application
from lit_gpt.serving.batching import Batcher, Busy, Failure, Job
from lit_gpt.text.vocabularies import load_tokenizer
from tests.generation.models import small_model

TOKENIZER = load_tokenizer("bytes")


@contextmanager
def running(model: GPT, most: int = 9, max_batch_size: int = 9) -> Iterator[Batcher]:
    batcher = Batcher(model, TOKENIZER, most, max_batch_size)
    batcher.start()
    try:
        yield batcher
    finally:
        batcher.stop()
        batcher.join()


def serve(ask: Callable[[Batcher], Awaitable[Any]], batcher: Batcher) -> Any:
    return asyncio.run(asyncio.wait_for(ask(batcher), 60))


async def text_of(job: Job) -> str:
    return "".join([piece.text async for piece in job.pieces()])


async def first_piece(job: Job) -> None:
    await anext(job.pieces())


def alone(model: GPT, request: Request) -> str:
    return "".join(piece.text for piece in complete(model, TOKENIZER, [request]))


def long_request(seed: int = 0) -> Request:
    return Request("a", 100_000, seed=seed)


@pytest.mark.parametrize(("style", "max_batch_size"), [("classic", 1), ("modern", 50), ("fast", 4)])
def test_50_staggered_requests_get_what_each_would_alone(style, max_batch_size):
    """Prompts of 1 to 40 tokens, in a context of 16; some are beyond it from the start."""
    model = small_model(style=style)
    requests = [
        Request("ab" * (i % 21) + str(i), 5 + 7 * i % 40, Sampling(i % 3 / 2), seed=i)
        for i in range(50)
    ]

    async def ask(batcher: Batcher) -> list[str]:
        async def one(i: int) -> str:
            await asyncio.sleep(i / 500)
            return await text_of(batcher.submit([requests[i]]))

        return await asyncio.gather(*map(one, range(50)))

    with running(model, 50, max_batch_size) as batcher:
        texts = serve(ask, batcher)
    assert texts == [alone(model, request) for request in requests]
    assert len(set(texts)) == 50


def test_a_request_joins_those_that_run():
    """The next call of the model is for both, and a third waits for room."""
    model, sizes = small_model(context_length=1000), []  # so long that no window slides
    model.embedding.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))

    async def ask(batcher: Batcher) -> None:
        long = batcher.submit([long_request()])
        await first_piece(long)
        short = batcher.submit([Request("b", 200), Request("c", 20)])
        pieces = [piece.index async for piece in short.pieces()]
        assert pieces == [0] * 200 + [1] * 20
        assert batcher.counts() == (1, 0)
        long.cancel()

    with running(model, max_batch_size=2) as batcher:
        serve(ask, batcher)
    assert max(sizes) == 2
    assert sizes.count(2) == 199 + 19  # their first tokens come from the call that reads a prompt


def test_a_cancelled_request_leaves_at_the_next_token():
    model, sizes = small_model(), []

    async def ask(batcher: Batcher) -> None:
        jobs = [batcher.submit([long_request(seed)]) for seed in range(3)]
        for job in jobs:
            await first_piece(job)
        jobs[0].cancel()
        assert batcher.counts() == (2, 0)
        await first_piece(jobs[1])
        await first_piece(jobs[1])
        model.embedding.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        await first_piece(batcher.submit([Request("b", 1)]))
        for job in jobs:
            job.cancel()

    with running(model) as batcher:
        serve(ask, batcher)
        assert batcher.counts() == (0, 0)
    assert max(sizes) == 2


def test_a_prompt_that_fails_leaves_those_that_run_alone(capfd):
    """Here the device has no room to read five tokens."""
    model = small_model(context_length=64)
    expected = alone(model, Request("ab", 40))

    def no_room(_: object, args: Any) -> None:
        if args[0].size(1) == 5:
            raise torch.OutOfMemoryError("no room")

    async def ask(batcher: Batcher) -> None:
        good = batcher.submit([Request("ab", 40)])
        text = (await anext(good.pieces())).text
        bad = batcher.submit([Request("abcde", 40)])
        with pytest.raises(Failure, match=r"the model failed \(OutOfMemoryError\)"):
            await text_of(bad)
        assert text + await text_of(good) == expected

    model.embedding.register_forward_pre_hook(no_room)
    with running(model) as batcher:
        serve(ask, batcher)
    assert "no room" in capfd.readouterr().err


def test_the_memory_of_a_failed_step_is_free_when_its_rows_are_dropped(monkeypatch, capfd):
    """To drop rows takes memory, too, which the failed step may have taken."""
    model = small_model(context_length=64)
    expected = alone(model, Request("ab", 40))
    keep = Rows.keep
    read: list[weakref.ref[torch.Tensor]] = []

    def no_room(_: object, args: Any) -> None:
        if args[0].size(1) == 5:
            read.append(weakref.ref(args[0]))
            raise torch.OutOfMemoryError("no room")

    def keep_if_free(rows: Rows, kept: list[int]) -> None:
        assert not read or read[0]() is None
        keep(rows, kept)

    async def ask(batcher: Batcher) -> None:
        good = batcher.submit([Request("ab", 40)])
        text = (await anext(good.pieces())).text
        with pytest.raises(Failure, match=r"the model failed \(OutOfMemoryError\)"):
            await text_of(batcher.submit([Request("abcde", 40)]))
        assert text + await text_of(good) == expected

    monkeypatch.setattr(Rows, "keep", keep_if_free)
    model.embedding.register_forward_pre_hook(no_room)
    with running(model) as batcher:
        serve(ask, batcher)
    assert len(read) == 1
    assert "no room" in capfd.readouterr().err


@pytest.mark.parametrize("prompt", ["abc", "abcde"])
def test_if_rows_can_not_be_dropped_all_fail_and_the_next_are_answered(monkeypatch, capfd, prompt):
    """One whose client hangs up, or one that fails itself: there is no room to read five tokens."""
    model = small_model(context_length=64)
    keep = Rows.keep
    errors = [torch.OutOfMemoryError("no room to move rows")]

    def no_room(_: object, args: Any) -> None:
        if args[0].size(1) == 5:
            raise torch.OutOfMemoryError("no room to read")

    def keep_later(rows: Rows, kept: list[int]) -> None:
        if errors:
            raise errors.pop()
        keep(rows, kept)

    async def ask(batcher: Batcher) -> str:
        other = batcher.submit([long_request()])
        await first_piece(other)
        monkeypatch.setattr(Rows, "keep", keep_later)
        leaving = batcher.submit([Request(prompt, 100_000)])
        if prompt == "abc":
            await first_piece(leaving)
            leaving.cancel()
        for job in {other} if prompt == "abc" else {leaving, other}:
            with pytest.raises(Failure, match=r"the model failed \(OutOfMemoryError\)"):
                await text_of(job)
        assert batcher.counts() == (0, 0)
        return await text_of(batcher.submit([Request("a", 9)]))

    model.embedding.register_forward_pre_hook(no_room)
    with running(model) as batcher:
        assert serve(ask, batcher) == alone(model, Request("a", 9))
    assert not errors
    assert "no room to move rows" in capfd.readouterr().err


def test_a_window_that_can_not_slide_fails_alone(monkeypatch):
    model = small_model(context_length=16)

    def no_room(_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    batch = Batch(model, TOKENIZER)
    batch.add(0, Request("a" * 16, 9))
    batch.add(1, Request("b", 9))
    pieces = list(batch.step())
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", no_room)
        with pytest.raises(torch.OutOfMemoryError):
            list(batch.step())
    assert batch.drop_failed() == [0]
    while batch:
        pieces += batch.step()
    text = "".join(piece.text for piece in pieces if piece.index == 1)
    assert text == alone(model, Request("b", 9))


def test_a_prompt_that_cannot_be_encoded_fails_alone(capfd):
    model = small_model()

    async def ask(batcher: Batcher) -> str:
        bad, good = (batcher.submit([Request(prompt, 9)]) for prompt in ("\ud800", "a"))
        with pytest.raises(Failure, match=r"the model failed \(UnicodeEncodeError\)"):
            await text_of(bad)
        return await text_of(good)

    with running(model) as batcher:
        assert serve(ask, batcher) == alone(model, Request("a", 9))
    assert "surrogates not allowed" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_an_error_ended(monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async def ask(batcher: Batcher) -> None:
        job = batcher.submit([long_request()])
        await first_piece(job)
        monkeypatch.setattr(Batch, "keep", broken)
        monkeypatch.setattr(batching, "Batch", broken)
        with pytest.raises(Failure):
            await text_of(job)
        batcher.join()
        with pytest.raises(Busy):
            batcher.submit([Request("a", 1)])
        app = application(Service(batcher, "m", 0, "", 9, 9, 16), hosts=None)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            health = await client.get("/health")
        assert health.status_code == 503
        assert health.json() == {"status": "stopped", "running": 0, "waiting": 0}

    with running(small_model()) as batcher:
        serve(ask, batcher)


def test_prompts_that_are_scored_join_too():
    """With no tokens to write, and with some; the pieces are those of each alone."""
    model = small_model(context_length=64)
    requests = [
        Request("the cat", 0, logprobs=2, scores_prompt=True),
        Request("a mat", 5, logprobs=1, scores_prompt=True),
    ]

    async def ask(batcher: Batcher) -> None:
        long = batcher.submit([long_request()])
        await first_piece(long)
        job = batcher.submit(requests)
        pieces = [piece async for piece in job.pieces()]
        long.cancel()
        for index, request in enumerate(requests):
            found = [piece for piece in pieces if piece.index == index]
            expected = list(complete(model, TOKENIZER, [request]))
            assert [p.num_tokens for p in found] == list(range(request.max_new_tokens + 1))
            assert [p.text for p in found] == [p.text for p in expected]
            for ours, theirs in zip(found, expected, strict=True):
                values = [p.logprob for p in ours.logprobs]
                assert values == pytest.approx([p.logprob for p in theirs.logprobs], abs=1e-5)

    with running(model) as batcher:
        serve(ask, batcher)
