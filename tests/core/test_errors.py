"""How a UserError reads."""

from lit_gpt.errors import UserError


def test_a_message_is_one_line_without_control_characters():
    error = UserError(
        "of \x1b[2Jred.txt\nis \x07 text", field="path", value="农\x9b", hint="use `b`"
    )
    expected = r"path '农\x9b': of \x1b[2Jred.txt is \x07 text; use b"
    assert str(error) == expected
