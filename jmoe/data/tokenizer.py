"""Tokenizers: text to token ids and back.

All kinds are one class around one `tokenizer.json`: bytes are a byte-level BPE without merges whose ids are the byte
values. Text is only ever text: what looks like a special token inside a document becomes ordinary tokens.

    python -m jmoe.data.tokenizer train --vocab-size 4096 --output tok.json --files "corpus/**/*.txt"
"""

import hashlib
import heapq
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int32, Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

from jmoe import recipe
from jmoe.config import BPE, Bytes, Data, Embedded, Files, InputError, Source, TokenizerFile, require
from jmoe.data import sources

END_OF_TEXT = "<|endoftext|>"
_USUAL_EOS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|im_end|>", "[EOS]", "[SEP]")  # noqa: RUF001
_SAMPLE_CHARACTERS = 1 << 16


class Tokenizer:
    """A Hugging Face `tokenizers.Tokenizer` that packs documents between `eos` tokens.

    Attributes:
        vocab_size: largest token id + 1.
        eos: id of the token that stands before and after each document; never in the encoding of a text.
        fingerprint: hash of everything that decides which ids a text gets, hexadecimal.
    """

    vocab_size: int
    eos: int
    fingerprint: str

    def __init__(self, definition: str, eos: str | None = None, where: str = "tokenizer"):
        """`definition` is the content of a tokenizer.json; `where` names it in messages. Raises InputError."""
        try:
            backend = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the Rust side raises bare Exception
            raise InputError(f"{where} is no tokenizer.json: {str(error).splitlines()[0]}") from None
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        vocabulary = backend.get_vocab(with_added_tokens=True)
        name = next((name for name in (_USUAL_EOS if eos is None else (eos,)) if name in vocabulary), None)
        if name is None:
            raise InputError(
                f"{where} has no token {eos!r}; data.tokenizer.eos must name one of its tokens"
                if eos
                else f"{where} has none of the usual end-of-text tokens; name its own with data.tokenizer.eos"
            )
        self._backend = backend
        self._definition = definition
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos = vocabulary[name]
        self.fingerprint = hashlib.sha256(f"{name}\n{definition}".encode()).hexdigest()
        model = json.loads(definition)["model"]
        require(not model.get("dropout"), f"{where} has BPE dropout; the ids of a text would change from run to run")
        # The unknown token is what the model answers for text that it has no token for, so text may produce it.
        unknown = model.get("unk_token")
        if model.get("unk_id") is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        self._special = np.zeros(self.vocab_size, bool)
        for index, token in backend.get_added_tokens_decoder().items():
            self._special[index] = token.special and token.content != unknown
        self._special[self.eos] = True

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], eos: str | None = None) -> "Tokenizer":
        """Reads a tokenizer.json. Raises InputError if it is missing or broken, or has no token `eos`."""
        try:
            definition = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"tokenizer file {str(path)!r} cannot be read: {error}") from None
        return cls(definition, eos, where=f"tokenizer file {str(path)!r}")

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Token ids of `text`, int32 [tokens]; no special tokens are added and none comes out of the text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """`encode` of each text, on all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [np.array(encoding.ids, np.int32) for encoding in encodings]
        return [
            self._encode_apart(text) if self._special[row].any() else row for text, row in zip(texts, rows, strict=True)
        ]

    def _encode_apart(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Encodes a text that spells special tokens by cutting it within each.

        `encode_special_tokens` keeps the added tokens from being looked for in text, but not a model whose vocabulary
        holds them too (Unigram, WordLevel), nor a token that the file does not call special.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        spans = [span for index, span in zip(encoding.ids, encoding.offsets, strict=True) if self._special[index]]
        if not spans:
            return np.array(encoding.ids, np.int32)
        pieces, position = [], 0
        for start, end in spans:
            middle = (start + end) // 2
            pieces.append(text[position:middle])
            position = max(position, middle if middle > start else start + 1)  # a lone character has no middle: drop it
        pieces.append(text[position:])
        return np.concatenate([self._encode_apart(piece) for piece in pieces])

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " tokens"]) -> str:
        """Text of token ids; special tokens are left out and invalid UTF-8 becomes U+FFFD."""
        kept = [index for index in map(int, ids) if index < self.vocab_size and not self._special[index]]
        return self._backend.decode(kept, skip_special_tokens=True)

    def token(self, index: int) -> str:
        """The token of an id, as the file spells it. Raises InputError if there is none."""
        token = self._backend.id_to_token(index)
        require(token is not None, f"the tokenizer has no token {index}")
        return str(token)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a tokenizer.json that `from_file` reads back."""
        sources.write_atomically(Path(path), self._definition.encode())


