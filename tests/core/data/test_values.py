"""Values of files and data sets: what a person sees is what is read, through kind file and kind hub alike."""

import datetime
import gzip
import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import DataError
from qrpo_core.config import PromptsConfig
from qrpo_core.data.sources import load_prompts


def config(kind, place, **fields):
    where = {"path": str(place)} if kind == "file" else {"name": str(place)}
    return PromptsConfig(kind=kind, **where, **{"held_out": 0.5, "ground_truth_field": "answer"} | fields)


def ground_truths(found):
    return [text and json.loads(text) for text in found.prompts["ground_truth"].to_pylist()]


def both(folder, name, **fields):
    """The ground truths of a file, which its directory as a data set gives as well."""
    found = load_prompts(config("file", folder / name, **fields))
    again = load_prompts(config("hub", folder, **fields))
    columns = ["prompt_id", "messages", "ground_truth", "ground_truth_digest", "split"]
    assert again.prompts.select(columns).equals(found.prompts.select(columns))
    kept = [name for name in found.offline.column_names if name != "source"]
    assert again.offline.select(kept).equals(found.offline.select(kept))
    assert again.counts == found.counts
    assert again.prompts["source"][1].as_py() == found.prompts["source"][1].as_py()
    return ground_truths(found)


def parquet(folder, values, kind=None):
    rows = {"prompt": [f"Question {n}?" for n in range(8)], "answer": pa.array(values, kind)}
    pq.write_table(pa.table(rows), folder / "train.parquet")
    return both(folder, "train.parquet")


BIG = 12345678901234567890124


