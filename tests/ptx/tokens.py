"""PTX text to tokens, and a place among them that moves on."""

from __future__ import annotations

import re

from .syntax import PtxSyntaxError

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+|//[^\n]*)
      | (?P<newline>\n)
      | (?P<comment>/\*.*?\*/)
      | (?P<string>"[^"\n]*")
      | (?P<float>0[fF][0-9a-fA-F]{8}(?![0-9a-fA-F])|0[dD][0-9a-fA-F]{16})
      | (?P<decimal>\d+\.\d*(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)
      | (?P<int>0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+U?)
      | (?P<word>[A-Za-z_$%.][\w$.]*(?:::[\w$.]+)*)
      | (?P<punct>[{}()\[\];:,@!|+\-=<>*~&])
    """,
    re.X | re.S,
)


class Tokens:
    """The tokens of a text, from the first to an "end" behind the last; i is the next one's number."""

    def __init__(self, text: str):
        self.kinds: list[str] = []
        self.words: list[str] = []
        self.lines: list[int] = []
        line, pos = 1, 0
        for m in _TOKEN.finditer(text):
            if m.start() != pos:
                break
            pos = m.end()
            kind = m.lastgroup
            if kind == "newline":
                line += 1
            elif kind == "comment":
                line += m.group().count("\n")
            elif kind != "space":
                self.kinds.append(kind)
                self.words.append(m.group())
                self.lines.append(line)
        if pos != len(text) and text[pos:].strip("\0 \n\t"):
            raise PtxSyntaxError(f"line {line}: unexpected character {text[pos]!r}")
        self.kinds.append("end")
        self.words.append("")
        self.lines.append(line)
        self.i = 0

    @property
    def word(self) -> str:
        return self.words[self.i]

    def fail(self, what: str):
        raise PtxSyntaxError(f"line {self.lines[self.i]}: {what}, found {self.word!r}")

    def take(self) -> str:
        self.i += 1
        return self.words[self.i - 1]

    def accept(self, word: str) -> bool:
        if self.words[self.i] == word:
            self.i += 1
            return True
        return False

    def expect(self, word: str):
        if not self.accept(word):
            self.fail(f"expected {word!r}")

    def rest_of_line(self) -> list[str]:
        line, out = self.lines[self.i], []
        while self.lines[self.i] == line and self.kinds[self.i] != "end":
            out.append(self.take())
        return out

    def integer(self) -> int:
        sign = -1 if self.accept("-") else 1
        if self.kinds[self.i] != "int":
            self.fail("expected an integer")
        return sign * to_int(self.take())


def to_int(word: str) -> int:
    word = word.rstrip("U")
    if word[:2].lower() == "0x":
        return int(word, 16)
    if word[:2].lower() == "0b":
        return int(word, 2)
    if len(word) > 1 and word[0] == "0":
        return int(word, 8)
    return int(word)
