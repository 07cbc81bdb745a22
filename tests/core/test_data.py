"""The split, the windows, the shift by one, and which windows a step and an evaluation see."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from lightning.pytorch.loops.progress import _BatchProgress

from lit_gpt.callbacks.evaluation import FinalEvaluation
from lit_gpt.data import EvalBatches, TextDataModule, TrainBatches, read_windows
from lit_gpt.errors import UserError
from lit_gpt.evaluation.whole_text import WholeText
from lit_gpt.module import LitGPT
from lit_gpt.text.vocabularies import load_tokenizer
from lit_gpt.windows import ORDERS

ROOT = Path(__file__).parents[2]


def row(num_tokens: int) -> np.ndarray:
    """Tokens that say where they stand, so that a window's first token is its start."""
    return np.arange(num_tokens, dtype=np.uint16)


def starts(batches) -> list[list[int]]:
    return [x[:, 0].tolist() for x, _ in batches]


def batches_of(order: str, num_tokens: int, batch_size: int, context_length: int, **options):
    """Training batches of a text of so many tokens."""
    seed = options.pop("seed", 0)
    made = ORDERS[order](num_tokens, context_length, seed)
    return TrainBatches(row(num_tokens), made, batch_size, context_length, **options)


def same(batches, others) -> bool:
    pairs = zip(batches, others, strict=True)
    return all(x.equal(other_x) and y.equal(other_y) for (x, y), (other_x, other_y) in pairs)


def first_epochs(batches: TrainBatches, windows: int, number: int) -> list[list[int]]:
    """The starts of the first epochs, each of so many windows."""
    flat = (start for batch in batches for start in batch[0][:, 0].tolist())
    return [list(islice(flat, windows)) for _ in range(number)]


# The shift


def test_targets_are_the_inputs_one_token_later():
    x, y = read_windows(np.array([5, 3, 8, 1, 9, 7, 2], np.uint16), np.array([0, 3]), 3)
    assert x.tolist() == [[5, 3, 8], [1, 9, 7]]
    assert y.tolist() == [[3, 8, 1], [9, 7, 2]]


@pytest.mark.parametrize(
    "batches",
    [
        batches_of("random", 100, 4, 7),
        batches_of("shuffled", 100, 4, 7),
        EvalBatches(row(100), 4, 7, max_windows=14),
        WholeText(row(100), 4, 7),
    ],
    ids=["random", "shuffled", "evaluation", "every token"],
)
def test_each_target_is_the_token_after_its_input_in_the_corpus(batches):
    for x, y in islice(batches, 50):
        assert y.equal(x + 1)  # shifted exactly once
        assert (x[:, 1:] == x[:, :-1] + 1).all()  # in the order of the corpus
        assert x.min() >= 0
        assert y.max() <= 99


# Training


@pytest.mark.parametrize("order", ORDERS)
def test_batches_continue_at_any_window(order):
    def batches(**options) -> TrainBatches:
        return batches_of(order, 50, 2, 4, **options)

    first_20 = list(islice(batches(), 20))
    assert same([batches()[i] for i in range(20)], first_20)
    again = batches()
    assert same([again[i] for i in reversed(range(20))], reversed(first_20))
    assert same(islice(batches(first=26), 7), first_20[13:])
    assert not same([batches(seed=1)[i] for i in range(20)], first_20)
    flat = [start for batch in starts(first_20) for start in batch]
    assert starts(islice(batches_of(order, 50, 3, 4, first=5), 4)) == [
        flat[5:8],
        flat[8:11],
        flat[11:14],
        flat[14:17],
    ]


def test_orders_differ():
    random, shuffled = (islice(batches_of(order, 50, 2, 4), 20) for order in ORDERS)
    assert not same(random, shuffled)


def test_random_windows_start_anywhere_from_the_first_to_the_last_place():
    batches = batches_of("random", 20, 4, 8)
    assert {start for batch in starts(islice(batches, 100)) for start in batch} == set(range(12))


@pytest.mark.parametrize("order", ORDERS)
def test_a_split_of_one_window_gives_that_window(order):
    assert starts(islice(batches_of(order, 9, 2, 8), 3)) == [[0, 0]] * 3


