"""What `math` and `number` give for the forms that ground truths and answers come in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache

import pytest

from qrpo_core.common.errors import DataError
from qrpo_core.config import RewardConfig
from qrpo_core.rewards.base import Reward, RewardRequest
from qrpo_core.rewards.registry import check_ground_truths, make_reward
from qrpo_core.rewards.verifiable.math_answers import same_answer
from qrpo_core.rewards.verifiable.numerals import read
from qrpo_core.rewards.verifiable.stated_answers import stated_answer

# ground truth, completion, reward; None: the ground truth is refused.
MATH = [
    ("0.00012", "The answer is 1.2 \u00d7 10\u207b\u2074.", 1),
    ("6000000", "The answer is 6 x 10^6", 1),
    ("x^2+1", "The answer is x\u00b2+1.", 1),
    ("\\frac12", "The answer is \u00bd.", 1),
    ("5.5", "\\boxed{5\u00bd}", 1),
    ("42", "The answer is `42`.", 1),
    ("5", "\\boxed{5^{\\text{th}}}", 1),
    ("7", "\\boxed{\\text{The answer is } 7}", 1),
    ("7", "\\boxed{\\text{The answer is } 8}", 0),
    ("\\emptyset", "\\boxed{\\varnothing}", 1),
    ("\\emptyset", "\\boxed{\\{\\}}", 1),
    ("0.\\overline{3}", "\\boxed{\\frac13}", 1),
    ("\\frac{1}{6}", "\\boxed{0.1\\overline{6}}", 1),
    ("\\frac{1}{3}", "\\boxed{0.333\\ldots}", 1),
    ("\\frac{1}{3}", "\\boxed{0.33}", 0),
    ("2500000", "\\boxed{2.5\\text{ million}}", 1),
    ("2.5", "\\boxed{2.5\\text{ million}}", 1),
    ("2500000", "It costs 2.5 million.", 1),
    ("(-\\infty,0)\\cup(0,\\infty)", "\\boxed{(-\u221e, 0) \u222a (0, \u221e)}", 1),
    ("4", "\\boxed{\\color{red}{4}}", 1),
    ("\\pm 3", "The answer is \u00b13", 1),
    ("2.5\\text{ million}", "\\boxed{2.5\\text{ billion}}", 0),
    ("$\\frac{1}{2^{99}}$", "So the answer is $\\boxed{\\frac{1}{2^{98}}}$.", 0),
    ("$\\frac{1}{2004!}$", "So the answer is $\\boxed{\\frac{1}{2006!}}$.", 0),
    ("$10^{-10}$", "So the answer is $\\boxed{2\\times 10^{-10}}$.", 0),
    ("0.0000001", "So the answer is $\\boxed{0.0000002}$.", 0),
    ("$n=2, 3, 4$", "So the answer is $\\boxed{n=1, 2, 3}$.", 0),
    ("$D = (0, 1)$", "So the answer is $\\boxed{D = (0, 1.5)}$.", 0),
    ("$19, 46, \\text{ and } 82$", "So the answer is $\\boxed{21, 36, \\text{ and } 82}$.", 0),
    ("$1 - \\frac{1}{\\mathrm{e}}$", "So the answer is $\\boxed{1 + \\frac{1}{\\mathrm{e}}}$.", 0),
    ("$\\pm 2021$", "So the answer is $\\boxed{2021}$.", 0),
    ("$12:00$", "So the answer is $\\boxed{1:00}$.", 0),
    (
        "$\\frac{2^{2005}+1}{3 \\cdot 2^{2006}}$",
        "So the answer is $\\boxed{\\frac{1}{3 \\cdot 2^{2006}}}$.",
        0,
    ),
    (
        "$F_n = \\sum_{k=0}^{n-1} F_k F_{n-k-1}$",
        "So the answer is $\\boxed{F_n = \\sum_{k=0}^{n-2} F_k F_{n-k-2}}$.",
        0,
    ),
    ("840", "could be \\boxed{840}.,but let me explain.\n\n**Final Answer**\n\\boxed{840}", 1),
    (
        "4",
        "So \\boxed{004}.\n\nBut 2,552,004. So \\boxed{004} is right.\n\n**Final Answer**\n\\boxed{004}",
        1,
    ),
    (
        "73",
        "Left: a + 2(b) = 437 + 2*234 = 905\n\nThus the number is **73**.\n\n---\n\nFinal Answer: **73**",
        1,
    ),
    ("$28\\%$", "So the answer is $\\boxed{28 \\text{ percent}}$.", 1),
    ("$28\\%$", "So the answer is $\\boxed{0.28}$.", 1),
    ("28%", "So the answer is $\\boxed{28}$.", 1),
    ("A", "Answer: \\boxed{A}", 1),
    ("A", "Answer: \\boxed{B}", 0),
    ("$\\text{(C)}$", "So the answer is $\\boxed{\\text{(C)}}$.", 1),
    ("1 - \\sqrt{2}", "So the answer is $\\boxed{1-\\sqrt{2}}$.", 1),
    ("1 - \\sqrt{2}", "So the answer is $\\boxed{1}$.", 0),
    ("$\\sqrt{1/n}$", "So the answer is $\\boxed{\\frac{1}{\\sqrt{n}}}$.", 1),
    ("$\\frac12$", "So the answer is $\\boxed{\\frac{1}{2}}$.", 1),
    ("$90^\\circ$", "So the answer is $\\boxed{90}$.", 1),
    ("$35\\text{ cm}$", "So the answer is $\\boxed{35}$.", 1),
    ("$35\\text{ cm}$", "So the answer is $\\boxed{35\\text{ m}}$.", 0),
    ("12345", "So the answer is $\\boxed{12{,}345}$.", 1),
    ("12345", "The answer is 12,345.", 1),
    ("$18", "She makes \\$18 every day.", 1),
    ("18.00", "The answer is $18.", 1),
    ("$(1,2)$", "So the answer is $\\boxed{(1,2]}$.", 0),
    ("$\\{1,2,3\\}$", "So the answer is $\\boxed{\\{3,2,1\\}}$.", 1),
    ("$(1,2)$", "So the answer is $\\boxed{(2,1)}$.", 0),
    (
        "$\\begin{pmatrix}1\\\\2\\end{pmatrix}$",
        "So the answer is $\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}$.",
        1,
    ),
    (
        "$\\begin{pmatrix}1\\\\2\\end{pmatrix}$",
        "So the answer is $\\boxed{\\begin{pmatrix}2\\\\1\\end{pmatrix}}$.",
        0,
    ),
    ("5", "So the answer is $\\boxed{x=5}$.", 1),
    ("x=5", "So the answer is $\\boxed{5}$.", 1),
    ("7", "<think>Maybe \\boxed{7}? no, it is 8.</think>\nThe answer is \\boxed{8}.", 0),
    ("7", "<think>It is 7. So \\boxed{7}", 0),
    ("7", "<think>so \\boxed{7}</think>\nI cannot answer.", 0),
    ("7", "The answer is \\boxed{7} or \\boxed{8}.", 0),
    ("7", "So the answer is $\\boxed{7, 8}$.", 0),
    ("$\\infty$", "So the answer is $\\boxed{\\infty}$.", 1),
    ("7", "\\boxed{}", 0),
    ("$\\text{Yes}$", "So the answer is $\\boxed{\\text{Yes}}$.", 1),
    ("$\\text{Yes}$", "So the answer is $\\boxed{\\text{No}}$.", 0),
    ("$x^2+2x+1$", "So the answer is $\\boxed{(x+1)^2}$.", 1),
    ("$2\\frac{1}{2}$", "So the answer is $\\boxed{2.5}$.", 1),
    ("$3\\times 10^{8}$", "So the answer is $\\boxed{3e8}$.", 1),
    ("$\\frac{1}{3}$", "So the answer is $\\boxed{0.33}$.", 0),
    ("$1011_2$", "So the answer is $\\boxed{1011}$.", 0),
    ("$18", "So the answer is $\\boxed{18}$.", 1),
    ("$18", "The answer is 18.", 1),
    ("\\$18", "The answer is \\$18.", 1),
    ("18", "She makes \\$18 every day.", 1),
    ("18", "The final answer is \\$18.", 1),
    ("18", "She makes $18 every day.", 1),
    ("$1,250.50", "So the answer is $\\boxed{1250.5}$.", 1),
    ("$12:00$", "So the answer is $\\boxed{12:00}$.", 1),
    ("12:00", "12:00", 1),
    ("3:30", "So the answer is $\\boxed{3:30}$.", 1),
    ("3:30", "So the answer is $\\boxed{4:40}$.", 0),
    ("3:30", "So the answer is $\\boxed{1:10}$.", 0),
    ("10:00", "So the answer is $\\boxed{11:00}$.", 0),
    ("0.00015", "So the answer is $\\boxed{1.5e-4}$.", 1),
    ("0.00015", "The answer is 1.5e-4.", 1),
    ("0.00015", "So the answer is $\\boxed{1.5\\times 10^{-4}}$.", 1),
    ("0.0000001", "So the answer is $\\boxed{0}$.", 0),
    (2e-07, "So the answer is $\\boxed{0.0000004}$.", 0),
    ("1/3000000", "So the answer is $\\boxed{\\frac{1}{9000000}}$.", 0),
    ("1/3000000", "So the answer is $\\boxed{0}$.", 0),
    ("$\\frac{1}{13983816}$", "So the answer is $\\boxed{\\frac{1}{10068347520}}$.", 0),
    ("$\\frac{1}{13983816}$", "So the answer is $\\boxed{0}$.", 0),
    ("1/1000", "So the answer is $\\boxed{\\frac{1}{1001}}$.", 0),
    ("$1.6\\times10^{-19}$", "So the answer is $\\boxed{9.1\\times10^{-31}}$.", 0),
    ("73", "Sum 437 + 2*234 = 905\n\n**73**", 1),
    ("$1011_2$", "So the answer is $\\boxed{1011_3}$.", 0),
    ("1/3", "\\boxed{0.333333}", 1),
    ("1/3", "\\boxed{0.33333}", 0),
    ("\\frac{1}{2^{99}}", "\\boxed{2^{-99}}", 1),
    ("\\sqrt{2}", "\\boxed{1.414214}", 1),
    ("\\sqrt{2}\\cdot10^{-9}", "\\boxed{\\sqrt{3}\\cdot10^{-9}}", 0),
    ("x", "\\boxed{|x|}", 0),
    ("5.5", "\\boxed{5 1/2}", 1),
    ("5\\frac{1}{2}", "The answer is 5 1/2.", 1),
    ("-0.75", "\\boxed{\\frac{-3}{4}}", 1),
    ("3/4", "So it is 3 / 4.", 1),
    ("25\\text{ cm}^2", "\\boxed{25 \\text{ square centimeters}}", 1),
    ("25\\text{ cm}^2", "\\boxed{25 \\text{ cm}^3}", 0),
    ("90^\\circ", "\\boxed{90 \\text{ degrees}}", 1),
    ("52_8", "\\boxed{52_{\\text{eight}}}", 1),
    ("52_8", "\\boxed{42}", 0),
    ("12345", "\\boxed{12\\,345}", 1),
    ("-2, 1", "The answers are $\\boxed{-2}$ and $\\boxed{1}$.", 1),
    ("1", "The answers are $\\boxed{-2}$ and $\\boxed{1}$.", 1),
    ("-2", "The answers are $\\boxed{-2}$ and $\\boxed{1}$.", 0),
    ("7", "\\boxed{7} is \\boxed{7", 1),
    ("7", "it is \\boxed{7", 0),
    ("(1, 1/2)", "\\boxed{(1, 0.5)}", 1),
    ("[0, 1)", "\\boxed{[0, 1]}", 0),
    ("\\text{June 20}", "\\boxed{\\text{june 20}}", 1),
    ("\\text{(C)}", "Answer: C", 1),
    ("C", "\\boxed{(C) 12}", 1),
    ("A", "\\boxed{A+1}", 0),
    ("7", "The answer is 7.\n\nIs there anything else about step 2?", 1),
    ("2^{2000}", "\\boxed{2^{2001}}", 0),
    ("1.5e-4", "\\boxed{0.00015}", 1),
    ("50%", "\\boxed{\\frac{1}{2}}", 1),
    ("N/A", "\\boxed{7}", None),
    ("...", "\\boxed{7}", None),
    ([1], "\\boxed{1}", None),
]
NUMBER = [
    ("2500000", "The answer is $2.5 million.", 1),
    ("2.5", "It costs 2.5 million.", 1),
    ("2.5 million", "It costs 2500000.", 1),
    ("2.5 million", "It costs 2.5 billion.", 0),
    ("3", "The answer is 3:4.", 0),
    ("4", "The ratio is 3:4", 0),
    ("He has 3*4=12.\n#### 12", "So 12 apples. The answer is 12.", 1),
    (42, "The answer is 42 (checked on 3 May 2024).", 1),
    (42, "Answer: 42\n\nLet me know if you have questions about step 2!", 1),
    (0.75, "The answer is 3 / 4.", 1),
    (30000, "The answer is $3 \\times 10^4$.", 1),
    (0.003, "The answer is $3 \\times 10^{-3}$.", 1),
    (25, "The area is 25 cm^2.", 1),
    (25, "The area is 25 cm².", 1),
    (8, "It holds 8 m^3", 1),
    (8, "$8\\text{ m}^{2}$", 1),
    (50, "It is 50%", 1),
    (73, "**73**", 1),
    (5, "5.0", 1),
    (18, "$18.00", 1),
    (-3, "The answer is - 3", 1),
    (-3, "The answer is −3", 1),
    (12, "The answer is 12.[1]", 1),
    (90, "It takes 90 minutes (1:30 h).", 1),
    (1234567, "1 234 567", 1),
    (12, "twelve", 1),
    ("12 apples", "12", 1),
    ("10-12", "12", None),
    (True, "1", None),
    ("", "1", None),
    ("N/A", "1", None),
    (2, "2 molecules of H2O", 1),
    (2, "2, see https://x.example/a/17", 1),
    (8, "<think>maybe 7</think>8", 1),
    (7, "<think>maybe 7", 0),
    (0.75, "\\dfrac{3}{4}", 1),
    (-0.75, "$-\\frac{3}{4}$", 1),
    (-0.75, "$\\frac{-3}{4}$", 1),
    (0.75, "$\\frac{1.5}{2}$", 1),
    (5, "x_{1} = 5, where x_1 is the first root", 1),
    (2e-7, "It is 0.0000004.", 0),
    (0, "0.0000001", 0),
    (3, "2.9999999", 1),
    (8, "Answer: She has 5. She buys 3. So 8.", 1),
    (13, "The answer is 2 * 5 + 3 = 13.", 1),
    (7, "The answer is 7 or 8.", 0),
    (7, "So \\boxed{7, 8}", 0),
    (42, "The final answer is approximately 42 (see [3])", 1),
    (21, "The answer is twenty-one.", 1),
    (-3, "minus three", 1),
    (1205, "one thousand two hundred and five", 1),
    (5.5, "5½", 1),
    (7, "\\boxed{}", 0),
    (7, "### Answer\n7\n\n(page 12)", 1),
]


@lru_cache
def reward(kind: str) -> Reward:
    """One a kind: the scoring process of `math` takes a second to start."""
    return make_reward(RewardConfig(kind=kind))


@pytest.fixture(scope="module", autouse=True)
def close() -> Iterator[None]:
    yield
    reward("math").close()


def expect(kind: str, ground_truth: object, text: str, right: float | None) -> None:
    request = RewardRequest("p", 0, (("user", "?"),), text, json.dumps(ground_truth))
    if right is None:
        with pytest.raises(DataError, match="is refused"):
            reward(kind).score([request])
        return
    (score,) = reward(kind).score([request])
    assert (score.reward, score.status) == (right, "ok")


@pytest.mark.parametrize(("ground_truth", "text", "right"), MATH)
def test_math(ground_truth: object, text: str, right: float | None) -> None:
    expect("math", ground_truth, text, right)


@pytest.mark.parametrize(("ground_truth", "text", "right"), NUMBER)
def test_number(ground_truth: object, text: str, right: float | None) -> None:
    expect("number", ground_truth, text, right)


@pytest.mark.parametrize("ground_truth", [case[0] for case in MATH if case[2] is not None])
def test_a_ground_truth_scores_1_against_its_own_text(ground_truth: object) -> None:
    expect(
        "math",
        ground_truth,
        str(ground_truth) if "\\boxed" in str(ground_truth) else f"$\\boxed{{{ground_truth}}}$",
        1,
    )


def test_ground_truths_are_read_by_the_reader_of_answers_and_told_all_at_once() -> None:
    ground_truths = ["\\$18", "...", "\\text{Evelyn}", "N/A", "The answer is \\boxed{7}."]
    pairs = [(str(row), json.dumps(each)) for row, each in enumerate(ground_truths)]
    assert [problem.row for problem in check_ground_truths(RewardConfig(kind="math"), pairs)] == [1, 3]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("no statement", None),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} and \\boxed{2}", "1, 2"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed 7", "7"),
        ("\\boxed{", ""),
        ("work\n#### 12\nmore", "12"),
        ("The answer is 5.\nBut wait, the answer is 6.", "6."),
        ("**Final Answer**\n\n42\n", "42"),
        ("answers vary", None),
    ],
)
def test_what_a_text_states(text: str, answer: str | None) -> None:
    assert stated_answer(text) == answer


@pytest.mark.parametrize(
    "text", ["", "x", "1/0", "9**9", "((((", "2^{2^{2^{9}}}", "1e99999", "--", "3!!!!", "\\frac"]
)
def test_what_is_no_plain_number_is_not_read(text: str) -> None:
    assert read(text) is None


def test_equality_is_symmetric_where_it_is_decided() -> None:
    answers = [str(case[0]) for case in MATH]
    for one in answers:
        for two in answers:
            assert same_answer(one, two) in (same_answer(two, one), None) or same_answer(two, one) is None
