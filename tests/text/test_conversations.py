"""Conversations in documents: which rows hold them, which tokens count, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_gpt.errors import UserError
from lit_gpt.generation.completion import encode_prompt
from lit_gpt.text import encoding_pool, token_file
from lit_gpt.text.answers import encode_conversations, is_answer, is_start, split_flags
from lit_gpt.text.chat import ChatTemplate
from lit_gpt.text.conversations import Conversation
from lit_gpt.text.corpus import Corpus, load_corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.splits import split_text
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import Vocabulary, load_tokenizer
from tests.chats import (
    ASSISTANT,
    CHATML,
    GENERATION,
    QWEN3,
    THOUGHTS,
    USER,
    chat_tokenizer,
    their_tokenizer,
    turns,
    write_rows,
)

HI = turns("Hi", "Hello.")


@pytest.fixture
def read(tmp_path):
    def read(path: Path, tokenizer: Any = "bytes", **settings: Any) -> Corpus:
        text = TextFiles(str(path), cache=str(tmp_path / "cache"), **settings)
        return load_corpus(text, Vocabulary(tokenizer))

    return read


def shown(corpus: Corpus, flags: np.ndarray | None = None) -> list[tuple[str, str]]:
    """The text of each conversation, and of its tokens that count, special tokens by name."""
    tokenizer = corpus.tokenizer
    names = [*tokenizer.tokens]
    for name, i in tokenizer.special.items():
        names[i] = name.encode()
    assert corpus.flags is not None
    starts = np.flatnonzero(is_start(corpus.flags))
    assert starts[0] == 0
    found = []
    parts = (np.split(part, starts[1:]) for part in (corpus.tokens, corpus.flags))
    for ids, flags in zip(*parts, strict=True):
        texts = (b"".join(names[i] for i in part) for part in (ids, ids[is_answer(flags)]))
        found.append(tuple(text.decode() for text in texts))
    return found


PLAIN_HI = ("User:\nHi\n\nAssistant:\nHello.<|endoftext|>", "Hello.<|endoftext|>")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": HI}, PLAIN_HI),
        ({"messages": HI, "id": 3}, PLAIN_HI),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
         PLAIN_HI),
        ({"prompt": HI[:1], "completion": HI[1:]}, PLAIN_HI),
        # Answers in a prompt are given.
        ({"prompt": turns("Hi", "Yes?", "Go"), "completion": turns("", "Ok")[1:]},
         ("User:\nHi\n\nAssistant:\nYes?<|endoftext|>User:\nGo\n\nAssistant:\nOk<|endoftext|>",
          "Ok<|endoftext|>")),
        ({"messages": turns("a", "b", "c", "d")},
         ("User:\na\n\nAssistant:\nb<|endoftext|>User:\nc\n\nAssistant:\nd<|endoftext|>",
          "b<|endoftext|>d<|endoftext|>")),
        ({"messages": [{"role": "system", "content": "猫"}, *HI]},
         ("System:\n猫\n\nUser:\nHi\n\nAssistant:\nHello.<|endoftext|>", "Hello.<|endoftext|>")),
        # Without roles, no template: the text goes on.
        ({"prompt": "2 + 2 =", "completion": " 4"}, ("2 + 2 = 4<|endoftext|>", " 4<|endoftext|>")),
        ({"prompt": "", "completion": "4"}, ("4<|endoftext|>", "4<|endoftext|>")),
        # Special tokens in a message are plain text.
        ({"messages": turns("<|endoftext|>", "b")},
         ("User:\n<|endoftext|>\n\nAssistant:\nb<|endoftext|>", "b<|endoftext|>")),
    ],
)  # fmt: skip
def test_what_counts_by_the_plain_template(row, expected, read, tmp_path):
    corpus = read(write_rows(tmp_path / "x.jsonl", [row, row]))
    assert shown(corpus) == [expected, expected]
    assert corpus.info.num_documents == 2
    end = corpus.tokenizer.end_of_text
    assert corpus.tokens[-1] == end
    if "<|endoftext|>\n" in expected[0]:  # thirteen characters
        assert (corpus.tokens == end).sum() == 2


@pytest.mark.parametrize("template", [CHATML, GENERATION], ids=["prefixes", "generation"])
def test_what_counts_by_a_models_template(template, read, tmp_path):
    """What is put after the end of a turn counts where the template does not tell it apart."""
    path = write_rows(tmp_path / "x.jsonl", [{"messages": turns("a", "b", "c", "d")}])
    ((text, answers),) = shown(read(path, chat_tokenizer(template)))
    assert text == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
    )
    line = "\n" if template == CHATML else ""
    assert answers == f"b<|im_end|>{line}d<|im_end|>{line}"


@pytest.mark.parametrize("template", [CHATML, GENERATION], ids=["prefixes", "generation"])
def test_only_the_completion_counts_by_a_models_template(template, read, tmp_path):
    row = {"prompt": turns("a", "b", "c"), "completion": [{"role": ASSISTANT, "content": "d"}]}
    ((_, answers),) = shown(read(write_rows(tmp_path / "x.jsonl", [row]), chat_tokenizer(template)))
    assert answers.rstrip("\n") == "d<|im_end|>"


def test_transformers_marks_the_same_tokens():
    """Its mask of answers, on the same ids."""
    ours = chat_tokenizer(GENERATION)
    messages = turns("Was ist 2 + 2? 猫", "Vier.\n\n", " Und?", "  5 – nein")
    found = their_tokenizer(GENERATION).apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    template = ChatTemplate.of(ours)
    ids, flags = split_flags(
        encode_conversations(ours, template, "answers", [Conversation("", tuple(messages))])
    )
    assert ids.tolist() == found["input_ids"]
    assert is_answer(flags).astype(int).tolist() == found["assistant_masks"]
    assert 0 < is_answer(flags).sum() < len(ids) / 2


def test_an_answer_is_encoded_as_it_is_generated(read, tmp_path):
    """By cl100k_base "\\n\\n" is a token; after a prompt that ends with a line, it can't come."""
    row = {"messages": turns("a", "\n\nb")}
    corpus = read(write_rows(tmp_path / "x.jsonl", [row]), chat_like_cl100k())
    tokenizer = corpus.tokenizer
    prompt = tokenizer.encode_chat("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")
    assert corpus.tokens[: len(prompt)].tolist() == prompt.tolist()
    assert tokenizer.decode(corpus.tokens[[len(prompt)]].tolist()) == "\n\n"
    assert not is_answer(corpus.flags[: len(prompt)]).any()


