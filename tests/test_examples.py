"""The examples, as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

if not (ROOT / "examples").is_dir():
    pytest.skip("not a checkout", allow_module_level=True)


def run(name):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / "examples" / name], capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr
    return done.stdout


def test_finetune_with_rect():
    lines = [line for line in run("finetune_with_rect.py").splitlines() if "old task" in line]
    numbers = [[float(x) for x in re.findall(r"\d+\.\d+", line)] for line in lines]
    (_, before, none), (_, free, most), (kept, rect, share) = numbers
    assert (none, share) == (0.0, 10.0)
    assert most > 99
    assert free > before + 0.03
    assert rect > before + 0.03
    assert kept > 0.7
