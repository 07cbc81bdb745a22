"""tokenizer.json, both ways: the same ids for any text, and what is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer as Theirs
from transformers import AutoTokenizer

from lit_gpt.errors import UserError
from lit_gpt.huggingface.importing import check_ids, fingerprint_of
from lit_gpt.huggingface.tokenizer import NAME, from_hf, onig_pattern, to_hf, tokenizer_config
from lit_gpt.text.bpe import load_trainer
from lit_gpt.text.characters import character_tokenizer
from lit_gpt.text.sentencepiece import parse_sentencepiece
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import OFFLINE, load_tokenizer
from tests.huggingface.folders import SPECIALS, TEXT, make_tokenizer

ODD = (
    "Hello <|endoftext|> world's  it'S we'LL \n\n 1234567 猫坐在垫子 \r\n  x  \n\t\x85\u3000 "
    "e\u0301 Å ﬁ <think> <|im_end|> 🦆👩\u200d🦰 'ſ ǅ ١٢٣ a\u00a0b   "
)
ODD_TEXTS = st.text() | st.text(
    st.sampled_from(list("aAbst'’ſ  \n\r\t\u3000\u0085１23猫é\u0301<|>_-/"))
)


def own_tokenizer(name: str) -> Tokenizer:
    """Ours of that kind; `compact` and `bpe` end documents, as from .jsonl."""
    if name == "compact":
        full = load_tokenizer("cl100k_base").with_end_of_text()
        return full.compact(full.encode(TEXT))[0]
    if name == "bpe":
        return load_trainer(500)([TEXT]).with_end_of_text()
    if name == "chars":
        return character_tokenizer([TEXT, "🦆"], 1.0).with_end_of_text()
    if name == "model":  # of SentencePiece
        model = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.split("\n")),
            model_writer=model,
            model_type="bpe",
            vocab_size=150,
            minloglevel=2,
        )
        return parse_sentencepiece(model.getvalue(), "x.model")
    return load_tokenizer(name)


def save(tokenizer: Tokenizer, folder, context_length: int = 128):
    folder.mkdir(exist_ok=True)
    to_hf(tokenizer).save(str(folder / "tokenizer.json"))
    config = tokenizer_config(tokenizer, context_length)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def plain(folder) -> Theirs:
    """The folder's tokenizer as it treats text without special tokens and normal form."""
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return Theirs.from_str(json.dumps(spec | {"added_tokens": [], "normalizer": None}))