def chat_like_cl100k() -> Tokenizer:
    plain = load_tokenizer("cl100k_base")
    tokenizer = plain.with_special(["<|im_start|>", "<|im_end|>"], {}, [], ["<|im_end|>"])
    tokenizer.chat_template = CHATML
    return tokenizer


def test_all_tokens_count(read, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"messages": HI}])
    corpus = read(path, loss_on="all")
    assert is_answer(corpus.flags).all()
    assert corpus.tokens.tolist() == read(path).tokens.tolist()
    assert corpus.folder != read(path).folder
    assert read(path, loss_on="answers").folder == read(path).folder


def test_a_text_field_is_plain_text_unless_the_loss_says_otherwise(read, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"chat": HI, "q": "Hi", "a": "Hello."}])
    assert read(path, text_field="chat").flags is None
    assert shown(read(path, text_field="chat", loss_on="answers")) == [PLAIN_HI]
    assert is_answer(read(path, text_field="chat", loss_on="all").flags).all()
    pair = shown(read(path, text_field=["q", "a"], loss_on="answers"))
    assert pair == [("HiHello.<|endoftext|>", "Hello.<|endoftext|>")]
    assert read(path, text_field=["q", "a"], loss_on="all").flags is None
    assert read(path, text_field="q", loss_on="all").flags is None


@pytest.mark.parametrize("prompt", ["2 + 2 =", ""])
def test_a_prompt_starts_as_in_generation(prompt, read, tmp_path):
    """With the tokens that a model's tokenizer puts before a text, such as Llama 3's."""
    tokenizer = chat_tokenizer(more=["<|begin|>"])
    tokenizer.start_names = ["<|begin|>"]
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": prompt, "completion": " 4"}])
    corpus = read(path, tokenizer)
    asked = encode_prompt(tokenizer, prompt)
    assert asked[0] == tokenizer.special["<|begin|>"]
    answer = [*b" 4", tokenizer.special["<|im_end|>"]]
    assert corpus.tokens.tolist() == [*asked, *answer]
    assert is_answer(corpus.flags).tolist() == [False] * len(asked) + [True] * len(answer)


