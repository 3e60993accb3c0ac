"""Which prompt and completion `qrpo explain` takes a query for, and that one prompt stands for all."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from qrpo_core.common.errors import MissingError, QRPOError
from qrpo_core.inspection.explain import explain
from qrpo_core.inspection.explain.query import find_prompt
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import changed
from tests.core.stores import REWARD, of_split

LENGTH = {"reward": REWARD}
SAMPLES = {"references_per_prompt": 6}


def test_a_query_that_names_nothing_is_refused(settings: dict[str, Any]) -> None:
    workspace = Workspace(changed(settings | LENGTH))
    prompt = of_split(workspace, "train")
    with pytest.raises(QRPOError, match="too short"):
        explain(workspace, prompt[:5])
    with pytest.raises(QRPOError, match="'-1' is no sample_index"):
        explain(workspace, f"{prompt}:-1")
    with pytest.raises(QRPOError, match="'' is no sample_index"):
        explain(workspace, f"{prompt}:")
    with pytest.raises(MissingError, match=f"none of the 12 prompts.*{prompt}"):
        explain(workspace, prompt[:6] + "x")
    with pytest.raises(MissingError, match=r"no completion 3: there are references 0-2"):
        explain(workspace, f"{prompt}:3")


def test_an_ambiguous_beginning_names_several(settings: dict[str, Any]) -> None:

    ids = ["abcdef00", "abcdef01", "abcdef02", "abcdef03", "fedcba00"]
    table = pa.table({"prompt_id": ids})
    with pytest.raises(
        QRPOError, match=r"4 prompts begin with 'abcdef' \[abcdef00, abcdef01, abcdef02, \.\.\.\]"
    ):
        find_prompt(table, "abcdef")
    assert find_prompt(table, "fedcba") == "fedcba00"
    assert find_prompt(table, "abcdef03") == "abcdef03"
