"""The documents and the code agree."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import yaml

from flows.cli.main import FLOWS
from qrpo_core.common.schemas import STATUSES
from qrpo_core.config import Experiment, ObjectiveConfig, RewardConfig, SamplingConfig
from qrpo_core.config.reading import parse_experiment
from qrpo_core.pipeline.stage_names import ANNOTATE_COMPLETIONS, SAMPLE_COMPLETIONS, STAGES
from tests.documents import DOCS, PAGES, ROOT, blocks, name

#: The modules of tasks/ that are stages, in the order of the README's diagram.
TASKS = (
    "prepare_policy",
    "prepare_prompts",
    "sample_references",
    "annotate_rewards",
    "compute_quantiles",
    "score_reference_logprobs",
    "assemble_training_set",
    "train_policy",
    "evaluate_policy",
)


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_parts_are_current(generate: ModuleType) -> None:
    for path, text in generate.pages().items():
        assert path.read_text(encoding="utf-8") == text, "run `python docs/generate.py`"


def test_every_setting_is_in_the_reference_and_in_the_glossary(generate: ModuleType) -> None:
    text = (DOCS / "reference" / "configuration.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^## `([a-z_.]+)`\n(.*?)(?=^## |\Z)", text, re.S | re.M))
    assert parts.keys() == generate.sections().keys()
    glossary = (DOCS / "glossary.md").read_text(encoding="utf-8")
    for section, model in generate.sections().items():
        assert set(re.findall(r"^\| `(\w+)`", parts[section], re.M)) == set(model.model_fields), section
        (line,) = re.findall(rf"^- \[`{re.escape(section)}`\].*", glossary, re.M)
        assert set(re.findall(r"`(\w+)`", line.partition(": ")[2])) == set(model.model_fields), section


def test_every_command_and_option_is_in_the_reference(generate: ModuleType) -> None:
    text = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    explained = text.partition("```\n\n")[2]  # below the usage
    for verb, (usage, options) in generate.commands().items():
        assert usage in text
        assert f"`qrpo {verb}`" in explained
        assert [option for option in options if option not in explained] == []


def test_every_term_of_the_interface_is_in_the_glossary(generate: ModuleType) -> None:
    terms = set(re.findall(r"^\| (?:`([^`]+)`|\*\*([^*]+)\*\*) \|", (DOCS / "glossary.md").read_text(), re.M))
    defined = {code or word for code, word in terms}
    sections = set(Experiment.model_fields) - {"name"}
    choices = {
        choice
        for model, field in ((RewardConfig, "kind"), (ObjectiveConfig, "kind"))
        for choice in get_args(model.model_fields[field].annotation)
    }
    wanted = sections | choices | {*TASKS, *STATUSES, *FLOWS, *generate.commands()}
    assert wanted - defined == set()
    assert [each for each in TASKS if not (ROOT / "tasks" / f"{each}.py").is_file()] == []
    stages = {
        re.sub(", (before|after)$", "", stage)
        for stage in (*STAGES, SAMPLE_COMPLETIONS, ANNOTATE_COMPLETIONS)
    }
    spoken = defined | {each.replace("_", " ").replace("logprobs", "log-probs") for each in TASKS}
    assert stages - spoken == set()
    engines = get_args(SamplingConfig.model_fields["engine"].annotation)
    transforms = get_args(ObjectiveConfig.model_fields["transform"].annotation)
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    assert [each for each in (*engines, *transforms) if f"`{each}`" not in text] == []


def _anchors(page: Path) -> set[str]:
    """Ids of the page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = (re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall(r"^#+ (.*)$", text, re.M))
    return {title.strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target, _, anchor in re.findall(r"\]\(((?!https?:)[^)#\s]*)(#([^)\s]+))?\)", text):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path), f"{target}#{anchor}"


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert [page for page in pages if page != "README.md" and f"({page})" not in index] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_make_targets_and_scripts_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        code = [
            *re.findall(r"`([^`\n]+)`", text),
            *(line for each in blocks(page) for line in each.splitlines()),
        ]
        for line in code:
            if match := re.match(r"make ([a-z-]+)", line):
                assert match[1] in targets, f"{name(page)}: {line}"
            for script in re.findall(r"python ((?:benchmarks|docs)/\w+\.py)", line):
                assert (ROOT / script).is_file(), f"{name(page)}: {line}"


