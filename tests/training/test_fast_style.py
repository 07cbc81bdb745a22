"""Runs of the fast style: resumed, tuned, compiled, and all that reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from lit_gpt.__main__ import main
from lit_gpt.checkpoint import Checkpoint, load_checkpoint, read_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.training import budget
from lit_gpt.training.lr_finder import range_test
from lit_gpt.training.train import build_run
from tests.conftest import ROOT, SMALL, command_line

FAST = {"model.style": "fast", "model.bigram_rows": 500, "model.spelling_rows": 300}
FAST |= {"model.output_spelling_rows": 200, "model.softmax_cutoff": 0.5}
RATES = {"model.table_rate": 3.0, "model.table_eps": 1e-3, "model.learning_rate": 6e-3}
MUON = {"model.optimizer": "muon", "model.schedule": "linear", "data.order": "shuffled"}
ALL = FAST | RATES | MUON


def checkpoint_of(result, name: str = "last") -> Path:
    return Path(result.run.trainer.log_dir) / "checkpoints" / f"{name}.ckpt"


def weights_of(result) -> dict[str, torch.Tensor]:
    return read_checkpoint(checkpoint_of(result))["state_dict"]


@pytest.fixture
def fast(train):
    """`fast(**options)`: a run of the fast style that ends well."""

    def run(*args, **options):
        result = train(*args, **ALL | options)
        assert (result.status, result.err) == (0, "")
        return result

    return run


def test_the_configuration_trains_the_fast_style(train):
    result = train(f"--config={ROOT / 'configs' / 'fast.yaml'}")
    assert (result.status, result.err) == (0, "")
    config = result.run.model.gpt.config
    assert (config.style, config.smear, config.bigram_rows) == ("fast", True, 0)
    assert (config.spelling_rows, config.output_spelling_rows) == (4096, 4096)
    assert config.softmax_cutoff == 0.35
    groups = result.run.trainer.optimizers[0].param_groups
    initial = [group["initial_lr"] for group in groups]
    assert initial == pytest.approx([6e-3, 6e-3, 18e-3, 6e-3])  # tables three times as fast
    assert [group["eps"] for group in groups[1:]] == [1e-8, 1e-4, 1e-8]


def test_every_part_of_the_pairs_learns(fast):
    before = fast(**{"trainer.max_steps": 1})
    start = weights_of(before)
    end = weights_of(fast())
    for name in (
        "gpt.pairs.share",
        "gpt.pairs.table.weight",
        "gpt.embedding.parts.weight",
        "gpt.head.others",
        "gpt.head.parts.weight",
    ):
        assert not torch.equal(start[name], end[name]), name
    assert (start["gpt.pairs.share"] - 0.3).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.smear", False),
        ("model.bigram_rows", 0),
        ("model.bigram_rows", 501),
        ("model.spelling_rows", 0),
        ("model.spelling_rows", 301),
        ("model.output_spelling_rows", 0),
        ("model.output_spelling_rows", 201),
        ("model.softmax_cutoff", 0.0),
        ("model.softmax_cutoff", 0.7),
        ("model.table_rate", 1.0),
        ("model.table_eps", 1e-8),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_option_changes_the_run(fast, name, value, optimizer):
    plain, changed = (
        fast(**{"model.optimizer": optimizer, **more}).steps for more in ({}, {name: value})
    )
    assert plain != changed


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_same_run_twice_is_the_same_bit_for_bit(fast, optimizer, precision):
    """Resumed ones are in tests/callbacks/test_exact_resume.py."""
    options = {"model.optimizer": optimizer, "model.dropout": 0.2, "trainer.deterministic": True}
    options |= {"trainer.precision": precision, "trainer.accumulate_grad_batches": 2}
    first, second = (weights_of(fast(**options)) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.table_rate": 2.0}, "table_rate was 3.0 and is now 2.0"),
        ({"model.table_eps": 1e-8}, "table_eps was 0.001 and is now 1e-08"),
        ({"model.bigram_rows": 400}, "bigram_rows was 500 and is now 400"),
        ({"model.spelling_rows": 0}, "spelling_rows was 300 and is now 0"),
        ({"model.output_spelling_rows": 0}, "output_spelling_rows was 200 and is now 0"),
        ({"model.softmax_cutoff": 0.0}, "softmax_cutoff was 0.5 and is now 0.0"),
        ({"model.smear": False}, "smear was True and is now False"),
        ({"model.style": "modern"}, "tie_embeddings was False and is now True, smear was True and"),
    ],
)
def test_a_run_does_not_continue_as_another(fast, train, options, message):
    fast()
    result = train("--ckpt_path=last", **ALL | {"trainer.max_steps": 8} | options)
    assert (result.status, len(result.err.splitlines())) == (2, 1)
    assert message in result.err


def test_a_run_from_fast_weights_has_their_style(fast, train, places):
    pretrained = checkpoint_of(fast())
    plain = {name: value for name, value in SMALL.items() if not name.startswith("model.")}
    rate = {"model.init_from": pretrained, "model.learning_rate": 1e-9, "trainer.max_steps": 1}
    result = train(defaults=places | plain, **rate)
    assert (result.status, result.err) == (0, "")
    config = result.run.model.gpt.config
    assert (config.style, config.smear, config.bigram_rows) == ("fast", True, 500)
    before, after = load_checkpoint(pretrained)[0].state_dict(), weights_of(result)
    for name, weight in before.items():
        torch.testing.assert_close(after[f"gpt.{name}"], weight, rtol=0, atol=1e-6)
    refused = train(defaults=places | plain, **rate | {"model.bigram_rows": 400})
    assert refused.status == 2
    assert "--model.bigram_rows 400: contradicts the weights of" in refused.err


def test_compiled_blocks_train_the_same(fast, monkeypatch):
    """The pairs are outside the blocks, which have the graph of the modern style."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode: compile(self, backend=backend)
    )
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    # No other lengths than the windows', of samples or of the final evaluation.
    more = {"samples.num_tokens": 0, "final.max_tokens": 0}
    plain, compiled = fast(**more), fast(**more, **{"model.compile": True})
    assert compiled.steps == plain.steps
    assert weights_of(compiled).keys() == weights_of(plain).keys()
    assert len(graphs) == 2  # of training and of evaluation
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_range_test_keeps_the_tables_at_their_multiple(places, tmp_path, optimizer):
    rates = []

    def note(optimizer, *args) -> None:
        rates.append({group["lr"] for group in optimizer.param_groups if group["params"]})

    argv = command_line(SMALL | places | ALL | {"model.optimizer": optimizer})
    run = build_run(argv, scratch=tmp_path)
    hook = register_optimizer_step_post_hook(note)
    try:
        tried, _ = range_test(run)
    finally:
        hook.remove()
    whole = [sorted(found) for found in rates if len(found) == 2]  # not of Muon alone
    assert len(whole) >= len(tried) - 1
    assert whole[0] == pytest.approx([1e-6, 3e-6])
    assert all(tables == pytest.approx(3 * rate) for rate, tables in whole)


