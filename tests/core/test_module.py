"""LitGPT: the loss, what an evaluation measures, and what is logged where."""

from __future__ import annotations

import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from lit_gpt import output_layer
from lit_gpt.checkpoint import read_checkpoint
from lit_gpt.data import EvalBatches
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.module import LitGPT, LossTotals, next_token_loss
from lit_gpt.output_layer import cross_entropy_in_parts, rows_at_once
from lit_gpt.windows import IGNORED
from tests import small_run


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def small_gpt(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(11, 6, d_model=8, num_blocks=1, num_heads=2, dropout=0.0, **options))


def test_loss_is_the_mean_negative_log_probability():
    model, (x, y) = small_gpt(), torch.randint(11, (2, 3, 6)).unbind(0)
    log_probabilities = model(x).log_softmax(dim=-1)
    each = [log_probabilities[i, t, y[i, t]].item() for i in range(3) for t in range(6)]
    assert next_token_loss(model, x, y).item() == pytest.approx(-sum(each) / 18)


def test_loss_is_computed_in_float32_from_half_precision_logits():
    x = torch.zeros(2, 3, dtype=torch.long)
    assert next_token_loss(small_gpt().bfloat16(), x, x).dtype == torch.float32


def test_loss_of_double_precision_weights_is_computed_in_it():
    x = torch.zeros(2, 3, dtype=torch.long)
    assert next_token_loss(small_gpt().double(), x, x).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_in_parts_of_half_precision_weights_is_in_float32(dtype):
    torch.manual_seed(0)
    hidden_states = torch.randn(18, 8).to(dtype)
    weight = torch.randn(11, 8).to(dtype)
    targets = torch.randint(11, (18,))
    loss = cross_entropy_in_parts(hidden_states, weight, targets, 5)
    whole = F.cross_entropy(F.linear(hidden_states, weight).float(), targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("targets", [range(11), range(3), range(3, 11), [10, 10, 2, IGNORED]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_in_two_steps_is_that_of_the_logits(targets, dtype):
    """Whether targets are frequent, rare, or none."""
    model = small_gpt(style="fast", softmax_cutoff=0.3).to(dtype)
    chosen = torch.tensor([*targets])
    x, y = torch.randint(11, (4, 6)), chosen[torch.randint(len(chosen), (4, 6))]
    loss = next_token_loss(model, x, y)
    whole = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    assert loss.dtype == whole.dtype != torch.bfloat16
    weights = list(model.parameters())
    found, expected = torch.autograd.grad(loss, weights), torch.autograd.grad(whole, weights)
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close((loss, *found), (whole, *expected), **tolerance)


def test_totals_weigh_losses_by_tokens_and_keep_a_nan():
    totals, cpu = LossTotals(), torch.device("cpu")
    lengths = torch.tensor([1, 3])
    totals.start(cpu)
    totals.update(torch.tensor(2.0), torch.tensor([[0, 1, 1]]), lengths)
    totals.update(torch.tensor(8.0), torch.tensor([[1]]), lengths)
    bits_per_byte = (3 * 2.0 + 8.0) / math.log(2) / 10
    assert totals.compute() == ((3 * 2.0 + 8.0) / 4, pytest.approx(bits_per_byte), 4)
    many = torch.zeros(1, 1, dtype=torch.long).expand(1, 10)
    for _ in range(3000):  # in bfloat16 the sum would stop at 256
        totals.update(torch.tensor(0.1), many, None)
    assert totals.compute()[0].item() == pytest.approx((14 + 3000.0) / 30_004, rel=1e-7)
    totals.update(torch.tensor(math.nan), many, None)
    assert math.isnan(totals.compute()[0])
    totals.start(cpu)
    totals.update(torch.tensor(2.0), many, None)
    assert totals.compute()[0].item() == 2.0


def test_a_plain_trainer_refuses_float16_weights(text_file, tmp_path):
    with pytest.raises(UserError, match="use bf16-mixed or 16-mixed"):
        small_run.fit(text_file, tmp_path, [], {"precision": "16-true"})


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 18, 100])
@pytest.mark.parametrize("torch_has_it", [True, False])
def test_loss_in_parts_has_the_value_and_gradients_of_the_whole(
    monkeypatch, torch_has_it, rows, bf16
):
    if not torch_has_it:  # before 2.13
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    elif not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    torch.manual_seed(0)
    hidden_states = torch.randn(18, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    targets = torch.randint(11, (18,))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        whole = F.cross_entropy(F.linear(hidden_states, weight).float(), targets)
        parts = cross_entropy_in_parts(hidden_states, weight, targets, rows)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    expected = torch.autograd.grad(whole, (hidden_states, weight))
    found = torch.autograd.grad(parts, (hidden_states, weight))
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if bf16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close((parts, *found), (whole, *expected), **tolerance)


@pytest.mark.parametrize(
    ("count", "width", "vocab_size", "rows"),
    [
        (256, 80, 1245, 256),  # the default job
        (512, 64, 4096, 512),  # 2**21 logits
        (512, 64, 4097, 256),  # two parts
        (1024, 96, 13_340, 147),  # seven
        (256, 80, 100_256, 80),  # no fewer than the hidden states are wide
        (70, 80, 100_256, 70),  # all there are
    ],
)
def test_a_cpu_computes_as_many_logits_at_a_time_as_its_cache_holds(count, width, vocab_size, rows):
    assert rows_at_once(torch.empty(count, width), vocab_size) == rows
    on_a_gpu = torch.empty(count, width, device="meta")
    assert rows_at_once(on_a_gpu, vocab_size) == count  # up to 2**28 logits
    assert rows_at_once(on_a_gpu, (1 << 28) // count + 1) < count


@pytest.mark.parametrize("softmax_cutoff", [0.0, 0.25])  # the second step alone is large too
def test_a_large_vocabulary_has_the_loss_and_the_gradients_of_the_plain_computation(
    softmax_cutoff,
):
    torch.manual_seed(0)
    model = GPT(GPTConfig(12_000, 32, 8, 1, 1, dropout=0.0, softmax_cutoff=softmax_cutoff))
    x, y = torch.randint(12_000, (2, 32, 32)).unbind(0)
    assert rows_at_once(torch.empty(700, 8), 9000) < 700
    loss = next_token_loss(model, x, y)
    whole = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    weights = list(model.parameters())
    found, expected = torch.autograd.grad(loss, weights), torch.autograd.grad(whole, weights)
    torch.testing.assert_close((loss, *found), (whole, *expected))


def test_a_huge_vocabulary_never_has_all_its_logits_at_once(monkeypatch):
    x, y = torch.randint(11, (2, 3, 6)).unbind(0)

    def run(limit: int) -> list[torch.Tensor]:
        monkeypatch.setattr(output_layer, "MAX_LOGITS", limit)
        at_once = []

        def in_parts(hidden_states, weight, targets, rows):
            at_once.append(rows)
            return cross_entropy_in_parts(hidden_states, weight, targets, rows)

        monkeypatch.setattr(output_layer, "cross_entropy_in_parts", in_parts)
        model = small_gpt()
        loss = next_token_loss(model, x, y)
        loss.backward()
        assert at_once == ([] if limit >= 18 * 11 else [4])  # a quarter of the limit
        return [loss, *(p.grad for p in model.parameters())]

    torch.testing.assert_close(run(18 * 11 - 1), run(18 * 11), rtol=1e-5, atol=1e-7)


@pytest.fixture
def eager_backend(monkeypatch):
    """torch.compile without its slow last stage, the making of machine code."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode: compile(self, backend="aot_eager")
    )
    torch.compiler.reset()


def test_compiled_blocks_train_the_same_and_leave_no_trace(train, eager_backend):
    plain = train()
    compiled = train(**{"model.compile": True})
    assert all(block._compiled_call_impl for block in compiled.run.model.gpt.blocks)
    assert compiled.steps == plain.steps
    names = [read_checkpoint(last_of(result))["state_dict"].keys() for result in (plain, compiled)]
    assert names[0] == names[1]
    # One graph for training and one for evaluations, not one for each length of a sample.
    assert sum(torch._dynamo.utils.counters["frames"].values()) < 30


@pytest.mark.slow
@pytest.mark.parametrize("mode", [True, "reduce-overhead"])
def test_code_made_by_the_compiler_trains_the_same(train, mode):
    torch.compiler.reset()
    plain, compiled = train(), train(**{"model.compile": mode})
    assert [line.split()[1] for line in compiled.steps] == [line.split()[1] for line in plain.steps]
    losses = [float(result.steps[-1].split()[-1]) for result in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


def last_of(result) -> Path:
    return Path(result.run.trainer.log_dir) / "checkpoints" / "last.ckpt"


def test_evaluation_is_of_fixed_windows_in_eval_mode(train):
    """The printed losses equal those computed by hand from the windows of EvalBatches."""
    result = train(**{"trainer.max_steps": 3, "model.dropout": 0.5})
    data, model = result.run.data, result.run.model.eval()
    losses = []
    max_windows = (len(data.val_tokens) - 1) // 16
    for tokens in (data.train_tokens, data.val_tokens):
        with torch.no_grad():
            batches = EvalBatches(tokens, 2, 16, max_windows, limit=2)
            each = [next_token_loss(model.gpt, x, y).item() for x, y in batches]
        assert len(each) == 2
        losses.append(sum(each) / 2)
    line = f"Step: 3, Training Loss: {losses[0]:.3f}, Validation Loss: {losses[1]:.3f}"
    assert result.steps[-1] == line


def test_tensorboard_has_every_curve_at_the_right_steps(train):
    options = {"model.schedule": "linear", "model.warmup_steps": 2, "model.learning_rate": 0.1}
    result = train(**options)
    found = curves(Path(result.run.trainer.log_dir))
    evaluated = ["train/eval_loss", "val/loss", "val/perplexity", "val/bits_per_byte"]
    for tag in evaluated:
        assert [step for step, _ in found[tag]] == [0, 2, 4, 6], tag
    for tag in ("train/loss", "gradient_norm", "tokens_per_second", "learning_rate"):
        assert [step for step, _ in found[tag]] == [1, 2, 3, 4, 5, 6], tag
        assert all(value > 0 for _, value in found[tag])
    rates = [value for _, value in found["learning_rate"]]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025])
    printed = [float(line.rpartition(" ")[2]) for line in result.steps]
    assert [value for _, value in found["val/loss"]] == pytest.approx(printed, abs=6e-4)
    for (_, loss), (_, perplexity) in zip(found["val/loss"], found["val/perplexity"], strict=True):
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_bits_per_byte_counts_the_bytes_of_the_targets(train):
    result = train(**{"trainer.max_steps": 2})
    data, model = result.run.data, result.run.model.eval()
    lengths = torch.from_numpy(data.tokenizer.token_lengths())
    nats = num_bytes = 0.0
    with torch.no_grad():
        for x, y in EvalBatches(data.val_tokens, 2, 16, (len(data.val_tokens) - 1) // 16, 2):
            nats += next_token_loss(model.gpt, x, y).item() * y.numel()
            num_bytes += lengths[y].sum().item()
    _, value = curves(Path(result.run.trainer.log_dir))["val/bits_per_byte"][-1]
    assert value == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_gradient_norm_is_that_of_all_gradients_before_clipping(train):
    plain = train(**{"trainer.max_steps": 1})
    clipped = train(**{"trainer.max_steps": 1, "trainer.gradient_clip_val": 1e-3})
    norms = [curves(Path(r.run.trainer.log_dir))["gradient_norm"] for r in (plain, clipped)]
    assert norms[0] == norms[1]
    assert norms[0][0][1] > 1e-2


def test_tensorboard_has_hyperparameters_and_samples(train):
    run = Path(train(**{"samples.prompts": '["the cat", "猫"]'}).run.trainer.log_dir)
    events = EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()
    assert "_hparams_/session_start_info" in events.summary_metadata
    texts = events.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [0, 2, 4, 6]
    text = texts[-1].tensor_proto.string_val[0].decode()
    assert text.startswith("```\nthe cat")
    assert "```\n猫" in text


def test_csv_logging_gets_the_same_numbers(train, tmp_path):
    result = train("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'csv'}")
    assert result.status == 0, result.err
    table = next((tmp_path / "csv").rglob("metrics.csv")).read_text().splitlines()
    rows = [dict(zip(table[0].split(","), row.split(","), strict=True)) for row in table[1:]]
    losses = {float(r["step"]): float(r["val/loss"]) for r in rows if r["val/loss"]}
    printed = [float(line.rpartition(" ")[2]) for line in result.steps]
    assert list(losses) == [0, 2, 4, 6]
    assert list(losses.values()) == pytest.approx(printed, abs=6e-4)


def test_each_step_has_its_own_dropout_masks_whatever_drew_before():
    """The masks are a function of seed, step and batch in the step (and of the rank)."""

    model = LitGPT(vocab_size=8, d_model=8, num_heads=2, num_blocks=1)
    model.trainer = trainer = pl.Trainer(accelerator="cpu", logger=False, accumulate_grad_batches=2)

    def draw(seed: int, step: int, batch: int) -> float:
        model.hparams.seed = seed
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
        progress.optimizer.step.total.completed = step  # what global_step reads
        torch.rand(batch + 3)
        model.on_train_batch_start(None, batch)
        return torch.rand(1).item()

    base = draw(1, 5, 2)
    assert draw(1, 5, 4) == base  # batches 2 and 4 both are a step's first
    others = [draw(2, 5, 2), draw(1, 6, 2), draw(1, 5, 3)]
    assert base not in others
    assert len(set(others)) == 3


def test_one_batch_is_memorized():
    torch.manual_seed(0)
    model = LitGPT(vocab_size=20, context_length=8, d_model=32, num_heads=2, dropout=0.0)
    x, y = torch.randint(20, (2, 2, 8)).unbind(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = next_token_loss(model.gpt, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


def test_the_optimizer_is_fused_and_says_its_learning_rate(train):
    optimizer = train(**{"trainer.max_steps": 1}).run.trainer.optimizers[0]
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
