"""Whether an LMDB is whole, found out without the library: that maps the file, and a signal ends it where bytes lack.

Everything that a reader follows is followed here first, within the file's bounds: the two headers, then every page of
the tree. Layout: version 1 of the format, on 64 bits, little-endian.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from encdiff.errors import InputError

MAGIC, VERSION = 0xBEEFC0DE, 1
HEAD = 16  # bytes of a page before its content
BRANCH, LEAF, OVERFLOW, META, DIRTY = 0x01, 0x02, 0x04, 0x08, 0x10
BIG, SUB, DUPLICATES = 0x01, 0x02, 0x04  # of a value: in pages of its own; a database; several of one key
NONE = 2**64 - 1  # the root of an empty tree
KEY = 511  # the longest key
PLAIN = 0x02 | 0x08  # flags of a database that leave one value to a key


class Meta(NamedTuple):
    """One of the two headers: the newer one counts."""

    page_size: int
    flags: int
    depth: int
    root: int
    last_page: int
    transaction: int


def check_lmdb(path: Path, file: Path) -> None:
    """InputError, naming `path`, unless the tree of the data file is whole and lies in it."""
    try:
        with open(file, "rb") as stream:
            _Walk(stream, os.fstat(stream.fileno()).st_size).tree()
    except (struct.error, _Damaged) as error:
        raise InputError(f"{path}: a damaged LMDB ({error}); copy it again") from None


class _Damaged(Exception):
    pass


class _Walk:
    def __init__(self, stream: BinaryIO, size: int):
        self.stream = stream
        self.seen: set[int] = set()
        self.meta = max(self._metas(size), key=lambda meta: meta.transaction)
        if self.meta.page_size * (self.meta.last_page + 1) > size:
            pages = self.meta.last_page + 1
            raise _Damaged(f"{pages} pages of {self.meta.page_size} bytes in a file of {size}, which was cut short")
        if self.meta.flags & ~PLAIN:
            raise _Damaged("its keys may have several values")

    def _metas(self, size: int) -> list[Meta]:
        first = self._read_meta(0)
        if first.page_size not in (2**n for n in range(9, 17)):
            raise _Damaged(f"pages of {first.page_size} bytes")
        if size < 2 * first.page_size:
            raise _Damaged("it ends within its headers")
        second = self._read_meta(first.page_size)
        if second.page_size != first.page_size:
            raise _Damaged("two sizes of pages")
        return [first, second]

    def _read_meta(self, at: int) -> Meta:
        self.stream.seek(at)
        page = self.stream.read(HEAD + 136)
        flags = struct.unpack_from("<H", page, 10)[0]
        magic, version, address, _ = struct.unpack_from("<IIQQ", page, HEAD)
        page_size = struct.unpack_from("<I", page, HEAD + 24)[0]
        kind, depth = struct.unpack_from("<HH", page, HEAD + 24 + 48 + 4)
        root, last_page, transaction = struct.unpack_from("<QQQ", page, HEAD + 24 + 48 + 40)
        if (magic, version) != (MAGIC, VERSION) or not flags & META or address:
            raise _Damaged(f"a header of version {version} at byte {at}")
        return Meta(page_size, kind, depth, root, last_page, transaction)

    def tree(self) -> None:
        """Every page from the root down, each once, leaves at one depth."""
        level = [] if self.meta.root == NONE else [self.meta.root]
        if not level and self.meta.depth:
            raise _Damaged("a tree without a root")
        for depth in range(self.meta.depth):
            leaves = depth == self.meta.depth - 1
            level = [child for number in level for child in self._page(number, leaves)]
        if level:
            raise _Damaged("a tree deeper than it says")

    def _take(self, number: int, pages: int = 1) -> None:
        if not 2 <= number <= number + pages - 1 <= self.meta.last_page:
            raise _Damaged(f"page {number} lies outside")
        if number in self.seen:
            raise _Damaged(f"page {number} stands in the tree twice")
        self.seen.add(number)

    def _page(self, number: int, leaf: bool) -> list[int]:
        """Check one page; returns the numbers of those below it."""
        self._take(number)
        size = self.meta.page_size
        self.stream.seek(number * size)
        page = self.stream.read(size)
        own, _, flags, lower, upper = struct.unpack_from("<QHHHH", page)
        count = (lower - HEAD) // 2
        if own != number or flags & ~DIRTY != (LEAF if leaf else BRANCH) or not HEAD <= lower <= upper <= size:
            raise _Damaged(f"page {number} is no {'leaf' if leaf else 'branch'}")
        if count < (1 if leaf else 2):
            raise _Damaged(f"page {number} holds {count} entries")
        places = struct.unpack_from(f"<{count}H", page, HEAD)
        if min(places) < upper or max(places) > size - 8:
            raise _Damaged(f"page {number} has entries outside")
        below = [self._entry(page, place, leaf) for place in places]
        return [] if leaf else below

    def _entry(self, page: bytes, place: int, leaf: bool) -> int:
        """Check one entry of a page; returns the page that a branch names."""
        low, high, flags, key = struct.unpack_from("<4H", page, place)
        end = place + 8 + key
        length = low | high << 16
        if (leaf and key > KEY) or end > len(page):
            raise _Damaged("a key ends outside its page")
        if not leaf:
            return length | flags << 32
        if flags & (SUB | DUPLICATES) or flags & ~BIG:
            raise _Damaged("a value that is a database")
        if flags & BIG:
            self._overflow(struct.unpack_from("<Q", page, end)[0], length)
        elif end + length > len(page):
            raise _Damaged("a value ends outside its page")
        return 0

    def _overflow(self, number: int, length: int) -> None:
        """Check the pages of a long value."""
        self._take(number)
        self.stream.seek(number * self.meta.page_size)
        own, _, flags, pages = struct.unpack("<QHHI", self.stream.read(HEAD))
        if own != number or flags & ~DIRTY != OVERFLOW or pages < 1 or number + pages - 1 > self.meta.last_page:
            raise _Damaged(f"page {number} begins no long value")
        if HEAD + length > pages * self.meta.page_size:
            raise _Damaged(f"a value of {length} bytes in {pages} pages")
