"""LoRA: adapters alone are trained, saved and resumed, and compute what the paper and peft say."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lit_gpt
from lit_gpt.__main__ import main
from lit_gpt.checkpoint import Checkpoint, load_checkpoint
from lit_gpt.lora import LoraConfig, LoraLinear, add_adapters, fingerprint, merge_adapters
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.module import next_token_loss
from lit_gpt.optim import build_optimizer
from lit_gpt.planning.memory import estimate
from tests.conftest import SMALL, command_line
from tests.distributed.ranks import train_on
from tests.planning.test_memory import DTYPES, B, FusedRMSNorm, T, V, batch, saved_bytes

SIZES = {"vocab_size": 50, "context_length": 8, "d_model": 12, "num_blocks": 2, "num_heads": 2}
# C 12, F 48, or 32 for each half of SwiGLU; rank 3.
ATTENTION = 3 * (3 * 12 + (12 + 12 + 12)) + 3 * (12 + 12)
GROUPED = 3 * (3 * 12 + (12 + 6 + 6)) + 3 * (12 + 12)
RELU = 3 * (12 + 48) + 3 * (48 + 12)
SWIGLU = 3 * (2 * 12 + (32 + 32)) + 3 * (32 + 12)


def adapted(config: LoraConfig, **choices: Any) -> GPT:
    """A model whose adapters have been trained, as it were."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SIZES | choices))
    add_adapters(gpt, config)
    for name, weight in gpt.named_parameters():
        if ".lora_b" in name:
            torch.nn.init.normal_(weight, 0, 0.1)
    return gpt.eval()


class TestLayer:
    def test_each_part_has_a_product_of_its_own(self):
        torch.manual_seed(0)
        linear = torch.nn.Linear(5, 9)
        layer = LoraLinear(linear, [4, 2, 3], LoraConfig(2, alpha=6.0))
        for b in layer.lora_b:
            torch.nn.init.normal_(b)
        x = torch.randn(2, 7, 5)
        weight = linear.weight.detach().clone()
        starts = {0: (0, 4), 1: (4, 6), 2: (6, 9)}
        for part, (start, end) in starts.items():
            a, b = layer.lora_a[part], layer.lora_b[part]
            assert (a.shape, b.shape) == ((2, 5), (end - start, 2))
            weight[start:end] += 3.0 * (b @ a).detach()  # alpha / rank
        expected = x @ weight.T + linear.bias
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer.merged()(x), expected)

    def test_it_starts_as_in_the_paper(self):
        torch.manual_seed(0)
        linear = torch.nn.Linear(64, 64)
        layer = LoraLinear(linear, [64], LoraConfig(32))
        x = torch.randn(1, 3, 64)
        assert torch.equal(layer(x), linear(x))
        assert not layer.lora_b[0].any()
        # Uniform within sqrt(6 / ((1 + 5) 64)): what kaiming_uniform with a = sqrt(5) is.
        a = layer.lora_a[0]
        assert 0.95 / 8 < a.abs().max() <= 1 / 8
        assert a.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.03)

    def test_dropout_is_of_its_input_and_in_training_alone(self):
        linear = torch.nn.Linear(6, 4, bias=False)
        torch.nn.init.zeros_(linear.weight)
        layer = LoraLinear(linear, [4], LoraConfig(1, alpha=1.0, dropout=0.5))
        torch.nn.init.ones_(layer.lora_a[0])
        torch.nn.init.ones_(layer.lora_b[0])
        x = torch.ones(1, 200, 6)
        assert torch.equal(layer.eval()(x), torch.full((1, 200, 4), 6.0))
        kept = layer.train()(x)[0, :, 0] / 2  # how many of the six inputs
        assert set(kept.tolist()) <= set(range(7))
        assert kept.mean().item() == pytest.approx(3, abs=0.4)


