import gzip
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zstandard

from jmoe.config import TFDS, Data, Embedded, Files, InputError
from jmoe.data import sources
from jmoe.data.sources import Document, cache_directory, documents, fingerprint, held_out


def texts(source):
    """(name, whole text) of each document."""
    return [(document.name, "".join(document.text)) for document in documents(source)]


class Tiny(tfds.core.GeneratorBasedBuilder):
    """A TFDS dataset of 30 training and 4 test texts."""

    VERSION = tfds.core.Version("1.0.0")
    SUFFIX = ""
    code_path = None  # or else tfds imports this module by its name to find its folder

    def _info(self):
        features = tfds.features.FeaturesDict(
            {"text": tfds.features.Text(), "number": tfds.features.Scalar(dtype=np.int32)}
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(30), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"text": f"text number {number}: é{self.SUFFIX}", "number": number}


def build_tiny(folder, suffix=""):
    builder = Tiny(data_dir=str(folder), file_format="array_record")
    builder.SUFFIX = suffix
    builder.download_and_prepare()
    return builder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("tfds"))


def write_all(folder: Path, order=1) -> None:
    """Six files of all extensions; `order` = -1 creates them in the opposite order."""
    lines = "\n".join(json.dumps({"text": f"line {number}\nü", "id": number}) for number in range(3)).encode()
    frames = zstandard.ZstdCompressor().compress(lines[:20]) + zstandard.ZstdCompressor().compress(lines[20:])
    contents = {
        "a.txt": b"plain \xc3\xa9\r\n",
        "deep/b.txt.gz": gzip.compress(b"gz text"),
        "deep/c.txt.zst": zstandard.ZstdCompressor().compress(b"zst text"),
        "d.jsonl": lines + b"\n\n",
        "e.jsonl.gz": gzip.compress(lines),
        "f.jsonl.zst": frames,
    }
    for name, content in list(contents.items())[::order]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_files_of_every_kind_in_a_fixed_order(tmp_path):
    write_all(tmp_path)
    expected = [("a.txt", "plain é\r\n")]
    expected += [(f"d.jsonl:{number + 1}", f"line {number}\nü") for number in range(3)]
    expected += [("deep/b.txt.gz", "gz text"), ("deep/c.txt.zst", "zst text")]
    for name in ("e.jsonl.gz", "f.jsonl.zst"):
        expected += [(f"{name}:{number + 1}", f"line {number}\nü") for number in range(3)]
    assert texts(Files(glob=f"{tmp_path}/**/*.*")) == expected


def test_byte_order_mark_and_other_text_key(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"body": "x"}')
    assert texts(Files(glob=f"{tmp_path}/a.txt")) == [("a.txt", "abc")]
    assert texts(Files(glob=f"{tmp_path}/*.jsonl", text_key="body")) == [("b.jsonl:1", "x")]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 18])
def test_a_txt_does_not_depend_on_the_chunks_it_is_read_in(tmp_path, monkeypatch, chunk):
    text = "\ufeffé日🧑\n" * 100 + "\r\n" + "x" * 60 + "ü" * 60
    raw = b"\xef\xbb\xbf" + text.encode()  # one byte order mark goes, the next is text
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "c.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(raw))
    (tmp_path / "d.txt").write_bytes(b"")
    monkeypatch.setattr(sources, "_CHUNK_BYTES", chunk)
    source = Files(glob=f"{tmp_path}/*")
    assert [found for _, found in texts(source)] == [text, text, text, ""]
    expected = list(Document("whole", (text,)).pieces(50, after="\n"))
    *same, empty = [list(document.pieces(50, after="\n")) for document in documents(source)]
    assert same == [expected] * 3 and empty == []


def test_pieces_are_cut_after_the_last_mark_within_the_size():
    document = Document("a", ("ab\ncd", "", "\nefghijk\n", "l"))
    assert list(document.pieces(6, after="\n")) == ["ab\ncd\n", "efghij", "k\nl"]
    assert list(document.pieces(5, after="\n")) == ["ab\n", "cd\n", "efghi", "jk\nl"]
    assert list(document.pieces(5)) == ["ab\ncd", "\nefgh", "ijk\nl"]
    assert list(Document("a", ("abcd",)).pieces(2)) == ["ab", "cd"] and not list(Document("a", ("", "")).pieces(2))


