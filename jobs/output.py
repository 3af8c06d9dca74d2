"""What commands print of what they did."""

from __future__ import annotations

from pipelines.text import shown


def tell(result: object) -> None:
    """Print what a command has to say at its end. Names in it come from others' files: a terminal is not to obey
    them."""
    print(shown(str(result)))
