"""Packed records become batches: a pure function of (seed, step).

Row i of the stream is found from i alone: the mixture says which source it comes from and its place there, and a
shuffle that is new in every epoch turns the place into a record. To resume is to start at a later index, and neither
hosts nor reading threads can change what a batch holds.
"""

import threading
import zlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from jmoe.batch import Batch
from jmoe.config import InputError, require
from jmoe.data.prepare import Prepared, record_dtype

_ENDLESS = 1 << 50  # rows; more, and grain, which computes lengths in float64, loses count


def train_batches(
    prepared: Sequence[Prepared],
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    start_step: int = 0,
    workers: int = 1,
    host: int = 0,
    hosts: int = 1,
) -> Generator[Batch, None, None]:
    """The endless stream of training batches from `start_step` on, numpy arrays [batch_size / hosts, seq_len].

    Host h gets rows h * B/H to (h + 1) * B/H of each global batch, so the batches of all hosts, one after another,
    are the same for any number of hosts. `workers` threads read ahead. Closing the iterator ends them. Raises
    InputError where the batch cannot be divided among the hosts, or a record is damaged.
    """
    _check(prepared, batch_size, seq_len, hosts)
    seeds = [int(np.random.SeedSequence([seed, index]).generate_state(1)[0]) for index in range(len(prepared))]
    shuffled = [
        _rows(source).shuffle(seed=own).repeat(_ENDLESS // source.records + 1)
        for source, own in zip(prepared, seeds, strict=True)
    ]
    rows = grain.MapDataset.mix(shuffled, [source.weight for source in prepared])
    batches = rows.batch(batch_size // hosts, batch_fn=_stack)[start_step * hosts + host :: hosts]
    return _read_ahead(batches, workers)


def validation_batches(
    prepared: Sequence[Prepared],
    *,
    batch_size: int,
    seq_len: int,
    host: int = 0,
    hosts: int = 1,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Batches that hold each record once, the last one filled up with padding; at most `limit` batches.

    The order is one fixed shuffle over all sources, so that the first batches are a fair sample of the whole. Rows
    are divided among hosts and errors raised as in `train_batches`.
    """
    _check(prepared, batch_size, seq_len, hosts)
    rows = grain.MapDataset.concatenate([_rows(source) for source in prepared]).shuffle(seed=0)
    share = batch_size // hosts
    padding = np.zeros((), record_dtype(seq_len, prepared[0].vocab_size))
    steps = -(-len(rows) // batch_size)
    for step in range(steps if limit is None else min(steps, limit)):
        first = step * batch_size + host * share
        yield _stack([rows[index] if index < len(rows) else padding for index in range(first, first + share)])


def _check(prepared: Sequence[Prepared], batch_size: int, seq_len: int, hosts: int) -> None:
    require(batch_size % hosts == 0, f"batch_size = {batch_size} is not divisible by the number of hosts = {hosts}")
    for source in prepared:
        require(source.seq_len == seq_len, f"{source.directory} holds rows of {source.seq_len} tokens, not {seq_len}")


def _rows(source: Prepared) -> grain.MapDataset:
    return grain.MapDataset.source(Records(source))


def _read_ahead(batches: grain.MapDataset, workers: int) -> Generator[Batch, None, None]:
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    iterator = iter(batches.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def _stack(rows: Sequence[Any]) -> Batch:
    """Records of S + 1 places become inputs and, shifted by one, targets."""
    tokens = np.stack([row["tokens"] for row in rows]).astype(np.int32)
    segments = np.stack([row["segment_ids"] for row in rows]).astype(np.int32)
    inside = segments[:, :-1]
    places = np.arange(inside.shape[1], dtype=np.int32)
    begins = np.diff(inside, axis=1, prepend=-1) != 0
    loss_mask = (inside != 0) & (inside == segments[:, 1:])
    return Batch(
        tokens=np.ascontiguousarray(tokens[:, :-1]),
        targets=np.where(loss_mask, tokens[:, 1:], 0),
        segment_ids=np.ascontiguousarray(inside),
        positions=np.where(inside != 0, places - np.maximum.accumulate(np.where(begins, places, 0), axis=1), 0),
        loss_mask=loss_mask,
    )


class Records:
    """Random access to the records of a prepared source, checked on every read. Safe to share among threads."""

    def __init__(self, prepared: Prepared):
        self._prepared = prepared
        self._dtype = record_dtype(prepared.seq_len, prepared.vocab_size)
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._prepared.records

    def __getitem__(self, index: int) -> np.ndarray:
        """Record `index`, shape () and dtype `record_dtype`. Raises InputError if it is damaged."""
        number, place = divmod(index, self._prepared.records_per_file)
        try:
            content = self._reader(number).read([place])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._damaged(number, place, str(error).split(";")[0]) from None
        if len(content) != self._dtype.itemsize:
            raise self._damaged(number, place, f"{len(content)} bytes where {self._dtype.itemsize} are due")
        record = np.frombuffer(content, self._dtype).reshape(())
        if record["crc"] != zlib.crc32(content[:-4]):
            raise self._damaged(number, place, "its checksum does not match")
        return record

    def _reader(self, number: int) -> ArrayRecordReader:
        with self._lock:
            if number not in self._readers:
                path = str(self._prepared.file(number))
                self._readers[number] = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
            return self._readers[number]

    def _damaged(self, number: int, place: int, why: str) -> InputError:
        prepared = self._prepared
        return InputError(
            f"{prepared.file(number)}: record {place} is damaged ({why}); "
            f"delete {prepared.directory} and the next run prepares it anew"
        )
