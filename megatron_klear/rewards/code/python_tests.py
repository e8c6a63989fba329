"""Tests that are Python source: `check(candidate)`, lists of asserts, pytest functions, unittest classes."""

from __future__ import annotations

import ast
import builtins
import keyword
import warnings
from collections.abc import Sequence

from ..sandbox.inside.check import ARE_CLASSES, NEXT, SAME_OBJECT, TESTING
from ..sandbox.values import MAX_DEPTH, unfit
from .asserts import CANDIDATE, split
from .guards import guarded
from .names import free, loaded, used_as_classes
from .prelude import LINKED, NAMED, PRELUDE, PYTEST, STARRED, functions, public_names, starred
from .problem import AnyOf, Case, Check, Problem, Test
from .runner_tests import TestSourceError, at_home, is_test, runner_tests

__all__ = ["TestSourceError", "check_source", "names_under_test", "read_source"]

_BUILTINS = frozenset(dir(builtins))
_LINKED = frozenset(("list_node", "tree_node", "ListNode", "TreeNode", "is_same_list", "is_same_tree"))
_COMPARES = frozenset(("isclose", "fabs", "sqrt", "Counter", "deque"))
"""Of the prelude, what tests themselves call."""
_SOLUTION_MODULES = frozenset(("solution", "main", "your_module", "your_solution"))


def read_source(source: str, *, entry: str = "", trusted: str = "", before: str = "") -> Problem:
    """The problem whose tests are a Python source.

    `entry` names the function under test where a `check(candidate)` is not called in the source; `trusted` is source
    of the problem's own that the tests may use; `before` runs in front of the tests (MBPP's set-up code). Raises
    TestSourceError.
    """
    if entry and (not entry.isidentifier() or keyword.iskeyword(entry)):
        raise TestSourceError(f"entry_point {entry[:60]!r} is no name of a function")
    imports = _Solution()
    tree = imports.visit(_parse(source))
    _refuse_patches(tree)
    around = [*_parse(trusted).body, *_parse(before).body]
    body = [statement for statement in tree.body if not _is_main(statement)]
    check = next((s for s in body if isinstance(s, ast.FunctionDef) and s.name == "check" and s.args.args), None)
    under_test = names_under_test(ast.Module([*around, *body], []), imports.names, prelude=check is not None)
    classes = used_as_classes(tree, under_test)
    if check is not None:
        entry, tests = _of_check(check, body, around, entry)
    elif any(is_test(statement) for statement in body):
        tests = runner_tests(body, around, under_test, classes)
    else:
        tests = split(body, around, under_test=under_test, classes=classes)
    for test in tests:
        if isinstance(test, Case) and isinstance(test.expected, AnyOf) and (words := unfit(test.expected.values[0])):
            raise TestSourceError(f"a value that it expects {words}")
    if _deepest(tree) > MAX_DEPTH:
        raise TestSourceError(f"a value in it is nested more than {MAX_DEPTH} deep")
    if not tests:
        raise TestSourceError("it tests nothing: there is no assert in it, nor a function or class of tests")
    linked = LINKED if _LINKED & loaded(tree) else ""
    if not entry and len(under_test) == 1:
        entry = next(iter(under_test))
    return Problem(
        mode="expression",
        tests=tuple(
            Check(check_source(test, under_test | {entry}, classes)) if isinstance(test, Check) else test
            for test in tests
        ),
        entry=entry,
        prelude=PRELUDE + linked,
        whole=True,
    )


def check_source(check: Check, under_test: frozenset[str], classes: frozenset[str] = frozenset()) -> str:
    """The source of a check with what it takes for granted in front: imports, helpers, pytest's names.

    The names under test are imported from the program before anything runs, so that one which is not there fails the
    test, whatever exception that expects, and nothing of Python or the prelude stands in for it.
    """
    tree = ast.fix_missing_locations(guarded(_SameObject().visit(ast.parse(check.source))))
    source = ast.unparse(tree)
    read = free(source) - _starred_in(tree)
    header = [f"from solution import {name}" for name in sorted(read & under_test)]
    if used := sorted(read & classes):
        header.append(f"{ARE_CLASSES}({', '.join(map(repr, used))})")
    others = read - under_test - {CANDIDATE, NEXT, SAME_OBJECT, TESTING} - _BUILTINS
    header += [starred()[name] for name in sorted(others) if name in starred()]
    if "pytest" in others:
        header.append(PYTEST)
    if others & _LINKED:
        header.append(LINKED)
    return "\n".join([*header, source, ""])


