"""Tests run on eight emulated CPU devices unless JMOE_TEST_PLATFORM names another platform (cuda, tpu)."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

PLATFORM = os.environ.get("JMOE_TEST_PLATFORM", "cpu")
DEVICES = 8

# Before JAX is imported: it reads these once.
os.environ["JAX_PLATFORMS"] = PLATFORM
if PLATFORM == "cpu":
    # Level 0, since a test's programs run once or twice: compiling takes a third of the time. Scripts that tests start
    # as processes compile as they do for users.
    flags = f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# A [T] added to a [T, 1] is nearly always a mistake.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_xdist_auto_num_workers() -> int:
    """Two processes on CPU, where compiling keeps one core busy and takes up to 7 GB; one on an accelerator."""
    return 2 if PLATFORM == "cpu" else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what needs an accelerator, or the compiler for one, that is not there."""
    platforms = {"gpu": "cuda", "tpu": "tpu"}
    for item in items:
        for marker, platform in platforms.items():
            if item.get_closest_marker(marker) and platform != PLATFORM:
                item.add_marker(pytest.mark.skip(reason=f"needs JMOE_TEST_PLATFORM={platform}"))
        if item.get_closest_marker("aot") and not importlib.util.find_spec("libtpu"):
            item.add_marker(pytest.mark.skip(reason="needs libtpu: pip install -e '.[tpu]'"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """One cache of tokenised data for the session; the user's own is never read or written."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMOE_CACHE", str(path))
        yield path


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Each compiled program holds mappings of memory. Linux gives a process 65,530 of them, and where they end LLVM
    crashes: the whole suite in one process comes to that."""
    yield
    jax.clear_caches()


@pytest.fixture
def devices() -> list[jax.Device]:
    """The eight emulated devices of a mesh test."""
    found = jax.devices()
    if len(found) < DEVICES:
        pytest.skip(f"needs {DEVICES} devices")
    return found[:DEVICES]


RECIPE = """
from jmoe.config import *


def config():
    layers = (LayerGroup((Dense(d_ff=24), MoE(8, 16, Nucleus(p=0.4, experts_per_token=2.0)))),)
    return Config(
        model=Model(257, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, tie_embeddings=False, layers=layers),
        data=Data(sources=(Files({glob!r}),), validation_fraction=0.2, seq_len=32),
        optim=AdamW(learning_rate=1e-2, schedule=Constant(warmup_steps=4)),
        checkpoint=Checkpoint(every=4, keep=3),
        evaluation=Evaluation(every=8, batches=1000),
        steps=24,
        batch_size=4,
        log_every=1,
    )
"""


class Scripts:
    """Runs train.py and eval.py as a user does: as processes, on a recipe whose steps take milliseconds.

    The processes share one compilation cache, without which each would compile for some seconds.
    """

    root = Path(__file__).parents[1]

    def __init__(self, folder: Path, cache: Path, programs: Path):
        self.text, self.recipe = folder / "text", folder / "tiny.py"
        self.recipe.write_text(RECIPE.format(glob=str(self.text / "*.txt")))
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
            "JMOE_CACHE": str(cache),
            "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.text.mkdir()
        generator = random.Random(0)
        words = ("every", "token", "goes", "to", "the", "experts", "that", "its", "router", "gave", "most", "of", "all")
        for number in range(40):
            drawn = generator.choices(words, k=generator.randrange(20, 120))
            (self.text / f"{number:02d}.txt").write_text(" ".join(drawn))

    def start(self, script: str, *arguments: Any, **environment: str) -> "subprocess.Popen[bytes]":
        """A script under way, its output in pipes."""
        return subprocess.Popen(
            [sys.executable, script, *map(str, arguments)],
            cwd=self.root,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, script: str, *arguments: Any, **environment: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a script."""
        with self.start(script, *arguments, **environment) as process:
            out, err = process.communicate(timeout=300)
        return process.returncode, out.decode(), err.decode()

    def train(self, run_dir: Path, *flags: Any, **environment: str) -> tuple[int, str, str]:
        """train.py on the recipe."""
        return self.run("train.py", self.recipe, "--run-dir", run_dir, *flags, **environment)

    def saved_state(self, run_dir: Path, step: int = 24) -> dict[str, Any]:
        """Every leaf of a checkpoint by name, as dtype, shape and bytes; by default that of the last step."""
        from jmoe import recipe, sharding, training  # here, as pytest's options say how jmoe is imported
        from jmoe.checkpoint import Checkpoints, flatten

        settings = recipe.from_dict(json.loads((run_dir / "config.json").read_text()))
        mesh = sharding.make_mesh(settings.mesh, jax.devices()[:1])
        fingerprints = {"tokenizer": "", "train source 0": "", "validation source 0": ""}
        items = training.checkpoint_items(training.abstract_state(settings, mesh), fingerprints)
        restored = Checkpoints(run_dir / "checkpoints", keep=1).restore(items, step, read_only=True)
        assert restored is not None

        def plain(leaf):
            if isinstance(leaf, str):
                return leaf
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()

        return {name: plain(leaf) for name, leaf in flatten(restored[1]).items()}

    def assert_same_run(self, run_dir: Path, other: Path) -> None:
        """Metrics byte for byte, final state bit for bit."""
        assert (run_dir / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
        assert self.saved_state(run_dir) == self.saved_state(other)


@pytest.fixture(scope="session")
def scripts(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Scripts:
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # by the processes of this session
    return Scripts(tmp_path_factory.mktemp("scripts"), cache, shared / "jax")


@pytest.fixture(scope="session")
def trained(scripts: Scripts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """An uninterrupted run, and what it printed to standard output and error. Tests that write to it copy it first."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    code, out, err = scripts.train(run_dir)
    assert code == 0, err
    return run_dir, out, err
