"""Saving and restoring the state of a run: Orbax underneath, our own manifest on top.

Orbax writes a step into a temporary directory and renames it, so a step directory is never half written. It does not
notice flipped bits, emptied directories or a changed dtype, so after its commit we add two files: `items.json` with the
shape and dtype of every array, and, last, `manifest.json` with size and SHA-256 of every file, `items.json` included.
A step counts once its manifest stands.

    checkpoints/
      200/                 a step: one folder per item, items.json, manifest.json
      damaged-300/         did not match its manifest when a run was resumed; kept for the owner to look at
      unfinished-100/      had no manifest when a run was resumed, and no good step was there beside it

In a bucket (jmoe.storage) nothing can be renamed: Orbax writes under the step's own name, and what has no manifest does
not count either. The storage knows the MD5 of each object, so there the manifest has that, and nothing is read again.

The processes of several hosts share the directory: each calls every method and writes its arrays. The first alone looks
for damage, writes manifests, renames and removes; what it finds, and what fails on any, is told to all.
"""

import contextlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jmoe import storage
from jmoe.config import InputError
from jmoe.distributed import from_first, together
from jmoe.run_directory import write_json
from jmoe.threads import in_threads

MANIFEST = "manifest.json"
ITEMS = "items.json"
ORBAX_METADATA = "_CHECKPOINT_METADATA"
DAMAGED = "damaged-"
UNFINISHED = "unfinished-"
CHUNK = 1 << 26  # bytes
FILE = 1 << 27  # bytes of arrays in a file: several can be hashed at a time

log = logging.getLogger("jmoe")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or cannot be used, told in one line."""


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree under stable names such as `layers/0/attention/query`.

    The "/value" that an `nnx.Variable` adds to its path is dropped; a tree that is one leaf is named "value".
    Raises ValueError if two leaves would get the same name.
    """
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") or "value"
        if name in flat:
            raise ValueError(f"two leaves of the tree are named {name}")
        flat[name] = leaf
    return flat


def unflatten(flat: dict[str, Any], like: Any) -> Any:
    """A tree with the structure of `like` and the leaves of `flat`.

    The leaves of `like` may be abstract. Raises CheckpointError listing the names that are missing, left over, or of
    another shape or dtype.
    """
    expected = flatten(like)
    _compare(_describe(flat), _describe(expected), "the given leaves do not fit the tree")
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in expected])


def _describe(flat: dict[str, Any]) -> dict[str, str]:
    """float32[3,4] for an array, int, float or str for a plain value."""

    def kind(leaf):
        if hasattr(leaf, "dtype"):
            return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        return type(leaf).__name__

    return {name: kind(leaf) for name, leaf in flat.items()}


