"""A small model, a server of it for each file of tests, and what the model writes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lit_gpt.checkpoint import load_checkpoint
from lit_gpt.generation.completion import Request, complete
from lit_gpt.text.vocabularies import load_tokenizer
from tests.generation.models import save_model, small_model
from tests.serving.servers import CONTEXT, LONG, Server, serving


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("logs") / "version_7" / "checkpoints" / "best.ckpt"
    return save_model(small_model(context_length=CONTEXT), load_tokenizer("bytes"), path)


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory) -> Iterator[Server]:
    argv = f"--ckpt_path={checkpoint}", f"--max_tokens={LONG}", "--max_batch_size=32"
    with serving(*argv, folder=tmp_path_factory.mktemp("here")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def expected(checkpoint) -> Callable[..., str]:
    """`expected("a prompt", 20, Sampling(1), seed)`: what the model writes alone."""
    model, tokenizer = load_checkpoint(checkpoint)

    def write(*args: Any) -> str:
        return "".join(piece.text for piece in complete(model, tokenizer, [Request(*args)]))

    return write
