"""Ground truths of code problems, in all the forms that public data has them, read into a `Problem`.

    {"inputs": [...], "outputs": [...], "fn_name"?}         Klear, verl/PRIME, APPS, TACO; also as `input_output`
    {"inputs_file": path, "outputs_file": path}             the same on disk, read when a response is graded
    {"functional": source}, {"pytest": source}              Klear, rllm: LeetCode's check(candidate), KodCode
    [{"input", "output", "type" | "testtype"?, "fn_name"?}] rllm, DeepCoder, PrimeIntellect (`test_cases`), Codeforces
    {"public_test_cases", "private_test_cases", "metadata"} LiveCodeBench
    {"public_tests", "private_tests", "generated_tests"}    code_contests
    {"prompt", "test", "entry_point"}                       HumanEval
    {"test_list", "test_setup_code" | "test_imports"?}      MBPP
    source                                                  asserts, check(candidate) or pytest functions

Each may be JSON in a text.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cases import FormError, call_problem, load_json, stdin_problem
from .livecodebench import PackedTestsError, unpack_tests
from .problem import Problem
from .python_tests import TestSourceError, read_source

__all__ = ["FormError", "check_form", "read_problem"]

EXPECTED = (
    "expected an object with `inputs` and `outputs`, `functional`, `pytest`, `inputs_file` and `outputs_file`, "
    "`test` and `entry_point`, `test_list` or LiveCodeBench's test cases, a list of tests with `input` and `output`, "
    "or Python source with asserts; each of them may be JSON in a text"
)
_WRAPPING = ("input_output", "verification_info", "test_cases", "tests", "ground_truth", "reward_model")


def read_problem(ground_truth: Any) -> Problem:
    """The tests of a ground truth. Raises FormError where it has none of the forms, or holds no test."""
    try:
        problem = _read(_plain(ground_truth), files=True)
    except (TestSourceError, PackedTestsError) as error:
        raise FormError(f"the tests cannot be read: {error}") from None
    except RecursionError:
        raise FormError("the ground truth is nested too deeply") from None
    if problem is None or not problem.tests:
        raise FormError("the ground truth holds no test")
    return problem


def check_form(ground_truth: Any) -> None:
    """Raise FormError where `read_problem` would; opens no file of tests, but says where one is missing."""
    try:
        problem = _read(_plain(ground_truth), files=False)
    except (TestSourceError, PackedTestsError) as error:
        raise FormError(f"the tests cannot be read: {error}") from None
    except RecursionError:
        raise FormError("the ground truth is nested too deeply") from None
    if problem is not None and not problem.tests:
        raise FormError("the ground truth holds no test")


def _read(truth: Any, *, files: bool, nested: bool = False) -> Problem | None:
    """None where the tests are in files, which are there and not read."""
    if isinstance(truth, str | bytes):
        return _read_text(truth, files=files, nested=nested)
    if isinstance(truth, list):
        return _read_list(truth)
    if not isinstance(truth, dict):
        raise FormError(f"the ground truth is of type {type(truth).__name__}, {EXPECTED}")
    if "inputs_file" in truth or "outputs_file" in truth:
        return _read_files(truth, files=files)
    for needed, read in _READERS:
        if all(truth.get(name) is not None for name in needed):
            return read(truth)
    for name in _WRAPPING:
        if truth.get(name) is not None:
            return _read(_plain(truth[name]), files=files, nested=True)
    raise FormError(
        f"the ground truth has the keys {', '.join(map(repr, list(truth)[:8])) or 'of nothing'}, {EXPECTED}"
    )


def _read_text(text: str | bytes, *, files: bool, nested: bool) -> Problem | None:
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    try:
        inner = load_json(text)
    except (ValueError, RecursionError):
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise FormError(f"the ground truth {text[:60]!r} is neither JSON nor Python, {EXPECTED}") from None
        return read_source(text)
    if isinstance(inner, str | dict | list) and not (nested and isinstance(inner, str)):
        return _read(inner, files=files, nested=True)
    raise FormError(f"the ground truth {text[:60]!r} is {type(inner).__name__} in JSON, {EXPECTED}")


def _read_list(rows: list[Any]) -> Problem:
    """Tests one by one, or asserts."""
    if not rows:
        raise FormError("the ground truth is an empty list")
    if all(isinstance(row, str) for row in rows):
        return read_source("\n".join(rows))
    kinds, inputs, outputs, names = set(), [], [], set()
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or "input" not in row or "output" not in row:
            raise FormError(f"test {number} of the ground truth has no `input` and `output`")
        metadata = _plain(row.get("metadata")) or {}
        name = row.get("fn_name") or row.get("func_name")
        name = name or (metadata.get("func_name") if isinstance(metadata, dict) else None)
        kind = str(row.get("testtype") or row.get("type") or ("functional" if name else "stdin"))
        kinds.add(_KINDS.get(kind, kind))
        names.add(name)
        inputs.append(row["input"])
        outputs.append(row["output"])
    if kinds == {"stdin"}:
        return stdin_problem(inputs, outputs)
    if kinds != {"call"}:
        raise FormError(
            f"the tests are of the types {', '.join(sorted(kinds))}, expected one of them: stdin or functional"
        )
    if len(names) != 1 or None in names:
        raise FormError("tests of a function do not name it (`fn_name`, or `func_name` in `metadata`), or name several")
    return call_problem(inputs, outputs, str(names.pop()))


_KINDS: Mapping[str, str] = {
    **dict.fromkeys(("stdin", "stdin_stdout", "standard_input", "io"), "stdin"),
    **dict.fromkeys(("functional", "function_call", "call", "call_based"), "call"),
}


def _read_pairs(truth: dict[str, Any]) -> Problem:
    inputs, outputs = truth["inputs"], truth["outputs"]
    name = truth.get("fn_name")
    return call_problem(inputs, outputs, str(name)) if name else stdin_problem(inputs, outputs)


def _read_files(truth: dict[str, Any], *, files: bool) -> Problem | None:
    """Inputs and outputs on disk: JSON lists, or JSON lines where the file is called so."""
    sides = []
    for key in ("inputs_file", "outputs_file"):
        name = truth.get(key)
        if not isinstance(name, str):
            raise FormError(f"`{key}` is missing, or no path: `inputs_file` and `outputs_file` go together")
        path = Path(name)
        if not path.is_file():
            raise FormError(f"`{key}` {name!r} is not there (relative paths are from the folder the run starts in)")
        sides.append(_read_file(path) if files else None)
    return _read_pairs(truth | dict(zip(("inputs", "outputs"), sides, strict=True))) if files else None


def _read_file(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [load_json(line) for line in text.splitlines() if line.strip()]
        return load_json(text)
    except (OSError, ValueError) as error:
        raise FormError(f"{path} cannot be read as JSON: {error}") from None


def _read_livecodebench(truth: dict[str, Any]) -> Problem:
    metadata = _plain(truth.get("metadata")) or {}
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    rows: list[Any] = []
    for key in ("public_test_cases", "private_test_cases"):
        held = truth.get(key)
        rows += unpack_tests(held) if isinstance(held, str) and held.strip() else held or []
    named = [row | {"fn_name": name} if isinstance(row, dict) and name else row for row in rows]
    return _read_list(named)


def _read_contests(truth: dict[str, Any]) -> Problem:
    held = [_plain(truth.get(key)) or {} for key in ("public_tests", "private_tests", "generated_tests")]
    inputs = [text for tests in held for text in tests.get("input", [])]
    return stdin_problem(inputs, [text for tests in held for text in tests.get("output", [])])


def _read_functional(truth: dict[str, Any], key: str = "functional") -> Problem:
    held = truth[key]
    if isinstance(held, list):
        held = "\n".join(map(str, held))
    if not isinstance(held, str):
        raise FormError(f"`{key}` is of type {type(held).__name__}, expected Python source")
    return read_source(held, entry=str(truth.get("entry_point") or ""))


def _read_humaneval(truth: dict[str, Any]) -> Problem:
    prompt, entry = str(truth.get("prompt") or ""), str(truth["entry_point"])
    helpers = _without(prompt, entry)
    problem = read_source(str(truth["test"]), entry=entry, trusted=helpers)

    def complete(program: str) -> str:
        """The program with what the prompt defines besides; the prompt's function with its body where that is all."""
        return f"{helpers}\n{program}" if _defines(program, entry) else prompt + program

    return replace(problem, complete=complete)


