"""Documents are tokenised once and packed into records of seq_len + 1 tokens, kept in the cache directory.

A document is `eos`, its tokens, `eos`. Documents follow one another; one that does not fit is split, and the next
piece begins with the last token of the piece before, so that every token of a document but its first `eos` is
predicted exactly once. A record is independent of all others: its pieces are its segments 1, 2, ...
"""

import fcntl
import hashlib
import itertools
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Integer

from jmoe.config import Data, InputError, Source, require
from jmoe.data.sources import Document, cache_directory, describe, fingerprint, held_out, watched
from jmoe.data.tokenizer import Tokenizer

FORMAT = 1  # of the cached data; a change of format or of packing makes a new number
RECORDS_PER_FILE = 1 << 18
_PIECE_CHARACTERS = 1 << 18
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Prepared:
    """One source, packed. `targets` is the number of tokens that bear a loss over one pass of the records."""

    directory: Path
    """where the record files and info.json lie"""
    weight: float
    """share of the training rows, relative to the other sources [unitless]"""
    fingerprint: str
    """hash of text, tokenizer, length, split and format"""
    seq_len: int
    """tokens a row; a record holds one more [tokens]"""
    vocab_size: int
    """largest token id + 1 of the tokenizer [tokens]"""
    records_per_file: int
    """records in each file but the last [count]"""
    records: int
    """records in all [count]"""
    documents: int
    """documents that were not empty [count]"""
    targets: int
    """tokens that are predicted: the documents' tokens and one eos each [tokens]"""
    bytes: int
    """UTF-8 size of the documents' text [bytes]"""
    unigram_entropy: float
    """entropy of the targets' frequencies: the loss of the best model that ignores context [nats/token]"""

    def file(self, number: int) -> Path:
        """The path of record file `number`."""
        return self.directory / f"{number:05d}.array_record"


def record_dtype(seq_len: int, vocab_size: int) -> np.dtype:
    """The layout of a record: token ids and segment ids (0 is padding) of seq_len + 1 places, and their CRC-32."""
    token = "<u2" if vocab_size <= 1 << 16 else "<u4"
    segment = "<u2" if seq_len < 1 << 17 else "<u4"  # a segment has at least two tokens
    return np.dtype([("tokens", token, seq_len + 1), ("segment_ids", segment, seq_len + 1), ("crc", "<u4")])


def pack(documents: Iterable[Integer[np.ndarray, " tokens"]], seq_len: int, vocab_size: int) -> Iterator[np.ndarray]:
    """Packs token sequences (each at least 2 tokens) into records, arrays of shape () and dtype `record_dtype`."""
    dtype = record_dtype(seq_len, vocab_size)
    record, filled, segment = np.zeros((), dtype), 0, 0
    for tokens in documents:
        start = 0
        while start < len(tokens) - 1:
            if seq_len + 1 - filled < 2:
                yield _sealed(record)
                record, filled, segment = np.zeros((), dtype), 0, 0
            piece = tokens[start : start + seq_len + 1 - filled]
            segment += 1
            record["tokens"][filled : filled + len(piece)] = piece
            record["segment_ids"][filled : filled + len(piece)] = segment
            filled += len(piece)
            start += len(piece) - 1
    if filled:
        yield _sealed(record)


def _sealed(record: np.ndarray) -> np.ndarray:
    record["crc"] = zlib.crc32(record.tobytes()[:-4])
    return record


def prepare(data: Data, tokenizer: Tokenizer, split: Literal["train", "validation"]) -> tuple[Prepared, ...]:
    """The packed records of each source of a split, made now where the cache directory does not hold them yet.

    "train" is every document of `data.sources` that is not held out. "validation" is all of `data.validation`, or
    else the held-out documents of `data.sources`. Raises InputError where a source cannot be read or has no text for
    the split, or the cache directory cannot be written.
    """
    cache = cache_directory(data)
    corpus = data.validation if split == "validation" and data.validation else data.sources
    part = None if data.validation else (split, data.validation_fraction)
    return tuple(_prepare_source(source, part, split, data.seq_len, tokenizer, cache) for source in corpus)


