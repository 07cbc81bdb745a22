"""Our GPT and its architectures in transformers: configs and weights, both ways."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from lit_gpt.errors import UserError
from lit_gpt.huggingface.architectures import gpt_weights, hf_weights, layout_of
from lit_gpt.huggingface.config import gpt_config, hf_config
from lit_gpt.huggingface.importing import read_model_config
from lit_gpt.huggingface.layouts import LAYOUTS
from lit_gpt.model import GPT, GPTConfig

SIZES = {"vocab_size": 50, "context_length": 16, "d_model": 24, "num_blocks": 2, "num_heads": 4}
ROTARY = {"style": "modern", "qk_norm": False}
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_context": 8}
NEOX = {"position": "rotary", "activation": "gelu", "parallel_residual": True}
FIT = {
    "gpt2": [
        {},
        {"tie_embeddings": True},
        {"bias": False},
        {"position": "learned", "activation": "gelu"},
        {"activation": "gelu_tanh", "hidden_size": 40, "norm_eps": 0.01},
        {"qkv_bias": False, "mlp_bias": False},
        {"style": "modern", "position": "learned", "norm": "layer", "activation": "gelu"}
        | {"qk_norm": False},
    ],
    "qwen3": [
        {"style": "modern"},
        {"style": "modern", "tie_embeddings": False, "num_kv_heads": 2},
        {"style": "modern", "num_kv_heads": 1, "head_size": 10, "hidden_size": 40},
        {"style": "modern", "rotary_base": 50_000.0},
        {"position": "rotary", "norm": "rms", "activation": "swiglu", "bias": False}
        | {"qk_norm": True},
        {"style": "modern", "norm_eps": 0.01},
        {"style": "modern", "rope_scaling": "linear", "rope_factor": 4.0},
    ],
    "llama": [
        ROTARY,
        ROTARY | {"tie_embeddings": False, "num_kv_heads": 2, "norm_eps": 1e-5},
        ROTARY | {"head_size": 10, "hidden_size": 40, "rotary_base": 500.0},
        ROTARY | LLAMA3,
        ROTARY | LLAMA3 | {"rope_low_freq_factor": 0.5, "rope_high_freq_factor": 2.0},
        ROTARY | {"rope_scaling": "linear", "rope_factor": 2.0},
        ROTARY | {"bias": True},
        ROTARY | {"mlp_bias": True},
        ROTARY | {"bias": True, "mlp_bias": False},
        ROTARY | {"bias": True, "qkv_bias": False},  # which are zeros then
        ROTARY | {"qkv_bias": True, "mlp_bias": True},
    ],
    "qwen2": [
        ROTARY | {"qkv_bias": True},
        ROTARY | {"qkv_bias": True, "tie_embeddings": False, "num_kv_heads": 1},
        ROTARY | {"qkv_bias": True, "rope_scaling": "linear", "rope_factor": 2.0},
    ],
    "mistral": [
        ROTARY | {"sliding_window": 5},
        ROTARY | {"sliding_window": 5, "num_kv_heads": 2, "head_size": 10, "norm_eps": 1e-5},
        ROTARY | {"sliding_window": 4096},
        ROTARY | {"d_model": 26, "head_size": 6},  # which Llama refuses
    ],
    "gpt_neox": [
        NEOX,
        NEOX | {"rotary_fraction": 0.34},  # 2 of 6 channels
        NEOX | {"parallel_residual": False, "tie_embeddings": True, "hidden_size": 40},
        NEOX | {"bias": False, "activation": "gelu_tanh", "rotary_base": 500.0},
        NEOX | {"qkv_bias": False, "activation": "relu", "norm_eps": 0.01},
        NEOX | LLAMA3,
        NEOX | {"rope_scaling": "linear", "rope_factor": 2.0, "rotary_fraction": 0.67},
    ],
}
CASES = [(kind, choices) for kind, cases in FIT.items() for choices in cases]
IDS = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))


def random_model(**choices) -> GPT:
    """In eval mode, all weights random: norms and biases too."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | choices)).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model


def in_memory(weights: dict) -> dict:
    """Under the names of transformers 5, whose files have those of 4."""
    return {name.replace("embed_out", "lm_head"): weight for name, weight in weights.items()}


def theirs_of(model: GPT, folder) -> nn.Module:
    """The model that transformers makes of our config.json and weights."""
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    weights = in_memory(hf_weights(model))
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert missing == (["lm_head.weight"] if model.config.tie_embeddings else [])
    assert unexpected == []
    return theirs


