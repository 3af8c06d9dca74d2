"""What is in a folder of a disk or of a store that fsspec knows: its files folder by folder, and links out of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.storage_errors import plain_errors

CHANGES = ("mtime", "etag", "md5Hash")  # what listings have that changes with a file: of disks, Azure and Google
LEADING = (".", "..")  # parts of a key that hide nothing

Listed = tuple[str, int, str]
"""Name, bytes and what changes with the file"""


@dataclass(frozen=True)
class Walk:
    """All files below a folder, as they are listed: sorted by folder. Those in hidden folders where they are wanted:
    caches of others may hold millions, or be closed to us.

    With `follow_links` local folders elsewhere that links lead to are listed, too, each once; else they are no files.
    """

    filesystem: Any
    root: str
    """As the file system names it"""
    uri: str
    """For errors"""
    below: bool = True
    """Also what is in folders of this one"""
    follow_links: bool = False
    hidden: bool = False
    """Also what is in hidden folders; hidden files are listed in any case"""

    def __iter__(self) -> Iterator[Listed]:
        seen = set[str]()
        levels = [self._list_folder("", seen)]  # in a list: folders may lie deeper than calls can
        while levels:
            name, found = next(levels[-1], ("", None))
            if found is None:
                levels.pop()
            elif found["type"] != "directory" and not self._leads_out(name, found):
                change = next((found[key] for key in CHANGES if found.get(key)), "")
                yield name, int(found["size"] or 0), str(change)
            elif self.below and self._looks_into(name, found):
                levels.append(self._list_folder(f"{name}/", seen))

    def _looks_into(self, name: str, found: dict[str, Any]) -> bool:
        return (self.hidden or not is_hidden(name)) and (found["type"] == "directory" or self.follow_links)

    def _leads_out(self, name: str, found: dict[str, Any]) -> bool:
        """Whether what the file system calls no folder is a link to a folder elsewhere: see `linked_folders`."""
        return bool(found.get("islink")) and leads_out(self.root, f"{self.root}/{name}")

    def _list_folder(self, folder: str, seen: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """What is in one folder, by its names, sorted. `seen`, where links are followed: the folders so far, so that
        none is listed twice or for ever."""
        path = f"{self.root}/{folder}".rstrip("/")
        if self.follow_links and os.path.realpath(path) in seen:
            return
        with plain_errors(f"{self.uri}/{folder}".rstrip("/")):
            if not self.filesystem.isdir(path):
                return
            try:
                entries = self.filesystem.ls(path, detail=True)
            except FileNotFoundError:  # removed just now
                return
        if self.follow_links:
            seen.add(os.path.realpath(path))
        found = {each["name"].rstrip("/").rsplit("/", 1)[-1]: each for each in entries}
        yield from ((f"{folder}{name}", found[name]) for name in sorted(found))


def fitting(listed: Iterator[Listed], suffixes: tuple[str, ...], *, hidden: bool) -> Iterator[Listed]:
    """Those with one of the suffixes, compared without case, if there are any; hidden ones where they are wanted."""
    for name, size, change in listed:
        if (hidden or not is_hidden(name)) and (not suffixes or name.lower().endswith(suffixes)):
            yield name, size, change


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it is in, has a name that begins with a dot."""
    return any(part.startswith(".") and part not in LEADING for part in name.split("/"))


def linked_folders(root: str) -> Iterator[str]:
    """Names of the links below a local folder to folders elsewhere, sorted, hidden ones left out."""
    waiting = [root]  # not os.walk, whose calls lie as deep as the folders
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:  # `Walk` tells what cannot be looked into
            folders = sorted(each.path for each in entries if _is_folder(each) and not each.name.startswith("."))
            yield from (os.path.relpath(path, root) for path in folders if leads_out(root, path))
            waiting += [path for path in reversed(folders) if not os.path.islink(path)]


def leads_out(root: str, path: str) -> bool:
    """Whether a path is a link to a local folder that is not below another."""
    if not (os.path.islink(path) and os.path.isdir(path)):
        return False
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Or a link to one. Not what leads to itself, or has just gone."""
    try:
        return entry.is_dir()
    except OSError:
        return False