FULL = [pytest.param(name, marks=pytest.mark.slow) for name in OFFLINE]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Each of ours, once, with its folder."""
    made = {}

    def get(name: str):
        if name not in made:
            tokenizer = own_tokenizer(name)
            made[name] = tokenizer, save(tokenizer, tmp_path_factory.mktemp("folder"))
        return made[name]

    return get


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for kind in ("gpt2", "qwen3"):
        make_tokenizer(kind).save_pretrained(root / kind)
    return root


@pytest.mark.parametrize("model_type", [None, "gpt2", "qwen3"])
@pytest.mark.parametrize("name", ["bytes", "compact", "bpe", "chars", "model", *FULL])
def test_auto_tokenizer_gives_our_ids_and_takes_all_text_as_text(exported, name, model_type):
    tokenizer, folder = exported(name)
    if model_type:  # in an export it stands beside, and names another class
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    auto = AutoTokenizer.from_pretrained(folder)
    for text in (ODD, TEXT):
        ids = auto(text, split_special_tokens=True)["input_ids"]
        assert ids == tokenizer.encode(text).tolist()
        assert auto.decode(ids) == text
    assert len(auto) == tokenizer.vocab_size
    assert auto.eos_token_id == tokenizer.end_of_text
    assert auto.model_max_length == 128
    if tokenizer.end_of_text is not None:
        ended = [*auto.encode("a"), tokenizer.end_of_text]
        assert auto.encode("a<|endoftext|>") == ended  # unless split_special_tokens is set
        assert auto.decode(ended) == "a<|endoftext|>"
        assert auto.decode(ended, skip_special_tokens=True) == "a"


@settings(max_examples=200, deadline=None)
@given(text=ODD_TEXTS)
@pytest.mark.parametrize("name", ["bytes", "compact", "bpe", "chars", "model", *FULL])
def test_any_text_has_the_same_ids_there(exported, name, text):
    tokenizer, folder = exported(name)
    ids = to_hf_cached(folder).encode(text).ids
    assert ids == tokenizer.encode(text).tolist()


CACHE: dict = {}


def to_hf_cached(folder) -> Theirs:
    if folder not in CACHE:
        CACHE[folder] = plain(folder)
    return CACHE[folder]


@pytest.mark.parametrize("name", ["bytes", "compact", "bpe", "chars", "model", *FULL])
def test_there_and_back_it_is_the_same_tokenizer(exported, name):
    tokenizer, folder = exported(name)
    back, rows = from_hf(folder)
    assert (back.tokens, back.pattern) == (tokenizer.tokens, tokenizer.pattern)
    assert (back.end_of_text, back.name) == (tokenizer.end_of_text, NAME)
    assert rows.dtype == np.int64
    assert rows.tolist() == list(range(tokenizer.vocab_size))


def test_a_vocabulary_with_the_special_text_as_a_token_is_refused():
    tokenizer = Tokenizer(
        "x", OFFLINE["cl100k_base"][0], [*load_tokenizer("bytes").tokens, b"<|endoftext|>"]
    )
    assert to_hf(tokenizer).get_vocab_size() == 257
    with pytest.raises(UserError, match=r"has <\|endoftext\|> as an ordinary token"):
        to_hf(tokenizer.with_end_of_text())


def test_possessive_repeats_are_translated_for_oniguruma():
    assert onig_pattern(r"\p{N}{1,3}+| ?[^\s]++|\s++$|\s") == r"\p{N}{1,3}| ?[^\s]++|\s++\z|\s"


# From a folder


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_ids_count_bytes_then_merges_then_special_tokens_then_the_end(folders, kind):
    spec = json.loads((folders / kind / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer, rows = from_hf(folders / kind)
    assert sorted(tokenizer.tokens[:256]) == [bytes([byte]) for byte in range(256)]
    merges = ["".join(pair) for pair in spec["model"]["merges"]]
    assert len(merges) > 50
    vocab = spec["model"]["vocab"]
    special = [*SPECIALS[1:], *(["<think>"] if kind == "qwen3" else []), SPECIALS[0]]
    first = 256 + len(merges)
    assert rows[256:first].tolist() == [vocab[merge] for merge in merges]
    assert tokenizer.special == {name: first + i for i, name in enumerate(special)}
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    assert rows[first:].tolist() == [added[name] for name in special]
    assert tokenizer.end_of_text == len(rows) - 1
    assert rows[-1] == vocab["<|endoftext|>"] == 0  # also of Qwen3, whose eos is <|im_end|>
    assert tokenizer.end_names == (["<|im_end|>"] if kind == "qwen3" else [])
    assert len(set(rows.tolist())) == len(rows)


@settings(max_examples=200, deadline=None)
@given(text=ODD_TEXTS)
@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_any_text_has_the_folder_s_ids(folders, kind, text):
    if kind not in CACHE:
        CACHE[kind] = *from_hf(folders / kind), plain(folders / kind)
    tokenizer, rows, theirs = CACHE[kind]
    ids = tokenizer.encode(text)
    assert rows[ids].tolist() == theirs.encode(text).ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_plain_text_has_auto_tokenizer_s_ids(folders, kind):
    auto = AutoTokenizer.from_pretrained(folders / kind)
    tokenizer, rows = from_hf(folders / kind)
    text = unicodedata.normalize("NFC", TEXT)
    assert rows[tokenizer.encode(text)].tolist() == auto.encode(text)


def test_without_a_normal_form_text_is_kept_as_it_is(folders):
    tokenizer, _ = from_hf(folders / "qwen3")
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "e\u0301"


def test_visible_tokens_are_those_that_transformers_shows(folders):
    auto = AutoTokenizer.from_pretrained(folders / "qwen3")
    tokenizer, rows = from_hf(folders / "qwen3")
    shown = [
        name
        for name, i in tokenizer.special.items()
        if auto.decode([int(rows[i])], skip_special_tokens=True) == name
    ]
    assert tokenizer.visible_names == shown == ["<think>"]
    state = tokenizer.to_dict()
    assert Tokenizer.from_dict(state).visible_names == shown
    special = json.loads(state["special"])
    del special["visible_names"]  # as of an earlier release
    old = Tokenizer.from_dict(state | {"special": json.dumps(special)})
    assert (old.visible_names, old.special) == ([], tokenizer.special)


def test_a_vocab_and_merges_are_a_tokenizer_too(folders, tmp_path):
    """As GPT-2's folder was before there was tokenizer.json."""
    model = json.loads((folders / "gpt2" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    (tmp_path / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    found, rows = from_hf(tmp_path)
    expected, expected_rows = from_hf(folders / "gpt2")
    assert found.special.keys() == {"<|endoftext|>"}  # the others are in no merge
    assert found.tokens[:-1] == expected.tokens[: len(rows) - 1]
    assert rows[:-1].tolist() == expected_rows[: len(rows) - 1].tolist()
    assert rows[-1] == expected_rows[-1]


def test_merges_written_as_one_string(folders, tmp_path):
    """As tokenizers before 0.20 did."""
    spec = json.loads((folders / "gpt2" / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert from_hf(tmp_path)[0] == from_hf(folders / "gpt2")[0]


def test_the_end_of_text_is_the_eos_token_where_none_has_that_name(folders, tmp_path):
    spec = json.loads((folders / "gpt2" / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"]
    vocab["</s>"] = vocab.pop("<|endoftext|>")
    spec["added_tokens"][0]["content"] = "</s>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert from_hf(tmp_path)[0].end_of_text is None
    for eos in ("</s>", {"content": "</s>", "special": True}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        tokenizer, rows = from_hf(tmp_path)
        assert tokenizer.end_of_text == tokenizer.vocab_size - 1
        assert rows[-1] == 0


def change(spec: dict, where: str, value) -> None:
    *names, last = where.split(".")
    for name in names:
        spec = spec[int(name)] if isinstance(spec, list) else spec[name]
    spec[last] = value


QWEN_SPLIT = "pre_tokenizer.pretokenizers.0"


@pytest.mark.parametrize(
    ("kind", "where", "value", "message"),
    [
        ("gpt2", "model.type", "WordPiece", "it is a WordPiece, not a byte-pair encoding"),
        ("gpt2", "model.dropout", 0.1, "has dropout 0.1"),
        ("gpt2", "model.end_of_word_suffix", "</w>", "has end_of_word_suffix '</w>'"),
        ("gpt2", "model.continuing_subword_prefix", "##", "has continuing_subword_prefix '##'"),
        ("gpt2", "normalizer", {"type": "Lowercase"}, "it normalizes text (Lowercase)"),
        ("gpt2", "pre_tokenizer", None, "it splits text by [None]"),
        ("gpt2", "pre_tokenizer.type", "Metaspace", "it splits text by ['Metaspace']"),
        ("gpt2", "pre_tokenizer.add_prefix_space", True, "it adds a space before each text"),
        ("gpt2", "pre_tokenizer.use_regex", False, "it does not split text"),
        (
            "qwen3",
            "pre_tokenizer.pretokenizers.1.use_regex",
            True,
            "it splits text by two patterns",
        ),
        ("qwen3", f"{QWEN_SPLIT}.behavior", "MergedWithNext", "MergedWithNext"),
        ("qwen3", f"{QWEN_SPLIT}.invert", True, "it splits text by {'type': 'Split'"),
        ("qwen3", f"{QWEN_SPLIT}.pattern", {"String": " "}, "it splits text by {'type': 'Split'"),
        ("qwen3", f"{QWEN_SPLIT}.pattern.Regex", "(", "its split pattern is invalid here"),
        ("qwen3", f"{QWEN_SPLIT}.pattern.Regex", r"\p{L}+", "its split pattern drops text"),
        (
            "gpt2",
            "model",
            {"type": "BPE", "vocab": {"a": 0, "ç": 1}, "merges": []},  # 0xE7 begins 猫
            "has no token for 64 of the bytes that continue a character, the first is 0x80",
        ),
        ("gpt2", "model.merges", [["t", "h", "e"]], "can't be read (ValueError"),
        ("gpt2", "model.merges", [["猫", "e"]], "can't be read (KeyError"),
        ("gpt2", "model", [], "can't be read (AttributeError"),
    ],
)
def test_unsupported_tokenizers_are_refused_in_one_line(
    folders, tmp_path, kind, where, value, message
):
    spec = json.loads((folders / kind / "tokenizer.json").read_text(encoding="utf-8"))
    change(spec, where, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(UserError) as error:
        from_hf(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_a_bare_file_is_the_tokenizer_of_its_folder(folders, tmp_path, kind):
    """With what tokenizer_config.json says of special tokens, if there is one."""
    expected, rows = from_hf(folders / kind)
    found, found_rows = from_hf(folders / kind / "tokenizer.json")
    assert found == expected
    assert found_rows.tolist() == rows.tolist()
    alone = tmp_path / "any name.json"
    alone.write_bytes((folders / kind / "tokenizer.json").read_bytes())
    found, found_rows = from_hf(alone)
    assert (found.tokens, found.special) == (expected.tokens, expected.special)
    assert found.end_of_text == expected.end_of_text
    assert found.end_names == []
    assert found_rows.tolist() == rows.tolist()
    with pytest.raises(UserError, match=r"nothing\.json': no such file"):
        from_hf(tmp_path / "nothing.json")


def test_no_tokenizer_or_a_damaged_one(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json, nor a vocab\.json"):
        from_hf(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match="can't be read"):
        from_hf(tmp_path)


# The check on the whole text


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_the_check_reads_all_of_the_text(folders, kind):
    tokenizer, _ = from_hf(folders / kind)
    parts = [TEXT, None, "two parts", " of one ", ODD, None, "x", None]
    tokens = tokenizer.encode_parts(parts)
    assert check_ids(folders / kind, tokens, parts)
    for place in (0, 1, len(tokens) // 2, len(tokens) - 2, len(tokens) - 1):
        wrong = tokens.copy()
        wrong[place] = (wrong[place] + 1) % 256
        with pytest.raises(UserError, match="splits this text differently"):
            check_ids(folders / kind, wrong, parts)
    with pytest.raises(UserError, match="splits this text"):
        check_ids(folders / kind, tokens[:-3], parts)


def test_merges_that_contradict_the_ranks_are_found(folders, tmp_path):
    """zqx, by its merges: zq first, after which none leads to z + qx; tiktoken finds zq + x."""
    spec = json.loads((folders / "gpt2" / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["vocab"] |= {"zq": 1000, "qx": 1001, "zqx": 1002}
    spec["model"]["merges"] = [["z", "q"], ["q", "x"], ["z", "qx"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    tokenizer, _ = from_hf(tmp_path)
    with pytest.raises(UserError, match="near 'a zqx'"):
        check_ids(tmp_path, tokenizer.encode("a zqx"), ["a zqx"])
    assert check_ids(tmp_path, tokenizer.encode("a qx"), ["a qx"])


def test_another_tokenizer_has_another_fingerprint(folders):
    kinds = [fingerprint_of(folders / kind) for kind in ("gpt2", "qwen3")]
    assert len({*kinds}) == 2
    assert fingerprint_of(folders / "gpt2") == kinds[0]


def test_transformers_is_imported_only_for_a_folder(tmp_path):
    code = (
        "import sys\n"
        "from lit_gpt.command import run\n"
        "from lit_gpt.huggingface.tokenizer import from_hf\n"
        "print(sorted({'transformers', 'tokenizers', 'safetensors'} & set(sys.modules)))\n"
        "sys.modules['transformers'] = None\n"
        "sys.exit(run(lambda: from_hf('.')))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert result.stdout == "[]\n"
    message = "error: Hugging Face folders need the package transformers; install it with "
    message += 'pip install -e ".[hf]"\n'
    assert (result.stderr, result.returncode) == (message, 2)
