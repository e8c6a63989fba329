"""Which names statements bind, change and read."""

from __future__ import annotations

import ast
import re
import symtable

_CLASS_NAME = re.compile(r"[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*\Z")


def bound(statement: ast.AST) -> set[str]:
    """Names that a statement binds in its scope, or whose object it changes by assignment or a method's call."""
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            return {(alias.asname or alias.name).partition(".")[0] for alias in aliases}
        case ast.Expr():
            return set()
    found: set[str] = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name | ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            root = root_of(node)
            if root is not None:
                found.add(root)
    return found


def loaded(node: ast.AST) -> set[str]:
    """All names that a piece of source reads."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}


def root_of(node: ast.AST) -> str | None:
    """`a` of `a`, `a.b`, `a[0].c`; None of anything else."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def free(source: str) -> set[str]:
    """Names that a module reads, at any depth, and neither binds nor imports. Raises SyntaxError."""
    read: set[str] = set()
    made: set[str] = set()
    module = symtable.symtable(source, "tests.py", "exec")
    tables = [module]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table is module or symbol.is_global():
                if symbol.is_referenced():
                    read.add(symbol.get_name())
                if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace():
                    made.add(symbol.get_name())
    return read - made


def used_as_classes(tree: ast.AST, names: frozenset[str]) -> frozenset[str]:
    """Those of the names that are written like classes and used so.

    The source asks for attributes of what they make, for `isinstance`, or compares or adds two that they have made.
    """
    names = frozenset(name for name in names if _CLASS_NAME.match(name))
    found: set[str] = set()
    made: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if (name := _maker(value, names)) is not None:
                made[target] = name
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value) if name := _maker(value, names) or made.get(root_of(value) or ""):
                found.add(name)
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kind]):
                found |= loaded(kind) & names
            case ast.BinOp(left=left, right=right) | ast.Compare(left=left, comparators=[right]):
                found |= _made_in(left, names) & _made_in(right, names)
    return frozenset(found)


def _maker(node: ast.expr, names: frozenset[str]) -> str | None:
    match node:
        case ast.Call(func=ast.Name(id=name)) if name in names:
            return name
    return None


def _made_in(node: ast.expr, names: frozenset[str]) -> set[str]:
    return {name for part in ast.walk(node) if isinstance(part, ast.Call) and (name := _maker(part, names)) is not None}
