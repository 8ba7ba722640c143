import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from jmoe.config import BPE, Bytes, Data, Embedded, Files, InputError, TokenizerFile
from jmoe.data import sources
from jmoe.data import tokenizer as tokenizer_module
from jmoe.data.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, load, sample_texts, train_bpe

TEXTS = [
    "",
    " leading and trailing \n\n",
    "tabs\tand\r\nlines",
    "naïve café — 日本語 🧑‍🚀 \U0010ffff \x00 \x7f",
    f"{END_OF_TEXT} in the <|endoftext|><|endoftext|> text",
    "".join(map(chr, range(0x20, 0x250))),
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(["the cat sat on the mat\n" * 20, "def f(x):\n    return x\n" * 20], 300)


def unicode_text(rng, length):
    points = rng.integers(0, 0x110000, length)
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def test_bytes_are_bytes():
    tokenizer = byte_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos) == (257, 256)
    for text in [*TEXTS, unicode_text(np.random.default_rng(0), 3000)]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
        assert tokenizer.decode(ids) == text


def test_bpe_round_trip(bpe):
    assert bpe.vocab_size == 283 and bpe.eos == 0
    assert len(bpe.encode("the cat sat")) < len("the cat sat")
    for text in [*TEXTS, unicode_text(np.random.default_rng(1), 3000)]:
        ids = bpe.encode(text)
        assert bpe.decode(ids) == text
        assert bpe.eos not in ids and ids.size <= len(text.encode())


def test_batch_is_each_text_alone(bpe):
    for tokenizer in (byte_tokenizer(), bpe):
        batch = tokenizer.encode_batch(TEXTS)
        assert [row.tolist() for row in batch] == [tokenizer.encode(text).tolist() for text in TEXTS]


def test_decode_skips_specials_and_replaces_bad_bytes():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode([256, 0x61, 256, 0xFF, 0x62, 256]) == "a\ufffdb"
    assert tokenizer.decode(np.array([0x61, 300, 0x62], np.int32)) == "ab"


def test_save_and_read_back(bpe, tmp_path):
    for tokenizer in (byte_tokenizer(), bpe):
        tokenizer.save(tmp_path / "new" / "tok.json")
        again = Tokenizer.from_file(tmp_path / "new" / "tok.json")
        assert (again.eos, again.vocab_size, again.fingerprint) == (
            tokenizer.eos,
            tokenizer.vocab_size,
            tokenizer.fingerprint,
        )
        assert [row.tolist() for row in again.encode_batch(TEXTS)] == [
            row.tolist() for row in tokenizer.encode_batch(TEXTS)
        ]