def load(data: Data) -> Tokenizer:
    """The tokenizer that `data.tokenizer` asks for; a BPE is trained where the cache does not hold it yet.

    Raises InputError for a file that is no tokenizer, or a source that cannot be read.
    """
    match data.tokenizer:
        case Bytes():
            return byte_tokenizer()
        case TokenizerFile(path, eos):
            return Tokenizer.from_file(path, eos)
        case BPE() as settings:
            return _trained_bpe(data, settings)


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes: id == byte value, then `<|endoftext|>` = 256."""
    # Byte-level tokenizers write bytes as printable characters: those that are printable as themselves, the others
    # from U+0100 on, in order.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte if byte in printable else 0x100 + others.index(byte)): byte for byte in range(256)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    definition = {  # spelt out, so that the fingerprint does not depend on how the library writes it
        "version": "1.0",
        "added_tokens": [{"id": 256, "content": END_OF_TEXT, **flags}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary | {END_OF_TEXT: 256}, "merges": []},
    }
    return Tokenizer(json.dumps(definition, indent=1), END_OF_TEXT)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids (`<|endoftext|>` = 0, then the 256 bytes, then merges)."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend.to_str(), END_OF_TEXT)


def sample_texts(corpus: Sequence[Source], held_out_fraction: float, megabytes: float) -> Iterator[str]:
    """About `megabytes` [10^6 bytes] of text spread evenly over the training documents: the pieces of lowest hash.

    One pass, memory bounded by the sample, the same sample in whatever order the documents come.
    """
    budget, size = megabytes * 1e6, 0
    heap: list[tuple[int, str]] = []  # of negated hashes, so that the highest hash is the first to go
    for source in corpus:
        for document in sources.watched(source, "sampling"):
            if sources.held_out(document.name, held_out_fraction):
                continue
            for number, piece in enumerate(document.pieces(_SAMPLE_CHARACTERS)):
                name = f"{document.name}:{number * _SAMPLE_CHARACTERS}"
                digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
                heapq.heappush(heap, (-int.from_bytes(digest, "big"), piece))
                size += len(piece.encode())
                while size > budget and len(heap) > 1:
                    size -= len(heapq.heappop(heap)[1].encode())
    return (piece for _, piece in sorted(heap))


def _trained_bpe(data: Data, settings: BPE) -> Tokenizer:
    cache = sources.cache_directory(data)
    fraction = 0.0 if data.validation else data.validation_fraction
    content = [sources.fingerprint(source, cache) for source in data.sources]
    key = json.dumps([1, content, fraction, settings.vocab_size, settings.train_megabytes])
    path = cache / "tokenizers" / f"bpe-{settings.vocab_size}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if not path.exists():
        train_bpe(sample_texts(data.sources, fraction, settings.train_megabytes), settings.vocab_size).save(path)
    return Tokenizer.from_file(path, END_OF_TEXT)


@dataclass(frozen=True)
class TrainOptions:
    """Flags of `python -m jmoe.data.tokenizer train`."""

    vocab_size: int = 4096
    """ids in all, 256 bytes and one special token included [tokens]"""
    output: str = "tokenizer.json"
    """the file to write [path]"""
    embedded: bool = False
    """train on the source text of this Python's standard library, also where no files are given [switch]"""
    files: str | None = None
    """pattern of .txt and .jsonl files to train on, each also .gz or .zst [path]"""
    train_megabytes: float = 16.0
    """how much text the merges are learnt from, spread over the documents [10^6 bytes]"""
    validation_fraction: float = 0.02
    """share of the documents left out, as data.validation_fraction does [fraction]"""


def main(argv: Sequence[str]) -> None:
    """Trains a byte-level BPE and writes it as a tokenizer.json. Raises InputError."""
    command, options = recipe.arguments(argv, TrainOptions(), name="COMMAND", meaning="'train'")
    require(command == "train", f"unknown command {command!r}; there is one, train")
    settings = BPE(vocab_size=options.vocab_size, train_megabytes=options.train_megabytes)
    fraction = options.validation_fraction
    require(0.0 <= fraction < 1.0, f"validation_fraction is {fraction}; it must lie in [0, 1)")
    require(not (options.embedded and options.files), "--embedded and --files exclude each other; give one")
    source = Files(glob=options.files) if options.files else Embedded()
    texts = list(sample_texts([source], fraction, settings.train_megabytes))
    require(any(text.strip() for text in texts), f"{sources.describe(source)}: no text to train on")
    tokenizer = train_bpe(texts, settings.vocab_size)
    try:
        tokenizer.save(options.output)
    except OSError as error:
        raise InputError(f"--output {options.output!r} cannot be written: {error.strerror}") from None
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    rate = f"{size / tokens:.2f} bytes/token on {size / 1e6:.1f} MB of text"
    print(f"{options.output}: {tokenizer.vocab_size} tokens, {rate}")


if __name__ == "__main__":
    with recipe.exit_on_input_error():
        main(sys.argv[1:])