def _prepare_source(
    source: Source, part: tuple[str, float] | None, split: str, seq_len: int, tokenizer: Tokenizer, cache: Path
) -> Prepared:
    identity = [FORMAT, fingerprint(source, cache), tokenizer.fingerprint, seq_len, part]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    directory = cache / key
    if not (directory / "info.json").exists():
        # One process works at a time; the lock goes with the process, so what lies about under it is from a dead one.
        with (cache / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (directory / "info.json").exists():
                for leftover in (directory, *cache.glob(f"{key}.tmp-*")):
                    shutil.rmtree(leftover, ignore_errors=True)
                temporary = Path(tempfile.mkdtemp(prefix=f"{key}.tmp-", dir=cache))
                try:
                    _write(source, part, split, seq_len, tokenizer, temporary)
                    temporary.rename(directory)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    try:
        info = json.loads((directory / "info.json").read_text())
        return Prepared(directory=directory, weight=source.weight, fingerprint=key, **info)
    except (ValueError, TypeError):
        raise InputError(f"{directory}/info.json is damaged; delete {directory} to prepare it anew") from None


def _write(
    source: Source, part: tuple[str, float] | None, split: str, seq_len: int, tokenizer: Tokenizer, directory: Path
) -> None:
    """Writes the record files and, last, info.json."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    size = documents = records = 0

    def tokenised() -> Iterator[np.ndarray]:
        nonlocal size, documents
        chosen = (
            document
            for document in watched(source, f"tokenising {split}:")
            if document.text.strip() and (part is None or held_out(document.name, part[1]) == (part[0] == "validation"))
        )
        for document, ids in _encoded(chosen, tokenizer):
            require(
                not ids.size or int(ids.max()) < tokenizer.vocab_size,
                f"{describe(source)}, {document.name}: the tokenizer gave an id >= its {tokenizer.vocab_size} tokens",
            )
            size += len(document.text.encode())
            documents += 1
            tokens = np.concatenate([[tokenizer.eos], ids, [tokenizer.eos]])
            np.add.at(counts, tokens[1:], 1)
            yield tokens

    for number, chunk in enumerate(_chunked(pack(tokenised(), seq_len, tokenizer.vocab_size), RECORDS_PER_FILE)):
        writer = ArrayRecordWriter(str(directory / f"{number:05d}.array_record"), "group_size:1")
        try:
            for record in chunk:
                writer.write(record.tobytes())
                records += 1
        finally:
            writer.close()
    targets = int(counts.sum())
    if documents == 0:
        hint = "" if part is None else f"; the share held out for validation is data.validation_fraction = {part[1]}"
        raise InputError(f"data: {describe(source)} has no document with text for the {split} split{hint}")
    frequencies = counts[counts > 0] / targets
    info = dict(
        seq_len=seq_len,
        vocab_size=tokenizer.vocab_size,
        records_per_file=RECORDS_PER_FILE,
        records=records,
        documents=documents,
        targets=targets,
        bytes=size,
        unigram_entropy=float(-(frequencies * np.log(frequencies)).sum()),
    )
    (directory / "info.json").write_text(json.dumps(info, indent=2) + "\n")


def _chunked(records: Iterator[np.ndarray], size: int) -> Iterator[Iterator[np.ndarray]]:
    for first in records:
        yield itertools.chain([first], itertools.islice(records, size - 1))


def _encoded(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its ids. Long texts are encoded in pieces, so that memory does not grow with the longest."""
    pieces = ((document, piece) for document in documents for piece in _pieces(document.text))
    encoded = (
        (document, ids)
        for group in _grouped(pieces)
        for (document, _), ids in zip(group, tokenizer.encode_batch([text for _, text in group]), strict=True)
    )
    for _, run in itertools.groupby(encoded, key=lambda pair: pair[0].name):
        parts = list(run)
        yield parts[0][0], np.concatenate([ids for _, ids in parts])


def _pieces(text: str) -> Iterator[str]:
    """`text` cut into pieces of at most _PIECE_CHARACTERS, after a line's end where there is one."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1 or start + _PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


def _grouped(pieces: Iterator[tuple[Document, str]]) -> Iterator[list[tuple[Document, str]]]:
    group, size = [], 0
    for document, piece in pieces:
        group.append((document, piece))
        size += len(piece)
        if size >= _BATCH_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group
