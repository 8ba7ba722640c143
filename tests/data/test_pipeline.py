import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jmoe.config import Data, Files, InputError
from jmoe.data import prepare as prepare_module
from jmoe.data.pipeline import Records, train_batches, validation_batches
from jmoe.data.prepare import prepare
from jmoe.data.tokenizer import byte_tokenizer

SEQ = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder and three sources in it whose texts are digits, lower and upper case, of different sizes."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    sources = []
    for name, letters, count, weight in (
        ("a", "0123456789", 30, 1.0),
        ("b", "abcdefgh", 60, 3.0),
        ("c", "XYZ", 9, 0.5),
    ):
        for number in range(count):
            text = "".join(rng.choice(list(letters), rng.integers(5, 200)))
            (folder / f"{name}{number:02d}.txt").write_text(text)
        sources.append(Files(glob=f"{folder}/{name}*.txt", weight=weight))
    return folder, tuple(sources)


@pytest.fixture(scope="module")
def prepared(corpus):
    folder, sources = corpus
    data = Data(sources=sources, seq_len=SEQ, cache_dir=str(folder / "cache"), validation_fraction=0.1)
    return prepare(data, byte_tokenizer(), "train")


def take(batches, count):
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def same(first, second):
    return len(first) == len(second) and all(
        np.array_equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    )


def rows_of(batches):
    return [row.tobytes() for batch in batches for row in batch.tokens]


def test_a_batch_is_what_its_fields_say(prepared):
    for batch in take(train_batches(prepared, batch_size=8, seq_len=SEQ, seed=0), 20):
        for field in batch:
            assert field.shape == (8, SEQ) and field.flags.c_contiguous
            assert field.dtype == (bool if field is batch.loss_mask else np.int32)
        for tokens, targets, segments, positions, mask in zip(*batch, strict=True):
            assert segments[0] == 1
            for place in range(SEQ):
                if segments[place] == 0:
                    assert tokens[place] == targets[place] == positions[place] == 0 and not mask[place]
                elif place == 0 or segments[place] != segments[place - 1]:
                    assert positions[place] == 0
                else:
                    assert positions[place] == positions[place - 1] + 1
                if place + 1 < SEQ:
                    assert mask[place] == (segments[place] == segments[place + 1] != 0)
                    assert targets[place] == (tokens[place + 1] if mask[place] else 0)
                if mask[place]:  # a document ends with eos, after which nothing is predicted
                    assert tokens[place] != 256 or positions[place] == 0


def test_no_target_crosses_documents(prepared, corpus):
    """A segment's first token and its targets, read on, stand in one document."""
    end = chr(256)
    documents = "|".join(f"{end}{path.read_text()}{end}" for path in corpus[0].glob("*.txt"))
    segments = 0
    for batch in take(train_batches(prepared, batch_size=8, seq_len=SEQ, seed=0), 20):
        for row in zip(*batch, strict=True):
            tokens, targets, numbers, _, mask = row
            for number in range(1, numbers.max() + 1):
                inside = numbers == number
                read = "".join(map(chr, [tokens[inside][0], *targets[inside & mask]]))
                assert read in documents, row
                segments += 1
    assert segments > 180  # rows with more than one document are among them


def test_one_pass_has_every_target_once(prepared):
    for source in prepared:
        batches = take(train_batches([source], batch_size=1, seq_len=SEQ, seed=3), source.records)
        assert len(set(rows_of(batches))) > 0.9 * source.records
        assert sum(int(batch.loss_mask.sum()) for batch in batches) == source.targets


