"""Several processes that train one model, one on each host: how they meet, agree, and end.

Every process runs the same script on the same config, and enters the same programs of the devices in the same order.
Each loads its share of a batch (`jmoe.sharding.host_share`); the first alone writes logs, and prints. If one is lost,
JAX ends the others.
"""

import contextlib
import importlib.util
import json
import logging
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jmoe.config import InputError, require

MESSAGE_BYTES = 1024
"""An error is told to other processes in at most so many."""

log = logging.getLogger("jmoe")


@dataclass(frozen=True)
class Distributed:
    """Where the processes of a run meet. Hosts of a TPU slice find one another without any of this."""

    coordinator: str | None = None
    """HOST:PORT at which the first process is reached by all; auto for Slurm, Open MPI or Kubernetes, which know it and
    the two numbers below [address]"""
    processes: int | None = None
    """processes in all [count]"""
    process: int | None = None
    """which of them this is, from 0 [index]"""
    timeout: int = 60
    """a process that has given no sign of life for so long is lost, and the others end [seconds]"""

    def __post_init__(self):
        require(self.timeout >= 1, f"distributed.timeout is {self.timeout}; it must be at least 1")
        if self.coordinator in (None, "auto"):
            given = self.processes is not None or self.process is not None
            require(not given, "distributed.processes and distributed.process need distributed.coordinator HOST:PORT")
            return
        _, colon, port = self.coordinator.rpartition(":")
        require(
            bool(colon) and port.isdecimal(),
            f"distributed.coordinator is {self.coordinator!r}; it must be HOST:PORT or auto",
        )
        require(
            self.processes is not None and self.process is not None and 0 <= self.process < self.processes,
            f"distributed.process = {self.process} of distributed.processes = {self.processes}: give both, and the "
            "first process the number 0",
        )


def start(options: Distributed) -> None:
    """Joins this process to the others of its run, if there are any; before JAX is used for anything else.

    From then on only the first process prints, and logs less than errors.
    Raises InputError where `auto` finds nothing to ask.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would catch the SIGTERM that train.py waits for
    initialize = partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=options.timeout,
        shutdown_timeout_seconds=options.timeout,
    )
    if options.coordinator == "auto":
        try:
            initialize()
        except ValueError as error:
            raise InputError(f"distributed.coordinator = auto: {error} Give HOST:PORT") from error
    elif options.coordinator is not None:
        initialize(options.coordinator, options.processes, options.process, cluster_detection_method="deactivate")
    elif _has_tpu():
        try:
            initialize()
        except (ValueError, OSError) as error:  # outside of Google Cloud nobody knows of other hosts
            log.warning("this TPU host trains alone: %s", error)
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        log.setLevel(logging.ERROR)


def _has_tpu() -> bool:
    """Whether JAX is going to use a TPU of this machine; JAX itself cannot be asked before it has been started."""
    wanted = "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu")
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return wanted and bool(chips) and importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def together(kind: type[Exception]) -> Iterator[None]:
    """Around what each process does by itself: an error of this kind on one is raised on all, once all are done.

    Every process has to come here; the device programs that tell of the errors are entered by all or none.
    """
    failure = None
    try:
        yield
    except kind as error:
        failure = error
    if jax.process_count() > 1:
        text = b"" if failure is None else (str(failure) or kind.__name__).encode()[:MESSAGE_BYTES]
        told = multihost_utils.process_allgather(np.frombuffer(text.ljust(MESSAGE_BYTES, b"\0"), np.uint8))
        for process, row in enumerate(np.asarray(told)):
            message = row.tobytes().rstrip(b"\0").decode(errors="ignore")
            if message and failure is None:
                failure = kind(f"process {process}: {message}")
    if failure is not None:
        raise failure


def from_first(number: int) -> int:
    """The `number` that the first process gives, an int32, on all."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def check_same(name: str, value: Any) -> None:
    """Raises InputError on all processes if `value`, which is JSON, is on any of them not what it is on the first."""
    checksum = zlib.crc32(json.dumps(value, sort_keys=True).encode()) >> 1
    of_first = from_first(checksum)
    with together(InputError):
        require(checksum == of_first, f"{name} are not the same here as on process 0")


class AnyProcess:
    """Whether the flag of any process is up: called by all of them once a step, it answers all alike.

    Among several processes it answers of the call before. By then the devices have added up those flags, behind the
    step that was under way, and nothing waits for them.
    """

    def __init__(self):
        self._before: jax.Array | None = None
        mesh = jax.sharding.Mesh(np.array(jax.devices()), "all")
        self._of_devices = NamedSharding(mesh, PartitionSpec("all"))
        self._any = jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, flag: bool) -> bool:
        if jax.process_count() == 1:
            return flag
        flags = np.full(jax.local_device_count(), flag)
        answer, self._before = self._before, self._any(jax.make_array_from_process_local_data(self._of_devices, flags))
        return answer is not None and bool(answer)
