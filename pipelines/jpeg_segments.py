"""What the segments of a JPEG tell before its pixels are decoded (ITU T.81, annex B)."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from pipelines.pixels import DecodeError

EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
TURNED = b"Orientation"  # a word of XMP
BEGINNING = b"\xff\xd8\xff"  # of a JPEG, whatever its end is like
MAX_SCANS = 100  # as libtiff has it; cameras and tools make a dozen
SCAN, END = 0xDA, 0xD9  # kinds of segments
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
WITH_LENGTH = {*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE}
MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")  # among a scan's bytes are but these others behind an FF


@dataclass(frozen=True)
class JpegHeader:
    """What stands before the first scan."""

    may_be_turned: bool
    """By its EXIF or XMP"""
    may_have_scans: bool
    """After the first"""


def read_header(data: bytes) -> JpegHeader:
    """Read the segments before the first scan alone: to search all bytes is a twentieth of the work of decoding them.
    Where they are not in plain order, EXIF and XMP may be anywhere, and scans may be many."""
    at, turned, frame, components = 2, False, -1, 0  # behind the start of the image
    while at + 4 <= len(data):
        begin, kind, length = struct.unpack_from(">BBH", data, at)
        if begin != 0xFF or kind not in WITH_LENGTH or length < 2:
            break
        if kind == SCAN:  # the first of a progressive image has some of its bits, else it may have some of its colours
            return JpegHeader(turned, frame in PROGRESSIVE or data[at + 4 : at + 5] != bytes([components]))
        if kind in FRAMES and at + 9 < len(data):
            frame, components = kind, data[at + 9]
        if data.startswith(EXIF, at + 4) or (data.startswith(XMP, at + 4) and TURNED in data[at : at + 2 + length]):
            turned = True
        at += 2 + length
    return JpegHeader(turned or EXIF in data or TURNED in data, may_have_scans=True)


def check_scans(data: bytes, header: JpegHeader) -> None:
    """Raise DecodeError for a JPEG of more than MAX_SCANS, each of which takes as long as a whole image."""
    if header.may_have_scans and has_more_scans(data, MAX_SCANS):
        raise DecodeError(f"decompression bomb: a JPEG of more than {MAX_SCANS} scans")


def has_more_scans(data: bytes, most: int) -> bool:
    """Whether the first image in a JPEG has more scans than so many: what comes behind its end is not looked at."""
    if data.count(bytes([0xFF, SCAN])) <= most:  # a fifth of the time of what follows, and nearly always enough
        return False
    at, count = 2, 0
    while count <= most and (marker := MARKER.search(data, at)) and marker[1][0] != END:
        at = marker.end()
        count += marker[1][0] == SCAN
        if marker[1][0] in WITH_LENGTH and at + 2 <= len(data):
            at += struct.unpack_from(">H", data, at)[0]
    return count > most
