"""Owns the split, the windows and which of them a step sees: TextDataModule.

The way of the data: 1. `corpus` makes one token array. 2. Its first part trains, the rest
validates. 3. A window is context_length + 1 tokens. 4. x is a window without its last token, y
without its first: y[t] is what follows x[t]. The shift happens here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from itertools import count
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.huggingface.importing import check_ids, fingerprint_of, is_folder
from lit_gpt.text.corpus import Corpus, cut_safely, load_corpus, split_at
from lit_gpt.text.files import Reader, find_files
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import bpe_size
from lit_gpt.training.init_from import load_tokenizer_of

Batch = tuple[Tensor, Tensor]  # x and y, each (B, T) int64


def read_windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    """Windows of `length` tokens and their targets: x (B, T) and y (B, T), one later."""
    windows = tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)  # (B, T + 1)
    windows = torch.from_numpy(np.asarray(windows))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class TrainBatches:
    """Endless batches from batch `start` on; batch i is a pure function of (seed, i, rank).

    So a resumed run has nothing to replay: it starts at the batch that comes next.

    Args:
        order: random (starts drawn anyhow) or shuffled (each epoch passes over windows without
            overlap, in a new order and from a new offset).
    """

    def __init__(
        self,
        tokens: np.ndarray,
        batch_size: int,
        context_length: int,
        order: str = "random",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        self.tokens, self.batch_size, self.context_length = tokens, batch_size, context_length
        self.seed, self.rank, self.world_size, self.start = seed, rank, world_size, start
        self.starts = {"random": self._random_starts, "shuffled": self._shuffled_starts}[order]
        self.last_start = len(tokens) - context_length - 1
        assert self.last_start >= 0
        self.max_offset = min(context_length - 1, self.last_start)
        self.epoch_windows = (len(tokens) - 1 - self.max_offset) // context_length
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in count(self.start))

    def __getitem__(self, i: int) -> Batch:
        return read_windows(self.tokens, self.starts(i), self.context_length)

    def _random_starts(self, i: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, i, self.rank))
        return rng.integers(0, self.last_start, self.batch_size, endpoint=True)

    def _shuffled_starts(self, i: int) -> np.ndarray:
        first = (i * self.world_size + self.rank) * self.batch_size  # in the endless row of windows
        places = [divmod(first + j, self.epoch_windows) for j in range(self.batch_size)]
        return np.array([self._epoch_starts(epoch)[place] for epoch, place in places])

    def _epoch_starts(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            offset = rng.integers(0, self.max_offset, endpoint=True)
            starts = offset + rng.permutation(self.epoch_windows) * self.context_length
            self._epoch = (epoch, starts)
        return self._epoch[1]


class EvalBatches:
    """The same windows at every evaluation, spread evenly over the split.

    Args:
        max_windows: how many there are without a limit; `len` counts their batches.
        limit: how many batches (int), or which share of them (float), as in limit_val_batches.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        batch_size: int,
        context_length: int,
        max_windows: int,
        limit: int | float = 1.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.tokens, self.batch_size, self.context_length = tokens, batch_size, context_length
        # As many for each rank, and at least one.
        max_windows = max(max_windows - max_windows % world_size, world_size)
        self.num_batches = -(-max_windows // (batch_size * world_size))
        wanted = limit if isinstance(limit, int) else int(limit * self.num_batches)
        windows = min(wanted * batch_size * world_size, max_windows)
        starts = np.linspace(0, len(tokens) - context_length - 1, windows).astype(np.int64)
        self.starts = starts[rank::world_size]

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        for i in range(0, len(self.starts), self.batch_size):
            starts = self.starts[i : i + self.batch_size]
            yield read_windows(self.tokens, starts, self.context_length)


class EveryToken:
    """Batches in which each token of the split, but the first, is a target exactly once."""

    def __init__(self, tokens: np.ndarray, batch_size: int, context_length: int) -> None:
        self.tokens, self.batch_size, self.context_length = tokens, batch_size, context_length

    def __len__(self) -> int:
        windows, rest = divmod(len(self.tokens) - 1, self.context_length)
        return -(-windows // self.batch_size) + (rest > 0)

    def __iter__(self) -> Iterator[Batch]:
        windows, rest = divmod(len(self.tokens) - 1, self.context_length)
        starts = np.arange(windows) * self.context_length
        for i in range(0, windows, self.batch_size):
            yield read_windows(self.tokens, starts[i : i + self.batch_size], self.context_length)
        if rest:
            yield read_windows(self.tokens, np.array([len(self.tokens) - 1 - rest]), rest)


class TextDataModule(pl.LightningDataModule):
    """Text files as batches of token windows: tokenization, the split, the loaders.

    Args:
        path: a text file, a folder of them, a glob ("texts/**/*.txt"), or a list of such. Files
            may be compressed (.gz, .zst). .jsonl and .parquet files have documents, .csv and
            .tsv too where `text_field` is given: an end-of-text token follows each. All others
            are plain text.
        tokenizer: any name of tiktoken's, `bytes` for raw UTF-8 bytes, bpe:4096 for 4096 tokens
            (the 256 bytes among them) trained on the training split, a .tiktoken file (its text
            is split as by cl100k_base), or a .ckpt file or a local Hugging Face folder, for its
            tokenizer as it is.
        compact_vocab: whether tokens that the corpus never uses are left out of the vocabulary;
            not so with bpe:N, which has N, nor with a .ckpt file or a folder.
        encoding: of the files, by Python's name for it.
        text_field: the field or column that holds the documents; None: `text` of .jsonl and
            .parquet files, and .csv and .tsv files are plain text.
        train_fraction: share of the tokens, from the front, that trains; the rest validates.
        batch_size: windows a step, on each device.
        context_length: tokens of a window.
        order: random (each window starts anywhere) or shuffled (each epoch passes once over the
            text, in windows without overlap).
        seed: of the choice of windows.
        cache: folder for encoded corpora.

    Raises:
        UserError: a text or values that can't be used.
    """

    def __init__(
        self,
        path: str | list[str] = "data/订单商品名称.csv",
        tokenizer: str = "cl100k_base",
        compact_vocab: bool = True,
        encoding: str = "utf-8",
        text_field: str | None = None,
        train_fraction: float = 0.9,
        batch_size: int = 2,
        context_length: int = 128,
        order: Literal["random", "shuffled"] = "random",
        seed: int = 1337,
        cache: str = "~/.cache/lit_gpt",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name in ("batch_size", "context_length"):
            if self.hparams[name] < 1:
                raise UserError(f"--data.{name} must be at least 1, not {self.hparams[name]}")
        if not 0 < train_fraction < 1:
            raise UserError(
                f"--data.train_fraction must be above 0 and below 1, not {train_fraction}"
            )
        if order not in ("random", "shuffled"):
            raise UserError(f"--data.order must be random or shuffled, not {order!r}")

    @cached_property
    def corpus(self) -> Corpus:
        """The whole corpus; the first use encodes it, unless the cache has it."""
        h = self.hparams
        tokenizer = load_tokenizer_of(h.tokenizer) if self.is_given else h.tokenizer
        options = (self.is_compact, h.encoding, h.cache, h.train_fraction, h.text_field)
        corpus = load_corpus(h.path, tokenizer, *options)
        if is_folder(h.tokenizer):
            self._check_ids(corpus)
        cut = self._cut(corpus.tokens)
        sizes = {"training": cut, "validation": corpus.info.num_tokens - cut}
        for split, size in sizes.items():
            if size < h.context_length + 1:
                raise UserError(
                    f"{h.path} is too short: its {split} split has {size:,} of "
                    f"{corpus.info.num_tokens:,} tokens and a window needs "
                    f"{h.context_length + 1:,}: give more text, a smaller --data.context_length "
                    "or another --data.train_fraction"
                )
        return corpus

    def _check_ids(self, corpus: Corpus) -> None:
        """The folder's own tokenizer must give the same ids; once for each text."""
        h = self.hparams
        reader = Reader(find_files(h.path), h.encoding, corpus.info.fingerprint, h.text_field)
        check = partial(check_ids, h.tokenizer, corpus.tokens, cut_safely(reader))
        corpus.remember(f"same_ids_{fingerprint_of(h.tokenizer)}", check)

    @property
    def is_given(self) -> bool:
        """Whether the tokenizer is that of a model, to be taken as it is."""
        return self.hparams.tokenizer.endswith(".ckpt") or is_folder(self.hparams.tokenizer)

    @property
    def is_compact(self) -> bool:
        h = self.hparams
        return h.compact_vocab and not (self.is_given or bpe_size(h.tokenizer))

    @property
    def vocabulary_name(self) -> str:
        """Where the vocabulary comes from, and whether it is smaller than that says."""
        name = self.hparams.tokenizer
        if self.vocab_size < (bpe_size(name) or 0):
            return f"{name}, and the text has no more to merge"
        return f"{name}, compact" if self.is_compact else name

    @property
    def tokenizer(self) -> Tokenizer:
        return self.corpus.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def train_tokens(self) -> np.ndarray:
        return self.corpus.tokens[: self._cut(self.corpus.tokens)]

    @property
    def val_tokens(self) -> np.ndarray:
        return self.corpus.tokens[self._cut(self.corpus.tokens) :]

    def _cut(self, tokens: np.ndarray) -> int:
        return split_at(len(tokens), self.hparams.train_fraction)

    def train_dataloader(self) -> TrainBatches:
        h, trainer = self.hparams, self.trainer
        return TrainBatches(
            self.train_tokens,
            h.batch_size,
            h.context_length,
            h.order,
            h.seed,
            trainer.global_rank,
            trainer.world_size,
            start=trainer.global_step * trainer.accumulate_grad_batches,
        )

    def val_dataloader(self) -> dict[str, EvalBatches]:
        h, trainer = self.hparams, self.trainer
        limit, ranks = trainer.limit_val_batches, (trainer.global_rank, trainer.world_size)
        splits = {"train": self.train_tokens, "val": self.val_tokens}
        max_windows = (min(map(len, splits.values())) - 1) // h.context_length  # without overlap
        return {
            name: EvalBatches(tokens, h.batch_size, h.context_length, max_windows, limit, *ranks)
            for name, tokens in splits.items()
        }

    def transfer_batch_to_device(self, batch: Any, device: torch.device, index: int) -> Any:
        if device.type != "cuda":
            return super().transfer_batch_to_device(batch, device, index)
        # From pinned memory the copy goes on beside the computation, and nobody waits for it.
        return tuple(part.pin_memory().to(device, non_blocking=True) for part in batch)

    def whole_val_split(self) -> EveryToken:
        """The validation split, every token of it, for the final loss."""
        h = self.hparams
        return EveryToken(self.val_tokens, max(h.batch_size, 8), h.context_length)