def test_any_number_of_workers_gives_the_same(prepared):
    arguments = {"batch_size": 4, "seq_len": SEQ, "seed": 1}
    one = take(train_batches(prepared, **arguments, workers=1), 50)
    assert same(one, take(train_batches(prepared, **arguments, workers=4), 50))


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_gives_the_same(prepared, hosts):
    arguments = {"batch_size": 8, "seq_len": SEQ, "seed": 1, "start_step": 3}
    whole = take(train_batches(prepared, **arguments), 10)
    parts = [take(train_batches(prepared, **arguments, host=host, hosts=hosts), 10) for host in range(hosts)]
    joined = [
        type(whole[0])(*(np.concatenate(fields) for fields in zip(*step, strict=True)))
        for step in zip(*parts, strict=True)
    ]
    assert parts[0][0].tokens.shape == (8 // hosts, SEQ) and same(whole, joined)


def test_start_step_goes_on_where_it_was(prepared):
    arguments = {"batch_size": 4, "seq_len": SEQ, "seed": 1}
    whole = take(train_batches(prepared, **arguments), 40)
    for start in (1, 17, 39):
        assert same(whole[start:], take(train_batches(prepared, **arguments, start_step=start), 40 - start))


def test_a_far_step_is_reached_at_once(prepared):
    start = time.monotonic()
    (batch,) = take(train_batches(prepared, batch_size=8, seq_len=SEQ, seed=1, start_step=10**12), 1)
    assert batch.loss_mask.any() and time.monotonic() - start < 2


def test_seeds_and_epochs_have_orders_of_their_own(prepared):
    (source, *_) = prepared
    count = source.records
    two = rows_of(take(train_batches([source], batch_size=1, seq_len=SEQ, seed=5), 2 * count))
    assert sorted(two[:count]) == sorted(two[count:]) and two[:count] != two[count:]
    other = rows_of(take(train_batches([source], batch_size=1, seq_len=SEQ, seed=6), 2 * count))
    # the next seed's first epoch must not be this seed's second, which is how a counted-up seed would go
    assert other[:count] not in (two[:count], two[count:])


def test_mixture_follows_the_weights(prepared):
    batches = take(train_batches(prepared, batch_size=9, seq_len=SEQ, seed=0), 100)
    tokens = np.concatenate([batch.tokens for batch in batches])
    kinds = [((tokens >= ord(first)) & (tokens <= ord(last))).any(1) for first, last in ("09", "ah", "XZ")]
    assert (np.sum(kinds, axis=0) == 1).all()
    shares = [kind.mean() for kind in kinds]
    np.testing.assert_allclose(shares, np.array([1.0, 3.0, 0.5]) / 4.5, atol=0.005)
    for batch in range(0, 900, 90):  # and evenly: any 90 rows in a row have them
        np.testing.assert_allclose([kind[batch : batch + 90].sum() for kind in kinds], [20, 60, 10], atol=1)


def test_validation_has_each_record_once(prepared):
    stored = []
    for source in prepared:
        records = Records(source)
        stored += [records[index]["tokens"][:-1].astype(np.int32).tobytes() for index in range(len(records))]
    batches = list(validation_batches(prepared, batch_size=8, seq_len=SEQ))
    real = len(stored)
    assert len(batches) == -(-real // 8) and all(batch.tokens.shape == (8, SEQ) for batch in batches)
    assert sorted(rows_of(batches)[:real]) == sorted(stored)
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == sum(source.targets for source in prepared)
    for field in batches[-1]:
        assert not field[8 - (len(batches) * 8 - real) :].any()


def test_validation_limit_and_hosts(prepared):
    whole = list(validation_batches(prepared, batch_size=8, seq_len=SEQ))
    assert same(whole[:3], list(validation_batches(prepared, batch_size=8, seq_len=SEQ, limit=3)))
    assert len(list(validation_batches(prepared, batch_size=8, seq_len=SEQ, limit=10**6))) == len(whole)
    parts = [list(validation_batches(prepared, batch_size=8, seq_len=SEQ, host=host, hosts=2)) for host in range(2)]
    joined = [type(a)(*map(np.concatenate, zip(a, b, strict=True))) for a, b in zip(*parts, strict=True)]
    assert same(whole, joined)
    some = np.concatenate([batch.tokens for batch in whole[:6]])
    assert all(((some >= ord(first)) & (some <= ord(last))).any() for first, last in ("09", "ah", "XZ"))


def test_bad_requests(prepared):
    with pytest.raises(InputError, match="batch_size = 6 is not divisible by the number of hosts = 4"):
        train_batches(prepared, batch_size=6, seq_len=SEQ, seed=0, hosts=4)
    with pytest.raises(InputError, match="holds rows of 16 tokens, not 17"):
        train_batches(prepared, batch_size=6, seq_len=17, seed=0)


def test_reading_threads_end(prepared):
    def readers():
        return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]

    before = len(readers())
    batches = train_batches(prepared, batch_size=4, seq_len=SEQ, seed=0, workers=4)
    next(batches)
    assert len(readers()) > before
    batches.close()
    deadline = time.monotonic() + 5
    while len(readers()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(readers()) == before


@pytest.fixture
def small(tmp_path, monkeypatch):
    """One source in files of 8 records."""
    monkeypatch.setattr(prepare_module, "RECORDS_PER_FILE", 8)
    (tmp_path / "a.txt").write_text("0123456789" * 40)
    (tmp_path / "v.jsonl").write_text('{"text": "v"}')
    data = Data(
        sources=(Files(glob=f"{tmp_path}/a.txt"),),
        validation=(Files(glob=f"{tmp_path}/v.jsonl"),),
        seq_len=SEQ,
        cache_dir=str(tmp_path / "cache"),
    )
    (source,) = prepare(data, byte_tokenizer(), "train")
    return source


def rewrite(source, number, change):
    """Writes record file `number` anew, with `change` applied to its list of records."""
    records = Records(source)
    first = number * source.records_per_file
    contents = [records[index].tobytes() for index in range(first, min(first + 8, source.records))]
    change(contents)
    writer = ArrayRecordWriter(str(source.file(number)), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()


def flip(contents):
    contents[5] = bytes([contents[5][0] ^ 1]) + contents[5][1:]


def shorten(contents):
    contents[5] = contents[5][:-1]


@pytest.mark.parametrize("change, why", [(flip, "its checksum does not match"), (shorten, "bytes where 72 are due")])
def test_damaged_record_is_named(small, change, why):
    rewrite(small, 1, change)
    for batches in (
        train_batches([small], batch_size=2, seq_len=SEQ, seed=0, workers=2),
        validation_batches([small], batch_size=2, seq_len=SEQ),
    ):
        with pytest.raises(InputError) as error:
            take(batches, small.records)
        message = str(error.value)
        assert message.startswith(f"{small.file(1)}: record 5 is damaged") and why in message
        assert f"delete {small.directory}" in message and "\n" not in message
    assert Records(small)[12]["tokens"].size == SEQ + 1  # its neighbours are whole


def test_damaged_file_is_named(small):
    content = bytearray(small.file(0).read_bytes())
    content[100] ^= 1
    small.file(0).write_bytes(content)
    with pytest.raises(InputError, match=r"00000\.array_record: record 0 is damaged"):
        Records(small)[0]
    small.file(1).write_bytes(small.file(1).read_bytes()[:1000])
    with pytest.raises(InputError, match=r"00001\.array_record: record 2 is damaged"):
        Records(small)[10]
    small.file(0).unlink()
    with pytest.raises(InputError, match=r"00000\.array_record: record 3 is damaged"):
        Records(small)[3]


def test_weights_of_one_source_do_not_matter(small):
    heavy = dataclasses.replace(small, weight=9.0)
    first = take(train_batches([small], batch_size=4, seq_len=SEQ, seed=0), 5)
    assert same(first, take(train_batches([heavy], batch_size=4, seq_len=SEQ, seed=0), 5))
    # beside another source they do
    even = take(train_batches([small, small], batch_size=4, seq_len=SEQ, seed=0), 5)
    assert not same(even, take(train_batches([small, heavy], batch_size=4, seq_len=SEQ, seed=0), 5))


def test_a_single_record(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    source = Files(glob=f"{tmp_path}/a.txt")
    data = Data(sources=(source,), validation=(source,), seq_len=SEQ, cache_dir=str(tmp_path / "cache"))
    prepared = prepare(data, byte_tokenizer(), "validation")
    (batch,) = validation_batches(prepared, batch_size=2, seq_len=SEQ)
    assert batch.tokens[0, :5].tolist() == [256, 97, 98, 99, 256] and batch.loss_mask.sum(1).tolist() == [4, 0]
    (batch,) = take(train_batches(prepared, batch_size=3, seq_len=SEQ, seed=0), 1)
    assert batch.loss_mask.sum(1).tolist() == [4, 4, 4]
