"""Write what a federation is doing as figures for Prometheus, in its text format (version 0.0.4).

    GET /metrics    with the token of an observer: Authorization: Bearer <name>.<secret>

Names begin with `nnunet_fed_`, units are seconds and bytes, and labels hold names of sites, runs, roles and kinds only.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.federated.coordinator.dashboard.overview import Lookout, Overview

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES_OF_SITE = ("invited", "active", "revoked")
STATES_OF_RUN = ("running", "paused", "stopped", "complete")


@dataclass(frozen=True)
class Figure:
    """One figure with its samples."""

    name: str
    kind: str
    """gauge, counter or summary."""
    help: str
    samples: Iterable[tuple[Mapping[str, str], float]]
    """(labels, value)."""
    suffix: str = ""
    """Of the samples' names, such as _sum; the figure is announced without it."""


def encode(figures: Iterable[Figure]) -> str:
    """Return figures in the text format. Those of one name follow each other and are announced once."""
    lines, announced = [], set()
    for figure in figures:
        name = f"nnunet_fed_{figure.name}"
        if name not in announced:
            announced.add(name)
            lines += [f"# HELP {name} {figure.help}", f"# TYPE {name} {figure.kind}"]
        lines += [
            f"{name}{figure.suffix}{_encode_labels(labels)} {_encode_value(value)}" for labels, value in figure.samples
        ]
    return "\n".join(lines) + "\n"


def _encode_labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    escaped = {
        name: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for name, value in labels.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"


def _encode_value(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(float(value))


# ---------------------------------------------------------------------------------------------------------- figures
def figures(overview: Overview, lookout: Lookout, *, refusals: Mapping[str, int], sessions: int) -> Iterator[Figure]:
    """Yield every figure of a coordinator.

    Args:
        overview: What the page shows, too.
        lookout: What knows the rest.
        refusals: Requests that were refused since the start, by code.
        sessions: Browsers that are logged in.
    """
    yield from _of_sites(overview)
    yield from _of_runs(overview)
    yield from _of_log(lookout)
    yield from _of_coordinator(overview, lookout)
    yield Figure(
        "requests_refused_total",
        "counter",
        "Requests that were refused since the start, by code.",
        [({"code": code}, count) for code, count in sorted(refusals.items())],
    )
    yield Figure("page_sessions", "gauge", "Browsers that are logged in to the page.", [({}, sessions)])


def _of_sites(overview: Overview) -> Iterator[Figure]:
    states = Counter(site.state for site in overview.sites)
    activities = Counter(site.activity for site in overview.sites if site.state == "active")
    yield Figure("sites", "gauge", "Sites by state.", [({"state": state}, states[state]) for state in STATES_OF_SITE])
    yield Figure(
        "sites_active",
        "gauge",
        "Sites that have joined, by what they are doing.",
        [({"activity": name}, count) for name, count in sorted(activities.items())],
    )
    yield Figure(
        "site_last_seen_age_seconds",
        "gauge",
        "Time since the last request of a site.",
        [
            ({"site": site.site}, max(0.0, overview.time - site.last_seen))
            for site in overview.sites
            if site.last_seen is not None
        ],
    )
    yield Figure(
        "site_received_bytes_total",
        "counter",
        "Bytes that the coordinator received from a site.",
        [({"site": site.site}, site.bytes_received) for site in overview.sites],
    )
    yield Figure(
        "site_sent_bytes_total",
        "counter",
        "Bytes that the coordinator sent to a site.",
        [({"site": site.site}, site.bytes_sent) for site in overview.sites],
    )


def _of_runs(overview: Overview) -> Iterator[Figure]:
    runs = overview.runs
    meetings = [*overview.meetings, *(run.meeting for run in runs if run.meeting is not None)]
    begun = Counter(meeting.kind for meeting in meetings if meeting.contributed)
    yield Figure(
        "run_state",
        "gauge",
        "1 for the state that a run is in.",
        [({"run": run.run, "state": state}, run.state == state) for run in runs for state in STATES_OF_RUN],
    )
    yield Figure(
        "rounds_closed_total",
        "counter",
        "Rounds of a run that are closed.",
        [({"run": run.run}, run.rounds_closed) for run in runs],
    )
    yield Figure(
        "rounds_planned",
        "gauge",
        "Rounds that a run is going to have.",
        [({"run": run.run}, run.num_rounds) for run in runs if run.num_rounds is not None],
    )
    yield Figure(
        "round_seconds",
        "gauge",
        "Median duration of the last rounds.",
        [({"run": run.run}, run.round_s) for run in runs if run.round_s is not None],
    )
    yield Figure(
        "open_gatherings",
        "gauge",
        "Gatherings that somebody has contributed to and that have no result.",
        [({"kind": kind}, count) for kind, count in sorted(begun.items())],
    )
    yield Figure(
        "waiting_for_sites",
        "gauge",
        "Sites whose contribution is waited for.",
        [({"gathering": meeting.key}, len(meeting.waiting_for)) for meeting in meetings],
    )
    yield Figure(
        "waiting_seconds",
        "gauge",
        "How long they have been waited for.",
        [
            ({"gathering": meeting.key}, max(0.0, overview.time - meeting.since))
            for meeting in meetings
            if meeting.since is not None
        ],
    )
    yield Figure(
        "pooled_dice",
        "gauge",
        "Moving average of the aggregates' Dice over all sites' voxels.",
        [({"run": run.run}, run.ema_dice) for run in runs if run.ema_dice is not None],
    )


def _of_log(lookout: Lookout) -> Iterator[Figure]:
    counts = lookout.tail.counts
    for name, kind, text in (
        ("failures_total", "failure", "Failures that a site has reported."),
        ("contributions_refused_total", "refusal", "Contributions of a site that were refused."),
        ("late_total", "late", "Contributions of a site that came too late to count."),
    ):
        yield Figure(
            name,
            "counter",
            text,
            [({"site": site or "none"}, count) for (found, site), count in sorted(counts.items()) if found == kind],
        )
    yield Figure("log_lines_total", "counter", "Lines of the audit log.", [({}, lookout.tail.number)])


def _of_coordinator(overview: Overview, lookout: Lookout) -> Iterator[Figure]:
    closer, uploads = lookout.coordinator.closer, lookout.coordinator.uploads.in_progress()
    text = "Time that it took to compute results since the start."
    yield Figure("closing_seconds", "summary", text, [({}, closer.seconds_closing)], suffix="_sum")
    yield Figure("closing_seconds", "summary", text, [({}, closer.num_closings)], suffix="_count")
    yield Figure("uploads_in_progress", "gauge", "Uploads that are being received.", [({}, len(uploads))])
    yield Figure("upload_bytes", "gauge", "Bytes that are here of these uploads.", [({}, sum(uploads.values()))])
    yield Figure(
        "disk_free_bytes", "gauge", "Free space where the federation's folder is.", [({}, overview.health.disk_free)]
    )
    yield Figure(
        "start_time_seconds",
        "gauge",
        "When the coordinator started, in seconds since 1970.",
        [({}, overview.health.started)],
    )
    yield Figure("cpu_seconds_total", "counter", "CPU time of the coordinator.", [({}, time.process_time())])
    yield Figure(
        "memory_bytes", "gauge", "Memory of the coordinator that is in use.", [({}, used) for used in memory_used()]
    )


def memory_used() -> list[int]:
    """Return the resident memory of this process in bytes; nothing where the system does not tell."""
    if sys.platform != "linux":
        return []
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return [pages * os.sysconf("SC_PAGE_SIZE")]