@torch.inference_mode()
def difference(ours: GPT, theirs: nn.Module) -> float:
    return (ours(IDS) - theirs(IDS).logits).abs().max().item()


@pytest.mark.parametrize(("kind", "choices"), CASES)
def test_transformers_computes_our_logits(kind, choices, tmp_path):
    model = random_model(**choices)
    theirs = theirs_of(model, tmp_path)
    assert theirs.config.model_type == kind
    assert model(IDS).abs().max() > 0.5
    assert difference(model, theirs) < 1e-5


@pytest.mark.parametrize(("kind", "choices"), CASES)
def test_exported_weights_can_be_imported(kind, choices):
    model = random_model(**choices)
    theirs = AutoConfig.for_model(**hf_config(model.config)).to_dict()
    config = GPTConfig(**gpt_config(theirs))
    again = GPT(config).eval()
    again.load_state_dict(gpt_weights(hf_weights(model), config))
    assert torch.equal(again(IDS), model(IDS))
    # Missing biases became zeros; and where nothing rotates, how it would is lost.
    lost = {"style", "dropout", "bias", "qkv_bias", "mlp_bias"}
    if kind == "gpt2":
        lost |= {"position"}
    kept = asdict(model.config).items()
    changed = {n: (v, getattr(config, n)) for n, v in kept if getattr(config, n) != v}
    assert changed.keys() <= lost, changed
    assert layout_of(config).model_type == kind


@pytest.mark.parametrize("name", ["attention.qkv", "feed_forward.up", "attention_norm"])
@pytest.mark.parametrize("style", ["classic", "modern"])
def test_a_changed_weight_changes_the_logits(name, style, tmp_path):
    model = random_model(style=style)
    theirs = theirs_of(model, tmp_path)
    model.get_submodule(f"blocks.1.{name}").weight.data[0] += 0.1
    assert difference(model, theirs) > 1e-4