def _compare(found: dict[str, str], expected: dict[str, str], where: str) -> None:
    problems = [f"{name} ({kind}) is missing" for name, kind in expected.items() if name not in found]
    problems += [f"{name} ({kind}) is left over" for name, kind in found.items() if name not in expected]
    problems += [
        f"{name} is {found[name]}, expected {kind}"
        for name, kind in expected.items()
        if name in found and found[name] != kind
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{where}: {'; '.join(problems[:5])}{more}")


class Checkpoints:
    """The checkpoints of one run, in `directory`: the newest `keep`, and every multiple of `keep_every`."""

    def __init__(self, directory: storage.AnyPath, *, keep: int, keep_every: int | None = None):
        where = storage.location(directory)
        self.directory = where.absolute() if isinstance(where, Path) else where
        self._place = storage.of(where)
        self.keep = keep
        self.keep_every = keep_every
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    # ------------------------------------------------------------------------------------------------------- saving

    def save(self, step: int, items: dict[str, Any], *, metadata: dict[str, Any]) -> None:
        """Starts saving `items`, trees of arrays, ints, floats and strings by name, as the state after `step`.

        Returns once the arrays may be donated or overwritten; files, manifest and the removal of old steps follow in
        the background. `metadata` is JSON. A step that is already complete is left as it is: the state of a step is
        the same in every run of a configuration.

        Raises CheckpointError if the save before this one failed; this one is under way all the same.
        """
        failure = self._settle()
        if from_first(step in self._directories() and self._is_complete(step)):
            log.info("checkpoint of step %d is complete already", step)
        else:
            # Orbax copies arrays before it returns; on CPU its host view keeps a buffer from being donated instead.
            # It refuses an item without leaves, so such an item is not stored.
            flat = {name: leaves for name, tree in items.items() if (leaves := flatten(tree))}
            described = {name: _describe(leaves) for name, leaves in flat.items()}
            self._pending = self._writer.submit(self._finish, step, described, self._start(step, flat, metadata))
        with together(CheckpointError):
            if failure:
                raise failure

    def wait(self) -> None:
        """Waits for the save under way. Raises CheckpointError if it failed."""
        with together(CheckpointError):
            if failure := self._settle():
                raise failure

    def close(self) -> None:
        """Waits for the save under way and ends the background thread. Raises CheckpointError if the save failed on
        this process; it may be the only one to close."""
        try:
            if failure := self._settle():
                raise failure
        finally:
            self._writer.shutdown()

    def _settle(self) -> CheckpointError | None:
        pending, self._pending = self._pending, None
        failure = pending.exception() if pending else None
        if failure is None or isinstance(failure, CheckpointError):
            return failure
        raise failure

    def _start(self, step: int, flat: dict[str, dict[str, Any]], metadata: dict[str, Any]):
        """Hands the arrays to Orbax; returns its response, or the exception that kept it from starting."""
        try:
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._place.remove(self.directory / str(step))
            context = ocp.Context()
            context.array.saving.use_compression = False  # float weights hardly shrink, and a save takes twice as long
            context.array.saving.scoped_storage_options_creator = _in_chunks
            context.array.saving.ocdbt_target_data_file_size = FILE
            # Created in the background, an early failure leaves threads behind that wait minutes for the directory.
            context.asynchronous.create_directories_asynchronously = False
            with context:
                return ocp.save_checkpointables_async(str(self.directory / str(step)), flat, custom_metadata=metadata)
        except Exception as error:
            return error

    def _finish(self, step: int, described: dict[str, dict[str, str]], response: Any) -> None:
        path = self.directory / str(step)
        try:
            if isinstance(response, Exception):
                raise response
            response.result()
            if jax.process_index() == 0:
                seal(path, described, {})
        except Exception as error:
            if jax.process_index() == 0:
                with contextlib.suppress(OSError, InputError):  # what kept it from being written may do so again
                    self._place.remove(path)
                    self._place.remove_leftovers(self.directory)
            raise CheckpointError(f"saving step {step} to {path} failed: {_one_line(error)}") from error
        if jax.process_index() == 0:
            self._prune()

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep]:
            if not self.keep_every or step % self.keep_every:
                try:
                    self._place.remove(self.directory / str(step))
                except (OSError, InputError) as error:
                    log.warning("the checkpoint of step %d could not be removed: %s", step, error)

    # ---------------------------------------------------------------------------------------------------- restoring

    def steps(self) -> list[int]:
        """Steps whose save is complete, ascending."""
        return [step for step in self._directories() if self._is_complete(step)]

    def _is_complete(self, step: int) -> bool:
        return self._place.exists(self.directory / str(step) / MANIFEST)

    def restore(
        self, abstract_items: dict[str, Any], step: int | None = None, *, read_only: bool = False
    ) -> tuple[int, dict[str, Any]] | None:
        """The newest good checkpoint, or exactly that of `step`: (step, items), None if nothing was ever saved.

        `abstract_items` names the items wanted: trees of arrays or `jax.ShapeDtypeStruct`, whose shardings the
        restored arrays get (the default device's if they have none), and of plain values. Others are not read.

        A damaged newest step is reported and the one before it taken. On the way the directory is put in order:
        damaged steps are renamed, what an interrupted save left behind is removed. A step without a manifest is
        renamed too where no good one is there, as it may be the only one of a run. With `read_only`, for a reader
        beside a running training, nothing is touched.

        Raises CheckpointError if checkpoints exist but none is good, if `step` is given and is not there or damaged,
        or if the arrays stored differ in name, shape or dtype from those asked for.
        """
        found = self.find(abstract_items, step, read_only=read_only)
        if found is None:
            return None
        with together(CheckpointError), _told():
            loaded = self._load(found, abstract_items)
        return found, loaded

    def find(self, items: Collection[str], step: int | None = None, *, read_only: bool = False) -> int | None:
        """The step that `restore` would take, its files checked: the newest whose `items` are good, or `step`."""
        found = step
        with together(CheckpointError), _told():
            if jax.process_index() == 0:
                if step is None:
                    found = self._newest_good(items, read_only)
                elif reason := self._damage(step, items):
                    raise CheckpointError(
                        f"step {step} in {self.directory}: {reason}; complete steps are {self.steps()}"
                    )
        found = from_first(-1 if found is None else found)
        return None if found < 0 else found

    def _newest_good(self, items: Collection[str], read_only: bool) -> int | None:
        """The newest good step, None if nothing was ever saved; unless `read_only`, it puts the directory in order."""
        candidates = self._directories()
        unfinished = candidates.pop() if candidates and self._is_unfinished(candidates[-1]) else None
        if unfinished is not None:
            log.info("the save of step %d in %s was cut off before its end", unfinished, self.directory)
        good, damaged = None, {}
        for step in reversed(candidates):
            reason = self._damage(step, items)
            if not reason:
                good = step
                break
            log.warning("the checkpoint of step %d in %s is damaged: %s", step, self.directory, reason)
            damaged[step] = reason
        if damaged and good is None:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} is good, and no run starts over: {reasons}"
            )

        if not read_only:
            self._place.remove_leftovers(self.directory)
            if unfinished is not None and good is None:
                self._move_aside(unfinished, UNFINISHED)
            elif unfinished is not None:
                self._place.remove(self.directory / str(unfinished))
            for bad in damaged:
                self._move_aside(bad, DAMAGED)
        return good

    def metadata(self, step: int) -> dict[str, Any]:
        """What was given to `save` as `metadata`."""
        metadata = ocp.checkpointables_metadata(str(self.directory / str(step))).custom_metadata
        assert isinstance(metadata, dict)
        return metadata

    def _directories(self) -> list[int]:
        return sorted(int(name) for name in self._place.folders(self.directory) if name.isdecimal())

    def _is_unfinished(self, newest: int) -> bool:
        """Committed by Orbax, in a bucket perhaps not even that, and killed before the manifest stood. As one save ends
        before the next begins, only the newest step can be so; a manifest missing elsewhere, or on a file system along
        with what Orbax wrote, is damage."""
        path = self.directory / str(newest)
        committed = not self._place.renames or self._place.exists(path / ORBAX_METADATA)
        return committed and not self._is_complete(newest)

    def _damage(self, step: int, items: Collection[str]) -> str | None:
        """Why the files of `items` are not those that were saved; None if they are."""
        path = self.directory / str(step)
        if step not in self._directories():
            return "there is no such checkpoint"
        try:
            manifest = json.loads(self._place.read(path / MANIFEST))
            kind = manifest.get("digest", storage.Disk.digest)
            wanted = {
                name: entry
                for name, entry in manifest["files"].items()
                if "/" not in name or name.split("/")[0] in items
            }
            there = self._place.files(path)
            for name, (size, _) in wanted.items():
                if name not in there:
                    return f"{name} is missing"
                if there[name].size != size:
                    return f"{name} has {there[name].size} bytes, {size} were written"
            found = in_threads(lambda name: _digest(path, name, there[name], kind), wanted)
            for (name, (_, digest)), content in zip(wanted.items(), found, strict=True):
                if content != digest:
                    return f"{name} has other content than was written"
            if ITEMS not in manifest["files"]:
                return f"{MANIFEST} does not list {ITEMS}"
        except InputError:  # a bucket that cannot be reached is not a damaged one
            raise
        except FileNotFoundError as error:
            return f"{Path(error.filename or MANIFEST).name} is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{MANIFEST} cannot be used ({_one_line(error)})"
        return None

    def _load(self, step: int, abstract_items: dict[str, Any]) -> dict[str, Any]:
        path = self.directory / str(step)
        try:
            stored = json.loads(self._place.read(path / ITEMS))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is not there on this host; all hosts need one file system") from error
        wanted = {name: flatten(tree) for name, tree in abstract_items.items()}
        for name, leaves in wanted.items():
            _compare(stored.get(name, {}), _describe(leaves), f"{name} of step {step} in {self.directory}")
        abstract = {name: jax.tree.map(_abstract, leaves) for name, leaves in wanted.items() if leaves}
        loaded = ocp.load_checkpointables(str(path), abstract) if abstract else {}
        return {name: unflatten(loaded.get(name, {}), tree) for name, tree in abstract_items.items()}

    # ------------------------------------------------------------------------------------------------------- tidying

    def _move_aside(self, step: int, prefix: str) -> None:
        names = (f"{prefix}{step}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
        target = next(path for path in map(self.directory.joinpath, names) if not self._place.exists(path))
        self._place.move(self.directory / str(step), target)
        log.warning("the %s checkpoint of step %d is now %s", prefix.rstrip("-"), step, target)


def seal(path: storage.AnyPath, described: dict[str, dict[str, str]], entries: Mapping[Path, tuple[int, str]]) -> None:
    """Writes what makes a step that Orbax has written count: `items.json`, then the manifest.

    `described` has shape and dtype of each leaf of each item, such as "float32[3,4]"; `entries` the size and SHA-256 of
    files that are on the disk already.
    """
    write_json(path / ITEMS, described)
    write_json(path / MANIFEST, _manifest(path, entries))


def _in_chunks(key: Any, value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions | None:
    """Large arrays that are stacked over layers are stored layer by layer, so that a reader can take one at a time."""
    del key
    if not hasattr(value, "ndim") or value.ndim < 3 or value.nbytes <= CHUNK:
        return None
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK, shard_axes=(0,))


def _abstract(leaf: Any) -> Any:
    """What Orbax needs to know of a leaf in order to load it."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return leaf


def _manifest(path: storage.AnyPath, entries: Mapping[Path, tuple[int, str]]) -> dict[str, Any]:
    """Size and digest of every file below `path`, each flushed to the disk on the way unless `entries` has it."""
    place = storage.of(path)
    files = place.files(path)
    for folder in {path / parent for name in files for parent in PurePosixPath(name).parents}:
        place.sync(folder)

    def entry(name: str) -> tuple[int, str]:
        file = path / name
        if isinstance(file, Path) and file in entries:
            return entries[file]
        place.sync(file)
        return files[name].size, _digest(path, name, files[name], place.digest)

    kind = {} if place.digest == storage.Disk.digest else {"digest": place.digest}
    return kind | {"files": dict(zip(files, in_threads(entry, files), strict=True))}


def _digest(path: storage.AnyPath, name: str, file: storage.File, kind: str) -> str:
    """The digest of a file: as the storage knows it, or of what is in it."""
    place = storage.of(path)
    return file.digest if file.digest and kind == place.digest else place.hash(path / name, kind)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Makes a CheckpointError of what `jmoe.storage` tells of a bucket that cannot be used."""
    try:
        yield
    except InputError as error:
        raise CheckpointError(str(error)) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
