"""report.html of a finished prediction: one file that shows in any browser what was found, and needs nothing else.

It depends on the plan, the model, the images and which overlays there are, never on the folder it lies in or on how
long anything took: a prediction that was killed and went on has the report of one that was not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined

from mrcnn.structures import Category
from mrcnn.visualize import DRAWN_SCORE, class_color
from pipelines.accounts import rejected_in
from pipelines.inputs import Inputs, ShardInputs
from pipelines.overlays import DrawSettings, overlays_there
from pipelines.predict_folder import MANIFEST, OVERLAYS, PARTS, REJECTS_FILE, REPORT
from pipelines.records import printable
from pipelines.sources.image_files import is_list
from pipelines.tally import SCORE_BINS
from pipelines.thumbnails import images_to_show, make_thumbnails

TEMPLATE = "report.html.jinja"
CLASSES_AT_ONCE = 30  # others are there, but folded
REASONS_AT_ONCE = 20

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Bar:
    """One of a histogram's."""

    label: str
    count: int
    top: int
    """Count of the histogram's largest bar"""
    color: str = ""

    @property
    def percent(self) -> str:
        """Length, of the largest bar's."""
        return f"{100 * self.count / self.top:.2f}" if self.top else "0"


def write_report(inputs: Inputs, manifest: Manifest, settings: DrawSettings) -> None:
    """Write the report of a finished prediction into its folder. Raises as `make_thumbnails`."""
    there = overlays_there(settings.out)
    shown = images_to_show(inputs, there, manifest["plan"]["chunk_size"])
    page = render(
        manifest,
        categories=settings.categories,
        source=_where(inputs),
        rejected=rejected_in(settings.out, REJECTS_FILE),
        thumbnails=make_thumbnails(shown, there, settings),
    )
    settings.out.write_bytes(REPORT, printable(page).encode())


def render(manifest: Manifest, **content: Any) -> str:
    """The page. `content`: categories, source (`_where`), rejected and thumbnails."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": "{:,}".format, "link": _link, "color": _color, "name": _name_below}
    template = environment.from_string(files("pipelines").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    tally, categories = manifest["tally"], content["categories"]
    classes = class_bars(tally["labels"], categories)
    return template.render(
        content,
        title=manifest["model"]["version"] or manifest["model"]["uri"],
        plan=manifest["plan"],
        totals=manifest["totals"],
        empty=tally["images"][0] if tally["images"] else 0,
        scores=score_bars(tally["scores"]),
        sizes=size_bars(tally["images"]),
        classes=[each for each in classes if each.count],
        not_found=_not_found(classes, manifest["plan"]["classes"], categories),
        options=options_of(manifest["plan"], len(categories)),
        digests=digests_of(manifest["plan"]),
        at_once=(CLASSES_AT_ONCE, REASONS_AT_ONCE),
        drawn_score=DRAWN_SCORE,
        names={"manifest": MANIFEST, "parts": PARTS, "rejects": REJECTS_FILE, "overlays": OVERLAYS},
    )


def score_bars(counts: Sequence[int]) -> list[Bar]:
    """Of detections by score."""
    top = max(counts)
    return [Bar(f"{i / SCORE_BINS:.2f} to {(i + 1) / SCORE_BINS:.2f}", count, top) for i, count in enumerate(counts)]


def size_bars(counts: Sequence[int]) -> list[Bar]:
    """Of images by the number of their detections, as `Tally.images`."""
    labels = ["0", "1", *(f"{2**i} to {2 ** (i + 1) - 1}" for i in range(1, len(counts)))]
    top = max(counts, default=0)
    return [Bar(label, count, top) for label, count in zip(labels, counts, strict=False)]


def class_bars(counts: Sequence[int], categories: Sequence[Category]) -> list[Bar]:
    """Of detections by class, most frequent first."""
    numbers = [*counts, *[0] * (len(categories) + 1 - len(counts))]
    top = max(numbers)
    bars = [Bar(each.name, numbers[i], top, _color(i)) for i, each in enumerate(categories, start=1)]
    return sorted(bars, key=lambda bar: -bar.count)


def options_of(plan: Mapping[str, Any], categories: int) -> list[tuple[str, str]]:
    """What the results depend on, in words."""
    of = "tile" if plan["tile"] else "image"
    wanted = len(plan["classes"])
    return [
        ("Score threshold", f"{plan['score_threshold']:g}"),
        ("Most detections", f"{plan['max_detections']:,} of each {of}"),
        ("Classes", f"all {categories}" if wanted == categories else f"{wanted} of {categories}"),
        ("Keypoints", "yes" if plan["keypoints"] else "no"),
        ("Test-time augmentation", f"{', '.join(map(str, plan['tta']))} pixels, mirrored" if plan["tta"] else "no"),
        ("Tiles", "{:,} pixels, {:,} shared".format(*plan["tile"]) if plan["tile"] else "no"),
        ("Batch size", f"{plan['batch_size']:,}"),
        ("Largest image", f"{plan['max_pixels']:,} pixels"),
    ]


def digests_of(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """SHA-256 of the model and of what it looked at."""
    return [*plan["model_sha256"].items(), ("inputs", plan["inputs_sha256"])]


def _not_found(classes: Iterable[Bar], wanted: Sequence[int], categories: Sequence[Category]) -> list[str]:
    names = {each.name for each in categories if each.id in wanted}
    return [bar.label for bar in classes if not bar.count and bar.label in names]


def _where(inputs: Inputs) -> str:
    """What the images are of, in words before the URI."""
    if isinstance(inputs, ShardInputs):
        return "of the shards in"
    return "of the list" if is_list(inputs.uri) else "in the folder"


def _color(label: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*class_color(label))


def _link(name: str) -> str:
    """A file of the folder, relative to the page."""
    return quote(name)


def _name_below(uri: str, folder: str) -> str:
    """The end of an image's URI that tells it from others of the folder."""
    below = uri.removeprefix(f"{folder}/")
    return below if below != uri else uri.rpartition("/")[2]
