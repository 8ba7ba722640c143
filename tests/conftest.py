"""Tests run on eight emulated CPU devices unless JMOE_TEST_PLATFORM names another platform (cuda, tpu)."""

import os

PLATFORM = os.environ.get("JMOE_TEST_PLATFORM", "cpu")
DEVICES = 8

# Before JAX is imported: it reads these once.
os.environ["JAX_PLATFORMS"] = PLATFORM
if PLATFORM == "cpu":
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    os.environ["XLA_FLAGS"] = flags.strip()

import jax  # noqa: E402
import pytest  # noqa: E402

# A [T] added to a [T, 1] is nearly always a mistake.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what needs an accelerator that is not there."""
    platforms = {"gpu": "cuda", "tpu": "tpu"}
    for item in items:
        for marker, platform in platforms.items():
            if item.get_closest_marker(marker) and platform != PLATFORM:
                item.add_marker(pytest.mark.skip(reason=f"needs JMOE_TEST_PLATFORM={platform}"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """One cache of tokenised data for the session; the user's own is never read or written."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMOE_CACHE", str(path))
        yield path


@pytest.fixture
def devices() -> list[jax.Device]:
    """The eight emulated devices of a mesh test."""
    found = jax.devices()
    if len(found) < DEVICES:
        pytest.skip(f"needs {DEVICES} devices")
    return found[:DEVICES]
