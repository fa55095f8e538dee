"""The fault harness in its small form."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_few_faults_of_every_kind_are_survived():
    # A process of its own: it forks, which a process that has trained must not do.
    command = [
        *(sys.executable, "tests/faults.py", "--kills", "2", "--terms", "1", "--full-disks", "1"),
        *("--inputs", "9"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = re.findall(r"^(kill|term|disk|input) +(\d+)$", done.stdout, re.MULTILINE)
    assert {kind: int(count) for kind, count in tried} == {"kill": 2, "term": 1, "disk": 1, "input": 9}
