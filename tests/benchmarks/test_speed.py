"""What makes it quick, pinned by what is computed, never by a clock."""

from __future__ import annotations

import torch
from torch import nn

from lit_gpt.callbacks.evaluation import FinalEvaluation
from lit_gpt.callbacks.nonfinite import NonFiniteGuard
from lit_gpt.data import TextDataModule
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.module import LitGPT
from tests.conftest import SMALL


def test_the_compact_vocabulary_is_the_default(text_file, tmp_path):
    data = TextDataModule(str(text_file), cache=str(tmp_path / "cache"))
    assert data.hparams.compact_vocab
    assert 256 <= data.vocab_size < 400  # not cl100k_base's 100,256


def test_query_key_and_value_are_one_projection():
    for block in GPT(GPTConfig(11, 4, d_model=8, num_blocks=2, num_heads=2)).blocks:
        layers = [m for m in block.attention.modules() if isinstance(m, nn.Linear)]
        assert [(m.in_features, m.out_features) for m in layers] == [(8, 24), (8, 8)]


def test_no_evaluation_batch_is_computed_twice(train, monkeypatch):
    """As many forward passes as there are batches: 2 of each split at steps 0, 2, 4 and 6."""
    passes = []
    hidden_states = GPT.hidden_states

    def counted(self, ids, cache=None):
        if cache is None:  # not the samples
            passes.append((self.training, tuple(ids.flatten().tolist())))
        return hidden_states(self, ids, cache)

    monkeypatch.setattr(GPT, "hidden_states", counted)
    result = train()
    trained, evaluated = ([ids for mode, ids in passes if mode is m] for m in (True, False))
    final = list(FinalEvaluation().batches(result.run.data))
    assert len(trained) == SMALL["trainer.max_steps"]
    assert len(evaluated) == 4 * 2 * 2 + len(final)
    assert evaluated[:4] == evaluated[4:8] == evaluated[12:16]
    assert len(set(evaluated[:4])) == 4


WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__")


def test_no_step_waits_for_the_device(train, monkeypatch):
    """Nothing between two steps reads a tensor's value, but for a step that is logged.

    The guard reads each loss, but on CUDA a step later (tests/callbacks/test_nonfinite.py).
    """
    monkeypatch.setattr(NonFiniteGuard, "on_before_optimizer_step", lambda *args: None)
    reads: dict[int, list[str]] = {}
    step = [0]

    def watch(name):
        method = getattr(torch.Tensor, name)

        def read(self, *args, **kwargs):
            reads.setdefault(step[0], []).append(name)
            return method(self, *args, **kwargs)

        return read

    begin = LitGPT.on_train_batch_start

    def on_train_batch_start(self, batch, batch_idx):
        step[0] = self.global_step + 1
        for name in WAITING if step[0] == 2 else ():
            monkeypatch.setattr(torch.Tensor, name, watch(name))
        return begin(self, batch, batch_idx)

    monkeypatch.setattr(LitGPT, "on_train_batch_start", on_train_batch_start)
    train(
        **{
            "trainer.max_steps": 9,
            "trainer.val_check_interval": 9,
            "trainer.log_every_n_steps": 4,
            "model.schedule": "cosine",
            "trainer.gradient_clip_val": 1.0,
        }
    )
    assert set(reads) - {9} == {4, 8}  # 9: the evaluation at the end