def test_experiments_in_the_documents_are_valid() -> None:
    """Each YAML block is a part of an experiment; what it leaves out is filled in."""
    base: dict[str, Any] = {
        "model": {"path": "model"},
        "prompts": {"kind": "file", "path": "rows.jsonl", "ground_truth_field": "answer"},
        "reward": {"kind": "length", "max_words": 9},
    }
    seen = 0
    for page in PAGES:
        for block in blocks(page, "yaml"):
            parse_experiment(base | yaml.safe_load(block))
            seen += 1
    assert seen > 12


def test_python_in_the_documents_compiles() -> None:
    for page in PAGES:
        for block in blocks(page, "python"):
            ast.parse(block, name(page))


def test_the_pages_name_tests_that_exist() -> None:
    text = (DOCS / "reference" / "odd-inputs.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:core|flows|deployments)/[^`]*)`", text)
    assert len(named) > 15
    assert [path for path in named if not (ROOT / "tests" / path).is_file()] == []


def test_deployments_are_documented() -> None:
    deployments = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    text = (DOCS / "how-to" / "service.md").read_text(encoding="utf-8")
    assert [each["name"] for each in deployments if f"`{each['name']}`" not in text] == []


def test_the_diagram_has_the_stages() -> None:
    (diagram,) = blocks(ROOT / "README.md", "mermaid")
    assert [each for each in TASKS if each != "prepare_policy" and each not in diagram] == []


def test_packages_of_the_tree_are_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = [path.parent.name for path in (ROOT / "qrpo_core").glob("*/__init__.py")]
    assert [room for room in rooms if f"{room}/" not in text] == []


def test_no_python_file_is_longer_than_350_lines() -> None:
    files = [path for top in ("flows", "tasks", "qrpo_core") for path in (ROOT / top).rglob("*.py")]
    long = {str(path): count for path in files if (count := len(path.read_text().splitlines())) > 350}
    assert not long


def test_the_table_of_faults_is_the_benchmarks() -> None:
    outcomes = json.loads((ROOT / "benchmarks" / "results" / "faults.json").read_text())["outcomes"]
    names = ("fault", "back_end", "injected", "bought", "lost", "twice", "in_flight", "destroyed", "wrong")
    rows = [
        "| " + " | ".join(str(each[name]) for name in names) + " |" for each in outcomes if each["injected"]
    ]
    assert "\n".join(rows) in (ROOT / "docs" / "reference" / "faults.md").read_text(encoding="utf-8")
    assert {each["back_end"] for each in outcomes} == {"directory", "S3"}
    assert all(each["lost"] == each["wrong"] == 0 for each in outcomes)
    assert all(each["twice"] == each["in_flight"] + each["destroyed"] for each in outcomes)


def test_the_table_of_rounded_policies_is_the_benchmarks() -> None:
    rates = json.loads((ROOT / "benchmarks" / "results" / "saved_precision.json").read_text())["rates"]
    text = (ROOT / "docs" / "how-to" / "engines.md").read_text(encoding="utf-8")
    assert [each["learning_rate"] for each in rates] == [1e-6, 1e-5, 1e-4]
    for each in rates:
        share, off = (each["trained_rows"][name] for name in ("share", "noise_nats"))
        cells = [f"{100 * share[way]:.1f} %, {off[way]:.3g} nats off" for way in ("nearest", "stochastic")]
        exponent = f"{each['learning_rate']:.0e}".replace("e-0", "e-")
        ratio = each["trained_rows"]["mean_log_ratio_nats"]
        assert f"| {exponent} | {ratio:.3g} | {cells[0]} | {cells[1]} |" in text
        assert abs(share["stochastic"] - 1) <= 0.1, "what is shipped keeps the training"


def test_the_table_of_arithmetics_is_the_file() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "weights_dtype.json").read_text(encoding="utf-8"))
    text = (DOCS / "reference" / "method.md").read_text(encoding="utf-8")
    for each in found["trained"]:
        rate = f"{each['learning_rate']:.0e}".replace("e-0", "e-")
        cells = [f"{each[name]:.2f} nats" for name in ("reached_nats", "miss_nats")]
        assert f"| {rate} | {each['arithmetic']} | {' | '.join(cells)} | {each['loss'][1]:.4f} |" in text


