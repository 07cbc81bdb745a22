"""The model card: README.md of an exported folder, with what is known about the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lit_gpt.checkpoint import Checkpoint
from lit_gpt.errors import UserError
from lit_gpt.huggingface.architectures import layout_of
from lit_gpt.huggingface.export_check import Findings
from lit_gpt.huggingface.tokenizer import import_transformers
from lit_gpt.model import GPT
from lit_gpt.reports.history import History, perplexity, read_history
from lit_gpt.text.tokenizer import Tokenizer

SHARED_LINES = (  # a name in the card of a run; the second until version 0.1.0
    "Validation lines also in the training text",
    "Lines of the validation text that also stand in the training text",
)
TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- lit_gpt
---

# {title}

A small language model, trained with lit_gpt and exported as {label}.

## Use

```python
{snippet}
```

## Model

{model}

## Training

{training}

## Results

{results}

## Checked at export

Loaded with transformers {transformers} and compared with the model in lit_gpt, in float32, on
{text}:

{findings}

## Limits

- It continues a text in the manner of its training text. It follows no instructions, what it
  writes need not be true, and it may repeat parts of its training text word for word.
- It sees at most {context:,} tokens, prompt and answer together{beyond}.
- A token may be part of a character. lit_gpt never generates half a character; transformers may,
  and then shows U+FFFD.
- This card states no license: whoever publishes the model should choose one, with the training
  text in mind.
"""


def code(text: object) -> str:
    """As code in Markdown, safe in a table."""
    return "`" + re.sub(r"[`|\s]+", " ", str(text)) + "`"


def quoted(text: str) -> str:
    """A Python literal in double quotes, which a shell keeps inside single ones."""
    return json.dumps(text, ensure_ascii=False)


def table(rows: list[tuple[Any, ...]]) -> str:
    """The first row is the heading."""
    heading, *rest = ("| " + " | ".join(map(str, row)) + " |" for row in rows)
    return "\n".join([heading, "|---" * len(rows[0]) + "|", *rest])


