"""Each family: from a folder of transformers, tuned, and back into one of its own architecture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_gpt.__main__ import main
from lit_gpt.checkpoint import load_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.generation.sampling import Sampling, generate
from lit_gpt.huggingface.importing import load_folder, read_model_config
from lit_gpt.huggingface.tokenizer import from_hf
from lit_gpt.model import GPT
from tests.conftest import SMALL
from tests.huggingface.family_models import MODELS, family_folder
from tests.huggingface.folders import TEXT

PLAIN = {name: value for name, value in SMALL.items() if not name.startswith("model.")}
LENGTH = 40  # tokens; more than mistral's window of 12
KEPT = ("model_type", "rms_norm_eps", "layer_norm_eps", "rope_parameters", "sliding_window")
KEPT += ("head_dim", "num_key_value_heads", "tie_word_embeddings", "use_parallel_residual")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: family_folder(root / family, family) for family in MODELS}


@torch.inference_mode()
def largest_difference(model: GPT, folder: Path, rows: torch.Tensor) -> float:
    """Between our logits of a text and those of transformers, of the tokens that we have."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    ids = torch.arange(LENGTH)[None] * 37 % len(rows)
    expected = theirs(rows[ids]).logits[..., rows]
    assert expected.std() > 0.3
    return (model(ids) - expected).abs().max().item()


def logits_of(folder: Path) -> float:
    tokenizer, rows = from_hf(folder)
    model = load_folder(str(folder), LENGTH)
    assert model.config.vocab_size == tokenizer.vocab_size
    return largest_difference(model, folder, torch.from_numpy(rows))


