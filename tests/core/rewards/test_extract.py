"""Answer extraction and the reading of numbers: hand-made tables, and time that grows with the length."""

import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.rewards.verifiable.extract import extract, last_integer, last_number, numbers, only_number

# (text, last number as extracted, its value); None: there is none.
LAST_NUMBER = [
    ("", None, None),
    ("?!... -- $%", None, None),
    ("no number here", None, None),
    ("The answer is 12.", "12", 12),
    ("12, not 13", "13", 13),
    ("about 1,234.50 in all", "1234.50", "1234.5"),
    ("-3", "-3", -3),
    ("+3", "3", 3),
    ("3 - 1 = 2", "2", 2),
    ("10-3", "3", 3),
    ("(5)-3", "3", 3),
    ("x-3", "3", 3),
    ("= -3", "-3", -3),
    ("it is -$1,234.5!", "-1234.5", "-1234.5"),
    ("$-5", "-5", -5),
    ("costs \\$5", "5", 5),
    ("50%", "50", 50),
    ("50\\%", "50", 50),
    ("\u22123", "-3", -3),
    ("\u2013 7 \u20137", "-7", -7),
    ("\uff11\uff12", "12", 12),
    ("\u0661\u0662", "12", 12),
    ("1\u202f234\u202f567", "1234567", 1234567),
    ("答案是12。", "12", 12),
    ("5kg", "5", 5),
    ("30 m2", "30", 30),
    ("12km/h", "12", 12),
    ("H2O and CO2", None, None),
    ("USD5", None, None),
    ("1,2,3", "3", 3),
    ("1,2345", "2345", 2345),
    ("1,234,567", "1234567", 1234567),
    ("0,123", "123", 123),
    (".5", "0.5", "0.5"),
    ("-.5", "-0.5", "-0.5"),
    ("wait...5", "5", 5),
    ("1.2.3", "3", 3),
    ("3.", "3", 3),
    ("3e-4", "3e-4", "0.0003"),
    ("1E5", "1E5", 100000),
    ("2e", "2", 2),
    ("1e9999", "1", 1),
    ("3/4", "3/4", "0.75"),
    ("-6/3 left", "-6/3", -2),
    ("3/0", "0", 0),
    ("10/12/2024", "2024", 2024),
    ("3/4.5", "4.5", "4.5"),
    ("\\frac{3}{4}", "3/4", "0.75"),
    ("-\\dfrac34", "-3/4", "-0.75"),
    ("\\boxed{42}", "42", 42),
    ("$\\boxed{1{,}234}$", "1234", 1234),
    ("10,\\!080", "10080", 10080),
    ("\\approx3.14", "3.14", "3.14"),
    ("**12**", "12", 12),
    ("_12_", "12", 12),
    ("\u0663\u066b", "3", 3),
    ("²", None, None),
    ("10²", "100", 100),
    ("10⁻²", "10^-2", "0.01"),
    ("The answer is 3 / 4.", "3/4", "0.75"),
    ("10 / 12 / 2024", "2024", 2024),
    ("5 1/2", "11/2", "5.5"),
    ("-2 \\frac{1}{2}", "-5/2", "-2.5"),
    ("5½", "11/2", "5.5"),
    ("\\frac{-3}{4}", "-3/4", "-0.75"),
    ("\\frac{3}{-4}", "-3/4", "-0.75"),
    ("\\frac{1.5}{2}", "1.5/2", "0.75"),
    ("\\frac 9{12}", "9/12", "0.75"),
    ("\\frac{1}{0}", "0", 0),
    ("$3 \\times 10^4$", "3e4", 30000),
    ("$3 \\times 10^{-3}$", "3e-3", "0.003"),
    ("3*10^4", "3e4", 30000),
    ("2^{10}", "1024", 1024),
    ("-2^2", "-4", -4),
    ("0^-1", "0", 0),
    ("25 cm^2.", "25", 25),
    ("25 cm²", "25", 25),
    ("It holds 8 m^3", "8", 8),
    ("$8\\text{ m}^{2}$", "8", 8),
    ("The answer is - 3", "-3", -3),
    ("x = - 3", "-3", -3),
    ("- 3 apples", "3", 3),
    ("7 - 3", "3", 3),
    ("12.[1]", "12", 12),
    ("It takes 90 minutes (1:30 h).", "90", 90),
    ("1 234 567", "1234567", 1234567),
    ("12 345", "345", 345),
    ("1 2 100 200 300", "300", 300),
    ("2, see https://x.example/a/17", "2", 2),
    ("x_{1} = 5, where x_1 is the first root", "5", 5),
    ("1011_2", "11", 11),
    ("1019_2", "1019", 1019),
    ("\ud800 7", "7", 7),
    ("9" * 5000, "9" * 5000, "9" * 5000),
]