def test_the_table_of_planted_judges_is_the_benchmarks() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "pool_place.json").read_text(encoding="utf-8"))
    page = (DOCS / "how-to" / "pool-report.md").read_text(encoding="utf-8")
    for row in found["rows"]:
        shares = f"{row['interval_holds_the_place']:.0%} | {row['parts']:.0%}"
        estimate = f"{row['estimate_mean']:.2f} ± {row['estimate_sd']:.2f}"
        assert f"| {row['judge']} | {row['place']:g} | {row['references']} | {estimate} | {shares} |" in page
    assert page.count(" ± ") == len(found["rows"])
    assert f"{found['pools']} pools of {found['prompts']} prompts" in page


def test_the_readmes_demo_is_the_benchmarks() -> None:
    """Every line of the README's first blocks was printed by the run that the result file records."""
    found = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text[text.index("`make demo` creates") :], flags=re.DOTALL)[:3]
    for block, command in zip(blocks, ("run", "again", "plan"), strict=True):
        printed = {line.rstrip() for name in ("stages", "lines") for line in found[command][name]}
        quoted = [line.rstrip() for line in block.splitlines() if line.strip() not in ("", "…")]
        assert len(quoted) > 5
        assert not [line for line in quoted if line not in printed]
    assert any("survived" in line for line in found["run"]["lines"])
    assert any("float32 arithmetic" in line for line in found["run"]["lines"])


def test_paths_in_the_readme_exist() -> None:
    """Files and folders in backticks, and the rooms of its tree, which are all that there are."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^  (\w+)/ ", text, re.MULTILINE)
    packages = {path.parent.name for path in (ROOT / "qrpo_core").glob("*/__init__.py")}
    assert sorted(rooms) == sorted(packages)
    paths = re.findall(r"`((?:qrpo_core/|flows/|tasks/|deployments/)[\w/.]*)`", text)
    paths += re.findall(r"^(\w+/) ", text, re.MULTILINE)
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_odd_inputs_name_tests_that_exist() -> None:
    text = (DOCS / "reference" / "odd-inputs.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:core|flows|deployments)/[^`]*)`", text)
    assert len(named) > 15
    assert [path for path in named if not (ROOT / "tests" / path).is_file()] == []


def test_the_tour_of_the_code_names_what_is_there() -> None:
    text = (DOCS / "code-tour.md").read_text(encoding="utf-8")
    places = re.findall(r"`((?:flows|tasks|qrpo_core)/[\w/.]*)`", text)
    assert len(places) > 40
    assert [place for place in places if not (ROOT / place).exists()] == []
    named = re.findall(r"`([\w.]+)`(?: and `([\w.]+)`)? (?:in|of)\s+`([\w/]+\.py)`", text)
    named += [(name, "", place) for place, name in re.findall(r"`([\w/]+\.py)` \(`(\w+)`\)", text)]
    assert len(named) >= 12
    for first, second, place in named:
        code = (ROOT / place).read_text(encoding="utf-8")
        for part in f"{first}.{second}".strip(".").split("."):
            assert re.search(rf"\b(def|class) {part}\b|^{part}(: .*)? = ", code, re.MULTILINE), (part, place)
    table = text[: text.index("## Where is")]
    assert [stage for stage in STAGES if stage not in table] == []


def test_the_tables_of_speed_are_the_files(generate: ModuleType) -> None:
    """Every ratio of the file is in the table, those where TRL is faster too; the files are of a commit."""
    measured = json.loads((generate.RESULTS / "training_vs_trl.json").read_text(encoding="utf-8"))
    page = generate.beside_trl((DOCS / "how-to" / "train-from-python.md").read_text(encoding="utf-8"))
    shown = [setting for setting in measured["ratios_ours_over_trl"] if "checkpointing" not in setting]
    for setting in shown:
        ratios = measured["ratios_ours_over_trl"][setting]
        assert f"| {ratios['tokens_per_second']:.2f}" in page
        assert f"| {ratios['peak_memory']:.2f} |" in page
    assert {"ours_dpo / trl_precomputed", "ours_dpo / trl_reference"} <= set(shown)
    for file in generate.RESULTS.rglob("*.json"):
        if file.stem == "training_vs_trl" or file.parent.name == "gpu":
            assert "+changes" not in json.loads(file.read_text(encoding="utf-8"))["commit"], file
