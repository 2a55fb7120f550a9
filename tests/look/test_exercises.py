"""Exercises that check themselves: what is said of a function that is right, wrong, unwritten, no Python, or stops."""
import numpy as np
import pytest
from fastcore.test import test_close as close
from fastcore.test import test_eq as same
from IPython.core.interactiveshell import InteractiveShell

from spml_kit.look.exercises import check


def half(x): return x/2
def twice(x): return 2*x
def unwritten(x): ...
def stops(x): return half(x)/0
def halves(f): assert f(3) == 1.5, f"f(3) is {f(3)}"


def test_what_is_right_is_said_and_nothing_else(capsys):
    assert check(half, hint="never shown")(halves) is True
    assert capsys.readouterr().out == "`half`: right.\n"


@pytest.mark.parametrize("f, said, hinted", [
    (unwritten, "`unwritten`: not written yet", False),
    (twice, "`twice`: not right yet. This test fails:\n    def halves(f): assert f(3) == 1.5, f\"f(3) is {f(3)}\"\n    f(3) is 6", True),
    (stops, "`stops`: stopped by ZeroDivisionError: float division by zero\n    in `stops`: def stops(x): return half(x)/0", True)], ids=["unwritten", "wrong", "stops"])
def test_what_is_not_right_names_the_line(f, said, hinted, capsys):
    assert check(f, hint="Divide by two.")(halves) is False
    out = capsys.readouterr().out
    assert out.startswith(said) and ("Hint: Divide by two." in out) == hinted # nobody has tried yet
    assert check(f)(halves) is False and "Hint" not in capsys.readouterr().out


def test_several_functions_are_tested_together(capsys):
    @check(half, twice)
    def undone(f, g): assert g(f(7)) == 7
    assert undone is True and capsys.readouterr().out == "`half`, `twice`: right.\n"

    @check(half, unwritten)
    def missing(f, g): assert f(2) == 1 and g(1) == 1
    assert missing is False and "`half`, `unwritten`: not written yet" in capsys.readouterr().out


@pytest.mark.parametrize("compare, yours, expected", [(same, "6", "1.5"), (close, "6", "1.5"), (lambda a, b: same(np.full((2, 2), a), np.full((2, 1), b)), "[[6 6]\n       [6 6]]", "[[1.5]\n       [1.5]]")], ids=["eq", "close", "rows"])
def test_what_was_given_and_what_was_expected_are_told_apart(compare, yours, expected, capsys):
    def halved(f): compare(f(3), 1.5)
    assert check(twice)(halved) is False
    assert f"yours:    {yours}\n    expected: {expected}" in capsys.readouterr().out


CHECK = "@check(f)\ndef ready(f): assert f(1) == 2, 'no'"
RIGHT, WRONG, BROKEN = "def f(x):\n    return 2*x", "def f(x):\n    return x", "def f(x):\n    return 2*(x"


@pytest.mark.parametrize("cells, said", [
    ([RIGHT, BROKEN, CHECK], "`f`: the cell that defines it has a syntax error in line 2: '(' was never closed\n    return 2*(x"),
    ([WRONG, BROKEN, RIGHT, CHECK], "`f`: right."), ([RIGHT, "x = (", CHECK], "`f`: right."), ([BROKEN, WRONG, CHECK], "not right yet"),
    (["f = lambda x: x", CHECK], "`<lambda>`: not right yet"), (["%time f = 1", RIGHT, CHECK], "`f`: right.")], ids=str)
def test_a_syntax_error_is_told_instead_of_judging_what_was_before(cells, said, monkeypatch, capsys):
    shell = InteractiveShell()
    monkeypatch.setattr("spml_kit.look.exercises.get_ipython", lambda: shell)
    for cell in ["from spml_kit.look.exercises import check", *cells]:
        capsys.readouterr()
        shell.run_cell(cell, store_history=True)
    assert said in capsys.readouterr().out
