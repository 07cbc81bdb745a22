"""The loss on answers is TRL's: the same ids, the same targets, the same mean and gradient."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lit_gpt.data import read_windows
from lit_gpt.huggingface.architectures import gpt_weights
from lit_gpt.huggingface.config import gpt_config
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.module import next_token_loss
from lit_gpt.text.answers import find_answers, is_start
from lit_gpt.text.chat import ChatTemplate
from lit_gpt.text.conversations import Conversation
from lit_gpt.text.corpus import load_corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.packing import Packs
from lit_gpt.text.vocabularies import Vocabulary
from tests.chats import CHATML, GENERATION, chat_tokenizer, their_tokenizer, turns, write_rows

trl = pytest.importorskip("trl")
pytest.importorskip("datasets")

T = 160
CHATS = [
    turns("Was ist 2 + 2? 猫", "Vier."),
    turns("Hi", "Hello, what can I do for you?", "Count to five", "1 2 3 4 5"),
    [{"role": "system", "content": "Be short."}, *turns("Who?", "Me")],
]
PAIRS = [{"prompt": x[:-1], "completion": x[-1:]} for x in CHATS]
TEXTS = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "A", "completion": " longer one"}]
KINDS = {
    "messages": (GENERATION, [{"messages": x} for x in CHATS], {"assistant_only_loss": True}),
    "pairs": (CHATML, PAIRS, {"completion_only_loss": True}),
    "texts": (CHATML, TEXTS, {"completion_only_loss": True}),
    "all": (CHATML, [{"messages": x} for x in CHATS], {}),
}


ENDS = {  # how answers begin and end by the templates of models that people have
    "qwen2_5": (["", "<|im_end|>\n"], ["", "<|im_end|>\n"]),
    "qwen3": (["", "<|im_end|>\n"], ["<think>\n\n</think>\n\n", "<|im_end|>\n"]),
    "llama3_2": (["", "<|eot_id|>"], ["", "<|eot_id|>"]),
    "gemma3": (["", "<end_of_turn>\n"], ["", "<end_of_turn>\n"]),
}


@pytest.mark.parametrize("name", ENDS)
def test_answers_by_the_templates_that_trl_brings(name):
    folder = Path(trl.__file__).parent / "chat_templates"
    if not (folder / f"{name}.jinja").exists():
        pytest.skip("another version of TRL")
    template = ChatTemplate((folder / f"{name}.jinja").read_text(), {"bos_token": "<s>"})
    conversation = Conversation("", tuple(turns("Hi", "Hello", "Who?", "Me")))
    text, spans = find_answers(conversation, template)
    answers = [answer.join(ends) for answer, ends in zip(("Hello", "Me"), ENDS[name], strict=True)]
    assert [text[start:end] for start, end in spans] == answers


def their_trainer(folder, template, rows, options):
    from datasets import Dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 56, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 259}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, max_position_embeddings=T))
    args = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=len(rows), report_to="none",
        max_length=T, use_cpu=True, bf16=False, gradient_checkpointing=False, **options,
    )  # fmt: skip
    tokenizer = their_tokenizer(template)
    data = Dataset.from_list(rows)
    return SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_trl(kind, tmp_path):
    template, rows, options = KINDS[kind]
    trainer = their_trainer(tmp_path / "trl", template, rows, options)
    theirs = trainer.model.eval()
    (batch,) = trainer.get_train_dataloader()
    number = (batch["labels"][:, 1:] != -100).sum()
    assert 0 < number < batch["labels"].numel()
    their_loss = trainer.compute_loss(theirs, dict(batch), num_items_in_batch=number)
    their_loss.backward()

    data_path = write_rows(tmp_path / "x.jsonl", rows)
    text = TextFiles(
        str(data_path), cache=str(tmp_path / "cache"), loss_on="all" if kind == "all" else None
    )
    corpus = load_corpus(text, Vocabulary(chat_tokenizer(template)))
    starts = np.flatnonzero(is_start(corpus.flags))
    alone = []  # as TRL has them here
    for a, b in pairwise([*starts, len(corpus.tokens)]):
        packs = Packs(corpus.tokens[a:b], corpus.flags[a:b], T + 1, padding=258)
        alone.append(read_windows(packs, np.array([0]), T))
    x, y = map(torch.cat, zip(*alone, strict=True))
    more = (0, T + 1 - batch["labels"].size(1))
    their_x = F.pad(batch["input_ids"], more, value=258)[:, :-1]
    their_y = F.pad(batch["labels"], more, value=-100)[:, 1:]
    order = [next(i for i in range(len(x)) if torch.equal(x[i], row)) for row in their_x]
    assert sorted(order) == list(range(len(rows)))
    assert torch.equal(y[order], their_y)

    fields = gpt_config(theirs.config.to_dict()) | {"context_length": T, "dropout": 0.0}
    model = GPT(GPTConfig(**fields))
    model.load_state_dict(gpt_weights(theirs.state_dict(), model.config))
    loss = next_token_loss(model, x, y)
    loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    their_gradient = theirs.get_input_embeddings().weight.grad
    assert torch.allclose(model.embedding.weight.grad, their_gradient, atol=1e-5)
    assert their_gradient.abs().max() > 1e-3