@pytest.mark.parametrize(
    ("num_tokens", "context_length", "batch_size", "windows"),
    [
        (101, 10, 2, 9),
        (100, 10, 4, 9),
        (109, 10, 9, 9),
        (110, 10, 3, 10),
        (21, 10, 5, 1),  # fewer windows than a batch takes: it spans epochs
        (15, 10, 2, 1),
        (30, 1, 4, 29),
    ],
)
def test_shuffled_epochs_pass_once_over_windows_without_overlap(
    num_tokens, context_length, batch_size, windows
):
    batches = batches_of("shuffled", num_tokens, batch_size, context_length)
    for epoch in first_epochs(batches, windows, 20):
        offset = min(epoch)
        assert sorted(epoch) == [offset + i * context_length for i in range(windows)]
        assert 0 <= offset < context_length
        assert max(epoch) + context_length + 1 <= num_tokens


def test_each_shuffled_epoch_has_a_new_order_and_offset():
    found = first_epochs(batches_of("shuffled", 200, 4, 5), 39, 100)
    assert {min(epoch) for epoch in found} == {0, 1, 2, 3, 4}
    orders = {tuple(start - min(epoch) for start in epoch) for epoch in found}
    assert len(orders) == 100


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("limit", [None, 7])
def test_ranks_together_see_the_windows_of_one_process(order, world_size, limit):
    def flat(batches) -> list[int]:
        return [start for batch in starts(batches) for start in batch]

    one = batches_of(order, 100, 2 * world_size, 4, first=9, limit=limit)
    ranks = [
        batches_of(order, 100, 2, 4, rank=rank, world_size=world_size, first=9, limit=limit)
        for rank in range(world_size)
    ]
    together = [
        batch for i in range(40) for batch in (ranks[rank][i] for rank in range(world_size))
    ]
    assert flat(together) == flat(one[i] for i in range(40))


# Evaluation


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1.0, [[0, 4], [8, 12], [16]]),
        (3, [[0, 4], [8, 12], [16]]),
        (99, [[0, 4], [8, 12], [16]]),
        (2, [[0, 5], [10, 16]]),
        (1, [[0, 16]]),
        (0.7, [[0, 5], [10, 16]]),
        (0.5, [[0, 16]]),
        (0, []),
    ],
)
def test_evaluation_windows_are_spread_from_the_first_to_the_last_place(limit, expected):
    batches = EvalBatches(row(21), 2, 4, max_windows=5, limit=limit)
    assert len(batches) == 3
    assert starts(batches) == expected
    assert starts(batches) == expected  # the same at every evaluation


@given(
    num_tokens=st.integers(2, 2000),
    context_length=st.integers(1, 100),
    batch_size=st.integers(1, 9),
    limit=st.integers(1, 50) | st.floats(0.01, 1),
)
def test_evaluation_windows_are_evenly_spread_and_never_overlap(
    num_tokens, context_length, batch_size, limit
):
    max_windows = (num_tokens - 1) // context_length
    assume(max_windows > 0)
    found = EvalBatches(row(num_tokens), batch_size, context_length, max_windows, limit).starts
    if len(found) > 1:
        gaps = np.diff(found)
        assert (found[0], found[-1]) == (0, num_tokens - context_length - 1)
        assert gaps.max() - gaps.min() <= 1
        assert gaps.min() >= context_length


@pytest.mark.parametrize("limit", [1, 2, 3, 1000, 0, 1.0, 0.9, 0.5, 0.34, 0.1])
@pytest.mark.parametrize(("max_windows", "batch_size"), [(99, 2), (99, 9), (10, 1)])
def test_limit_counts_batches_as_lightning_does(max_windows, batch_size, limit):
    """All of the limited windows are evaluated: Lightning stops at the last one, not before."""
    seen = []

    class Evaluated(pl.LightningModule):
        def validation_step(self, batch, batch_index):
            seen.append(batch)

    trainer = pl.Trainer(
        accelerator="cpu",
        limit_val_batches=limit,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    batches = EvalBatches(row(1000), batch_size, 10, max_windows, limit)
    trainer.validate(Evaluated(), batches, verbose=False)
    assert same(seen, batches)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("max_windows", "limit"), [(8, 1.0), (50, 4), (37, 1.0), (37, 0.6), (3, 1.0), (1, 1.0), (3, 9)]
)
def test_any_number_of_ranks_evaluates_the_windows_of_one_process(world_size, max_windows, limit):
    """Each of them once, and every rank as many batches as the others."""
    one_process = EvalBatches(row(200), 2 * world_size, 4, max_windows, limit)
    ranks = [
        list(EvalBatches(row(200), 2, 4, max_windows, limit, rank, world_size))
        for rank in range(world_size)
    ]
    counted = sorted(int(y[0]) - 1 for batches in ranks for _, ys in batches for y in ys)
    assert counted == one_process.starts.tolist()
    assert len({len(batches) for batches in ranks}) == 1
    for x, y in (batch for batches in ranks for batch in batches):
        assert x.shape[1] == y.shape[1] == 4
        assert len(x) == (len(y) or 1)  # padding has something to compute, and no targets


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("num_tokens", "max_tokens"), [(100, None), (97, None), (100, 30), (3, None)]
)
def test_ranks_share_a_whole_text(world_size, num_tokens, max_tokens):
    whole = WholeText(row(num_tokens), 2, 8, max_tokens)
    expected = [target for _, y in whole for target in y.flatten().tolist()]
    ranks = [
        WholeText(row(num_tokens), 2, 8, max_tokens, rank, world_size) for rank in range(world_size)
    ]
    batches = [list(rank) for rank in ranks]
    together = [batch for same_time in zip(*batches, strict=True) for batch in same_time]
    assert [target for _, y in together for target in y.flatten().tolist()] == expected
    assert {len(rank) for rank in ranks} == {len(batches[0])}
    assert all(len(x) >= 1 for x, _ in together)


