"""Owns what a run says before the first step and after the last one."""

from __future__ import annotations

import shlex
from dataclasses import astuple
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_gpt.callbacks import checkpoints, evaluation
from lit_gpt.callbacks.nonfinite import NonFiniteGuard
from lit_gpt.callbacks.samples import Samples, line_starts
from lit_gpt.callbacks.stopping import GracefulStop
from lit_gpt.checkpoint import Checkpoint
from lit_gpt.data import TextDataModule
from lit_gpt.module import LitGPT
from lit_gpt.text.ngrams import frequency_baselines
from lit_gpt.text.overlap import SharedLines, copied_tokens, shared_lines

MIN_COPY = 20  # tokens in a row that stand in the training text, before they are called copied


@rank_zero_only
def print_start(
    trainer: pl.Trainer, model: LitGPT, data: TextDataModule, checkpoint: Checkpoint | None
) -> list[tuple[str, str]]:
    """Returns the data card, which is most of it."""
    card = data_card(data, model, trainer)
    *lines, parameters = (f"{name}: {value}" for name, value in card)
    print("\n".join(lines))
    if model.hparams.init_from and not checkpoint:
        print(f"Weights, model and tokenizer: {model.hparams.init_from}")
    if changes := changed_options(trainer, model, data, checkpoint):
        print(f"Continued with other options, so not the same run: {', '.join(changes)}")
    print(parameters)
    return card


def text_card(data: TextDataModule) -> list[tuple[str, str]]:
    """Names and values: what the text is, and how it is cut."""
    info = data.corpus.info
    counted = [
        ("Documents", info.num_documents),
        ("Documents without text left out", info.empty_documents),
        ("Byte-order marks left out", info.removed_boms),
        ("Line ends put between files", info.added_line_ends),
    ]
    sizes = f"{len(data.train_tokens):,} tokens, validation: {len(data.val_tokens):,}"
    return [
        ("Text length", f"{info.num_characters:,} characters"),
        *((what, f"{number:,}") for what, number in counted if number),
        ("Total", f"{info.num_tokens:,} tokens"),
        ("Training", sizes),
        *shared_lines_card(data),
        ("Vocabulary", f"{data.vocab_size:,} tokens ({data.vocabulary_name})"),
        ("Bytes per token", f"{info.num_bytes / info.num_tokens:.2f}"),
    ]


def data_card(data: TextDataModule, model: LitGPT, trainer: pl.Trainer) -> list[tuple[str, str]]:
    """Names and values: what is trained on what, and where."""
    device = trainer.strategy.root_device
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    outer, rest = model.gpt.num_parameters()
    parameters = f"{outer + rest:,} (embedding and output {outer:,}, the rest {rest:,})"
    return [
        *text_card(data),
        ("Device", f"{device.type}{name}, precision {trainer.precision}"),
        ("Parameters", parameters),
    ]


def find_shared_lines(data: TextDataModule) -> SharedLines:
    train, val, tokens = data.train_tokens, data.val_tokens, data.tokenizer.tokens
    name = f"shared-lines-{len(train)}"
    return SharedLines(
        *data.corpus.remember(name, lambda: astuple(shared_lines(train, val, tokens)))
    )


def shared_lines_card(data: TextDataModule) -> list[tuple[str, str]]:
    """How far the validation text is no test, since the model was trained on it."""
    lines = find_shared_lines(data)
    if not lines.num_lines:  # the text has no line ends
        return []
    share = lines.num_shared / lines.num_lines
    name = "Lines of the validation text that also stand in the training text"
    value = (
        f"{lines.num_shared:,} of {lines.num_lines:,} "
        f"({share:.1%}, {lines.share_of_bytes:.1%} of the bytes)"
    )
    return [(name, value)]


