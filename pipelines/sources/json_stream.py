"""A JSON object from a stream of bytes, one element of its lists at a time.

Python's own scanner does the parsing, so NaN and Infinity are read (and can be told from damage); memory holds one
block and one element, however large the file is, and no element may be very large.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.sources.memory import available_memory
from pipelines.storage import BLOCK, Store

MARGIN = 64  # characters: nearer to the end of what was read, numbers and words may be cut
MOST = 64 * 2**20  # characters of one value: parsed they take ten times as much
MEMORY_FACTOR = 2.0  # of the file: its elements as text, what is beside them, and what they are sent to tasks with

_SPACE = re.compile(r"[ \t\n\r]*")
_scan = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class Element:
    """One element of the list at `key`, and its text."""

    key: str
    value: Any
    text: str


def file_blocks(store: Store, name: str) -> Iterator[bytes]:
    """A file in ranged requests. Raises ValueError, before it reads anything, where memory would not suffice."""
    size = store.size(name)
    need, have = round(size * MEMORY_FACTOR), available_memory()
    if need > have:
        raise ValueError(
            f"{store.uri_of(name)} has {size / 1e6:.0f} MB, for which {need / 1e6:.0f} MB of memory are needed, but "
            f"{have / 1e6:.0f} MB are free: take a machine with more, or split the file by images"
        )
    yield from store.read_blocks(name, BLOCK)


class JsonObject:
    """The JSON object in a stream. `name` is for errors.

    After `elements` is exhausted, `kinds` maps each key to the type of its value: list, dict, str, ...
    """

    def __init__(self, blocks: Iterator[bytes], name: str) -> None:
        self.kinds: dict[str, str] = {}
        self.kind = "object"
        """What the file really is: object, or the Python type of another value"""
        self._blocks, self._name = blocks, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._place = "", 0
        self._fed, self._ended = 0, False

    def elements(self) -> Iterator[Element]:
        """The elements of all lists that are values of the object, in the order of the file.

        There are none where the file is a list. Raises ValueError, with the byte where it is, for what is not JSON, not
        UTF-8, cut off, nested too deeply or, which COCO has nowhere, a value of more than MOST characters.
        """
        if self._peek() == "[":  # perhaps as large as memory: not looked into
            self.kind = "list"
            return
        if self._peek() != "{":
            value, _ = self._value()
            self.kind = type(value).__name__
        elif self._has_more("{", "}"):
            yield from self._members()
        if self._peek():
            raise self._error("there is more after the end", self._place)

    def _members(self) -> Iterator[Element]:
        while True:
            key, _ = self._value()
            if not isinstance(key, str):
                raise self._error("a key is not a string", self._place)
            if key in self.kinds:
                raise self._error(f"the key {key!r} comes twice", self._place)
            self._expect(":")
            if self._peek() == "[":
                self.kinds[key] = "list"
                yield from self._list(key)
            else:
                value, _ = self._value()
                self.kinds[key] = type(value).__name__
            if not self._has_more(",", "}"):
                return

    def _list(self, key: str) -> Iterator[Element]:
        more = self._has_more("[", "]")
        while more:
            yield Element(key, *self._value())
            more = self._has_more(",", "]")

    def _has_more(self, opening: str, closing: str) -> bool:
        """Take `closing`, or `opening` and, for a bracket, the closing one that may follow at once."""
        if self._peek() == closing:
            self._place += 1
            return False
        self._expect(opening)
        if opening != "," and self._peek() == closing:
            self._place += 1
            return False
        return True

    def _expect(self, character: str) -> None:
        if self._peek() != character:
            raise self._error(f"{character!r} is missing", self._place)
        self._place += 1

    def _peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._place)
            assert match is not None
            self._place = match.end()
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._feed(BLOCK):
                return ""

    def _value(self) -> tuple[Any, str]:
        """The value that begins here, and its text."""
        self._peek()
        wanted = BLOCK
        while True:
            try:
                value, end = _scan(self._text, self._place)
            except json.JSONDecodeError as error:
                near_end = error.pos >= len(self._text) - MARGIN or error.msg.startswith("Unterminated string")
                offset = error.pos - self._place
                if near_end and len(self._text) - self._place > MOST:
                    raise self._error(f"a value is longer than {MOST} characters", self._place) from None
                if not (near_end and self._feed(wanted)):
                    raise self._error(error.msg, self._place + offset) from None
            except RecursionError:
                raise self._error("it is nested too deeply", self._place) from None
            except ValueError as error:  # a whole number of thousands of digits
                raise self._error(str(error), self._place) from None
            else:
                length = end - self._place
                if end < len(self._text) - MARGIN or not self._feed(wanted):  # 7 may be the beginning of 7.5
                    self._place += length
                    return value, self._text[self._place - length : self._place]
            wanted *= 2

    def _feed(self, wanted: int) -> bool:
        """Forget what was read and append about `wanted` bytes; False at the end of the file."""
        parts, fed = [self._text[self._place :]], 0
        while fed < wanted and not self._ended:
            block = next(self._blocks, b"")
            self._ended = not block
            try:
                parts.append(self._decoder.decode(block, final=self._ended))
            except UnicodeDecodeError as error:
                place = self._fed + error.start - (len(error.object) - len(block))
                raise self._invalid("it is not UTF-8", place) from None
            fed += len(block)
            self._fed += len(block)
        self._text, self._place = "".join(parts), 0
        return fed > 0

    def _error(self, what: str, place: int) -> ValueError:
        pending = self._decoder.getstate()[0]
        return self._invalid(what, self._fed - len(pending) - len(self._text[place:].encode()))

    def _invalid(self, what: str, byte: int) -> ValueError:
        return ValueError(f"{self._name} is not valid JSON ({what}, at byte {byte}): is it cut off, or another file?")