def snippet(model: str, prompt: str, length: int) -> str:
    """Python that generates text, up to `length` tokens with the prompt."""
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {quoted(model)}  # the folder, or where you put it
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
prompt = tokenizer({quoted(prompt)}, return_tensors="pt")
output = model.generate(**prompt, max_length={length})
print(tokenizer.decode(output[0], skip_special_tokens=True))"""


def describe_model(model: GPT, tokenizer: Tokenizer) -> str:
    config = model.config
    layout = layout_of(config)
    outer, inner = model.num_parameters()
    tokens = f"{tokenizer.vocab_size:,} tokens ({code(Path(tokenizer.name).name)})"
    if tokenizer.end_of_text is not None:
        tokens += f", {tokenizer.end_of_text} ends a document"
    heads = f"{config.num_heads} heads ({config.num_kv_heads} for keys and values)"
    rows = [
        ("Architecture", f"{layout.label} ({code(layout.architecture)})"),
        ("Parameters", f"{outer + inner:,} (embedding and output {outer:,}, blocks {inner:,})"),
        ("Size", f"{config.num_blocks} blocks of width {config.d_model}, {heads}"),
        ("Context", f"{config.context_length:,} tokens"),
        ("Positions, norm, activation", f"{config.position}, {config.norm}, {config.activation}"),
        ("Output layer", "tied to the embedding" if config.tie_embeddings else "its own"),
        ("Tokenizer", tokens),
    ]
    return table([("", ""), *rows])


def describe_training(checkpoint: Checkpoint) -> str:
    """What a checkpoint says about its run, which may be anything if a stranger made it.

    Shows names of files, but no folders of this machine.
    """
    data = checkpoint.data_hyperparameters
    settings = checkpoint.hyperparameters
    trainer = checkpoint.trainer_settings
    paths = data.get("path")
    names = [Path(str(p)).name for p in (paths if isinstance(paths, list) else [paths]) if p]
    num_tokens = checkpoint.corpus_info.get("num_tokens")
    fraction = data.get("train_fraction")
    init_from = settings.get("init_from")
    step = checkpoint.global_step
    rows: list[tuple[str, Any]] = [("Text", ", ".join(map(code, names)) or "unknown")]
    if isinstance(num_tokens, int):
        rows.append(("Tokens", f"{num_tokens:,}"))
    if isinstance(fraction, float):
        rows.append(("Training split", f"the first {fraction:.0%}; the rest is for validation"))
    if isinstance(init_from, str):
        rows.append(("Started from the weights of", code(Path(init_from).name)))
    rows.append(("Steps", "unknown" if step is None else step))
    for label, value in (
        ("Windows per batch, on each device", data.get("batch_size")),
        ("Batches per step", trainer.get("accumulate_grad_batches")),
        ("Optimizer", settings.get("optimizer")),
        ("Peak learning rate", settings.get("learning_rate")),
        ("Precision", trainer.get("precision")),
    ):
        if isinstance(value, str):
            rows.append((label, code(value)))
        elif isinstance(value, int | float):
            rows.append((label, value))
    return table([("", ""), *rows])


def describe_results(checkpoint: Checkpoint) -> str:
    """What was measured with exactly these weights, from the run's history or the checkpoint."""
    step = checkpoint.global_step
    if step is None:
        return "None are known."
    try:
        history = read_history(checkpoint.path.parent.parent)
    except (UserError, OSError):
        history = History()  # the checkpoint was moved, or the history is damaged
    best = checkpoint.best_evaluation
    losses = dict(history.curves.get("val/loss", []))
    bits = dict(history.curves.get("val/bits_per_byte", [])).get(step)
    loss = losses.get(step, best.get("val") if best.get("step") == step else None)
    rows: list[tuple[str, float, float | None]] = []
    if isinstance(loss, float):
        rows.append(("windows spread evenly over the validation split", loss, bits))
    if history.final and max(losses, default=None) == step:
        scope = f"all {history.final.num_tokens:,} tokens of the validation split"
        rows.append((scope, history.final.loss, history.final.bits_per_byte))
    if not rows:
        return f"None are known for step {step}."
    cells = [
        (scope, f"{loss:.4f}", f"{perplexity(loss):.2f}", f"{bits:.4f}" if bits else "")
        for scope, loss, bits in rows
    ]
    heading = ("", "loss, nats/token", "perplexity", "bits per byte")
    parts = [
        f"At step {step}. Bits per byte can be compared between tokenizers.",
        table([heading, *cells]),
    ]
    for name, value in history.card:
        if name in SHARED_LINES:
            parts.append(f"{SHARED_LINES[0]}: {value}. They make the model look better than it is.")
    return "\n\n".join(parts)


def model_card(
    title: str,
    checkpoint: Checkpoint,
    model: GPT,
    tokenizer: Tokenizer,
    findings: Findings,
    prompt: str,
    is_training_text: bool,
) -> str:
    """README.md: Markdown with a head in YAML.

    Args:
        title: the folder's name.
        checkpoint: which was exported.
        model: built from it.
        tokenizer: the same.
        findings: of the comparison with transformers.
        prompt: of the example.
        is_training_text: whether the comparison used the text that the model was trained on.
    """
    context = model.config.context_length
    label = layout_of(model.config).label
    return TEMPLATE.format(
        title=title,
        label=label,
        snippet=snippet(title, prompt, min(context, 128)),
        model=describe_model(model, tokenizer),
        training=describe_training(checkpoint),
        results=describe_results(checkpoint),
        transformers=import_transformers().__version__,
        text="its training text" if is_training_text else "a text other than its training text",
        findings="\n".join(f"- {line}" for line in findings.lines()),
        context=context,
        beyond=", and has no positions beyond" if label == "GPT-2" else "",
    )
