"""Show runs in Prefect: names, keys and tags that contain the full path, tables, pictures, links and events."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event

from natgrad.app.folder import RunFolder
from natgrad.schema.summary import summary_values
from natgrad.storage import Location, open_storage

__all__ = [
    "ANGLE_EXCEEDED",
    "StageProgressArtifacts",
    "alert",
    "full_path",
    "key_of",
    "report_link",
    "show_failure",
    "show_results",
    "show_table",
    "tag_of",
]

ANGLE_EXCEEDED = "natgrad.angle-exceeded"
"""Event of a run whose angle exceeds ``alert_angle``."""

_INTERVAL = 5.0
"""Seconds between updates of a progress bar, and until it appears."""


def full_path(out: Location) -> str:
    """Return the absolute path or URL of a run, by which Prefect names it."""
    return str(open_storage(out).absolute())


def tag_of(out: Location) -> str:
    """Return the tag of the flow runs of a run."""
    return f"run:{full_path(out)}"


def key_of(what: str, out: Location) -> str:
    """Return the key of an artifact: lower-case letters, digits and dashes, different for different paths.

    The last two parts of the path make it readable, and a digest of the complete path makes it unique.
    """
    path = full_path(out)
    readable = re.sub(r"[^a-z0-9]+", "-", "/".join(path.rsplit("/", 2)[-2:]).lower()).strip("-")
    return f"{what}-{readable or 'run'}-{hashlib.sha256(path.encode(errors='surrogateescape')).hexdigest()[:8]}"


def report_link(out: Location, report_url: str | None) -> str | None:
    """Return the address of the report of a run for a browser, or None if no web server is known to show it.

    Parameters
    ----------
    out : path
    report_url : str, optional
        FOLDER=URL, see `natgrad.app.options.LinkOptions`.
    """
    page = RunFolder.of(out).report
    if page.local_path is None:
        return str(page) if str(page).startswith(("http://", "https://")) else None
    if report_url is None:
        return None
    folder, _, url = report_url.partition("=")
    path = page.local_path.absolute()
    if not path.is_relative_to(Path(folder).absolute()):
        return None
    return f"{url.rstrip('/')}/{quote(path.relative_to(Path(folder).absolute()).as_posix())}"


def show_table(what: str, out: Location, summary: Mapping[str, Any]) -> None:
    """Create an artifact with the values of a summary."""
    create_table_artifact(
        table=[{"quantity": name, "value": value} for name, value in summary_values(summary).items()],
        key=key_of(what, out),
        description=f"{full_path(out)}: {what}",
    )


def show_results(what: str, out: Location, summary: Mapping[str, Any], report_url: str | None) -> None:
    """Create the artifacts of results: a page with a sentence, a picture and tables, and a link to the report."""
    link = report_link(out, report_url)
    create_markdown_artifact(
        results_markdown(full_path(out), summary, link), key_of(what, out), f"{full_path(out)}: {what}"
    )
    if link is not None:
        create_link_artifact(
            link=link,
            link_text=f"Report of {full_path(out)}",
            key=key_of("report", out),
            description=f"Interactive report, drawn from {summary['results']}",
        )


def show_failure(out: Location, parts: Mapping[str, Any]) -> None:
    """Create an artifact with an error and its remedy."""
    lines = [f"**{_plain(full_path(out))}**: {_plain(parts['what'])}"]
    lines += [f"- {name}: {_plain(parts[name])}" for name in ("where", "why", "do") if parts[name]]
    create_markdown_artifact("\n".join(lines), key_of("failed", out), f"{full_path(out)}: error and remedy")


def results_markdown(name: str, summary: Mapping[str, Any], link: str | None) -> str:
    """Return a page in Markdown with a sentence about a run, the course of its angle, and tables.

    Parameters
    ----------
    name : str
    summary : mapping
        JSON form of `natgrad.app.summaries.AnalysisSummary` and `natgrad.app.summaries.Report`.
    link : str, optional
        Address of the report.
    """
    parts = [f"# {_plain(name)}", _sentence(summary)]
    report = summary.get("report", "")
    parts.append(f"[Open the report]({link})" if link else f"Report: {_code(report)}")
    if summary.get("angle_course"):
        content = base64.b64encode(_picture(summary["angle_course"]).encode()).decode()
        # Prefect's new interface does not show pictures that a page contains, but it shows these characters.
        (line,) = summary_values({"angle_course": summary["angle_course"]}).values()
        parts.append(f"Median angle: {_code(line)}")
        parts.append(f"![Median angle in consecutive parts of the run](data:image/svg+xml;base64,{content})")
    worst = summary.get("worst_tensors") or []
    if worst:
        parts.append("## Tensors with the fewest effective updates")
        rows = [
            [
                _code(row["tensor"]),
                str(row["updates"]),
                f"{row['effective_share']:.1%}",
                f"{row['mean_angle']:.4g}",
                f"{row['max_angle']:.4g}",
            ]
            for row in worst
        ]
        header = ["tensor", "updates", "effective", "mean angle (rad)", "largest angle (rad)"]
        parts.append(_markdown_table(header, rows))
    parts.append("## All numbers")
    values = summary_values({k: v for k, v in summary.items() if k not in ("worst_tensors", "angle_course")})
    parts.append(_markdown_table(["quantity", "value"], [[_plain(k), _code(v)] for k, v in values.items()]))
    return "\n\n".join(parts) + "\n"


def _sentence(summary: Mapping[str, Any]) -> str:
    updates = sum(summary["status"].values())
    if not summary.get("angle"):
        return f"**{updates} updates**; no update has an angle (gradients: {_plain(summary['gradient_source'])})."
    share = summary["status"].get("effective", 0) / updates
    median = summary["angle"][1]
    text = f"**{share:.1%} of {updates} updates are effective.** The median angle is {median:.4g} rad"
    return f"{text} ({math.degrees(median):.0f}°), with gradients that are {_plain(summary['gradient_source'])}."


def _picture(course: Sequence[float | None]) -> str:
    """Return a vector graphic of the course of the angle, from 0 to pi, with a line at pi/2."""
    width, height = 640, 160
    points: list[list[str]] = [[]]
    for index, angle in enumerate(course):
        if angle is None:
            points.append([])
            continue
        points[-1].append(f"{width * (index + 0.5) / len(course):.1f},{height * (1 - angle / math.pi):.1f}")
    lines = "".join(
        f'<polyline points="{" ".join(part)}" fill="none" stroke="#0072b2" stroke-width="2"/>'
        for part in points
        if part
    )
    middle = height / 2
    half = f'<line x2="{width}" y1="{middle}" y2="{middle}" stroke="#c8374a" stroke-dasharray="6 4"/>'
    text = 'font-family="sans-serif" font-size="12" fill="#808080"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 20}" width="{width}">'
        f'<rect width="{width}" height="{height}" fill="none" stroke="#808080"/>{half}{lines}'
        f'<text x="4" y="{middle - 4}" {text}>π/2: effective below</text>'
        f'<text x="4" y="{height + 15}" {text}>median angle (0 to π) over the run</text></svg>'
    )


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: Any) -> str:
    """Return a text without the characters that Markdown or HTML would interpret."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", escape(str(text), quote=False))
    return escaped.replace("\n", " ")


