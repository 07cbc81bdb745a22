"""Runs on conversations: what they print, what their losses are, accumulation, exact resume."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lit_gpt.checkpoint import Checkpoint
from lit_gpt.data import read_windows
from lit_gpt.text.packing import Packs
from tests.chats import CHATML, turns, write_chats, write_rows

T = 40
CHAT = {"data.tokenizer": "bytes", "data.context_length": T, "data.batch_size": 2}


@pytest.fixture
def chats(tmp_path):
    return {"data.path": write_chats(tmp_path / "x.jsonl")}


class Losses(Callback):
    """Of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, i) -> None:
        if (i + 1) % trainer.accumulate_grad_batches == 0:
            self.losses.append(pl_module.train_loss.item())


def mean_nats(model: torch.nn.Module, packs: Packs) -> tuple[float, int]:
    """Over the tokens that count, window by window."""
    total, number = 0.0, 0
    for i in range(len(packs)):
        ids, is_counted = (torch.from_numpy(x[0]) for x in packs.windows(np.array([i])))
        with torch.inference_mode():
            log_probabilities = model(ids[None, :-1])[0].double().log_softmax(-1)
        nats = -log_probabilities.gather(1, ids[1:, None])[:, 0]
        total += nats[is_counted[1:]].sum().item()
        number += int(is_counted[1:].sum())
    return total / number, number


def test_what_a_run_on_conversations_prints(train, chats):
    result = train(**chats, **CHAT)
    assert (result.status, result.err) == (0, "")
    data = result.run.data
    train_packs, packs = data.windows["train"], data.windows["val"]
    assert "Documents: 60\n" in result.out
    full = 100 * train_packs.num_tokens / len(train_packs) / (T + 1)
    assert (
        f"Training conversations: 54 in {len(train_packs)} windows, {full:.1f}% full, "
        f"{train_packs.num_counted} tokens to learn; "
        f"{train_packs.num_truncated} truncated to 41 tokens\n"
    ) in result.out
    assert train_packs.num_truncated > 0
    assert "Validation conversations: 6 in " in result.out
    assert "Validation conversations also in the training text: " in result.out
    assert "Validation lines" not in result.out
    assert "from frequencies alone" not in result.out
    model, _ = Checkpoint.read(result.run.last.dirpath + "/last.ckpt").build()
    loss, number = mean_nats(model, packs)
    assert re.search(
        r"Chat with it: .*generate.* --ckpt_path .*ckpt --chat --interactive\n", result.out
    )
    assert f"Final validation loss: {loss:.4f} nats/token over all {number} tokens" in result.out
    sample = re.search(r"Sample: (.*)", result.out)
    assert sample[1].startswith("User: / Count to ")
    assert " / Assistant:" in sample[1]


def test_conversations_in_both_splits_are_counted(train, tmp_path):
    rows = [{"messages": turns(f"{i}", f"{i}")} for i in (*range(18), 5, 30)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    result = train(**CHAT, **{"data.path": path, "trainer.max_steps": 1})
    assert result.status == 0, result.err
    line = "Validation conversations also in the training text: 1 of 2 (50.0%)"
    assert line in result.out


def test_all_tokens_count_where_asked(train, chats):
    result = train(**chats, **CHAT, **{"data.loss_on": "all", "trainer.max_steps": 1})
    assert result.status == 0, result.err
    packs = result.run.data.windows["val"]
    assert packs.num_counted == packs.num_tokens - packs.num_conversations


def test_accumulated_batches_are_one_large_batch(train, chats):
    """They have unequal numbers of answers: the mean of their means is another loss."""
    found = []
    for size, parts in ((6, 1), (2, 3), (1, 6)):
        losses = Losses()
        options = {"data.batch_size": size, "trainer.accumulate_grad_batches": parts}
        options["model.dropout"] = 0.0
        result = train(**chats, **{**CHAT, **options}, callbacks=[losses])
        assert result.status == 0, result.err
        found.append(losses.losses)
    assert len(found[0]) == 6
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_exact_resume(train, chats, order):
    options = {**chats, **CHAT, "data.order": order, "trainer.accumulate_grad_batches": 2}
    whole = Losses()
    assert train(**options, callbacks=[whole]).status == 0
    first, second = Losses(), Losses()
    assert train(**options, **{"trainer.max_steps": 3}, callbacks=[first]).status == 0
    resumed = train(**options, ckpt_path="last", callbacks=[second])
    assert (resumed.status, resumed.err) == (0, "")
    assert first.losses + second.losses == whole.losses


def test_a_resumed_run_learns_the_same_tokens(train, chats):
    """Without `loss_on`, those of answers."""
    options = {**chats, **CHAT, "trainer.max_steps": 2}
    assert train(**options).status == 0
    more = {**options, "trainer.max_steps": 3, "ckpt_path": "last"}
    refused = train(**more, **{"data.loss_on": "all"})
    assert refused.status == 2
    assert "does not fit the options: loss_on was answers and is now all" in refused.err
    resumed = train(**more, **{"data.loss_on": "answers"})
    assert (resumed.status, resumed.err) == (0, "")
    assert "different options" not in resumed.out


def test_validation_by_another_text(train, chats, tmp_path):
    """Of conversations or of plain text."""
    (tmp_path / "plain.txt").write_text("The cat sat on the mat.\n" * 10)
    for name in ("plain.txt", "val.jsonl"):
        path = tmp_path / name
        if name == "val.jsonl":
            write_rows(path, [{"messages": turns("Count to 3", "1 2 3")}])
        result = train(**chats, **CHAT, **{"data.val_path": path, "trainer.max_steps": 2})
        assert (result.status, result.err) == (0, "")
        assert ("Validation conversations: 1 in 1 windows" in result.out) == (name != "plain.txt")
        assert "Training conversations: 60 in " in result.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data.loss_on": "answer"}, "data.loss_on"),
        ({"data.loss_on": "answers", "data.text_field": "id"}, "there are no conversations"),
        ({"budget": "1m"}, "--budget: chooses for plain text, and this text holds conversations"),
        ({"data.context_length": 8}, "--data.context_length 8: no conversation of the training"),
    ],
)
def test_what_is_refused(train, tmp_path, options, message):
    rows = [{"id": "a", "messages": turns("a", "b")}] * 20
    path = write_rows(tmp_path / "x.jsonl", rows)
    result = train(**{**CHAT, "data.path": path, **options})
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_a_token_store_holds_no_conversations(tmp_path, capsys):
    from lit_gpt.__main__ import main

    path = write_chats(tmp_path / "x.jsonl")
    assert main(["prepare", f"--data.path={path}", f"--out={tmp_path / 'store'}"]) == 2
    err = capsys.readouterr().err
    assert "--data.path: holds conversations, which a token store would cut" in err


