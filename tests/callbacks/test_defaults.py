"""LitGPT and TextDataModule with a plain pl.Trainer, and lit_gpt.callbacks.defaults()."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lit_gpt.callbacks import defaults
from lit_gpt.checkpoint import RESUME_KEYS, load_checkpoint, read_checkpoint
from lit_gpt.data import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.module import LitGPT


def test_ten_lines_train_and_the_losses_fall(text_file, tmp_path, capsys):
    """With a Trainer's own defaults wherever it can be: logger, checkpoints, sanity check."""
    data = TextDataModule(str(text_file), context_length=16, cache=str(tmp_path / "cache"))
    model = LitGPT(vocab_size=data.vocab_size, context_length=16, d_model=32, num_blocks=2)
    trainer = pl.Trainer(
        max_steps=60,
        val_check_interval=30,
        limit_val_batches=10,
        log_every_n_steps=10,
        accelerator="cpu",
        callbacks=defaults(),
        default_root_dir=tmp_path,
    )
    trainer.fit(model, datamodule=data)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("Step: ")]
    assert [line.split()[1] for line in lines] == ["30,", "60,"]
    losses = [float(line.split()[-1]) for line in lines]
    assert losses[1] < losses[0] < 6
    assert {"train/loss", "gradient_norm", "learning_rate", "tokens_per_second"} <= set(
        model.curves
    )
    path = trainer.checkpoint_callback.best_model_path
    assert set(RESUME_KEYS) <= set(read_checkpoint(path))
    loaded, tokenizer = load_checkpoint(path)
    assert tokenizer == data.tokenizer
    assert all(map(torch.equal, loaded.parameters(), model.gpt.parameters()))


def test_a_file_with_weights_only_is_enough_to_generate(fit, tmp_path):
    """Also where only LitGPT and TextDataModule are there to write it."""
    trainer = fit([ModelCheckpoint(tmp_path, "small", save_weights_only=True)])
    _, tokenizer = load_checkpoint(tmp_path / "small.ckpt")
    assert tokenizer == trainer.datamodule.tokenizer


def test_the_defaults_guard_against_non_finite_numbers(fit):
    with pytest.raises(UserError, match="non-finite loss or gradient at step 2"):
        fit(defaults(progress_bar=False), {"max_steps": 40}, learning_rate=1e30)


def test_without_the_guard_an_evaluation_notices(fit):
    with pytest.raises(UserError, match="the loss is no longer finite at step 2"):
        fit([], learning_rate=1e30)


def test_a_run_is_resumed_by_a_plain_trainer(fit, tmp_path):
    saves = ModelCheckpoint(tmp_path, "four", every_n_train_steps=4)
    logs = [CSVLogger(tmp_path, name="", version=name) for name in ("whole", "rest")]
    whole = fit([saves, *defaults(False)], {"logger": logs[0]})
    rest = fit(defaults(False), {"logger": logs[1]}, ckpt_path=tmp_path / "four.ckpt")
    assert rest.global_step == whole.global_step == 6
    for one, other in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_command_has_each_of_them_once(train):
    names = [type(callback).__name__ for callback in train().run.trainer.callbacks]
    for callback in defaults(progress_bar=False):
        assert names.count(type(callback).__name__) == 1
