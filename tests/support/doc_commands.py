"""The shell commands that the documents show, as a reader would type them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from support.source import ROOT, tracked_files

SHELL = ("bash", "sh", "console", "shell")
DOCUMENTS = [path for path in tracked_files() if path.suffix == ".md"]
_FENCE = re.compile(
    r"^(?P<marks>`{3,})[ ]*(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^(?P=marks)[ ]*$", re.M | re.S
)
_LOOP = re.compile(r"^for (\w+) in ([^;\n]+); do\n(.*?)^done$", re.M | re.S)
_OPERATORS = {";", "&&", "||", "|", "&"}
# How a line of a program of ours, or of what starts one, begins.
_COMMAND = re.compile(
    r"^\s*(\$ )?(\w+=\S* )*(\./deepy\.py|python3? |make |torchrun |srun |sbatch |pip )"
)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A simple command of a document.

    Attributes:
        document: path of the document in the repository.
        line: of its block.
        words: the command's words, without variables before it and redirections behind.
        shown: the whole line that it is a part of, as it can be given to a shell.
        makes: files that it redirects its output to.
    """

    document: Path
    line: int
    words: tuple[str, ...]
    shown: str
    makes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The words as one line."""
        return shlex.join(self.words)

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {self.text}"


def blocks(text: str) -> list[tuple[int, str, str]]:
    """Return (line, kind, text) of the fenced blocks of a document."""
    return [
        (text[: found.start()].count("\n") + 1, found["kind"], found["text"])
        for found in _FENCE.finditer(text)
    ]


def commands(document: Path) -> list[Command]:
    """Return the commands of a document's shell blocks, in their order."""
    found = []
    for line, kind, text in blocks((ROOT / document).read_text(encoding="utf-8")):
        if kind in SHELL:
            for command in block_commands(text):
                found.append(replace(command, document=document, line=line))
    return found


def block_commands(text: str) -> list[Command]:
    """Return the simple commands of a shell block: loops written out, comments dropped.

    Raises:
        ValueError: the block has something else than commands, loops over words and redirections.
    """
    text = _LOOP.sub(_unrolled, text.replace("\\\n", " "))
    found = []
    for shown in (line.strip() for line in text.splitlines()):
        words = _words(shown)
        simple: list[list[str]] = [[]]
        for word in words:
            if word in _OPERATORS:
                simple.append([])
            else:
                simple[-1].append(word)
        found += [_command(part, shown) for part in simple if part]
    return found


def stray_commands(document: Path) -> list[str]:
    """Return the lines that look like commands and stand in no shell block.

    A line with "…" or "[" is a synopsis: it stands for many commands and is none itself.
    """
    found = []
    for line, kind, text in blocks((ROOT / document).read_text(encoding="utf-8")):
        if kind not in SHELL:
            for shown in text.replace("\\\n", " ").splitlines():
                if _COMMAND.match(shown) and not re.search(r"…|\[", shown):
                    found.append(f"{document}:{line}: {shown}")
    return found


def _unrolled(loop: re.Match[str]) -> str:
    name, values, body = loop.groups()
    return "".join(re.sub(rf"\$({name}\b|{{{name}}})", value, body) for value in values.split())


def _words(shown: str) -> list[str]:
    reader = shlex.shlex(shown, posix=True, punctuation_chars="();<>|&")
    reader.whitespace_split = True
    return list(reader)


def _command(words: list[str], shown: str) -> Command:
    while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
        words = words[1:]
    makes = []
    if ">" in words:
        at = words.index(">")
        makes, words = words[at + 1 :], words[:at]
    strange = [word for word in words if re.search(r"\$\(|`|<<|^[()<>]+$|…", word)]
    if not words or words[0] in {"for", "if", "while", "do", "done", "cd", "export"} or strange:
        raise ValueError(f"too much of a shell script to be checked: {shown!r}")
    return Command(
        document=Path(), line=0, words=tuple(words), shown=shown, makes=tuple(makes)
    )  # fmt: skip
