"""Owns the model card: README.md of an exported folder, with what is known of the model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.huggingface.architectures import layout_of
from lit_gpt.huggingface.export_check import Findings
from lit_gpt.huggingface.tokenizer import import_transformers
from lit_gpt.model import GPT
from lit_gpt.reports.history import read_history
from lit_gpt.text.tokenizer import Tokenizer

SHARED = "Lines of the validation text that also stand in the training text"  # in a run's card
TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- lit_gpt
---

# {title}

A small language model, trained from text with lit_gpt and exported as {label}.

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

## Checked at the export

Loaded with transformers {transformers} and compared with the model in lit_gpt, in float32, on
{text}:

{findings}

## Limits

- It goes on with a text in the manner of what it was trained on. It follows no instructions, and
  what it writes need not be true; it may repeat what stood in its training text, word for word.
- It sees at most {context:,} tokens, prompt and answer together{beyond}.
- Tokens may be parts of a character. lit_gpt's own generate.py never writes half a character;
  transformers may, and then shows U+FFFD.
- No licence is stated here: whoever publishes it should state one, with the text in mind.
"""


def dig(content: Any, *names: str) -> Any:
    """A part of nested dicts; None where it isn't there."""
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def code(text: str) -> str:
    """As code in Markdown, in a table too."""
    return "`" + re.sub(r"[`|\s]+", " ", text) + "`"


def quoted(text: str) -> str:
    """As a string of Python's, in double quotes: a shell leaves it alone between single ones."""
    return json.dumps(text, ensure_ascii=False)


def table(rows: list[tuple]) -> str:
    """The first row is the heading."""
    first, *rest = ("| " + " | ".join(map(str, row)) + " |" for row in rows)
    return "\n".join([first, "|---" * len(rows[0]) + "|", *rest])