@pytest.mark.parametrize(
    ("num_tokens", "context_length", "batch_size", "batches"),
    [
        (12, 4, 2, 2),
        (13, 4, 2, 2),
        (14, 4, 2, 3),
        (9, 4, 8, 1),
        (3, 4, 8, 1),
        (2, 1, 1, 1),
        (1, 1, 1, 0),
    ],
)
def test_every_token_but_the_first_is_a_target_once(
    num_tokens, context_length, batch_size, batches
):
    every_token = WholeText(row(num_tokens), batch_size, context_length)
    targets = [target for _, y in every_token for target in y.flatten().tolist()]
    assert targets == list(range(1, num_tokens))
    assert len(every_token) == len(list(every_token)) == batches


# TextDataModule


@pytest.fixture
def module(tmp_path):
    """`module("some text", batch_size=4)`: small windows of the bytes of a text."""

    def make(text: str, **options) -> TextDataModule:
        path = tmp_path / "text.txt"
        path.write_text(text, encoding="utf-8", newline="")
        small = {"tokenizer": "bytes", "context_length": 8, "cache": str(tmp_path / "cache")}
        return TextDataModule(str(path), **small | options)

    return make


def in_training(module: TextDataModule, **state) -> TextDataModule:
    """With what it reads of a trainer."""
    epoch_loop = SimpleNamespace(batch_progress=_BatchProgress())
    module.trainer = SimpleNamespace(
        **{"global_rank": 0, "world_size": 1, "global_step": 0, "accumulate_grad_batches": 1}
        | {"limit_val_batches": 1.0, "limit_train_batches": 1.0}
        | {"fit_loop": SimpleNamespace(epoch_loop=epoch_loop)}
        | state
    )
    return module


def test_default_options_read_the_sample_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = in_training(TextDataModule(cache=str(tmp_path)))
    text = (ROOT / "data" / "订单商品名称.csv").read_bytes().decode()
    info = module.corpus.info
    assert module.tokenizer.decode(module.corpus.tokens.tolist()) == text
    assert (info.num_characters, info.num_bytes) == (len(text), len(text.encode()))
    assert len(module.train_tokens) == int(0.9 * len(load_tokenizer("cl100k_base").encode(text)))
    assert len(module.train_tokens) + len(module.val_tokens) == info.num_tokens
    assert module.vocab_size < 10_000  # compact
    x, y = next(iter(module.train_dataloader()))
    assert x.shape == y.shape == (2, 128)


@pytest.mark.parametrize(
    ("num_tokens", "train_fraction", "train", "val"),
    [(1000, 0.9, 900, 100), (1009, 0.9, 908, 101), (1000, 0.5, 500, 500), (100, 0.1, 10, 90)],
)
def test_the_front_trains_and_the_rest_validates(num_tokens, train_fraction, train, val, module):
    text = "".join(chr(32 + i % 90) for i in range(num_tokens))
    data = module(text, train_fraction=train_fraction)
    assert bytes(data.train_tokens.tolist()).decode() == text[:train]
    assert bytes(data.val_tokens.tolist()).decode() == text[train:]
    assert len(data.val_tokens) == val


