"""Tests that are Python source: `check(candidate)`, lists of asserts, pytest functions, unittest classes."""

from __future__ import annotations

import ast
import builtins
import keyword
from collections.abc import Sequence

from .asserts import CANDIDATE, split
from .names import bound, loaded
from .prelude import LINKED, PYTEST, prelude, starred
from .problem import Check, Problem, Test

_BUILTINS = frozenset(dir(builtins))
_LINKED = frozenset(("list_node", "tree_node", "ListNode", "TreeNode", "is_same_list", "is_same_tree"))
_COMPARES = frozenset(("isclose", "fabs", "sqrt", "Counter", "deque"))
"""Of the prelude, what tests themselves call."""
_SOLUTION_MODULES = frozenset(("solution", "main", "your_module", "your_solution"))


class TestSourceError(ValueError):
    """Tests in Python that cannot be used; the message says why."""


def read_source(source: str, *, entry: str = "", trusted: str = "", before: str = "") -> Problem:
    """The problem whose tests are a Python source.

    `entry` names the function under test where a `check(candidate)` is not called in the source; `trusted` is source
    of the problem's own that the tests may use; `before` runs in front of the tests (MBPP's set-up code). Raises
    TestSourceError.
    """
    imports = _Solution()
    tree = imports.visit(_parse(source))
    around = [*_parse(trusted).body, *_parse(before).body]
    body = [statement for statement in tree.body if not _is_main(statement)]
    under_test = names_under_test(ast.Module([*around, *body], []), imports.names)
    check = next((s for s in body if isinstance(s, ast.FunctionDef) and s.name == "check" and s.args.args), None)
    if check is not None:
        entry, tests = _of_check(check, body, around, entry)
    elif any(_is_test(statement) for statement in body):
        tests = _of_pytest(body, around, under_test)
    else:
        tests = split(body, around, under_test=under_test)
    if not tests:
        raise TestSourceError("it tests nothing: there is no assert in it, nor a function or class of tests")
    linked = LINKED if _LINKED & loaded(tree) else ""
    if not entry and len(under_test) == 1:
        entry = next(iter(under_test))
    return Problem(
        mode="expression",
        tests=tuple(
            Check(check_source(test, under_test | {entry})) if isinstance(test, Check) else test for test in tests
        ),
        entry=entry,
        prelude=prelude(under_test | ({entry} if "Solution" not in loaded(tree) else set())) + linked,
        whole=True,
    )


def check_source(check: Check, under_test: frozenset[str]) -> str:
    """The source of a check with what it takes for granted in front: imports, helpers, pytest's names.

    What it still lacks is asked of the program: the names under test, and no others. Those that the prelude or Python
    has as well are imported from the program, or a test of `gcd` would test `math.gcd`.
    """
    tree = ast.parse(check.source)
    made = {name for statement in tree.body for name in bound(statement)}
    read = loaded(tree) - made
    shadowed = sorted(read & under_test & (_BUILTINS | starred().keys()))
    free = read - under_test - {CANDIDATE} - _BUILTINS
    header = [f"from solution import {name}" for name in shadowed]
    header += [starred()[name] for name in sorted(free) if name in starred()]
    if "pytest" in free:
        header.append(PYTEST)
    if free & _LINKED:
        header.append(LINKED)
    return "\n".join([*header, check.source])


