"""Drawn prompts: templates and reasoning-gym tasks."""

import json
import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo_core.common.errors import ConfigError, DataError
from qrpo_core.config import PromptsConfig
from qrpo_core.data.generated import CHUNK, SEED_STRIDE
from qrpo_core.data.sources import load_prompts

WORDS = {"thing": ("a cat", "a dog", "a boat", "the sea"), "mood": ("calm", "busy")}
TEMPLATES = ("Write about {thing}.", "Is {thing} {mood}? {thing}!")


def template(size=12, templates=TEMPLATES, words=WORDS, **fields):
    return PromptsConfig(
        kind="template", templates=templates, words=words, size=size, **({"held_out": 0.5} | fields)
    )


def gym(number, task="chain_sum", from_seed=0, **parameters):
    return PromptsConfig(
        kind="reasoning_gym", task=task, size=number, seed=from_seed, parameters=parameters, held_out=0.5
    )


def texts(config):
    return [row[-1]["content"] for row in load_prompts(config).prompts["messages"].to_pylist()]


def ground_truths(config):
    return [json.loads(text) for text in load_prompts(config).prompts["ground_truth"].to_pylist()]


def test_all_of_the_product():
    expected = {f"Write about {thing}." for thing in WORDS["thing"]}
    expected |= {f"Is {thing} {mood}? {thing}!" for thing in WORDS["thing"] for mood in WORDS["mood"]}
    assert set(texts(template(12))) == expected


def test_every_prompt_differs_and_the_seed_matters():
    drawn = [tuple(texts(template(8, seed=seed))) for seed in range(4)]
    assert all(len(set(each)) == 8 for each in drawn)
    assert len(set(drawn)) == 4


@settings(deadline=None, max_examples=30)
@given(small=st.integers(6, 40), more=st.integers(0, 40), seed=st.integers(0, 5))
def test_a_larger_size_keeps_the_earlier_prompts(small, more, seed):
    words = {"a": tuple(string.ascii_lowercase), "b": ("x", "y", "z", "w")}
    few, many = (
        texts(template(size, ("{a} {b}",), words, seed=seed, held_out=0.4)) for size in (small, small + more)
    )
    assert many[:small] == few


def test_another_word_changes_few_prompts():
    words = {"a": tuple(string.ascii_lowercase), "b": ("x", "y", "z", "w")}
    before = texts(template(50, ("{a} {b}",), words))
    after = texts(template(50, ("{a} {b}",), words | {"a": ("new", *words["a"])}))
    kept = [text for text in after if "new" not in text]
    assert kept == before[: len(kept)]
    assert len(kept) >= 40


def test_equal_sentences_are_one_prompt():
    words = {"a": ("x", "y"), "b": ("x", "y")}
    with pytest.raises(ConfigError, match="give 2 distinct prompts"):
        load_prompts(template(3, ("say {a}", "say {b}"), words))


def test_braces_and_words_with_braces():
    words = {"a": ("{b}", "me", "us", "you")}
    assert set(texts(template(4, ("say {{it}} to {a}",), words))) == {
        f"say {{it}} to {word}" for word in words["a"]
    }


@pytest.mark.parametrize(
    ("templates", "words", "says"),
    [
        (("of {thin}",), {"thing": ("a",)}, "slot 'thin' of template 'of {thin}' has no word list"),
        (("of {thin}",), {"thing": ("a",)}, "did you mean 'thing'?"),
        (("of {thing}",), {}, "there are no lists"),
        (("of {thing}",), {"thing": ("a",), "thin": ("b",)}, "no template has a slot 'thin'"),
        (("of {thing}",), {"thing": ()}, "the word list of 'thing' is empty"),
        (("of {}",), {}, "slot '' of template 'of {}' is not a plain name"),
        (("of {0}",), {}, "is not a plain name"),
        (("of {thing.x}",), {}, "is not a plain name"),
        (("of {thing!r}",), {}, "is not a plain name"),
        (("of {thing:>9}",), {}, "is not a plain name"),
        (("of {thing",), {}, "cannot read template 'of {thing'"),
        (("of it", "of {a}{b}"), {"a": ("x", "y"), "b": ("x",)}, "give 3 distinct prompts"),
        (("{a}{b}{c}{d}{e}",), dict.fromkeys("abcde", ("x",) * 20), "3,200,000 combinations"),
    ],
)
def test_refused_templates(templates, words, says):
    with pytest.raises(ConfigError) as caught:
        load_prompts(template(5, templates, words))
    assert says in str(caught.value)
    assert caught.value.where.startswith("prompts.")