def test_rows_with_a_text_are_plain_text(read, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"text": "a", "messages": HI}])
    corpus = read(path)
    assert corpus.flags is None
    assert corpus.tokenizer.decode(corpus.tokens.tolist()) == "a\n\n"


@pytest.mark.parametrize("name", ["x.json", "x.jsonl.gz", "x.parquet", "x.parquet.gz", "x.zip"])
def test_files_of_all_kinds(name, read, tmp_path):
    import gzip
    import zipfile

    rows = [{"messages": HI}, {"messages": turns("a", "b")}]
    path = tmp_path / name
    lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    if ".parquet" in name:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"id": [1, 2], "messages": [HI, turns("a", "b")]}), path)
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("in.jsonl", lines)
    else:
        path.write_text(json.dumps(rows))
    assert shown(read(path)) == [
        PLAIN_HI,
        ("User:\na\n\nAssistant:\nb<|endoftext|>", "b<|endoftext|>"),
    ]


def test_parquet_with_prompts_and_completions(read, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"prompt": ["a"], "completion": ["b"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    lists = pyarrow.table({"prompt": [HI[:1]], "completion": [HI[1:]]})
    parquet.write_table(lists, tmp_path / "b.parquet")
    assert shown(read(tmp_path)) == [("ab<|endoftext|>", "b<|endoftext|>"), PLAIN_HI]
    parquet.write_table(pyarrow.table({"title": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet holds no conversation; a row needs the field"):
        read(tmp_path)


def test_a_long_conversation_is_read_in_pieces(read, tmp_path, monkeypatch):
    from lit_gpt.text import json_rows

    monkeypatch.setattr(json_rows, "LONG", 100)
    monkeypatch.setattr(json_rows, "SHORT", 10)
    question, answer = "What? " * 100, "猫 " * 200
    corpus = read(write_rows(tmp_path / "x.jsonl", [{"messages": turns(question, answer)}]))
    assert shown(corpus)[0][1] == f"{answer.strip()}<|endoftext|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "'messages' is empty"),
        ({"messages": None}, "'messages' holds null, not a list of messages"),
        ({"messages": "Hi"}, "'messages' holds a text, not a list of messages"),
        ({"messages": HI[:1]}, "'messages' has no message of the assistant to learn"),
        ({"messages": [*HI[:1], {"role": "bot", "content": "x"}]},
         "'messages', message 2 has the role 'bot'; use one of system, user, assistant, tool"),
        ({"messages": [{"content": "x"}]}, "'messages', message 1 has no role; messages look like"),
        ({"messages": ["Hi"]}, "'messages', message 1 has no role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1 has the role ['user']"),
        ({"messages": [{"role": USER, "content": 3}]},
         "message 1: 'content' holds a number, not text"),
        ({"messages": [{"role": USER}]}, "message 1: 'content' holds null, not text"),
        ({"messages": [{"role": USER, "content": [{"type": "text", "text": "x"}]}]},
         "message 1: 'content' holds a list, not text"),
        ({"messages": turns("a", " \n")}, "'messages', message 2 is an empty answer"),
        ({"prompt": "a", "completion": " "}, "'completion' is empty, so there is nothing to learn"),
        ({"prompt": "a", "completion": HI[1:]}, "'prompt' holds a text, not a list of messages"),
        ({"prompt": HI, "completion": HI[:1]}, "'completion' has no message of the assistant"),
        ({"prompt": "a"}, "holds no conversation; a row needs the field"),
        ("Hi", "holds no conversation"),
        (["Hi"], "holds no conversation"),
        ({"text": "Hi"}, "holds no conversation"),
        ({"messages": [{"role": USER, "content": "\ud800"}]}, "is not valid Unicode text"),
    ],
)  # fmt: skip
def test_what_is_refused_names_file_and_line(row, message, read, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps({'messages': HI})}\n\n{json.dumps(row)}\n")
    with pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert line.startswith(f"{path}, line 3")
    assert message in line
    assert len(line) < len(str(path)) + 200


def test_a_plain_text_among_conversations_is_refused(read, tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"messages": HI}])
    (tmp_path / "README.md").write_text("# Data")
    with pytest.raises(UserError, match=r"README\.md is plain text, among files with conversa"):
        read(tmp_path)
    assert len(shown(read(tmp_path, exclude="*.md"))) == 1


def test_answers_of_a_text_without_any(read, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"text": "a"}])
    (tmp_path / "x.txt").write_text("a")
    for name in (path, tmp_path / "x.txt"):
        with pytest.raises(UserError) as caught:
            read(name, loss_on="answers")
        assert caught.value.field == "loss_on"
        assert "there are no conversations in the text" in str(caught.value)


