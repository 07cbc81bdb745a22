"""generate --chat: a message is answered by the model's template, at once and turn by turn."""

from __future__ import annotations

import io
import json

import pytest

from lit_gpt.__main__ import main
from lit_gpt.checkpoint import load_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.generation.completion import Request, complete
from lit_gpt.generation.sampling import Sampling
from lit_gpt.text.chat import PLAIN, ChatTemplate, check_template
from lit_gpt.text.vocabularies import load_tokenizer
from tests.generation.models import save_model, small_model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NAMES = ["<|begin|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
USER, ASSISTANT, SYSTEM, END = range(257, 261)
BEGIN = 256


def tokenizer_of(kind: str):
    tokenizer = load_tokenizer("bytes")
    if kind == "plain":
        return tokenizer.with_end_of_text()
    tokenizer = tokenizer.with_special(NAMES, {"bos_token": NAMES[0]}, [], ["<|end|>"])
    tokenizer = tokenizer.with_end_of_text()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    paths = {}
    for kind in ("plain", "template"):
        tokenizer = tokenizer_of(kind)
        path = tmp_path_factory.mktemp("chat") / f"{kind}.ckpt"
        paths[kind] = save_model(small_model(tokenizer.vocab_size, 96), tokenizer, path)
    return paths


@pytest.fixture
def generate(checkpoints, capsys, monkeypatch):
    """`generate("plain", "--prompt=a")`: what the command prints."""

    def call(kind: str, *argv: str, stdin: str = "", status: int = 0) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        words = [f"--ckpt_path={checkpoints[kind]}", "--max_new_tokens=8", *argv]
        words += [] if "--system=no chat" in argv else ["--chat"]
        assert main(["generate", *words]) == status
        out, err = capsys.readouterr()
        return err if status else out

    return call


def expected(path, ids: list[int], seed: int = 1337, stop: tuple[str, ...] = ()) -> str:
    model, tokenizer = load_checkpoint(path)
    request = Request(ids=tuple(ids), max_new_tokens=8, seed=seed, stop=stop, sampling=Sampling())
    return "".join(piece.text for piece in complete(model, tokenizer, [request]))


def turn(role: int, text: str) -> list[int]:
    return [role, 10, *text.encode(), END]


def test_an_answer_follows_the_model_s_template(generate, checkpoints):
    path = checkpoints["template"]
    asked = [BEGIN, *turn(USER, "Hi 猫"), ASSISTANT, 10]
    assert generate("template", "--prompt=Hi 猫") == f"{expected(path, asked)}\n"
    asked[1:1] = turn(SYSTEM, "Be brief.")
    found = generate("template", "--prompt=Hi 猫", "--system=Be brief.", "--json")
    line = json.loads(found)
    assert (line["prompt"], line["text"]) == ("Hi 猫", expected(path, asked))


def test_a_model_without_a_template_gets_the_plain_one(generate, checkpoints):
    asked = list(b"System:\nBe brief.\n\nUser:\nHi\n\nAssistant:\n")
    stop = ("\n\nUser:", "\n\nSystem:")
    found = generate("plain", "--prompt=Hi", "--system=Be brief.", "--seed=3")
    assert found == f"{expected(checkpoints['plain'], asked, 3, stop)}\n"


def test_each_answer_sees_the_turns_before_it(generate, checkpoints):
    path = checkpoints["template"]
    lines = ["one", "two", "/more", "/history", "/new", "one", "/system S", "one"]
    greeting, *said = generate("template", "--interactive", stdin="\n".join(lines)).split("> ")
    assert greeting == "Type a message; /help lists the commands.\n"
    first = [BEGIN, *turn(USER, "one"), ASSISTANT, 10]
    answer = expected(path, first)
    second = [*first, *answer.encode(), END, *turn(USER, "two"), ASSISTANT, 10]
    other = expected(path, second, 1338)
    more = expected(path, [*second, *other.encode()], 1339)
    assert said[:3] == [f"{answer}\n", f"{other}\n", f"{more}\n"]
    assert said[3:6] == ["", f"one\n{answer}\n", f"two\n{other}{more}\n"]  # of /history
    assert said[7] == f"{expected(path, first, 1340)}\n"
    assert said[9] == f"{expected(path, [BEGIN, *turn(SYSTEM, 'S'), *first[1:]], 1341)}\n"


def test_what_is_not_text_is_one_line_of_a_session(generate):
    lines = ["/system \udcff", "Hi", "/system S", "\udcff", "Hi"]
    _, *said = generate("template", "--interactive", stdin="\n".join(lines)).split("> ")
    hint = "is not valid Unicode text; check the terminal's encoding\n"
    assert said[1] == f"error: /system: {hint}"
    assert said[3] == f"error: the message {hint}"
    assert "error" not in said[4]


def test_the_oldest_turn_gives_way(generate):
    message = "x" * 40  # the context has 96 tokens
    said = generate("template", "--interactive", stdin=f"{message}\n{message}\n{'y' * 95}")
    _, first, second, third, _ = said.split("> ")
    assert "no longer fits" not in first
    assert second.startswith(
        "(The oldest turn no longer fits into the context, and is left out.)\n"
    )
    assert "error: the conversation has 101 tokens, the model's context 96; write a sh" in third


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--chat: needs a message to answer; give one with --prompt, or add --interactive"),
        (["--prompt=" + "x" * 90], "the conversation has 96 tokens, the model's context 96"),
        (
            ["--prompt=a", "--system=\udcff"],
            "--system: is not valid Unicode text; check the terminal's encoding",
        ),
        (["--system=no chat", "--prompt=a"], "--system: only applies to chats; add --chat"),
    ],
)
def test_what_can_t_be_answered_is_refused(generate, argv, message):
    found = generate("template", *argv, status=2)
    assert found.startswith("error: ")
    assert message in found