@pytest.mark.parametrize(
    "values",
    [
        [BIG + n for n in range(8)],
        [2**63, 2**64, -(2**63) - 1, 0, 1, 2, 3, 10**30],
        [1, 1.0, 2.5, 3, 4.0, -0.5, 1e300, 7],
        [None, None, None, None, None, None, 1, 2.5],
        ["x0", 1, "2", 3.0, None, True, [1], {"a": None}],
        ["2024-01-31", "2024-02-01", "not a date", "", "007", "1e5", "NA", "null"],
        [{"a": 1}, {"a": 1, "b": None}, {}, {"c": [1, "x"]}, {"a": BIG}, {"a": 0.1}, {"a": []}, [[]]],
    ],
)
@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.jsonl.gz"])
def test_json_values_stay_what_they_are(tmp_path, values, name):
    rows = [{"prompt": f"Question {n}?", "answer": value} for n, value in enumerate(values)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text = (json.dumps(rows) if name.endswith(".json") else lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    found = both(tmp_path, name)
    assert found == values
    assert list(map(repr, found)) == list(map(repr, values))  # 1 is not 1.0


def test_cells_of_csv_are_text(tmp_path):
    answers = ["007", "1.50", "NA", "None", "2024-01-31", 'say "hi", twice', "two\nlines", ""]
    for name, delimiter in (("comma/train.csv", ","), ("tab/train.tsv", "\t")):
        path = tmp_path / name
        path.parent.mkdir()
        rows = [f'Question {n}?{delimiter}"{a.replace(chr(34), chr(34) * 2)}"' for n, a in enumerate(answers)]
        path.write_text("\ufeff" + "\r\n".join([f"prompt{delimiter}answer", *rows, ""]), newline="")
        assert both(path.parent, path.name) == [*answers[:-1], None]
        found = load_prompts(config("file", path))
        assert found.counts["without_ground_truth"] == 1
        assert found.prompts["source"].to_pylist()[6:] == [f"{path}:8", f"{path}:10"]


def test_csv_grades(tmp_path):
    rows = ["prompt,answer,completion,label", *(f"Q {n // 2}?,,c {n % 2},{n % 2 == 0}" for n in range(16))]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    fields = {"completion_fields": ("completion",), "completion_reward_field": "label"}
    both(tmp_path, "train.csv", **fields)
    found = load_prompts(config("file", tmp_path / "train.csv", **fields))
    assert found.offline["reward"].to_pylist() == [1.0, 0.0] * 8


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompt,answer\nx,1,2\ny,1\n", "the row has 3 cells, the header 2"),
        ("prompt,answr\nx,1\n", "no column 'answer'"),
        ("prompt,prompt,answer\n", "column 'prompt' stands twice"),
        ('prompt,answer\n"x"y,1\n', "not CSV"),
        (b"prompt,answer\n\xff,1\n", "not UTF-8"),
        ("", "the data set is empty"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path, text, says):
    (tmp_path / "a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=says):
        load_prompts(config("file", tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("kind", "values", "seen"),
    [
        (pa.float32(), [0.1, 1e-7, 3.0, 16777216.0, None, -0.25, 1e30, 0.3], None),
        (pa.float16(), np.array([0.1, 0.25, 3, 0, 1, 2, 4, 5], np.float16), [0.1, 0.25, 3, 0, 1, 2, 4, 5]),
        (pa.float64(), [0.1, 1 / 3, 3.0, 0.0, None, 1e300, 2.0, 5.0], None),
        (pa.uint64(), [2**64 - 1, 2**63, 0, 1, 2, 3, 4, 5], None),
        (
            pa.decimal128(38, 2),
            [Decimal("1.50"), Decimal("3.00"), Decimal("12345678901234567890123.45"), *[Decimal(0)] * 5],
            [1.5, 3, "12345678901234567890123.45", *[0] * 5],
        ),
        (pa.decimal256(60, 0), [Decimal(BIG), *[Decimal(n) for n in range(7)]], [BIG, *range(7)]),
        (
            pa.date32(),
            [datetime.date(2024, 1, n + 1) for n in range(8)],
            [f"2024-01-0{n + 1}" for n in range(8)],
        ),
        (
            pa.timestamp("us", "UTC"),
            [datetime.datetime(2024, 1, 1, n, tzinfo=datetime.UTC) for n in range(8)],
            [f"2024-01-01T0{n}:00:00+00:00" for n in range(8)],
        ),
        (
            pa.timestamp("ns"),
            np.array(["2024-01-01T00:00:00.000000001"] * 8, "datetime64[ns]"),
            ["2024-01-01T00:00:00.000000001"] * 8,
        ),
        (pa.time32("s"), [datetime.time(9, n) for n in range(8)], [f"09:0{n}:00" for n in range(8)]),
        (pa.list_(pa.float32()), [[0.1, None]] * 7 + [None], None),
        (pa.large_list(pa.float32()), [[0.1]] * 8, None),
        (pa.list_(pa.float32(), 2), [[0.1, 0.2]] * 8, None),
        (
            pa.struct({"a": pa.float32(), "b": pa.list_(pa.struct({"c": pa.date32()}))}),
            [{"a": 0.1, "b": [{"c": datetime.date(2024, 1, 1)}, None]}] * 8,
            [{"a": 0.1, "b": [{"c": "2024-01-01"}, None]}] * 8,
        ),
        (pa.map_(pa.string(), pa.float32()), [[("a", 0.1)]] * 8, [[["a", 0.1]]] * 8),
        (pa.dictionary(pa.int8(), pa.string()), ["a", "b"] * 4, None),
        (pa.json_(), ['{"a": 12345678901234567890124}', '"x"', "1", None, "[]", "1.5", "true", "0"], "json"),
    ],
)
def test_columns_of_tables(tmp_path, kind, values, seen):
    if seen == "json":
        seen = [value and json.loads(value) for value in values]
    found = parquet(tmp_path, values, kind)
    assert found == (values if seen is None else seen)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.binary(), b"x"),
        (pa.duration("s"), datetime.timedelta(1)),
        (pa.float32(), float("nan")),
        (pa.float64(), float("inf")),
    ],
)
def test_what_json_has_no_word_for_is_refused(tmp_path, kind, value):
    with pytest.raises(DataError, match="the ground truth is not a JSON value"):
        parquet(tmp_path, [value] * 8, kind)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_float32_is_its_shortest_spelling(numbers):
    from qrpo_core.data.arrow_rows import table_rows

    table = pa.table({"a": pa.array(numbers, pa.float32())})
    for row, number in zip(table_rows(table), numbers, strict=True):
        assert np.float32(row["a"]) == np.float32(number)  # nothing is lost
        assert len(repr(row["a"])) <= len(repr(float(np.float32(number))))


def test_grades_of_float32_and_decimal(tmp_path):
    fields = {"completion_fields": ("a",), "completion_reward_field": "g", "ground_truth_field": None}
    for kind, value in ((pa.float32(), 0.1), (pa.decimal128(5, 2), Decimal("0.10")), (pa.float16(), 0.1)):
        values = np.full(8, value, np.float16) if kind == pa.float16() else [value] * 8
        table = {"prompt": [f"{n}?" for n in range(8)], "a": ["x"] * 8, "g": pa.array(values, kind)}
        pq.write_table(pa.table(table), tmp_path / "rows.parquet")
        found = load_prompts(config("file", tmp_path / "rows.parquet", **fields))
        assert found.offline["reward"].to_pylist() == [0.1] * 8


ROWS = [{"prompt": f"Question {n}?", "answer": n} for n in range(8)]


def test_items_of_an_array_have_places(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    found = load_prompts(config("file", tmp_path / "rows.json"))
    assert found.prompts["source"].to_pylist() == [
        f"{tmp_path}/rows.json:{2 + 4 * n} item {n}" for n in range(8)
    ]
    assert ground_truths(found) == list(range(8))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"prompt": "x"}, 3]', "the row is an integer, not an object [{path}:1 item 1]"),
        (
            '[{"prompt": "x"}\n {"prompt": "y"}]',
            "the array goes on without a comma, or is cut [{path}:1 item 0]",
        ),
        (
            '[{"prompt": "x"},\n {"prompt": y}]',
            "the item is not JSON: Expecting value [{path}:2 item 1]",
        ),
        (
            '[{"prompt": "x", "prompt": "y"}]',
            "the item is not JSON: key 'prompt' stands twice [{path}:1 item 0]",
        ),
        ('[{"prompt": "x"}] [1]', "the file goes on behind the array [{path}:1]"),
        ('[{"prompt": "x"}', "the array goes on without a comma, or is cut [{path}:1 item 0]"),
        ("[]", "the data set is empty"),
        (
            '{\n "data": [{"prompt": "x"}]\n}',
            "the file begins with an object over several lines [{path}:1]",
        ),
        ("\ufeff".encode("utf-16-le") + "{}".encode("utf-16-le"), "the file is UTF-16 [{path}:1]"),
    ],
)
def test_arrays_that_cannot_be_read(tmp_path, text, says):
    path = tmp_path / "rows.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        load_prompts(config("file", path, ground_truth_field=None))
    assert says.replace("{path}", str(path)) in str(caught.value)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_slices_and_sums_of_splits_are_the_librarys(tmp_path):
    import datasets

    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", [{"prompt": f"Test {n}?", "answer": n} for n in range(3)])
    for split in ("train[:50%]", "train[2:-1]", "train[-3:]+test", "test+train[30%:70%]"):
        found = load_prompts(config("hub", tmp_path, split=split))
        rows = datasets.load_dataset(str(tmp_path), split=split, cache_dir=tmp_path / ".cache")
        assert [turns[0]["content"] for turns in found.prompts["messages"].to_pylist()] == rows["prompt"][:]


