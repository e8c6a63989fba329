"""Tests written as asserts: what stands on one side is run with the program, the value on the other never goes there.

A test program sees what it is compared with, so it is not given it: of `assert f(2) == 4` only `f(2)` is evaluated
inside, and 4 stays outside. An assert that cannot be split so (a loop, a random input, a comparison in the test's own
helper) is a `Check`, which runs as a program of its own and reaches the judged one by a proxy.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .literals import NotLiteralError, value_of
from .names import bound, loaded, root_of
from .prelude import READ_BACK, starred
from .problem import AnyOf, Case, Check, Expected, Is, Near, Test, expression_input

_WRAPPERS = frozenset(
    (
        "set",
        "sorted",
        "list",
        "tuple",
        "dict",
        "frozenset",
        "str",
        "len",
        "round",
        "abs",
        "sum",
        "float",
        "int",
        "Counter",
    )
)
"""Calls around the program's that may run with it where a value is expected that it would have to know."""
_HIDING = (ast.Compare, ast.BoolOp, ast.IfExp, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)
_RAISES = frozenset(("pytest.raises", "raises"))
_BUILTINS = frozenset(dir(builtins))
_MODULES = frozenset(("math", "np", "numpy", "random", "copy", "re", "os", "sys", "json", "pytest", "itertools"))
_VALUE_METHODS = frozenset(name for kind in (str, bytes, list, dict, set, tuple, int, float) for name in dir(kind))
CANDIDATE = "candidate"
_N = TypeVar("_N", bound=ast.AST)
_Sides = tuple[ast.expr, Expected, set[str]]
"""What is evaluated inside, what is expected of it, and the names that the expected value was made of."""
_ABSOLUTE = frozenset(("abs", "math.fabs", "fabs"))
_ISCLOSE = frozenset(("math.isclose", "isclose"))


_DEFINES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
_MUTABLE = (list, dict, set)


@dataclass(slots=True)
class _Scope:
    """What the statements before an assert have made."""

    candidate: ast.expr | None
    """What the test's name `candidate` stands for."""
    under_test: frozenset[str]
    classes: frozenset[str]
    """Names that the test uses as classes of the program."""
    plain: bool
    """Whether the test only asserts, and names literals."""
    trusted: set[str] = field(default_factory=set)
    """Names that the test's own source defines or imports; the program has no say in them."""
    asserting: set[str] = field(default_factory=set)
    """Functions of the test that test something when they are called."""
    statements: list[ast.stmt] = field(default_factory=list)
    known: dict[str, Any] = field(default_factory=dict)
    """Values of names that are plain literals so far."""


def split(
    body: Sequence[ast.stmt],
    before: Sequence[ast.stmt] = (),
    *,
    candidate: ast.expr | None = None,
    under_test: frozenset[str] = frozenset(),
    classes: frozenset[str] = frozenset(),
) -> list[Test]:
    """The tests of a body of statements, each assert or statement with asserts one test.

    `before` is what the test's source holds around the body; `candidate` what that name stands for in it;
    `under_test` names that are the program's though Python or the prelude has them as well, `classes`
    those of them that the test uses as classes.
    """
    # What else a test makes may hold what is expected, or change what is asked: then each assert is a program of its
    # own, with everything before it.
    plain = all(map(_is_plain, (*before, *body)))
    scope = _Scope(candidate, under_test, classes, plain)
    for statement in before:
        _remember(scope, statement)
    tests: list[Test] = []
    for statement in body:
        if isinstance(statement, ast.Assert):
            if not isinstance(statement.test, ast.Constant):  # `assert True` asks nothing of a program
                case, asked = _split_one(statement, scope) if plain else (None, statement.test)
                tests.append(case or _check(statement, scope))
                _remember(scope, ast.Expr(asked))
            continue
        if _asserts(statement, scope):
            tests.append(_check(statement, scope))
        _remember(scope, statement)
    return tests


def _is_plain(statement: ast.stmt) -> bool:
    """Whether a statement of a test is an assert, a loop of such, a definition, or gives names to literals."""
    match statement:
        case ast.For(target=ast.Name(), body=body, orelse=[]):
            return all(isinstance(entry, ast.Assert | ast.For) and _is_plain(entry) for entry in body)
        case ast.Assert() | ast.Pass() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Assign(targets=targets, value=value) if all(isinstance(target, ast.Name) for target in targets):
            try:
                value_of(value, {})
            except NotLiteralError:
                return False
            return True
    return isinstance(statement, _DEFINES)


def _asserts(statement: ast.stmt, scope: _Scope) -> bool:
    """Whether the statement itself tests something, and does not only define what does when it is called."""
    if isinstance(statement, _DEFINES):
        return False
    return bool(loaded(statement) & scope.asserting) or any(
        isinstance(node, ast.Assert | ast.Raise) or (isinstance(node, ast.Call) and ast.unparse(node.func) in _RAISES)
        for node in ast.walk(statement)
    )


