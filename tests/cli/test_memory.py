"""Freed memory stays in the process, which saves the time of new pages on a CPU."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from robustclip.cli.memory import keep_freed_memory

print(keep_freed_memory() if sys.argv[1] == "keep" else None)
for round in range(6):
    if round == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(40 * 2**20) for _ in range(2)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(way: str, **variables: str) -> tuple[str, int]:
    """Returns what `keep_freed_memory` answers, and the pages that five rounds of two blocks ask the system for."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS, way]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment | variables)
    kept, faults = ran.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="needs glibc")
def test_blocks_are_used_again() -> None:
    (kept, few), (_, many) = _faults("keep"), _faults("leave")
    pages = 5 * 2 * 40 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert kept == "True"
    assert few < pages / 100, "the second round uses the pages of the first one"
    assert many > pages / 2, "without, every round asks for new pages; if not, the call has become needless"


def test_variables_of_the_user_stay_in_force() -> None:
    assert _faults("keep", MALLOC_ARENA_MAX="2")[0] == "False"
