"""TextDataModule: the windows of a text, and which of them a step sees.

From text to batches: 1. `text.corpus` makes one token array. 2. `text.splits` divides it: its first
part trains, the rest validates. 3. A window is context_length + 1 tokens. 4. x is a window without
its last token, y without its first: y[t] follows x[t]. The shift by one happens in `read_windows`,
nowhere else.
Shapes: B batch (windows), T time (tokens).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lit_gpt.errors import UserError, check_choice, check_least
from lit_gpt.text.corpus import Corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.finding import SAMPLE
from lit_gpt.text.splits import Splits, split_text, two_texts
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import Vocabulary

Batch = tuple[Tensor, Tensor]  # x and y, each (B, T) int64


def read_windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    """The windows at `starts` (B,), and their targets: x and y, each (B, length)."""
    windows = tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)  # (B, T + 1)
    ids = torch.from_numpy(np.asarray(windows))
    x = ids[:, :-1].contiguous()  # (B, T)
    y = ids[:, 1:].contiguous()  # (B, T), one token later
    return x, y


def epoch_windows(num_tokens: int, context_length: int) -> int:
    """How many windows make an epoch: those without overlap, wherever the first one starts."""
    max_offset = min(context_length - 1, num_tokens - context_length - 1)
    return (num_tokens - 1 - max_offset) // context_length


@dataclass(eq=False)
class TrainBatches:
    """Endless batches from batch `start` on; batch i is a pure function of (seed, i, rank).

    So a resumed run has nothing to replay: it starts at the batch that comes next.

    Args:
        order: random (each window starts anywhere) or shuffled (each epoch goes through windows
            that do not overlap, in a new order and from a new offset).
        limit: how many batches there are, which come round again and again; None: no limit.
    """

    tokens: np.ndarray
    batch_size: int
    context_length: int
    order: str = "random"
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    start: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        orders = {"random": self._random_starts, "shuffled": self._shuffled_starts}
        self.starts = orders[self.order]
        self.last_start = len(self.tokens) - self.context_length - 1
        assert self.last_start >= 0
        self.max_offset = min(self.context_length - 1, self.last_start)
        self.epoch_windows = epoch_windows(len(self.tokens), self.context_length)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in count(self.start))

    def __getitem__(self, i: int) -> Batch:
        place = i if self.limit is None else i % self.limit
        return read_windows(self.tokens, self.starts(place), self.context_length)

    def _random_starts(self, i: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, i, self.rank))
        return rng.integers(0, self.last_start, self.batch_size, endpoint=True)

    def _shuffled_starts(self, i: int) -> np.ndarray:
        first = (i * self.world_size + self.rank) * self.batch_size  # counted over all epochs
        places = [divmod(first + j, self.epoch_windows) for j in range(self.batch_size)]
        return np.array([self._epoch_starts(epoch)[place] for epoch, place in places])

    def _epoch_starts(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            offset = rng.integers(0, self.max_offset, endpoint=True)
            starts = offset + rng.permutation(self.epoch_windows) * self.context_length
            self._epoch = (epoch, starts)
        return self._epoch[1]


@dataclass(eq=False)
class EpochBatches:
    """The first `limit` batches in each of Lightning's epochs, from its place in the epoch on.

    For a plain Trainer with limit_train_batches; the training command makes one endless epoch.
    """

    batches: TrainBatches
    limit: int
    trainer: pl.Trainer

    def __iter__(self) -> Iterator[Batch]:
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return (self.batches[i] for i in range(done % self.limit, self.limit))


@dataclass(eq=False)
class EvalBatches:
    """The same windows at every evaluation, spread evenly over the split.

    Args:
        max_windows: how many there are without a limit; `len` counts their batches.
        limit: number (int) or share (float) of the batches, as in limit_val_batches.
    """

    tokens: np.ndarray
    batch_size: int
    context_length: int
    max_windows: int
    limit: int | float = 1.0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        # The same number for each rank, and at least one.
        most = max(self.max_windows - self.max_windows % self.world_size, self.world_size)
        batch_of_all = self.batch_size * self.world_size
        self.num_batches = -(-most // batch_of_all)
        limit = self.limit
        batches = limit if isinstance(limit, int) else int(limit * self.num_batches)
        windows = min(batches * batch_of_all, most)
        last_start = len(self.tokens) - self.context_length - 1
        starts = np.linspace(0, last_start, windows).astype(np.int64)
        self.starts = starts[self.rank :: self.world_size]

    def use(self, batches: TrainBatches) -> None:
        """Takes the windows of `batches` instead, which must have a limit."""
        self.num_batches = batches.limit or 0
        self.starts = np.concatenate([batches.starts(i) for i in range(self.num_batches)])

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        for i in range(0, len(self.starts), self.batch_size):
            starts = self.starts[i : i + self.batch_size]
            yield read_windows(self.tokens, starts, self.context_length)


class TextDataModule(pl.LightningDataModule):
    """Text files as batches of token windows: tokenization, the split, the loaders.

    Args:
        path: a text file, a folder of them, a glob ("texts/**/*.txt"), or a list of such. Files
            may be compressed. .json, .jsonl, .ndjson and .parquet files have documents, and so have
            .csv and .tsv files where `text_field` is given: an end-of-text token follows each.
            All others are plain text.
        tokenizer: the name of any tiktoken encoding; `bytes` for raw UTF-8 bytes; bpe:4096 for
            4096 tokens (the 256 bytes among them) trained on the training split; `chars` for the
            bytes and the characters of that split; a .tiktoken file (its text is split as by
            cl100k_base); a SentencePiece .model file; or, in the training command, a tokenizer.json
            file, a .ckpt file or a local Hugging Face folder for its model's own tokenizer.
        compact_vocab: whether to leave tokens that the corpus never uses out of the vocabulary;
            does not apply to bpe:N and chars, nor to a model's own tokenizer.
        encoding: encoding of the files, as a Python codec name.
        text_field: the field or column that holds the documents ("data.text" for the field `text`
            of the field `data`), or a list of them, joined with line ends; a field may also hold
            chat messages. None: `text`, while .csv and .tsv files are plain text.
        tsv_quotes: whether fields of .tsv files may be in double quotes, as those of .csv files.
        train_fraction: share of the tokens, from the front, that trains; the rest validates.
        val_path: another text that validates, named like `path`; all of `path` trains then.
        exclude: globs of files and folders to leave out of folders, globs and archives: of names
            ("*.log") or, with a slash, of paths inside the folder ("old/*").
        batch_size: windows per step and device.
        context_length: tokens per window.
        order: random (each window starts anywhere) or shuffled (each epoch goes through the text
            once, in windows that do not overlap).
        seed: of the choice of windows.
        cache: folder for encoded corpora; None: the platform's cache folder.

    Attributes:
        given_tokenizer: a model's own tokenizer instead of `tokenizer`'s; set it before first use.
        train_batches: how many batches come round again and again in training; None: no limit. The
            training command sets it to `limit_train_batches` or `overfit_batches`.
        overfit: whether the evaluation of the training split uses these very batches.

    Raises:
        UserError: a text or values that can't be used.
    """

    hparams: Any  # the arguments of __init__, all of plain types: checkpoints hold them
    trainer: Any  # pl.Trainer, while it uses this

    def __init__(
        self,
        path: str | list[str] = SAMPLE,
        tokenizer: str = "cl100k_base",
        compact_vocab: bool = True,
        encoding: str = "utf-8",
        text_field: str | list[str] | None = None,
        tsv_quotes: bool = False,
        train_fraction: float = 0.9,
        val_path: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        batch_size: int = 2,
        context_length: int = 128,
        order: Literal["random", "shuffled"] = "random",
        seed: int = 1337,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.given_tokenizer: Tokenizer | None = None
        self.train_batches: int | None = None
        self.overfit = False
        check_least(1, batch_size=batch_size, context_length=context_length)
        check_choice(("random", "shuffled"), order=order)
        if not 0 < train_fraction < 1:
            raise UserError("must be between 0 and 1", field="train_fraction", value=train_fraction)

    @cached_property
    def splits(self) -> Splits:
        """The tokens of both splits; the first use encodes the text, unless the cache has it.

        Raises:
            UserError: a text or tokenizer that can't be used, or too short a text.
        """
        h = self.hparams
        text = TextFiles(h.path, h.exclude, h.encoding, h.text_field, h.tsv_quotes, h.cache)
        if h.val_path is None:
            splits = split_text(text, self.vocabulary, h.train_fraction)
            hint = "use more text, a smaller `context_length` or another `train_fraction`"
        else:
            splits = two_texts(text, h.val_path, self.vocabulary)
            hint = "use more text or a smaller `context_length`"
        val_field = "path" if splits.is_one_text else "val_path"
        for field, name, tokens, corpus in (
            ("path", "training", splits.train, splits.corpus),
            (val_field, "validation", splits.val, splits.val_corpus),
        ):
            if len(tokens) <= h.context_length:
                problem = (
                    f"too short: its {name} split has {len(tokens):,} of {len(corpus.tokens):,} "
                    f"tokens, and a window needs {h.context_length + 1:,}"
                )
                raise UserError(problem, field=field, value=h[field], hint=hint)
        return splits

    @property
    def vocabulary(self) -> Vocabulary:
        tokenizer = self.given_tokenizer or self.hparams.tokenizer
        return Vocabulary(tokenizer, self.hparams.compact_vocab)

    @property
    def corpus(self) -> Corpus:
        """The training text, or both splits of one text."""
        return self.splits.corpus

    @property
    def tokenizer(self) -> Tokenizer:
        return self.corpus.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def train_tokens(self) -> np.ndarray:
        return self.splits.train

    @property
    def val_tokens(self) -> np.ndarray:
        return self.splits.val

    def _sizes_and_ranks(self) -> tuple[tuple[int, int], tuple[int, int]]:
        h = self.hparams
        trainer = self.trainer
        return (h.batch_size, h.context_length), (trainer.global_rank, trainer.world_size)

    def _endless_batches(self) -> TrainBatches:
        sizes, ranks = self._sizes_and_ranks()
        order = (self.hparams.order, self.hparams.seed)
        start = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return TrainBatches(self.train_tokens, *sizes, *order, *ranks, start, self.train_batches)

    def train_dataloader(self) -> TrainBatches | EpochBatches:
        batches = self._endless_batches()
        limit = self.trainer.limit_train_batches
        if isinstance(limit, int) and limit > 0:
            return EpochBatches(batches, limit, self.trainer)
        return batches

    def val_dataloader(self) -> dict[str, EvalBatches]:
        """Equally many windows of both splits, in the order of `module.SPLITS`.

        To overfit, the training split's are the batches that it trains on.
        """
        sizes, ranks = self._sizes_and_ranks()
        splits = {"train": self.train_tokens, "val": self.val_tokens}
        max_windows = (min(map(len, splits.values())) - 1) // sizes[1]  # without overlap
        limit = self.trainer.limit_val_batches
        loaders = {
            name: EvalBatches(tokens, *sizes, max_windows, limit, *ranks)
            for name, tokens in splits.items()
        }
        if limit and not len(loaders["val"].starts):
            problem = f"is less than one of {len(loaders['val']):,} batches"
            hint = "give a number of batches"
            raise UserError(problem, field="limit_val_batches", value=limit, hint=hint)
        if self.overfit:
            loaders["train"].use(self._endless_batches())
        return loaders

    def transfer_batch_to_device(self, batch: Any, device: torch.device, index: int) -> Any:
        if device.type != "cuda":
            return super().transfer_batch_to_device(batch, device, index)
        # From pinned memory the copy runs beside the computation.
        return tuple(part.pin_memory().to(device, non_blocking=True) for part in batch)
