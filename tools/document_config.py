"""Write docs/settings.md, the table of every setting, from the declarations in config/.

python tools/document_config.py            # write it
python tools/document_config.py --check    # exit code 1 where it is out of date
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_klear.cli.environment import enter_environment

enter_environment()

from pydantic import BaseModel

from megatron_klear.config.base import SFTConfig
from megatron_klear.config.evaluation import EvaluationConfig
from megatron_klear.config.files import write_text_atomically
from megatron_klear.config.rl import GPPOConfig
from megatron_klear.config.schema import Key, keys_of, tables_in
from megatron_klear.curation.build_config import BuildConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "settings.md"
RUNS: dict[str, type[BaseModel]] = {
    "pretrain_sft.py": SFTConfig,
    "train_gppo.py": GPPOConfig,
    "evaluate.py": EvaluationConfig,
    "klear curate build": BuildConfig,
}
HEADER = """\
# Every setting

Made by `python tools/document_config.py` from `megatron_klear/config/base.py`; how settings are given is in
[configuration.md](configuration.md).
"""


def classes_of(cls: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """The classes behind the dotted table `name`: several where it is a choice."""
    classes = [cls]
    for part in name.split("."):
        fields = [table.model_fields[part] for table in classes if part in table.model_fields]
        classes = tables_in(fields[0].annotation)
    return classes


def table_doc(classes: list[type[BaseModel]], name: str) -> str:
    """The docstring of a table's class without the table's own name in front, or what there is to choose from."""
    if len(classes) > 1:
        kinds = ", ".join(f"`{table.model_fields['kind'].default}`" for table in classes)
        return f"One of {kinds}, chosen by `kind`; a key belongs to the kinds that have it."
    doc = " ".join((inspect.getdoc(classes[0]) or "").split())
    return doc.removeprefix(f"`[{name}]`: ")


def cell(text: str) -> str:
    """Text as it can stand in a Markdown table."""
    return text.replace("|", "\\|")


def row_of(key: Key) -> str:
    """One line of a table."""
    name = key.name.rsplit(".", 1)[-1]
    return f"| `{name}` | {cell(key.words)} | `{cell(key.default_text)}` | {cell(key.doc)} |"


def page() -> str:
    """The whole page."""
    lines = [HEADER]
    shown: set[type[BaseModel]] = set()
    for script, cls in RUNS.items():
        lines += [f"## `{script}`", "", " ".join((inspect.getdoc(cls) or "").split()), ""]
        if shown:
            lines += ["Tables that the runs above have are as there.", ""]
        tables: dict[str, list[Key]] = {}  # a table inside another may stand between its keys
        for key in keys_of(cls).values():
            tables.setdefault(key.name.rpartition(".")[0], []).append(key)
        for table, keys in tables.items():
            if table:
                classes = classes_of(cls, table)
                if shown >= set(classes):
                    continue
                shown |= set(classes)
                doc = table_doc(classes, table)
                lines += [f"### `[{table}]`", "", doc[:1].upper() + doc[1:], ""]
            lines += ["| key | value | default | |", "| --- | --- | --- | --- |", *map(row_of, keys), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the page or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is out of date")
    options = parser.parse_args(arguments)
    if not options.check:
        write_text_atomically(PAGE, page())
        print(f"wrote {PAGE.relative_to(ROOT)}")
    elif not PAGE.is_file() or PAGE.read_text() != page():
        print(f"{PAGE.relative_to(ROOT)} is out of date: python tools/document_config.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
