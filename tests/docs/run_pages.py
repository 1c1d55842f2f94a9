"""Run the commands that the documentation prints, in a clone of this repository, as a reader would paste them.

    python tests/docs/run_pages.py                 # README, tutorial and how-to guides, in that order
    python tests/docs/run_pages.py --keep DIR      # the clone goes to DIR and stays there
    python tests/docs/run_pages.py --list          # what would run; runs nothing

All pages share one bash session, which starts in the clone with no virtual environment: the first page has to make one
and to activate it. The language of a fenced block says what happens to it:

``bash``, ``sh``
    every command runs; one that fails, fails the page.
``console``
    lines that begin with ``$ `` are commands, the others are their output, which is not compared.
``python after-run``
    runs here as a script: it needs the runs that earlier commands of the pages made.
``python``
    is left to ``test_docs.py``, which runs it without a clone.

A block of another language, or of none, whose lines look like commands is an error. An HTML comment, which readers do
not see, stands on the line before a block and changes how it runs:

``<!-- ci: training.epochs=2 -->``
    words for every command of the block that trains, to shorten it; in a block where none does, for every
    ``python launch/...``.
``<!-- ci: file my_env.py -->``
    the block is what the page asks the reader to put into this file.
``<!-- ci: skip: needs a cluster -->``
    the block does not run. Reasons begin with one of :data:`REASONS`; there are no others.

Only the standard library is used: this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
#: Why a block may be left out.
REASONS = ("needs a cluster", "needs W&B online", "needs the hub", "runs make test", "runs the demo")
SHELLS = ("bash", "sh", "console")
SCRIPT = "python after-run"
#: Seconds after which a command counts as hanging. The first one installs the package and trains.
LIMIT = 900.0

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^`]*)$")
_MARKER = re.compile(r"^\s*<!--\s*ci\b\s*(?P<body>.*?)\s*-->\s*$")
_WORD = re.compile(r"^(\+{0,2}|~)[\w./@]+=\S*$|^--?[\w-]+(=\S+)?$")
#: First words of what a reader would paste into a terminal.
_COMMAND = re.compile(
    r"^\s*(\$ )?(python3?|pip3?|make|source|git|cd|export|conda|torchrun|sbatch|srun|apt-get|pytest|pwm) +\S"
)
_TRAINS = re.compile(
    r"^(?:\S+=\S+ +)*"
    r"(?:make +run|torchrun .*launch/train\.py|(?:python launch/|pwm )(?:submit|train|pretrain)(?:\.py)?)"
    r"(?=\s|$)"
)
_LAUNCH = re.compile(r"^python launch/\w+\.py\b")
_MAKE = re.compile(r"^make +run\b")
_FILE = re.compile(r"^file +([\w.-]+)$")


class PageError(ValueError):
    """A page that cannot be run as it stands: a marker or a block that means nothing."""


@dataclass(frozen=True)
class Command:
    """One command of a page; ``text`` is what runs, ``shown`` what the page prints."""

    page: str
    line: int
    text: str
    shown: str
    skipped: str = ""  # the reason, if it does not run


@dataclass(frozen=True)
class Block:
    """A fenced block and the marker before it."""

    page: str
    line: int  # of its first line of content
    language: str
    lines: tuple[str, ...]
    marker: str | None

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """The fenced blocks of a page, each with the text of its marker.

    Raises:
        PageError: if a fence is not closed, or a marker does not stand before a block.
    """
    marker: tuple[int, str] | None = None
    fence = indent = info = ""
    content: list[str] = []
    start = 0
    for number, line in enumerate(text.splitlines(), 1):
        found = _FENCE.match(line)
        if fence:
            if found and found["fence"].startswith(fence) and not found["info"].strip():
                yield Block(page, start, info, tuple(content), marker[1] if marker else None)
                fence, marker = "", None
            else:
                content.append(line.removeprefix(indent))
        elif found:
            fence, indent, info = found["fence"], found["indent"], " ".join(found["info"].split())
            content, start = [], number + 1
        elif (comment := _MARKER.match(line)) is not None:
            if marker:
                raise PageError(f"{page}:{marker[0]}: two markers before one block: put them into one")
            marker = number, comment["body"]
        elif line.strip():
            if marker:
                raise PageError(f"{page}:{marker[0]}: the marker does not stand before a block")
            if "<!--" in line and re.search(r"<!--\s*ci\b", line):
                raise PageError(f"{page}:{number}: a marker is a line of its own: <!-- ci: ... -->")
            if re.match(r"^( {4}|\t)", line) and _COMMAND.match(line):
                raise PageError(f"{page}:{number}: a command in an indented block: use ```bash")
    if fence:
        raise PageError(f"{page}:{start - 1}: the block is not closed")
    if marker:
        raise PageError(f"{page}:{marker[0]}: the marker does not stand before a block")


@dataclass(frozen=True)
class Marker:
    """What the comment before a block says; at most one of these."""

    reason: str = ""  # to skip the block
    file: str = ""  # that holds the block
    words: str = ""  # for its commands


def read_marker(block: Block) -> Marker:
    """What a block's marker says.

    Raises:
        PageError: if it is malformed, or skips for a reason that is not one of :data:`REASONS`.
    """
    if block.marker is None:
        return Marker()
    if not block.marker.startswith(":"):
        raise PageError(
            f"{block.where}: no marker is {block.marker!r}: <!-- ci: WORDS --> or <!-- ci: skip: REASON -->"
        )
    body = block.marker[1:].strip()
    if body == "skip" or body.startswith("skip:"):
        reason = body.removeprefix("skip").removeprefix(":").strip()
        if not reason.startswith(REASONS):
            raise PageError(f"{block.where}: skipped because {reason!r}; reasons begin with {', '.join(REASONS)}")
        return Marker(reason=reason)
    if (file := _FILE.match(body)) is not None:
        return Marker(file=file[1])
    wrong = [word for word in body.split() if not _WORD.match(word)]
    if wrong or not body:
        raise PageError(f"{block.where}: {' '.join(wrong) or 'nothing'!r} in a marker; words are KEY=VALUE or --option")
    return Marker(words=" ".join(body.split()))


def commands_of(page: str, text: str) -> list[Command]:
    """What a page lets a reader type, in order.

    Raises:
        PageError: if a marker or the language of a block is wrong.
    """
    return [command for block in blocks_of(page, text) for command in _commands(block, read_marker(block))]


def _commands(block: Block, marker: Marker) -> list[Command]:
    language, content = block.language, "\n".join(block.lines)
    if language.startswith("python") and language not in ("python", SCRIPT):
        raise PageError(f"{block.where}: ```{language}: there are ```python and ```{SCRIPT}")
    if marker.file and language not in SHELLS:
        text = f"cat > {marker.file} <<'END_OF_BLOCK'\n{content}\nEND_OF_BLOCK"
        return [Command(block.page, block.line, text, f"(writes {marker.file})")]
    if language == SCRIPT and not marker.words:
        text = f"python - <<'END_OF_BLOCK'\n{content}\nEND_OF_BLOCK"
        shown = next((line for line in block.lines if line.strip()), "")
        return [Command(block.page, block.line, text, f"(python) {shown}", marker.reason)]
    if language in SHELLS and not marker.file:
        found = list(_split(block))
        if marker.words:
            takes = _TRAINS if any(_TRAINS.match(each.text) for each in found) else _LAUNCH
            longer = [with_words(each, marker.words, takes) for each in found]
            if longer == found:
                raise PageError(f"{block.where}: no command of the block takes the words {marker.words!r}")
            found = longer
        return [replace(each, skipped=marker.reason) for each in found]
    if marker != Marker():
        raise PageError(f"{block.where}: a block of {language!r} cannot have the marker {block.marker!r}")
    if language != "python" and any(_COMMAND.match(line) for line in block.lines):
        raise PageError(f"{block.where}: commands in a block of {language!r}: use ```bash")
    return []


def _split(block: Block) -> Iterator[Command]:
    """The commands of a block of shell: as many lines each as bash needs."""
    pending: list[str] = []
    start = block.line
    for offset, line in enumerate(block.lines):
        if block.language == "console" and not pending:
            if not line.startswith("$ "):
                continue
            line = line[2:]
        if not pending:
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            start = block.line + offset
        pending.append(line)
        text = "\n".join(pending)
        if is_complete(text):
            yield Command(block.page, start, text, text)
            pending = []
    if pending:
        raise PageError(f"{block.page}:{start}: bash does not take this for a complete command: {pending[0]}")


def is_complete(text: str) -> bool:
    """Whether bash would run these lines rather than wait for more of them."""
    if text.endswith("\\"):
        return False
    checked = subprocess.run(["bash", "-n"], input=text + "\n", capture_output=True, text=True, check=False)
    return checked.returncode == 0 and not checked.stderr  # an open here-document is only warned of


def with_words(command: Command, words: str, takes: re.Pattern[str]) -> Command:
    """The command with further words, if it is one of those that take them; else the command."""
    text, comment = _before_comment(command.text)
    if "--help" in text or not takes.match(text):
        return command
    if not _MAKE.match(text):
        return replace(command, text=f"{_without(text, words)} {words}{comment}")
    given = re.search(r" ARGS=(\"[^\"]*\"|'[^']*'|\S+)", text)
    if given is None:
        return replace(command, text=f'{text} ARGS="{words}"{comment}')
    longer = f"{_without(shlex.split(given[1])[0], words)} {words}"
    return replace(command, text=f'{text[: given.start()]} ARGS="{longer}"{text[given.end() :]}{comment}')


def _without(text: str, words: str) -> str:
    """A command without the words that others replace: ``KEY=VALUE``, ``--option=VALUE`` and ``--option VALUE``."""
    for word in words.split():
        key = re.escape(word.partition("=")[0])
        text = re.sub(rf"(?<!\S){key}({'[= ]' if key.startswith(('-', re.escape('-'))) else '='}\S+)(?!\S)", "", text)
    return re.sub(r"(?<=\S) {2,}(?=\S)", " ", text).rstrip()


def _before_comment(text: str) -> tuple[str, str]:
    """A command and the comment at its end."""
    found = re.match(r"""^((?:[^'"#]|'[^']*'|"[^"]*"|(?<=\S)#)*?)(\s+#[^\n]*)?$""", text, re.DOTALL)
    return (found[1], found[2] or "") if found else (text, "")


class Session:
    """A bash that runs one command after the other, as a terminal does: variables and directory stay."""

    def __init__(self, folder: Path, environment: dict[str, str], log: IO[str]) -> None:
        self._log = log
        self._script = Path(log.name).with_name("command.sh")
        self._status = Path(log.name).with_name("status")
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, text: str, limit: float | None = None) -> tuple[bool, str]:
        """Whether a command succeeded, and what it printed; one that takes longer than the limit ends the shell."""
        limit = LIMIT if limit is None else limit
        self._script.write_text(text + "\n", encoding="utf-8")
        self._status.unlink(missing_ok=True)
        begin = os.path.getsize(self._log.name)
        assert self._bash.stdin is not None
        partial = shlex.quote(f"{self._status}.tmp")
        try:
            self._bash.stdin.write(
                f"source {shlex.quote(str(self._script))} < /dev/null\n"
                f"echo $? > {partial}; mv {partial} {shlex.quote(str(self._status))}\n"
            )
            self._bash.stdin.flush()
        except (BrokenPipeError, ValueError):  # it ended by itself, or was closed
            return False, "the shell has ended"
        end = time.monotonic() + limit
        while not self._status.exists():
            if self._bash.poll() is not None:
                return False, self._printed(begin) + "\nthe shell has ended"
            if time.monotonic() > end:
                self.close()
                return False, self._printed(begin) + f"\nstill running after {limit:g} s"
            time.sleep(0.02)
        return self._status.read_text(encoding="utf-8").strip() == "0", self._printed(begin)

    def _printed(self, begin: int) -> str:
        with open(self._log.name, encoding="utf-8", errors="replace") as file:
            file.seek(begin)
            return file.read().strip()

    def close(self) -> None:
        """End the shell and whatever it started."""
        assert self._bash.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._bash.stdin.close()
        try:
            self._bash.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self._bash.pid, signal.SIGKILL)
            self._bash.wait()


