"""What a recipe learns of a reward, and what stays unimported until a row is scored."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from qrpo_core.common.errors import ConfigError
from qrpo_core.config import RewardConfig
from qrpo_core.rewards import registry
from qrpo_core.rewards.registry import make_reward, reward_identity


def weighted(*rewards: dict) -> RewardConfig:
    return RewardConfig(kind="weighted", terms=[{"weight": 1, "reward": reward} for reward in rewards])


def test_identity_holds_the_versions_of_what_is_used_at_any_depth() -> None:
    inner = weighted({"kind": "math"}).model_dump()
    identity = reward_identity(weighted({"kind": "sentiment"}, {k: inner[k] for k in ("kind", "terms")}))
    assert identity["scorers"] == {"math": 2, "sentiment": 1, "weighted": 1}
    assert set(identity["libraries"]) == {
        "vaderSentiment",
        "math-verify",
        "latex2sympy2_extended",
        "sympy",
    }
    assert identity["libraries"]["vaderSentiment"] == version("vaderSentiment")
    assert json.loads(json.dumps(identity)) == identity


def test_identity_changes_with_the_config_and_only_with_it() -> None:
    assert reward_identity(RewardConfig(kind="number")) == reward_identity(RewardConfig(kind="number"))
    assert reward_identity(RewardConfig(kind="number"))["libraries"] == {}
    assert reward_identity(RewardConfig(kind="number")) != reward_identity(
        RewardConfig(kind="number", tolerance=0.5)
    )


@pytest.mark.parametrize(
    ("config", "needs"),
    [
        (RewardConfig(kind="number"), True),
        (RewardConfig(kind="exact"), True),
        (RewardConfig(kind="reasoning_gym"), True),
        (RewardConfig(kind="math"), True),
        (RewardConfig(kind="sentiment"), False),
        (RewardConfig(kind="length", max_words=3), False),
        (weighted({"kind": "sentiment"}), False),
        (weighted({"kind": "sentiment"}, {"kind": "number"}), True),
    ],
)
def test_needs_ground_truth(config: RewardConfig, needs: bool) -> None:
    assert make_reward(config).needs_ground_truth is needs


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.LIBRARIES, "sentiment", ("no-such-lexicon",))
    for use in (make_reward, reward_identity):
        with pytest.raises(ConfigError, match="no-such-lexicon"):
            use(RewardConfig(kind="sentiment"))


def test_nothing_heavy_is_imported_before_a_row_is_scored() -> None:
    script = """
import sys
from qrpo_core.config import RewardConfig
from qrpo_core.rewards.registry import make_reward, reward_identity
for kind in ("number", "exact", "reasoning_gym", "math", "sentiment", "weighted"):
    terms = [{"weight": 1, "reward": {"kind": "math"}}] if kind == "weighted" else ()
    config = RewardConfig(kind=kind, terms=terms) if terms else RewardConfig(kind=kind)
    make_reward(config), reward_identity(config)
heavy = {"reasoning_gym", "math_verify", "sympy", "vaderSentiment", "torch", "scipy.stats"}
print(" ".join(heavy & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
