"""Every number that a run shows is what independent code computes, in each precision."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_gpt.checkpoint import Checkpoint
from lit_gpt.text.vocabularies import load_tokenizer
from tests.conftest import write_text
from tests.recompute import counted_bits, nats_of, spread, whole_nats

LENGTH = 16
PRECISIONS = {  # how far numbers may be apart: other shapes of a product are rounded differently
    "32-true": 2e-6,
    "bf16-mixed": 2e-3,
    "bf16-true": 2e-3,
    "64-true": 1e-12,
}
NUMBER = r"(\d[\d,]*\.\d+)"


@pytest.fixture
def odd_text(tmp_path: Path) -> Path:
    """Ends in characters that a short last batch has alone, so that its loss is far higher."""
    path = write_text(tmp_path / "odd.txt")
    rare = "".join(chr(0x3400 + 7 * i) for i in range(6))
    path.write_text(path.read_text(encoding="utf-8") + rare, encoding="utf-8")
    return path


def cut_of(path: Path) -> int:
    """Where the validation split begins: before it, tokens are those of the full vocabulary."""
    full = load_tokenizer("cl100k_base")
    return len(full.encode(path.read_text(encoding="utf-8"))) * 9 // 10


def shown(pattern: str, out: str) -> list[float]:
    """The numbers of the only line that matches."""
    (found,) = re.findall(pattern, out)
    return [float(number.replace(",", "")) for number in found]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch_size", [6, 5, 47])
def test_a_run_s_numbers_are_those_of_independent_code(train, odd_text, batch_size, precision):
    options = {"data.path": odd_text, "data.batch_size": batch_size, "model.dropout": 0.3}
    options |= {"trainer.precision": precision, "trainer.limit_val_batches": 10}
    options |= {
        "model.learning_rate": 0.01,
        "trainer.max_steps": 8,
        "trainer.val_check_interval": 8,
    }
    result = train(**options)
    assert result.status == 0, result.err
    data, model = result.run.data, result.run.model.gpt
    tokens = np.array(data.corpus.tokens)
    spelled = [data.tokenizer.tokens[i] for i in tokens]
    assert b"".join(spelled) == odd_text.read_bytes()
    cut = cut_of(odd_text)
    splits = {"train/eval_loss": tokens[:cut], "val/loss": tokens[cut:]}
    windows = min(batch_size * 10, (len(tokens) - cut - 1) // LENGTH)
    assert (windows % batch_size == 0) == (batch_size == 6)
    context = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    tolerance = PRECISIONS[precision]
    folder = Path(result.run.trainer.log_dir)
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))

    losses = {}
    for name, part in splits.items():
        starts = spread(len(part), windows, LENGTH)
        nats = nats_of(model, part, starts, LENGTH, context)
        losses[name] = sum(nats) / len(nats)
        step, found = history["curves"][name][-1]
        assert (step, found) == (8, pytest.approx(losses[name], rel=tolerance))
        if name == "val/loss":
            targets = [i + t for i in starts for t in range(1, LENGTH + 1)]
            num_bytes = sum(len(spelled[cut + i]) for i in targets)
            _, bits_per_byte = history["curves"]["val/bits_per_byte"][-1]
            assert bits_per_byte == pytest.approx(
                sum(nats) / math.log(2) / num_bytes, rel=tolerance
            )
    printed = shown(f"Step: 8, Training Loss: {NUMBER}, Validation Loss: {NUMBER}", result.out)
    assert printed == pytest.approx(list(losses.values()), abs=5.1e-4 + 10 * tolerance)
    best = Checkpoint.read(folder / "checkpoints" / "best.ckpt")
    assert best.best_evaluation["val"] == pytest.approx(losses["val/loss"], rel=tolerance)
    score = result.run.best.best_model_score.item()
    assert score == pytest.approx(losses["val/loss"], rel=tolerance)
    perplexity = result.run.trainer.callback_metrics["val/perplexity"].item()
    assert perplexity == pytest.approx(math.exp(losses["val/loss"]), rel=10 * tolerance)

    nats = whole_nats(model, tokens[cut:], LENGTH, context)
    assert len(nats) == history["final"]["num_tokens"] == len(tokens) - cut - 1
    loss = sum(nats) / len(nats)
    num_bytes = sum(map(len, spelled[cut + 1 :]))
    final = [history["final"][name] for name in ("loss", "bits_per_byte")]
    assert final == pytest.approx([loss, sum(nats) / math.log(2) / num_bytes], rel=tolerance)
    line = f"Final .* {NUMBER} nats/token over all {len(nats):,} tokens, perplexity {NUMBER}, "
    printed = shown(f"{line}{NUMBER} bits per byte", result.out)
    wanted = [final[0], math.exp(final[0]), final[1]]
    assert printed == pytest.approx(wanted, abs=5.1e-3)

    bits = counted_bits(tokens[:cut].tolist(), tokens[cut:].tolist(), data.vocab_size)
    baselines = shown(f"frequencies alone: unigram {NUMBER}, bigram {NUMBER}", result.out)
    assert baselines == pytest.approx([b / num_bytes for b in bits], abs=5.1e-5)


def test_a_short_last_batch_counts_for_its_tokens_only(train, odd_text):
    """The order of batches does not matter, so the loss is the same for every batch size."""
    options = {"data.path": odd_text, "trainer.max_steps": 1, "trainer.limit_val_batches": 100}
    first = {train(**options, **{"data.batch_size": size}).steps[0] for size in (1, 5, 7, 100)}
    assert len(first) == 1


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_the_curves_have_the_loss_and_gradient_of_the_weights(train, precision):
    """To more digits than bfloat16 has: the first step, from the same weights and windows."""

    def first_step(**options: object) -> dict[str, float]:
        result = train(**{"trainer.max_steps": 1, "model.dropout": 0.0}, **options)
        path = Path(result.run.trainer.log_dir) / "history.json"
        curves = json.loads(path.read_text(encoding="utf-8"))["curves"]
        return {name: curves[name][0][1] for name in ("train/loss", "gradient_norm")}

    plain, found = first_step(), first_step(**{"trainer.precision": precision})
    assert found == pytest.approx(plain, rel=2e-3 if "bf16" in precision else 1e-5)
    for value in found.values():
        assert torch.tensor(value).bfloat16().item() != pytest.approx(value, rel=1e-5)


def test_two_processes_have_the_loss_of_all_windows(start, odd_text, tmp_path):
    odd_text.write_text(odd_text.read_text(encoding="utf-8") + " cat" * 160, encoding="utf-8")
    options = {"data.path": odd_text, "data.batch_size": 5, "trainer.max_steps": 2}
    options |= {"trainer.limit_val_batches": 10, "trainer.strategy": "ddp", "trainer.devices": 2}
    code, _, err = start(**options).end()
    assert code == 0, err
    folder = tmp_path / "logs" / "version_0"
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    checkpoint = Checkpoint.read(folder / "checkpoints" / "last.ckpt")
    model, tokenizer = checkpoint.build()
    tokens = tokenizer.encode(odd_text.read_text(encoding="utf-8"))
    cut = cut_of(odd_text)
    windows = (len(tokens) - cut - 1) // LENGTH
    assert windows % 2  # one process has one more
    for name, part in {"train/eval_loss": tokens[:cut], "val/loss": tokens[cut:]}.items():
        nats = nats_of(model, part, spread(len(part), windows, LENGTH), LENGTH)
        assert history["curves"][name][-1] == [2, pytest.approx(sum(nats) / len(nats), rel=1e-5)]
    nats = whole_nats(model, tokens[cut:], LENGTH)
    assert history["final"]["num_tokens"] == len(nats)
    assert history["final"]["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_float16_weights_are_refused(train, places):
    result = train(**{"trainer.precision": "16-true"})
    assert result.status == 2
    assert result.err == (
        "error: --trainer.precision '16-true': weights in float16 do not train; use bf16-mixed or "
        "16-mixed\n"
    )
    assert not places["trainer.default_root_dir"].exists()
