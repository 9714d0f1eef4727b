"""Tensors that come and go do not go through the system."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

import rat

ROOT = Path(rat.__file__).parents[1]
CODE = """
import resource, sys, torch
from rat.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
from rat import CausalLM, ModelConfig
model = CausalLM(ModelConfig(vocab_size=512, d_model=128, num_layers=2, num_heads=4))
ids = torch.zeros(8, 512, dtype=torch.long)
def steps(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        model(ids, ids).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // count
steps(5)
print(steps(10))
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", CODE, mode], cwd=ROOT, check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_used_again() -> None:
    kept, given_back = page_faults("keep"), page_faults("default")
    assert given_back > 100 + 2 * kept
