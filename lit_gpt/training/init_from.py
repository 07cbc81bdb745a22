"""What a run may start from: a checkpoint of ours, a local folder of transformers, or a GGUF."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.checkpoint import REST, Checkpoint, is_sharded, load_checkpoint
from lit_gpt.data import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.huggingface.gguf_import import as_folder
from lit_gpt.huggingface.importing import (
    CONTEXT,
    check_same_ids,
    folder_fields,
    is_folder,
    load_folder,
)
from lit_gpt.huggingface.tokenizer import from_hf
from lit_gpt.lora import load_base
from lit_gpt.model import GPT

if TYPE_CHECKING:
    from lit_gpt.training.options import TrainOptions


def build_data(
    data_class: type[TextDataModule], resumed: Checkpoint | None = None, **options: Any
) -> TextDataModule:
    """Makes the data module, with a model's own tokenizer where `tokenizer` names a model.

    A folder's tokenizer must give the same ids as transformers' version of it.

    Args:
        resumed: the text is read as earlier releases read it if this is one of theirs.
    """
    data = data_class(**options)
    data.ends_files = resumed is None or resumed.ends_files
    data.has_validation_tokens = resumed is not None and resumed.has_validation_tokens
    source = data.hparams.tokenizer
    if is_folder(source) or source.endswith(".json"):
        folder = as_folder(source)
        data.given_tokenizer = from_hf(folder)[0]
        check_same_ids(folder, data.corpus)
    elif is_sharded(source):  # of a run that is resumed
        data.given_tokenizer = Checkpoint.read(Path(source) / REST).tokenizer
    elif source.endswith(".ckpt"):
        data.given_tokenizer = load_checkpoint(source)[1]
    return data


def model_fields(source: str) -> dict[str, Any]:
    """The fields of GPTConfig that go with the weights; a folder says nothing of dropout."""
    path = as_folder(source)
    if is_sharded(path):  # of a run that is resumed
        return asdict(Checkpoint.read(path / REST).gpt_config)
    if path.is_dir():
        return folder_fields(path)
    if not path.exists() and path.suffix != ".ckpt":
        raise UserError(
            "no such checkpoint or folder",
            field="init_from",
            value=source,
            hint="give a .ckpt or .gguf file, or a folder with config.json, model.safetensors and "
            "tokenizer.json",
        )
    return asdict(load_checkpoint(source)[0].config)


def load_weights(model: GPT, source: str) -> None:
    """Gives a model the weights of a checkpoint or folder.

    Raises:
        UserError: they can't be used, or belong to a model of another shape.
    """
    if model.embedding.weight.is_meta:  # of a sharded model, the first process has the weights
        return
    if is_folder(source):
        given = load_folder(str(as_folder(source)), model.config.context_length)
    else:
        given = load_checkpoint(source)[0]
    try:
        load_base(model, given.state_dict())
    except RuntimeError as error:
        raise UserError(
            "the weights belong to a model of another shape",
            field="init_from",
            value=source,
            hint="give this model the same sizes and choices",
        ) from error


def adopt_model(options: TrainOptions, source: str) -> None:
    """Makes model and tokenizer of a run those of a checkpoint or folder.

    Changes `options.config`. Dropout may differ, and so may the context length: any up to the
    longest of a folder, any at all where positions are not a learned table.

    Raises:
        UserError: an option that was given contradicts the source.
    """
    config = options.config
    defaults = options.parser.get_defaults()
    fields = model_fields(source)
    fields.pop("dropout", None)
    fields.pop("vocab_size")  # comes with the tokenizer
    longest = fields.pop("context_length")
    for name, value in fields.items():
        given = config.model.get(name)
        if given == defaults.model.get(name):
            config.model[name] = value
        elif given != value:
            raise contradiction(name, given, value, source)
    if config.data.tokenizer in (defaults.data.tokenizer, config.model.init_from):
        config.data.tokenizer = source
    elif config.data.tokenizer != source:
        raise contradiction("tokenizer", config.data.tokenizer, source, source)
    context_length = config.data.context_length
    if not options.given("data.context_length"):
        context_length = min(longest, CONTEXT) if is_folder(source) else longest
    elif is_folder(source) and context_length > longest:
        raise contradiction("context_length", context_length, f"at most {longest}", source)
    elif not is_folder(source) and fields["position"] == "learned" and context_length != longest:
        raise contradiction("context_length", context_length, longest, source)
    config.data.context_length = context_length
    config.model.context_length = context_length


def contradiction(field: str, given: Any, value: Any, source: str) -> UserError:
    return UserError(
        f"contradicts the weights of {source}, where it is {value}",
        field=field,
        value=given,
        hint="leave it out, or leave out `init_from`",
    )