def test_a_template_that_hides_its_answers_is_refused(read, tmp_path):
    hides = "{% for m in messages %}{{ '!' if loop.last }}{{ m['content'] }}{% endfor %}"
    path = write_rows(tmp_path / "x.jsonl", [{"messages": turns("a", "b", "c", "d")}])
    with pytest.raises(UserError) as caught:
        read(path, chat_tokenizer(hides))
    assert str(caught.value).startswith(f"{path}, line 1: the model's chat template renders")
    assert shown(read(path, chat_tokenizer(hides), loss_on="all")) == [("abc!d", "abc!d")]
    refuses = "{% if messages|length > 1 %}{{ raise_exception('Only one!') }}{% endif %}"
    with pytest.raises(UserError, match=r"line 1: the model's chat template refuses.* Only one!"):
        read(path, chat_tokenizer(refuses))
    leaves_out = "{% for m in messages %}{{ m['role'] }} {% endfor %}"
    with pytest.raises(UserError, match="line 1: the model's chat template leaves out the answer"):
        read(path, chat_tokenizer(leaves_out))
    marks_none = "{% generation %}{% endgeneration %}x"
    with pytest.raises(UserError, match="line 1: the model's chat template marks no answer"):
        read(path, chat_tokenizer(marks_none))


def test_thoughts_before_the_last_answer_alone(read, tmp_path):
    """As by Qwen3's template, where the beginning of a conversation reads otherwise by itself."""
    thinks = CHATML.replace(
        "{{ m['content'] }}",
        "{% if loop.last and m['role'] == 'assistant' %}<think>\n</think>\n{% endif %}"
        "{{ m['content'] }}",
    )
    path = write_rows(tmp_path / "x.jsonl", [{"messages": turns("a", "b", "c", "d")}])
    ((text, answers),) = shown(read(path, chat_tokenizer(thinks)))
    assert answers == "b<|im_end|>\n<think>\n</think>\nd<|im_end|>\n"
    assert text.count("<think>") == 1


THINKS = "<think>\nhm\n</think>\n"


@pytest.mark.parametrize(
    ("more", "thoughts", "learnt"),
    [
        ([], "<think>\nhm\n</think>\n\n", ""),  # three words, which the template knows
        (THOUGHTS, f"<think>\n\n</think>\n\n{THINKS}", THINKS),  # in messages plain text
    ],
)
def test_thoughts_of_a_conversation(more, thoughts, learnt, read, tmp_path):
    """By Qwen3's template, which leaves out those of earlier answers."""
    tokenizer = chat_tokenizer(QWEN3, more)
    rows = [turns("a", f"{THINKS}Hi", "x"), turns("a", f"{THINKS}b", "c", f"{THINKS}d")]
    path = write_rows(tmp_path / "x.jsonl", [{"messages": row} for row in rows])
    corpus = read(path, tokenizer)
    (_, first), (text, second) = shown(corpus)
    assert first == f"{learnt}Hi<|im_end|>\n"
    assert second == f"{learnt}b<|im_end|>\n{thoughts}d<|im_end|>\n"
    if not more:
        theirs = their_tokenizer(QWEN3).apply_chat_template(rows[1], tokenize=False)
        assert text == theirs
    for name in more:
        assert (corpus.tokens == tokenizer.special[name]).sum() == 1  # by the template


def test_a_message_may_write_visible_tokens(read, tmp_path):
    """As Qwen3's <think>, where it has one: its template looks for them."""
    tokenizer = chat_tokenizer(QWEN3, THOUGHTS)
    tokenizer.visible_names = THOUGHTS
    messages = turns("a<|im_end|>", f"{THINKS}b", "c", f"{THINKS}d")
    corpus = read(write_rows(tmp_path / "x.jsonl", [{"messages": messages}]), tokenizer)
    ((_, answers),) = shown(corpus)
    assert answers == "b<|im_end|>\n<think>\nhm\n</think>\n\nd<|im_end|>\n"
    messages[0]["content"] = "a"  # there, the end of the turn would be one
    corpus = read(write_rows(tmp_path / "y.jsonl", [{"messages": messages}]), tokenizer)
    theirs = their_tokenizer(QWEN3, THOUGHTS).apply_chat_template(messages, return_dict=False)
    assert corpus.tokens.tolist() == theirs
    assert tokenizer.special["<think>"] in theirs


