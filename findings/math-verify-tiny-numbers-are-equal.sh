#!/usr/bin/env bash
# math-verify 0.9.0: 1/2^99 and 1/2^98 are "equal".
# It compares symbolic answers before it compares numbers, so one expects two different fractions to differ.
# Their difference is evaluated with chop, which makes everything that small a zero.
# Seen: verify() is True for them, and False for 1/3 and 1/4.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet math-verify==0.9.0 antlr4-python3-runtime==4.13.2 latex2sympy2-extended==1.11.0
"$work/venv/bin/python" - <<'PY'
from math_verify import parse, verify

def same(gold, answer):
    return verify(parse(f"${gold}$"), parse(f"${answer}$"))

found = {
    "1/2^99, 1/2^98": same(r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    "1/3, 1/4": same(r"\frac{1}{3}", r"\frac{1}{4}"),
}
print(found)
assert found["1/2^99, 1/2^98"] and not found["1/3, 1/4"], "the behaviour has changed"
PY
echo "as described"