# Templates


def test_the_plain_template():
    messages = [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye"},
    ]
    text = "System:\nBe brief.\n\nUser:\nHi\n\nAssistant:\nYes?\n\nUser:\nBye\n\n"
    assert PLAIN.render(messages) == text
    assert PLAIN.render(messages, add_generation_prompt=True) == f"{text}Assistant:\n"
    with_end = ChatTemplate.of(load_tokenizer("bytes").with_end_of_text())
    ended = text.replace("Yes?\n\n", "Yes?<|endoftext|>")
    assert with_end.render(messages) == ended


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{%- for m in messages -%}\n  {{ m.content }}\n{%- endfor %}!", "Hi!"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hi"),
        ("{%- generation -%} x {%- endgeneration -%} ", "x"),
        ("  {%+ generation +%}x{%+ endgeneration %}", "  x"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = 3 %}{{ ns.n }}{{ tools }}", "3None"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
    ],
)
def test_templates_render_as_in_transformers(source, text):
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "Hi"}]
    assert ChatTemplate(source).render(messages) == text
    assert render_jinja_template([messages], chat_template=source)[0] == [text]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "refuses this: Roles must alternate"),
        ("{{ messages.append(1) }}", "is not safely callable|unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|__class__"),
        ("{{ lipsum.__globals__['os'].name }}", "unsafe|__globals__"),
        ("{{ messages[9].content }}", "refuses this"),
        ("{{ 1 / 0 }}", "refuses this: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses this: maximum recursion"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "refuses this"),
    ],
)
def test_a_template_runs_in_a_sandbox(source, message):
    with pytest.raises(UserError, match=message) as error:
        ChatTemplate(source).render([{"role": "user", "content": "Hi"}])
    assert "\n" not in str(error.value)


def test_messages_that_are_none():
    for message in ({"role": "user"}, {"content": "x"}, {"role": "user", "content": ["x"]}):
        with pytest.raises(UserError, match="must have a role and a content, both texts"):
            PLAIN.render([message])


def test_a_template_is_checked_without_running_it():
    check_template("{{ raise_exception('x') }}")
    with pytest.raises(ValueError, match="its chat template has an error"):
        check_template("{% if %}")
    with pytest.raises(ValueError, match="longer than 200,000 characters"):
        check_template("x" * 200_001)
