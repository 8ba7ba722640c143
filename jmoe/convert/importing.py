"""`python -m jmoe.convert import HF_DIR RUN_DIR`: a folder of a Hugging Face model as a run."""

import itertools
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jmoe import config, recipe
from jmoe.config import InputError, require
from jmoe.convert.families import Family, family_named
from jmoe.convert.mapping import Piece, pieces
from jmoe.convert.runs import ParameterWriter, write_run
from jmoe.convert.shards import Reader
from jmoe.convert.verify import verify
from jmoe.data.tokenizer import Tokenizer
from jmoe.folder import check_new
from jmoe.language_model import check_vocabulary
from jmoe.threads import in_threads

log = logging.getLogger("jmoe")

# Left out where they occur: tables of rotary frequencies that older versions of transformers saved.
_DERIVED = re.compile(r"(model\.layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# All experts of a layer in one tensor, as transformers 5 has them in memory: the names of a family's tables, and the
# tensor that holds them, with the half of its rows if it holds two. [E, 2F, D] for gate and up, [E, D, F] for down.
_FUSED = (
    (re.compile(r"(.*\.experts)\.(\d+)\.(?:gate_proj|w1)\.weight"), "gate_up_proj", 0),
    (re.compile(r"(.*\.experts)\.(\d+)\.(?:up_proj|w3)\.weight"), "gate_up_proj", 1),
    (re.compile(r"(.*\.experts)\.(\d+)\.(?:down_proj|w2)\.weight"), "down_proj", None),
)


@dataclass(frozen=True)
class Options:
    """Flags of `import`."""

    tokenizer: str | None = None
    """the tokenizer.json; that of HF_DIR if None [path]"""
    verify: bool = False
    """compare the logits of the run with those of the folder, read anew [switch]"""


def main(argv: list[str]) -> None:
    """The command. Raises InputError, CheckpointError."""
    places = {"HF_DIR": "a folder with config.json and safetensors", "RUN_DIR": "a folder that is not there yet"}
    (hf_dir, run_dir), options = recipe.positional_arguments(argv, Options(), places)
    family = import_(Path(hf_dir), Path(run_dir), options)
    print(f"{run_dir}: from {family.architecture}")
    if options.verify:
        print(verify(Path(hf_dir), Path(run_dir)))
    print(f"to train on: python train.py {run_dir}/config.json --init-from {run_dir} --run-dir NEW --data.sources ...")


@dataclass(frozen=True)
class Source:
    """Where in a folder's files a piece comes from."""

    piece: Piece
    tensor: str
    index: tuple[int, ...] = ()
    """of the expert, in a tensor of all of them"""
    half: int | None = None
    """of the rows, in a tensor of two matrices"""

    def read(self, reader: Reader) -> np.ndarray:
        """The part of the parameter, in the dtype of the file."""
        tensor = reader.read(self.tensor, self.index)
        if self.half is not None:
            rows = len(tensor) // 2
            tensor = tensor[self.half * rows : (self.half + 1) * rows]
        return self.piece.to_part(tensor)


def import_(hf_dir: Path, run_dir: Path, options: Options = Options()) -> Family:
    """Writes the run, one tensor at a time, and returns the family that the folder is of.

    Raises InputError if HF_DIR is not of a family that jmoe knows, or its files are damaged or do not hold exactly the
    model's tensors, or RUN_DIR is there already; CheckpointError if the disk is full. Then nothing is left behind.
    """
    check_new(run_dir)
    family, settings, text = describe(hf_dir, run_dir, options.tokenizer)
    reader = Reader(hf_dir)
    sources = find_sources(settings.model, family, reader)

    def write(writer: ParameterWriter) -> None:
        def to_file(of_file: list[Source]) -> None:
            for source in of_file:
                writer.write(source.piece.parameter, source.piece.index, source.read(reader))

        by_file = itertools.groupby(sources, lambda source: writer.file(source.piece.parameter, source.piece.index))
        in_threads(to_file, [list(of_file) for _, of_file in by_file])

    write_run(run_dir, settings, text, write)
    return family


def describe(hf_dir: Path, run_dir: Path, tokenizer: str | None = None) -> tuple[Family, config.Config, Tokenizer]:
    """The family of a folder, the settings of the run it becomes, and its tokenizer. Raises InputError."""
    path = hf_dir / "config.json"
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    require(isinstance(content, dict), f"{path} is no JSON object")
    family = family_named(content)
    try:
        model = family.from_json(content)
    except InputError as error:
        raise InputError(f"{hf_dir}: {error}") from None
    text = _tokenizer(hf_dir, Path(tokenizer) if tokenizer else hf_dir / "tokenizer.json", content)
    settings = config.Config(
        model=model,
        data=config.Data(
            tokenizer=config.TokenizerFile(str((run_dir / "tokenizer.json").absolute()), text.token(text.eos)),
            seq_len=min(content.get("max_position_embeddings") or 2048, 4096),
        ),
        loss=family.loss_from_json(content, model),
    )
    check_vocabulary(text, settings)
    return family, settings, text


def _tokenizer(hf_dir: Path, path: Path, content: dict[str, Any]) -> Tokenizer:
    require(path.is_file(), f"{path} is not there; save the tokenizer as tokenizer.json, or give one with --tokenizer")
    definition = path.read_text(encoding="utf-8")
    eos = content.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if eos is None:
        return Tokenizer(definition, where=str(path))
    names = [token["content"] for token in json.loads(definition).get("added_tokens", []) if token["id"] == eos]
    names += [name for name, index in _vocabulary(definition) if index == eos][: not names]
    require(len(names) > 0, f"{path} has no token {eos}, which config.json of {hf_dir} calls the end of a text")
    return Tokenizer(definition, names[0], where=str(path))


def _vocabulary(definition: str) -> Iterable[tuple[str, int]]:
    vocabulary = json.loads(definition)["model"].get("vocab", {})
    if isinstance(vocabulary, list):
        return ((name, index) for index, (name, *_) in enumerate(vocabulary))
    return vocabulary.items()


def find_sources(model: config.Model, family: Family, reader: Reader) -> list[Source]:
    """Where each piece of the model is in the files.

    Raises InputError with every tensor that is missing, left over or of another shape.
    """
    shapes = {name: tensor.shape for name, tensor in reader.tensors.items()}
    sources, problems = [], []
    experts: dict[str, set[tuple[int, ...]]] = {}  # of each tensor, those that are read from it
    for piece in pieces(model, family.table):
        source, expected = _find(piece, shapes)
        sources.append(source)
        experts.setdefault(source.tensor, set()).add(source.index)
        found = shapes.get(source.tensor)
        if found is None:
            problems.append(f"{piece.name} {list(piece.shape)} is missing")
        elif found != expected:
            problems.append(f"{source.tensor} is {list(found)}, expected {list(expected)}")
    for tensor, indices in experts.items():
        if () not in indices and shapes[tensor][:1] != (len(indices),):
            problems.append(f"{tensor} is {list(shapes[tensor])}, expected {len(indices)} experts")
    used = set(experts)
    if model.tie_embeddings and "lm_head.weight" in shapes:
        same = np.array_equal(reader.read("lm_head.weight"), reader.read("model.embed_tokens.weight"))
        require(same, "config.json ties the head to the embedding, and the files hold another lm_head.weight")
        used.add("lm_head.weight")
    left = sorted(name for name in shapes.keys() - used if not _DERIVED.fullmatch(name))
    problems += [f"{name} {list(shapes[name])} is left over" for name in left]
    if problems:
        lines = "".join(f"\n  {problem}" for problem in dict.fromkeys(problems))
        raise InputError(f"the files do not hold the tensors of a {family.architecture} of their config.json:{lines}")
    return sources


def _find(piece: Piece, shapes: dict[str, tuple[int, ...]]) -> tuple[Source, tuple[int, ...]]:
    """The source of a piece, and the shape that its tensor has to have; a missing tensor has its own name."""
    for name in (piece.name, piece.name.replace(".block_sparse_moe.", ".mlp.")):
        if name in shapes:
            return Source(piece, name), piece.shape
        for pattern, tensor, half in _FUSED:
            if (match := pattern.fullmatch(name)) and (fused := f"{match[1]}.{tensor}") in shapes:
                rows = piece.shape[0] * (1 if half is None else 2)
                expected = (*shapes[fused][:1], rows, piece.shape[1])
                return Source(piece, fused, (int(match[2]),), half), expected
    return Source(piece, piece.name), piece.shape
