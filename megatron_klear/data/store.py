"""The token store: supervised rows, tokenized once and memory-mapped by every process that trains on them.

A store lies in `cache/<key>`, where the key is a hash of all that decides its content: the data files' bytes, the
tokenizer's files, the chat template, the settings, and the versions of the tokenizing libraries. It appears under that
name by one rename when it is complete and is never changed. A lock file lets one process build while others wait; the
lock falls with the process that holds it, and the next one starts over. Where the file system has no locks, several may
build, each beside the others, and the first to finish wins.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megatron_klear.data.rows import DataError
from megatron_klear.data.tokenize_pool import Overlong, TokenizeJob

from ..types import Sample
from .build import HELD_OUT, ROWS, StoreSummary, build, is_complete
from .indexed import IndexedReader
from .sources import file_digest, resolve_files
from .template import Turns
from .tokenizer import load_spec
from .tokenizer_files import check_tokenizer_folder, tokenizer_files

logger = logging.getLogger(__name__)

Split = Literal["train", "validation"]
_FORMAT = 2
_LIBRARIES = ("tokenizers", "jinja2")
_POLL_SECONDS = 0.1


class StoreSettings(Protocol):
    """The settings a store is made from; `config.DataConfig` has them."""

    @property
    def train(self) -> tuple[str, ...]: ...
    @property
    def validation(self) -> tuple[str, ...]: ...
    @property
    def validation_share(self) -> float: ...
    @property
    def chat_template(self) -> Path | None: ...
    @property
    def trained_turns(self) -> Turns: ...
    @property
    def max_length(self) -> int: ...
    @property
    def overlong(self) -> Overlong: ...
    @property
    def cache(self) -> Path: ...
    @property
    def workers(self) -> int: ...


class TokenStore:
    """Samples of one split, read from memory-mapped files when asked for.

    `lengths` int32 [N] are the samples' tokens, `trained_counts` int32 [N] how many of them are trained, `key` names
    the content: two stores with the same key hold the same samples in the same order.
    """

    def __init__(self, folder: Path, part: str) -> None:
        self.folder = folder
        self.key = f"{folder.name}/{part}"
        self.summary = StoreSummary.read_from(folder)
        self._tokens = IndexedReader(folder / part)
        self.lengths: npt.NDArray[np.int32] = self._tokens.lengths
        self.trained_counts: npt.NDArray[np.int32] = np.load(folder / f"{part}.trained_counts.npy")
        self._span_offsets: npt.NDArray[np.int64] = np.load(folder / f"{part}.span_offsets.npy")
        self._origins: npt.NDArray[np.int64] = np.load(folder / f"{part}.origins.npy", mmap_mode="r")
        spans = folder / f"{part}.spans"
        self._spans = np.memmap(spans, "<i4", "r").reshape(-1, 2) if len(self) else np.empty((0, 2), np.int32)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, 0 to N - 1, copied out of the map. Raises IndexError beyond."""
        tokens = np.array(self._tokens[index], dtype=np.int32)
        trained = np.zeros(len(tokens), dtype=np.bool_)
        for start, end in self._spans[self._span_offsets[index] : self._span_offsets[index + 1]]:
            trained[start:end] = True
        return Sample(tokens=tokens, trained=trained)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """A hash of data files, tokenizer, template and settings; unlike `key` it outlives an upgrade of libraries."""
        description = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        content = {name: value for name, value in description["content"].items() if name != "libraries"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def origin(self, index: int) -> str:
        """The file and line (row, in Parquet) that a sample comes from."""
        files = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))["files"]
        number, line = self._origins[index]
        return f"{files[number]}:{line}"


def open_store(config: StoreSettings, tokenizer_folder: Path, split: Split = "train") -> TokenStore:
    """The tokenized rows of a split; tokenizes them first where that has not been done yet.

    Any number of processes may call it at once: one tokenizes, the others wait. `tokenizer_folder` is the model folder.
    Raises DataError for data, a tokenizer or a template that cannot be used, and where no sample is left.
    """
    return open_made(config, make_store(config, tokenizer_folder, split), split)


def make_store(config: StoreSettings, tokenizer_folder: Path, split: Split = "train") -> str:
    """Tokenize the rows of a split unless that has been done; the name of the folder under `data.cache` they are in.

    Reads all data files to hash them. Raises DataError as `open_store` does.
    """
    tokenizer_folder = Path(tokenizer_folder)
    check_tokenizer_folder(tokenizer_folder, config.chat_template)
    if split == "validation" and not config.validation and not config.validation_share:
        raise DataError("there are no validation rows: set data.validation or data.validation_share")
    own_files = _has_own_files(config, split)
    files = resolve_files(config.validation if own_files else config.train, f"data.{split if own_files else 'train'}")
    if config.validation:
        _refuse_overlap(config)
    share = 0.0 if config.validation else config.validation_share
    description = _describe(config, tokenizer_folder, files, share)
    key = hashlib.sha256(json.dumps(description["content"], sort_keys=True).encode()).hexdigest()[:32]
    folder = config.cache / key
    if not is_complete(folder):
        _build_once(folder, config, tokenizer_folder, files, share, description)
    return key


