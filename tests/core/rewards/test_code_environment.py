"""The reward `code`: what programs can import, and problems that are known before a row runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.errors import ConfigError, DataError
from qrpo_core.config import RewardConfig
from qrpo_core.config.rewards import CodeRewardConfig
from qrpo_core.rewards.base import Score
from qrpo_core.rewards.code.reward import CodeReward
from qrpo_core.rewards.registry import reward_identity
from tests.core.rewards.code_problems import SQUARES, mbpp, needs_bwrap, request

NUMPY = "import numpy as np\ndef f(x): return np.int64(x) * x"


@needs_bwrap
def test_packages_are_importable_where_they_are_named(score: Any) -> None:
    got = score(NUMPY, SQUARES)
    assert (got.reward, got.status) == (None, "refused")  # public judges have it: no wrong answer
    assert "numpy; to grade it, add it to reward.code.packages" in got.detail
    inside = "def f(x):\n    import numpy\n    return x * x"
    assert score(inside, SQUARES).status == "refused"
    assert score(NUMPY, SQUARES, packages=("numpy",)).reward == 1.0
    assert score("import yaml\n" + NUMPY, SQUARES, packages=("numpy",)).reward == 0.0
    with pytest.raises(ConfigError, match=r"no_such_package.*pip install"):
        score(NUMPY, SQUARES, packages=("numpy", "no_such_package"))
    tests = mbpp("import numpy as np\nassert np.allclose(f(2), 4)", "assert type(f(2)) == int")
    assert score("def f(x): return x * x", tests, packages=("numpy",)).reward == 1.0


@needs_bwrap
@pytest.mark.parametrize(
    "program",
    [
        "import no_such_module\ndef f(x): return x * x",
        # What it says is not believed: it imports nothing that is absent.
        "raise ModuleNotFoundError(\"No module named 'numpy'\")",
        "try:\n    import numpy\nexcept ImportError:\n    pass\ndef f(x): return x",
    ],
)
def test_a_program_that_imports_what_no_judge_has_is_wrong(score: Any, program: str) -> None:
    got = score(program, SQUARES)
    assert (got.reward, got.status) == (0.0, "ok")
    assert score("# import numpy\n" + program, SQUARES).reward == 0.0


@needs_bwrap
@pytest.mark.parametrize(
    ("ground_truth", "says"),
    [
        (mbpp("import numpy as np\nassert np.allclose(f(2), 4)"), "import numpy, which programs cannot"),
        (mbpp("assert f(2) == 4", test_imports=["import tabulate, numpy"]), "import numpy, tabulate, which"),
        (mbpp("assert f(2) == 4", code="import pandas\ndef f(x): return x"), "import pandas"),
        (
            mbpp("assert f(2) == 4", test_imports=["from math import no_such_name"]),
            "setup failed: ImportError",
        ),
        (mbpp("assert f(2) == 4", test_imports=["from heapq import merge"]), None),
    ],
)
def test_what_a_ground_truth_lacks_is_an_error_of_the_data_set(ground_truth: str, says: str | None) -> None:
    reward = CodeReward(CodeRewardConfig(format="mbpp"))
    if says is None:
        assert reward.problems([("p0", SQUARES), ("p1", ground_truth)]) == []
        return
    found = reward.problems([("p0", SQUARES), ("p1", ground_truth), ("p2", SQUARES), ("p3", ground_truth)])
    assert [(problem.row, problem.prompt_id) for problem in found] == [(1, "p1"), (3, "p3")]
    assert re.search(says, found[0].remedy)
    with pytest.raises(DataError, match=says):
        reward.score([request("def f(x): return x", ground_truth)])


def environment(folder: Path, **packages: str) -> str:
    """A virtual environment with packages that state their version, and one that requires the others."""
    import venv

    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name, version in {**packages, "whole": "9"}.items():
        source = f"version = {version!r}\n" if name != "whole" else "".join(f"import {p}\n" for p in packages)
        (site / f"{name}.py").write_text(source)
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        requires = "".join(f"Requires-Dist: {other}>=1\n" for other in packages if name == "whole")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
        (info / "RECORD").write_text(f"{name}.py,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
    return str(folder)


@needs_bwrap
def test_packages_of_another_environment_and_their_versions(score: Any, tmp_path: Path) -> None:
    first, second = (environment(tmp_path / v, greeter=v) for v in ("1.5", "2.0"))
    program = "import greeter\ndef f(x): return greeter.version"
    ground_truth = mbpp(
        "assert f(1) == '1.5'", "assert f(1) == '2.0'", "import greeter\nassert f(1) == greeter.version"
    )
    for python in (first, f"{first}/bin/python"):
        assert score(program, ground_truth, python=python, packages=("greeter",)).reward == 2 / 3
    # What a package requires comes with it.
    assert score(program, ground_truth, python=first, packages=("whole",)).reward == 2 / 3

    def identity(python: str | None, *packages: str) -> dict[str, Any]:
        code = {"format": "mbpp", "python": python, "packages": packages}
        return reward_identity(RewardConfig(kind="code", code=code))

    assert identity(first, "greeter") == identity(f"{first}/bin/python", "greeter")
    assert identity(first, "greeter") != identity(second, "greeter")
    assert identity(first, "whole")["identities"]["reward"]["greeter"] == "1.5"
    assert "identities" not in identity(None)
    with pytest.raises(ConfigError, match=r"reward.code.packages.*pip install numpy"):
        identity(first, "numpy")
    with pytest.raises(ConfigError, match=r"not a working Python interpreter.*reward.code.python"):
        identity(str(tmp_path))


@needs_bwrap
def test_a_package_that_does_not_load_is_told_before_a_row(tmp_path: Path) -> None:
    python = environment(tmp_path / "env", greeter="1.5")
    (site,) = Path(python).glob("lib/python*/site-packages")
    (site / "greeter.py").write_text("raise RuntimeError('no licence')")
    config = CodeRewardConfig(format="mbpp", python=python, packages=("greeter",))
    with pytest.raises(ConfigError, match=r"'greeter' cannot be imported in the sandbox.*no licence"):
        CodeReward(config).problems([])


def test_without_a_sandbox_nothing_runs_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    row = request("def f(x): return x * x", SQUARES)
    with pytest.raises(ConfigError, match="apt install bubblewrap"):
        CodeReward(CodeRewardConfig(format="mbpp")).problems([("p", SQUARES)])
    unsafe = CodeReward(CodeRewardConfig(format="mbpp", unsafe=True, seconds_per_test=1.0))
    with pytest.warns(UserWarning, match="without a sandbox"):
        assert unsafe.score([row]) == [Score(1.0, "ok", "passed 3 of 3 (without a sandbox)")]
    endless = request("def f(x):\n    while True: pass", mbpp("assert f(1)"))
    bomb = request("def f(x): return bytearray(1 << 34)", mbpp("assert f(1)"))
    for got in unsafe.score([endless, bomb]):
        assert (got.reward, got.status) == (0.0, "ok")
