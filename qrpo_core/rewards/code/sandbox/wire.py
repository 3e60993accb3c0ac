"""Encode values between the examiner and the judged process as JSON. Imports nothing of this project.

Both processes load this file. Untrusted code sends the values, so `decode` trusts nothing: it makes exact
builtin values, and instances of given classes from plain attributes, within limits on size and depth. It
calls nothing that the sender names.

A value is {"r": ref, "n": [node, ...]}. A ref is null, true, false, a string, an integer, or a list:
["i", hex], ["f", hex], ["c", hex, hex], ["b", hex] for large integers, floats, complex numbers and bytes,
["T", name] for a builtin type, [k] for node k. A node is [kind, ...], see `_CONTAINERS`. Shared objects stay
shared; cycles are kept if they go through an instance.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

#: Longest message, bytes.
MESSAGE_BYTES = 8 << 20
#: Deepest nesting of builtin containers. Hashing and comparing recurse in C without a check, so a deeper
#: value would end the process. (A chain of instances, such as a linked list, has no limit.)
DEPTH = 200
#: Most members of a builtin container, counted with repetition as `==` and `repr` visit them.
EXPANDED = 4_000_000
#: Most members taken from an iterator.
ITERATED = 200_000

_SMALL = 1 << 60
_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, type(None))
}
_FLAT: dict[type, str] = {list: "l", tuple: "t", set: "s", frozenset: "F", deque: "q"}
_MAPS: dict[type, str] = {dict: "d", Counter: "C", defaultdict: "D", OrderedDict: "O"}
_EXAMPLES: tuple[Any, ...] = (
    (member for member in [0]),
    iter([]),
    iter(()),
    iter({}),
    iter(set()),
    iter(range(0)),
    iter(""),
    map(str, ()),
    filter(None, ()),
    zip((), strict=False),
    enumerate(()),
    reversed([]),
)
_ITERATORS = frozenset(type(example) for example in _EXAMPLES)
_VIEWS: dict[type, str] = {type({}.keys()): "k", type({}.values()): "v", type({}.items()): "e"}
_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "l": list,
    "t": tuple,
    "s": set,
    "F": frozenset,
    "q": deque,
    "x": iter,
    "d": lambda flat: dict(_pairs(flat)),
    "C": lambda flat: Counter(dict(_pairs(flat))),
    "D": lambda flat: defaultdict(None, _pairs(flat)),
    "O": lambda flat: OrderedDict(_pairs(flat)),
    "k": lambda members: dict.fromkeys(members).keys(),
    "v": lambda members: dict(enumerate(members)).values(),
    "e": lambda flat: dict(_pairs(flat)).items(),
}


def _refuse(text: str) -> Any:
    raise ValueError(text)


# Made once: it takes longer than a short message.
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_DECODER = json.JSONDecoder(parse_float=_refuse, parse_constant=_refuse)


class WireError(ValueError):
    """A value that cannot be sent, or a malformed message."""


def encode(value: object, classes: Mapping[str, type], keep: Callable[[object], int] | None) -> Any:
    """Return a value in a form for JSON.

    classes : instances of these, and of any class with one of these names, are sent as their attributes.
    keep : stores an object that cannot be sent and returns its number. None raises WireError instead.
    """
    nodes: list[Any] = []
    seen: dict[int, int] = {}
    alive: list[object] = []  # an id is an identity only while its object lives
    waiting: list[tuple[int, object]] = []

    def ref(item: Any) -> Any:
        kind: type = type(item)
        if item is None or kind is bool or kind is str or (kind is int and -_SMALL < item < _SMALL):
            return item
        if kind is int:
            return ["i", hex(item)]
        if kind is float:
            return ["f", item.hex()]
        if kind is complex:
            return ["c", item.real.hex(), item.imag.hex()]
        if kind is bytes:
            return ["b", item.hex()]
        if kind is type and item in _TYPES.values():
            return ["T", item.__name__]
        if kind.__module__ == "numpy" and hasattr(item, "dtype") and not hasattr(item, "__len__"):
            return ref(item.item())  # a scalar is sent as its number
        if id(item) not in seen:
            seen[id(item)] = len(nodes)
            alive.append(item)
            waiting.append((len(nodes), item))
            nodes.append(None)
        return [seen[id(item)]]

    top = ref(value)
    while waiting:
        place, item = waiting.pop()
        nodes[place] = _node(item, ref, classes, keep)
    return {"r": top, "n": nodes}


def _node(
    item: Any,
    ref: Callable[[Any], Any],
    classes: Mapping[str, type],
    keep: Callable[[object], int] | None,
) -> list[Any]:
    kind = type(item)
    if kind in _FLAT:
        return [_FLAT[kind], [ref(member) for member in item]]
    if kind in _MAPS:
        return [_MAPS[kind], [ref(part) for pair in item.items() for part in pair]]
    if kind is range:
        return ["r", ref(item.start), ref(item.stop), ref(item.step)]
    if kind in _VIEWS:
        members = [part for pair in item for part in pair] if _VIEWS[kind] == "e" else item
        return [_VIEWS[kind], [ref(member) for member in members]]
    if kind in _ITERATORS:
        return ["x", [ref(member) for member in _taken(item)]]
    if kind.__name__ in classes and not isinstance(item, type):
        flat = [part for name, member in _attributes(item) for part in (name, ref(member))]
        return ["o", kind.__name__, flat]
    if keep is None:
        raise WireError(f"a value of type {kind.__name__!r} cannot be sent to the judged program")
    return ["h", keep(item)]


def _taken(items: Iterator[Any]) -> Iterator[Any]:
    for count, item in enumerate(items):
        if count >= ITERATED:
            raise WireError(f"an iterator gives more than {ITERATED} members")
        yield item


def _attributes(item: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(item, "__dict__", {}).items()
    for kind in type(item).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__") and hasattr(item, name):
                yield name, getattr(item, name)


def dump(form: object) -> bytes:
    """Return the message of a form."""
    return _ENCODER.encode(form).encode("ascii")


def parse(data: bytes) -> Any:
    """Return the JSON of a message. Raises WireError for other data, and for numbers of other forms."""
    try:
        return _DECODER.decode(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"not a message: {type(error).__name__}") from None


def decode(form: Any, classes: Mapping[str, type], handle: Callable[[int], Any]) -> Any:
    """Return the value of a form. Raises WireError for a malformed form.

    classes : classes of instances, by name; they are not called.
    handle : returns the stand-in for a value that stayed at the other end.
    """
    if not (type(form) is dict and form.keys() == {"r", "n"} and type(form["n"]) is list):
        raise WireError("not a value")
    nodes = form["n"]
    made: list[Any] = [None] * len(nodes)
    containers: dict[int, list[Any]] = {}
    instances: list[tuple[int, list[Any]]] = []
    for place, node in enumerate(nodes):
        match node:
            case [str(kind), list(members)] if kind in _CONTAINERS:
                containers[place] = members
            case ["o", str(name), list(flat)] if name in classes and len(flat) % 2 == 0:
                made[place] = object.__new__(classes[name])
                instances.append((place, flat))
            case ["r", start, stop, step]:
                made[place] = _range(*(atom(bound, made) for bound in (start, stop, step)))
            case ["h", int(number)] if type(number) is int:
                made[place] = handle(number)
            case _:
                raise WireError("not a node")
    try:
        for place in _order(containers):
            members = [atom(member, made) for member in containers[place]]
            made[place] = _CONTAINERS[nodes[place][0]](members)
    except TypeError:
        raise WireError("an unhashable key or member") from None
    for place, flat in instances:
        for name, member in _pairs(flat):
            if not (type(name) is str and name.isidentifier() and not name.startswith("__")):
                raise WireError("not the name of an attribute")
            try:
                object.__setattr__(made[place], name, atom(member, made))
            except AttributeError:
                raise WireError(f"no attribute {name!r} on such an instance") from None
    return atom(form["r"], made)


def _order(containers: Mapping[int, list[Any]]) -> Iterator[int]:
    """Yield containers, inner ones first. Raises WireError for a cycle, and if too deep or too large."""
    size: dict[int, int] = {}
    depth: dict[int, int] = {}
    open_: set[int] = set()
    for root in containers:
        stack = [root]
        while stack:
            place = stack[-1]
            if place in size:
                stack.pop()
                continue
            inside = [
                m[0] for m in containers[place] if type(m) is list and len(m) == 1 and _place(m) in containers
            ]
            missing = [child for child in inside if child not in size]
            if missing:
                open_.add(place)
                if any(child in open_ for child in missing):
                    raise WireError("a builtin container that contains itself")
                if len(open_) > DEPTH:
                    raise WireError(f"containers nested deeper than {DEPTH}")
                stack.extend(missing)
                continue
            open_.discard(place)
            size[place] = 1 + len(containers[place]) + sum(size[child] for child in inside)
            depth[place] = 1 + max((depth[child] for child in inside), default=0)
            if size[place] > EXPANDED or depth[place] > DEPTH:
                raise WireError(f"more than {EXPANDED} members, or nested deeper than {DEPTH}")
            stack.pop()
            yield place


def atom(ref: Any, made: list[Any]) -> Any:
    """Return the value of a ref. Raises WireError for a malformed ref."""
    if ref is None or type(ref) in (bool, str, int):
        return ref
    try:
        match ref:
            case [place] if 0 <= _place(ref) < len(made):
                return made[place]
            case ["i", str(text)]:
                return int(text, 16)
            case ["f", str(text)]:
                return float.fromhex(text)
            case ["c", str(real), str(imaginary)]:
                return complex(float.fromhex(real), float.fromhex(imaginary))
            case ["b", str(text)]:
                return bytes.fromhex(text)
            case ["T", str(text)] if text in _TYPES:
                return _TYPES[text]
    except (ValueError, OverflowError):
        pass
    raise WireError("not a reference to a value")


def _place(ref: list[Any]) -> int:
    return ref[0] if type(ref[0]) is int else -1


def _range(start: Any, stop: Any, step: Any) -> range:
    if not (type(start) is type(stop) is type(step) is int and step):
        raise WireError("not a range")
    if (stop - start) // step > EXPANDED:
        raise WireError(f"a range of more than {EXPANDED} members")
    return range(start, stop, step)


def _pairs(flat: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(flat[::2], flat[1::2], strict=False)