@pytest.mark.parametrize("order", ORDERS)
def test_windows_lie_inside_their_split(order, module):
    data = in_training(module("t" * 90 + "v" * 10, order=order))
    loaders = {
        "t": [islice(data.train_dataloader(), 200), data.val_dataloader()["train"]],
        "v": [data.val_dataloader()["val"], FinalEvaluation().batches(data)],
    }
    for letter, batches in loaders.items():
        for x, y in (batch for loader in batches for batch in loader):
            assert set(x.flatten().tolist() + y.flatten().tolist()) == {ord(letter)}


@pytest.mark.parametrize("order", ORDERS)
def test_training_continues_at_the_window_that_comes_next(module, order):
    """On another number of devices, with other batches and another accumulation."""
    text = "some text " * 50
    batches = in_training(module(text, order=order)).train_dataloader()
    flat = [int(start) for i in range(24) for start in batches.starts(i)]
    data = in_training(module(text, order=order), world_size=2, accumulate_grad_batches=3)
    assert data.state_dict() == {}
    data.train_dataloader()
    assert data.state_dict() == {"windows_seen": 0}
    data.trainer.global_step = 2
    state = data.state_dict()
    assert state == {"windows_seen": 2 * 2 * 2 * 3}
    resumed = in_training(module(text, order=order, batch_size=3), global_step=2)
    resumed.load_state_dict(state)
    batches = resumed.train_dataloader()
    assert [int(start) for i in range(4) for start in batches.starts(i)] == flat[24:36]
    resumed.trainer.global_step = 5
    assert resumed.state_dict() == {"windows_seen": 24 + 3 * 3}
    batches = resumed.train_dataloader()  # of a second fit
    assert batches.starts(0).tolist() == flat[33:36]


def test_a_new_run_begins_at_the_first_window_whatever_was_done_before(module):
    """With a module that resumed smaller batches, or has evaluated a checkpoint."""
    first = in_training(module("some text " * 50)).train_dataloader().starts(0).tolist()
    data = in_training(module("some text " * 50), global_step=10)
    data.load_state_dict({"windows_seen": 3})
    data.train_dataloader()
    data.trainer.global_step = 0
    assert data.train_dataloader().starts(0).tolist() == first
    data.load_state_dict({"windows_seen": 3})
    assert data.train_dataloader().starts(0).tolist() == first
    assert data.state_dict() == {"windows_seen": 0}


def test_a_module_in_training_can_be_printed(module):
    data = in_training(module("some text " * 50))
    assert str(data) == repr(data)


def test_a_run_of_an_earlier_version_continues_as_it_began(module):
    """Its checkpoints have no number of windows: batch i of rank r is the one it was then."""
    text, state = "some text " * 50, {"global_step": 3, "accumulate_grad_batches": 4}
    ranks = {"global_rank": 1, "world_size": 2}
    data = in_training(module(text, seed=9), **state, **ranks)
    batches = data.train_dataloader()
    places = len(data.train_tokens) - 8
    for i in range(8):
        drawn = np.random.default_rng((9, 12 + i, 1)).integers(0, places, 2)
        assert batches.starts(i).tolist() == drawn.tolist()
    data.trainer.global_step = 4
    assert data.state_dict() == {}  # nor have those that it saves now
    shuffled = module(text, seed=9, order="shuffled")
    whole = in_training(shuffled, **ranks).train_dataloader()
    older = in_training(module(text, seed=9, order="shuffled"), **state, **ranks)
    batches = older.train_dataloader()
    assert all((batches.starts(i) == whole.starts(12 + i)).all() for i in range(8))
    assert older.state_dict() == {"windows_seen": 3 * 4 * 2 * 2}


