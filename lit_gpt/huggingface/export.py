"""The export command: turns a checkpoint into a complete, checked Hugging Face folder."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from lit_gpt.checkpoint import Checkpoint
from lit_gpt.command import call, command_line, option
from lit_gpt.errors import UserError
from lit_gpt.generation.language_model import find_checkpoint
from lit_gpt.generation.sampling import Sampling
from lit_gpt.huggingface.adapter_export import (
    base_folder,
    check_can_be_adapter,
    write_checked_adapter,
)
from lit_gpt.huggingface.architectures import hf_weights, layout_of
from lit_gpt.huggingface.config import hf_config
from lit_gpt.huggingface.export_check import check_export
from lit_gpt.huggingface.gguf_check import check_gguf
from lit_gpt.huggingface.gguf_file import GGUFType, check_can_be_gguf, write_gguf
from lit_gpt.huggingface.model_card import model_card, quoted
from lit_gpt.huggingface.special_tokens import TEMPLATE
from lit_gpt.huggingface.tokenizer import (
    import_transformers,
    special_ids,
    to_hf,
    tokenizer_config,
)
from lit_gpt.model import GPT
from lit_gpt.storage import temporary_folder
from lit_gpt.text.corpus import Corpus, load_corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import Vocabulary

NO_END = (
    "Missing: the model has no end-of-text token, and with it bos, eos and pad, without which "
    "TRL, lm-evaluation-harness and CTranslate2 stop; models trained by this release have one"
)
SAMPLING = ("temperature", "top_p", "min_p", "repetition_penalty")  # which transformers has too
NO_END_OF_GGUF = "Missing: the model has no end-of-text token: llama.cpp writes until its limit"
TRAINING = {"style": "--model.style", "tokenizer": "--data.tokenizer"}  # options of that command
NAME_ANOTHER = "use `path` to name any text to compare the export on"


def refused(out: Path, problem: str, hint: str) -> UserError:
    return UserError(problem, field="out", value=str(out), hint=hint)


def check_is_free(out: Path, is_file: bool = False) -> None:
    """Refuses a folder that holds anything; of a file, anything that is there."""
    if out.is_symlink() or os.path.ismount(out):
        raise refused(out, "is a link or a mounted disk", "name a folder in it")
    with suppress(OSError):
        if out.name and out.is_dir() and not any(out.iterdir()) and not is_file:
            return
    if os.path.lexists(out):
        kind = "a new file" if is_file else "a new or an empty folder"
        raise refused(out, "already exists", f"name {kind}")


def check_format(out: Path, format: str, type: str | None) -> None:
    """Refuses a name or a type that goes with another format."""
    if format == "gguf" and out.suffix != ".gguf":
        hint = "end the name in .gguf, by which programs know the format"
        raise refused(out, "is not the name of a GGUF file", hint)
    if format != "gguf" and out.suffix == ".gguf":
        raise refused(out, "names a GGUF file, but a folder is written", "add `format`=gguf")
    if format != "gguf" and type is not None:
        problem = "only GGUF files have types of weights"
        raise UserError(problem, field="type", value=type, hint="add `format`=gguf")


def load_text(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    cache: Path,
    path: str | None,
    given: dict[str, Any],
) -> Corpus:
    """Encodes the text at `path`, or else that of the checkpoint's run.

    Args:
        given: options of the text, each None if it is to be the default, or that of the run for
            the run's own text.

    Raises:
        UserError: the text can't be used. If it is the run's, the hint says that any other will do.
    """
    used: dict[str, Any] = {"path": path}
    data = {} if path else checkpoint.data_hyperparameters
    if not path:
        names = ("path", "exclude", "encoding", "text_field", "loss_on")
        used = {name: value for name in names if (value := as_option(data.get(name)))}
        if "path" not in used:
            raise UserError("the checkpoint does not name its training text", hint=NAME_ANOTHER)
        used["tsv_quotes"] = data.get("tsv_quotes", True) is True  # as release 0.1.0 read them
    used |= {name: value for name, value in given.items() if value}
    needs_fields = not data.get("val_path")  # which may have them instead
    try:
        text = TextFiles(cache=str(cache), **used)
        return load_corpus(text, Vocabulary(tokenizer), needs_fields=needs_fields).as_text
    except UserError as error:
        if not path and error.field != "cache":
            error.hint = NAME_ANOTHER
        raise


def as_option(value: Any) -> str | list[str] | None:
    """A text or a list of them; None for whatever else a stranger's checkpoint has."""
    parts = value if isinstance(value, list) else [value]
    return value if all(isinstance(part, str) for part in parts) else None


