"""The program in a response: the last fenced block of Python in its answer."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

_FENCE = re.compile(r"(?P<run>`{3,}|~{3,})[{.\s]*(?P<language>[\w+#-]*)(?:[\s:,{}.=][^`]*)?\Z")
_LONGEST_FENCE = 500  # characters at the end of a line: looking for one takes the square of it
_MOST_PARSED = 100_000  # characters
_BYTE_ORDER_MARK = "\ufeff"
_PYTHON = frozenset(("python", "py", "python3", "py3"))


@dataclass(frozen=True, slots=True)
class Extracted:
    """The program of a text, or why there is none."""

    program: str | None
    reason: str = ""


@dataclass(slots=True)
class _Block:
    language: str
    indent: int
    """Columns before the fence, which are none of its lines'."""
    lines: list[str]
    closed: bool = False


def find_program(text: str) -> Extracted:
    """The last block fenced as `python`, `py`, `python3` or `py3` (any case), which must be closed.

    A fence may stand at the end of a line of words, or be indented, and its lines by as much (CommonMark); else they
    are as they stand. What follows the language's name is ignored. Where no block is fenced as Python, the last one
    without a language is taken, as the public graders do, if it is Python. Blocks of other languages are no programs.
    An unclosed last block is none either: the response was cut off, or goes on past its answer.
    """
    blocks = _blocks(text)
    if not blocks:
        return Extracted(None, "no fenced block")
    python = [block for block in blocks if block.language in _PYTHON]
    if python:
        if not python[-1].closed:
            return Extracted(None, "the last block is not closed")
        return Extracted(_source(python[-1]))
    bare = [block for block in blocks if not block.language]
    if not bare:
        return Extracted(None, f"no block of Python, the last one is {blocks[-1].language[:20]!r}")
    if not bare[-1].closed:
        return Extracted(None, "the last block is not closed")
    source = _source(bare[-1])
    return Extracted(source) if is_python(source) else Extracted(None, "the block without a language is not Python")


def whole_program(text: str) -> Extracted:
    """The text itself where it holds no fence and is Python as a whole: predictions that are programs as they are."""
    if _blocks(text):
        return find_program(text)
    text = text.removeprefix(_BYTE_ORDER_MARK)
    if text.strip() and is_python(text):
        return Extracted(text)
    return Extracted(None, "no fenced block, and the text as a whole is not Python")


def dedented(program: str) -> str:
    """A program without the indent that all its lines share, those of white space as far as they have it.

    One that begins in the first column is as it was, down to the white space in its texts.
    """
    lines = program.split("\n")
    indents = [line[: len(line) - len(line.lstrip())] for line in lines if line.strip()]
    shared = _beginning(min(indents, default=""), max(indents, default=""))
    return "\n".join(line[len(_beginning(line, shared)) :] for line in lines) if shared else program


def _beginning(first: str, second: str) -> str:
    """What two texts begin with alike; of the first and last of many in order, what all begin with."""
    return first[: next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))]


def is_python(source: str) -> bool:
    """Whether a source can be parsed; never runs or compiles it. Long ones take time: they are left to the sandbox."""
    if len(source) > _MOST_PARSED:
        return True
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _blocks(text: str) -> list[_Block]:
    """The fenced blocks of a text in order; one that is cut off, or that another begins in, is not closed."""
    blocks: list[_Block] = []
    fence = ""
    for line in text.replace("\r\n", "\n").split("\n"):
        if fence and not _ends(line, fence):
            blocks[-1].lines.append(line)
            continue
        opened = _opens(line)
        if fence and not (opened and opened[1] and line.strip().casefold() == opened[0] + opened[1]):
            blocks[-1].closed, fence = True, ""
        elif opened is not None:
            fence, language = opened
            blocks.append(_Block(language, len(line) - len(line.lstrip(" ")), []))
    return blocks


def _opens(line: str) -> tuple[str, str] | None:
    """The fence that ends a line and the language it names; after words only a block of Python opens."""
    found = _FENCE.search(line, max(0, len(line) - _LONGEST_FENCE))
    if found is None:
        return None
    language = found["language"].casefold()
    after_words = bool(line[: found.start()].strip())
    if after_words and (language not in _PYTHON or found["run"][0] != "`"):
        return None
    return found["run"], language


def _ends(line: str, fence: str) -> bool:
    """Whether the line begins with a fence of that kind, at least as long."""
    return line.lstrip().startswith(fence)


def _source(block: _Block) -> str:
    lines = (line[min(block.indent, len(line) - len(line.lstrip(" "))) :] for line in block.lines)
    return "\n".join(lines).removeprefix(_BYTE_ORDER_MARK) + "\n"
