"""What a program could leave untested: what follows an exception that it catches, or an end that it sets to a loop."""

from __future__ import annotations

import ast

from ..sandbox.inside.check import NEXT, TESTING

_Block = ast.With | ast.AsyncWith | ast.FunctionDef | ast.AsyncFunctionDef
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def guarded(tree: ast.Module) -> ast.Module:
    """The test with `with TESTING:` around what each `with` and each function holds up to its last assertion.

    The `__exit__` of a program, or a program that calls a function of the test, may catch an exception. Where asserts
    come after it, none of them has run, and the test must not pass.
    """
    functions = [node for node in ast.walk(tree) if isinstance(node, _FUNCTIONS)]
    asserting: set[str] = set()
    while found := {f.name for f in functions if any(_asserts(entry, asserting) for entry in f.body)} - asserting:
        asserting |= found
    guarded: ast.Module = _Guards(asserting).visit(_Nexts().visit(tree))
    return guarded


class _Nexts(ast.NodeTransformer):
    """Gives the end of an iterator to a test that waits for it: `next(it, None)`, in a `try`, to assertRaises.

    Anywhere else, as in `all(map(lambda n: next(f(n)) == n, numbers))`, StopIteration would end the test's own loop.
    """

    _caught = False

    def _within(self, node: ast.AST, caught: bool) -> ast.AST:
        before, self._caught = self._caught, caught
        self.generic_visit(node)
        self._caught = before
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        told = ast.unparse(node.func)
        default = told == "next" and len(node.args) == 2
        return self._within(node, self._caught or default or told.endswith(("raises", "assertRaises")))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if self._caught and node.id == "next" and isinstance(node.ctx, ast.Load):
            return ast.copy_location(ast.Name(NEXT, node.ctx), node)
        return node

    def _inner(self, node: ast.AST) -> ast.AST:
        return self._within(node, False)

    def _outer(self, node: ast.AST) -> ast.AST:
        return self._within(node, True)

    visit_Try = visit_With = visit_AsyncWith = _outer
    visit_Lambda = visit_FunctionDef = visit_AsyncFunctionDef = _inner


def _asserts(statement: ast.stmt, asserting: set[str]) -> bool:
    return any(
        isinstance(node, ast.Assert) or (isinstance(node, ast.Call) and _is_assertion(node.func, asserting))
        for node in ast.walk(statement)
    )


def _is_assertion(function: ast.expr, asserting: set[str]) -> bool:
    match function:
        case ast.Name(id=name):
            return name in asserting
        case ast.Attribute(attr=name):
            return name in asserting or name.startswith(("assert", "fail"))
    return False


class _Guards(ast.NodeTransformer):
    def __init__(self, asserting: set[str]) -> None:
        self._asserting = asserting

    def _block(self, node: _Block) -> _Block:
        count = max((n for n, entry in enumerate(node.body, 1) if _asserts(entry, self._asserting)), default=0)
        self.generic_visit(node)
        if count:
            item = ast.withitem(ast.Name(TESTING, ast.Load()))
            node.body = [ast.With([item], node.body[:count]), *node.body[count:]]
        return node

    visit_With = visit_AsyncWith = visit_FunctionDef = visit_AsyncFunctionDef = _block
