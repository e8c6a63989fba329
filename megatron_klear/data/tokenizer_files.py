"""The files of a tokenizer folder: tokenizer.json as it stands, and the special tokens and template named beside it.

transformers is not asked: for some classes named in tokenizer_config.json its releases replace the pre-tokenizer,
normaliser or decoder of tokenizer.json by the class's own, and text becomes other tokens than the model was
pretrained with. Where the files beside tokenizer.json contradict it, the folder is refused.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from megatron_klear.data.rows import DataError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that every tokenizer may name; a folder may name others that end in `_token`."""

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATES = "additional_chat_templates"
_SLOW_FILES = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tekken.json", "tiktoken.model")
_MATCHING = ("lstrip", "rstrip", "single_word")
_AGREE = "make both files say what the model was pretrained with"
_NO_TEMPLATE = (
    "has no chat template, so rows of messages cannot be rendered; set data.chat_template to a Jinja file, "
    "or use the tokenizer of an instruction-tuned sibling"
)


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that decide how it tokenizes, by their names inside it."""
    paths = [folder / name for name in _FILES] + sorted((folder / _TEMPLATES).glob("*.jinja"))
    return {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}


def check_tokenizer_folder(folder: Path, chat_template: Path | None = None) -> None:
    """Raise DataError where a folder has no tokenizer.json, or a template file is missing."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: the model path must be a Hugging Face folder with tokenizer files")
    if not (folder / "tokenizer.json").is_file():
        slow = [name for name in _SLOW_FILES if (folder / name).is_file()]
        if not slow:
            raise DataError(f"{folder} has no tokenizer: tokenizer.json is not there")
        # A conversion depends on the release of transformers, so that a run must not make one unseen.
        made = f"AutoTokenizer.from_pretrained({_literal(folder)}).backend_tokenizer"
        command = _command(
            "from transformers import AutoTokenizer", f"{made}.save({_literal(folder / 'tokenizer.json')})"
        )
        raise DataError(
            f"{folder} has no tokenizer.json, only {', '.join(slow)}; convert it with {command} and compare "
            "a few texts with the model's published tokens"
        )
    if chat_template is not None and not chat_template.is_file():
        raise DataError(f"data.chat_template {chat_template} does not exist")


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of tokenizer.json. Raises DataError where it cannot be read."""
    try:
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json over it where that counts.

    As in transformers the map is of the older form of folders, and silent where tokenizer_config.json has
    `added_tokens_decoder`. Raises DataError for a file that is no JSON object.
    """
    settings = _read_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        return settings
    return settings | _read_object(folder / "special_tokens_map.json")


