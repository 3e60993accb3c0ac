"""What sandboxes are made of: the wire, the channel, the process and what it cannot do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import ConfigError
from qrpo_core.inspection import doctor
from qrpo_core.rewards.code.environment import own_environment
from qrpo_core.rewards.code.sandbox import probe
from qrpo_core.rewards.code.sandbox.bubblewrap import UNSAFE, Limits, Sandbox, modes
from qrpo_core.rewards.code.sandbox.channel import Broken, Channel, Ended, Late
from qrpo_core.rewards.code.sandbox.probe import find_mode
from qrpo_core.rewards.code.sandbox.wire import DEPTH, WireError, decode, encode, parse
from tests.core.rewards.code_problems import needs_bwrap

ROOT = Path(__file__).parents[3]


class Node:
    def __init__(self, val: Any = 0, next: Any = None) -> None:
        self.val = val
        self.next = next


def there_and_back(value: object, **classes: type) -> Any:
    import json

    kept: list[object] = []

    def keep(item: object) -> int:
        kept.append(item)
        return len(kept) - 1

    return decode(
        parse(json.dumps(encode(value, classes, keep)).encode()), classes, lambda number: ("kept", number)
    )


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=1 << 80, max_value=1 << 300).map(lambda n: -n)
    | st.floats(allow_nan=False)
    | st.text(st.characters())
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.lists(inner).map(deque)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
    ),
    max_leaves=20,
)


@given(plain)
def test_plain_values_come_back_with_their_types(value: object) -> None:
    back = there_and_back(value)
    assert back == value
    assert repr(back) == repr(value)  # 1 and True, -0.0, list and deque


def test_other_builtin_values() -> None:
    assert there_and_back({1, "a", (2.5, frozenset([3]))}) == {1, "a", (2.5, frozenset([3]))}
    assert there_and_back(Counter("aab")) == Counter("aab")
    assert there_and_back(defaultdict(list, a=[1])) == {"a": [1]}
    assert there_and_back(range(3, 9, 2)) == range(3, 9, 2)
    assert list(there_and_back({1: 2}.items())) == [(1, 2)]
    assert there_and_back({1: 2}.keys()) == {1}
    assert list(there_and_back(x * x for x in range(3))) == [0, 1, 4]
    assert there_and_back([int, None]) == [int, None]
    assert str(there_and_back(float("nan"))) == "nan"


def test_one_object_stays_one_and_cycles_of_instances_are_kept() -> None:
    shared = [1]
    back = there_and_back([shared, shared])
    assert back[0] is back[1]
    ring = Node(1)
    ring.next = Node(2, ring)
    back = there_and_back(ring, Node=Node)
    assert back.next.val == 2
    assert back.next.next is back


def test_a_long_list_of_instances_needs_no_recursion() -> None:
    head = None
    for value in range(20_000):
        head = Node(value, head)
    back = there_and_back(head, Node=Node)
    assert back.val == 19_999


def test_what_is_no_plain_value_stays_at_its_end() -> None:
    class Yes(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    assert there_and_back(Yes(3)) == ("kept", 0)
    assert there_and_back([Yes(3)]) == [("kept", 0)]
    with pytest.raises(WireError, match="'Yes'"):
        encode(Yes(3), {}, None)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"1",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"r": 1}',
        b'{"r": 1.5, "n": []}',
        b'{"r": NaN, "n": []}',
        b'{"r": ' + b"9" * 10_000 + b', "n": []}',
        b'{"r": [0], "n": []}',
        b'{"r": [-1], "n": [["l", []]]}',
        b'{"r": [true], "n": [["l", []], ["l", []]]}',
        b'{"r": ["i", "zz"], "n": []}',
        b'{"r": ["f", "0x1p99999999"], "n": []}',
        b'{"r": ["T", "object"], "n": []}',
        b'{"r": [0], "n": [["z", []]]}',
        b'{"r": [0], "n": [["l", 3]]}',
        b'{"r": [0], "n": [["l", [[0]]]]}',
        b'{"r": [0], "n": [["t", [[1]]], ["t", [[0]]]]}',
        b'{"r": [0], "n": [["s", [[1]]], ["l", []]]}',
        b'{"r": [0], "n": [["d", [[1], 1]], ["l", []]]}',
        b'{"r": [0], "n": [["r", 0, 5, 0]]}',
        b'{"r": [0], "n": [["r", 0, "5", 1]]}',
        b'{"r": [0], "n": [["r", 0, 1000000000000, 1]]}',
        b'{"r": [0], "n": [["o", "Popen", []]]}',
        b'{"r": [0], "n": [["o", "Node", ["__class__", 1]]]}',
        b'{"r": [0], "n": [["o", "Node", ["val"]]]}',
        b'{"r": [0], "n": [["h", "0"]]}',
        b'{"r": [0], "n": [["h", true]]}',
        b'{"r": [0], "n": [["l", []]], "x": 1}',
    ],
)
def test_a_message_that_is_no_value_is_refused(message: bytes) -> None:
    with pytest.raises(WireError):
        decode(parse(message), {"Node": Node}, lambda number: number)


def test_depth_and_repetition_have_limits() -> None:
    deep: Any = ()
    for _ in range(DEPTH - 1):
        deep = (deep,)
    assert there_and_back(deep) == deep
    with pytest.raises(WireError, match="deeper"):
        there_and_back(((deep,),))
    doubled: Any = [1]
    for _ in range(40):
        doubled = [doubled, doubled]
    with pytest.raises(WireError, match="members"):
        there_and_back(doubled)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-3, 9)
        | st.sampled_from(["l", "t", "s", "d", "o", "h", "r", "n", "Node", "i", "f"]),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["r", "n"]), inner),
    )
)
def test_any_json_decodes_to_a_value_or_a_wire_error(form: Any) -> None:
    value = {"r": [0], "n": [form]} if isinstance(form, list) else form
    with contextlib.suppress(WireError):
        decode(value, {"Node": Node}, lambda number: number)


def pipes() -> tuple[Channel, int, int]:
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    return Channel(ours_out, ours_in, 1 << 20), theirs_in, theirs_out


def soon() -> float:
    return time.monotonic() + 0.2


def test_the_channel_keeps_time_both_ways() -> None:
    channel, theirs_in, theirs_out = pipes()
    with pytest.raises(Late):
        channel.receive(soon())
    with pytest.raises(Late):
        channel.send(bytes(1 << 20), soon())  # nobody reads
    os.write(theirs_out, b"\0\0\0\7par")
    with pytest.raises(Late):
        channel.receive(soon())
    os.close(theirs_in)
    os.close(theirs_out)
    with pytest.raises(Ended):
        channel.receive(soon())
    with pytest.raises(Ended):
        channel.send(b"x", soon())
    channel.close()


def test_the_channel_takes_no_more_than_it_asked_for() -> None:
    channel, _, theirs_out = pipes()
    channel.refuse_waiting()
    os.write(theirs_out, b"\0\0\0\1P")
    with pytest.raises(Broken, match="before it was asked"):
        channel.refuse_waiting()
    assert channel.receive(soon()) == b"P"
    os.write(theirs_out, b"\xff\xff\xff\xff")
    with pytest.raises(Broken, match="1 MB"):
        channel.receive(soon())


@needs_bwrap
def test_the_sandbox_of_this_machine_holds() -> None:
    assert find_mode(False) == modes()[0]


@needs_bwrap
def test_a_process_that_gets_out_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # The probe itself: run without a sandbox, the same program finds the network and the system open.
    reason = probe.try_mode(UNSAFE, own_environment())
    assert reason is not None
    assert "properties do not hold" in reason


def test_without_bubblewrap_nothing_runs_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"apt install bubblewrap.*reward\.code\.unsafe"):
        find_mode(False)
    assert find_mode(True) == UNSAFE
    check = doctor.check_bubblewrap()
    assert not check.ok
    assert "apt install bubblewrap" in check.remedy
    assert not doctor.check_sandbox().ok


def test_a_bubblewrap_that_does_not_work_is_no_sandbox(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ConfigError, match="No permissions to create new namespace"):
        find_mode(False)
    assert "No permissions" in doctor.check_sandbox().what


@needs_bwrap
def test_the_doctor_finds_all_well() -> None:
    found = {check.name: check for check in doctor.examine()}
    for name in ("python", "packages", "devices", "bubblewrap", "sandbox"):
        assert (found[name].ok, found[name].remedy) == (True, ""), found[name]


@needs_bwrap
def test_killed_from_another_thread_it_ends_the_wait() -> None:
    sandbox = Sandbox("judged", modes()[0], Limits(10, 512 << 20), own_environment())
    sandbox.wait()
    threading.Timer(0.2, sandbox.kill).start()
    with pytest.raises(Ended):
        sandbox.channel.receive(time.monotonic() + 20)
    sandbox.close()
    sandbox.close()


ENDLESS = """
    import json, sys
    from qrpo_core.rewards.base import RewardRequest
    from qrpo_core.rewards.code.reward import CodeReward
    from qrpo_core.config.rewards import CodeRewardConfig

    reward = CodeReward(CodeRewardConfig(format="mbpp", memory_mb=int(sys.argv[1]), processes=3,
                                         seconds_per_test=300, seconds_per_program=300))
    ground_truth = json.dumps({"test_list": ["assert f(1) == 2"]})
    daemon = "import os\\ndef f(n):\\n    os.fork()\\n    os.setsid()\\n    while True: pass"
    rows = [RewardRequest("p", i, (), f"```python\\n{daemon}\\n```", ground_truth) for i in range(9)]
    reward.problems([])
    print("ready", flush=True)
    reward.score(rows)
"""


def sandboxes(memory_mb: int) -> int:
    """How many processes with this limit in their command line run; the program itself calls for 6."""
    marker = f'"memory_bytes": {memory_mb << 20}'.encode()
    count = 0
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += marker in place.read_bytes()
        except OSError:
            continue
    return count


@needs_bwrap
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_an_interrupt(number: signal.Signals) -> None:
    memory_mb = 800 + int(number)
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ENDLESS), str(memory_mb)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == b"ready\n"
    until = time.monotonic() + 60
    while sandboxes(memory_mb) < 6 and time.monotonic() < until:
        time.sleep(0.05)
    assert sandboxes(memory_mb) >= 6
    run.send_signal(number)
    assert run.wait(30) != 0
    run.stdout.close()
    until = time.monotonic() + 10
    while sandboxes(memory_mb) and time.monotonic() < until:
        time.sleep(0.05)
    assert sandboxes(memory_mb) == 0
