"""The files of a Hugging Face folder, which may come from a stranger.

Only config.json, *.safetensors and the tokenizer's files are read, each no further than its size
allows: transformers' own loaders would also fetch attention kernels, load adapters and pickles, and
follow paths out of the folder, all named by these files.
"""

from __future__ import annotations

import json
import re
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.storage import read_limited

if TYPE_CHECKING:
    from torch import Tensor

MAX_CONFIG = 1 << 20  # bytes
MAX_LAYERS = 10_000
MAX_JSON = 1 << 26  # bytes of any other file: four times the largest tokenizer.json known
NOT_WEIGHTS = re.compile(  # in old files
    r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq)$"
)
RENAMED = {"embed_out.weight": "lm_head.weight"}  # of GPT-NeoX, since transformers 5
FLOATS = ("F64", "F32", "F16", "BF16")
WEIGHTS = "model.safetensors"


def read_json(path: Path, max_bytes: int = MAX_JSON) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError, OSError, RecursionError: it can't be read, is too large or something else.
    """
    value = json.loads(read_limited(path, max_bytes))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The folder's model.safetensors, or the files that its index names.

    A file may be a link, as all are in the cache of huggingface_hub, but only to a regular file.

    Raises:
        ValueError, OSError: there are none, or the index names anything else.
    """
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not index.is_file():
        raise ValueError(f"the folder has no {WEIGHTS}")
    names = set(read_json(index)["weight_map"].values())
    for name in names:
        is_inside = re.fullmatch(r"[\w.-]+\.safetensors", name)
        if not (is_inside and (folder / name).is_file()):
            raise ValueError(f"{index.name} names {name!r}, not a .safetensors file beside it")
    return [folder / name for name in sorted(names)]


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor, from the headers, which safetensors checks against the files' sizes.

    Raises:
        ValueError, OSError, SafetensorError: damaged, or not floating-point weights.
    """
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in FLOATS and not NOT_WEIGHTS.search(name):
                    raise ValueError(f"{name} has the type {tensor.get_dtype()}")
                name = RENAMED.get(name, name)
                if name in shapes:
                    raise ValueError(f"{name} is in two files")
                shapes[name] = tuple(tensor.get_shape())
    return shapes


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, as they are, under the names of transformers 5.

    Raises:
        ValueError, OSError, SafetensorError: as for `weight_shapes`.
    """
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        weights |= {RENAMED.get(name, name): weight for name, weight in load_file(path).items()}
    return weights


def read_config(given: dict[str, Any], config_class: Any) -> Any:
    """The model's configuration in transformers.

    It gets only the fields of this architecture, none of those by which transformers fetches or
    runs anything (`attn_implementation`, `auto_map`, ...).

    Args:
        given: the content of config.json.
        config_class: of transformers.

    Raises:
        ValueError and whatever transformers raises: fields that it rejects.
    """
    from transformers import PreTrainedConfig

    own, base = (signature(kind).parameters.keys() for kind in (config_class, PreTrainedConfig))
    known = (own - base - {"kwargs"}) | config_class.attribute_map.keys()
    known |= {"rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base", "tie_word_embeddings"}
    fields = {name: value for name, value in given.items() if name in known}
    for name in ("n_layer", "num_hidden_layers"):
        if isinstance(number := fields.get(name), int | float) and number > MAX_LAYERS:
            raise ValueError(f"{name} is {number}")
    return config_class(**fields, attn_implementation="sdpa")


def check_shapes(config: Any, architecture: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compares a model that is not yet built with the weights: a wrong size may be gigantic.

    Args:
        config, architecture: of transformers.
        shapes: of the weights.

    Raises:
        ValueError: they do not match.
    """
    import torch

    layers = config.num_hidden_layers
    if layers > len(shapes):
        raise ValueError(f"{layers} layers, but only {len(shapes)} tensors")
    with torch.device("meta"):  # allocates nothing
        expected = architecture(config).state_dict()
    prefix = f"{architecture.base_model_prefix}."  # which files of the bare model lack
    needed = {name.removeprefix(prefix): tuple(w.shape) for name, w in expected.items()}
    given = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    missing = needed.keys() - given.keys()
    if config.tie_word_embeddings:
        missing -= {"lm_head.weight"}
    for what, names in {
        "is missing": missing,
        "has another shape": {n for n in needed.keys() & given.keys() if needed[n] != given[n]},
        "is unexpected": {n for n in given.keys() - needed.keys() if not NOT_WEIGHTS.search(n)},
    }.items():
        if names:
            raise ValueError(f"{min(names)} {what} ({len(names)} in total)")
