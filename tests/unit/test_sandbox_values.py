"""Values cross as data: what goes in comes out, and whatever bytes a program writes are read without an error."""

import collections
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klear.rewards.sandbox.values import Opaque, decode, encode, encode_arguments

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner) | st.sets(scalars),
)


def same(left, right):
    """Equal, and of the same types all through."""
    return left == right and repr(left) == repr(right)


@given(values)
def test_what_goes_in_comes_out(value):
    read = decode(encode(value))
    assert read == value
    assert type(read) is type(value)


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_read(content):
    decode(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 10**6,
        b'["l", ' * 10**4 + b"0" + b"]" * 10**4,
        b"1" * 10**7,
        b"9" * 10**6,
        b"1e999",
        b"NaN",
        b'["f", "x"]',
        b'["i", "zz"]',
        b'["r", [0, 1, 0]]',
        b'["m", [[["l", []], 1]]]',
        b'["S", [["l", [1]]]]',
        b'["@", [0, "x"]]',
        b'["s", 1]',
        b'{"a": 1}',
        b'"text"',
        b'["c", "0x1p+0"]',
        b"\xff\xfe",
    ],
)
def test_what_says_no_value_is_opaque(content):
    assert isinstance(decode(content), Opaque)


def test_types_stay_apart():
    for value in (True, 1, 1.0, -0.0, (1, 2), [1, 2], {1, 2}, frozenset({1}), b"a", bytearray(b"a"), 2**70, -(2**53)):
        assert same(decode(encode(value)), value)
    assert math.isnan(decode(encode(float("nan"))))
    assert decode(encode(range(1, 9, 2))) == range(1, 9, 2)
    assert decode(encode(collections.deque([1]))) == collections.deque([1])
    assert decode(encode({1: "a", (2, 3): None})) == {1: "a", (2, 3): None}
    assert decode(encode_arguments([[1], "x"])) == [[1], "x"]


def test_subclasses_count_as_their_plain_value():
    class Sly(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

        def __int__(self):
            return 99

    class List(list):
        def __iter__(self):
            return iter(["right"])

    read = decode(encode([Sly(5), List([1]), collections.Counter("aab")]))
    assert same(read, [5, [1], {"a": 2, "b": 1}])


def test_what_has_no_form_equals_nothing():
    class Equal:
        def __eq__(self, other):
            return True

        __hash__ = None

    for value in (Equal(), object(), iter([1]), print, [Equal()], {"a": Equal()}):
        read = decode(encode(value))
        assert read != value
    opaque = decode(encode(Equal()))
    assert isinstance(opaque, Opaque)
    assert opaque.type_name == "Equal"
    assert opaque != opaque
    assert opaque != Opaque("Equal")
    with pytest.raises(TypeError, match="neither true nor false"):
        bool(opaque)


def test_values_that_contain_themselves_end():
    value = [1]
    value.append(value)
    assert decode(encode(value)) != value
