"""The tables of the evaluation's tests."""

from tests.core.evaluation.conftest import evaluated, pair, random_rewards, side

__all__ = ["evaluated", "pair", "random_rewards", "side"]
