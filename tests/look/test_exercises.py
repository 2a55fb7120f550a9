"""Exercises that check themselves: what is said of a function that is right, wrong, unwritten, or stops."""
import pytest

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
    (twice, "`twice`: not right yet. This does not hold:\n    def halves(f): assert f(3) == 1.5, f\"f(3) is {f(3)}\"\n    f(3) is 6", True),
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
