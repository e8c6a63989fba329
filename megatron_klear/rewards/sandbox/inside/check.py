"""The trusted end of a trusted test: what it calls are proxies, what it gets is data."""

from __future__ import annotations

import builtins
import itertools
import json
import sys
import types
from collections.abc import Iterator
from typing import Any

from . import link, values
from .mirror import Mirrors, proxy_of
from .proxy import STRANGER, ProgramError, ProgramGone, Proxy, Unsupported, named

SAME_OBJECT = "_same_object"
"""The name of `same_object` in a test's source."""
ARE_CLASSES = "_are_classes"
"""Of what a test's source tells names of the program that it uses as classes."""
TESTING = "_testing"
"""The name, in a test's source, of the block whose exceptions the program cannot take away."""
NEXT = "_next"
"""The name of a `next` whose StopIteration the test waits for."""
_MOST_GIVEN = 100_000
"""Items of an iterator that the test hands over."""
_ASKED_OF_MODULES = frozenset(("setUpModule", "tearDownModule"))
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.BuiltinMethodType)


class _Link:
    """Asks the program's process, one question at a time."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.ending: BaseException | None = None
        """What ends the test, though it may have caught it."""
        self.classes: set[str] = set()
        """Names that the test uses as classes."""
        self.failure: Exception | None = None
        """The last that came before an assertion."""
        self._functions: list[Any] = []
        self._mirrors = Mirrors(self)
        names = self._receive()
        self.names = set(names) if isinstance(names, list) and all(isinstance(one, str) for one in names) else set()

    def ask(self, *question: Any) -> list[Any]:
        """The value that is asked for, and, of a call, its arguments as they are afterwards."""
        self._send(list(question))
        while True:
            answer = self._receive()
            if not isinstance(answer, list) or len(answer) < 3 or not isinstance(answer[0], str):
                raise self._gone("the program's process gave no answer")
            printed, kind, *rest = answer
            sys.stdout.write(printed)
            if kind == "value":
                return rest
            if kind == "raised" and isinstance(rest[0], Exception):
                raise rest[0]
            if kind != "function" or len(rest) != 3:
                raise self._gone("the program's process gave no answer")
            self._send(self._answer(*rest))

    def unsupported(self, words: str) -> BaseException:
        """What to raise where a test cannot be run beside its program."""
        self.ending = self.ending or Unsupported(words)
        return self.ending

    def fails(self, error: BaseException | None) -> bool:
        """Whether the program must not take an exception away: asserts of the test have failed, or have not run."""
        return isinstance(error, AssertionError) or (error is not None and error is self.failure)

    def _answer(self, number: int, given: list[Any], options: dict[str, Any]) -> list[Any]:
        """What a function of the test gives to the program."""
        try:
            return ["given", self._functions[number](*given, **options)]
        except Exception as error:
            if self.fails(error):
                self.ending = self.ending or error
            return ["thrown", error]

    def _gone(self, words: str) -> ProgramGone:
        gone = ProgramGone(words)
        self.ending = self.ending or gone
        return gone

    def _send(self, message: list[Any]) -> None:
        content = values.encode(message, self._encode)
        if len(content) > values.MAX_BYTES:
            raise self.unsupported(f"the test hands over {len(content)} bytes, and {values.MAX_BYTES} are the most")
        if _TOO_DEEP in content:
            raise self.unsupported(f"the test hands over what is nested more than {values.MAX_DEPTH} deep")
        try:
            link.send(self.descriptor, content)
        except OSError as error:
            raise self._gone(f"the program has ended ({error.strerror})") from None

    def _receive(self) -> Any:
        try:
            content = link.receive(self.descriptor)
        except (EOFError, OSError):
            raise self._gone("the program has ended") from None
        if _TOO_DEEP in content:
            raise ProgramError(f"the program gave a value nested more than {values.MAX_DEPTH} deep")
        return values.decode(content, self._decode)

    def _encode(self, value: Any, depth: int) -> Any:
        """What stands for an object that is no data."""
        if (found := link.standard(value)) is not None:
            return ["@", found]
        if (proxy := proxy_of(value)) is not None:
            return ["@", ["object", proxy._number]]
        if value is STRANGER:
            return ["@", ["stranger"]]
        if isinstance(value, slice):
            return ["@", ["slice", values.to_json([value.start, value.stop, value.step], self._encode, depth + 1)]]
        if isinstance(value, values.Opaque):
            raise ProgramError(f"the program gave {value!r}, which is no value")
        name = getattr(value, "__name__", None)
        if isinstance(name, str) and vars(builtins).get(name) is value:
            return ["@", ["builtin", name]]
        if isinstance(value, Exception):
            name = next(kind.__name__ for kind in type(value).__mro__ if kind.__module__ == "builtins")
            held = [one if type(one) in values.PLAIN else str(one) for one in value.args]
            return ["@", ["error", name, values.to_json(held, self._encode, depth + 1)]]
        if isinstance(value, values.PLAIN):
            return values.plain_json(value, self._encode, depth)
        if isinstance(value, types.CoroutineType) and value.cr_code is _awaited.__code__ and value.cr_frame is not None:
            return ["@", ["object", value.cr_frame.f_locals["proxy"]._number]]
        if isinstance(value, _FUNCTIONS):
            self._functions.append(value)
            return ["@", ["function", len(self._functions) - 1]]
        if isinstance(value, _VIEWS):
            return values.to_json([*value], self._encode, depth + 1)  # type: ignore[misc]
        if isinstance(value, Iterator):
            items = list(itertools.islice(value, _MOST_GIVEN + 1))
            if len(items) <= _MOST_GIVEN:
                return ["@", ["iterator", values.to_json(items, self._encode, depth + 1)]]
        raise self.unsupported(f"the test hands over an object of type {type(value).__name__}, which is no data")

    def _decode(self, content: Any) -> Any:
        """What the program's process means by the tag "@"."""
        kind, held, *rest = content
        if kind == "standard":
            return link.read_standard(content)
        if kind == "function":
            return self._functions[held]
        if kind == "class":
            return self._mirrors.error_class(held)
        if kind == "error":
            return self._mirrors.error(
                [held, rest[0], rest[1]], [values.from_json(one, self._decode) for one in rest[2]]
            )
        proxy = Proxy(self, int(held), str(rest[0])[:100])
        if kind == "plain":
            return self._mirrors.plain(proxy, values.from_json(rest[1], self._decode))
        return _awaited(proxy) if kind == "coroutine" else proxy


