"""Export the state of a federation as Prometheus metrics, in the text format (version 0.0.4).

    GET /metrics    with the token of an observer: Authorization: Bearer <name>.<secret>

Names begin with `nnunet_fed_`, units are seconds and bytes, and labels hold names of sites, runs, roles and kinds only.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from nnunetv2.federated.coordinator.dashboard.audit_tail import LogTail
from nnunetv2.federated.coordinator.dashboard.overview import Overview
from nnunetv2.federated.coordinator.service import Coordinator

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "nnunet_fed_"
STATES_OF_SITE = ("invited", "active", "revoked")
STATES_OF_RUN = ("running", "paused", "stopped", "complete")

Samples = Iterable[tuple[Mapping[str, str], float]]
"""Pairs of (labels, value); all of one metric have the same labels."""


def exposition(collector: Collector) -> str:
    """Return the metrics of a collector in the text format."""
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


class FederationCollector(Collector):
    """The metrics of a coordinator at one moment.

    Args:
        overview: The same that the page shows.
        tail: The counts of the audit log.
        refusals: Requests that were refused since the start, by code.
        sessions: Browsers that are logged in.
    """

    def __init__(
        self, overview: Overview, coordinator: Coordinator, tail: LogTail, *, refusals: Mapping[str, int], sessions: int
    ) -> None:
        self._overview = overview
        self._coordinator = coordinator
        self._tail = tail
        self._refusals = refusals
        self._sessions = sessions

    def describe(self) -> list[Metric]:
        """Return nothing: the registry of one request need not check for duplicates."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        yield from _of_sites(self._overview)
        yield from _of_runs(self._overview)
        yield from _of_log(self._tail)
        yield from _of_coordinator(self._overview, self._coordinator)
        yield _counter(
            "requests_refused_total",
            "Requests that were refused since the start, by code.",
            [({"code": code}, count) for code, count in sorted(self._refusals.items())],
        )
        yield _gauge("page_sessions", "Browsers that are logged in to the page.", [({}, self._sessions)])


def _gauge(name: str, text: str, samples: Samples) -> Metric:
    return _filled(GaugeMetricFamily(PREFIX + name, text), name, samples)


def _counter(name: str, text: str, samples: Samples) -> Metric:
    return _filled(CounterMetricFamily(PREFIX + name, text), name, samples)


def _filled(metric: Metric, name: str, samples: Samples) -> Metric:
    for labels, value in samples:
        metric.add_sample(PREFIX + name, dict(labels), value)
    return metric


def _of_sites(overview: Overview) -> Iterator[Metric]:
    states: Counter[str] = Counter(site.state for site in overview.sites)
    activities = Counter(site.activity for site in overview.sites if site.state == "active")
    yield _gauge("sites", "Sites by state.", [({"state": state}, states[state]) for state in STATES_OF_SITE])
    yield _gauge(
        "sites_active",
        "Sites that have joined, by what they are doing.",
        [({"activity": name}, count) for name, count in sorted(activities.items())],
    )
    yield _gauge(
        "site_last_seen_age_seconds",
        "Time since the last request of a site.",
        [
            ({"site": site.site}, max(0.0, overview.time - site.last_seen))
            for site in overview.sites
            if site.last_seen is not None
        ],
    )
    yield _counter(
        "site_received_bytes_total",
        "Bytes that the coordinator received from a site.",
        [({"site": site.site}, site.bytes_received) for site in overview.sites],
    )
    yield _counter(
        "site_sent_bytes_total",
        "Bytes that the coordinator sent to a site.",
        [({"site": site.site}, site.bytes_sent) for site in overview.sites],
    )


def _of_runs(overview: Overview) -> Iterator[Metric]:
    runs = overview.runs
    meetings = [*overview.meetings, *(run.meeting for run in runs if run.meeting is not None)]
    begun = Counter(meeting.kind for meeting in meetings if meeting.contributed)
    yield _gauge(
        "run_state",
        "1 for the state that a run is in.",
        [({"run": run.run, "state": state}, run.state == state) for run in runs for state in STATES_OF_RUN],
    )
    yield _counter(
        "rounds_closed_total",
        "Rounds of a run that are closed.",
        [({"run": run.run}, run.rounds_closed) for run in runs],
    )
    yield _gauge(
        "rounds_planned",
        "Rounds that a run is going to have.",
        [({"run": run.run}, run.num_rounds) for run in runs if run.num_rounds is not None],
    )
    yield _gauge(
        "round_seconds",
        "Median duration of the last rounds.",
        [({"run": run.run}, run.round_s) for run in runs if run.round_s is not None],
    )
    yield _gauge(
        "open_gatherings",
        "Gatherings that somebody has contributed to and that have no result.",
        [({"kind": kind}, count) for kind, count in sorted(begun.items())],
    )
    yield _gauge(
        "waiting_for_sites",
        "Sites whose contribution is waited for.",
        [({"gathering": meeting.key}, len(meeting.waiting_for)) for meeting in meetings],
    )
    yield _gauge(
        "waiting_seconds",
        "How long they have been waited for.",
        [
            ({"gathering": meeting.key}, max(0.0, overview.time - meeting.since))
            for meeting in meetings
            if meeting.since is not None
        ],
    )
    yield _gauge(
        "pooled_dice",
        "Moving average of the aggregates' Dice over all sites' voxels.",
        [({"run": run.run}, run.ema_dice) for run in runs if run.ema_dice is not None],
    )


def _of_log(tail: LogTail) -> Iterator[Metric]:
    counts = tail.counts
    for name, kind, text in (
        ("failures_total", "failure", "Failures that a site has reported."),
        ("contributions_refused_total", "refusal", "Contributions of a site that were refused."),
        ("late_total", "late", "Contributions of a site that came too late to count."),
    ):
        yield _counter(
            name,
            text,
            [({"site": site or "none"}, count) for (found, site), count in sorted(counts.items()) if found == kind],
        )
    yield _counter("log_lines_total", "Lines of the audit log.", [({}, tail.number)])


def _of_coordinator(overview: Overview, coordinator: Coordinator) -> Iterator[Metric]:
    worker, uploads = coordinator.worker, coordinator.uploads.in_progress()
    yield SummaryMetricFamily(
        PREFIX + "closing_seconds",
        "Time that it took to compute results since the start.",
        count_value=worker.num_closings,
        sum_value=worker.seconds_closing,
    )
    yield _gauge("uploads_in_progress", "Uploads that are being received.", [({}, len(uploads))])
    yield _gauge("upload_bytes", "Bytes that are here of these uploads.", [({}, sum(uploads.values()))])
    yield _gauge("disk_free_bytes", "Free space where the federation's folder is.", [({}, overview.health.disk_free)])
    yield _gauge(
        "start_time_seconds", "When the coordinator started, in seconds since 1970.", [({}, overview.health.started)]
    )
    yield _counter("cpu_seconds_total", "CPU time of the coordinator.", [({}, time.process_time())])
    yield _gauge("memory_bytes", "Memory of the coordinator that is in use.", [({}, used) for used in memory_used()])


def memory_used() -> list[int]:
    """Return the resident memory of this process in bytes.

    Nothing where the system does not tell.
    """
    if sys.platform != "linux":
        return []
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return [pages * os.sysconf("SC_PAGE_SIZE")]
