"""`python tests/oracle_table.py [MODEL ...]`: how far our inference is from the oracles, as a table."""

from __future__ import annotations

import sys
from dataclasses import replace

import oracle
from oracle_eval import Difference, compare_all


def worst(differences: list[Difference]) -> list[Difference]:
    """The largest difference of each quantity of a model, over its images and levels."""
    by_quantity: dict[tuple[str, str], Difference] = {}
    for each in differences:
        model, _, rest = each.oracle.partition("/")
        variant = rest.split("/")[0] if "/" in rest else ""
        key = (f"{model} {variant}".strip(), each.quantity.rstrip("23456"))
        if key not in by_quantity or each.relative > by_quantity[key].relative:
            by_quantity[key] = replace(each, oracle=key[0], quantity=key[1])
    return list(by_quantity.values())


def main(names: list[str]) -> None:
    """Print the table: for each model and quantity the largest difference."""
    print(f"{'oracle':38} {'quantity':28} {'absolute':>10} {'relative':>10}")
    for name in names or oracle.MODELS:
        for each in worst(list(compare_all(name))):
            print(each, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
