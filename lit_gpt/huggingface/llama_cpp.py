"""llama.cpp, run by the package llama-cpp-python where it is installed."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

LONGEST = 1 << 16  # bytes of a token
BATCH = 64  # tokens read at a time; with a large vocabulary, the logits of each need memory


@cache  # which keeps what llama.cpp calls from now on
def silence() -> Any:
    """Keeps llama.cpp from writing on this process's stderr."""
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


class LlamaCpp:
    """A GGUF file that llama.cpp has loaded, with keys and values in float32 as in the model.

    Raises:
        ImportError: the package is not installed.
        ValueError, RuntimeError: the file can't be loaded.
    """

    def __init__(self, path: Path, context_length: int) -> None:
        import llama_cpp

        silence()
        self.api: Any = llama_cpp
        self.llama: Any = llama_cpp.Llama(
            str(path),
            n_ctx=context_length,
            n_batch=min(BATCH, context_length),
            n_gpu_layers=0,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )
        self.vocab = llama_cpp.llama_model_get_vocab(self.llama.model)
        size = self.llama.n_vocab()
        self.end_ids = {i for i in range(size) if llama_cpp.llama_vocab_is_eog(self.vocab, i)}

    def close(self) -> None:
        self.llama.close()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, in which special tokens are plain text."""
        return self.llama.tokenize(text.encode(), add_bos=False, special=False)

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The text of ids; special tokens have none."""
        buffer = ctypes.create_string_buffer(LONGEST)
        piece = self.api.llama_token_to_piece
        sizes = (piece(self.vocab, i, buffer, LONGEST, 0, False) for i in ids)
        return b"".join(buffer.raw[:size] for size in sizes)

    def greedy(self, prompt: list[int], max_new: int) -> list[int]:
        """The likeliest tokens after the prompt, up to one that ends it."""
        new: list[int] = []
        for token in self.llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
            new.append(token)
            if len(new) == max_new or token in self.end_ids:
                break
        return new