VARIANTS = [
    *((family, {}) for family in MODELS),
    ("llama3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("llama3", {"mlp_bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("mistral", {"sliding_window": None, "num_key_value_heads": 4}),
    ("mistral", {"sliding_window": 1}),
    ("neox", {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_fast"}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_logits_are_transformers_own(tmp_path, family, changes):
    assert logits_of(family_folder(tmp_path, family, **changes)) < 1e-4


@pytest.mark.parametrize("family", MODELS)
def test_tuned_it_goes_back_into_its_own_architecture(train, folders, tmp_path, capfd, family):
    text = tmp_path / "own.txt"
    text.write_text(TEXT[:6000])
    places = {"data.path": text, "data.cache": tmp_path / "cache", "data.context_length": LENGTH}
    places |= {"trainer.default_root_dir": tmp_path / "logs", "model.init_from": folders[family]}
    result = train(defaults=PLAIN | places, **{"trainer.max_steps": 2, "model.learning_rate": 0.01})
    assert result.status == 0, result.err
    path = Path(result.run.trainer.log_dir) / "checkpoints" / "last.ckpt"
    assert main(["export", "--ckpt_path", str(path), "--out", str(tmp_path / "out")]) == 0
    found = capfd.readouterr().out
    assert "Logits on 8 windows of 40 tokens: largest difference" in found
    assert "Greedy text: " in found
    model, tokenizer = load_checkpoint(path)
    rows = torch.arange(tokenizer.vocab_size)
    assert largest_difference(model, tmp_path / "out", rows) < 1e-4
    configs = (folder / "config.json" for folder in (folders[family], tmp_path / "out"))
    before, after = (json.loads(path.read_text()) for path in configs)
    kept = [name for name in KEPT if name in before]
    assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}
    again = load_folder(str(tmp_path / "out"), LENGTH)
    untrained = load_folder(str(folders[family]), LENGTH).state_dict()
    order = torch.from_numpy(from_hf(tmp_path / "out")[1])
    for name, weight in again.state_dict().items():
        expected = model.state_dict()[name]
        is_table = name in ("embedding.weight", "head.weight")
        assert torch.equal(weight, expected[order] if is_table else expected), name
        assert not torch.equal(expected, untrained[name]), name


@torch.inference_mode()
@pytest.mark.parametrize("family", ["mistral", "neox", "llama3"])
def test_text_with_the_cache_is_transformers_own(folders, family):
    """Longer than the window, in which transformers forgets what has left it."""
    model = load_folder(str(folders[family]), LENGTH)
    rows = torch.from_numpy(from_hf(folders[family])[1])
    theirs = AutoModelForCausalLM.from_pretrained(folders[family], local_files_only=True).eval()
    prompt = torch.arange(15)[None] * 37 % len(rows)
    ours = torch.stack(list(generate(model, prompt, LENGTH - 15, Sampling(temperature=0))), dim=1)
    banned = sorted(set(range(theirs.config.vocab_size)) - set(rows.tolist()))
    options = {"attention_mask": torch.ones_like(prompt), "suppress_tokens": banned}
    found = theirs.generate(
        rows[prompt], max_new_tokens=LENGTH - 15, do_sample=False, eos_token_id=None, **options
    )
    assert found[0, 15:].tolist() == rows[ours[0]].tolist()
    assert len(ours[0].unique()) > 2


LLAMA_SCALING = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
LLAMA_SCALING |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
PUBLISHED = {  # config.json as it was published, and the number of weights
    "SmolLM2-135M": (
        {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536}
        | {"num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3}
        | {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000}
        | {"tie_word_embeddings": True, "vocab_size": 49152, "attention_bias": False}
        | {"hidden_act": "silu", "rope_scaling": None, "rope_interleaved": False}
        | {"is_llama_config": True, "pretraining_tp": 1, "torch_dtype": "bfloat16"},
        134_515_008,
    ),
    "TinyLlama-1.1B": (
        {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632}
        | {"num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4}
        | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
        | {"tie_word_embeddings": False, "vocab_size": 32000, "attention_bias": False}
        | {"hidden_act": "silu", "rope_scaling": None, "pretraining_tp": 1},
        1_100_048_384,
    ),
    "Llama-3.2-1B": (
        {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64}
        | {"num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8}
        | {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
        | {"tie_word_embeddings": True, "vocab_size": 128256, "attention_bias": False}
        | {"hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1}
        | {"rope_scaling": LLAMA_SCALING, "bos_token_id": 128000, "eos_token_id": 128001},
        1_235_814_400,
    ),
    "Qwen2.5-0.5B": (
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864}
        | {"num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2}
        | {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
        | {"tie_word_embeddings": True, "vocab_size": 151936, "hidden_act": "silu"}
        | {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 24},
        494_032_768,
    ),
    "Mistral-7B-v0.1": (
        {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336}
        | {"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8}
        | {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
        | {"tie_word_embeddings": False, "vocab_size": 32000, "sliding_window": 4096},
        7_241_732_096,
    ),
    "pythia-160m": (
        {"model_type": "gpt_neox", "hidden_size": 768, "intermediate_size": 3072}
        | {"num_attention_heads": 12, "num_hidden_layers": 12, "layer_norm_eps": 1e-5}
        | {"max_position_embeddings": 2048, "rotary_pct": 0.25, "rotary_emb_base": 10000}
        | {"tie_word_embeddings": False, "vocab_size": 50304, "hidden_act": "gelu"}
        | {"use_parallel_residual": True, "torch_dtype": "float16"},
        162_322_944,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_models_of_their_size(name, tmp_path):
    fields, num_weights = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = read_model_config(tmp_path)[1]
    with torch.device("meta"):
        assert sum(GPT(config).num_parameters()) == num_weights
    assert config.context_length == fields["max_position_embeddings"]
    assert config.sliding_window == {"Mistral-7B-v0.1": 4096}.get(name)
    assert config.rotary_fraction == fields.get("rotary_pct", 1.0)
    assert (config.rope_scaling, config.rope_factor) == (
        ("llama3", 32.0) if name == "Llama-3.2-1B" else (None, 1.0)
    )
    assert config.qkv_bias == (fields["model_type"] in ("qwen2", "gpt_neox"))


# What can't be used


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
WRONG = {
    "no bias": (
        "qwen2",
        lambda f: edit_weights(f, lambda w: w.pop("model.layers.1.self_attn.k_proj.bias")),
        ": layers.1.self_attn.k_proj.bias is missing",
    ),
    "a bias too much": (
        "llama3",
        lambda f: edit_weights(
            f, lambda w: w.update({"model.layers.0.mlp.up_proj.bias": torch.ones(56)})
        ),
        "layers.0.mlp.up_proj.bias is unexpected",
    ),
    "no output layer": (
        "neox",
        lambda f: edit_weights(f, lambda w: w.pop("embed_out.weight")),
        "lm_head.weight is missing",
    ),
    "yarn": (
        "llama3",
        lambda f: edit_config(f, rope_parameters=YARN | {"rope_theta": 5e5}),
        "rope_type 'yarn' is not supported, only default, linear, llama3; use another model",
    ),
    "another head size": (
        "llama3",
        lambda f: edit_config(f, head_dim=16),
        "has another shape",
    ),
    "windows in some layers": (
        "qwen2",
        lambda f: edit_config(
            f, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"]
        ),
        "layer_types ['full_attention', 'sliding_attention'] is not supported, only full_attention",
    ),
    "no rotation": (
        "neox",
        lambda f: edit_config(f, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.0}),
        "rotary_fraction 0.0: must be in (0, 1]",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_damaged_or_not_supported_is_one_line(tmp_path, what):
    family, change, message = WRONG[what]
    folder = family_folder(tmp_path, family)
    change(folder)
    with pytest.raises(UserError) as error:
        load_folder(str(folder), LENGTH)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


OTHER = {
    "smollm2": {"rms_norm_eps": 0.1},
    "llama3": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "mistral": {"sliding_window": 5},
    "neox": {"use_parallel_residual": False},
}


@pytest.mark.parametrize("family", OTHER)
def test_each_field_is_read(folders, tmp_path, family):
    """With another value the same weights are another model."""
    shutil.copytree(folders[family], tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, **OTHER[family])
    model = load_folder(str(tmp_path), LENGTH)
    rows = torch.from_numpy(from_hf(tmp_path)[1])
    assert largest_difference(model, folders[family], rows) > 0.01
