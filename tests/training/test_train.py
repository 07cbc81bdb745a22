"""The training command: options, defaults, what it prints, and one line for each mistake."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import SafetensorError

from lit_gpt.command import run
from lit_gpt.text.ngrams import frequency_baselines
from lit_gpt.training.epochs import Epoch
from lit_gpt.training.run_folder import claim_run
from lit_gpt.training.summary import device_card
from lit_gpt.training.trainer_options import default_precision
from tests.conftest import ROOT

DEFAULTS = {  # the table of the README
    "model.d_model": 80,
    "model.num_blocks": 6,
    "model.num_heads": 4,
    "model.dropout": 0.1,
    "model.style": "classic",
    "model.learning_rate": 1e-3,
    "model.schedule": "constant",
    "data.batch_size": 2,
    "data.context_length": 128,
    "data.path": "data/订单商品名称.csv",
    "data.tokenizer": "cl100k_base",
    "data.compact_vocab": True,
    "data.train_fraction": 0.9,
    "data.order": "random",
    "trainer.max_steps": 500,
    "trainer.val_check_interval": 50,
    "trainer.limit_val_batches": 10,
    "trainer.accelerator": "auto",
    "trainer.devices": 1,
    "seed_everything": 1337,
    "ckpt_path": None,
}


def look_up(config: dict, name: str):
    for part in name.split("."):
        config = config[part]
    return config


@pytest.fixture
def config_of(train):
    """The configuration that --print_config shows for some options."""

    def run(*args: str, **options) -> dict:
        result = train(*args, "--print_config", defaults={}, **options)
        assert result.status == 0, result.err
        return yaml.safe_load(result.out)

    return run


def test_defaults_are_the_documented_ones(config_of):
    config = config_of()
    assert {name: look_up(config, name) for name in DEFAULTS} == DEFAULTS


def test_options_configs_and_overrides_work_together(config_of, tmp_path: Path):
    """Later files win over earlier ones, the command line over files."""
    (tmp_path / "a.yaml").write_text("model: {d_model: 40, num_heads: 2}")
    (tmp_path / "b.yaml").write_text("model: {num_heads: 8}")
    files = [f"--config={tmp_path / name}" for name in ("a.yaml", "b.yaml")]
    config = config_of(*files, "--trainer.max_steps=7", "--model.dropout=0")
    names = ["model.d_model", "model.num_heads", "trainer.max_steps", "model.dropout"]
    assert [look_up(config, name) for name in names] == [40, 8, 7, 0.0]


CONFIGS = sorted(set((ROOT / "configs").glob("*.yaml")) - {ROOT / "configs" / "sweep.yaml"})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)  # sweep.yaml is for sweep.py
def test_every_config_loads_and_holds_only_differences(path: Path, config_of):
    plain, config = config_of(), config_of(f"--config={path}")

    def leaves(tree: dict, prefix: str = ""):
        for key, value in tree.items():
            if isinstance(value, dict) and "class_path" not in value:
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    for name in leaves(yaml.safe_load(path.read_text(encoding="utf-8"))):
        assert look_up(config, name) != look_up(plain, name), name


@pytest.mark.parametrize(
    ("accelerator", "cuda", "bf16", "precision"),
    [
        ("auto", True, True, "bf16-mixed"),
        ("gpu", True, True, "bf16-mixed"),
        ("cuda", True, False, "32-true"),  # an older card
        ("cpu", True, True, "32-true"),
        ("auto", False, False, "32-true"),
        ("gpu", False, False, "32-true"),  # a Mac
    ],
)
def test_default_precision_is_bfloat16_where_the_card_has_it(
    accelerator, cuda, bf16, precision, monkeypatch
):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    assert default_precision(accelerator) == precision
    assert chosen == (["high"] if cuda and accelerator != "cpu" else [])  # TF32


def test_precision_can_be_chosen(train):
    result = train(**{"trainer.precision": "bf16-mixed"})
    assert result.status == 0, result.err
    assert "precision bf16-mixed" in result.out
    assert "precision 32-true" in train().out


def test_help_lists_our_options(train):
    result = train("--help")
    assert result.status == 0
    for option in (
        "--ckpt_path",
        "--model.style",
        "--data.path",
        "--trainer.max_steps",
        "--config",
    ):
        assert option in result.out


def test_what_a_run_prints(train, text_file):
    result = train()
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    text = text_file.read_text(encoding="utf-8")
    data = result.run.data
    num_tokens = data.corpus.info.num_tokens
    assert lines[0] == f"Text length: {len(text):,} characters"
    assert lines[1] == f"Total: {num_tokens:,} tokens"
    train_tokens = int(num_tokens * 0.9)
    rest = f"validation: {num_tokens - train_tokens:,}"
    assert lines[2] == f"Training: {train_tokens:,} tokens, {rest}"
    assert lines[3].startswith("Validation lines also in the training text")
    assert lines[4] == f"Vocabulary: {data.vocab_size:,} tokens (cl100k_base, compact)"
    assert lines[5] == f"Bytes per token: {len(text.encode()) / num_tokens:.2f}"
    windows = (train_tokens - 16) // 16  # without overlap, whichever of 16 places comes first
    assert lines[6] == f"Steps: 6 of 32 tokens, {6 * 2 / windows:.2g} epochs"
    assert lines[7] == "Device: cpu, precision 32-true"
    total = sum(p.numel() for p in result.run.model.gpt.parameters())
    outer = 2 * data.vocab_size * 16
    assert lines[8] == (
        f"Parameters: {total:,} (embedding and output {outer:,}, blocks {total - outer:,})"
    )
    number = r"\d+\.\d{3}"
    for step, line in zip((0, 2, 4, 6), result.steps, strict=True):
        pattern = rf"Step: {step}, Training Loss: {number}, Validation Loss: {number}"
        assert re.fullmatch(pattern, line)
    untrained = float(result.steps[0].rpartition(" ")[2])
    assert untrained == pytest.approx(math.log(data.vocab_size), abs=0.1)
    final = next(line for line in lines if line.startswith("Final"))
    assert f"over all {num_tokens - train_tokens - 1:,} tokens" in final
    for start in ("Best checkpoint: ", "Last checkpoint: ", "See the curves:  tensorboard"):
        assert sum(line.startswith(start) for line in lines) == 1


def test_what_was_changed_in_the_text_is_said(train, text_file, tmp_path):
    assert "Byte-order" not in train().out
    assert "End-of-text" not in train().out
    text = text_file.read_text(encoding="utf-8")
    for name in "abc":
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text(text, encoding="utf-16")
    result = train(**{"data.path": tmp_path / "texts", "data.encoding": "utf-16"})
    assert result.out.splitlines()[:3] == [
        f"Text length: {3 * len(text):,} characters",
        "Byte-order marks removed: 3",
        "End-of-text tokens between files: 2",
    ]


def test_final_loss_is_that_of_every_validation_token(train):
    result = train()
    tokens, model = result.run.data.val_tokens.astype("int64"), result.run.model.gpt.eval()
    lengths = result.run.data.tokenizer.token_lengths()
    nats = num_bytes = 0.0
    with torch.no_grad():
        for i in range(0, len(tokens) - 1, 16):
            window = torch.from_numpy(tokens[i : i + 17])
            log_probabilities = model(window[None, :-1])[0].log_softmax(-1)
            nats -= log_probabilities.gather(1, window[1:, None]).sum().item()
            num_bytes += lengths[window[1:]].sum()
    loss = nats / (len(tokens) - 1)
    final = next(line for line in result.out.splitlines() if line.startswith("Final"))
    found = [float(x.replace(",", "")) for x in re.findall(r"[\d,]*\.\d+", final)]
    bits_per_byte = nats / math.log(2) / num_bytes
    assert found == pytest.approx([loss, math.exp(loss), bits_per_byte], abs=6e-3)


def line_of(result, start: str) -> str:
    (line,) = (line for line in result.out.splitlines() if line.startswith(start))
    return line


def test_lines_in_both_splits_are_told(train, tmp_path, monkeypatch):
    text = tmp_path / "lines.txt"
    text.write_text("".join(f"line {n % 95}\n" for n in range(100)), encoding="utf-8")
    options = {"data.path": text, "data.tokenizer": "bytes", "data.context_length": 8}
    options |= {"trainer.max_steps": 1}
    start = "Validation lines also in the training text: "
    half = train(**options, **{"data.train_fraction": 0.5})  # cut in line 50 of 0 to 94
    assert line_of(half, start) == f"{start}5 of 49 (10.2%, 8.9% of the bytes)"
    result = train(**options)  # cut in line 89
    assert line_of(result, start) == f"{start}5 of 10 (50.0%, 46.2% of the bytes)"
    with monkeypatch.context() as patch:
        patch.setattr("lit_gpt.training.summary.shared_lines", None)  # not called: the cache knows
        assert line_of(train(**options), start) == line_of(result, start)
    text.write_text("the same line again and again " * 30, encoding="utf-8")
    assert start not in train(**options).out


def test_baselines_stand_beside_the_final_loss(train):
    result = train()
    data, lines = result.run.data, result.out.splitlines()
    unigram, bigram = frequency_baselines(
        data.train_tokens, data.val_tokens, data.tokenizer.token_lengths()
    )
    assert 1 < bigram < unigram < 3  # words drawn from 15, 8 a line
    final = next(i for i, line in enumerate(lines) if line.startswith("Final validation loss"))
    assert lines[final + 1] == (
        f"For comparison, bits per byte from frequencies alone: unigram {unigram:.4f}, "
        f"bigram {bigram:.4f}"
    )


def test_copies_of_the_training_text_are_told(train, tmp_path):
    """A model that knows a text of one sentence by heart, and one that knows nothing."""
    text = tmp_path / "same.txt"
    text.write_text("abcdefghij" * 100, encoding="utf-8")
    options = {"data.path": text, "data.tokenizer": "bytes", "model.learning_rate": 1e-2}
    options |= {"model.dropout": 0.0, "trainer.max_steps": 100, "trainer.val_check_interval": 100}
    options |= {"samples.prompts": '["cdefgh", "fghijab"]', "data.batch_size": 8}
    start = "Copied from the training text (20 tokens or more in a row): "
    assert line_of(train(**options), start) == f"{start}64 of 64 generated tokens (100.0%)"
    options["trainer.max_steps"] = 1
    assert line_of(train(**options), start) == f"{start}0 of 64 generated tokens (0.0%)"
    assert start not in train(**options, **{"samples.num_tokens": 19}).out  # too short to tell


def test_the_step_after_the_last_interval_is_evaluated_once(train):
    result = train(**{"trainer.max_steps": 5})
    assert result.evaluated == [
        0,
        2,
        4,
        5,
    ]


def test_the_commands_that_it_prints_work(train, monkeypatch, tmp_path):
    """`Continue: ...` goes on in the same folder, with the same options."""
    import shlex

    first = train(**{"model.qk_norm": True})
    line = next(x for x in first.out.splitlines() if x.startswith("Continue:"))
    words = shlex.split(line.partition(":")[2])
    assert words[:2] == ["python", "scripts/train.py"]
    second = train(*words[2:], defaults={})
    assert second.status == 0, second.err
    assert second.evaluated == [8, 10, 12]
    assert second.run.trainer.log_dir == first.run.trainer.log_dir
    assert second.run.model.gpt.config.qk_norm


def test_ckpt_path_last_takes_the_newest_run(train):
    train()
    second = train(**{"model.d_model": 32})
    third = train("--ckpt_path=last", **{"model.d_model": 32, "trainer.max_steps": 8})
    assert third.status == 0, third.err
    assert third.run.trainer.log_dir == second.run.trainer.log_dir
    assert third.evaluated == [8]


def test_without_ckpt_path_each_run_starts_afresh_in_its_own_folder(train, tmp_path):
    first, second = train(), train()
    assert first.steps == second.steps
    assert {p.name for p in (tmp_path / "logs").iterdir()} == {"version_0", "version_1"}


def test_runs_started_at_once_get_their_own_folders(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: claim_run(tmp_path), range(40)))
    assert sorted(names) == sorted(f"version_{n}" for n in range(40))


def test_another_seed_gives_another_run(train):
    assert train().steps != train(seed_everything=7).steps
    assert train(seed_everything=7).steps == train(seed_everything=7).steps


CHANGES = {  # each option changes the run
    "model.learning_rate": 1e-2,
    "model.weight_decay": 30,
    "model.optimizer": "muon",
    "model.betas": "[0.5, 0.6]",
    "model.table_rate": 5,
    "model.table_eps": 0.1,
    "model.schedule": "linear",
    "model.warmup_steps": 3,
    "model.dropout": 0.5,
    "model.style": "modern",
    "model.num_blocks": 1,
    "model.num_kv_heads": 1,
    "model.smear": True,
    "model.bigram_rows": 50,
    "model.spelling_rows": 50,
    "model.output_spelling_rows": 50,
    "model.softmax_cutoff": 0.5,
    "model.qkv_bias": False,
    "model.norm_eps": 0.1,
    "model.sliding_window": 1,
    "data.batch_size": 3,
    "data.context_length": 8,
    "data.order": "shuffled",
    "data.train_fraction": 0.5,
    "data.tokenizer": "bytes",
    "data.compact_vocab": False,
    "trainer.max_steps": 4,
    "trainer.val_check_interval": 3,
    "trainer.limit_val_batches": 1,
    "trainer.accumulate_grad_batches": 2,
}


def test_each_option_changes_the_run(train):
    plain = train().steps
    for name, value in CHANGES.items():
        result = train(**{name: value})
        assert result.status == 0, result.err
        assert result.steps != plain, name


MISTAKES = {
    "a missing path": ({"data.path": "nowhere.txt"}, "'nowhere.txt': no such file or folder"),
    "heads": ({"model.d_model": 81, "model.num_heads": 4}, "d_model 81: must be divisible by"),
    "dropout 1": ({"model.dropout": 1.0}, "dropout 1.0: must be in [0, 1)"),
    "dropout -1": ({"model.dropout": -1}, "dropout -1.0: must be in [0, 1)"),
    "learning rate": ({"model.learning_rate": 0}, "learning_rate 0.0: must be above 0"),
    "nan": ({"model.learning_rate": "nan"}, "--model.learning_rate 'nan': must be"),
    "weight decay": ({"model.weight_decay": -1}, "weight_decay -1.0: must be at least 0"),
    "betas": ({"model.betas": "[0.9, 1.0]"}, "betas [0.9, 1.0]: must both be in [0, 1)"),
    "warm-up": ({"model.warmup_steps": -1}, "warmup_steps -1: must be at least 0"),
    "skipped steps": ({"model.skip_bad_steps": -1}, "skip_bad_steps -1: must be at least 0"),
    "every steps": ({"checkpoints.every_n_steps": -1}, "every_n_steps -1: must be at least 0"),
    "keep": ({"checkpoints.keep": 0}, "keep 0: must be at least 1, or -1 for all"),
    "too huge": ({"model.d_model": 10**18}, "out of memory; lower"),
    "minimum": ({"model.min_learning_rate": 1}, "min_learning_rate 1.0: must be between"),
    "batch size": ({"data.batch_size": 0}, "batch_size 0: must be at least 1"),
    "context": ({"data.context_length": -1}, "context_length -1: must be at least 1"),
    "too short": ({"data.context_length": 5000}, "its training split has"),
    "tokenizer": ({"data.tokenizer": "gpt9"}, "'gpt9': unknown tokenizer"),
    "pairs": ({"model.bigram_rows": -1}, "--model.bigram_rows -1: must be at least 0"),
    "parts": ({"model.spelling_rows": -1}, "--model.spelling_rows -1: must be at least 0"),
    "table rate": ({"model.table_rate": 0}, "--model.table_rate 0.0: must be above 0"),
    "table epsilon": ({"model.table_eps": -1}, "--model.table_eps -1.0: must be above 0"),
    "fastest": ({"model.style": "fastest"}, "'fastest': must be one of classic, modern, fast"),
    "a type": ({"model.d_model": "wide"}, "--model.d_model 'wide': must be a whole number"),
    "a choice": (
        {"model.style": "baroque"},
        "--model.style 'baroque': must be one of classic, modern, fast",
    ),
    "an option": ({"model.size": 3}, "unrecognized arguments: --model.size=3"),
    "a config": ({"config": "nowhere.yaml"}, "File does not exist"),
    "no last": ({"ckpt_path": "last"}, "--ckpt_path 'last': no run below"),
    "no checkpoint": ({"ckpt_path": "nowhere.ckpt"}, "no checkpoint at 'nowhere.ckpt'"),
    "huge": ({"model.d_model": 10**12}, "out of memory (asked for"),
    "devices": ({"trainer.devices": "x"}, "'devices' selected with 'CPUAccelerator' should be"),
    "accumulation": (
        {"trainer.accumulate_grad_batches": 0},
        "accumulate_grad_batches 0: must be at",
    ),
    "seed": ({"seed_everything": -1}, "--seed_everything -1: must be at least 0"),
    "no seed": ({"seed_everything": "false"}, "--seed_everything False: must be at least 0"),
    "an empty path": ({"ckpt_path": ""}, "no checkpoint at"),
    "a folder": ({"trainer.default_root_dir": "/proc/x"}, "cannot make a folder for the run in"),
    "interval": ({"trainer.val_check_interval": 0}, "val_check_interval 0: must be a number"),
    "accelerator": ({"trainer.accelerator": "abacus"}, "accelerator 'abacus': must be one of auto"),
    "steps": ({"trainer.max_steps": "1.5"}, "--trainer.max_steps '1.5': must be a whole number"),
}


def test_the_start_names_nodes_and_the_windows_of_a_step(train):
    """2 nodes of 2 devices, 3 windows on each, two batches a step: 24 windows of 16 tokens."""
    made = train().run
    trainer = SimpleNamespace(
        strategy=made.trainer.strategy,
        precision="32-true",
        world_size=4,
        num_nodes=2,
        accumulate_grad_batches=2,
    )
    run = SimpleNamespace(**vars(made) | {"trainer": trainer})
    run.data.hparams.batch_size = 3
    run.epoch = Epoch(windows=1000, step_windows=24, context_length=16)
    assert device_card(run) == [
        ("Devices", "4 on 2 nodes, cpu, precision 32-true"),
        ("Windows per step", "24 (4 devices x 3 windows x 2 batches), 384 tokens"),
    ]


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line_and_status_2(train, options, message, tmp_path):
    result = train(**options)
    assert result.status == 2
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (tmp_path / "logs").exists()


def test_a_batch_that_does_not_fit_in_memory_is_one_line(train):
    result = train(**{"data.batch_size": 10**10})
    assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
    assert re.search(r"out of memory \(asked for [\d.]+ GiB\); lower --data.batch_size", result.err)


def test_a_disk_that_is_full_while_the_text_is_encoded_is_one_line(train, small_disk):
    result = train(**{"data.cache": small_disk(8)})
    assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
    assert "no space left on" in result.err.lower()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
            "out of memory (asked for 20.00 GiB); lower --batch_size",
        ),
        (
            RuntimeError("MPS backend out of memory. Tried to allocate 512.00 MB on private pool"),
            "out of memory (asked for 512.00 MB)",
        ),
        (MemoryError(), "out of memory; lower"),
        (OSError(28, "No space left on device", "x.txt"), "no space left on the disk for x.txt"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "no space left on the disk; free",
        ),
    ],
)
def test_shortages_are_one_line(error, message, capsys):
    def main() -> None:
        raise error

    assert run(main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_other_errors_keep_their_traceback():
    def main() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(main)


def test_an_optional_package_that_is_missing_is_named(train, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    result = train(config=ROOT / "configs" / "wandb.yaml")
    assert result.status == 2
    assert len(result.err.splitlines()) == 1


def test_an_unfit_checkpoint_is_refused_and_left_alone(train, text_file):
    run = Path(train().run.trainer.log_dir)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for options, words in (
        ({"model.d_model": 32}, "d_model was 16 and is now 32"),
        ({"model.style": "modern"}, "position was sinusoidal and is now rotary"),
        ({"data.tokenizer": "bytes"}, "tokenizer was cl100k_base and is now bytes"),
        ({"model.learning_rate": 0.01}, "learning_rate was 0.001 and is now 0.01"),
        ({"data.train_fraction": 0.8}, "train_fraction was 0.9 and is now 0.8"),
        ({"data.encoding": "latin-1"}, "encoding was utf-8 and is now latin-1"),
        ({"model.optimizer": "muon"}, "optimizer was adamw and is now muon"),
        ({"trainer.max_steps": 6}, "--trainer.max_steps 6: must be above 6"),
    ):
        result = train("--ckpt_path=last", **{"trainer.max_steps": 8, **options})
        assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
        assert words in result.err
        assert "--config" in result.err or "max_steps" in result.err
    text_file.write_text(text_file.read_text(encoding="utf-8") + "the cat\n", encoding="utf-8")
    result = train("--ckpt_path=last", **{"trainer.max_steps": 8})
    assert result.status == 2
    assert f"the text of {text_file} is not the one it was trained on" in result.err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_other_options_on_resume_are_said(train):
    train()
    options = {"trainer.max_steps": 8, "data.batch_size": 3, "trainer.accumulate_grad_batches": 2}
    result = train("--ckpt_path=last", **options, **{"model.dropout": 0.5})
    line = next(x for x in result.out.splitlines() if x.startswith("Resumed with different"))
    for change in ("dropout 0.1 -> 0.5", "batch_size 2 -> 3", "accumulate_grad_batches 1 -> 2"):
        assert change in line
    assert "Resumed with" not in train("--ckpt_path=last", **options | {"trainer.max_steps": 9},
                                         **{"model.dropout": 0.5}).out  # fmt: skip


def test_a_checkpoint_of_weights_alone_cannot_be_continued(train, tmp_path):
    run = Path(train().run.trainer.log_dir)
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    for name in ("optimizer_states", "loops", "state_dict", "corpus"):
        torch.save({k: v for k, v in content.items() if k != name}, tmp_path / "part.ckpt")
        result = train(f"--ckpt_path={tmp_path / 'part.ckpt'}", **{"trainer.max_steps": 8})
        assert result.status == 2
        assert f"it has no {name}" in result.err


def test_foreign_and_damaged_checkpoints_are_refused(train, tmp_path):
    run = Path(train().run.trainer.log_dir)
    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    damaged = {"half.ckpt": whole[: len(whole) // 2], "text.ckpt": b"hello", "empty.ckpt": b""}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        result = train(f"--ckpt_path={tmp_path / name}")
        assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
        assert f"{name} is not a checkpoint that can be loaded" in result.err
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.ckpt")
    result = train(f"--ckpt_path={tmp_path / 'foreign.ckpt'}")
    assert result.status == 2
    assert "foreign.ckpt is not a complete checkpoint of lit_gpt" in result.err
