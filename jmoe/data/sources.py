"""Documents: where text comes from.

Each kind of source yields the same documents in the same order on every machine, names each document in a way that
does not depend on where it lies, and tells a fingerprint of its content. A .txt is read as its text is asked for; of
the others one document at a time is held.
"""

import codecs
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import sysconfig
import tempfile
import time
import tokenize
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard
from tqdm import tqdm

from jmoe.config import TFDS, Data, Embedded, Files, InputError, Source, require

_CHUNK_BYTES = 1 << 18
_PLAIN_SECONDS = 10.0
_TXT = re.compile(r"\.txt(\.gz|\.zst)?$")
_JSONL = re.compile(r"\.jsonl(\.gz|\.zst)?$")


@dataclass(frozen=True)
class Document:
    """One text and a name that is the same on every machine."""

    name: str
    text: Iterable[str]
    """parts that make the text when joined; that of a .txt is read from the file, so it can be gone through once"""

    def pieces(self, size: int, after: str = "") -> Iterator[str]:
        """The text in pieces of at most `size` characters, each cut after its last `after`, or at `size` without one.

        The cuts depend on the text alone, not on the parts that it comes in. Raises InputError where the text cannot
        be read.
        """
        rest = ""
        for part in self.text:
            rest, start = rest + part, 0
            while len(rest) - start > size:
                found = rest.rfind(after, start, start + size)
                end = start + size if found < 0 else found + len(after)
                yield rest[start:end]
                start = end
            rest = rest[start:]
        if rest:
            yield rest


def describe(source: Source) -> str:
    """A few words for messages."""
    match source:
        case Embedded():
            return "the embedded corpus"
        case Files():
            return f"files {source.glob}"
        case TFDS():
            return f"TFDS {source.name} {source.split}"


def documents(source: Source) -> Iterator[Document]:
    """Every document of `source`, one at a time, in a fixed order. Raises InputError for what cannot be read.

    What is wrong inside a .txt is found as its text is read.
    """
    match source:
        case Embedded():
            return _embedded_documents(source)
        case Files():
            return _file_documents(source)
        case TFDS():
            return _tfds_documents(source)


def watched(source: Source, purpose: str) -> Iterator[Document]:
    """`documents(source)` with a progress bar on a terminal, or else a plain line now and then (on stderr)."""
    title = f"{purpose} {describe(source)}"
    total = _count(source)
    plain = not sys.stderr.isatty()
    start = last = time.monotonic()
    number = 0
    for number, document in enumerate(
        tqdm(documents(source), desc=title, total=total, unit=" documents", disable=plain), start=1
    ):
        yield document
        if plain and time.monotonic() - last > _PLAIN_SECONDS:
            last = time.monotonic()
            print(f"{title}: {number} of {total or 'an unknown number of'} documents", file=sys.stderr, flush=True)
    if plain:
        seconds = time.monotonic() - start
        print(f"{title}: {number} documents in {seconds:.1f} s", file=sys.stderr, flush=True)