def _remember(scope: _Scope, statement: ast.stmt) -> None:
    """Take a statement into what later ones build on."""
    if isinstance(statement, _DEFINES):
        scope.trusted |= bound(statement)
        if any(isinstance(node, ast.Assert | ast.Raise) for node in ast.walk(statement)):
            scope.asserting |= bound(statement)
    for name in bound(statement):
        scope.known.pop(name, None)
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            with contextlib.suppress(NotLiteralError):
                scope.known[name] = value_of(value, scope.known)
    for name in loaded(statement):  # whoever was given a list may have changed it, or keeps it under another name
        if isinstance(scope.known.get(name), _MUTABLE):
            del scope.known[name]
    scope.statements.append(statement)


def _check(statement: ast.stmt, scope: _Scope) -> Check:
    """The statement with what it builds on, to run as it is."""
    module = ast.Module([*(_setup(statement, scope) if scope.plain else scope.statements), statement], [])
    return Check(ast.unparse(ast.fix_missing_locations(module)) + "\n")


def _split_one(statement: ast.Assert, scope: _Scope) -> tuple[Case | None, ast.expr]:
    """A case of an assert, None where it cannot be split; and what of it later asserts may build on."""
    parts = _sides(statement.test, scope)
    if parts is None:
        return None, statement.test
    inside, expected, outside_names = parts
    needed = _setup(inside, scope)
    if any(outside_names & bound(entry) for entry in needed) or any(_hides(entry) for entry in needed):
        return None, inside  # what makes the input would carry the expected value in as well
    setup = ast.Module([_renamed(entry, scope) for entry in needed], [])
    source, expression = ast.unparse(ast.fix_missing_locations(setup)), _renamed(inside, scope)
    asks = (loaded(setup) | loaded(expression)) & scope.under_test & (_BUILTINS | starred().keys())
    return Case(expression_input(source, ast.unparse(expression), asks), expected), inside


def _renamed(node: _N, scope: _Scope) -> _N:
    """A copy in which `candidate` is what it stands for."""
    if scope.candidate is None:
        return node
    renamed: _N = _Rename(scope.candidate).visit(copy.deepcopy(node))
    return ast.fix_missing_locations(renamed)


class _Rename(ast.NodeTransformer):
    def __init__(self, target: ast.expr) -> None:
        self._target = target

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.copy_location(copy.deepcopy(self._target), node) if node.id == CANDIDATE else node


def _hides(node: ast.AST) -> bool:
    """Whether a comparison hides in a piece of source: it would hold what is expected."""
    return any(isinstance(part, _HIDING) for part in ast.walk(node))


def _sides(test: ast.expr, scope: _Scope) -> _Sides | None:
    match test:
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
            for inside, outside in ((left, right), (right, left)):
                if (found := _equal(inside, outside, scope)) is not None:
                    return inside, found, loaded(outside)
        case ast.Compare(left=left, ops=[ast.Is()], comparators=[ast.Constant(value=(None | True | False) as value)]):
            return (left, Is(value), set()) if _asks(left, scope) else None
        case ast.Compare(left=left, ops=[ast.Lt() | ast.LtE() as op], comparators=[right]):
            return _within(left, right, scope, inclusive=isinstance(op, ast.LtE))
        case ast.Call(func=function) if ast.unparse(function) in _ISCLOSE:
            return _isclose(test, scope)
        case ast.Call(func=ast.Name(id=name), args=[inside, ast.Call(func=ast.Name(id=made), args=[outside])]) if (
            name in READ_BACK and name not in scope.trusted and READ_BACK[name][0] == made
        ):
            return _linked(inside, outside, READ_BACK[name][1], scope)
        case ast.UnaryOp(op=ast.Not(), operand=operand) if _asks(operand, scope):
            return ast.Call(ast.Name("bool", ast.Load()), [operand], []), Is(False), set()
    if _asks(test, scope) and not isinstance(test, ast.Name):
        return ast.Call(ast.Name("bool", ast.Load()), [test], []), Is(True), set()
    return None


def _equal(inside: ast.expr, outside: ast.expr, scope: _Scope) -> Expected | None:
    """What an expression should equal; None where this side is none of the program's, or the other no value."""
    if (near := _approximately(outside, scope.known)) is not None:
        return near if _gives(inside, scope) else None
    try:
        value = value_of(outside, scope.known)
    except NotLiteralError:
        return None
    if isinstance(inside, ast.Call) and isinstance(inside.func, ast.Name) and inside.func.id in scope.classes:
        return None  # `Money(5) == 5` is for the class to say
    plain = value is None or isinstance(value, bool)
    return AnyOf((value,)) if (_asks if plain else _gives)(inside, scope) else None