def names_under_test(tree: ast.Module, imported: set[str], *, prelude: bool) -> frozenset[str]:
    """Names that the program must define: those that a test imports from it, or that it uses and does not make.

    As in Python a function that a test neither defines nor imports is the program's, though the prelude has one of that
    name, unless it only helps to compare what another gave; `prelude` says that the test counts on the prelude instead.
    Where all that the asserts call is built in, it is that: functions of the program may be called `sum`.
    """
    if imported:
        return frozenset(imported)
    read = free(ast.unparse(tree)) - _starred_in(tree) - {CANDIDATE}
    ours = read - _BUILTINS - starred().keys() - _LINKED - {"pytest"}
    if not prelude:
        called = {name for node in ast.walk(tree) if (name := _called(node))}
        ours |= (read & starred().keys() & (functions() | called)) - _COMPARES - set(NAMED) - _BUILTINS
        asserts = [node.test for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        ours |= {
            name
            for test in asserts
            for name in read & _COMPARES & {_called(node) for node in ast.walk(test)}
            if not loaded(test) & (ours | {CANDIDATE})
        }
        ours = ours or {_outermost(test) for test in asserts} & read
    return frozenset(ours)


def _refuse_patches(tree: ast.AST) -> None:
    """Raise TestSourceError where a test replaces what only the program's own process could be given."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=function, args=arguments) if ast.unparse(function).endswith(("patch", "patch.object")):
                told = ", ".join(map(ast.unparse, arguments))
                if "stdout" not in told:
                    raise TestSourceError(f"it patches {told}, which the program in its own process would not see")
            case ast.Attribute(value=ast.Name(id="sys" | "builtins" as module), attr=attribute, ctx=ast.Store()) if (
                attribute != "stdout"
            ):
                raise TestSourceError(
                    f"it replaces {module}.{attribute}, which the program in its own process would not see"
                )


def _deepest(tree: ast.AST) -> int:
    """How deep the lists, tuples, sets and dicts of a source are nested."""
    deepest, waiting = 0, [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        depth += isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict)
        deepest = max(deepest, depth)
        waiting += [(part, depth) for part in ast.iter_child_nodes(node)]
    return deepest


def _starred_in(tree: ast.Module) -> set[str]:
    """Names that a test imports with a star."""
    modules = {
        str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    }
    return {name for module in modules & set(STARRED) for name in public_names(module)}


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
    if not at_home(check):
        whole = ast.Module([*around, *rest, check, ast.parse(f"check({CANDIDATE})").body[0]], [])
        return method, [Check(ast.unparse(ast.fix_missing_locations(whole)) + "\n")]
    return method, split(check.body, [*around, *rest], candidate=target, under_test=frozenset((method,)))


def _is_main(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "__name__" in loaded(statement.test)


def _is_call_of(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _parse(source: str) -> ast.Module:
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(source, "tests.py", "exec", dont_inherit=True)  # `nonlocal` of nothing is told here alone
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise TestSourceError(f"it is no Python ({type(error).__name__}: {error})") from None


class _SameObject(ast.NodeTransformer):
    """Makes a call of `a is b`, which two proxies of one object could not answer."""

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() as op], comparators=[right]) if not (
                isinstance(left, ast.Constant) or isinstance(right, ast.Constant)
            ):
                call = ast.Call(ast.Name(SAME_OBJECT, ast.Load()), [left, right], [])
                return call if isinstance(op, ast.Is) else ast.UnaryOp(ast.Not(), call)
        return node


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