@contextmanager
def new_output(out: Path, is_file: bool) -> Iterator[Path]:
    """Yields a temporary folder, or the name of a file, which is renamed to `out` at the end.

    If anything fails, it is removed.

    Raises:
        UserError: it can't be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(out.parent) as work:
            made = work / f"export{out.suffix}"  # not `out.name`, which may be that of a file here
            if not is_file:
                made.mkdir()
            yield made
            check_is_free(out, is_file)
            if out.is_dir():
                out.rmdir()  # it is empty; not every system can rename a folder over it
            made.rename(out)
    except OSError as error:
        if error.strerror is None:  # not from the file system
            raise
        problem = f"can't be written ({error.strerror})"
        raise refused(out, problem, "use another folder") from error


def write_folder(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Writes all files but the model card."""
    from safetensors.torch import save

    ids = {f"{role}_token_id": i for role, i in special_ids(tokenizer).items()}
    ends = tokenizer.end_ids
    context_length = model.config.context_length
    weights = save(hf_weights(model), metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(weights)
    contents = {
        "config": hf_config(model.config) | ids,
        "tokenizer_config": tokenizer_config(tokenizer, context_length),
        "generation_config": {
            "do_sample": True,
            **{name: getattr(Sampling, name) for name in SAMPLING},
            "top_k": 0,  # all; without it, some versions take 50
            **ids,
            **({"eos_token_id": sorted(ends)} if len(ends) > 1 else {}),
        },
    }
    if tokenizer.chat_template is not None:
        (folder / TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
    for name, content in contents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer.json").write_text(to_hf(tokenizer).to_str(pretty=True), encoding="utf-8")


def example(corpus: Corpus) -> str:
    """A prompt: the beginning of the text."""
    text = corpus.tokenizer.decode(corpus.tokens[:64]).replace("\ufffd", "")
    return text.split("\n")[0].strip()[:4] or "\n"


def write_checked_folder(
    folder: Path,
    name: str,
    checkpoint: Checkpoint,
    model: GPT,
    corpus: Corpus,
    fraction: float,
    prompt: str | None,
) -> list[str]:
    """Writes the folder and its model card; what the comparison found."""
    tokenizer = corpus.tokenizer
    write_folder(folder, model, tokenizer)
    findings = check_export(folder, model, corpus, fraction)
    card = model_card(
        name, checkpoint, model, tokenizer, findings, prompt or "\n", prompt is not None
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return findings


def export(
    out: str,
    ckpt_path: str | None = None,
    logs: str = "logs",
    data_path: str | None = None,
    encoding: str | None = None,
    text_field: str | list[str] | None = None,
    format: Literal["transformers", "gguf"] = "transformers",
    type: GGUFType | None = None,
    adapter: bool = False,
) -> None:
    """Write what other programs load, after checking that it computes the same.

    Args:
        out: folder to create, which may exist if it is empty; of a GGUF file its name.
        ckpt_path: checkpoint, run's folder, best or last; default: the newest run's best.
        logs: where to look for the newest run.
        data_path: text to compare the export on; default: the run's own.
        encoding: of that text; default: utf-8, or for the run's own text as in the run.
        text_field: of its documents, or a list of them; default: none, or for the run's own text
            as in the run.
        format: transformers for a folder that transformers loads; gguf for a file that llama.cpp,
            Ollama and LM Studio run.
        type: of the weights in a GGUF file: f32 (the default), f16 or q8_0, in which the model is
            smaller, and not exactly the same.
        adapter: whether to write LoRA's adapters alone, as a folder that peft loads, instead of
            the model with them.

    Raises:
        UserError: a checkpoint, text or folder that can't be used, or a comparison that failed.
    """
    target = Path(os.path.expanduser(out))
    is_gguf = format == "gguf"
    check_format(target, format, type)
    check_is_free(target, is_gguf)
    checkpoint = Checkpoint.read(find_checkpoint(ckpt_path, logs))
    model, tokenizer = checkpoint.build(merge=not adapter)
    if adapter:
        check_can_be_adapter(checkpoint, is_gguf)
    label = layout_of(model.config).label
    if is_gguf:
        check_can_be_gguf(model.config, tokenizer)
    import_transformers()  # after what no package would help with
    given = {"encoding": encoding, "text_field": text_field}
    fraction = checkpoint.data_hyperparameters.get("train_fraction")
    if not (isinstance(fraction, float) and 0 < fraction < 1):
        fraction = 0.9
    with new_output(target, is_gguf) as made:
        corpus = load_text(checkpoint, tokenizer, made.parent / "tokens", data_path, given)
        # A stranger's checkpoint may name any file of the user's: show none of its text.
        is_own = corpus.info.fingerprint == checkpoint.corpus_info.get("fingerprint")
        prompt = example(corpus) if is_own else None
        if is_gguf:
            write_gguf(made, model, tokenizer, target.stem, type or "f32")
            findings = check_gguf(made, model, corpus, fraction, type or "f32")
        elif adapter:
            findings = write_checked_adapter(
                made, checkpoint, model, corpus, fraction, write_folder
            )
        else:
            findings = write_checked_folder(
                made, target.name, checkpoint, model, corpus, fraction, prompt
            )
    print(*findings, sep="\n")
    if tokenizer.end_of_text is None:
        print(NO_END_OF_GGUF if is_gguf else NO_END)
    if adapter:
        print(f"Exported as a LoRA adapter of a {label}: {target}")
        words = ["export", "--ckpt_path", str(checkpoint.base_path), "--out", f"{target}-base"]
        words += ["--data_path", data_path or "TEXT"]
        print(f"The model that it adapts:  {base_folder(checkpoint) or command_line(*words)}")
        return
    print(f"Exported as {label}: {target}")
    new_tokens = max(1, min(64, model.config.context_length - 16))  # the prompt takes the rest
    print(f"Use it:  python -c {shlex.quote(use_of(target, prompt or chr(10), new_tokens))}")


def use_of(out: Path, prompt: str, new_tokens: int) -> str:
    """A line of Python that writes a text with the export."""
    path, prompt = quoted(str(out)), quoted(prompt)
    if out.suffix == ".gguf":
        llama = f"Llama({path}, n_ctx=0, verbose=False)"
        text = f'{llama}({prompt}, max_tokens={new_tokens})["choices"][0]["text"]'
        return f"from llama_cpp import Llama; print({text})"
    pipeline = f'pipeline("text-generation", {path})({prompt}, max_new_tokens={new_tokens})'
    return f"from transformers import pipeline; print({pipeline})"


def option_name(field: str) -> str:
    """A field as the command line spells it; the text's fields are those of the data module."""
    if field in TRAINING:
        return TRAINING[field]
    return option({"path": "data_path", "cache": "out"}.get(field, field))


def main(argv: list[str]) -> int:
    call(export, argv)
    return 0
