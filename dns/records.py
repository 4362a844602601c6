"""Where the records of a response are, and their TTLs.

A long response is nearly always one set of addresses: thousands of records with the same owner, type, class and length.
Such a run is one item here. It is found and read by columns: the same octet of all its records is one slice, so that it
costs a few steps, however long it is. Other records are an item each.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MIN_RUN = 16  # records; fewer are read one by one
MAX_RUN_OWNER_BYTES = 64  # a longer owner is read each time: few such records fit into a message

_fixed = struct.Struct("!HHIH")  # of a record, after its name
_number = struct.Struct("!I")


class Record(NamedTuple):  # a dataclass takes three times as long to create
    """Where a record is in a message."""

    section: int  # 1 answer, 2 authority, 3 additional
    start: int
    owner_end: int
    type: int
    klass: int
    ttl: int
    data: int  # offset of its RDATA
    end: int


#: Where the first record starts, where its owner ends, its octets, and the number of records alike.
Run = tuple[int, int, int, int]


class Records:
    """The records of a message, in eight octets for each run.

    Only offsets are kept: an object per record would take 20 times the memory of the response. A `Record` is created
    when it is read; drop it before reading the next one.
    """

    __slots__ = ("_message", "_runs", "_sections")

    def __init__(self, message: bytes) -> None:
        """Create an empty list; ``message`` has at most 65,535 octets."""
        self._message = message
        self._runs = array("H")  # the four numbers of each run
        self._sections = [0, 0, 0]  # the index in it after the last run of each

    def __len__(self) -> int:
        return sum(self._runs[3::4])

    def __iter__(self) -> Iterator[Record]:
        for section in (1, 2, 3):
            yield from self.of(section)

    def of(self, section: int) -> Iterator[Record]:
        """Yield the records of one section (1 answer, 2 authority, 3 additional)."""
        for start, owner_end, size, count in self.runs(section):
            for offset in range(0, count * size, size):
                kind, klass, ttl, length = _fixed.unpack_from(self._message, owner_end + offset)
                data = owner_end + offset + 10
                yield Record(section, start + offset, owner_end + offset, kind, klass, ttl, data, data + length)

    def runs(self, section: int = 0) -> Iterator[Run]:
        """Yield the runs of a section, or of all: enough for loops over thousands of records."""
        first = self._sections[section - 2] if section > 1 else 0
        numbers = iter(self._runs[first : self._sections[section - 1]])  # of 0: the last section
        return zip(numbers, numbers, numbers, numbers, strict=True)

    def add_section(self, section: int) -> None:
        """End a section."""
        self._sections[section - 1] = len(self._runs)

    @property
    def counts(self) -> tuple[int, int, int]:
        """The number of records in each section."""
        first, second, _ = self._sections
        runs = self._runs
        return sum(runs[3:first:4]), sum(runs[first + 3 : second : 4]), sum(runs[second + 3 :: 4])

    def ttl_offsets(self, base: int) -> array[int]:
        """Return the offsets of the TTLs, counted from ``base``."""
        found = array("H")
        for _, owner_end, size, count in self.runs():
            at = owner_end + 4 - base
            if count == 1:
                found.append(at)
            else:
                found.extend(range(at, at + count * size, size))
        return found


def count_alike(data: bytes, start: int, owner_end: int, size: int, most: int) -> int:
    """Return how many records from ``start`` on, at most ``most``, have the owner, type, class and length of the first
    one, which has ``size`` octets. Fewer than MIN_RUN count as one."""
    count = min(most, (len(data) - start) // size)
    for at in (owner_end + 9, owner_end + 8, *range(start, owner_end + 4)):
        if count < MIN_RUN:
            return 1
        column = data[at : at + (count - 1) * size + 1 : size]
        count -= len(column.lstrip(column[:1]))
    return count if count >= MIN_RUN else 1


def numbers_of(data: bytes, at: int, size: int, count: int) -> Sequence[int]:
    """Return the numbers of four octets, such as TTLs, of a run of records of ``size`` octets; the first one is at
    ``at``. One number if they are all the same."""
    columns = [data[each : each + (count - 1) * size + 1 : size] for each in range(at, at + 4)]
    if not any(column.lstrip(column[:1]) for column in columns):
        return _number.unpack_from(data, at)
    joined = bytearray(4 * count)
    for number, column in enumerate(columns):
        joined[number::4] = column
    return struct.unpack(f"!{count}I", joined)


def put_numbers(data: bytearray, at: int, size: int, count: int, numbers: Sequence[int]) -> None:
    """Write numbers of a run as `numbers_of` returns them."""
    joined = struct.pack(f"!{len(numbers)}I", *numbers)
    for each in range(4):
        column = joined[each::4]
        first = at + each
        data[first : first + (count - 1) * size + 1 : size] = column if len(numbers) == count else column * count
