from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common import hashing

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values)
def test_canonical_json_is_a_fixed_point(value: object) -> None:
    text = hashing.canonical_json(value)
    assert hashing.canonical_json(json.loads(text)) == text


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_key_order_does_not_matter(value: dict[str, int]) -> None:
    assert hashing.digest_json(value) == hashing.digest_json(dict(reversed(value.items())))


def test_nan_has_no_name() -> None:
    with pytest.raises(ValueError):
        hashing.canonical_json(float("nan"))


def test_names_do_not_change_between_releases() -> None:
    """Stores in the wild are named by these; a change here orphans every artifact that was paid for."""
    messages = [{"role": "user", "content": "Grüß Gott"}]
    assert hashing.prompt_id(messages) == "8ff166ade33e1e460ac8b82ce433332f"
    assert hashing.sample_seed(0, "p", 3) == 10459745479560406374
    assert hashing.tie_seed("p", 3) == 6670859324306477889
    assert hashing.split_fraction("p") == pytest.approx(0.6260039888955929, rel=1e-12)


@given(st.text(), st.integers(0, 1000), st.integers(0, 1000))
def test_seeds_of_other_samples_differ(prompt: str, one: int, two: int) -> None:
    assert (hashing.sample_seed(0, prompt, one) == hashing.sample_seed(0, prompt, two)) == (one == two)
    assert 0 <= hashing.sample_seed(0, prompt, one) < 2**64


def test_the_split_takes_about_its_share() -> None:
    held_out = sum(hashing.split_fraction(str(i)) < 0.3 for i in range(10_000))
    assert 2_850 < held_out < 3_150
