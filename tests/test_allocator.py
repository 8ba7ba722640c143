"""Whether freed memory is kept, seen in the page faults of a process that allocates and frees again and again."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource

from jmoe.allocator import keep_freed_memory

keep_freed_memory()
for turn in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (1 << 27)  # 2**15 pages of 4 kB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt's parameters are glibc's")
@pytest.mark.parametrize(("platforms", "kept"), [("cpu", True), ("tpu,cpu", False)])
def test_freed_memory_is_kept_on_cpu_only(platforms, kept):
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"JAX_PLATFORMS": platforms}
    ended = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert (int(ended.stdout) < 1000) == kept
