"""scripts/plan.py: its numbers beside the real thing, what it suggests, that nothing is left."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import run_script
from lit_gpt.command import run as run_command
from lit_gpt.data import TextDataModule
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.planning import plan
from lit_gpt.planning.suggestions import short, suggest_dropout, suggest_model, suggest_steps
from lit_gpt.text.overlap import shared_lines
from tests.conftest import ROOT, SMALL

SAMPLE = ROOT / "data" / "订单商品名称.csv"


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def make_plan(text_file, tmp_path, capfd, monkeypatch):
    """`make_plan("--model.d_model=32", **{"data.path": ...})`: plan.py, in here, at once."""
    monkeypatch.setattr("sys.argv", ["plan.py"])
    monkeypatch.setattr("lit_gpt.planning.dry_run.WARM_UP", 0.02)
    monkeypatch.setattr("lit_gpt.planning.dry_run.MEASURED", 0.1)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    places = {"data.path": text_file, "data.cache": tmp_path / "cache"}

    def run(*args: str, **options: object) -> tuple[int, dict[str, str], str]:
        words = [f"--{name}={value}" for name, value in (places | SMALL | options).items()]
        capfd.readouterr()
        status = run_command(lambda: plan.main([*words, *args]), plan.option_name)
        out, err = capfd.readouterr()
        assert not list((tmp_path / "here").iterdir())  # no logs, no checkpoint
        assert not list((tmp_path / "cache").glob("unfinished-*"))
        return status, dict(line.split(":", 1) for line in out.splitlines() if ":" in line), err

    return run


def number(text: str) -> float:
    return float(re.search(r"[\d,.]*\d", text)[0].replace(",", ""))


def options_in(card: dict[str, str]) -> list[str]:
    return [word for value in card.values() for word in value.split() if word.startswith("--")]


def test_the_numbers_are_the_corpus_s_and_the_model_s(make_plan, text_file, tmp_path):
    status, card, err = make_plan(
        "--model.num_heads=4",
        **{"trainer.max_steps": 30, "trainer.accumulate_grad_batches": 3, "data.batch_size": 5},
    )
    assert (status, err) == (0, "")
    data = TextDataModule(str(text_file), context_length=16, cache=str(tmp_path / "cache"))
    text, info = text_file.read_text(encoding="utf-8"), data.corpus.info
    train, val = data.train_tokens, data.val_tokens
    assert number(card["Text length"]) == len(text)
    assert number(card["Total"]) == info.num_tokens
    assert card["Training"] == f" {len(train):,} tokens, validation: {len(val):,}"
    assert number(card["Bytes per token"]) == round(len(text.encode()) / info.num_tokens, 2)
    assert card["Vocabulary"] == f" {data.vocab_size:,} tokens (cl100k_base, compact)"
    assert card["Full vocabulary"] == " 100,257 tokens"
    gpt = GPT(GPTConfig(data.vocab_size, 16, d_model=16, num_blocks=2, num_heads=4))
    total, table = sum(p.numel() for p in gpt.parameters()), 16 * data.vocab_size
    blocks = total - 2 * table
    shares = f"(embedding {table:,}, blocks {blocks:,}, head {table:,})"
    assert card["Parameters"] == f" {total:,} {shares}"
    assert number(card["Tokens per parameter"]) == float(f"{len(train) / total:.2g}")
    epochs = 30 * 3 * 5 / ((len(train) - 16) // 16)
    assert card["Epochs"] == f" {epochs:.2f} (30 steps of 240 tokens)"
    shared = shared_lines(train, val, data.tokenizer.tokens)
    found = f" {shared.num_shared:,} of {shared.num_lines:,} ("
    name = "Validation lines also in the training text"
    assert card[name].startswith(found)
    assert "start-up" in card["Parts of the time"]
    assert "30 steps" in card["Parts of the time"]
    assert "16 evaluations" in card["Parts of the time"]  # at 0, 2, ..., 30
    assert "30 checkpoints" in card["Parts of the time"]  # the last and the best, but at 0


def test_following_the_steps_reads_the_text_once(make_plan):
    options = {"data.batch_size": 1, "trainer.max_steps": 9}
    _, card, _ = make_plan(**options)
    suggested = options_in(card)
    assert "--model.dropout=0" in suggested
    status, card, _ = make_plan(*suggested, **options)
    assert status == 0
    assert number(card["Epochs"]) == pytest.approx(1, rel=0.05)
    assert options_in(card) == []


def test_nothing_to_change_is_said(make_plan, capfd, tmp_path, text_file):
    _, card, _ = make_plan(**{"data.batch_size": 1, "trainer.max_steps": 300})
    assert not [o for o in options_in(card) if "max_steps" in o or "d_model" in o]
    text_file.write_text("".join(f"{n} times {n + 1}.\n" for n in range(900)), encoding="utf-8")
    words = [f"--{name}={value}" for name, value in SMALL.items()]
    words += [f"--data.path={text_file}", f"--data.cache={tmp_path / 'cache'}"]
    words += ["--model.dropout=0", "--trainer.max_steps=200"]
    assert plan.main(words) == 0
    assert capfd.readouterr().out.endswith("Nothing to change\n")


@pytest.mark.parametrize(
    ("steps", "epochs_a_step", "options"),
    [
        (500, 256 / 368_507, "--trainer.max_steps=1440"),
        (1440, 256 / 368_507, None),
        (5000, 256 / 368_507, None),  # 3.5 times: as good as new
        (900, 0.02, "--trainer.max_steps=800"),  # 18 times: 16
        (1, 0.03, "--trainer.max_steps=34"),
        (1, 3.0, None),
    ],
)
def test_steps(steps, epochs_a_step, options):
    found = suggest_steps(steps, epochs_a_step)
    assert (found and found.options) == (options and (options,))


@pytest.mark.parametrize(
    ("dropout", "epochs", "options"),
    [
        (0.1, 1, "--model.dropout=0"),
        (0.0, 4, None),
        (0.0, 9, "--model.dropout=0.1"),
        (0.2, 9, None),
    ],
)
def test_dropout(dropout, epochs, options):
    found = suggest_dropout(dropout, epochs)
    assert (found and found.options) == (options and (options,))


@pytest.mark.parametrize("style", ["classic", "modern"])
@pytest.mark.parametrize("num_kv_heads", [None, 2, 7])
@pytest.mark.parametrize("tokens", [2_000, 400_000, 50_000_000, 3_000_000_000])
def test_a_suggested_model_fits_better_and_is_allowed(tokens, style, num_kv_heads):
    size = {"d_model": 84, "num_blocks": 6, "num_heads": 14 if num_kv_heads == 7 else 2}
    config = GPTConfig(1246, 128, **size, style=style, num_kv_heads=num_kv_heads)
    found = suggest_model(tokens, config, {"num_kv_heads": num_kv_heads})
    if tokens == 400_000 or num_kv_heads == 7:  # about as many as parameters; nothing suits
        assert found is None
        return
    sizes = dict(re.fullmatch(r"--model\.(\w+)=(\d+)", word).groups() for word in found.options)
    changed = {name: int(value) for name, value in sizes.items()}
    with torch.device("meta"):
        before = sum(GPT(config).num_parameters())
        gpt = GPT(GPTConfig(1246, 128, **changed, style=style, num_kv_heads=num_kv_heads))
    after, target = sum(gpt.num_parameters()), tokens if tokens < 1e6 else tokens / 20
    assert abs(math.log(after / target)) < abs(math.log(before / target))
    assert ("larger" in found.reason) == (after > before) == (tokens > 1e6)
    assert found.reason.endswith(f"{short(after)} parameters instead of {short(before)}")


def test_shapes_that_a_choice_rules_out_are_not_suggested():
    """Of heads of 12 channels 3 would rotate, of 20 five."""
    choices = {"position": "rotary", "rotary_fraction": 0.25}
    found = suggest_model(50_000, GPTConfig(1246, 128, 256, 8, 8, **choices), {})
    assert found.options == ("--model.d_model=16", "--model.num_blocks=1", "--model.num_heads=1")


def test_lines_in_both_splits_are_warned_of(make_plan, tmp_path):
    path = tmp_path / "twice.txt"
    path.write_text("a line that comes back\n" * 300, encoding="utf-8")
    _, card, _ = make_plan(**{"data.path": path})
    assert card["Warning"].startswith(" 100% of the validation lines are in the training text")


def test_a_run_that_goes_on_is_planned_from_its_step(make_plan, train, tmp_path):
    train()
    path = next((tmp_path / "logs").rglob("last.ckpt"))
    before = files_below(tmp_path / "logs")
    status, card, _ = make_plan(
        **{
            "ckpt_path": path,
            "trainer.max_steps": 10,
            "trainer.default_root_dir": tmp_path / "logs",
        }
    )
    assert status == 0
    assert "4 steps" in card["Parts of the time"]
    assert "2 evaluations" in card["Parts of the time"]
    assert options_in(card) == []
    assert files_below(tmp_path / "logs") == before


@pytest.mark.parametrize("batches", [1, 3])
def test_an_epoch_may_end_within_an_accumulation(make_plan, batches):
    options = {"trainer.limit_train_batches": batches, "trainer.accumulate_grad_batches": 2}
    status, card, _ = make_plan(**options)
    assert status == 0
    assert number(card["Time"].split("measured over")[1]) >= 1


def test_a_limit_of_time_is_told(make_plan):
    options = {"trainer.max_steps": 10**9, "trainer.max_time": "00:01:00:00"}
    _, card, _ = make_plan(**options)
    ends = " --trainer.max_time ends training after 1 h 0 min"
    assert card["Stops earlier"] == ends
    _, card, _ = make_plan(**options | {"trainer.max_steps": -1})
    assert card["Stops earlier"] == ends
    assert card["Time"].endswith("no number of steps is planned")
    assert "Epochs" not in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data.path": "nowhere.txt"}, "'nowhere.txt': no such file or folder"),
        ({"model.d_model": 15}, "--model.d_model 15: must be divisible by --model.num_heads (2)"),
        ({"model.dmodel": 16}, "model.dmodel"),
        ({"ckpt_path": "last"}, "--ckpt_path 'last': no run below"),
        ({"trainer.limit_train_batches": 0}, "raise --trainer.limit_train_batches"),
        ({"trainer.fast_dev_run": True}, "--trainer.fast_dev_run: is not a run to plan"),
        ({"model.d_model": 1 << 20, "model.num_heads": 1}, "out of memory"),
    ],
)
def test_wrong_input_is_one_line(make_plan, options, message):
    status, _, err = make_plan(**options)
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_trial_leaves_nothing(number, text_file, tmp_path):
    words = {"data.path": text_file, "data.cache": tmp_path / "cache"}
    command = [sys.executable, "-u", str(ROOT / "scripts" / "plan.py")]
    command += [f"--{name}={value}" for name, value in (words | SMALL).items()]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    (tmp_path / "here").mkdir()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path / "here", env=env, **pipes)
    try:
        while not process.stdout.readline().startswith("Device"):
            assert process.poll() is None
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (128 + number, "")
    assert not list((tmp_path / "here").iterdir())
    assert not list((tmp_path / "cache").glob("unfinished-*"))


LARGER = pytest.param(["--model.d_model=384"], marks=pytest.mark.slow)


@pytest.mark.parametrize("size", [[], LARGER])
def test_the_memory_is_that_of_a_real_run(size, tmp_path, monkeypatch):
    """Whole processes: the default job, and a model of 12 M parameters."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    places = [f"--data.cache={tmp_path / 'cache'}", f"--trainer.default_root_dir={tmp_path / 'r'}"]
    words = [f"--data.path={SAMPLE}", "--trainer.accelerator=cpu", *places, *size]
    words += ["--trainer.max_steps=3", "--trainer.limit_val_batches=2", "--samples.num_tokens=4"]
    planned = run_script("scripts/plan.py", "--json", *words).result()["memory_bytes"]
    assert not (tmp_path / "r").exists()
    real_mb = run_script("scripts/train.py", *words).peak_mb
    assert planned / 1e6 == pytest.approx(real_mb, rel=0.25)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (1.54, "1.5 s"),
        (45, "45 s"),
        (130, "2 min 10 s"),
        (12_000, "3 h 20 min"),
    ],
)
def test_durations_have_one_or_two_units(seconds, text):
    assert plan.duration(seconds) == text