def _without(prompt: str, entry: str) -> str:
    """What a prompt of HumanEval holds besides the function to write: imports and helpers."""
    for source in (prompt, prompt + "    pass\n"):
        with contextlib.suppress(SyntaxError, ValueError):
            kept = [part for part in ast.parse(source).body if getattr(part, "name", None) != entry]
            return ast.unparse(ast.Module(kept, []))
    return ""


def _defines(program: str, entry: str) -> bool:
    """Whether a program makes the function itself. It is not parsed: that is for the sandbox to do."""
    made = rf"^(?:(?:async\s+)?def\s+{entry}\b|{entry}\s*(?::.*)?=|class\s+(?:{entry}|Solution)\b)"
    return re.search(made, program, re.MULTILINE) is not None


def _read_mbpp(truth: dict[str, Any]) -> Problem:
    before = [truth.get("test_setup_code") or "", *(_plain(truth.get("test_imports")) or [])]
    return read_source("\n".join(map(str, truth["test_list"])), before="\n".join(before))


_READERS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], Problem]], ...] = (
    (("inputs", "outputs"), _read_pairs),
    (("public_test_cases",), _read_livecodebench),
    (("private_test_cases",), _read_livecodebench),
    (("public_tests",), _read_contests),
    (("test", "entry_point"), _read_humaneval),
    (("test_list",), _read_mbpp),
    (("functional",), _read_functional),
    (("pytest",), lambda truth: _read_functional(truth, "pytest")),
    (("test",), lambda truth: _read_functional(truth, "test")),
    (("assert_case",), lambda truth: _read_functional(truth, "assert_case")),
)


def _plain(value: Any) -> Any:
    """Arrays of numpy as lists, at any depth, and an object that stands as JSON in a text as an object."""
    value = _listed(value)
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return load_json(value)
        except (ValueError, RecursionError):
            return value
    return value


def _listed(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_listed(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _listed(entry) for key, entry in value.items()}
    return value