def test_the_card_names_the_pairs(fast):
    result = fast()
    gpt = result.run.model.gpt
    blocks = sum(p.numel() for p in gpt.blocks.parameters()) + 16
    tables = (2 * gpt.config.vocab_size + 300 + 500 + 200 + 1 + 1) * 16
    parts = f"(embedding, pairs and output {tables:,}, blocks {blocks:,})"
    assert f"Parameters: {tables + blocks:,} {parts}\n" in result.out


def test_a_plan_counts_the_pairs(places, capsys):
    assert main(["plan", *command_line(SMALL | places | ALL)]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("Parameters: "))
    assert ", pairs 8,016, blocks " in line  # 500 rows and a share, of 16
    numbers = [int(n) for n in re.findall(r"\d+", line.replace(",", ""))]
    assert numbers[0] == sum(numbers[1:])


def test_a_budget_keeps_what_is_given_of_the_pairs(train, monkeypatch):
    found = {}

    def plan(*args, fixed, **options):
        found.update(fixed)
        raise UserError("far enough")

    monkeypatch.setattr(budget, "plan_budget", plan)
    train("--budget=1m", **{"model.style": "fast", "model.smear": False, "model.bigram_rows": 7})
    assert (found["style"], found["smear"], found["bigram_rows"]) == ("fast", False, 7)


def test_all_commands_take_it(fast, places, capfd):
    """generate, evaluate and report; serve completes texts as generate does."""
    result = fast()
    path, text = checkpoint_of(result), places["data.path"]
    options = {"ckpt_path": path, "data.path": text, "data.cache": places["data.cache"]}
    capfd.readouterr()
    assert main(["generate", f"--ckpt_path={path}", "--prompt=the", "--max_new_tokens=40"]) == 0
    assert capfd.readouterr().out.startswith("the")
    assert main(["evaluate", *command_line(options | {"accelerator": "cpu"}), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["results"]["model"]
    model, tokenizer = load_checkpoint(path)
    tokens = torch.from_numpy(tokenizer.encode(text.read_text("utf-8")).astype("int64"))
    assert found["num_tokens"] == len(tokens) - 1
    windows = tokens[: len(tokens) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        logits = model(windows[:, :-1]).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())
    assert found["loss"] == pytest.approx(loss.item(), abs=0.1)  # of other windows
    assert main(["report", str(path.parent.parent)]) == 0
    assert Checkpoint.read(path).hyperparameters["table_rate"] == 3.0