class Seen(pl.Callback):
    """The batches that a Trainer trains on; a checkpoint after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches: list = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batches.append(batch)
        path = self.folder / f"{trainer.global_step}.ckpt"
        if not path.exists():
            trainer.save_checkpoint(path)


@pytest.mark.parametrize("limit", [{"limit_train_batches": 3}, {"overfit_batches": 2}])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_plain_trainer_resumes_in_the_middle_of_its_epochs(module, tmp_path, limit, accumulate):
    def batches_of(folder: str, ckpt_path: Path | None = None) -> list:
        data = module("some text " * 50)
        seen = Seen(tmp_path / folder)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=5,
            limit_val_batches=0,
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[seen],
            **limit,
        )
        sizes = {"vocab_size": data.vocab_size, "context_length": data.hparams.context_length}
        model = LitGPT(d_model=8, num_blocks=1, num_heads=1, **sizes)
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return seen.batches

    whole = batches_of("whole")
    (number,) = limit.values()
    epochs = [*whole[:number]] * len(whole)
    assert same(whole, epochs[: len(whole)])
    assert not same(whole[:1], whole[1:2])
    for step in (1, 2, 3, 4):
        rest = batches_of("rest", tmp_path / "whole" / f"{step}.ckpt")
        assert rest
        assert same(rest, whole[-len(rest) :])


def test_ranks_train_and_evaluate_on_their_own_windows(module):
    loaders = [
        in_training(module("some text " * 50, order="shuffled"), global_rank=rank, world_size=2)
        for rank in range(2)
    ]
    first, second = (loader.train_dataloader() for loader in loaders)
    assert not set(first.starts(0)) & set(second.starts(0))
    first, second = (loader.val_dataloader()["val"] for loader in loaders)
    assert not set(first.starts) & set(second.starts)


@pytest.mark.parametrize(("limit", "windows"), [(1.0, 12), (2, 4), (0.5, 6)])
def test_both_splits_are_evaluated_on_equally_many_windows(limit, windows, module):
    data = in_training(module("x" * 1000), limit_val_batches=limit)
    loaders = data.val_dataloader()
    assert {name: len(batches.starts) for name, batches in loaders.items()} == {
        "train": windows,
        "val": windows,
    }


@pytest.mark.parametrize(
    ("options", "vocab_size"),
    [
        ({"tokenizer": "bytes"}, 257),
        ({"tokenizer": "cl100k_base"}, 266),
        ({"tokenizer": "cl100k_base", "compact_vocab": False}, 100_257),
    ],
)
def test_vocabulary(options, vocab_size, module):
    assert module("hello world" * 60, **options).vocab_size == vocab_size


def test_seed_and_order_choose_the_training_windows(module):
    options = [{}, {"seed": 1}, {"order": "shuffled"}, {"order": "shuffled", "seed": 1}]
    loaders = [in_training(module("x" * 1000, **o)).train_dataloader() for o in options]
    assert len({str([loader.starts(i) for i in range(5)]) for loader in loaders}) == 4
    shuffled = [start for i in range(50) for start in loaders[2].starts(i)]
    assert len(set(shuffled)) == 100  # of the 111 windows of an epoch none comes twice


def test_encoding_and_cache_reach_the_corpus(module, tmp_path):
    text, elsewhere = "some text é" * 50, tmp_path / "elsewhere"
    assert module(text).corpus.info.num_characters == 550
    assert module(text, encoding="latin-1").corpus.info.num_characters == 600  # é as two
    assert module(text, cache=str(elsewhere)).corpus.info.num_characters == 550
    assert len(list(elsewhere.iterdir())) == 1


# Errors


@pytest.mark.parametrize(
    ("num_tokens", "options", "split", "size", "needed"),
    [
        (80, {}, "validation", 8, 9),
        (100, {"context_length": 10}, "validation", 10, 11),
        (100, {"train_fraction": 0.05}, "training", 5, 9),
        (1, {}, "training", 0, 9),
        (2000, {"context_length": 1800}, "training", 1800, 1801),
    ],
)
def test_a_text_too_short_for_a_window(num_tokens, options, split, size, needed, module, tmp_path):
    with pytest.raises(UserError) as error:
        _ = module("x" * num_tokens, **options).corpus
    assert str(error.value) == (
        f"path '{tmp_path}/text.txt': too short: its {split} split has {size:,} of "
        f"{num_tokens:,} tokens, and a window needs {needed:,}; use more text, a smaller "
        "context_length or another train_fraction"
    )


def test_a_text_just_long_enough_for_a_window(module):
    assert len(module("x" * 90).val_tokens) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0: must be at least 1"),
        ({"batch_size": -2}, "batch_size -2: must be at least 1"),
        ({"context_length": 0}, "context_length 0: must be at least 1"),
        ({"train_fraction": 0}, "train_fraction 0: must be between 0 and 1"),
        ({"train_fraction": 1.0}, "train_fraction 1.0: must be between 0 and 1"),
        ({"train_fraction": 90}, "train_fraction 90: must be between 0 and 1"),
        (
            {"train_fraction": float("nan")},
            "train_fraction nan: must be between 0 and 1",
        ),
    ],
)
def test_values_out_of_range(options, message, module):
    with pytest.raises(UserError) as error:
        module("some text", **options)
    assert str(error.value) == message
