"""CUDA C++ with inline PTX to plain C++ for the emulated device: the few things that a header cannot express.

Rewritten are `asm` statements (each PTX instruction into a call of `emulated::ptx`), `kernel<<<...>>>(...)`,
`__shared__` variables and `__launch_bounds__`. All else stays as it is, on the lines where it was. An instruction or a
form of declaration that is not known here fails to compile: nothing is skipped.
"""

from __future__ import annotations

import itertools
import re

_numbers = itertools.count()


def translate(text: str, name: str) -> str:
    """The C++ of one source file, which diagnostics call `name`."""
    for step in (_asm_statements, _launches, _shared_variables, _launch_bounds):
        text = step(text)
    return f'#line 1 "{name}"\n{text}'


def _string_end(text: str, start: int) -> int:
    """Index just past the string literal at `start`."""
    match = re.compile(r'"(?:[^"\\]|\\.)*"').match(text, start)
    assert match, f"an open string: {text[start : start + 40]!r}"
    return match.end()


def _closing(text: str, start: int) -> int:
    """Index just past the parenthesis that closes the one at `start`; strings and comments are passed over."""
    depth, i = 0, start
    while i < len(text):
        if text[i] == '"':
            i = _string_end(text, i)
            continue
        if text.startswith("//", i):
            i = text.index("\n", i)
        depth += (text[i] == "(") - (text[i] == ")")
        i += 1
        if depth == 0:
            return i
    raise ValueError(f"nothing closes {text[start : start + 40]!r}")


def _sections(body: str) -> list[str]:
    """The parts of an asm statement between its colons."""
    parts, i, start = [], 0, 0
    while i < len(body):
        if body[i] == '"':
            i = _string_end(body, i)
        elif body[i] == "(":
            i = _closing(body, i)
        else:
            if body[i] == ":":
                parts.append(body[start:i])
                start = i + 1
            i += 1
    return [*parts, body[start:]]


def _operands(section: str) -> list[str]:
    """The C++ expressions of a section of operands."""
    found, i = [], 0
    for match in re.finditer(r'"[=+]?[a-z]"\s*\(', section):
        if match.start() >= i:
            i = _closing(section, match.end() - 1)
            found.append(section[match.end() : i - 1].strip())
    return found


def _asm_statements(text: str) -> str:
    out, position = [], 0
    for match in re.finditer(r"\basm\s*(?:volatile\s*)?\(", text):
        end = _closing(text, match.end() - 1)
        sections = _sections(text[match.end() : end - 1])
        code = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', sections[0])).replace("\\n", "\n")
        operands = [operand for section in sections[1:3] for operand in _operands(section)]
        assert text[end] == ";", text[match.start() : end + 5]
        lines = "\n" * text.count("\n", match.start(), end)
        out += [text[position : match.start()], _block(code, operands), lines]
        position = end + 1
    return "".join([*out, text[position:]])


def _block(code: str, operands: list[str]) -> str:
    """A C++ block that does what the PTX `code` does."""
    code = re.sub(r"[{}]", " ", code.replace("%=", str(next(_numbers))))
    done = []
    for piece in code.split(";"):
        piece = " ".join(piece.split())
        while label := re.match(r"([A-Za-z_]\w*):(?!:)\s*", piece):
            done.append(f"{label[1]}:")
            piece = piece[label.end() :]
        if piece:
            done.append(_instruction(piece, operands))
    return "{ " + " ".join(done) + " }"


def _instruction(text: str, operands: list[str]) -> str:
    if register := re.fullmatch(r"\.reg \.pred (.+)", text):
        return f"bool {register[1]};"
    condition = ""
    if guard := re.match(r"@(!?)(\w+) ", text):
        condition, text = f"if ({guard[1]}{guard[2]}) ", text[guard.end() :]
    mnemonic, _, rest = text.partition(" ")
    if mnemonic == "bra":
        return f"{condition}goto {rest};"
    arguments = ", ".join(_operand(operand, operands) for operand in rest.split(",")) if rest else ""
    function = mnemonic.replace("::", "__").replace(".", "_")
    return f"{condition}::emulated::ptx::{function}({arguments});"


def _operand(text: str, operands: list[str]) -> str:
    text = text.strip("[] ")
    if text == "_":
        return "::emulated::ptx::Sink{}"
    if special := re.fullmatch(r"%%([a-z_]\w*)", text):
        return f"::emulated::ptx::special_{special[1]}()"
    return re.sub(r"%(\d+)", lambda match: f"({operands[int(match[1])]})", text)


def _launches(text: str) -> str:
    pattern = re.compile(r"(\w+(?:<[^<>;]*>)?)<<<([^;]*?)>>>\(")
    while match := pattern.search(text):
        end = _closing(text, match.end() - 1)
        site = "::emulated::Site{__builtin_FILE(), __builtin_LINE()}"
        arguments = text[match.end() : end - 1]
        call = f"::emulated::chevrons({site}, {match[1]}, {match[2]}, {arguments})"
        text = text[: match.start()] + call + text[end:]
    assert "<<<" not in text, "a launch of a form that is not known"
    return text


def _shared_variables(text: str) -> str:
    pattern = re.compile(
        r"(extern\s+)?__shared__\s+(?:__align__\((\d+)\)\s+)?([A-Za-z_][\w:<>]*)\s+(\w+)((?:\[[^\]]*\])*)\s*;"
    )

    def replace(match: re.Match[str]) -> str:
        extern, align, kind, name, extent = match.groups()
        align = align or f"alignof({kind})"
        if extern:
            return f"{kind}* const {name} = ::emulated::dynamic_shared<{kind}>({align});"
        return (
            f"using shared_type_{name} = {kind}{extent}; static char shared_key_{name}; shared_type_{name}& {name} = "
            f'::emulated::static_shared<shared_type_{name}>(&shared_key_{name}, "{name}", {align});'
        )

    text = pattern.sub(replace, text)
    assert "__shared__" not in text, "a __shared__ variable of a form that is not known"
    return text


def _launch_bounds(text: str) -> str:
    while match := re.search(r"__launch_bounds__\(([^()]*)\)", text):
        body = text.index("{", match.end()) + 1
        check = f" ::emulated::launch_bounds({match[1]});"
        text = text[: match.start()] + text[match.end() : body] + check + text[body:]
    return text
