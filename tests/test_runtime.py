"""Settings of the process, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from mvcodec.runtime import prepare
{prepare}
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(10 << 20)  # 40 MB: glibc by itself keeps 32 at most
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def run(script: str, **environment: str) -> str:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "OMP_", "GOMP_"))}
    found = subprocess.run(
        [sys.executable, "-c", script], env={**plain, **environment}, capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.35"), reason="glibc's malloc, whose older versions keep less")
def test_freed_memory_is_not_fetched_anew():
    """Of twenty maps of 10,240 pages each, given back and asked for again, one or two are perhaps put elsewhere."""
    without, kept = (int(run(FAULTS.format(prepare=line))) for line in ("", "prepare()"))
    assert without > 200_000
    assert kept < without / 4
    assert int(run(FAULTS.format(prepare="prepare()"), MALLOC_TRIM_THRESHOLD_="131072")) > 200_000


def test_it_is_at_hand_before_torch_is():
    assert run("import sys, mvcodec; mvcodec.runtime.prepare(); print('torch' in sys.modules)") == "False"


def test_the_environment_has_the_last_word():
    script = "import os; from mvcodec.runtime import prepare; prepare(); print(os.environ['OMP_WAIT_POLICY'])"
    assert run(script) == "passive"
    assert run(script, OMP_WAIT_POLICY="active") == "active"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_a_budget_has_freed_memory_given_back():
    script = FAULTS.format(prepare="prepare()").replace("faults()\nprint", "give_back()\nprint")
    assert int(run(script.replace("import prepare", "import give_back, prepare"))) > 200_000
