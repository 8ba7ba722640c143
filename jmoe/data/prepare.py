"""Documents are tokenised once and packed into records of seq_len + 1 tokens, kept in the cache directory.

A document is `eos`, its tokens, `eos`. Documents follow one another; one that does not fit is split, and the next
piece begins with the last token of the piece before, so that every token of a document but its first `eos` is
predicted exactly once. A record is independent of all others: its pieces are its segments 1, 2, ...
"""

import dataclasses
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

from jmoe.config import Data, Files, InputError, Source, require
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


def pack(
    documents: Iterable[Iterable[Integer[np.ndarray, " tokens"]]], seq_len: int, vocab_size: int
) -> Iterator[np.ndarray]:
    """Packs documents into records, arrays of shape () and dtype `record_dtype`.

    A document is its tokens, at least 2, in runs of any length, of which one at a time is held.
    """
    dtype = record_dtype(seq_len, vocab_size)
    record, filled, segment = np.zeros((), dtype), 0, 0
    for document in documents:
        last = np.zeros(0, np.int32)  # the token before, none where the document begins
        for tokens in document:
            while len(tokens):
                if seq_len + 1 - filled < 2 - len(last):  # a segment takes two tokens to begin and one to go on
                    yield _sealed(record)
                    record, filled, segment = np.zeros((), dtype), len(last), len(last)
                    record["tokens"][:filled] = last
                    record["segment_ids"][:filled] = segment
                segment += 1 - len(last)
                taken = tokens[: seq_len + 1 - filled]
                record["tokens"][filled : filled + len(taken)] = taken
                record["segment_ids"][filled : filled + len(taken)] = segment
                filled += len(taken)
                last, tokens = taken[-1:], tokens[len(taken) :]
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


def prepare_held_out(data: Data, tokenizer: Tokenizer, glob: str | None) -> tuple[Prepared, ...]:
    """The held-out text of the data, packed, or where `glob` is given that of the files it matches."""
    if glob is not None:
        data = dataclasses.replace(data, validation=(Files(glob=glob),))
    return prepare(data, tokenizer, "validation")


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
    eos = np.array([tokenizer.eos], np.int32)
    size = documents = records = 0

    def counted(name: str, pieces: Iterable[tuple[str, str, np.ndarray]]) -> Iterator[np.ndarray]:
        nonlocal size, documents
        documents += 1
        yield eos
        for _, text, ids in pieces:
            require(
                not ids.size or int(ids.max()) < tokenizer.vocab_size,
                f"{describe(source)}, {name}: the tokenizer gave an id >= its {tokenizer.vocab_size} tokens",
            )
            size += len(text.encode())
            np.add.at(counts, ids, 1)
            yield ids
        counts[eos] += 1
        yield eos

    chosen = (
        document
        for document in watched(source, f"tokenising {split}:")
        if part is None or held_out(document.name, part[1]) == (part[0] == "validation")
    )
    by_document = itertools.groupby(_encoded(chosen, tokenizer), key=lambda piece: piece[0])
    packed = pack(itertools.starmap(counted, by_document), seq_len, tokenizer.vocab_size)
    for number, chunk in enumerate(_chunked(packed, RECORDS_PER_FILE)):
        writer = ArrayRecordWriter(str(directory / f"{number:05d}.array_record"), "group_size:1")
        try:
            for record in chunk:
                writer.write(record.tobytes())
                records += 1
        finally:
            writer.close()
    targets = int(counts.sum())
    if documents == 0:
        remedy = "give a source that has one"
        if part is not None:
            remedy = (
                f"the share held out for validation is data.validation_fraction = {part[1]}; "
                "give data.validation, more documents, or .jsonl with one document a line"
            )
        raise InputError(f"data: {describe(source)} has no document with text for the {split} split; {remedy}")
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


def _encoded(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[tuple[str, str, np.ndarray]]:
    """(document's name, text, ids) of each piece of the documents, which are encoded many at a time."""
    pieces = (
        (document.name, text)
        for document in documents
        for text in _unless_blank(document.pieces(_PIECE_CHARACTERS, after="\n"))
    )
    for group in _grouped(pieces):
        for (name, text), ids in zip(group, tokenizer.encode_batch([text for _, text in group]), strict=True):
            yield name, text, ids


def _unless_blank(pieces: Iterator[str]) -> Iterator[str]:
    """All the pieces, or none where all are white space."""
    blank = []
    for piece in pieces:
        blank.append(piece)
        if piece.strip():
            yield from blank
            blank.clear()
            yield from pieces


def _grouped(pieces: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    group, size = [], 0
    for name, text in pieces:
        group.append((name, text))
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group