def names_under_test(tree: ast.Module, imported: set[str]) -> frozenset[str]:
    """Names that the program must define: those that a test imports from it, or that nobody else would have made.

    Where all names that the asserts call could be the prelude's, it is these; where all are built-in, it is those:
    functions of the program may be called `gcd` or `sum`.
    """
    if imported:
        return frozenset(imported)
    made = {name for statement in tree.body for name in bound(statement)}
    free = loaded(tree) - made - {CANDIDATE}
    ours = free - _BUILTINS - starred().keys() - _LINKED - {"pytest"}
    if ours:
        return frozenset(ours)
    asserts = [node.test for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    called = {name for test in asserts for node in ast.walk(test) if (name := _called(node))} - made - _COMPARES
    return frozenset(called - _BUILTINS) or frozenset(_outermost(test) for test in asserts) - made - {""}


def _called(node: ast.AST) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _outermost(test: ast.expr) -> str:
    """The function that an assert calls first on its left side."""
    if isinstance(test, ast.Compare):
        test = test.left
    if isinstance(test, ast.UnaryOp):
        test = test.operand
    return _called(test)


def _of_check(
    check: ast.FunctionDef, body: Sequence[ast.stmt], around: Sequence[ast.stmt], entry: str
) -> tuple[str, list[Test]]:
    """A function `check` of the candidate, and the call that says which it is."""
    called = [s for s in body if isinstance(s, ast.Expr) and _is_call_of(s.value, "check")]
    target: ast.expr | None = ast.Name(entry, ast.Load()) if entry else None
    for statement in called:
        arguments = statement.value.args if isinstance(statement.value, ast.Call) else []
        if len(arguments) == 1 and not (isinstance(arguments[0], ast.Name) and arguments[0].id == CANDIDATE):
            target = arguments[0]
    if target is None:
        raise TestSourceError("check(candidate) is not called in it, and no entry_point says what the candidate is")
    name = check.args.args[0].arg
    if name != CANDIDATE:
        raise TestSourceError(f"check takes {name!r}, expected `candidate`")
    method = target.attr if isinstance(target, ast.Attribute) else target.id if isinstance(target, ast.Name) else ""
    if not method or keyword.iskeyword(method):
        raise TestSourceError(f"check is called with {ast.unparse(target)!r}, expected a function or Solution().method")
    rest = [statement for statement in body if statement is not check and statement not in called]
    return method, split(check.body, [*around, *rest], candidate=target, under_test=frozenset((method,)))


def _of_pytest(body: Sequence[ast.stmt], around: Sequence[ast.stmt], under_test: frozenset[str]) -> list[Test]:
    """Functions `test_...` and classes of tests; each assert of a plain function is a test, all else one a function."""
    before = [*around, *(statement for statement in body if not _is_test(statement))]
    tests: list[Test] = []
    for statement in body:
        if isinstance(statement, ast.FunctionDef) and _is_test(statement):
            if statement.args.args and not statement.decorator_list:
                raise TestSourceError(f"{statement.name} takes a fixture ({statement.args.args[0].arg!r})")
            if statement.decorator_list:
                tests.append(_whole([*before, statement], f"{statement.name}()"))
            else:
                tests += split(statement.body, before, under_test=under_test)
        elif isinstance(statement, ast.ClassDef) and _is_test(statement):
            tests += _of_class(statement, before)
    return tests


def _of_class(tested: ast.ClassDef, before: Sequence[ast.stmt]) -> list[Test]:
    names = [
        entry.name for entry in tested.body if isinstance(entry, ast.FunctionDef) and entry.name.startswith("test")
    ]
    source = [*before, tested]
    if any("TestCase" in ast.unparse(base) for base in tested.bases):
        return [
            _whole(
                source,
                f"import unittest\n_result = unittest.TestResult()\n{tested.name}({name!r}).run(_result)\n"
                "assert _result.wasSuccessful(), [words for _, words in _result.errors + _result.failures][:1]",
            )
            for name in names
        ]
    made = {entry.name for entry in tested.body if isinstance(entry, ast.FunctionDef)}
    ready = "".join(f"_tests.{name}()\n" for name in ("setup_method", "setup") if name in made)
    return [_whole(source, f"_tests = {tested.name}()\n{ready}_tests.{name}()") for name in names]


def _whole(statements: Sequence[ast.stmt], call: str) -> Check:
    return Check(ast.unparse(ast.fix_missing_locations(ast.Module(list(statements), []))) + f"\n{call}\n")


def _is_test(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.FunctionDef):
        return statement.name.startswith("test")
    return isinstance(statement, ast.ClassDef) and (
        statement.name.startswith("Test") or any("TestCase" in ast.unparse(base) for base in statement.bases)
    )


def _is_main(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "__name__" in loaded(statement.test)


def _is_call_of(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise TestSourceError(f"it is no Python ({type(error).__name__}: {error})") from None


class _Solution(ast.NodeTransformer):
    """Takes the imports of the solution's module and of pytest out, so that their names stand for themselves."""

    def __init__(self) -> None:
        self._modules: set[str] = set()
        self.names: set[str] = set()
        """What the tests take from the solution; empty where they take everything."""

    def visit_Import(self, node: ast.Import) -> ast.stmt | None:
        self._modules |= {alias.asname or alias.name for alias in node.names if alias.name in _SOLUTION_MODULES}
        kept = [alias for alias in node.names if alias.name not in _SOLUTION_MODULES | {"pytest"}]
        return ast.copy_location(ast.Import(kept), node) if kept else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt | list[ast.stmt] | None:
        if (node.module or "").rpartition(".")[2] not in _SOLUTION_MODULES:
            return node
        self.names |= {alias.name for alias in node.names if alias.name != "*"}
        renamed = [alias for alias in node.names if alias.asname]
        return [
            ast.copy_location(ast.Assign([ast.Name(str(a.asname), ast.Store())], ast.Name(a.name, ast.Load())), node)
            for a in renamed
        ] or None

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id in self._modules:
            self.names.add(node.attr)
            return ast.copy_location(ast.Name(node.attr, node.ctx), node)
        self.generic_visit(node)
        return node