def run_all(commands: Sequence[Command], folder: Path, environment: dict[str, str]) -> int:
    """Run commands, tell how each went, and return how many failed."""
    failed = 0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, open(Path(scratch, "log"), "w", encoding="utf-8") as log:
        session = Session(folder, environment, log)
        try:
            for command in commands:
                name = f"{command.page}:{command.line}"
                shown = " ".join(command.shown.split())
                if command.skipped:
                    say(f"{name:<34} {'-':>6}    skipped  {shown}  ({command.skipped})")
                    continue
                started = time.monotonic()
                good, printed = session.run(command.text)
                failed += not good
                seconds = time.monotonic() - started
                say(f"{name:<34} {seconds:6.1f} s  {'ok     ' if good else 'FAILED '}  {shown}")
                if not good:
                    say(f"  ran: {command.text}")
                    say("\n".join(f"  | {line}" for line in printed.splitlines()))
        finally:
            session.close()
    ran = sum(not command.skipped for command in commands)
    say(f"{ran} commands in {time.monotonic() - begin:.0f} s, {failed} failed, {len(commands) - ran} skipped")
    return failed


def say(text: str) -> None:
    """Print at once: the reader of a CI log waits for the next line."""
    print(text, flush=True)


def pages(root: Path) -> list[Path]:
    """README, tutorial and how-to guides, the latter in the order of the site's menu."""
    menu = (root / "docs" / "index.md").read_text(encoding="utf-8")
    guides = [root / "docs" / f"{name}.md" for name in re.findall(r"^(howto/\w+)$", menu, re.MULTILINE)]
    missing = set((root / "docs" / "howto").glob("*.md")) - set(guides)
    if missing:
        raise PageError(f"docs/index.md does not list {', '.join(sorted(page.name for page in missing))}")
    return [root / "README.md", root / "docs" / "tutorial.md", *guides]