@pytest.mark.parametrize(
    ("choices", "layers", "weights"),
    [
        ({}, "all", ATTENTION + RELU),
        ({}, "attention", ATTENTION),
        ({}, "feed_forward", RELU),
        ({"style": "modern", "num_kv_heads": 1}, "all", GROUPED + SWIGLU),
        ({"style": "fast"}, "all", ATTENTION + SWIGLU),
    ],
)
def test_adapters_alone_are_trained_and_merge_into_an_ordinary_model(choices, layers, weights):
    torch.manual_seed(0)
    plain = GPT(GPTConfig(**SIZES | choices)).eval()
    gpt = adapted(LoraConfig(3, layers=layers), **choices)
    trained = {name: p for name, p in gpt.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == 2 * weights
    ids = torch.randint(50, (2, 8))
    logits = gpt(ids)
    logits.sum().backward()
    assert {name for name, p in gpt.named_parameters() if p.grad is not None} == trained.keys()
    assert (logits - plain(ids)).abs().max() > 1e-3
    merge_adapters(gpt)
    assert gpt.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(gpt(ids), logits)
    assert all(type(part) is not LoraLinear for part in gpt.modules())


def test_a_fingerprint_is_of_names_types_shapes_and_values():
    one = {"a": torch.ones(2, 3), "b": torch.zeros(1)}
    assert fingerprint(dict(reversed(one.items()))) == fingerprint(one)
    for other in (
        {"a": torch.ones(3, 2), "b": torch.zeros(1)},
        {"a": torch.ones(2, 3), "c": torch.zeros(1)},
        {"a": torch.ones(2, 3).to(torch.bfloat16), "b": torch.zeros(1)},
        {"a": torch.ones(2, 3), "b": torch.full((1,), -0.0)},
    ):
        assert fingerprint(other) != fingerprint(one)


@pytest.fixture
def lora(trained) -> dict[str, Any]:
    """Options that train adapters of a small modern model."""
    return {
        "model.init_from": trained / "checkpoints" / "last.ckpt",
        "model.lora_rank": 4,
        "model.lora_dropout": 0.1,
        "model.learning_rate": 0.01,
    }


def folder_of(result: Any) -> Path:
    assert result.status == 0, result.err
    return Path(result.run.trainer.log_dir) / "checkpoints"


def test_a_run_saves_adapters_and_the_model_they_adapt_once(train, lora, trained, capfd, tmp_path):
    result = train(**lora, **{"checkpoints.every_n_steps": 2})
    folder = folder_of(result)
    base, _ = load_checkpoint(trained / "checkpoints" / "last.ckpt")
    mine = f"base-{fingerprint(base.state_dict())[:12]}.ckpt"
    saved = ["best.ckpt", "last.ckpt", "step_2.ckpt", "step_4.ckpt", "step_6.ckpt"]
    assert sorted(path.name for path in folder.iterdir()) == [mine, *saved]
    checkpoint = Checkpoint.read(folder / "last.ckpt")
    gpt = result.run.model.gpt
    names = {name for name, _ in gpt.named_parameters() if ".lora_" in name}
    assert checkpoint.weights.keys() == names
    assert len(names) == 2 * 2 * (3 + 1 + 2 + 1)  # blocks, A and B; q, k, v, out; gate, up, out
    state = checkpoint.optimizer_state["state"]
    assert state.keys() == {f"gpt.{name}" for name in names}
    # What was frozen is what it was, and is what an ordinary checkpoint beside them has.
    kept, tokenizer = load_checkpoint(folder / mine)
    for name, weight in base.state_dict().items():
        assert torch.equal(weight, gpt.state_dict()[name]), name
        assert torch.equal(weight, kept.state_dict()[name]), name
    # The model of a checkpoint has both.
    model, loaded = load_checkpoint(folder / "last.ckpt")
    assert loaded == tokenizer
    assert model.state_dict().keys() == base.state_dict().keys()
    ids = torch.arange(16)[None]
    torch.testing.assert_close(model(ids), gpt.eval()(ids), atol=1e-5, rtol=1e-4)
    assert (model(ids) - base(ids)).abs().max() > 0.01
    trained_card = f"Trained parameters: {sum(w.numel() for w in checkpoint.weights.values()):,} ("
    assert trained_card in result.out
    assert "in LoRA adapters of rank 4" in result.out
    # Other commands read it as any checkpoint.
    text = lit_gpt.load(folder.parent).generate("the", 5, seed=1, temperature=0)
    assert main(["generate", f"--ckpt_path={folder.parent}", "--prompt=the",
                 "--max_new_tokens=5", "--temperature=0"]) == 0  # fmt: skip
    assert text in capfd.readouterr().out
    loss = result.run.final.result.loss  # of the same tokens, with the adapters apart
    data = result.run.data
    val = data.tokenizer.decode(data.val_tokens)
    (tmp_path / "val.txt").write_text(val, encoding="utf-8")
    words = [f"--ckpt_path={folder / 'last.ckpt'}", f"--data.path={tmp_path / 'val.txt'}"]
    assert main(["evaluate", *words, f"--data.cache={tmp_path / 'val'}", "--json"]) == 0
    found = re.search(r'"loss": ([\d.]+)', capfd.readouterr().out)
    assert float(found[1]) == pytest.approx(loss, abs=0.05)


def test_the_first_evaluation_is_that_of_the_model(train, lora, trained):
    """B is zero: nothing is changed before the first step."""
    plain = train(**{"model.init_from": lora["model.init_from"]})
    result = train(**lora)
    assert result.steps[0] == plain.steps[0]
    assert result.steps[-1] != plain.steps[-1]
    first, last = (float(steps.split()[-1]) for steps in (result.steps[0], result.steps[-1]))
    assert last < first - 0.02


class Losses(pl.Callback):
    """The exact loss of each batch; sends SIGINT during batch `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.batches: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        if len(self.batches) + 1 == self.stop:
            signal.raise_signal(signal.SIGINT)

    def on_train_batch_end(self, trainer, pl_module, outputs, *args: Any) -> None:
        self.batches.append(outputs["loss"].item())


RESUMED = {
    "adamw": {"trainer.accumulate_grad_batches": 2, "model.dropout": 0.2},
    "muon": {"model.optimizer": "muon", "model.schedule": "cosine", "data.order": "shuffled"},
    "bf16-true": {"trainer.precision": "bf16-true"},
    "bf16-mixed": {"trainer.precision": "bf16-mixed", "trainer.gradient_clip_val": 0.1},
    "64-true": {"trainer.precision": "64-true"},
    "recomputed": {"model.activation_checkpointing": True, "model.lora_layers": "attention"},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(train, lora, options):
    options = lora | options
    whole, first, second = Losses(), Losses(3), Losses()
    expected = train(callbacks=[whole], **options)
    stopped = train(callbacks=[first], **options)
    assert stopped.status == 130, stopped.err
    last = Path(stopped.run.trainer.log_dir) / "checkpoints" / "last.ckpt"
    result = train(callbacks=[second], **options, ckpt_path=last)
    assert result.status == 0, result.err
    assert first.batches + second.batches == whole.batches
    weights = expected.run.model.state_dict()
    for name, weight in result.run.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert "results may differ" not in result.out


def test_a_run_goes_on_elsewhere_without_what_it_started_from(train, lora, trained, tmp_path):
    """The frozen weights are in the folder of each run."""
    source = tmp_path / "model.ckpt"
    shutil.copy(lora["model.init_from"], source)
    options = lora | {"model.init_from": source}
    folder = folder_of(train(**options))
    source.unlink()
    longer = options | {"trainer.max_steps": 8}
    other = folder_of(train(**longer, ckpt_path=folder / "best.ckpt"))
    assert other != folder
    assert {p.name for p in other.glob("base-*")} == {p.name for p in folder.glob("base-*")}
    load_checkpoint(other / "last.ckpt")


def test_a_checkpoint_without_its_model_is_one_line(train, lora, tmp_path, capfd):
    folder = folder_of(train(**lora))
    (base,) = folder.glob("base-*.ckpt")
    alone = Path(shutil.copy(folder / "last.ckpt", tmp_path / "alone.ckpt"))

    def refused(*argv: str) -> str:
        assert main(["generate", f"--ckpt_path={alone}", "--prompt=x"]) == 2
        (line,) = capfd.readouterr().err.splitlines()[-1:]
        return line

    gone = f"error: {alone} contains only LoRA adapters, and their base model is missing; put "
    assert refused() == f"{gone}{base.name} back beside it, from the folder of its run"
    shutil.copy(lora["model.init_from"], tmp_path / base.name)
    assert load_checkpoint(alone)  # any checkpoint of the same weights will do
    shutil.copy(folder / "last.ckpt", tmp_path / base.name)
    assert f"{tmp_path / base.name} is not the model that {alone} adapts" in refused()
    resumed = train(**lora | {"trainer.max_steps": 8}, ckpt_path=alone)
    assert resumed.status == 2
    assert f"{tmp_path / base.name} is not the model that {alone} adapts" in resumed.err
    shutil.copy(base, tmp_path)
    load_checkpoint(alone)


def test_adapters_of_adapters(train, lora):
    """A run from a checkpoint with adapters starts from the model that has both."""
    folder = folder_of(train(**lora))
    tuned, _ = load_checkpoint(folder / "last.ckpt")
    again = train(**lora | {"model.init_from": folder / "last.ckpt"})
    name = f"base-{fingerprint(tuned.state_dict())[:12]}.ckpt"
    assert (folder_of(again) / name).is_file()
    full = train(**{"model.init_from": folder / "last.ckpt"})
    assert all(weight.requires_grad for weight in full.run.model.parameters())
    assert full.steps[0] == again.steps[0]


def test_what_can_not_be_is_one_line(train, lora, capfd):
    without = dict(lora)
    del without["model.init_from"]
    for options, message in (
        (without, "--model.lora_rank 4: needs a trained model to adapt; "
         "name its checkpoint or folder with --model.init_from"),
        (lora | {"model.lora_rank": -1}, "--model.lora_rank -1: must be at least 1"),
        (lora | {"model.lora_rank": 17},
         "--model.lora_rank 17: must be at most --model.d_model (16)"),
        (lora | {"model.lora_alpha": 0}, "--model.lora_alpha 0.0: must be above 0"),
        (lora | {"model.lora_dropout": 1}, "--model.lora_dropout 1.0: must be in [0, 1)"),
        (lora | {"checkpoints.sharded": True, "trainer.strategy": "fsdp2"},
         "--checkpoints.sharded: is for checkpoints too large for one process, and those of "
         "adapters are small; leave it out"),
        (lora | {"budget": "1m"},
         "--budget: chooses a new model, and --model.init_from names one; leave one of them out"),
    ):  # fmt: skip
        result = train(**options)
        assert result.status == 2
        assert result.err.splitlines()[-1] == f"error: {message}"


def test_a_run_with_other_adapters_does_not_fit(train, lora):
    last = folder_of(train(**lora)) / "last.ckpt"
    longer = {"trainer.max_steps": 8}
    for change, message in {
        "model.lora_rank": (2, "lora_rank was 4 and is now 2"),
        "model.lora_alpha": (8.0, "lora_alpha was 16.0 and is now 8.0"),
        "model.lora_layers": ("attention", "lora_layers was all and is now attention"),
    }.items():
        result = train(**lora | longer | {change: message[0]}, ckpt_path=last)
        assert result.status == 2
        assert message[1] in result.err
    result = train(**lora | longer | {"model.lora_dropout": 0.0}, ckpt_path=last)
    assert "results may differ: lora_dropout 0.1 -> 0.0" in result.out


def test_damaged_adapters_are_one_line(train, lora, tmp_path):
    folder = folder_of(train(**lora))
    contents = torch.load(folder / "last.ckpt", weights_only=True)
    for change in (
        {"rank": 1 << 40},
        {"rank": "4"},
        {"rank": 2},
        {"layers": "attention"},
        {"more": 1},
        {"base": "../.."},
    ):
        torch.save(contents | {"lora": contents["lora"] | change}, folder / "odd.ckpt")
        with pytest.raises(lit_gpt.UserError):
            load_checkpoint(folder / "odd.ckpt")
    for odd in ([], 5, {"rank": 4}):
        torch.save(contents | {"lora": odd}, folder / "odd.ckpt")
        with pytest.raises(lit_gpt.UserError):
            load_checkpoint(folder / "odd.ckpt")


def test_learning_rates_are_tried_on_adapters(train, lora):
    result = train("--find_lr", **lora)
    assert result.status == 0, result.err
    assert "Learning rates tried: " in result.out


def test_a_plain_trainer_saves_no_adapters(text_file, tmp_path):
    """It neither loads nor keeps the model that they adapt."""
    data = lit_gpt.TextDataModule(str(text_file), context_length=16, cache=str(tmp_path / "cache"))
    sizes = {"vocab_size": data.vocab_size, "context_length": 16, "d_model": 16, "num_blocks": 1}
    model = lit_gpt.LitGPT(init_from="model.ckpt", lora_rank=2, **sizes)
    trainer = pl.Trainer(
        max_steps=1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(lit_gpt.UserError, match="only the training command loads and keeps"):
        trainer.fit(model, datamodule=data)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_processes_train_them_together(lora, text_file, tmp_path):
    """DDP and fsdp2 give the losses of one process, and fsdp2 resumes its own and others' files."""
    options = lora | {"model.lora_dropout": 0.0, "checkpoints.every_n_steps": 3}

    def losses(size: int, name: str, **more: Any) -> dict[str, Any]:
        run = train_on(size, tmp_path / name, text_file, **options | more)
        assert set(run.statuses) == {0}, run.out
        lines = [line for line in run.out[0].splitlines() if line.startswith(("Step", "Final"))]
        return {"lines": lines, "step": run.checkpoints / "step_3.ckpt", "run": run}

    one = losses(1, "one", **{"data.batch_size": 8})
    two = {"data.batch_size": 4, "trainer.strategy": "fsdp2"}
    sharded = losses(2, "sharded", **two)
    ddp = losses(2, "ddp", **two | {"trainer.strategy": "ddp"})
    weights = Checkpoint.read(one["run"].checkpoints / "last.ckpt").weights
    again = losses(2, "again", **two, ckpt_path=sharded["step"])
    crossed = losses(2, "crossed", **two, ckpt_path=one["step"])
    back = losses(1, "back", **{"data.batch_size": 8}, ckpt_path=sharded["step"])
    for other in (sharded, ddp, again, crossed, back):
        found = Checkpoint.read(other["run"].checkpoints / "last.ckpt").weights
        torch.testing.assert_close(found, weights, atol=1e-5, rtol=1e-3)
        load_checkpoint(other["run"].checkpoints / "last.ckpt")


def test_the_plan_knows_what_is_trained(lora, places, capfd):
    assert main(["plan", *command_line(places | SMALL | lora)]) == 0
    out = capfd.readouterr().out
    # C 16, one of two heads for keys and values, F 48.
    attention = 4 * (3 * 16 + (16 + 8 + 8)) + 4 * (16 + 16)
    feed_forward = 4 * (2 * 16 + (48 + 48)) + 4 * (48 + 16)
    assert f"Trained parameters: {2 * (attention + feed_forward):,} (" in out


@pytest.fixture
def norm_of_cuda(monkeypatch):
    def forward(self, x):
        return FusedRMSNorm.apply(x, self.weight, self.eps)

    monkeypatch.setattr(torch.nn.RMSNorm, "forward", forward)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_memory_of_other_devices_is_what_a_step_takes(
    norm_of_cuda, precision, dropout, optimizer
):
    config = GPTConfig(V, T, d_model=64, num_blocks=3, num_heads=4, dropout=0.0, style="modern")
    lora = LoraConfig(8, dropout=dropout)
    gpt = GPT(config)
    add_adapters(gpt, lora)
    gpt.to(DTYPES[precision])
    adapters = [weight for weight in gpt.parameters() if weight.requires_grad]
    memory = estimate(config, B * T, precision, "single", optimizer=optimizer, lora=lora)
    found = saved_bytes(gpt, precision)
    log_probabilities = 4 * B * T * V
    whole = sum(a.nbytes for a in adapters)  # of each layer as one matrix, for the backward pass
    # On the CPU, masks have the type of what they mask; elsewhere a byte.
    inputs = 64 + 64 + 64 + 176
    masks = (DTYPES[precision].itemsize - 1) * 3 * B * T * inputs if dropout else 0
    assert memory.activations == pytest.approx(found - log_probabilities - whole - masks, rel=0.05)
    built = build_optimizer(gpt, 1e-3, 0.0, (0.9, 0.95), kind=optimizer)
    next_token_loss(gpt, *batch()).backward()
    built.step()
    assert memory.weights == sum(p.nbytes for p in gpt.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in adapters)
    moments = [t for state in built.state.values() for t in state.values() if t.ndim]
    assert memory.moments == sum(t.nbytes for t in moments)


def test_the_plan_for_other_devices_knows_what_is_frozen(lora, places, capfd):
    words = ["--device_name=H100", "--json", "--trainer.precision=32-true"]
    assert main(["plan", *words, *command_line(places | SMALL | lora)]) == 0
    out = capfd.readouterr().out
    numbers = json.loads(out.splitlines()[-1])
    adapters = 2 * (4 * (3 * 16 + 32) + 4 * 32 + 4 * (2 * 16 + 96) + 4 * 64)
    assert numbers["trained_parameters"] == adapters
    assert f"({adapters:,} of them trained)" in out
    frozen = numbers["parameters"] - adapters - 2 * (2 * 16 + 2 * 8) - 16  # without norms
    assert numbers["flops_per_token"] == 4 * frozen + 6 * adapters + 12 * 2 * 16 * 16
