"""Files: JSON Lines and Parquet, local and in S3."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qrpo_core.common import hashing
from qrpo_core.common.errors import DataError
from qrpo_core.config import PromptsConfig
from qrpo_core.data.sources import load_prompts, source_identity

ROWS = [{"prompt": f"Question {number}?", "answer": number} for number in range(20)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def config(path, **fields):
    return PromptsConfig(kind="file", path=str(path), **fields)


def refused(path, content, **fields):
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_prompts(config(path, **fields))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".jsonl.gz", ".parquet"])
def test_every_format_gives_the_same_prompts(tmp_path, ending):
    path = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(gzip.compress(lines(ROWS)) if ending.endswith(".gz") else lines(ROWS))
    found = load_prompts(config(path, ground_truth_field="answer"))
    prompts = found.prompts.to_pylist()
    assert [row["messages"][0]["content"] for row in prompts] == [row["prompt"] for row in ROWS]
    assert [json.loads(row["ground_truth"]) for row in prompts] == list(range(20))
    expected = f"{path} row 3" if ending == ".parquet" else f"{path}:4"
    assert prompts[3]["source"] == expected
    assert source_identity(config(path)) == {"sha256": hashing.digest_file(path)}


def test_parquet_message_lists_and_pairs(tmp_path):
    ask, good, bad = (
        {"role": "user", "content": "Why?", "name": None},
        {"role": "assistant", "content": "So.", "name": None},
        {"role": "assistant", "content": "No.", "name": None},
    )
    rows = [
        {"chosen": [ask | {"content": f"{n}?"}, good], "rejected": [ask | {"content": f"{n}?"}, bad]}
        for n in range(20)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    found = load_prompts(config(tmp_path / "pairs.parquet", chosen_field="chosen", rejected_field="rejected"))
    assert found.prompts["messages"][5].as_py() == [{"role": "user", "content": "5?"}]
    assert found.offline["text"].to_pylist() == ["So.", "No."] * 20
    assert "ignored_message_keys" not in found.counts


def test_identity_is_of_the_content_not_of_the_path(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(ROWS))
    first, second = (source_identity(config(tmp_path / f"{name}.jsonl")) for name in ("a", "b"))
    assert first == second
    (tmp_path / "b.jsonl").write_bytes(lines(ROWS[:-1]))
    assert source_identity(config(tmp_path / "b.jsonl")) != first


def test_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(ROWS[:1]) + b"\n  \r\n" + lines(ROWS[1:]))
    found = load_prompts(config(path))
    assert found.counts["read"] == 20
    assert found.counts["blank_lines"] == 2
    assert found.prompts["source"][1].as_py() == f"{path}:4"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "x"', "the row is not JSON: Expecting ',' delimiter at column 15"),
        (b"prompt", "the row is not JSON: Expecting value at column 1"),
        (b'["x"]', "the row is a list, not an object"),
        (b'{"prompt": "x", "prompt": "y"}', "key 'prompt' stands twice"),
        (b'{"prompt": "\xff"}', "the row is not UTF-8 at byte 12"),
        (b"[" * 100_000, "the row is not readable: maximum recursion depth"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"promt": "x"}', "no field 'prompt'"),
        (b'{"prompt": ["x"]}', "a message has role and content"),
        (b'{"prompt": "x", "answer": NaN}', "the ground truth is not a JSON value"),
    ],
)
def test_an_unreadable_row_is_named_by_its_line(tmp_path, line, says):
    path = tmp_path / "rows.jsonl"
    good = lines(ROWS[:2])
    fields = {"ground_truth_field": "answer"} if b"NaN" in line else {}
    message = refused(path, good + line + b"\n" + good, **fields)
    assert says in message
    assert f"[{path}:3]" in message


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_an_empty_data_set(tmp_path, name):
    path = tmp_path / name
    empty = {"rows.jsonl": b"", "rows.jsonl.gz": gzip.compress(b"\n")}.get(name)
    if empty is None:
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
        empty = path.read_bytes()
    assert f"the data set is empty [{path}]" in refused(path, empty)


def test_files_that_are_not_what_they_are_called(tmp_path):
    assert "not a Parquet file" in refused(tmp_path / "a.parquet", lines(ROWS))
    assert "BadGzipFile" in refused(tmp_path / "a.jsonl.gz", lines(ROWS))
    assert "EOFError" in refused(tmp_path / "b.jsonl.gz", gzip.compress(lines(ROWS))[:-9])
    assert "unknown format" in refused(tmp_path / "a.xlsx", b"prompt\n")
    assert "unknown format" in refused(tmp_path / "a.parquet.gz", b"prompt\n")


def test_a_parquet_column_that_is_not_there(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    with pytest.raises(DataError, match=r"no column 'answers' .* did you mean 'answer'"):
        load_prompts(config(path, ground_truth_field="answers"))


def test_a_parquet_ground_truth_that_json_does_not_know(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["x"], "answer": [b"\xff"]}), path)
    with pytest.raises(DataError, match=r"ground truth is not a JSON value: .*bytes") as caught:
        load_prompts(config(path, ground_truth_field="answer"))
    assert caught.value.where == f"{path} row 0"


@pytest.mark.parametrize("read", [load_prompts, source_identity])
def test_missing_files_and_directories(tmp_path, read):
    (tmp_path / "prompts.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(DataError, match=r"no file .*promts.jsonl.* did you mean 'prompts.jsonl'"):
        read(config(tmp_path / "promts.jsonl"))
    with pytest.raises(DataError, match=r"no file .* give the path of a file that exists"):
        read(config(tmp_path / "nowhere" / "a.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is a directory"):
        read(config(tmp_path / "folder.jsonl"))
    with pytest.raises(DataError, match="Protocol not known: nosuch"):
        read(config("nosuch://a/b.jsonl"))


@pytest.fixture(scope="module")
def bucket():
    """Options of a real S3 client against moto's server, with a bucket `data`."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "key": "test",
        "secret": "test",
        "endpoint_url": f"http://{host}:{port}",
        "client_kwargs": {"region_name": "eu-west-1"},
        "use_listings_cache": False,
    }
    s3fs.S3FileSystem(**options).mkdir("data")
    yield options
    server.stop()


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_s3_gives_what_the_local_file_gives(tmp_path, bucket, ending):
    import s3fs

    local = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), local)
    else:
        local.write_bytes(gzip.compress(lines(ROWS)) if ending.endswith(".gz") else lines(ROWS))
    s3fs.S3FileSystem(**bucket).put_file(str(local), f"data/rows{ending}")
    here, there = config(local), config(f"s3://data/rows{ending}")
    assert source_identity(there, bucket) == source_identity(here)
    columns = ["prompt_id", "messages", "split"]
    found = load_prompts(there, bucket).prompts
    assert found.select(columns).equals(load_prompts(here).prompts.select(columns))
    assert found["source"][0].as_py().startswith("s3://data/rows")


@pytest.mark.parametrize("read", [load_prompts, source_identity])
def test_s3_object_that_is_not_there(bucket, read):
    for path in ("s3://data/none.jsonl", "s3://nobucket/none.jsonl"):
        with pytest.raises(DataError, match=f"no file '{path}'"):
            read(config(path), bucket)