def _code(text: Any) -> str:
    """Return a text as code in a cell of a table."""
    shown = str(text).replace("\n", " ").replace("`", "'").replace("|", r"\|")
    return f"`{shown}`" if shown else ""


# Progress and events -----------------------------------------------------------------------------------------


class StageProgressArtifacts:
    """Progress bars on the page of a flow run, one for each stage. They only appear if processing takes some time.

    Parameters
    ----------
    out : path
        Folder of the run.
    interval : float
        Seconds between updates, and until a progress bar appears.
    """

    def __init__(self, out: Location, interval: float = _INTERVAL) -> None:
        self.out, self.interval = out, interval
        self.artifacts: dict[str, UUID] = {}
        self.updated: dict[str, float] = {}
        self.started = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show the number of items of a stage that are done."""
        now, ended = time.monotonic(), done == total and stage in self.artifacts
        if not ended and now - self.updated.get(stage, self.started) < self.interval:
            return
        self.updated[stage], percent = now, 100 * done / max(total, 1)
        if stage in self.artifacts:
            update_progress_artifact(self.artifacts[stage], percent)
            return
        description = f"{full_path(self.out)}: {stage}, {total} in total"
        # Prefect annotates its functions for both synchronous and asynchronous callers.
        made = create_progress_artifact(percent, key_of(stage, self.out), description)
        self.artifacts[stage] = cast(UUID, made)


def alert(out: Location, summary: Mapping[str, Any], threshold: float | None) -> bool:
    """Send the event `ANGLE_EXCEEDED` if the median angle of the last part of a run exceeds a threshold.

    An automation of Prefect can act on this event.

    Parameters
    ----------
    out : path
    summary : mapping
        JSON form of `natgrad.app.summaries.AnalysisSummary`.
    threshold : float, optional
        Angle in radians.

    Returns
    -------
    bool
        Whether the event was sent.
    """
    known = [angle for angle in summary.get("angle_course") or () if angle is not None]
    if threshold is None or not known or known[-1] <= threshold:
        return False
    path = full_path(out)
    emit_event(
        ANGLE_EXCEEDED,
        resource={"prefect.resource.id": f"natgrad.run.{path}", "prefect.resource.name": path},
        payload={"angle": known[-1], "threshold": threshold, "worst_tensors": summary["worst_tensors"]},
    )
    return True
