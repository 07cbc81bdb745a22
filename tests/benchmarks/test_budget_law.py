"""The runs that the law of --budget is fitted to, and the fit."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest

from benchmarks import budget_law
from benchmarks.budget_law import FITTED_TEXTS, ROWS, fit_law, main, predicted, read_rows
from lit_gpt.budget.law import FITTED
from lit_gpt.command import run
from tests.conftest import WORDS


def test_the_law_of_the_package_is_the_one_fitted_to_the_data():
    rows = [row for row in read_rows(str(ROWS)) if row.text in FITTED_TEXTS]
    assert asdict(fit_law(rows)) == pytest.approx(asdict(FITTED), rel=0.1)


def test_the_law_orders_the_runs_on_texts_that_it_was_not_fitted_to():
    """Half of all pairs that differ by more than 3 % would be right by chance."""
    rows = [row for row in read_rows(str(ROWS)) if row.text not in FITTED_TEXTS]
    pairs = [
        (predicted(a, FITTED) - predicted(b, FITTED)) * (a.bits_per_byte - b.bits_per_byte)
        for a in rows
        for b in rows
        if a.text < b.text and abs(math.log(a.bits_per_byte / b.bits_per_byte)) > 0.03
    ]
    assert sum(product > 0 for product in pairs) > 0.9 * len(pairs) > 20


def test_a_run_adds_a_row_with_what_it_reached(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(budget_law, "CONTEXT", 16)
    text = tmp_path / "words.txt"
    text.write_text(f"{WORDS}\n" * 200, encoding="utf-8")
    out = tmp_path / "rows.csv"
    argv = ["train", "--path", str(text), "--tokenizer", "chars", "--d_model", "32"]
    argv += ["--num_blocks", "1", "--context_length", "16", "--steps", "3", "--out", str(out)]
    argv += ["--output_spelling_rows", "0"]  # without which the law is fitted
    for _ in range(2):
        assert run(lambda: main([*argv, "--cache", str(tmp_path)])) == 0
    first, second = read_rows(str(out))
    assert first == second
    assert (first.text, first.d_model, first.weights) == ("words", 32, 4 * 32**2 + 3 * 88 * 32)
    assert 0 < first.bits_per_byte < 8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fly"], "no command 'fly'; use one of train, fit"),
        (["fit", "--path", "none.csv"], "path 'none.csv': no text file"),
        (["fit", "--path", "pyproject.toml"], "'pyproject.toml': has other columns"),
        (["train", "--path", "none.txt"], "path 'none.txt': no such file"),
    ],
)
def test_wrong_input_is_one_line(args, message, capsys):
    assert run(lambda: main(args)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
