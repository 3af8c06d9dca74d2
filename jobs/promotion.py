"""When an alias may move: what stands against the one version taking the place of the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jobs.tracking import MEASURES, VAL_DIGEST_TAG

DIGEST_SHOWN = 12


@dataclass(frozen=True)
class Candidate:
    """A version of a model, by what its tags say of it."""

    name: str
    version: str
    tags: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Of the data that it was measured on; empty if unknown."""
        return self.tags.get(VAL_DIGEST_TAG, "")

    @property
    def measure(self) -> str | None:
        """The first of MEASURES that it has."""
        return next((key for key in MEASURES if key in self.tags), None)

    def number(self, measure: str) -> float | None:
        """What was measured. Raises ValueError for a tag that someone has spoilt."""
        value = self.tags.get(measure)
        try:
            return None if value is None else float(value)
        except ValueError:
            raise ValueError(
                f"version {self.version} of {self.name} has the tag {measure} {value!r}, which is no number: mend it"
            ) from None


@dataclass(frozen=True)
class Move:
    """Where an alias points to now."""

    name: str
    alias: str
    version: str
    before: str | None
    overruled: str | None = None
    """What stood against it, where it was forced"""

    def __str__(self) -> str:
        place = f"models:/{self.name}@{self.alias} is version {self.version}"
        if self.before == self.version:
            return f"{place} already"
        forced = f"\nforced, although {self.overruled}" if self.overruled else ""
        return f"{place} now{f', it was {self.before}' if self.before else ''}{forced}"


@dataclass(frozen=True)
class Objection:
    """What stands against an alias moving."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.remedy}"


def objection(candidate: Candidate, present: Candidate | None, alias: str) -> Objection | None:
    """What stands against `alias` moving from `present` (None: from nowhere) to the candidate.

    It may move to a version that was measured, on the same data as the present one, and has at least as much of what
    counts of that one: mask AP, without masks keypoint AP, without either box AP.
    """
    ours = f"version {candidate.version} of {candidate.name}"
    if candidate.measure is None or not candidate.digest:
        return Objection(f"{ours} has no evaluation", "register a run that was evaluated, with mrcnn register")
    if present is None:
        return None
    theirs = f"the {alias}, version {present.version},"
    force = f"--force moves {alias} nevertheless"
    if present.measure is None or not present.digest:
        return Objection(f"{theirs} has no evaluation that {ours} could be compared with", force)
    measure, words = present.measure, in_words(present.measure)
    have, need = candidate.number(measure), present.number(measure)
    has, needs = _texts(have, need)
    if candidate.digest != present.digest:
        return Objection(
            f"{ours} has {words} {has} on the validation data {short(candidate.digest)}, {theirs} has {needs} on "
            f"{short(present.digest)}, and on different data these say nothing about each other",
            f"measure both on the same shards with mrcnn evaluate; {force}",
        )
    if have is None or need is None or not have >= need:  # nan is not
        return Objection(
            f"{ours} has {words} {has}, {theirs} has {needs} on the same validation data {short(candidate.digest)}",
            f"{alias} stays where it is; {force}",
        )
    return None


def in_words(measure: str) -> str:
    """`mask AP` for val/mask_AP."""
    return measure.removeprefix("val/").replace("_", " ")


def short(digest: str) -> str:
    """What of a digest is shown."""
    return digest[:DIGEST_SHOWN]


def _texts(*numbers: float | None) -> list[str]:
    """With four digits, or with all where four show no difference."""
    known = [x for x in numbers if x is not None]
    digits = 4 if len({f"{x:.4f}" for x in known}) == len(set(known)) else 17
    return ["none" if x is None else f"{x:.4f}" if digits == 4 else repr(x) for x in numbers]