def special_tokens(settings: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The tokens that templates know by name, `eos_token` and its like, those that are null left out."""
    named = {key: value for key, value in settings.items() if key in NAMED_TOKENS and value is not None}
    named |= {key: value for key, value in settings.items() if key.endswith("_token") and _is_token(value)}
    extra = settings.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
    return {key: _content(value, key, folder) for key, value in named.items()}


def read_template(folder: Path, settings: Mapping[str, Any]) -> str:
    """The folder's chat template, of several the one named `default`.

    In transformers' order: additional_chat_templates/*.jinja and chat_template.jinja, which hide the `chat_template`
    of tokenizer_config.json (a text, a list or an object of named ones); last chat_template.json, the file of
    multimodal processors. Raises DataError where there is none, or none is the default.
    """
    files: dict[str, Path] = {}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    files |= {path.stem: path for path in sorted((folder / _TEMPLATES).glob("*.jinja"))}
    found: Any = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    found = found or settings.get("chat_template")
    found = found or _read_object(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        if not all(isinstance(item, dict) and {"name", "template"} <= item.keys() for item in found):
            raise DataError(f"{folder}: chat_template is a list of other things than objects of `name` and `template`")
        found = {item["name"]: item["template"] for item in found}
    if not found:
        raise DataError(f"the tokenizer of {folder} {_NO_TEMPLATE}")
    if isinstance(found, dict):
        if "default" not in found:
            names = ", ".join(map(str, found))
            raise DataError(
                f"{folder} has the chat templates {names} and none named default; "
                "set data.chat_template to a file with the one to train"
            )
        found = found["default"]
    if not isinstance(found, str) or not found:
        raise DataError(f"{folder}: the chat template is {found!r}; a text is needed")
    return found


def check_agreement(backend: tokenizers.Tokenizer, folder: Path, settings: Mapping[str, Any], template: str) -> None:
    """Raise DataError where the files beside tokenizer.json name tokens that it has not, or has otherwise.

    Ids and the flags that decide what a token matches must be the same. The eos, additional special tokens and those
    that the template writes by name must each be one token.
    """
    here = backend.get_added_tokens_decoder()
    for source, token_id, token in _added_tokens(folder, settings):
        text = str(token["content"])
        added = here.get(token_id)
        if added is None or added.content != text:
            known = backend.token_to_id(text)
            moved = known is not None and known in here
            raise DataError(
                f"{folder / source} adds the token {text!r} with the id {token_id}, which tokenizer.json "
                + (f"gives the id {known}; {_AGREE}" if moved else "does not add; ")
                + ("" if moved else _remedy(folder, text, special=bool(token.get("special"))))
            )
        for flag in _MATCHING if backend.normalizer is None else (*_MATCHING, "normalized"):
            ours, theirs = bool(getattr(added, flag)), token.get(flag)
            if theirs is not None and theirs != ours:
                raise DataError(
                    f"{folder / source} gives the added token {text!r} {flag} = {theirs}, tokenizer.json {ours}, "
                    f"and the two tokenize differently; {_AGREE}"
                )
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    wanted = [("an additional special token", _content(t, "additional_special_tokens", folder)) for t in extra]
    named = special_tokens(settings, folder)
    wanted = [] if isinstance(extra, dict) else wanted
    wanted += [(k, t) for k, t in named.items() if k == "eos_token" or re.search(rf"\b{re.escape(k)}\b", template)]
    for role, text in wanted:
        ids = backend.encode(text, add_special_tokens=False).ids
        if text and (len(ids) != 1 or backend.token_to_id(text) != ids[0]):
            raise DataError(
                f"{folder} names {text!r} ({role}), which is not one token of tokenizer.json (it gives {ids}); "
                + _remedy(folder, text, special=True)
            )


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Added tokens as the files beside tokenizer.json tell them: the file, the id, and `content` with its flags."""
    source, bad = "tokenizer_config.json", f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
    if "added_tokens_decoder" in settings:
        table = settings["added_tokens_decoder"]
        if not isinstance(table, dict):
            raise DataError(f"{bad} is {table!r}; an object of ids and tokens is needed")
        pairs = [(key, {"content": token} if isinstance(token, str) else token) for key, token in table.items()]
    else:
        source, bad = "added_tokens.json", str(folder / "added_tokens.json")
        pairs = [(token_id, {"content": text}) for text, token_id in _read_object(folder / source).items()]
    for key, token in pairs:
        if not _is_token(token) or isinstance(key, float | bool) or not str(key).isdecimal():
            raise DataError(f"{bad} has {key!r} for {token!r}; an id and a token are needed")
        yield source, int(key), token


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _content(value: Any, name: str, folder: Path) -> str:
    if not _is_token(value):
        raise DataError(
            f"{folder}: {name} of the tokenizer is {value!r}; a text, or an object with `content`, is needed"
        )
    return str(value if isinstance(value, str) else value["content"])


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a JSON object")
    return found


def _remedy(folder: Path, text: str, *, special: bool) -> str:
    path = _literal(folder / "tokenizer.json")
    add = f"t.add_{'special_' if special else ''}tokens([{_literal(text)}])"
    command = _command("from tokenizers import Tokenizer", f"t = Tokenizer.from_file({path})", add, f"t.save({path})")
    return f"if the model has an embedding for it, add it with {command}; otherwise take it out of the folder's files"


def _literal(value: object) -> str:
    return json.dumps(str(value), ensure_ascii=False)


def _command(*statements: str) -> str:
    return f"`python -c {shlex.quote('; '.join(statements))}`"
