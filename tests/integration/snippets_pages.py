"""The fenced code blocks of README.md and docs/*.md, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The pages, by their paths in the repository.
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"( *)(`{3,}|~{3,})([^`]*)$")
_INLINE = re.compile(r"`(jobledger [^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced code block. ``line``: the number of its first line of code; ``heading``: the heading above the block."""

    page: str
    line: int
    heading: str
    language: str
    text: str

    @property
    def where(self) -> str:
        """The block's place, for messages."""
        return f"{self.page}:{self.line} ({self.heading})"


@dataclass
class Command:
    """A line of a console block that begins with ``$``, without its comment. ``output``: the lines shown below it."""

    block: Block
    text: str
    output: list[str] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        """The command line as a shell splits it."""
        return shlex.split(self.text)


def blocks(page: str) -> list[Block]:
    """Return a page's fenced code blocks, in the page's order. Raises `ValueError` if the last one has no end."""
    found: list[Block] = []
    heading, opened = "", None
    lines: list[str] = []
    for number, line in enumerate((ROOT / page).read_text("utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None:
            if fence:
                opened, lines = (number + 1, fence), []
            elif line.startswith("#"):
                heading = line.lstrip("# ")
        elif fence and fence[2].startswith(opened[1][2]) and not fence[3].strip():
            text = "".join(f"{each}\n" for each in lines)
            found.append(Block(page, opened[0], heading, opened[1][3].strip(), text))
            opened = None
        else:
            lines.append(line.removeprefix(opened[1][1]))
    if opened is not None:
        raise ValueError(f"{page}:{opened[0]}: this block has no end")
    return found


def block_with(page: str, text: str) -> Block:
    """Return the one block of a page that contains a text. Raises `ValueError` if no block or several blocks do."""
    found = [block for block in blocks(page) if text in block.text]
    if len(found) != 1:
        raise ValueError(f"{page}: {len(found)} blocks contain {text!r}")
    return found[0]


def commands(block: Block) -> list[Command]:
    """Return the commands of a console block. Raises `ValueError` for output above the first command."""
    found: list[Command] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append(Command(block, re.sub(r"(^|\s+)#.*$", "", line.removeprefix("$ "))))
        elif found:
            found[-1].output.append(line)
        else:
            raise ValueError(f"{block.where}: {line!r} is not a command: write `$ ` before it")
    return found


def inline_commands(page: str) -> list[str]:
    """Return each ``jobledger …`` that a page's prose names."""
    prose = (ROOT / page).read_text("utf-8")
    for block in blocks(page):
        prose = prose.replace(block.text, "")
    return _INLINE.findall(prose)