def snippet(model: str, prompt: str, length: int) -> str:
    """Python that lets it write, up to `length` tokens with the prompt."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"name = {quoted(model)}  # the folder, or where you put it\n"
        "tokenizer = AutoTokenizer.from_pretrained(name)\n"
        "model = AutoModelForCausalLM.from_pretrained(name)\n"
        f'prompt = tokenizer({quoted(prompt)}, return_tensors="pt")\n'
        f"written = model.generate(**prompt, max_length={length})\n"
        "print(tokenizer.decode(written[0], skip_special_tokens=True))"
    )


def describe_model(model: GPT, tokenizer: Tokenizer) -> str:
    c, layout, (outer, inner) = model.config, layout_of(model.config), model.num_parameters()
    tokens = f"{tokenizer.vocab_size:,} tokens ({code(Path(tokenizer.name).name)})"
    if tokenizer.end_of_text is not None:
        tokens += f", {tokenizer.end_of_text} ends a document"
    heads = f"{c.num_heads} heads ({c.num_kv_heads} of keys and values)"
    rows = [
        ("Architecture", f"{layout.label} ({code(layout.architecture)})"),
        ("Parameters", f"{outer + inner:,} (embedding and output {outer:,}, the rest {inner:,})"),
        ("Size", f"{c.num_blocks} blocks of width {c.d_model}, {heads}"),
        ("Context", f"{c.context_length:,} tokens"),
        ("Positions, norm, activation", f"{c.position}, {c.norm}, {c.activation}"),
        ("Output layer", "the embedding table" if c.tie_embeddings else "its own"),
        ("Tokenizer", tokens),
    ]
    return table([("", ""), *rows])


def step_of(content: dict[str, Any]) -> int | str:
    step = content.get("global_step")
    return step if isinstance(step, int) else "not known"


def describe_training(content: dict[str, Any]) -> str:
    """Names of files only: no folders of the machine."""
    paths = dig(content, "datamodule_hyper_parameters", "path")
    names = [Path(str(p)).name for p in (paths if isinstance(paths, list) else [paths]) if p]
    rows = [("Text", ", ".join(map(code, names)) or "not known")]
    if isinstance(num_tokens := dig(content, "corpus", "num_tokens"), int):
        rows.append(("Tokens", f"{num_tokens:,}"))
    share = dig(content, "datamodule_hyper_parameters", "train_fraction")
    if isinstance(share, float):
        rows.append(("Training split", f"the first {share:.0%}; the rest validates"))
    if isinstance(source := dig(content, "hyper_parameters", "init_from"), str):
        rows.append(("Started from the weights of", code(Path(source).name)))
    rows.append(("Steps", step_of(content)))
    for group, name, label in (
        ("datamodule_hyper_parameters", "batch_size", "Windows a step, on each device"),
        ("trainer", "accumulate_grad_batches", "Batches a step"),
        ("hyper_parameters", "optimizer", "Optimizer"),
        ("hyper_parameters", "learning_rate", "Learning rate, at its peak"),
        ("trainer", "precision", "Precision"),
    ):
        if isinstance(value := dig(content, group, name), int | float | str):
            rows.append((label, code(str(value)) if isinstance(value, str) else value))
    return table([("", ""), *rows])


def describe_results(content: dict[str, Any], path: Path) -> str:
    """What was measured with these very weights, by its run's history or by the checkpoint.

    Args:
        content: what the file at `path` holds.
    """
    step, rows, shared = step_of(content), [], None
    best = dig(content, "callbacks", "StepLines", "best")
    loss = dig(best, "val") if dig(best, "step") == step else None
    bits = None
    try:
        history = read_history(path.parent.parent)
        losses = dict(history.curves.get("val/loss", []))
        loss, shared = losses.get(step, loss), dict(history.card).get(SHARED)
        bits = dict(history.curves.get("val/bits_per_byte", [])).get(step)
        if history.final and max(losses, default=None) == step:
            where = f"all {history.final['num_tokens']:,.0f} tokens of the validation split"
            rows.append((where, history.final["loss"], history.final["bits_per_byte"]))
    except (UserError, OSError):
        pass  # none beside it
    if isinstance(loss, float):
        rows.insert(0, ("windows spread evenly over the validation split", loss, bits))
    if not rows:
        return f"None are known of step {step}."
    head = ("", "loss, nats a token", "perplexity", "bits a byte")
    shown = [
        (where, f"{loss:.4f}", f"{math.exp(min(loss, 700)):.2f}", f"{bits:.4f}" if bits else "")
        for where, loss, bits in rows
    ]
    lines = f"\n\n{SHARED}: {shared}. They make the model look better than it is." if shared else ""
    return f"Of step {step}. Bits a byte can be compared between tokenizers.\n\n" + (
        table([head, *shown]) + lines
    )


def describe_findings(findings: Findings) -> list[str]:
    """A line for each comparison."""
    f = findings
    end = ", then two tokens are equally likely" if f.tie else ""
    return [
        f"Tokens: {f.num_tokens:,} identical",
        f"Logits on {f.num_windows} windows of {f.window_length} tokens: largest difference "
        f"{f.difference:.1e}, below {f.allowed:.0e}",
        f"Greedy text: {f.num_greedy} tokens identical{end}",
    ]


def model_card(
    title: str,
    path: Path,
    content: dict[str, Any],
    model: GPT,
    tokenizer: Tokenizer,
    findings: Findings,
    prompt: str,
    is_training_text: bool,
) -> str:
    """README.md, in Markdown with a head in YAML."""
    context, label = model.config.context_length, layout_of(model.config).label
    return TEMPLATE.format(
        title=title,
        label=label,
        snippet=snippet(title, prompt, min(context, 128)),
        model=describe_model(model, tokenizer),
        training=describe_training(content),
        results=describe_results(content, path),
        transformers=import_transformers().__version__,
        text="the text that it was trained on" if is_training_text else "another text than its own",
        findings="\n".join(f"- {line}" for line in describe_findings(findings)),
        context=context,
        beyond=", and has no positions beyond" if label == "GPT-2" else "",
    )