def test_bad_utf8_is_placed_within_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 4)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabcdefgh\xe6\x97x")
    with pytest.raises(InputError, match="is not UTF-8: byte 11 cannot"):
        texts(Files(glob=f"{tmp_path}/a.txt"))
    (tmp_path / "b.txt").write_bytes(b"abcdef\xe6\x97")  # ends within a character
    with pytest.raises(InputError, match="is not UTF-8: byte 6 cannot"):
        texts(Files(glob=f"{tmp_path}/b.txt"))


def test_fingerprint_depends_on_names_and_contents_only(tmp_path):
    for place, order in (("one", 1), ("elsewhere/two", -1)):
        write_all(tmp_path / place, order)
    first = Files(glob=f"{tmp_path}/one/**/*.*")
    second = Files(glob=f"{tmp_path}/elsewhere/two/**/*.*", weight=3.0)
    assert fingerprint(first, tmp_path / "cache") == fingerprint(second, tmp_path / "cache")
    (tmp_path / "one/a.txt").write_text("plain e")
    changed = fingerprint(first, tmp_path / "cache")
    assert changed != fingerprint(second, tmp_path / "cache")
    (tmp_path / "one/a.txt").rename(tmp_path / "one/z.txt")
    assert fingerprint(first, tmp_path / "cache") != changed


