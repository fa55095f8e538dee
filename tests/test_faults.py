"""The fault harness in its small form, and that it notices programs which are broken on purpose."""

import os
import re
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
FLAGS = {"kill": ("--kills", 2), "term": ("--terms", 1), "disk": ("--full-disks", 1), "input": ("--inputs", 18)}


def test_a_few_faults_of_every_kind_are_survived_and_broken_programs_are_noticed():
    # A process of its own: it forks, which a process that has trained must not do.
    command = [sys.executable, "tests/faults.py", "--self-check", *(str(word) for flag in FLAGS.values() for word in flag)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind, (_, count) in FLAGS.items():
        tried = re.search(rf"^{kind} +(\d+) ", done.stdout, re.MULTILINE)
        assert tried is not None
        assert int(tried[1]) >= count
    assert "failures: 0" in done.stdout
    assert done.stdout.count(": noticed") == 3