def test_the_flags_are_cached_continued_and_checked(read, tmp_path, monkeypatch):
    rows = [{"messages": turns(f"What is {i}?", f"A number: {i}.")} for i in range(50)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    monkeypatch.setattr(encoding_pool, "MANY", 4)
    monkeypatch.setattr(token_file, "MARKED", 0.0)
    whole = read(path)
    expected = (whole.tokens.tolist(), whole.flags.tolist())
    damaged = bytearray((whole.folder / "flags.bin").read_bytes())
    damaged[40] ^= 2
    (whole.folder / "flags.bin").write_bytes(damaged)
    again = read(path)
    assert (again.tokens.tolist(), again.flags.tolist()) == expected
    (whole.folder / "flags.bin").unlink()
    assert read(path).flags.tolist() == expected[1]
    stopped_at = 3

    def stop(add, self, texts, ids):
        nonlocal stopped_at
        add(self, texts, ids)
        stopped_at -= 1
        if not stopped_at:
            raise KeyboardInterrupt

    from lit_gpt.text import manifest

    monkeypatch.setattr(manifest, "LARGE", 1)  # so that what is begun is continued
    add = token_file._Ids.add
    monkeypatch.setattr(token_file._Ids, "add", lambda *args: stop(add, *args))
    other = write_rows(tmp_path / "y.jsonl", rows)
    for file in whole.folder.iterdir():
        file.unlink()
    with pytest.raises(KeyboardInterrupt):
        read(other)
    monkeypatch.setattr(token_file._Ids, "add", add)
    continued = read(other)
    assert (continued.tokens.tolist(), continued.flags.tolist()) == expected


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, 5), (0.9, 9), (0.99, 9), (0.01, 1)])
def test_the_split_is_between_conversations(fraction, expected, tmp_path):
    rows = [{"messages": turns("a", "b")}] * 10
    path = write_rows(tmp_path / "x.jsonl", rows)
    text = TextFiles(str(path), cache=str(tmp_path / "cache"))
    splits = split_text(text, Vocabulary("bytes"), fraction)
    size = len("User:\na\n\nAssistant:\nb") + 1
    assert (len(splits.train), len(splits.val)) == (expected * size, (10 - expected) * size)
    assert len(splits.train_flags) == len(splits.train)
    assert is_start(splits.val_flags)[0]


def test_one_conversation_is_not_split(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"messages": HI}])
    text = TextFiles(str(path), cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="holds one conversation, and at least two") as caught:
        split_text(text, Vocabulary("bytes"), 0.9)
    assert caught.value.field == "path"


@pytest.mark.parametrize("tokenizer", ["bpe:270", "chars", "cl100k_base"])
def test_vocabularies_are_made_of_conversations(tokenizer, read, tmp_path):
    rows = [{"messages": turns(f"What is {i}? 猫", f"A number: {i}.")} for i in range(30)]
    corpus = read(write_rows(tmp_path / "x.jsonl", rows), tokenizer)
    assert shown(corpus)[7] == (
        "User:\nWhat is 7? 猫\n\nAssistant:\nA number: 7.<|endoftext|>",
        "A number: 7.<|endoftext|>",
    )
    if tokenizer != "cl100k_base":
        made = {b"As" if tokenizer == "bpe:270" else "猫".encode()}
        assert made & set(corpus.tokenizer.tokens)


def test_they_are_encoded_as_text_a_batch_at_a_time(read, tmp_path, monkeypatch):
    """Not all at once, which would take the memory of the whole text."""
    rows = [{"messages": turns("Count", f"{i} " * 20_000)} for i in range(30)]
    corpus = read(write_rows(tmp_path / "x.jsonl", rows), chat_tokenizer())
    encode_parts = Tokenizer.encode_parts
    sizes = []

    def encode(tokenizer: Tokenizer, texts: list[str | None]) -> np.ndarray:
        sizes.append(sum(len(text or "") for text in texts))
        return encode_parts(tokenizer, texts)

    monkeypatch.setattr(Tokenizer, "encode_parts", encode)
    found = corpus.as_text
    assert len(sizes) > 2
    assert max(sizes) < 2 * encoding_pool.BATCH
    assert found.flags is None
    expected = encode_parts(corpus.tokenizer, list(corpus.parts()))
    assert np.array_equal(found.tokens, expected)