def test_second_fingerprint_reads_no_file(tmp_path, monkeypatch):
    write_all(tmp_path / "text")
    source = Files(glob=f"{tmp_path}/text/**/*.*")
    first = fingerprint(source, tmp_path / "cache")
    monkeypatch.setattr(sources, "_sha256", lambda path: pytest.fail(f"{path} was read"))
    assert fingerprint(source, tmp_path / "cache") == first


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"x", "a.csv has an unknown extension; .txt and .jsonl are read"),
        ("a.txt", b"ab\xffc", "a.txt is not UTF-8: byte 2"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}\n', "a.jsonl:3 has no key 'text'; its keys are body"),
        ("a.jsonl", b'{"text": 5}', "a.jsonl:1: 'text' is no string but int"),
        ("a.jsonl", b"[1]", "a.jsonl:1 is not a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl:1 is not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: 'text' holds half a surrogate pair"),
        ("a.txt.gz", b"no gzip", "a.txt.gz cannot be read"),
        ("a.txt.gz", gzip.compress(b"abc" * 100, mtime=0)[:-12], "a.txt.gz cannot be read"),
        ("a.txt.zst", b"no zstd", "a.txt.zst cannot be read"),
        (
            "a.txt.zst",
            zstandard.ZstdCompressor().compress(os.urandom(1000).hex().encode())[:-5],
            "ends before its end-of-stream",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        texts(Files(glob=f"{tmp_path}/*"))
    assert message in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_glob_that_matches_nothing(tmp_path):
    for glob in (f"{tmp_path}/*.txt", "", str(tmp_path)):
        with pytest.raises(InputError, match="matches no file"):
            fingerprint(Files(glob=glob), tmp_path)


def test_a_large_jsonl_file_is_streamed(tmp_path):
    with open(tmp_path / "a.jsonl", "w") as file:
        file.writelines(json.dumps({"text": "x" * 1000}) + "\n" for _ in range(1000))
        file.write("broken")
    found = documents(Files(glob=f"{tmp_path}/a.jsonl"))
    for number in range(1, 1001):  # the error at the end is not met before
        assert next(found).name == f"a.jsonl:{number}"
    with pytest.raises(InputError, match="a.jsonl:1001 is not JSON"):
        next(found)


def test_embedded_corpus_is_the_standard_library(tmp_path):
    found = dict(texts(Embedded()))
    names = list(found)
    assert names == sorted(names) and len(names) > 500
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    assert sum(map(len, found.values())) > 10e6
    library = Path(sysconfig.get_path("stdlib"))
    assert found["argparse.py"].encode() == (library / "argparse.py").read_bytes()
    assert fingerprint(Embedded(), tmp_path) == fingerprint(Embedded(weight=2.0), tmp_path / "other")


def test_embedded_corpus_leaves_out_what_cannot_be_decoded(tmp_path, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/x.py").write_text("not ours")
    (tmp_path / "good.py").write_text("é = 1")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n\xe9")
    (tmp_path / "broken.py").write_bytes(b"\xe9")
    (tmp_path / "unknown.py").write_bytes(b"# -*- coding: no-such -*-\n")
    monkeypatch.setattr(sources, "_stdlib", lambda: tmp_path)
    assert [(name, text[-1]) for name, text in texts(Embedded())] == [("good.py", "1"), ("latin.py", "é")]


def test_tfds_documents(tiny):
    found = texts(TFDS(name="tiny", data_dir=str(tiny.data_dir_root)))
    assert sorted(text for _, text in found) == sorted(f"text number {number}: é" for number in range(30))
    assert [name for name, _ in found] == [f"tiny:{index}" for index in range(30)]
    for name in ("tiny:1.0.0", str(tiny.data_path)):
        assert found == texts(TFDS(name=name, data_dir=str(tiny.data_dir_root)))
    half = texts(TFDS(name="tiny", data_dir=str(tiny.data_dir_root), split="train[:50%]"))
    assert half == found[:15]


def test_tfds_fingerprint(tiny, tmp_path):
    place = {"name": "tiny", "data_dir": str(tiny.data_dir_root)}
    by_split = {split: fingerprint(TFDS(**place, split=split), tmp_path) for split in ("train", "test", "train[:50%]")}
    assert len(set(by_split.values())) == 3
    assert fingerprint(TFDS(name=str(tiny.data_path)), tmp_path) == by_split["train"]
    other = build_tiny(tmp_path / "other", suffix="longer")
    assert fingerprint(TFDS(name=str(other.data_path)), tmp_path) != by_split["train"]


def test_tfds_without_tensorflow(tiny):
    program = (
        "import sys; from jmoe.config import TFDS; from jmoe.data import sources;"
        f"found = list(sources.documents(TFDS(name={str(tiny.data_path)!r})));"
        "assert len(found) == 30 and 'tensorflow' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "no_such_dataset"}, "'no_such_dataset' is not found"),
        ({"name": "mnist"}, "'mnist' is not found"),
        ({"name": ""}, "'' is not found"),
        ({"data_dir": None, "name": "mnist"}, "is not found under the default TFDS directory"),
        ({"name": "tiny:2.0.0"}, "'tiny:2.0.0' is not found"),
        ({"split": "dev"}, "no split 'dev'; its splits are train, test"),
        ({"text_key": "body"}, "no feature 'body'; it has number, text"),
        ({"text_key": "number"}, "'number' is no text"),
    ],
)
def test_tfds_errors(tiny, tmp_path, change, message):
    source = TFDS(**{"name": "tiny", "data_dir": str(tiny.data_dir_root), **change})
    with pytest.raises(InputError) as error:
        list(documents(source))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_held_out_is_a_stable_share():
    names = [f"document {number}" for number in range(20000)]
    chosen = {name for name in names if held_out(name, 0.1)}
    assert 0.09 < len(chosen) / len(names) < 0.11
    assert chosen <= {name for name in names if held_out(name, 0.2)}
    assert not any(held_out(name, 0.0) for name in names)
    # A change of the rule would put text that models were trained on into their validation.
    assert [number for number in range(12) if held_out(f"{number}", 0.3)] == [2, 6]


def test_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "from-environment"))
    assert cache_directory(Data()) == tmp_path / "from-environment"
    assert cache_directory(Data(cache_dir=str(tmp_path / "x/y"))) == tmp_path / "x/y"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        cache_directory(Data(cache_dir=str(tmp_path / "file/inside")))
