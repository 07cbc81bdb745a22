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
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lit_gpt.errors import UserError, check_choice, check_least
from lit_gpt.store.order import StoreOrder
from lit_gpt.store.reading import StoreTokens
from lit_gpt.store.splits import open_splits
from lit_gpt.text.answers import LossOn
from lit_gpt.text.corpus import Corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.finding import SAMPLE, is_token_store
from lit_gpt.text.packing import Packs
from lit_gpt.text.splits import Splits, split_text, two_texts
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import Vocabulary
from lit_gpt.windows import IGNORED, ORDERS, Order, RandomOrder, RandomOrderByRank, Rounds

Batch = tuple[Tensor, ...]  # x and y, each (B, T) int64; the weight of `TrainBatches` may follow


def read_windows(tokens: Any, starts: np.ndarray, length: int) -> Batch:
    """The windows at `starts` (B,), and their targets: x and y, each (B, length).

    Args:
        tokens: (N,) ids; or what has `windows(starts, length)`, which gives ids (B, length); or
            conversations, of which some targets are IGNORED, and `starts` are numbers of windows.
    """
    is_counted: Any = None
    if isinstance(tokens, np.ndarray):
        windows = tokens[starts[:, None] + np.arange(length + 1)]  # (B, T + 1)
    elif isinstance(tokens, Packs):
        windows, is_counted = tokens.windows(starts)
    else:
        windows = tokens.windows(starts, length + 1)
    ids = torch.from_numpy(np.asarray(windows.astype(np.int64)))
    x = ids[:, :-1].contiguous()  # (B, T)
    y = ids[:, 1:].contiguous()  # (B, T), one token later
    if is_counted is not None:  # of one window, x and y share their memory
        y = y.masked_fill(torch.from_numpy(~is_counted[:, 1:]), IGNORED)
    return x, y


def padding(tokens: Any, length: int) -> Batch:
    """A batch without targets, for a rank that has none left: no rank may compute alone."""
    x, y = read_windows(tokens, np.zeros(1, np.int64), length)
    return x, y[:0]


