"""What stands in front of programs and of tests: the names that their authors took for granted."""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module

STARRED = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "typing", "builtins"),
)
NAMED = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json"),
)

PRELUDE = "".join([*(f"from {name} import *\n" for name in STARRED), *(f"import {name}\n" for name in NAMED)])
"""LiveCodeBench's, with builtins last: else `math.pow` hides `pow`, and right programs return floats."""


@cache
def starred() -> dict[str, str]:
    """The names of the prelude, and the statement that imports each."""
    found = {}
    for module in STARRED:
        if module != "builtins":
            found.update({name: f"from {module} import {name}" for name in public_names(module)})
    return found | {module: f"import {module}" for module in NAMED}


@cache
def functions() -> frozenset[str]:
    """Names of the prelude that are functions: none is a class, a constant or a module."""
    found = {name for name, statement in starred().items() if inspect.isroutine(_imported(name, statement))}
    return frozenset(found - set(NAMED))


@cache
def public_names(module: str) -> frozenset[str]:
    """What `from module import *` gives, of a module of the prelude."""
    loaded = import_module(module)
    return frozenset(getattr(loaded, "__all__", [name for name in dir(loaded) if not name.startswith("_")]))


def _imported(name: str, statement: str) -> object:
    return getattr(import_module(statement.split()[1]), name, None)


LINKED = """
class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next


class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val, self.left, self.right = val, left, right


def list_node(values):
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head


def tree_node(values):
    values = list(values)
    if not values:
        return None
    root = TreeNode(values[0])
    level, place = [root], 1
    while place < len(values):
        parent = level.pop(0)
        for side in ("left", "right"):
            if place < len(values):
                if values[place] is not None:
                    node = TreeNode(values[place])
                    setattr(parent, side, node)
                    level.append(node)
                place += 1
    return root


def list_values(head):
    values = []
    while head is not None:
        values.append(head.val)
        head = head.next
    return values


def tree_values(root):
    if root is None:
        return []
    values, level = [], [root]
    while level:
        node = level.pop(0)
        values.append(None if node is None else node.val)
        if node is not None:
            level += [node.left, node.right]
    while values and values[-1] is None:
        values.pop()
    return values
"""
"""LeetCode's linked lists and binary trees, made of lists and back: its tests name `list_node` and `tree_node` and
define neither. What is compared is the list that comes back."""

READ_BACK = {"is_same_list": ("list_node", "list_values"), "is_same_tree": ("tree_node", "tree_values")}
"""By the name of the test's helper: what makes the expected one, and what reads the returned one."""

PYTEST = """
class _Raises:
    def __init__(self, kinds, match=None):
        self.kinds, self.wanted, self.type, self.value, self.tb = kinds, match, None, None, None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        assert kind is not None, "no exception"
        if not issubclass(kind, self.kinds):
            return False
        self.type, self.value, self.tb = kind, error, trace
        return self.wanted is None or self.match(self.wanted)

    @property
    def typename(self):
        return self.type.__name__

    def exconly(self):
        return f"{self.typename}: {self.value}"

    def errisinstance(self, kinds):
        return isinstance(self.value, kinds)

    def match(self, pattern):
        import re
        assert re.search(pattern, str(self.value)), f"{pattern!r} is not in {self.value}"
        return True


def _raises(kinds, *call, match=None, **options):
    expected = _Raises(kinds, match)
    if not call:
        return expected
    with expected:
        call[0](*call[1:], **options)
    return expected


class _Approx:
    def __init__(self, expected, rel=None, abs=None):
        self.expected, self.rel, self.abs = expected, 1e-6 if rel is None and abs is None else rel or 0, abs or 1e-12

    def __eq__(self, other):
        want = self.expected
        if isinstance(want, dict):
            same = (_Approx(v, self.rel, self.abs) == other[k] for k, v in want.items())
            return want.keys() == other.keys() and all(same)
        if isinstance(want, (list, tuple)):
            return len(want) == len(other) and all(_Approx(v, self.rel, self.abs) == o for v, o in zip(want, other))
        return want == other or abs(want - other) <= max(self.abs, self.rel * abs(want))


class _Mark:
    def parametrize(self, names, rows, ids=None):
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)

        def decorate(function):
            def run(**given):
                for row in rows:
                    row = getattr(row, "values", row)
                    function(**given, **dict(zip(names, row if len(names) > 1 else [row])))
            return run
        return decorate

    def __getattr__(self, name):
        def mark(*arguments, **_):
            return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else lambda function: function
        return mark


class pytest:
    raises, approx, mark = staticmethod(_raises), _Approx, _Mark()

    @staticmethod
    def param(*values, **_):
        holder = type("_Param", (), {})()
        holder.values = values if len(values) > 1 else values[0]
        return holder

    @staticmethod
    def fail(reason="", **_):
        raise AssertionError(reason)
"""
"""Of pytest what tests of single functions use; the grader of a test needs no pytest in its sandbox."""
