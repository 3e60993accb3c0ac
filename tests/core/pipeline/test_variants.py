"""The variants of a comparison: their settings and names, and one message for all that is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qrpo_core.common.errors import ConfigError, DataError
from qrpo_core.config.comparison import ComparisonConfig
from qrpo_core.config.reading import parse_section
from qrpo_core.inspection.comparison_plan import seeds_of
from qrpo_core.pipeline.comparison import check_choice, groups
from qrpo_core.pipeline.held_out_part import HeldOutPart
from qrpo_core.pipeline.variants import Variant, check_variants, expand
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import changed

PAIRS = {"mode": "pairs"}


def variants(settings: dict[str, Any], sections: dict[str, Any], **asked: Any) -> tuple[Variant, ...]:
    return expand(changed(settings, training_data=PAIRS, **sections), ComparisonConfig(**asked))


def test_every_combination_has_a_name(settings: dict[str, Any]) -> None:
    found = variants(settings, {}, vary=("objective.kind=qrpo,dpo", "training.learning_rate=1e-6,2e-6"))
    assert [each.name for each in found] == [
        "qrpo, learning_rate 1e-6",
        "qrpo, learning_rate 2e-6",
        "dpo, learning_rate 1e-6",
        "dpo, learning_rate 2e-6",
    ]
    assert [each.experiment.training.learning_rate for each in found] == [1e-6, 2e-6] * 2
    assert found[3].with_seed(7).training.seed == 7
    assert found[3].with_seed(7).objective.kind == "dpo"


def test_bound_settings_are_grids_of_their_own(settings: dict[str, Any]) -> None:
    asked = ("objective.kind=simpo objective.beta=2,10 objective.gamma_beta_ratio=0.3", "objective.kind=sft")
    found = variants(
        settings, {}, variants=asked, vary=("training.lora_targets=[q_proj,v_proj]", "training.lora_rank=4")
    )
    assert [each.experiment.objective.beta for each in found] == [2.0, 10.0, 0.1]
    assert [each.experiment.objective.gamma_beta_ratio for each in found] == [0.3, 0.3, 0.5]
    assert found[0].experiment.training.lora_targets == ("q_proj", "v_proj")


def test_settings_of_the_file_that_are_anothers_are_left_out(settings: dict[str, Any]) -> None:
    own = {"objective": {"transform": "power", "exponent": 2.0, "beta": 0.3}}
    qrpo, dpo = variants(settings, own, vary=("objective.kind=qrpo,dpo",))
    assert qrpo.experiment.objective.exponent == 2.0
    assert qrpo.dropped == ()
    assert set(dpo.dropped) == {"objective.transform", "objective.exponent"}
    assert dpo.experiment.objective.beta == 0.3


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"vary": ("objective.kind=dpo,sft", "objective.normaliser=auto,finite")},
            r"2 of 4 variants.*dpo, normaliser finite.*sft, normaliser finite.*--variant",
        ),
        ({"vary": ("objective.kind=qrpo,dbo",)}, "1 of 2 variants.*objective.kind = 'dbo'"),
        (
            {"vary": ("objective.beta=0.1,0.10",)},
            "beta 0.10 trains the same policy as beta 0.1: correct or remove",
        ),
        (
            {"vary": ("training.micro_batch_tokens=512,1024",)},
            "micro_batch_tokens 1024 trains the same policy as micro_batch_tokens 512",
        ),
        (
            {"vary": ("objective.normaliser=tie_aware,auto",)},
            "normaliser auto trains the same policy as normaliser tie_aware",
        ),
        (
            {"vary": ("objective.kind=qrpo,sft", "objective.beta=0.1,0.3")},
            "1 of 4 variants.*sft, beta 0.3 trains the same policy as sft, beta 0.1: bind settings",
        ),
        (
            {"vary": ("training.weights_dtype=auto,float32",)},  # with the precision fp32 of this file
            "weights_dtype float32 trains the same policy as weights_dtype auto",
        ),
        ({"vary": ("training.seed=1,2",)}, "training.seed is varied by --seeds"),
        ({"vary": ("prompts.limit=3",)}, "prompts.limit cannot be varied.*vary objective"),
        ({"vary": ("objective.beta",)}, "cannot read --vary 'objective.beta'"),
        ({"vary": ("objective.beta=1,",)}, "cannot read --vary"),
        ({"variants": ("",)}, "names no setting"),
        (
            {"vary": ("objective.beta=1",), "variants": ("objective.beta=2",)},
            "objective.beta is varied twice",
        ),
        ({"vary": ("training_data.mode=pairs,offline",)}, "cannot be compared.*offline"),
    ],
)
def test_what_cannot_be_compared_is_said(settings: dict[str, Any], asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        variants(settings, {}, **asked)


def test_settings_that_only_the_arithmetic_shows_are_not_the_same_policy(settings: dict[str, Any]) -> None:
    bf16 = {"training": settings["training"] | {"precision": "bf16"}}
    found = variants(settings, bf16, vary=("training.weights_dtype=auto,float32",))
    assert [each.experiment.training.trained_dtype for each in found] == ["bfloat16", "float32"]


def test_objectives_that_need_pairs_are_named_together(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"2 of 3 variants.*dpo: .*rebel: .*training_data.mode pairs suits"):
        expand(changed(settings), ComparisonConfig(vary=("objective.kind=qrpo,dpo,rebel",)))


def test_too_small_a_budget_is_said_of_each_variant(settings: dict[str, Any]) -> None:
    found = variants(settings, {}, vary=("objective.transform=identity,normal",))
    workspace = Workspace(found[0].experiment)
    few = variants(settings, {"sampling": {"references_per_prompt": 2}}, vary=("objective.kind=qrpo,dpo",))
    check_variants(workspace, few)
    fewer = variants(settings, {"sampling": {"references_per_prompt": 1}}, vary=("objective.kind=qrpo,dpo",))
    with pytest.raises(ConfigError, match=r"2 of 2 variants cannot be trained: qrpo: .*; dpo: "):
        check_variants(workspace, fewer)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"vary": ()}, "nothing varies"),
        ({"seeds": 1001}, "seeds = 1001 is refused"),
        ({"choose_by": "brevity", "choose_seeds": 2}, "choose_by, choose_seeds: nothing is chosen; add"),
    ],
)
def test_what_no_comparison_can_be_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_section(ComparisonConfig, {"vary": ("objective.beta=1,2",), **asked}, "qrpo compare")


def test_seeds_end_at_the_largest(settings: dict[str, Any]) -> None:
    found = variants(settings, {"training": {"seed": 2**32 - 3}}, vary=("objective.beta=1,2",))
    asked = ComparisonConfig(vary=("objective.beta=1,2",), seeds=3)
    assert seeds_of(found, asked)[1][-1] == 2**32 - 1
    with pytest.raises(ConfigError, match="the last training seed would be 4294967296"):
        seeds_of(found, asked.model_copy(update={"seeds": 4}))
    with pytest.raises(ConfigError, match="seed = -1 is refused"):
        changed(settings, training={"seed": -1})


@pytest.mark.parametrize(("share", "part"), [(1e-9, "validation"), (1 - 1e-9, "test")])
def test_a_part_without_prompts_is_said_before_anything_is_trained(
    settings: dict[str, Any], share: float, part: str
) -> None:
    config = ComparisonConfig(vary=("objective.beta=1,2",), choose_on="validation", validation_share=share)
    found = variants(settings, {}, vary=config.vary)
    with pytest.raises(DataError, match=f"none of the .* held-out prompts is in the {part} part"):
        check_choice(Workspace(found[0].experiment), config, found)


def test_groups_and_parts(settings: dict[str, Any]) -> None:
    found = variants(settings, {}, vary=("objective.kind=qrpo,dpo", "objective.beta=0.1,0.3"))
    config = ComparisonConfig(vary=("objective.beta=1",), choose_on="validation", validation_share=0.3)
    assert groups(config, found) == {
        "qrpo": ["qrpo, beta 0.1", "qrpo, beta 0.3"],
        "dpo": ["dpo, beta 0.1", "dpo, beta 0.3"],
    }
    prompts = [f"{number:032x}" for number in range(2000)]
    validation, test = HeldOutPart.of(config, "validation"), HeldOutPart.of(config, "test")
    assert validation is not None
    assert test is not None
    chosen, rest = np.array(validation.mask(prompts)), np.array(test.mask(prompts))
    assert (chosen != rest).all()
    # Six standard errors of a share of 0.3 among 2,000.
    assert abs(chosen.mean() - 0.3) < 6 * (0.21 / 2000) ** 0.5
    assert HeldOutPart.of(config.model_copy(update={"choose_on": "nothing"}), "test") is None
    workspace = Workspace(found[0].experiment)
    with pytest.raises(ConfigError, match="choose_by 'helpful' is neither"):
        check_choice(workspace, config.model_copy(update={"choose_by": "helpful"}), found)
    with pytest.raises(ConfigError, match=r"choose_within 'objective\.betta' is not a setting"):
        check_choice(workspace, config.model_copy(update={"choose_within": ("objective.betta",)}), found)
    with pytest.raises(ConfigError, match="choose_within 'model_dump' is not a setting"):
        check_choice(workspace, config.model_copy(update={"choose_within": ("model_dump",)}), found)
