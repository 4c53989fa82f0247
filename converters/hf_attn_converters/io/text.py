"""Text from files, JSONL and Parquet files, and datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")  # of what is meant as a file


def read_text(source: str | Path, at_most: int | None = None) -> str:
    """The words of a file, or the documents of a dataset with blank lines between.

    Args:
        source: see `read_file`; or the name or folder of a dataset for the ``datasets`` package,
            as ``name`` or ``name:split``, with a ``text`` column.
        at_most: characters to stop after. A dataset without it is read to its end.

    Raises ValueError where there is no such text, or nothing but blanks in it.
    """
    if _is_file(source):
        return read_file(Path(source), at_most)
    return _not_blank(_join(_from_dataset(str(source)), at_most), source)


def _is_file(source: str | Path) -> bool:
    """Whether it names a file; else it is a dataset.

    Raises ValueError for a file that is not there: its name would be looked for on the network.
    """
    path = Path(source)
    if path.suffix in SUFFIXES and not path.exists():
        raise ValueError(f"there is no file {source}")
    return path.is_file()


def read_file(path: Path, at_most: int | None = None) -> str:
    """A UTF-8 text; of a ``.jsonl`` file the ``text`` field of each line, blank lines between.

    Raises ValueError where there is no such text, or nothing but blanks in it.
    """
    try:
        if path.suffix == ".jsonl":
            text = _join(_from_jsonl(path), at_most)
        else:
            text = path.read_text(encoding="utf-8")[:at_most]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from None
    return _not_blank(text, path)


def read_documents(source: str | Path) -> Iterator[str]:
    """The documents of a source one by one, blank ones left out.

    A plain UTF-8 file is one document; a ``.jsonl`` file has one per line, in the field ``text``;
    a ``.parquet`` file and a dataset one per row, in the column ``text``. Parquet and datasets
    (``name``, ``name:split``) are streamed by the ``datasets`` package.

    Raises ValueError where there is no such text.
    """
    path = Path(source)
    if not _is_file(source):
        documents = _from_dataset(str(source))
    elif path.suffix == ".parquet":
        documents = _from_parquet(path)
    elif path.suffix == ".jsonl":
        documents = _from_jsonl(path)
    else:
        documents = iter([read_file(path)])
    yield from (document for document in documents if document.strip())


def _not_blank(text: str, source: str | Path) -> str:
    if not text.strip():
        raise ValueError(f"{source} is empty: there is no text in it")
    return text


def public_name(source: str | Path) -> str:
    """What records call a text: a file's name without its folders, a dataset's as it is."""
    return Path(source).name if Path(source).exists() else str(source)


def _join(documents: Iterator[str], at_most: int | None) -> str:
    parts, size = [], 0
    for document in documents:
        parts.append(document)
        size += len(document)
        if at_most is not None and size >= at_most:
            break
    return "\n\n".join(parts)[:at_most]


def _from_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)["text"] if line.strip() else ""
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f'{path} line {number}: not an object with a field "text"'
                ) from None
            if not isinstance(text, str):
                raise ValueError(f'{path} line {number}: the field "text" is no string')
            yield text


def _from_dataset(name: str) -> Iterator[str]:
    repository, _, split = name.partition(":")
    return _streamed(name, "no text file", repository, split=split or "train")


def _from_parquet(path: Path) -> Iterator[str]:
    return _streamed(str(path), "Parquet", "parquet", data_files=str(path), split="train")


def _streamed(name: str, kind: str, *args: str, **options: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{name} is {kind}; to read it as a dataset: pip install datasets"
        ) from None
    try:
        rows: Any = datasets.load_dataset(*args, streaming=True, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is neither a text file nor a dataset that can be loaded: {error}"
        ) from None
    for row in rows:
        if "text" not in row:
            raise ValueError(f"dataset {name} has no column text, only {', '.join(row)}")
        yield row["text"]
