"""Names from others' files, as they may be shown."""

from __future__ import annotations

import re

# what a terminal obeys: all control characters but tab and line feed, changes of direction; and half characters, which
# cannot be printed
UNSHOWN = re.compile("[\0-\b\v-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
UNSHOWN_IN_LINE = re.compile(f"[\t\n]|{UNSHOWN.pattern}")


def shown(text: str) -> str:
    r"""The text with escapes such as \x1b for control characters."""
    return UNSHOWN.sub(_escaped, text)


def shown_name(text: str) -> str:
    """The same in one line, for a name that is told among others."""
    return UNSHOWN_IN_LINE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