def changed_options(
    trainer: pl.Trainer, model: LitGPT, data: TextDataModule, checkpoint: Checkpoint | None
) -> list[str]:
    """What a continued run does otherwise than the one that saved the checkpoint."""
    if checkpoint is None:
        return []
    pairs = (
        (checkpoint.hyperparameters, model.hparams),
        (checkpoint.data_hyperparameters, data.hparams),
        (checkpoint.trainer_settings, vars(trainer) | {"precision": trainer.precision}),
    )
    places = ("path", "cache", "tokenizer", "init_from", "style")  # what they lead to is checked
    return [
        f"{name} {saved} -> {given[name]}"
        for olds, given in pairs
        for name, saved in olds.items()
        if name not in places and name in given and given[name] != saved
    ]


@rank_zero_only
def print_requeued(path: Path, step: int, planned: int) -> None:
    print(f"The job was requeued: continues {shorten(path)} (step {step})")
    if 0 <= planned <= step:
        print(f"Nothing is left to do: --trainer.max_steps is {planned}")


@rank_zero_only
def print_end(trainer: pl.Trainer, data: TextDataModule) -> None:
    by_type = {type(callback): callback for callback in trainer.callbacks}
    samples = by_type[Samples]
    for text in samples.texts:
        print("Sample: " + " / ".join(text.splitlines()))
    if name := by_type[GracefulStop].name:
        name = f"--trainer.{name}" if name == "max_time" else name
        print(f"Stopped by {name} after step {trainer.global_step}")
    if result := by_type[evaluation.FinalEvaluation].result:
        print_copies(samples.new_ids, data)
        print(
            f"Final validation loss: {result.loss:.4f} nats a token over all {result.num_tokens:,} "
            f"tokens, perplexity {result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte"
        )
        print_baselines(data)
    if skipped := by_type[NonFiniteGuard].skipped:
        print(f"Skipped updates: {skipped} (non-finite loss or gradient)")
    if trainer.fast_dev_run:
        return
    best, last = by_type[checkpoints.BestCheckpoint], by_type[checkpoints.LastCheckpoint]
    newest = shorten(Path(last.dirpath) / "last.ckpt")
    if best.best_model_path:
        score = best.best_model_score.item()
        print(f"Best checkpoint: {shorten(best.best_model_path)} (evaluated at {score:.3f})")
    print(f"Last checkpoint: {newest} (step {trainer.global_step})")
    print_commands(trainer, data, shorten(best.best_model_path or newest), newest)


def print_copies(written: list[list[int]], data: TextDataModule) -> None:
    if (total := sum(map(len, written))) and max(map(len, written)) >= MIN_COPY:
        copied = copied_tokens(written, data.train_tokens, MIN_COPY)
        print(
            f"Copied word for word from the training text ({MIN_COPY} tokens or more in a row): "
            f"{copied:,} of {total:,} tokens written ({copied / total:.1%})"
        )


def print_baselines(data: TextDataModule) -> None:
    train, val, lengths = data.train_tokens, data.val_tokens, data.tokenizer.token_lengths()
    unigram, bigram = data.corpus.remember(
        f"baselines-{len(train)}", lambda: frequency_baselines(train, val, lengths)
    )
    print(
        f"For comparison, bits per byte from frequencies alone: unigram {unigram:.4f}, "
        f"bigram {bigram:.4f}"
    )


def print_commands(trainer: pl.Trainer, data: TextDataModule, model: str, newest: str) -> None:
    """What to type next, to be pasted as it is."""
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        print(f"See the curves:  {command('tensorboard', '--logdir', trainer.loggers[0].save_dir)}")
    prompt = data.tokenizer.decode(line_starts(data, 1)[0]).strip("\n\ufffd")
    generate = command("python", "scripts/generate.py", "--ckpt_path", model, "--prompt", prompt)
    print(f"Generate text:   {generate}")
    done, planned = trainer.global_step, trainer.max_steps
    go_on = ["--config", str(Path(newest).parent.parent / "config.yaml"), "--ckpt_path", newest]
    if 0 <= planned <= done:
        go_on.append(f"--trainer.max_steps={max(1, 2 * done)}")
    print(f"Continue:        {command('python', 'scripts/train.py', *go_on)}")


def command(*words: str) -> str:
    return shlex.join(words)


def shorten(path: str | Path) -> str:
    """The path as it would be typed from here."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
