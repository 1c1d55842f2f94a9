"""Freed memory is returned to the kernel."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from pwm_torchrl.memory import predict as allocator

ROOT = Path(__file__).resolve().parents[2]
#: Writes 256 blocks of 512 KiB and frees every second one. The kernel gets them back only if each has its own mapping.
PROGRAM = """
import ctypes, sys
from pwm_torchrl.memory.predict import return_freed_memory
from pwm_torchrl.memory.readings import read_process

returned = sys.argv[1] == "return" and return_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes, library.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [
    ctypes.c_void_p]
size = 512 * 1024
library.free(library.malloc(8 * size))  # makes the threshold rise, as larger tensors do
start = read_process().anon
blocks = [library.malloc(size) for _ in range(256)]
for block in blocks:
    ctypes.memset(block, 1, size)
full = read_process().anon - start
for block in blocks[::2]:
    library.free(block)
print(returned, full, read_process().anon - start)
"""


def held(mode: str) -> tuple[str, int, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    returned, full, after = done.stdout.split()
    return returned, int(full), int(after)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_blocks_are_returned():
    returned, full, after = held("return")
    assert returned == "True"
    assert full >= 128 * 2**20
    assert after == pytest.approx(full / 2, rel=0.1)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_blocks_are_kept_by_default():
    _, full, after = held("keep")
    assert after > 0.9 * full


def test_another_c_library_is_not_changed(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert allocator.return_freed_memory() is False