def test_template_that_asks_nothing():
    with pytest.raises(DataError, match="the prompt is empty"):
        load_prompts(template(2, (" {a}",), {"a": ("", "x")}))


def test_ground_truth_serves_the_tasks_own_scorer():
    from reasoning_gym import create_dataset

    config = gym(20, max_terms=3, max_digits=2)
    for ground_truth in ground_truths(config):
        assert ground_truth["task"] == "chain_sum"
        assert ground_truth["parameters"] == {"max_terms": 3, "max_digits": 2}
        scorer = create_dataset(ground_truth["task"], **ground_truth["parameters"])
        entry = ground_truth["entry"]
        assert scorer.score_answer(entry["answer"], entry) == 1.0
        assert scorer.score_answer("no number", entry) < 1.0


def test_items_are_those_of_the_library():
    from reasoning_gym import create_dataset

    for seed in (0, 3):
        data = create_dataset("chain_sum", seed=SEED_STRIDE * seed, size=30)
        assert texts(gym(30, from_seed=seed)) == [data[index]["question"] for index in range(30)]


def test_neighbouring_seeds_share_no_items():
    first, second = (set(texts(gym(60, from_seed=seed, min_digits=4))) for seed in (0, 1))
    assert not first & second


@pytest.mark.parametrize("task", ["chain_sum", "acre", "list_functions"])
def test_a_larger_size_keeps_the_earlier_items(task):
    """acre draws other items for another size, list_functions from Python's global generator."""
    few, many = (load_prompts(gym(size, task)).prompts for size in (15, 40))
    assert many.slice(0, 15).equals(few)


def test_the_global_generator_is_left_alone():
    random.seed(7)
    expected = random.random()
    random.seed(7)
    load_prompts(gym(5, "list_functions"))
    assert random.random() == expected


def test_a_size_beyond_one_chunk():
    drawn = texts(gym(CHUNK + 50, min_terms=4))
    assert len(set(drawn)) == CHUNK + 50


def test_questions_drawn_again_are_passed_over_and_counted():
    found = load_prompts(gym(150, min_terms=2, max_terms=2, max_digits=1))
    assert found.prompts.num_rows == 150
    assert found.counts["merged"] > 0
    assert found.counts["read"] == 150 + found.counts["merged"]


def test_too_few_distinct_questions():
    with pytest.raises(DataError, match=r"gave 200 distinct questions .* set prompts.size to 200 or less"):
        load_prompts(gym(201, min_terms=2, max_terms=2, max_digits=1))


def test_several_right_answers_of_one_question_agree():
    """n_queens repeats boards with other solutions; the task accepts each, so they are one prompt."""
    counts = load_prompts(gym(150, "n_queens")).counts
    assert counts["merged"] > 0
    assert counts["prompts"] == 150


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (gym(5, "chain_sums"), "unknown reasoning-gym task 'chain_sums' [prompts.task]: did you mean"),
        (gym(5, max_term=3), "has no parameter 'max_term' [prompts.parameters.max_term]: did you mean"),
        (gym(5, size=3), "set prompts.size"),
        (gym(5, min_terms=4, max_terms=2), "max_terms must be >= min_terms"),
        (gym(5, min_terms="two"), "task 'chain_sum' refuses"),
    ],
)
def test_refused_tasks(config, says):
    with pytest.raises(ConfigError) as caught:
        load_prompts(config)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("gsm_symbolic", "cannot be written as JSON: Object of type Fraction"),
        ("graph_color", "a key is not a string"),
        ("rearc", "judges its own answer otherwise once the entry is written as JSON"),
    ],
)
def test_tasks_that_json_cannot_hold_are_refused_by_name(task, says):
    with pytest.raises(DataError, match=says) as caught:
        load_prompts(gym(30, task))
    assert caught.value.where.startswith(f"{task}(seed=0)[")