def read_pages(root: Path) -> list[Command]:
    """The commands of all pages."""
    return [
        command
        for page in pages(root)
        for command in commands_of(str(page.relative_to(root)), page.read_text(encoding="utf-8"))
    ]


def plain_environment(config_dir: Path) -> dict[str, str]:
    """This process's environment without what a fresh terminal would not have."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MAKEFLAGS")
    }
    active = [
        Path(p, "bin")
        for p in (os.environ.get("VIRTUAL_ENV"), None if sys.prefix == sys.base_prefix else sys.prefix)
        if p
    ]
    path = [p for p in environment.get("PATH", "").split(os.pathsep) if Path(p) not in active]
    return {**environment, "PATH": os.pathsep.join(path), "PWM_TORCHRL_CONFIG_DIR": str(config_dir), "COLUMNS": "80"}


def main(argv: Sequence[str] | None = None) -> int:
    """Clone, run, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="DIR", help="clone into DIR and keep it")
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # end the session, delete the clone
    try:
        if args.list:
            for command in read_pages(ROOT):
                say(f"{command.page}:{command.line}  {command.skipped and f'skip ({command.skipped}): '}{command.text}")
            return 0
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
        if changed.stdout.strip():
            say("The clone has the last commit; changes that are not committed are not tried.")
        with tempfile.TemporaryDirectory(prefix="pwm_pages_") as scratch:
            clone = args.keep or Path(scratch, "pwm_torchrl")
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
            environment = plain_environment(Path(scratch, "config"))
            return min(run_all(read_pages(clone), clone, environment), 1)
    except PageError as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
