"""What commands print of what they did."""

from __future__ import annotations

import re

# those that a terminal obeys: all control characters but tab and line feed, changes of direction; half characters,
# which cannot be printed
UNSHOWN = re.compile("[\0-\b\v-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    r"""The text with escapes such as \x1b for control characters: names in it come from others' files."""
    return UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def tell(result: object) -> None:
    """Print what a command has to say at its end."""
    print(shown(str(result)))
