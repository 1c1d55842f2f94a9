"""Appending to the text files of a run, whole or not at all."""

from __future__ import annotations

import os
from typing import BinaryIO


def append_text(file: BinaryIO, text: str) -> None:
    """Append to an unbuffered file that was opened with mode ``"ab"``.

    Raises:
        OSError: if the disk does not take all of it; the file is as before then, so that no half line is left to which
            a resumed run would append its first one.
    """
    descriptor = file.fileno()
    before = os.fstat(descriptor).st_size
    data = memoryview(text.encode("utf-8"))
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        os.ftruncate(descriptor, before)
        raise