def test_the_evaluate_command_predicts_the_answers(train, chats, tmp_path, capfd):
    from lit_gpt.__main__ import main

    result = train(**chats, **CHAT)
    checkpoint = result.run.last.dirpath + "/last.ckpt"
    other = write_rows(tmp_path / "y.jsonl", [{"messages": turns("Count to 3", "1 2 3")}] * 3)
    options = [f"--data.path={other}", f"--data.cache={tmp_path / 'cache'}", "--json"]
    assert main(["evaluate", f"--ckpt_path={checkpoint}", "--accelerator=cpu", *options]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["results"]["model"]["num_tokens"] == 18
    assert list(found["results"]) == ["model"]
    assert found["conversations"].startswith("3 in 3 windows")


def test_two_devices_have_the_losses_of_one(train, start, chats, tmp_path):
    """Each has another number of answers in each batch."""
    found = []
    options = {**chats, **CHAT, "model.dropout": 0.0, "trainer.accumulate_grad_batches": 2}
    options |= {"trainer.limit_val_batches": 1.0, "samples.num_tokens": 0}
    for devices in (1, 2):
        folder = tmp_path / f"on {devices}"
        options |= {"trainer.default_root_dir": folder, "data.batch_size": 4 // devices}
        if devices == 1:
            assert train(**options).status == 0
        else:
            more = {"trainer.devices": 2, "trainer.strategy": "ddp"}
            status, _, err = start(**options, **more).end()
            assert status == 0, err
        found.append(json.loads((folder / "version_0" / "history.json").read_text("utf-8")))
    one, two = found
    for name in ("train/loss", "train/eval_loss", "val/loss", "val/bits_per_byte"):
        values = [[value for _, value in history["curves"][name]] for history in found]
        assert len(values[0]) > 3
        assert values[1] == pytest.approx(values[0], rel=1e-4)
    assert two["final"]["loss"] == pytest.approx(one["final"]["loss"], rel=1e-4)
    assert two["final"]["num_tokens"] == one["final"]["num_tokens"]


def test_a_chat_model_is_tuned_by_its_own_template(train, chats, tmp_path):
    pytest.importorskip("transformers")
    from lit_gpt.__main__ import main
    from tests.huggingface.folders import make_model, make_tokenizer

    folder = tmp_path / "model"
    make_model("qwen3").save_pretrained(folder)
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    result = train(
        **chats,
        **{"model.init_from": folder, "data.context_length": T, "trainer.max_steps": 2},
        defaults={**places_of(tmp_path), "trainer.accelerator": "cpu"},
    )
    assert (result.status, result.err) == (0, "")
    data = result.run.data
    last = np.array([len(data.windows["val"]) - 1])  # the first ones are truncated
    (row,) = data.windows["val"].windows(last)[0]
    ours = data.tokenizer
    start, end = (ours.special[name] for name in ("<|im_start|>", "<|im_end|>"))
    user = [start, *ours.encode("user\nCount to ").tolist()]
    assert row[: len(user)].tolist() == user
    _, y = read_windows(data.windows["val"], last, T)
    assert end in y
    assert start not in y
    checkpoint = result.run.last.dirpath + "/last.ckpt"
    out = f"--out={tmp_path / 'exported'}"
    assert main(["export", f"--ckpt_path={checkpoint}", out]) == 0


def places_of(tmp_path):
    return {"data.cache": tmp_path / "cache", "trainer.default_root_dir": tmp_path / "logs"}
