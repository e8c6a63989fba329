"""Which program a response holds."""

import pytest

from megatron_klear.rewards.code.extract import dedented, find_program, whole_program

FOUND = {
    "plain": ("So:\n```python\nprint(1)\n```\nDone.", "print(1)"),
    "last of two": ("```python\nprint(1)\n```\nNo:\n```python\nprint(2)\n```", "print(2)"),
    "py": ("```py\nprint(1)\n```", "print(1)"),
    "Python": ("```Python\nprint(1)\n```", "print(1)"),
    "python3": ("```python3\nprint(1)\n```", "print(1)"),
    "attributes": ("```python title=\"a.py\"\nprint(1)\n```", "print(1)"),
    "space before the name": ("``` python\nprint(1)\n```", "print(1)"),
    "carriage returns": ("```python\r\nprint(1)\r\n```\r\n", "print(1)"),
    "tildes": ("~~~python\nprint('```')\n~~~", "print('```')"),
    "four backticks": ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
    "after words": ("Answer: ```python\nprint(1)\n```", "print(1)"),
    "indented in a list": ("1. So:\n   ```python\n   if 1:\n       print(1)\n   ```", "if 1:\n    print(1)"),
    "words after the closing fence": ("```python\nprint(1)\n``` That is all.", "print(1)"),
    "another language after it": ("```python\nprint(1)\n```\nIts output:\n```text\n1\n```", "print(1)"),
    "no language": ("So:\n```\nprint(1)\n```", "print(1)"),
    "no language, and Python before": ("```python\nprint(1)\n```\n```\n1\n```", "print(1)"),
    "inline code": ("Use ```x``` or `y`.\n```python\nprint(1)\n```\nSee ```z```.", "print(1)"),
    "an indent of its own": ("```python\n    return 1\n```", "    return 1"),
    "white space in texts": ("```python\ns = '''a\n   \n'''\n```", "s = '''a\n   \n'''"),
    "a byte order mark": ("\ufeff```python\n\ufeffprint(1)\n```", "print(1)"),
    "empty": ("```python\n```", ""),
}  # fmt: skip
MALFORMED = {
    "no block": ("print(1)", "no fenced block"),
    "nothing": ("", "no fenced block"),
    "unclosed": ("```python\nprint(1)\n", "not closed"),
    "unclosed after a closed one": ("```python\nprint(1)\n```\nBetter:\n```python\nprint(2", "not closed"),
    "another language": ("```cpp\nint main() {}\n```", "'cpp'"),
    "no language and no Python": ("```\nint main() {}\n```", "not Python"),
    "no language, unclosed": ("```\nprint(1)", "not closed"),
    "begun twice": ("```python\nprint(1)\n```python\nprint(2)\n", "not closed"),
}


@pytest.mark.parametrize("name", FOUND)
def test_program_of_a_response(name: str) -> None:
    text, program = FOUND[name]
    assert (find_program(text).program or "").removesuffix("\n") == program
    assert find_program(text).program is not None


@pytest.mark.parametrize("name", MALFORMED)
def test_a_response_without_a_program(name: str) -> None:
    text, reason = MALFORMED[name]
    found = find_program(text)
    assert found.program is None
    assert reason in found.reason


def test_a_prediction_may_be_a_program_as_it_is() -> None:
    assert whole_program("x = 1\nprint(x)\n").program == "x = 1\nprint(x)\n"
    assert whole_program("It is\n```python\nprint(1)\n```").program == "print(1)\n"
    assert whole_program("Here is my response, without a fence\nprint(1)").program is None
    assert whole_program("```python\nprint(1)").program is None
    assert whole_program(" \n").program is None
    assert whole_program("\ufeffprint(1)\n").program == "print(1)\n"


def test_an_indent_of_all_lines_is_taken_off_and_nothing_else() -> None:
    inner = "s = '''a\n   \n  b'''\nif s:\n\tprint(s)\n"
    assert dedented(inner) == inner
    assert dedented("".join(f"  {line}" for line in inner.splitlines(keepends=True))) == inner
