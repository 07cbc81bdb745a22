"""What happens around the steps: the overfit notice, samples, what is kept."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_gpt.callbacks.evaluation import EvaluationPrinter, FinalEvaluation
from lit_gpt.checkpoint import read_checkpoint
from tests.callbacks.test_progress import Terminal
from tests.conftest import ROOT
from tests.recompute import nats_of, whole_nats

NOTICE = "The model is overfitting"


def lines_of(
    lines: EvaluationPrinter, train: list[float], val: list[float], capsys, start=0
) -> list[str]:
    """What is printed at evaluations with these losses, every 50 steps."""
    module = SimpleNamespace(print=print)
    for i, losses in enumerate(zip(train, val, strict=True), start):
        names = ("train/eval_loss", "val/loss")
        metrics = dict(zip(names, map(torch.tensor, losses), strict=True))
        trainer = SimpleNamespace(
            callback_metrics=metrics, global_step=50 * i, sanity_checking=False
        )
        lines.on_validation_end(trainer, module)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        ([5.0, 4.0, 3.0, 2.0, 1.0, 0.5], [5.0, 4.0, 4.1, 4.2, 4.3, 4.4], True),
        ([5.0, 4.0, 3.0, 2.0, 1.0], [5.0, 4.5, 4.0, 3.5, 3.0], False),  # both fall
        ([5.0, 4.0, 3.0, 2.0], [5.0, 4.0, 4.1, 4.2], False),  # not for long enough
        ([5.0, 4.0, 4.1, 4.2, 4.3], [5.0, 4.0, 4.1, 4.2, 4.3], False),  # diverges: no overfitting
        ([5.0, 4.0, 3.0, 2.0, 1.5, 1.0], [5.0, 4.0, 4.1, 4.2, 3.9, 4.0], False),  # recovers
    ],
)
def test_overfitting_is_said_once_with_the_best_step(train, val, said, capsys):
    out = lines_of(EvaluationPrinter(), train, val, capsys)
    notices = [line for line in out if line.startswith(NOTICE)]
    assert len(notices) == said
    if said:
        assert "was best at step 50 (4.000) and has been higher for 3 evaluations" in notices[0]


def test_the_notice_survives_a_resume(capsys):
    train, val = [5.0, 4.0, 3.0, 2.0, 1.0, 0.5], [5.0, 4.0, 4.1, 4.2, 4.3, 4.4]
    first, second, third = EvaluationPrinter(), EvaluationPrinter(), EvaluationPrinter()
    lines_of(first, train[:4], val[:4], capsys)
    second.load_state_dict(first.state_dict())
    out = lines_of(second, train[4:5], val[4:5], capsys, start=4)
    assert [line.startswith(NOTICE) for line in out] == [False, True]
    third.load_state_dict(second.state_dict())
    assert len(lines_of(third, train[5:], val[5:], capsys, start=5)) == 1


def test_a_model_that_learns_a_tiny_text_by_heart_is_told(train, tmp_path):
    text = tmp_path / "tiny.txt"
    text.write_text("".join(f"{n * 7919 % 1009} " for n in range(200)), encoding="utf-8")
    options = {"data.path": text, "model.learning_rate": 1e-2, "model.dropout": 0.0}
    options |= {"trainer.max_steps": 60, "trainer.val_check_interval": 5, "model.d_model": 64}
    options |= {"data.batch_size": 8, "samples.num_tokens": 0}
    result = train(**options)
    before, notice, _ = result.out.partition(NOTICE)
    assert notice
    assert NOTICE not in result.out.partition(NOTICE)[2]

    def best_of(out: str) -> tuple[int, str]:
        pairs = re.findall(r"^Step: (\d+),.* Validation Loss: (.*)$", out, re.MULTILINE)
        return min(((int(s), loss) for s, loss in pairs if s != "0"), key=lambda x: float(x[1]))

    assert "was best at step {} ({})".format(*best_of(before)) in result.out
    path = Path(result.run.trainer.log_dir) / "checkpoints" / "best.ckpt"
    assert read_checkpoint(path)["global_step"] == best_of(result.out)[0]
    assert read_checkpoint(path.with_name("last.ckpt"))["global_step"] == 60


def test_patience_is_an_option(capsys):
    out = lines_of(EvaluationPrinter(patience=1), [3.0, 2.0, 1.0], [3.0, 2.0, 2.1], capsys)
    assert out[-1].startswith(NOTICE)


def test_samples_begin_with_the_prompts_and_are_the_same_in_the_same_run(train):
    options = {"samples.prompts": '["the cat", "猫 zzz 🦆"]', "samples.num_tokens": 5}
    first, second = (train(**options) for _ in range(2))
    samples = [line for line in first.out.splitlines() if line.startswith("Sample: ")]
    assert samples[0].startswith("Sample: the cat")
    assert samples[1].startswith("Sample: 猫 zzz 🦆")
    assert samples == [x for x in second.out.splitlines() if x.startswith("Sample: ")]
    assert "Sample: " not in train(**{"samples.num_tokens": 0}).out


def test_sampling_does_not_disturb_the_run(train):
    assert train().steps == train(**{"samples.num_tokens": 0}).steps


def test_without_evaluation_the_last_step_is_still_saved(train):
    result = train(**{"trainer.limit_val_batches": 0, "trainer.max_steps": 3})
    assert result.status == 0, result.err
    assert result.steps == []
    last = Path(result.run.trainer.log_dir) / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == 3


@pytest.mark.parametrize(
    ("max_tokens", "windows"), [(100, 6), (1, 1), (16, 1), (10_000, None), (None, None)]
)
def test_the_final_loss_is_over_as_many_tokens_as_asked(train, max_tokens, windows):
    options = {} if max_tokens is None else {"final.max_tokens": max_tokens}
    result = train(**options, **{"trainer.max_steps": 2})
    tokens = result.run.data.val_tokens
    model = result.run.model.gpt
    if windows is None:
        nats = whole_nats(model, tokens, 16)
        extent = f"all {len(tokens) - 1:,} tokens"
    else:
        all_windows = (len(tokens) - 1) // 16
        starts = [16 * ((all_windows - 1) * i // max(windows - 1, 1)) for i in range(windows)]
        nats = nats_of(model, tokens, starts, 16)
        extent = f"{16 * windows} of {len(tokens) - 1:,} tokens"
    (line,) = (line for line in result.out.splitlines() if line.startswith("Final"))
    loss = sum(nats) / len(nats)
    assert line.startswith(f"Final validation loss: {loss:.4f} nats/token over {extent}, ")
    page = (Path(result.run.trainer.log_dir) / "report.html").read_text(encoding="utf-8")
    assert ("whole split, perplexity" in page) == (windows is None)
    assert (f"{extent}, perplexity" in page) == (windows is not None)


def test_a_final_evaluation_of_no_token_is_left_out(train):
    result = train(**{"final.max_tokens": 0})
    assert (result.status, result.err) == (0, "")
    assert "Final validation loss" not in result.out
    assert "Last checkpoint" in result.out
    refused = train(**{"final.max_tokens": -1})
    assert refused.status == 2
    assert refused.err == "error: --final.max_tokens -1: must be at least 0\n"


def test_the_final_evaluation_has_a_bar_with_an_estimate(train):
    screen = Terminal()
    with redirect_stdout(screen):
        result = train(**{"trainer.max_steps": 2})
    batches = -(-(len(result.run.data.val_tokens) - 1) // 16 // 8) + 1
    shape = r"Final evaluation: +\d+%\|.*?\| \d+/(\d+) \[[\d:]+<[\d:?]+"
    bars = re.findall(shape, screen.getvalue())
    assert set(bars) == {str(batches)}
    assert "Final evaluation" not in train(**{"trainer.max_steps": 2}).out  # without a terminal


@pytest.mark.parametrize("module", ["numpy", "torch", "splintr"])
def test_ctrl_c_during_the_start_leaves_no_traceback(text_file, tmp_path, module):
    """Sent when Python says that it has loaded the module: our code runs by then, as it must."""
    words = [f"--trainer.default_root_dir={tmp_path / 'logs'}", f"--data.cache={tmp_path / 'c'}"]
    script = [str(ROOT / "scripts" / "train.py"), f"--data.path={text_file}", *words]
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *script], stdout=-3, stderr=-1, text=True
    )
    others = []
    for line in process.stderr:
        if not line.startswith("import time:"):
            others.append(line)
        elif line.rpartition("|")[2].strip() == module:
            process.send_signal(signal.SIGINT)
    assert (process.wait(), others) == (130, [])


def test_a_signal_on_one_rank_ends_the_final_evaluation_of_all_at_the_same_batch():
    """Ranks that share weights would wait for the one that left."""
    final = FinalEvaluation()
    final.stop = SimpleNamespace(signal=0)
    asked = []

    def reduce(signal_here: torch.Tensor, reduce_op: str) -> torch.Tensor:
        asked.append((int(signal_here), reduce_op))
        return torch.tensor(signal.SIGTERM if len(asked) == 2 else 0)  # the other rank's

    strategy = SimpleNamespace(root_device="cpu", reduce=reduce)
    trainer = SimpleNamespace(world_size=2, strategy=strategy)
    assert list(final._until_stopped(trainer, iter("abcd"))) == ["a", "b"]
    assert asked == [(0, "max")] * 2