def held_out(document_name: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out `fraction` [0, 1): a hash of its name alone decides."""
    digest = hashlib.blake2b(os.fsencode(document_name), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


def fingerprint(source: Source, cache_dir: str | os.PathLike[str]) -> str:
    """A hash that tells one content of `source` from another (hexadecimal), the same wherever the files lie.

    Files, and the embedded corpus, are hashed by name and content. The hash of each file is remembered in `cache_dir`
    under its path, size and time of change, so that the next call reads no file. A TFDS dataset is hashed by its name,
    version and split and the shard lengths and byte counts of its splits, not by its content: a change of its texts
    that changes none of these is not noticed. Raises InputError where the source is missing.
    """
    match source:
        case TFDS():
            builder, _ = _open_tfds(source)
            parts = builder.info.splits
            shards = {name: [list(part.shard_lengths), int(part.num_bytes)] for name, part in parts.items()}
            examples = parts[source.split].num_examples
            content = [builder.info.full_name, source.split, examples, shards, source.text_key]
        case Files():
            digests = _digests(_files(source), os.path.abspath(source.glob), Path(cache_dir))
            content = ["files", source.text_key, digests]
        case Embedded():
            content = ["python", _digests(_files(source), str(_stdlib()), Path(cache_dir))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def cache_directory(data: Data) -> Path:
    """The folder for tokenised data and trained tokenizers, created. Raises InputError if it cannot be written."""
    folder = Path(data.cache_dir or os.environ.get("JMOE_CACHE") or "~/.cache/jmoe").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise InputError(f"data.cache_dir {str(folder)!r} cannot be written: {error.strerror}") from None


# ------------------------------------------------------------------------------------------------------- files on disk


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _files(source: Embedded | Files) -> list[tuple[str, Path]]:
    """(name relative to the source's root, path) of each file, by name."""
    if isinstance(source, Embedded):
        root, paths = _stdlib(), []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - {"site-packages", "dist-packages", "__pycache__"})
            paths += [Path(folder, name) for name in names if name.endswith(".py")]
        require(bool(paths), f"the embedded corpus: {root} holds no .py file; this Python has no library sources")
    else:
        pattern = os.path.expanduser(source.glob)
        paths = [Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
        require(bool(paths), f"data: the glob {source.glob!r} matches no file (seen from {os.getcwd()})")
        root = _fixed_root(pattern)
        for path in paths:
            require(
                bool(_TXT.search(path.name) or _JSONL.search(path.name)),
                f"data: {path} has an unknown extension; .txt and .jsonl are read, each also with .gz or .zst",
            )
    return sorted((path.relative_to(root).as_posix(), path) for path in paths)


def _fixed_root(pattern: str) -> Path:
    """The folders of `pattern` before its first wildcard."""
    folders: list[str] = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        folders.append(part)
    return Path(*folders)


def _digests(files: list[tuple[str, Path]], place: str, cache_dir: Path) -> list[tuple[str, str]]:
    """(name, SHA-256 of the content) of each file; what is already in the memory of `place` is not read again."""
    memory = cache_dir / "digests" / (hashlib.sha256(os.fsencode(place)).hexdigest()[:16] + ".json")
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    seen, result = {}, []
    for name, path in files:
        try:
            status = path.stat()
            key = f"{path.absolute()}:{status.st_size}:{status.st_mtime_ns}"
            seen[key] = known.get(key) or _sha256(path)
        except OSError as error:
            raise InputError(f"data: {path} cannot be read: {error.strerror}") from None
        result.append((name, seen[key]))
    if seen != known:
        write_atomically(memory, json.dumps(seen).encode())
    return result


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to `path`, creating its folder; a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _count(source: Source) -> int | None:
    """Number of documents, where it is known without reading them."""
    if isinstance(source, TFDS):
        return len(_open_tfds(source)[1])
    files = _files(source)
    return None if any(_JSONL.search(name) for name, _ in files) else len(files)


def _embedded_documents(source: Embedded) -> Iterator[Document]:
    for name, path in _files(source):
        content = path.read_bytes()
        try:  # the library's tests contain files that are broken on purpose: they are no text, so no documents
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            text = content.decode(encoding)
            text.encode()
        except (SyntaxError, LookupError, UnicodeError):
            continue
        yield Document(name, (text,))


def _file_documents(source: Files) -> Iterator[Document]:
    for name, path in _files(source):
        if _JSONL.search(name):
            for number, line in enumerate(_lines(_chunks(path)), start=1):
                if line.strip():
                    yield Document(f"{name}:{number}", (_json_text(line, source.text_key, f"{path}:{number}"),))
        else:
            yield Document(name, _decoded(_chunks(path), str(path)))


def _chunks(path: Path) -> Iterator[bytes]:
    """The content of a file, unpacked, a piece at a time."""
    try:
        with path.open("rb") as file:
            match path.suffix:
                case ".gz":
                    unpacked = gzip.GzipFile(fileobj=file)
                    yield from iter(lambda: unpacked.read(_CHUNK_BYTES), b"")
                case ".zst":
                    yield from _unpack_zstd(file)
                case _:
                    yield from iter(lambda: file.read(_CHUNK_BYTES), b"")
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"data: {path} cannot be read: {error}") from None


def _unpack_zstd(file: BinaryIO) -> Iterator[bytes]:
    """Every frame of a .zst file. zstandard's own stream reader takes a file that is cut off for a short one."""
    frame = None
    while chunk := file.read(_CHUNK_BYTES):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the compressed file ends before its end-of-stream marker")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield rest


def _utf8(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"data: {where} is not UTF-8: byte {error.start} cannot be decoded") from None


def _decoded(chunks: Iterator[bytes], where: str) -> Iterator[str]:
    """The text of a UTF-8 file that comes in chunks cut anywhere, without its byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, mark = 0, "\ufeff"
    try:
        for chunk in chunks:
            read += len(chunk)
            if text := decoder.decode(chunk):
                yield text.removeprefix(mark)
                mark = ""
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        place = read - len(error.object) + error.start
        raise InputError(f"data: {where} is not UTF-8: byte {place} cannot be decoded") from None


def _json_text(line: bytes, key: str, where: str) -> str:
    try:
        value = json.loads(_utf8(line.removeprefix(codecs.BOM_UTF8), where))
    except json.JSONDecodeError as error:
        raise InputError(f"data: {where} is not JSON: {error.msg} at column {error.colno}") from None
    require(isinstance(value, dict), f"data: {where} is not a JSON object")
    require(key in value, f"data: {where} has no key {key!r}; its keys are {', '.join(value) or 'none'}")
    text = value[key]
    require(isinstance(text, str), f"data: {where}: {key!r} is no string but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"data: {where}: {key!r} holds half a surrogate pair, which is no Unicode text") from None
    return text


# ---------------------------------------------------------------------------------------------------------------- TFDS


def _open_tfds(source: TFDS) -> tuple[Any, Any]:
    """(builder, random-access data source) of a TensorFlow Dataset that lies prepared on disk."""
    from tensorflow_datasets.core import read_only_builder  # here, so that runs on other sources do not load it

    title = f"data: TFDS dataset {source.name!r}"
    builder: Any
    try:
        if os.path.isfile(os.path.join(source.name, "dataset_info.json")):
            builder = read_only_builder.builder_from_directory(source.name)
        else:  # from the files alone: the code that once made a dataset may want TensorFlow
            builder = read_only_builder.builder_from_files(source.name, data_dir=source.data_dir)
    except Exception as error:  # tfds raises a dozen kinds
        where = f"under {source.data_dir or 'the default TFDS directory'}"
        raise InputError(f"{title} is not found {where} ({str(error).splitlines()[0]})") from None
    known = ", ".join(builder.info.splits) or "none: it is not prepared"
    try:
        builder.info.splits[source.split]
    except (KeyError, ValueError):
        raise InputError(f"{title} has no split {source.split!r}; its splits are {known}") from None
    features = ", ".join(sorted(builder.info.features))
    require(source.text_key in builder.info.features, f"{title} has no feature {source.text_key!r}; it has {features}")
    try:
        return builder, builder.as_data_source(split=source.split)
    except Exception as error:
        raise InputError(f"{title} cannot be read as array_record: {str(error).splitlines()[0]}") from None


def _tfds_documents(source: TFDS) -> Iterator[Document]:
    builder, examples = _open_tfds(source)
    for index in range(len(examples)):
        text = examples[index][source.text_key]
        where = f"TFDS {source.name} {source.split}, example {index}: feature {source.text_key!r}"
        require(isinstance(text, bytes), f"data: {where} is no text but {type(text).__name__}")
        yield Document(f"{builder.name}:{index}", (_utf8(text, where),))
