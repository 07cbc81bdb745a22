"""What goes with what: changed texts and options, weights for another text, one process a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint import load_checkpoint, read_checkpoint
from lit_gpt.data import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.module import LitGPT
from lit_gpt.training.init_from import load_weights
from tests.conftest import ROOT, SMALL

RATES = {"table_rate": 1.0, "table_eps": 1e-08}
MODERN = {"model.style": "modern", "model.d_model": 24, "model.num_kv_heads": 1}


def checkpoint_of(result, name: str = "last") -> Path:
    return Path(result.run.trainer.log_dir) / "checkpoints" / f"{name}.ckpt"


@pytest.fixture
def other_text(tmp_path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text("另一段文字：the mat sat on 垫子 1234 🦆.\n" * 80, encoding="utf-8")
    return path


@pytest.fixture
def pretrained(train) -> Path:
    return checkpoint_of(train(**MODERN, **{"trainer.max_steps": 4}))


PLAIN = {name: value for name, value in SMALL.items() if not name.startswith("model.")}


@pytest.fixture
def tune(train, pretrained, other_text, tmp_path):
    """train.py on another text from the weights of a checkpoint, nothing said of the model."""

    def run(*args: str, **options):
        places = {"data.path": other_text, "data.cache": tmp_path / "cache"}
        places |= {"trainer.default_root_dir": tmp_path / "logs", "model.init_from": pretrained}
        return train(*args, defaults=PLAIN | places, **options)

    return run


def test_tuning_starts_from_the_weights_and_the_tokenizer(tune, pretrained):
    result = tune(**{"model.learning_rate": 1e-9, "trainer.max_steps": 1})
    assert result.status == 0, result.err
    assert f"Weights, model and tokenizer: {pretrained}" in result.out
    model, tokenizer = load_checkpoint(pretrained)
    assert result.run.data.tokenizer == tokenizer
    assert result.run.model.gpt.config.d_model == 24
    weights = result.run.model.gpt.state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)
    data = result.run.data
    text = Path(data.hparams.path).read_text(encoding="utf-8")
    assert tokenizer.decode(data.corpus.tokens.tolist()) == text


def test_tuning_begins_lower_than_untrained_weights(tune):
    tuned = tune()
    untrained = tune(**{"model.init_from": "null", "data.tokenizer": "bytes"})
    first = [float(result.steps[0].split()[4].rstrip(",")) for result in (tuned, untrained)]
    assert first[0] != first[1]
    last = [float(result.steps[-1].split()[-1]) for result in (tuned,)]
    assert last[0] < first[0]  # and it learns


def test_a_tuned_run_is_a_run_of_its_own(tune, pretrained, tmp_path):
    before = pretrained.read_bytes()
    result = tune()
    assert result.evaluated == [0, 2, 4, 6]  # steps from 0, a schedule and moments of its own
    assert checkpoint_of(result) != pretrained
    assert pretrained.read_bytes() == before


def test_a_tuned_run_goes_on_without_the_file_it_began_with(tune, pretrained):
    whole = tune(**{"trainer.max_steps": 8})
    first = tune(**{"trainer.max_steps": 4})
    pretrained.unlink()
    second = tune("--ckpt_path=last", **{"trainer.max_steps": 8})
    assert second.status == 0, second.err
    assert "Resumed with different options" not in second.out
    assert second.steps == whole.steps[3:]
    assert checkpoint_of(second) == checkpoint_of(first)
    weights = [read_checkpoint(checkpoint_of(r))["state_dict"] for r in (whole, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_printed_command_goes_on_with_a_tuned_run(tune, train):
    import shlex

    line = next(x for x in tune().out.splitlines() if x.startswith("Continue:"))
    again = train(*shlex.split(line.partition(":")[2])[2:], defaults={})
    assert again.status == 0, again.err
    assert again.evaluated == [8, 10, 12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.d_model": 32}, "--model.d_model 32: contradicts the weights of"),
        ({"model.activation": "gelu"}, "--model.activation 'gelu': contradicts the weights of"),
        ({"data.tokenizer": "bytes"}, "--data.tokenizer 'bytes': contradicts the weights of"),
        ({"model.init_from": "nowhere.ckpt"}, "no checkpoint at 'nowhere.ckpt'"),
        ({"model.init_from": ROOT / "README.md"}, "README.md is not a checkpoint that can be"),
    ],
    ids=str,
)
def test_what_does_not_go_with_the_weights_is_one_line(tune, options, message):
    result = tune(**options)
    assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
    assert message in result.err


def test_a_context_may_change_where_positions_are_computed(tune, train, pretrained):
    assert tune(**{"data.context_length": 24}).run.model.gpt.config.context_length == 24
    learned = checkpoint_of(train(**MODERN, **{"model.position": "learned"}))
    result = tune(**{"data.context_length": 24, "model.init_from": learned})
    assert result.status == 2
    assert "--data.context_length 24: contradicts the weights of" in result.err


def test_tuning_from_python(pretrained, other_text, tmp_path):
    import lightning.pytorch as pl

    data = TextDataModule(str(other_text), context_length=16, cache=str(tmp_path / "c"))
    _, data.given_tokenizer = load_checkpoint(pretrained)
    model = LitGPT(**read_checkpoint(pretrained)["gpt"])
    load_weights(model.gpt, str(pretrained))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=1, limit_val_batches=0, accelerator="cpu", **options)
    trainer.fit(model, datamodule=data)
    weights = load_checkpoint(pretrained)[0].state_dict()
    difference = max((model.gpt.state_dict()[k] - w).abs().max().item() for k, w in weights.items())
    assert 0 < difference < 3e-3  # one step of 1e-3 from them
    wrong = LitGPT(vocab_size=data.vocab_size, context_length=16)
    with pytest.raises(UserError, match="of another shape"):
        load_weights(wrong.gpt, str(pretrained))


@pytest.mark.parametrize("options", [{}, MODERN], ids=["classic", "modern"])
def test_a_checkpoint_from_before_a_field_was_added_goes_on_as_it_would_have(train, options):
    whole = checkpoint_of(train(**options, **{"trainer.max_steps": 6}))
    path = checkpoint_of(train(**options, **{"trainer.max_steps": 4}))
    content = read_checkpoint(path)
    for fields in (content["gpt"], content["hyper_parameters"]):
        for name in ("head_size", "hidden_size", "rotary_base", "smear", "bigram_rows", *RATES):
            fields.pop(name, None)
    assert "head_size" not in content["gpt"]
    torch.save(content, path)
    again = train("--ckpt_path", str(path), **options, **{"trainer.max_steps": 6})
    assert again.status == 0, again.err
    assert "other options" not in again.out
    weights = [read_checkpoint(p)["state_dict"] for p in (whole, checkpoint_of(again))]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    more = options | {"model.hidden_size": 40, "trainer.max_steps": 8}
    refused = train("--ckpt_path", str(path), **more)
    assert "hidden_size was 64 and is now 40" in refused.err
    for name, value in {"table_rate": 3.0, "table_eps": 1e-3}.items():
        more = options | {f"model.{name}": value, "trainer.max_steps": 8}
        refused = train("--ckpt_path", str(path), **more)
        assert refused.status == 2
        assert f"{name} was {RATES[name]} and is now {value}" in refused.err


def test_parts_that_lightning_cannot_restore_are_one_line(train, tmp_path):
    options = {"model.schedule": "linear", "trainer.max_steps": 8}
    content = read_checkpoint(checkpoint_of(train(**options | {"trainer.max_steps": 6})))
    more = options | {"ckpt_path": tmp_path / "odd.ckpt"}
    assert {"loops", "callbacks", "optimizer_states"} <= set(content)
    for change in (
        {"loops": 5},
        {"loops": {}},
        {"optimizer_states": []},
        {"optimizer_states": [{"state": {}, "param_groups": []}]},
        {"callbacks": {"StepLines": {"best": 1}}},
        {"lr_schedulers": [{"last_epoch": "x"}]},
        {"hyper_parameters": []},
        {"corpus": None},
        {"global_step": "many"},
        {"pytorch-lightning_version": "x"},
    ):
        torch.save(content | change, tmp_path / "odd.ckpt")
        result = train(**more)
        assert (result.status, len(result.err.splitlines())) == (2, 1), (change, result.err)
        assert "odd.ckpt" in result.err
    torch.save(content, tmp_path / "odd.ckpt")
    assert train(**more).status == 0


def test_one_process_at_a_time_goes_on_in_a_run(train, text_file, tmp_path):
    """The second is refused while the first trains; afterwards the folder is free again."""
    options = SMALL | {"data.path": text_file, "data.cache": tmp_path / "cache"}
    options |= {"trainer.default_root_dir": tmp_path / "logs", "trainer.max_steps": 100_000}
    words = [sys.executable, "-u", str(ROOT / "scripts" / "train.py")]
    words += [f"--{name}={value}" for name, value in options.items()]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("Step: 2,"):
            break
    refused = train("--ckpt_path=last", **{"trainer.max_steps": 100_000})
    fresh = train()  # a run of its own may start at any time
    process.kill()
    process.communicate()
    assert refused.status == 2
    assert f"another process is using {tmp_path / 'logs' / 'version_0'}" in refused.err
    assert fresh.status == 0, fresh.err
    (tmp_path / "logs" / "version_1").rename(tmp_path / "elsewhere")
    assert train("--ckpt_path=last", **{"trainer.max_time": "00:00:00:01",
                                        "trainer.max_steps": 100_000}).status == 0  # fmt: skip
