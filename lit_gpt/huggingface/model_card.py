"""The model card: README.md of an exported folder, with what is known about the model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jinja2

from lit_gpt.checkpoint import Checkpoint
from lit_gpt.errors import UserError
from lit_gpt.huggingface.architectures import layout_of
from lit_gpt.huggingface.tokenizer import import_transformers
from lit_gpt.model import GPT
from lit_gpt.reports.history import History, perplexity, read_history
from lit_gpt.text.tokenizer import Tokenizer

TEMPLATE = Path(__file__).parent / "templates" / "README.md.jinja"
SHARED_LINES = (  # a name in the card of a run; the second until version 0.1.0
    "Validation lines also in the training text",
    "Lines of the validation text that also stand in the training text",
)


def code(text: object) -> str:
    """A text as Markdown code, safe in a table."""
    return "`" + re.sub(r"[`|\s]+", " ", str(text)) + "`"


def file_name(path: object) -> str:
    """A path's last part as code: a card shows no folders of this machine."""
    return code(Path(str(path)).name)


def quoted(text: str) -> str:
    """A Python literal in double quotes, which a shell keeps inside single ones."""
    return json.dumps(text, ensure_ascii=False)


def read_run(checkpoint: Checkpoint) -> History:
    """The history of the checkpoint's run; empty if it was moved, or the history is damaged."""
    try:
        return read_history(checkpoint.path.parent.parent)
    except (UserError, OSError):
        return History()


def results(checkpoint: Checkpoint, history: History) -> list[tuple[str, float, float | None]]:
    """The measurements of exactly these weights: on what, nats/token, bits per byte."""
    step = checkpoint.global_step
    best = checkpoint.best_evaluation
    losses = dict(history.curves.get("val/loss", []))
    bits = dict(history.curves.get("val/bits_per_byte", []))
    rows: list[tuple[str, float, float | None]] = []
    if step is None:
        return rows
    loss = losses.get(step, best.get("val") if best.get("step") == step else None)
    if isinstance(loss, float):
        scope = "windows spread evenly over the validation split"
        rows.append((scope, loss, bits.get(step)))
    if history.final and max(losses, default=None) == step:
        scope = f"all {history.final.num_tokens:,} tokens of the validation split"
        rows.append((scope, history.final.loss, history.final.bits_per_byte))
    return rows


def model_card(
    title: str,
    checkpoint: Checkpoint,
    model: GPT,
    tokenizer: Tokenizer,
    findings: list[str],
    prompt: str,
    is_training_text: bool,
) -> str:
    """README.md: Markdown with a head in YAML.

    Args:
        title: the folder's name.
        checkpoint: the one exported; a stranger's may hold values of any type.
        model: built from it.
        tokenizer: built from it.
        findings: what `check_export` returned.
        prompt: of the example.
        is_training_text: whether the comparison used the text that the model was trained on.
    """
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown is not escaped as HTML
    )
    environment.filters |= {f.__name__: f for f in (code, file_name, quoted, perplexity)}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    history = read_run(checkpoint)
    shared = next((value for name, value in history.card if name in SHARED_LINES), None)
    return template.render(
        title=title,
        layout=layout_of(model.config),
        config=model.config,
        num_parameters=model.num_parameters(),
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        results=results(checkpoint, history),
        shared_lines=shared and f"{SHARED_LINES[0]}: {shared}",
        version=import_transformers().__version__,
        is_training_text=is_training_text,
        findings=findings,
        prompt=prompt,
    )
