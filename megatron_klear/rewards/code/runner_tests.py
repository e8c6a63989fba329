"""Tests that a test runner would find: pytest's functions and classes, unittest's classes."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from .asserts import split
from .problem import Check, Test

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_OWN_SCOPES = (*_FUNCTIONS, ast.Lambda, ast.ClassDef)
_AROUND_MODULE = ("setup_module", "setup_function"), ("teardown_function", "teardown_module")
_AROUND_METHOD = ("setup_class", "setup_method", "setup"), ("teardown", "teardown_method", "teardown_class")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class TestSourceError(ValueError):
    """Tests in Python that cannot be used; the message says why."""


def is_test(statement: ast.stmt) -> bool:
    """Whether a test runner would run it: a function `test...`, a class `Test...` or of unittest."""
    if isinstance(statement, _FUNCTIONS):
        return statement.name.startswith("test")
    return isinstance(statement, ast.ClassDef) and (statement.name.startswith("Test") or _of_unittest(statement))


def at_home(function: _Function) -> bool:
    """Whether the statements of a function mean the same in a module."""
    waiting: list[ast.AST] = [*function.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Return | ast.Yield | ast.YieldFrom | ast.Global):
            return False
        if not isinstance(node, _OWN_SCOPES):
            waiting += ast.iter_child_nodes(node)
    inner = any(isinstance(node, ast.Nonlocal) for node in ast.walk(function))
    return not inner and isinstance(function, ast.FunctionDef)


def runner_tests(
    body: Sequence[ast.stmt], around: Sequence[ast.stmt], under_test: frozenset[str], classes: frozenset[str]
) -> list[Test]:
    """Each assert of a plain function is a test; a function that is more than that, or a method, is one as a whole.

    Raises TestSourceError where a test wants what only a test runner gives.
    """
    before = [*around, *(statement for statement in body if not is_test(statement))]
    made = {entry.name: entry for entry in before if isinstance(entry, _FUNCTIONS)}
    ready, done = ([_prepared(made[name], name, "None") for name in part if name in made] for part in _AROUND_MODULE)
    tests: list[Test] = []
    for statement in body:
        if isinstance(statement, ast.ClassDef) and is_test(statement):
            tests += _of_class(statement, before, ready, done)
        elif isinstance(statement, _FUNCTIONS) and is_test(statement):
            _check_arguments(statement, 0)
            if statement.decorator_list or ready or done or not at_home(statement):
                tests.append(_whole([*before, statement], [*ready, _call(statement, statement.name), *done]))
            else:
                tests += split(statement.body, before, under_test=under_test, classes=classes)
    return tests


def _of_class(
    tested: ast.ClassDef, before: Sequence[ast.stmt], ready: Sequence[str], done: Sequence[str]
) -> list[Test]:
    """A test a method, with the class but for its other tests: what those lack says nothing of this one."""
    methods = [entry for entry in tested.body if isinstance(entry, _FUNCTIONS) and entry.name.startswith("test")]
    made = {entry.name: entry for entry in tested.body if isinstance(entry, _FUNCTIONS)}
    tests: list[Test] = []
    for method in methods:
        others = [entry for entry in tested.body if entry is method or entry not in methods]
        own = ast.ClassDef(tested.name, tested.bases, tested.keywords, others, tested.decorator_list)
        if _of_unittest(tested):
            calls = [
                "import unittest",
                "_result = unittest.TestResult()",
                f"unittest.TestSuite([{tested.name}({method.name!r})]).run(_result)",
                "assert _result.wasSuccessful(), [words for _, words in _result.errors + _result.failures][:1]",
            ]
        else:
            _check_arguments(method, 1)
            instance = f"_tests = {tested.name}()"
            first, last = (
                [
                    _prepared(made[name], f"_tests.{name}", f"_tests.{method.name}")
                    if not name.endswith("_class")
                    else _of_the_class(made[name], tested.name)
                    for name in part
                    if name in made
                ]
                for part in _AROUND_METHOD
            )
            calls = [instance, *first, _call(method, f"_tests.{method.name}"), *last]
        tests.append(_whole([*before, own], [*ready, *calls, *done]))
    return tests


def _of_the_class(function: _Function, name: str) -> str:
    """pytest gives the class to `setup_class` whether it is a class method or not."""
    bound = any(ast.unparse(one) == "classmethod" for one in function.decorator_list)
    return f"{name}.{function.name}({'' if bound or not function.args.args else name})"


def _prepared(function: _Function, name: str, given: str) -> str:
    """A call of what comes before or after a test, which may ask for it."""
    wanted = len(function.args.args) - ("." in name and not _static(function))
    return f"{name}({given if wanted else ''})"


def _static(function: _Function) -> bool:
    return any(ast.unparse(one) == "staticmethod" for one in function.decorator_list)


def _call(function: _Function, name: str) -> str:
    return f"import asyncio\nasyncio.run({name}())" if isinstance(function, ast.AsyncFunctionDef) else f"{name}()"


def _check_arguments(function: _Function, own: int) -> None:
    """Raise TestSourceError where a test takes what its decorators do not give."""
    given = {
        name.strip()
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("parametrize") and decorator.args
        for name in _names(decorator.args[0])
    }
    lacking = [entry.arg for entry in function.args.args[own:] if entry.arg not in given]
    if lacking[: len(lacking) - len(function.args.defaults)]:
        raise TestSourceError(f"{function.name} takes a fixture ({lacking[0]!r})")


def _names(node: ast.expr) -> list[str]:
    """The names that parametrize gives, of a text or a list of texts."""
    parts = node.elts if isinstance(node, ast.List | ast.Tuple) else [node]
    texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return [name for text in texts for name in text.split(",")]


def _whole(statements: Sequence[ast.stmt], calls: Sequence[str]) -> Check:
    module = ast.fix_missing_locations(ast.Module(list(statements), []))
    return Check("\n".join([ast.unparse(module), *calls, ""]))


def _of_unittest(statement: ast.ClassDef) -> bool:
    return any("TestCase" in ast.unparse(base) for base in statement.bases)