def test_files_with_other_columns_are_named_by_their_rows(tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.jsonl", [{"prompt": "x", "label": 2}])
    with pytest.raises(DataError, match=rf"no field 'answer' \[{tmp_path}/b.jsonl:1\]"):
        load_prompts(config("hub", tmp_path))
    assert load_prompts(config("hub", tmp_path, on_unusable="skip")).counts["unreadable_rows"] == 1


def card(folder, text):
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n{text}---\n")


def test_options_of_the_card(tmp_path):
    card(tmp_path, '  data_files: rows.csv\n  sep: ";"\n')
    (tmp_path / "rows.csv").write_text("prompt;answer\n" + "".join(f"Q {n};0{n}\n" for n in range(8)))
    assert ground_truths(load_prompts(config("hub", tmp_path))) == [f"0{n}" for n in range(8)]
    card(tmp_path, "  data_files: rows.csv\n  names: [prompt, answer]\n")
    with pytest.raises(DataError, match=r"the card of data set .* sets names for its csv files"):
        load_prompts(config("hub", tmp_path))
    card(tmp_path, "  data_files: rows.json\n  field: data\n")
    (tmp_path / "rows.json").write_text(json.dumps({"data": [row | {"answer": BIG} for row in ROWS]}))
    found = load_prompts(config("hub", tmp_path))
    assert ground_truths(found) == [BIG] * 8
    assert found.prompts["source"][2].as_py() == f"{tmp_path}/rows.json item 2 of 'data'"


@pytest.mark.parametrize("streaming", [False, True])
def test_other_files_are_read_by_the_library(tmp_path, streaming):
    import datasets

    text = tmp_path / "text"
    text.mkdir()
    (text / "train.txt").write_text("".join(f"Question {n}?\n" for n in range(8)))
    fields = {"ground_truth_field": None, "prompt_field": "text", "streaming": streaming}
    found = load_prompts(config("hub", text, **fields))
    assert found.prompts["source"][3].as_py() == f"{text}[train] row 3"
    arrow = tmp_path / "arrow"
    arrow.mkdir()
    columns = {"prompt": [row["prompt"] for row in ROWS], "answer": pa.array([0.1] * 8, pa.float32())}
    writer = datasets.arrow_writer.ArrowWriter(path=str(arrow / "train.arrow"))
    writer.write_table(pa.table(columns))
    writer.finalize()
    assert ground_truths(load_prompts(config("hub", arrow, streaming=streaming))) == [0.1] * 8
    with pytest.raises(DataError, match=r"no column 'anwser' \[.*\[train\]\]: did you mean 'answer'"):
        load_prompts(config("hub", arrow, ground_truth_field="anwser", streaming=streaming))
    with pytest.raises(DataError, match="has no split 'test'"):
        load_prompts(config("hub", arrow, split="test", streaming=streaming))


def test_packed_files_are_named(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "train.zip", "w") as file:
        file.writestr("train.jsonl", json.dumps(ROWS[0]))
    with pytest.raises(DataError, match=r"files of data set .* are packed as .zip"):
        load_prompts(config("hub", tmp_path))