def _approximately(node: ast.expr, known: Mapping[str, Any]) -> Near | None:
    """pytest.approx of a number."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.approx", "approx") and node.args):
        return None
    given = _options(node, known, ("rel", "abs"))
    try:
        value = value_of(node.args[0], known)
    except NotLiteralError:
        return None
    if given is None or not isinstance(value, int | float):
        return None
    relative = given.get("rel", 0.0 if "abs" in given else 1e-6)
    return Near(value, relative, given.get("abs", 1e-12))


def _within(left: ast.expr, right: ast.expr, scope: _Scope, *, inclusive: bool) -> _Sides | None:
    """abs(f(x) - value) < tolerance."""
    match left:
        case ast.Call(func=function, args=[ast.BinOp(left=first, op=ast.Sub(), right=second)], keywords=[]) if (
            ast.unparse(function) in _ABSOLUTE
        ):
            for inside, outside in ((first, second), (second, first)):
                try:
                    value, tolerance = value_of(outside, scope.known), value_of(right, scope.known)
                except NotLiteralError:
                    continue
                if _gives(inside, scope) and isinstance(value, int | float) and isinstance(tolerance, int | float):
                    return inside, Near(value, 0.0, tolerance, inclusive), loaded(outside) | loaded(right)
    return None


def _isclose(test: ast.Call, scope: _Scope) -> _Sides | None:
    given = _options(test, scope.known, ("rel_tol", "abs_tol"))
    if len(test.args) != 2 or given is None:
        return None
    for inside, outside in (test.args, test.args[::-1]):
        try:
            value = value_of(outside, scope.known)
        except NotLiteralError:
            continue
        if _gives(inside, scope) and isinstance(value, int | float):
            near = Near(value, given.get("rel_tol", 1e-9), given.get("abs_tol", 0.0))
            return inside, near, loaded(outside)
    return None


def _options(call: ast.Call, known: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, float] | None:
    """The keywords of a call where they are these and numbers."""
    try:
        given = {keyword.arg: value_of(keyword.value, known) for keyword in call.keywords}
    except NotLiteralError:
        return None
    if not all(name in names and isinstance(value, int | float) for name, value in given.items()):
        return None
    return {str(name): float(value) for name, value in given.items()}


def _linked(inside: ast.expr, outside: ast.expr, read: str, scope: _Scope) -> _Sides | None:
    try:
        value = value_of(outside, scope.known)
    except NotLiteralError:
        return None
    call = ast.Call(ast.Name(read, ast.Load()), [inside], [])
    return (call, AnyOf((value,)), loaded(outside)) if _asks(inside, scope) else None


def _asks(node: ast.expr, scope: _Scope) -> bool:
    """Whether an expression is the program's through and through: a call of it, or something that a call made.

    Nothing of the test's own, and no built-in that the program could replace, stands between it and the verdict.
    """
    while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            return name in scope.under_test or not (name in scope.trusted or name in _BUILTINS | _WRAPPERS)
        if isinstance(node, ast.Call):
            if (
                isinstance(node.func, ast.Attribute)
                and node.func.attr in _VALUE_METHODS
                and (node.args or node.keywords)
            ):
                return False  # `f(x).startswith("abc")`: the argument is what is expected
            node = node.func
        elif isinstance(node.value, ast.Name) and node.value.id in scope.trusted | _MODULES:
            return False
        else:
            node = node.value
    return isinstance(node, ast.Name) and _made_by_program(node.id, scope)


def _gives(node: ast.expr, scope: _Scope) -> bool:
    """Whether an expression may be evaluated with the program where a value is expected that is no mere yes or no."""
    if _hides(node):
        return False
    if isinstance(node, ast.Call) and _wraps(node, scope):
        return not loaded(node.func) & scope.trusted and _gives(node.args[0], scope)
    return _asks(node, scope) or (
        isinstance(node, ast.Tuple | ast.List) and bool(node.elts) and all(_gives(part, scope) for part in node.elts)
    )


def _wraps(call: ast.Call, scope: _Scope) -> bool:
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    return name in _WRAPPERS - scope.under_test and bool(call.args)


def _made_by_program(name: str, scope: _Scope) -> bool:
    """Whether the name holds something that statements of the test made with the program."""
    makers = [statement for statement in scope.statements if name in bound(statement)]
    return bool(makers) and name not in scope.trusted and name not in scope.known


def _setup(inside: ast.AST, scope: _Scope) -> list[ast.stmt]:
    """The statements that the expression builds on, in order."""
    needed = loaded(inside)
    taken: list[ast.stmt] = []
    for statement in reversed(scope.statements):
        touched = bound(statement) | (_stateful(statement, scope) if isinstance(statement, ast.Expr) else set())
        if touched & needed:
            taken.append(statement)
            needed |= loaded(statement)
    return taken[::-1]


def _stateful(statement: ast.Expr, scope: _Scope) -> set[str]:
    """Names whose objects a bare expression may change: those that earlier statements bound."""
    made = {name for entry in scope.statements if not isinstance(entry, ast.Expr) for name in bound(entry)}
    return {root for node in ast.walk(statement) if (root := root_of(node)) is not None and root in made}