SMALL = {"vocab_size": 50, "max_position_embeddings": 16, "hidden_size": 24}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 30}
NEOX_SMALL = {n: v for n, v in SMALL.items() if n != "num_key_value_heads"}
NEOX_SMALL |= {"num_attention_heads": 2}
MODELS = {
    "gpt2": GPT2Config(
        vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=4, bos_token_id=1
    ),
    "gpt2 of its own": GPT2Config(
        **{"vocab_size": 50, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4},
        **{"n_inner": 30, "activation_function": "gelu_pytorch_tanh"},
        tie_word_embeddings=False,
    ),
    "qwen3": Qwen3Config(
        **{"vocab_size": 50, "max_position_embeddings": 16, "hidden_size": 24, "head_dim": 10},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"intermediate_size": 30, "tie_word_embeddings": True},
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "llama": LlamaConfig(**SMALL, head_dim=10),
    "llama 3.2": LlamaConfig(
        **{**SMALL, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8},
    ),
    "llama with biases": LlamaConfig(**SMALL, attention_bias=True),
    "llama with all biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama, longer": LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0}),
    "qwen2": Qwen2Config(**SMALL, use_sliding_window=False, sliding_window=5),
    "mistral": MistralConfig(**SMALL, sliding_window=5),
    "mistral of one head": MistralConfig(**SMALL | {"num_key_value_heads": 1}, head_dim=8),
    "mistral without a window": MistralConfig(**SMALL, sliding_window=None),
    "gpt_neox": GPTNeoXConfig(**NEOX_SMALL, rotary_pct=0.34),
    "gpt_neox in turn": GPTNeoXConfig(**NEOX_SMALL, use_parallel_residual=False, rotary_pct=1.0),
    "gpt_neox of its own": GPTNeoXConfig(
        **NEOX_SMALL, hidden_act="gelu_fast", tie_word_embeddings=True, rotary_pct=0.5
    ),
    "qwen3 untied": Qwen3Config(
        **{"vocab_size": 50, "max_position_embeddings": 16, "hidden_size": 24, "head_dim": 6},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"intermediate_size": 64, "use_sliding_window": True, "max_window_layers": 2},
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bare", [False, True])
def test_an_imported_model_computes_the_same(name, bare):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.3)
    config = GPTConfig(**gpt_config(theirs.config.to_dict()))
    weights = theirs.state_dict()
    if bare:  # as GPT-2 was published: names without prefix, masks among the weights
        prefix = layout_of(config).prefix
        weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        weights["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
        weights["layers.0.attention.bias"] = torch.ones(1, 1, 16, 16)
    ours = GPT(config).eval()
    ours.load_state_dict(gpt_weights(weights, config))
    assert difference(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"norm": "rms"}, "GPT-2 needs norm layer instead of rms"),
        ({"activation": "swiglu"}, "GPT-2 needs activation relu or gelu or gelu_tanh instead of"),
        ({"qk_norm": True}, "GPT-2 needs qk_norm False instead of True"),
        ({"num_kv_heads": 2}, "GPT-2 needs num_kv_heads 4 instead of 2"),
        ({"head_size": 8}, "GPT-2 needs head_size 6.0 instead of 8"),
        ({"parallel_residual": True}, "GPT-2 needs parallel_residual False instead of True"),
        ({"sliding_window": 5}, "GPT-2 needs sliding_window None instead of 5"),
        ({"style": "modern", "bias": True}, "Llama needs qk_norm False instead of True"),
        ({"style": "modern", "qkv_bias": True}, "needs qkv_bias False instead of True"),
        ({"style": "modern", "mlp_bias": True}, "Qwen3 needs mlp_bias False instead of True"),
        ({"style": "modern", "position": "learned"}, "Qwen3 needs position rotary instead of"),
        ({"style": "modern", "norm": "layer"}, "Qwen3 needs norm rms instead of layer"),
        ({"style": "modern", "activation": "gelu"}, "Qwen3 needs activation swiglu instead of"),
        (ROTARY | {"rotary_fraction": 0.34}, "Llama needs rotary_fraction 1.0 instead of 0.34"),
        (ROTARY | {"parallel_residual": True}, "Llama needs parallel_residual False instead of"),
        (ROTARY | {"sliding_window": 5, "qkv_bias": True}, "needs sliding_window None instead of"),
        (
            ROTARY | {"d_model": 26, "head_size": 6, "mlp_bias": True},
            "Llama needs d_model divisible by 4 instead of 26",
        ),
        (NEOX | {"head_size": 8}, "GPT-NeoX needs head_size 6.0 instead of 8"),
        (NEOX | {"num_kv_heads": 1}, "GPT-NeoX needs num_kv_heads 4 instead of 1"),
        (NEOX | {"qk_norm": True}, "GPT-NeoX needs qk_norm False instead of True"),
    ],
)
def test_a_model_that_fits_none_is_refused_with_the_closest(choices, message):
    config = GPTConfig(**SIZES | choices)
    labels = "GPT-2, Qwen3, Qwen2, Llama, Mistral, GPT-NeoX"
    with pytest.raises(UserError, match=f"the model is none of {labels}: ") as error:
        layout_of(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("choices", "shown"),
    [
        ({"style": "fast"}, "smear True, bigram_rows 0"),
        ({"style": "fast", "bigram_rows": 8}, "smear True, bigram_rows 8"),
        ({"bigram_rows": 5}, "smear False, bigram_rows 5"),
    ],
)
def test_what_the_token_before_adds_has_no_place_in_either(choices, shown):
    with pytest.raises(UserError) as error:
        layout_of(GPTConfig(**SIZES | choices))
    assert str(error.value) == (
        "no architecture of transformers adds to a token's embedding what the one before it says "
        f"({shown}); train a model that is to be exported with style=modern"
    )


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_folder_of_transformers_has_no_pairs(kind):
    """So that a run can't ask for them and take its weights from there."""
    ours = gpt_config(JSON[kind])
    assert (ours["smear"], ours["bigram_rows"]) == (False, 0)


JSON = {kind: json.loads(MODELS[kind].to_json_string()) for kind in LAYOUTS}
GPT2_JSON, QWEN3_JSON, LLAMA_JSON = (JSON[kind] for kind in ("gpt2", "qwen3", "llama"))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_required_values_are_the_defaults_of_transformers(kind):
    default = type(MODELS[kind])()
    for name, value in LAYOUTS[kind].required.items():
        assert getattr(default, name, value) == value, name