def is_made(config: StoreSettings, key: str) -> bool:
    """Whether this machine's `data.cache` has what `make_store` named, whole."""
    return is_complete(config.cache / key)


def open_made(config: StoreSettings, key: str, split: Split = "train") -> TokenStore:
    """The rows of a split in the folder that `make_store` named; reads no data file.

    Raises DataError where no sample is left.
    """
    held_out = split == "validation" and not _has_own_files(config, split)
    store = TokenStore(config.cache / key, HELD_OUT if held_out else ROWS)
    if not len(store):
        files = json.loads((store.folder / "summary.json").read_text(encoding="utf-8"))["files"]
        raise DataError(
            f"no {split} sample is left of {', '.join(files)}: {store.summary}; "
            "check data.max_length, data.overlong, data.validation_share and the rows' assistant turns"
        )
    return store


def _has_own_files(config: StoreSettings, split: Split) -> bool:
    return split == "validation" and bool(config.validation)


def _describe(config: StoreSettings, tokenizer: Path, files: Sequence[Path], share: float) -> dict[str, Any]:
    """What a store is made from; `content` decides its key, the rest is for people."""
    memo = config.cache / "digests"
    content = {
        "format": _FORMAT,
        "files": [file_digest(path, memo) for path in files],
        "tokenizer": {name: file_digest(path, memo) for name, path in tokenizer_files(tokenizer).items()},
        "template": file_digest(config.chat_template, memo) if config.chat_template else None,
        "trained_turns": config.trained_turns,
        "max_length": config.max_length,
        "overlong": config.overlong,
        "held_out_share": share,
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    return {"files": [str(path) for path in files], "tokenizer": str(tokenizer), "content": content}


def _refuse_overlap(config: StoreSettings) -> None:
    train = {path.resolve() for path in resolve_files(config.train, "data.train")}
    both = train & {path.resolve() for path in resolve_files(config.validation, "data.validation")}
    if both:
        raise DataError(f"{min(both)} is in both data.train and data.validation")


def _build_once(
    folder: Path,
    config: StoreSettings,
    tokenizer_folder: Path,
    files: Sequence[Path],
    share: float,
    description: dict[str, Any],
) -> None:
    """Build a store unless another process does; return when it is there."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.cache {folder.parent} cannot be made: {error}; choose another folder") from error
    with _lock(folder.with_name(f"{folder.name}.lock")) as alone:
        if alone:
            _clear_remains(folder)
        if is_complete(folder):
            return
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        try:
            job = TokenizeJob(
                tokenizer=load_spec(tokenizer_folder, config.chat_template),
                turns=config.trained_turns,
                max_length=config.max_length,
                overlong=config.overlong,
                held_out_share=share,
            )
            build(partial, files, job, config.workers, description)
            partial.chmod(0o755)
            _move(partial, folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(error.errno, f"no space for tokenized data under data.cache {folder.parent}") from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        logger.info("tokenized %s into %s: %s", ", ".join(map(str, files)), folder, StoreSummary.read_from(folder))


def _clear_remains(folder: Path) -> None:
    """Remove what killed builders left, and a store whose files were damaged; only with the lock held."""
    for remains in folder.parent.glob(f".{folder.name}.*.partial"):
        shutil.rmtree(remains, ignore_errors=True)
    if folder.exists() and not is_complete(folder):
        logger.warning("tokenized data in %s is damaged (a file is missing or cut short); building it again", folder)
        shutil.rmtree(folder)


def _move(partial: Path, folder: Path) -> None:
    """Give a complete store its name; where another process was first, its store stays."""
    try:
        os.rename(partial, folder)
    except OSError:
        if not is_complete(folder):
            raise
    parent = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a file lock, waiting for it; yields false where the file system has none."""
    with path.open("a") as stream:
        waiting = False
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waiting:
                    logger.info("waiting for another process that tokenizes into %s", path.with_suffix(""))
                waiting = True
                time.sleep(_POLL_SECONDS)
            except OSError as error:
                logger.warning("no file locks under %s (%s): building without one", path.parent, error)
                yield False
                return
            else:
                yield True
                return