def unigram():
    """As sentencepiece files are converted: the special tokens are pieces of the model, too, and it normalises."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -2.0), *((chr(code), -5.0) for code in range(0x21, 0x7F))]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


def word_level():
    """A vocabulary of words in which a special token is a word; lower case; truncation, padding and a template."""
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[sep]", "a", "b", "[", "sep", "]", "[s", "ep]"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[UNK]", AddedToken("[sep]", normalized=True)])
    backend.post_processor = processors.TemplateProcessing(single="$A [sep]", special_tokens=[("[sep]", 1)])
    backend.enable_truncation(4)
    backend.enable_padding(length=6)
    return backend


def bpe_whose_eos_is_no_special_token():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=256, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([""], trainer)
    backend.add_tokens([AddedToken("<eos>", special=False), AddedToken("<tool>", special=False)])
    return backend


@pytest.mark.parametrize(
    "backend, eos, text",
    [
        (unigram(), "</s>", "a </s> b</s></s>\uff1c/s\uff1e <<//s>/s> </s</s>>"),
        (word_level(), "[sep]", "a [sep] b [SEP] [Sep] a"),
        (bpe_whose_eos_is_no_special_token(), "<eos>", "a <eos> b<eos><eos> <<eos>eos>"),
    ],
)
def test_special_tokens_cannot_be_injected(tmp_path, backend, eos, text):
    backend.save(str(tmp_path / "tok.json"))
    plain = backend.encode(text, add_special_tokens=False)
    assert backend.token_to_id(eos) in plain.ids  # the library alone lets the text through
    tokenizer = Tokenizer.from_file(tmp_path / "tok.json", eos)
    ids = tokenizer.encode(text)
    assert tokenizer.eos == backend.token_to_id(eos) and tokenizer.eos not in ids
    assert tokenizer.encode_batch(["a", text])[1].tolist() == ids.tolist()
    assert ids.size > 0 and tokenizer.encode(eos * 500).max() < tokenizer.vocab_size


def test_cut_tokens_keep_the_text(tmp_path):
    backend = bpe_whose_eos_is_no_special_token()
    backend.save(str(tmp_path / "tok.json"))
    tokenizer = Tokenizer.from_file(tmp_path / "tok.json", "<eos>")
    text = "x<eos>é<eos><eos>y <tool>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert backend.token_to_id("<tool>") in tokenizer.encode(text)  # the file does not call this one special


def test_truncation_padding_and_templates_are_not_applied(tmp_path):
    word_level().save(str(tmp_path / "tok.json"))
    tokenizer = Tokenizer.from_file(tmp_path / "tok.json", "[sep]")
    assert tokenizer.encode("a b a b a b a b").tolist() == [2, 3] * 4
    assert tokenizer.encode("a").tolist() == [2]
    assert tokenizer.encode("what").tolist() == [0]  # unknown words stay the unknown token


def test_eos_is_found_or_asked_for(tmp_path):
    unigram().save(str(tmp_path / "tok.json"))
    assert Tokenizer.from_file(tmp_path / "tok.json").eos == 1
    with pytest.raises(InputError, match=r"has no token '<nope>'; data.tokenizer.eos"):
        Tokenizer.from_file(tmp_path / "tok.json", "<nope>")
    word_level().save(str(tmp_path / "words.json"))
    with pytest.raises(InputError, match="none of the usual end-of-text tokens"):
        Tokenizer.from_file(tmp_path / "words.json")


def test_files_that_are_no_tokenizer(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    dropout = json.loads(bpe_whose_eos_is_no_special_token().to_str())
    dropout["model"]["dropout"] = 0.1
    (tmp_path / "dropout.json").write_text(json.dumps(dropout))
    for name, message in (
        ("bad.json", "is no tokenizer.json"),
        ("no.json", "cannot be read"),
        ("dropout.json", "dropout"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load(Data(tokenizer=TokenizerFile(str(tmp_path / name))))
        assert name in str(error.value) and "\n" not in str(error.value)


def corpus(folder, count=60):
    for number in range(count):
        (folder / f"{number:03d}.txt").write_text(f"document {number} " + "the same words again and again\n" * 50)
    return Files(glob=f"{folder}/*.txt")


def test_sample_is_a_spread_within_the_budget(tmp_path):
    source = corpus(tmp_path)
    names = {"".join(document.text): document.name for document in sources.documents(source)}
    everything = list(sample_texts([source], 0.0, 16.0))
    assert sorted(everything) == sorted(names)
    some = [names[text] for text in sample_texts([source], 0.0, 0.02)]
    assert 5 <= len(some) <= 13  # documents of about 1.6 kB
    assert min(some) < "020" and max(some) > "040.txt"
    kept = [names[text] for text in sample_texts([source], 0.3, 16.0)]
    assert 0 < len(kept) < 60 and not any(sources.held_out(name, 0.3) for name in kept)


def test_sample_takes_parts_of_a_long_document(tmp_path):
    text = "".join(f"line {number}\n" for number in range(20000))
    (tmp_path / "a.txt").write_text(text)
    pieces = [text[start : start + (1 << 16)] for start in range(0, len(text), 1 << 16)]
    found = list(sample_texts([Files(glob=f"{tmp_path}/a.txt")], 0.0, 16.0))
    assert len(pieces) == 4 and found != pieces and sorted(found) == sorted(pieces)
    assert list(sample_texts([Files(glob=f"{tmp_path}/a.txt")], 0.0, 0.14)) == found[-2:]


def test_bpe_is_trained_once_on_training_documents(tmp_path, monkeypatch):
    data = Data(
        sources=(corpus(tmp_path),), tokenizer=BPE(280), cache_dir=str(tmp_path / "cache"), validation_fraction=0.3
    )
    trained_on = []
    train = tokenizer_module.train_bpe

    def spy(texts, vocab_size):
        trained_on.append(list(texts))
        return train(trained_on[-1], vocab_size)

    monkeypatch.setattr(tokenizer_module, "train_bpe", spy)
    first, second = load(data), load(data)
    assert first.fingerprint == second.fingerprint and len(trained_on) == 1
    held_out = ["".join(d.text) for d in sources.documents(data.sources[0]) if sources.held_out(d.name, 0.3)]
    assert held_out and not set(held_out) & set(trained_on[0])
    (tmp_path / "000.txt").write_text("a change")
    load(data)
    assert len(trained_on) == 2


def test_load_bytes():
    assert load(Data(tokenizer=Bytes(), sources=(Embedded(),))).fingerprint == byte_tokenizer().fingerprint


def run_cli(*arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, "-m", "jmoe.data.tokenizer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_cli_is_deterministic(tmp_path):
    corpus(tmp_path, 20)
    (tmp_path / "mixed.txt").write_text(" ".join(f"w{number % 97}x{number % 13}" for number in range(3000)))
    outputs = []
    for seed, threads in (("1", "1"), ("2", "2")):
        output = tmp_path / f"tok{seed}.json"
        arguments = ("train", "--vocab-size", 400, "--output", output, "--files", f"{tmp_path}/*.txt")
        result = run_cli(*arguments, PYTHONHASHSEED=seed, RAYON_NUM_THREADS=threads)
        assert result.returncode == 0, result.stderr
        assert "bytes/token" in result.stdout and "documents" in result.stderr
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1]
    assert 300 < Tokenizer.from_file(tmp_path / "tok1.json").vocab_size <= 400


def test_cli_bad_input(tmp_path):
    result = run_cli("train", "--vocab-size", 300, "--output", tmp_path / "t.json", "--files", f"{tmp_path}/*.txt")
    assert result.returncode == 2
    assert result.stderr.startswith("error: data: the glob") and result.stderr.count("\n") == 1