def fields_of(folder, config: dict) -> dict:
    """The GPTConfig of a folder with that config.json."""
    (folder / "config.json").write_text(json.dumps(config))
    return asdict(read_model_config(folder)[1])


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({}, {}, "model_type None is not supported, only gpt2, qwen3, qwen2, llama, mistral"),
        (GPT2_JSON, {"model_type": "gemma"}, "model_type 'gemma' is not supported, only gpt2, "),
        (GPT2_JSON, {"model_type": ["gpt2"]}, "model_type ['gpt2'] is not supported"),
        (GPT2_JSON, {"layer_norm_epsilon": 0.0}, "norm_eps 0.0: must be in (0, 1)"),
        (GPT2_JSON, {"scale_attn_weights": False}, "scale_attn_weights False is not supported"),
        (GPT2_JSON, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2_JSON, {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2_JSON, {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        (GPT2_JSON, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (GPT2_JSON, {"activation_function": "silu"}, "activation_function 'silu'"),
        (GPT2_JSON, {"n_embd": "768"}, "n_embd"),  # by transformers, like the next ones
        (GPT2_JSON, {"n_layer": True}, "n_layer"),
        (GPT2_JSON, {"n_head": None}, "n_head"),
        (GPT2_JSON, {"n_head": 0}, "n_head must be a whole number above 0, not 0"),
        (GPT2_JSON, {"n_inner": 0}, "n_inner must be a whole number above 0, not 0"),
        (GPT2_JSON, {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        (QWEN3_JSON, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (QWEN3_JSON, {"attention_bias": True}, "attention_bias True"),
        (QWEN3_JSON, {"head_dim": None}, "head_dim"),
        (QWEN3_JSON, {"num_key_value_heads": 1.5}, "num_key_value_heads"),
        (
            QWEN3_JSON,
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2}},
            "rope_type 'yarn' is not supported, only default, linear, llama3",
        ),
        (LLAMA_JSON, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        (LLAMA_JSON, {"rope_scaling": {"type": "linear"}}, "factor"),
        (LLAMA_JSON, {"rope_scaling": {"type": "linear", "factor": 0.5}}, "must be at least 1"),
        (LLAMA_JSON, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (LLAMA_JSON, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (LLAMA_JSON, {"attention_bias": 1}, "attention_bias"),
        (LLAMA_JSON, {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        (LLAMA_JSON, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (JSON["qwen2"], {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        (JSON["mistral"], {"sliding_window": 0}, "sliding_window must be a whole number above 0"),
        (JSON["mistral"], {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        (JSON["gpt_neox"], {"attention_bias": False}, "attention_bias False is not supported"),
        (JSON["gpt_neox"], {"hidden_act": "silu"}, "hidden_act 'silu' is not supported, only relu"),
        (JSON["gpt_neox"], {"rope_parameters": None, "rotary_pct": 0.1}, "rotates 1 of 12 chan"),
        (QWEN3_JSON, {"rope_parameters": "yarn"}, "rope_parameters"),
        (QWEN3_JSON, {"rope_parameters": {"rope_theta": 0}}, "rotary_base 0.0: must be above 1"),
        (QWEN3_JSON, {"rope_parameters": {"rope_theta": "x"}}, "'x'"),
        (QWEN3_JSON, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (QWEN3_JSON, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (QWEN3_JSON, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (
            QWEN3_JSON,
            {
                "layer_types": None,
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            },
            "layer_types ['full_attention', 'sliding_attention'] is not supported",
        ),
    ],
)
def test_unsupported_fields_are_refused_by_name(config, change, message, tmp_path):
    with pytest.raises(UserError, match=r"config\.json(:| can't be read)") as error:
        fields_of(tmp_path, config | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_fields_have_the_defaults_of_older_files(tmp_path):
    """As GPT-2 and Qwen3 were published: rope_theta beside rope_scaling, no tie_word_embeddings."""
    few = ("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    ours = fields_of(tmp_path, {name: GPT2_JSON[name] for name in few})
    assert ours["tie_embeddings"] is True
    assert ours["activation"] == "gelu_tanh"
    assert ours["hidden_size"] == 96
    old = {n: v for n, v in QWEN3_JSON.items() if n not in ("rope_parameters", "layer_types")}
    ours = fields_of(tmp_path, old | {"rope_theta": 1000000, "rope_scaling": None})
    assert (ours["rotary_base"], ours["num_kv_heads"], ours["head_size"]) == (1e6, 2, 10)
    assert fields_of(tmp_path, old)["rotary_base"] == 10_000


def test_half_precision_is_imported_as_float32():
    model = random_model(style="modern")
    weights = {name: weight.bfloat16() for name, weight in hf_weights(model).items()}
    ours = gpt_weights(weights, model.config)
    assert {weight.dtype for weight in ours.values()} == {torch.float32}
    assert torch.equal(ours["norm.weight"], model.norm.weight.bfloat16().float())
