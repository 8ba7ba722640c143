import dataclasses
import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import zstandard

from jmoe.config import BPE, Data, Files, InputError
from jmoe.data import prepare as prepare_module
from jmoe.data import sources
from jmoe.data.pipeline import Records
from jmoe.data.prepare import pack, prepare, record_dtype
from jmoe.data.tokenizer import byte_tokenizer, load, train_bpe


def write_corpus(folder, count=40, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        words = rng.choice(["alpha", "βήτα", "gamma\n", "日本"], rng.integers(1, 120))
        (folder / f"{number:03d}.txt").write_text(f"{number} " + " ".join(words))
    return Files(glob=f"{folder}/*.txt")


@pytest.fixture
def data(tmp_path):
    source = write_corpus(tmp_path / "corpus")
    return Data(sources=(source,), seq_len=32, cache_dir=str(tmp_path / "cache"), validation_fraction=0.25)


def unpack(records):
    """The documents put together again: a piece after one that did not end in eos goes on from its last token."""
    documents = []
    for record in records:
        for segment in range(1, record["segment_ids"].max() + 1):
            piece = record["tokens"][record["segment_ids"] == segment].tolist()
            if documents and documents[-1][-1] != 256:
                assert documents[-1][-1] == piece[0]
                documents[-1] += piece[1:]
            else:
                documents.append(piece)
    return documents


@pytest.mark.parametrize("seq_len", [2, 3, 7, 64])
def test_packing_predicts_every_token_once(seq_len):
    rng = np.random.default_rng(seq_len)
    lengths = [*rng.integers(0, 3 * seq_len, 60), 0, 0, 20 * seq_len]
    documents = [np.array([256, *rng.integers(0, 256, length), 256]) for length in lengths]
    records = list(pack(([document] for document in documents), seq_len, 257))
    targets = []
    for number, record in enumerate(records):
        assert record.dtype == record_dtype(seq_len, 257) and record["tokens"].shape == (seq_len + 1,)
        segments = record["segment_ids"].astype(int)
        assert segments[0] == 1 and segments.max() <= (seq_len + 1) // 2
        padding = int((segments == 0).sum())
        assert (segments[seq_len + 1 - padding :] == 0).all() and (record["tokens"][segments == 0] == 0).all()
        assert padding < 2 or number == len(records) - 1  # room for two tokens is used
        used = segments[: seq_len + 1 - padding]
        steps = np.diff(used)
        assert ((steps == 0) | (steps == 1)).all() and (np.bincount(used)[1:] >= 2).all()
        targets += record["tokens"][1:][(segments[1:] == segments[:-1]) & (segments[1:] > 0)].tolist()
    assert targets == [token for document in documents for token in document[1:].tolist()]
    assert unpack(records) == [document.tolist() for document in documents]
    for longest in (1, 3, 2 * seq_len):  # in whatever runs the tokens come
        runs = [np.split(document, np.arange(0, len(document), longest)) for document in documents]
        assert [record.tobytes() for record in pack(iter(runs), seq_len, 257)] == [row.tobytes() for row in records]


def test_large_vocabularies_get_wider_records():
    assert record_dtype(4, 1 << 16)["tokens"].base == np.dtype("<u2")
    assert record_dtype(4, (1 << 16) + 1)["tokens"].base == np.dtype("<u4")
    (record,) = pack([[np.array([70000, 69999, 70000])]], 4, 70001)
    assert record["tokens"].tolist() == [70000, 69999, 70000, 0, 0]


def test_splits_hold_every_document_once(data):
    tokenizer = byte_tokenizer()
    found = {}
    for split in ("train", "validation"):
        (prepared,) = prepare(data, tokenizer, split)
        records = Records(prepared)
        rows = [records[index] for index in range(len(records))]
        found[split] = [bytes(document[1:-1]).decode() for document in unpack(rows)]
        expected = [
            "".join(document.text)
            for document in sources.documents(data.sources[0])
            if sources.held_out(document.name, 0.25) == (split == "validation")
        ]
        assert found[split] == expected and expected
        counts = np.bincount([token for text in expected for token in [*text.encode(), 256]])
        assert prepared.documents == len(expected) and prepared.records == len(rows)
        assert prepared.bytes == sum(len(text.encode()) for text in expected)
        assert prepared.targets == counts.sum() == prepared.bytes + prepared.documents
        shares = counts[counts > 0] / counts.sum()
        np.testing.assert_allclose(prepared.unigram_entropy, -(shares * np.log(shares)).sum(), rtol=1e-12)
    assert not set(found["train"]) & set(found["validation"])


def test_validation_sources_are_taken_whole(data, tmp_path):
    other = write_corpus(tmp_path / "other", 7, seed=1)
    data = dataclasses.replace(data, validation=(other,))
    assert prepare(data, byte_tokenizer(), "validation")[0].documents == 7
    assert prepare(data, byte_tokenizer(), "train")[0].documents == 40


def test_second_run_tokenises_nothing(data, monkeypatch):
    first = prepare(data, byte_tokenizer(), "train")
    monkeypatch.setattr(prepare_module, "watched", lambda *_: pytest.fail("documents were read again"))
    assert prepare(data, byte_tokenizer(), "train") == first


def test_fingerprint_follows_everything_that_matters(data, tmp_path):
    tokenizer = byte_tokenizer()
    bpe = dataclasses.replace(data, tokenizer=BPE(270))
    source = data.sources[0]
    prepared = {
        "base": prepare(data, tokenizer, "train"),
        "split": prepare(data, tokenizer, "validation"),
        "length": prepare(dataclasses.replace(data, seq_len=33), tokenizer, "train"),
        "share": prepare(dataclasses.replace(data, validation_fraction=0.5), tokenizer, "train"),
        "tokenizer": prepare(bpe, load(bpe), "train"),
    }
    heavier = dataclasses.replace(data, sources=(dataclasses.replace(source, weight=7.0),))
    (same,) = prepare(heavier, tokenizer, "train")
    assert same == dataclasses.replace(prepared["base"][0], weight=7.0)
    (tmp_path / "corpus/000.txt").write_text("something else")
    prepared["text"] = prepare(data, tokenizer, "train")
    fingerprints = {name: rows[0].fingerprint for name, rows in prepared.items()}
    assert len(set(fingerprints.values())) == len(fingerprints)


def test_several_files_of_records(data, monkeypatch):
    tokenizer = byte_tokenizer()
    (whole,) = prepare(data, tokenizer, "train")
    rows = [Records(whole)[index].tobytes() for index in range(whole.records)]
    monkeypatch.setattr(prepare_module, "RECORDS_PER_FILE", 7)
    (parts,) = prepare(dataclasses.replace(data, cache_dir=data.cache_dir + "2"), tokenizer, "train")
    assert len(list(parts.directory.glob("*.array_record"))) == -(-whole.records // 7) > 3
    assert [Records(parts)[index].tobytes() for index in range(parts.records)] == rows


def test_long_documents_are_encoded_in_pieces(tmp_path, monkeypatch):
    text = "".join(f"{number} lines é\n" for number in range(400)) + "x" * 1000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("short")
    source = Files(glob=f"{tmp_path}/*.txt")
    other = tmp_path / "validation.jsonl"
    other.write_text('{"text": "v"}')
    data = Data(sources=(source,), validation=(Files(glob=str(other)),), seq_len=64, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(prepare_module, "_PIECE_CHARACTERS", 100)
    monkeypatch.setattr(prepare_module, "_BATCH_CHARACTERS", 250)
    (prepared,) = prepare(data, byte_tokenizer(), "train")
    records = Records(prepared)
    documents = unpack([records[index] for index in range(len(records))])
    assert [bytes(document[1:-1]).decode() for document in documents] == [text, "short"]


def test_a_long_document_is_the_same_in_every_packing_of_its_file(tmp_path, monkeypatch):
    text = "".join(f"{number} βήτα 日本\n" for number in range(300))
    raw = text.encode()
    contents = {"": raw, ".gz": gzip.compress(raw), ".zst": zstandard.ZstdCompressor().compress(raw)}
    monkeypatch.setattr(prepare_module, "_PIECE_CHARACTERS", 100)
    tokenizer = train_bpe([text[:1000]], 300)
    found = []
    for extension, content in contents.items():
        for chunk in (7, 1 << 18):
            monkeypatch.setattr(sources, "_CHUNK_BYTES", chunk)
            (tmp_path / f"a.txt{extension}").write_bytes(content)
            source = Files(glob=f"{tmp_path}/a.txt{extension}")
            cache = tmp_path / f"cache{extension}{chunk}"
            data = Data(sources=(source,), validation=(source,), seq_len=64, cache_dir=str(cache))
            (prepared,) = prepare(data, tokenizer, "train")
            found.append([Records(prepared)[index].tobytes() for index in range(prepared.records)])
    assert len(found) == 6 and all(records == found[0] for records in found)


@pytest.mark.parametrize("blank", ["", " ", "\n" * 99, " \t\n" * 100], ids=["none", "short", "lines", "long"])
def test_white_space_is_left_out_only_where_it_is_all(tmp_path, monkeypatch, blank):
    texts = {"a": blank, "b": blank + "x", "c": "x" + blank, "d": blank + "x" + blank + "y", "e": blank}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    source = Files(glob=f"{tmp_path}/*.txt")
    data = Data(sources=(source,), validation=(source,), seq_len=16, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(prepare_module, "_PIECE_CHARACTERS", 10)
    (prepared,) = prepare(data, byte_tokenizer(), "train")
    documents = unpack([Records(prepared)[index] for index in range(prepared.records)])
    assert [bytes(document[1:-1]).decode() for document in documents] == [texts[name] for name in "bcd"]
    assert prepared.documents == 3 and prepared.bytes == 4 + 4 * len(blank)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_text_is_refused(tmp_path, split):
    (tmp_path / "a.txt").write_text(" \n\t")
    (tmp_path / "b.txt").write_text("")
    source = Files(glob=f"{tmp_path}/*.txt")
    data = Data(sources=(source,), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=rf"files .*\*\.txt has no document with text for the {split} split") as error:
        prepare(data, byte_tokenizer(), split)
    assert "data.validation_fraction = 0.02; give data.validation, more documents, or .jsonl" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"has no document with text for the \w+ split; give a source that has one$"):
        prepare(dataclasses.replace(data, validation=(source,)), byte_tokenizer(), split)
    assert not list((tmp_path / "cache").glob("*.tmp-*"))


def test_tokenizer_that_breaks_its_promise(data, monkeypatch):
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(tokenizer, "vocab_size", 110)
    with pytest.raises(InputError, match=r"\d+\.txt: the tokenizer gave an id >= its 110 tokens"):
        prepare(data, tokenizer, "train")


def test_damaged_info_is_told(data):
    (prepared,) = prepare(data, byte_tokenizer(), "train")
    (prepared.directory / "info.json").write_text('{"records"')
    with pytest.raises(InputError, match=r"info.json is damaged; delete"):
        prepare(data, byte_tokenizer(), "train")


SLOW = """
import sys, time
from jmoe.config import Data, Files
from jmoe.data import prepare, sources
from jmoe.data.tokenizer import byte_tokenizer
def slowly(source, purpose):
    for number, document in enumerate(sources.documents(source)):
        if number == 20:
            print("working", flush=True)
            time.sleep(60)
        yield document
prepare.watched = slowly
prepare._BATCH_CHARACTERS = 10
data = Data(sources=(Files(glob=sys.argv[1]),), seq_len=32, cache_dir=sys.argv[2], validation_fraction=0.25)
prepare.prepare(data, byte_tokenizer(), "train")
"""


def test_killed_preparation_is_done_again(data):
    arguments = [sys.executable, "-c", SLOW, data.sources[0].glob, data.cache_dir]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGKILL)
    cache = prepare_module.cache_directory(data)
    (leftover,) = cache.glob("*.tmp-*")
    assert list(leftover.glob("*.array_record")) and not list(cache.glob("*/info.json"))
    (prepared,) = prepare(data, byte_tokenizer(), "train")
    assert not leftover.exists()
    other = dataclasses.replace(data, cache_dir=data.cache_dir + "2")
    (undisturbed,) = prepare(other, byte_tokenizer(), "train")
    assert prepared == dataclasses.replace(undisturbed, directory=prepared.directory)
    assert prepared.file(0).read_bytes() == undisturbed.file(0).read_bytes()


def prepare_and_report(data, queue):
    (prepared,) = prepare(data, byte_tokenizer(), "train")
    queue.put((prepared.records, len(Records(prepared)[prepared.records - 1]["tokens"])))


def test_two_processes_at_once(data):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=prepare_and_report, args=(data, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert found[0] == found[1]
    assert not list(prepare_module.cache_directory(data).glob("*.tmp-*"))


FLAT = r"""
import re, sys
from pathlib import Path
from jmoe.config import Data, Files
from jmoe.data.prepare import prepare
from jmoe.data.tokenizer import byte_tokenizer
source = Files(glob=sys.argv[1])
(prepared,) = prepare(Data(sources=(source,), validation=(source,), cache_dir=sys.argv[2]), byte_tokenizer(), "train")
peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # getrusage counts the parent's, too
print(prepared.bytes, int(peak[1]) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("megabytes_a_file", [0.1, 100.0])
def test_memory_is_flat(tmp_path, megabytes_a_file):
    """However many documents there are, and however long one is.

    The peak levels off within the first tens of megabytes, at one that varies by 10 MB; hence sizes far apart.
    """
    threads = {"TOKENIZERS_PARALLELISM": "false"}  # one, as allocators keep memory for each
    environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(sys.path)}
    peaks = []
    for megabytes in (10, 50):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        files = max(1, round(megabytes / megabytes_a_file))
        for number in range(files):
            (folder / f"{number:03d}.txt").write_text("some text and more of it\n" * (megabytes * 40000 // files))
        arguments = [sys.executable, "-c", FLAT, f"{folder}/*.txt", str(tmp_path / f"cache{megabytes}")]
        size, peak = map(int, subprocess.check_output(arguments, env=environment, text=True).split())
        peaks.append((size, peak))
    (small, small_peak), (large, large_peak) = peaks
    assert large > small + 39e6
    assert large_peak - small_peak < large - small, peaks  # holding the file would be a byte each


def test_progress_is_plain_lines_when_not_on_a_terminal(data, capsys):
    prepare(data, byte_tokenizer(), "train")
    assert capsys.readouterr().err.startswith(f"tokenising train: files {data.sources[0].glob}: 40 documents in ")


def test_info_is_readable(data):
    (prepared,) = prepare(data, byte_tokenizer(), "train")
    info = json.loads((prepared.directory / "info.json").read_text())
    assert {"seq_len": 32, "vocab_size": 257, "records": prepared.records}.items() <= info.items()