_TOO_DEEP = json.dumps(["?", values.TOO_DEEP]).encode()


async def _awaited(proxy: Proxy) -> Any:
    """A coroutine of the program, for whoever awaits only real ones."""
    return proxy._do("await")


class _Testing:
    """A block of the test that ends with its last assertion."""

    def __init__(self, program: _Link) -> None:
        self._program = program

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, _End):
            raise ProgramError("the program's iterator is at its end") from error
        if isinstance(error, Exception):
            self._program.failure = error


class _End(StopIteration):
    """Of an iterator of the program."""


def _next(iterator: Any, *default: Any) -> Any:
    if not isinstance(iterator, Proxy):
        return next(iterator, *default)
    if items := iterator._items(1):
        return items[0]
    if default:
        return default[0]
    raise _End


class _Names(dict[str, Any]):
    """A test's names: its own, Python's, then the program's."""

    program: _Link

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) or name not in self.program.names:
            raise KeyError(name)
        return named(self.program.ask("name", name)[0], name)

    def of_module(self, name: str) -> Any:
        """What `from solution import name` gives."""
        if name in _ASKED_OF_MODULES or name.startswith("__"):
            raise AttributeError(name)
        if name not in self.program.names:
            raise NameError(f"the program defines no {name!r}")
        return named(self.program.ask("name", name)[0], name)


def same_object(first: Any, second: Any) -> bool:
    """`is`, also of two proxies of one object."""
    proxies = proxy_of(first), proxy_of(second)
    if proxies[0] is not None and proxies[1] is not None:
        return bool(proxies[0]._number == proxies[1]._number)
    return first is second


def run_check(code: types.CodeType, descriptor: int, names: dict[str, Any], entry: str) -> None:
    """Execute a test's source; `solution` can be imported in it.

    Raises what ends it, also where the test has caught it by itself: that its program has ended, or Unsupported.
    """
    program = _Link(descriptor)
    found = _Names(names)
    found.program = program
    found[SAME_OBJECT], found[ARE_CLASSES] = same_object, lambda *given: program.classes.update(given)
    found[TESTING], found[NEXT] = _Testing(program), _next
    if entry:
        found["candidate"] = named(program.ask("name", None)[0], entry)
        if entry in program.names:
            found[entry] = found["candidate"]
    module = types.ModuleType("solution")
    module.__dict__["__getattr__"] = found.of_module
    module.__dict__["__all__"] = []  # what the test does not define is the program's anyway; nothing hides abs or math
    sys.modules["solution"] = module
    try:
        exec(code, found)
    finally:
        if program.ending is not None:
            raise program.ending
