"""Answer extraction and grading: what is the same answer, and what is no answer."""

import subprocess
import sys

import pytest

from reward.grading import MAX_ANSWER_CHARS, Verdict, check_gold, extract_boxed, grade

R = Verdict.correct
W = Verdict.wrong
U = Verdict.unparsable


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{27}.", "27"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{\frac{a}{\sqrt{b}}}} q.e.d. {", r"\sqrt{\frac{a}{\sqrt{b}}}"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{1} and, cut off, \boxed{2", "1"),
        (r"\boxed{\text{it is }\boxed{3}}", "3"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{[0, 1\}}", r"[0, 1\}"),
        (r"\boxed {5}", "5"),
        (r"a stray { and } or } before \boxed{5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        (r"\boxed{5", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_extract_boxed(text, boxed):
    assert extract_boxed(text) == boxed


def test_extraction_is_linear():
    """20,000 boxes that never close are one pass, not one pass each."""
    assert extract_boxed(r"\boxed{" * 20_000) is None
    assert extract_boxed(r"\boxed{" * 20_000 + "7" + "}" * 20_000) == "7"


SAME_OR_NOT = [
    # plain numbers, exactly
    ("18", "18", R),
    ("18", "18.0", R),
    ("18", "18.", R),
    ("18", "$18$", R),
    ("18", r"\$18.00", R),
    ("18", "$18", R),
    ("18", "+18", R),
    ("-18", "−18", R),
    ("18", "-18", W),
    ("18", "18.0001", W),
    ("1234", "1,234", R),
    ("1,234", "1234", R),
    ("1234", "1{,}234", R),
    (r"11,\! 111", "11111", R),
    ("1234", "1,235", W),
    ("12", "1 2", W),
    ("0.5", ".5", R),
    ("100000000000000000001", "100000000000000000000", W),
    # fractions and decimals
    (r"\frac{1}{2}", "0.5", R),
    (r"\frac{1}{2}", r"\dfrac{1}{2}", R),
    (r"\frac12", r"\tfrac{2}{4}", R),
    (r"\frac{1}{2}", "1/2", R),
    (r"-\frac{1}{2}", "-0.5", R),
    (r"\frac{1}{3}", "0.333333", R),
    (r"\frac{1}{3}", "0.33", W),
    (r"\frac{1}{2}", r"\frac{2}{1}", W),
    ("0", r"\frac{1}{0}", W),
    ("2", r"\frac{4}{2}", R),
    (r"6\frac{1}{2}", "6.5", R),
    # roots, powers, constants, polynomials
    (r"2\sqrt{3}", r"\sqrt{12}", R),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", R),
    (r"\sqrt{2}", r"\sqrt{3}", W),
    ("1000000", "10^6", R),
    (r"\pi", "3.14", W),
    ("x^2+2x+1", "(x+1)^2", R),
    ("x^2+2x+1", "(x+2)^2", W),
    ("a + b + c", "c+b+a", R),
    ("a + b + c", "a + b", W),
    # percentages and units
    (r"50\%", "0.5", R),
    (r"50\%", "50", R),
    (r"50\%", r"51\%", W),
    ("5", r"5 \text{ cm}", R),
    (r"15\text{ mph}", "15", R),
    ("90", r"90^\circ", R),
    ("18", r"18 \text{ dollars}", R),
    # sets, tuples, intervals, matrices
    (r"\{1,2\}", r"\{2,1\}", R),
    ("1,2", "2, 1", R),
    ("1,2", "1,3", W),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", R),
    ("(1,2)", "(2,1)", W),
    ("(0,1)", "[0,1)", W),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)", R),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", R),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", W),
    (r"3 \pm \sqrt{2}", r"3+\sqrt{2}, 3-\sqrt{2}", R),
    # words and equations
    (r"\text{Monday}", r"\text{monday}", R),
    (r"\text{Monday}", r"\text{Tuesday}", W),
    (r"\text{(C)}", "C", R),
    ("5", "x = 5", R),
    ("5", "x = 6", W),
    ("3", r"3 \text{ or } 4", W),
    # no answer
    ("5", "", U),
    ("5", "  ", U),
    ("5", "???", U),
    ("5", r"\frac{1}{", U),
    ("5", "9" * (MAX_ANSWER_CHARS + 1), U),
]


@pytest.mark.parametrize(("gold", "given", "verdict"), SAME_OR_NOT)
def test_grade(gold, given, verdict):
    assert grade(rf"Thus the answer is \boxed{{{given}}}.", gold) is verdict


def test_grade_without_a_box_is_unparsable():
    assert grade("The answer is 5.", "5") is U
    assert grade("", "5") is U


def test_grade_uses_the_last_box():
    assert grade(r"\boxed{4}? No: \boxed{5}", "5") is R
    assert grade(r"\boxed{5}? No: \boxed{4}", "5") is W


def test_a_long_answer_is_correct_if_it_is_the_gold_answer():
    gold = "+".join(["x"] * MAX_ANSWER_CHARS)
    assert grade(rf"\boxed{{{gold}}}", gold) is R


def test_invariant_7_failure_is_not_zero():
    """What the model did wrong is worth 0; what the verifier did wrong is worth nothing that could be averaged."""
    assert {verdict.value: verdict.reward for verdict in Verdict} == {
        "correct": 1.0,
        "wrong": 0.0,
        "unparsable": 0.0,
        "timeout": None,
        "crashed": None,
        "rejected": None,
    }


@pytest.mark.parametrize("answer", ["27", "1,234", r"\frac{1}{2}", r"2\sqrt{3}", r"\text{Monday}", "(1,2)"])
def test_check_gold_accepts(answer):
    check_gold(answer)


@pytest.mark.parametrize("answer", ["", " ", "???", r"\frac{1}{", "1+" * MAX_ANSWER_CHARS + "1"])
def test_check_gold_refuses(answer):
    with pytest.raises(ValueError, match="gold answer"):
        check_gold(answer)


def test_a_bad_gold_answer_is_never_a_wrong_answer():
    with pytest.raises(ValueError, match="gold answer"):
        grade(r"\boxed{\sqrt{5}}", "???")
    with pytest.raises(ValueError, match="gold answer"):
        grade(r"\boxed{5}", "")


def test_plain_answers_need_no_sympy():
    """Worker processes and config checks import this module; only symbolic answers pay for sympy."""
    code = (
        "import sys\nfrom reward.grading import grade\nfrom reward.verifier import VerifierPool\n"
        "assert grade(r'\\boxed{1,234}', '1234') == 'correct'\n"
        "heavy = {'sympy', 'math_verify', 'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
