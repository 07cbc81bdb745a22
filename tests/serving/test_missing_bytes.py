"""A model whose vocabulary lacks a byte: prompts and messages that have it are refused."""

from __future__ import annotations

import openai
import pytest

from lit_gpt.text.byte_gaps import SINGLE_BYTES
from lit_gpt.text.tokenizer import Tokenizer
from tests.generation.models import save_model, small_model
from tests.serving.servers import serving


def test_a_byte_that_the_model_lacks_is_the_client_s_error(tmp_path):
    tokens = [byte for byte in SINGLE_BYTES if byte != b"\x04"]
    tokenizer = Tokenizer("lacking", r"(?s:.)", tokens).with_end_of_text()
    path = save_model(small_model(256, 64), tokenizer, tmp_path / "lacking.ckpt")
    (here := tmp_path / "here").mkdir()
    with serving(f"--ckpt_path={path}", folder=here) as server:
        client = server.client()
        for create in (
            lambda text: client.completions.create(model="lacking", prompt=text, max_tokens=2),
            lambda text: client.chat.completions.create(
                model="lacking", messages=[{"role": "user", "content": text}], max_tokens=2
            ),
        ):
            assert create("ab").usage.completion_tokens == 2
            with pytest.raises(openai.BadRequestError, match="no token for byte 0x04"):
                create("a\x04b")
