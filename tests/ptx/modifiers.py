"""The modifiers of an opcode; and the error that ends it where one of them, or anything else, is not implemented."""

from __future__ import annotations

from .syntax import TYPE_SIZES


class Unsupported(Exception):
    """PTX that this interpreter does not implement."""


class Mods:
    """The modifiers of an opcode, taken one by one; what is left over is unsupported."""

    def __init__(self, opcode_text: str, line: int):
        self.text, self.line = opcode_text, line
        self.parts = opcode_text.split(".")[1:]

    def fail(self, why: str):
        raise Unsupported(f"line {self.line}: {self.text}: {why}")

    def take(self, word: str) -> bool:
        if word in self.parts:
            self.parts.remove(word)
            return True
        return False

    def choice(self, *words: str, default: str | None = None) -> str | None:
        for word in words:
            if self.take(word):
                return word
        return default

    def need(self, *words: str) -> str:
        found = self.choice(*words)
        if found is None:
            self.fail(f"one of .{', .'.join(words)} is needed")
        return found

    def type(self) -> str:
        """The last modifier, which must be a type."""
        if not self.parts or self.parts[-1] not in TYPE_SIZES:
            self.fail("no type")
        return self.parts.pop()

    def done(self):
        if self.parts:
            self.fail(f"modifier .{self.parts[0]} is not implemented")