@dataclass(eq=False)
class TrainBatches:
    """Endless batches from window `first` on: all ranks' batches i follow those of i - 1.

    So a resumed run has nothing to replay: it starts at the window that comes next.

    Args:
        first: how many windows were read before.
        limit: how many batches there are, which come round again and again; None: no limit.
        step_batches: how many make a step, on each device.
    """

    tokens: Any
    order: Order
    batch_size: int
    context_length: int
    rank: int = 0
    world_size: int = 1
    first: int = 0
    limit: int | None = None
    step_batches: int = 1

    def __post_init__(self) -> None:
        if self.limit is not None:
            self.order = Rounds(self.order, self.limit * self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in count())

    def __getitem__(self, i: int) -> Batch:
        batch = read_windows(self.tokens, self.starts(i), self.context_length)
        return (*batch, self.weight(i)) if isinstance(self.tokens, Packs) else batch

    def weight(self, i: int) -> Tensor:
        """How many times the mean loss of batch i counts, by its share of the step's targets.

        The mean over all batches of a step, on all devices, is that over its targets then. A
        fraction, (2,) int64: Lightning would round a number to the precision of the weights.
        """
        batches = self.step_batches * self.world_size
        first = self.first + i // self.step_batches * batches * self.batch_size
        of_step = self.tokens.counts[self.order.starts(first, batches * self.batch_size)].sum()
        return torch.tensor([self.tokens.counts[self.starts(i)].sum() * batches, of_step])

    def starts(self, i: int) -> np.ndarray:
        """Where the windows of batch i start, (batch_size,)."""
        first = self.first + (i * self.world_size + self.rank) * self.batch_size
        return self.order.starts(first, self.batch_size)


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

    The ranks share them, and have equally many batches: `padding` fills up.

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
        batch_of_all = self.batch_size * self.world_size
        self.num_batches = -(-self.max_windows // batch_of_all)
        limit = self.limit
        batches = limit if isinstance(limit, int) else int(limit * self.num_batches)
        windows = min(batches * batch_of_all, self.max_windows)
        self.rank_windows = -(-windows // self.world_size)  # of the first rank, which has most
        last_start = len(self.tokens) - 1
        if not isinstance(self.tokens, Packs):
            last_start -= self.context_length
        starts = np.linspace(0, last_start, windows).astype(np.int64)
        self.starts = starts[self.rank :: self.world_size]

    def use(self, batches: TrainBatches) -> None:
        """Takes the windows of `batches` instead, which must have a limit."""
        self.num_batches = batches.limit or 0
        self.starts = np.concatenate([batches.starts(i) for i in range(self.num_batches)])
        self.rank_windows = len(self.starts)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        for i in range(0, self.rank_windows, self.batch_size):
            starts = self.starts[i : i + self.batch_size]
            if len(starts):
                yield read_windows(self.tokens, starts, self.context_length)
            else:
                yield padding(self.tokens, self.context_length)


class TextDataModule(pl.LightningDataModule):
    """Text files as batches of token windows: tokenization, the split, the loaders.

    Args:
        path: a text file, a folder of them, a glob ("texts/**/*.txt"), or a list of such; or a
            token store: a folder or an address such as s3://bucket/prefix. Files
            may be compressed. .json, .jsonl, .ndjson and .parquet files have documents, and so have
            .csv and .tsv files where `text_field` is given: an end-of-text token follows each.
            All others are plain text.
        tokenizer: the name of any tiktoken encoding; `bytes` for raw UTF-8 bytes; bpe:4096 for
            4096 tokens (the 256 bytes among them) trained on the training split; `chars` for the
            bytes and the characters of that split; a .tiktoken file (its text is split as by
            cl100k_base); a SentencePiece .model file; or, in the training command, a tokenizer.json
            file, a .ckpt file or a local Hugging Face folder for its model's own tokenizer.
        compact_vocab: whether to leave tokens that the training split never uses out of the
            vocabulary; does not apply to bpe:N and chars, nor to a model's own tokenizer.
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
        loss_on: which tokens of conversations the model learns: answers, with what ends each, or
            all. None: answers where rows have `messages`, or `prompt` and `completion`, instead of
            a text. With a `text_field`, it makes a conversation of the messages in that field.

    Attributes:
        given_tokenizer: a model's own tokenizer instead of `tokenizer`'s; set it before first use.
        ends_files: false to have no end of text, as in earlier releases; see `Vocabulary`.
        has_validation_tokens: true to keep these in a compact vocabulary, as in earlier releases.
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
        loss_on: LossOn | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.given_tokenizer: Tokenizer | None = None
        self.ends_files = True
        self.has_validation_tokens = False
        self.train_batches: int | None = None
        self.overfit = False
        self._place: tuple[int, int] | None = None  # windows read up to a step, and that step
        self._loaded: int | None = None  # windows read, by a checkpoint that is being resumed
        check_least(1, batch_size=batch_size, context_length=context_length)
        check_choice(tuple(ORDERS), order=order)
        check_choice((None, *get_args(LossOn)), loss_on=loss_on)
        if not 0 < train_fraction < 1:
            raise UserError("must be between 0 and 1", field="train_fraction", value=train_fraction)

    def __str__(self) -> str:
        return repr(self)  # Lightning's would count what the loaders have, and one has no end

    @cached_property
    def splits(self) -> Splits:
        """The tokens of both splits; the first use encodes the text, unless the cache has it.

        Raises:
            UserError: a text or tokenizer that can't be used, or too short a text.
        """
        h = self.hparams
        files = (h.path, h.exclude, h.encoding, h.text_field, h.tsv_quotes, h.cache, h.loss_on)
        text = TextFiles(*files)
        if is_token_store(h.path):
            splits = open_splits(text, self.vocabulary, h.train_fraction, h.val_path)
            hint = "use more text or a smaller `context_length`"
        elif h.val_path is None:
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
            if corpus.flags is None and len(tokens) <= h.context_length:
                problem = (
                    f"too short: its {name} split has {len(tokens):,} of {len(corpus.tokens):,} "
                    f"tokens, and a window needs {h.context_length + 1:,}"
                )
                raise UserError(problem, field=field, value=h[field], hint=hint)
        return splits

    @property
    def vocabulary(self) -> Vocabulary:
        tokenizer = self.given_tokenizer or self.hparams.tokenizer
        before = (self.ends_files, self.has_validation_tokens)
        return Vocabulary(tokenizer, self.hparams.compact_vocab, *before)

    @property
    def corpus(self) -> Corpus:
        """The training text, or both splits of one text."""
        return self.splits.corpus

    @property
    def tokenizer(self) -> Tokenizer:
        return self.splits.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def train_tokens(self) -> np.ndarray:
        return self.splits.train

    @property
    def val_tokens(self) -> np.ndarray:
        return self.splits.val

    @cached_property
    def windows(self) -> dict[str, Any]:
        """What the windows of "train" and "val" are read from: ids, or whole conversations."""
        return self.splits.windows(self.hparams.context_length)

    def _sizes_and_ranks(self) -> tuple[tuple[int, int], tuple[int, int]]:
        h = self.hparams
        trainer = self.trainer
        return (h.batch_size, h.context_length), (trainer.global_rank, trainer.world_size)

    @cached_property
    def order(self) -> Order:
        """The order of the training windows."""
        h = self.hparams
        tokens = self.windows["train"]
        if isinstance(tokens, StoreTokens):
            return StoreOrder(tokens, h.context_length, h.seed, h.order)
        if isinstance(tokens, Packs):  # any of which may be drawn, as a window that has one place
            return ORDERS[h.order](len(tokens) + 1, 1, h.seed)
        return ORDERS[h.order](len(tokens), h.context_length, h.seed)

    @property
    def windows_seen(self) -> int:
        """How many windows of the order the steps so far have read, on all devices together."""
        seen, since = self._place or (0, 0)
        trainer = self.trainer
        batches = (trainer.global_step - since) * trainer.accumulate_grad_batches
        return seen + batches * self.hparams.batch_size * trainer.world_size

    def _find_place(self) -> None:
        """Sets from which window on the trainer goes on, once it knows its step."""
        seen = self.windows_seen if self._loaded is None else self._loaded
        is_older = self._place is None and self._loaded is None and self.trainer.global_step > 0
        if is_older and isinstance(order := self.order, RandomOrder):
            self.order = RandomOrderByRank(order, self.trainer.world_size)
        step = self.trainer.global_step
        self._place = (seen if step else 0, step)  # whatever another trainer did with this
        self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """Empty for a run that began with an earlier version, which is continued as it began."""
        if self._place is None or isinstance(self.order, RandomOrderByRank):
            return {}
        return {"windows_seen": self.windows_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict.get("windows_seen")

    def _batches_from(self, first: int) -> TrainBatches:
        sizes, ranks = self._sizes_and_ranks()
        parts = self.trainer.accumulate_grad_batches
        limit = self.train_batches
        return TrainBatches(self.windows["train"], self.order, *sizes, *ranks, first, limit, parts)

    def train_dataloader(self) -> TrainBatches | EpochBatches:
        self._find_place()
        limit = self.trainer.limit_train_batches
        if isinstance(limit, int) and limit > 0:
            return EpochBatches(self._batches_from(0), limit, self.trainer)
        # The next batch begins a step, whatever number of them a step took before.
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        batches = self.trainer.global_step * self.trainer.accumulate_grad_batches
        for counted in (progress.current, progress.total):  # by the second, evaluations come
            counted.increment_by(batches - counted.ready)
        return self._batches_from(self.windows_seen)

    def val_dataloader(self) -> dict[str, EvalBatches]:
        """Equally many windows of both splits, in the order of `module.SPLITS`.

        To overfit, the training split's are the batches that it trains on.
        """
        sizes, ranks = self._sizes_and_ranks()
        lengths = {  # in windows without overlap
            name: len(tokens) if isinstance(tokens, Packs) else (len(tokens) - 1) // sizes[1]
            for name, tokens in self.windows.items()
        }
        limit = self.trainer.limit_val_batches
        loaders = {
            name: EvalBatches(tokens, *sizes, min(lengths.values()), limit, *ranks)
            for name, tokens in self.windows.items()
        }
        if limit and not loaders["val"].rank_windows:
            problem = f"is less than one of {len(loaders['val']):,} batches"
            hint = "give a number of batches"
            raise UserError(problem, field="limit_val_batches", value=limit, hint=hint)
        if self.overfit:
            loaders["train"].use(self._batches_from(0))
        return loaders

    def transfer_batch_to_device(self, batch: Any, device: torch.device, index: int) -> Any:
        if device.type != "cuda":
            return super().transfer_batch_to_device(batch, device, index)
        # From pinned memory the copy runs beside the computation.
        return tuple(part.pin_memory().to(device, non_blocking=True) for part in batch)