@pytest.mark.parametrize(("text", "spelling", "value"), LAST_NUMBER)
def test_last_number(text: str, spelling: str | None, value: object) -> None:
    found = last_number(text)
    assert extract(text, "last_number") == spelling
    assert (found.value if found else None) == (None if value is None else Decimal(str(value)))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("half: 0.5", None),
        ("4 - 1 = 3.", "3"),
        ("4 - 1 = 3.0", "3"),
        ("7 apples for 2.50", "7"),
        ("6/3", "2"),
        ("3/4", None),
        ("007", "7"),
        ("-0", "0"),
        ("-1,200", "-1200"),
        ("2e3", "2000"),
    ],
)
def test_last_integer(text: str, answer: str | None) -> None:
    assert extract(text, "last_integer") == answer


@pytest.mark.parametrize(
    ("text", "whole", "line", "tag"),
    [
        ("", None, None, None),
        (" \n\t\u2028 ", None, None, None),
        ("  a  b\n", "a  b", "a  b", None),
        ("one\n\n two \r\n \n", "one\n\n two", "two", None),
        ("<answer> x </answer>", "<answer> x </answer>", "<answer> x </answer>", "x"),
        ("<ANSWER>1</Answer> <answer>2\n3</answer> z", ..., ..., "2\n3"),
        ("<answer>1<answer>2</answer></answer>", ..., ..., "2"),
        ("<answer>1</answer><answer>2", ..., ..., "1"),
        ("</answer>1<answer>", ..., ..., None),
        ("<answer> </answer>", ..., ..., None),
        ("<an\u017fwer>1</an\u017fwer>", ..., ..., None),
    ],
)
def test_parts(text: str, whole: object, line: object, tag: str | None) -> None:
    if whole is not ...:
        assert extract(text, "whole") == whole
        assert extract(text, "last_line") == line
    assert extract(text, "answer_tag") == tag


@pytest.mark.parametrize("text", ["12", " 12 ", "$12", "12.", "12%", "\\$ 12 \\%.", "1.2e1", "24/2"])
def test_only_number_lets_sign_of_currency_percent_and_full_stop_pass(text: str) -> None:
    found = only_number(text)
    assert found is not None
    assert found.value == 12


@pytest.mark.parametrize("text", ["", "x12", "12 apples", "12 13", "12..", "--12", "twelve"])
def test_only_number_refuses_anything_else(text: str) -> None:
    assert only_number(text) is None


@given(st.lists(st.decimals(allow_nan=False, allow_infinity=False, places=3), max_size=5))
def test_written_numbers_are_read_back(values: list[Decimal]) -> None:
    text = " and ".join(f"{value:,f}" for value in values)
    assert [number.value for number in numbers(text)] == values


@given(st.text())
def test_any_text_is_read_without_an_error(text: str) -> None:
    for how in ("whole", "last_line", "last_number", "last_integer", "answer_tag"):
        answer = extract(text, how)
        assert answer is None or answer.strip() == answer != ""


# Each would take minutes in quadratic time: 100,000 characters squared are 10^10 steps.
LONG = [
    "9",
    "9 ",
    "1,234,",
    "1,23",
    "1.",
    "a",
    "a1",
    "-",
    "3/",
    "\\frac{1}{",
    "\\frac",
    "{,}",
    "<answer>",
    "</answer>",
    "1e",
    "\u0661",
    "\u00a0123",
    " ",
    "\n",
    "$-",
    "1 234 ",
    "123 ",
    "1/2 ",
    "\\frac{1}",
    "\\frac{1.",
    "1^",
    "1_2",
    "x_",
    "x^{",
    "1:30",
    "https://",
    "[1]",
    "½",
    "10²",
    "= - ",
    "3*10^",
]


@pytest.mark.parametrize("piece", LONG)
def test_time_grows_with_the_length(piece: str) -> None:
    text = (piece * 100_000)[:100_000]
    before = time.thread_time()
    for how in ("whole", "last_line", "last_number", "last_integer", "answer_tag"):
        extract(text, how)
    only_number(text)
    # Processor time of this thread, not the clock on the wall: others may use the machine meanwhile.
    assert time.thread_time() - before < 5


def test_the_last_integer_among_many_numbers_that_are_none() -> None:
    assert last_integer("8 " + "0.5 " * 20_000).text == "8"
