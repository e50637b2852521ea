"""A site that comes when the others have pooled their fingerprints plans as they have, and says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_federation import (
    LABELS,
    LocalFederation,
    in_threads,
    make_census,
    make_plans,
    make_settings,
    served,
    wait_until,
)

from demo.phantoms import Scanner, write_dataset
from nnunetv2.experiment_planning.federated_planning import PlanningOptions, plan_federated
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol.keys import CensusKey, CoarseKey, LateCensusKey, LatePlansKey, PlansKey
from nnunetv2.federated.protocol.messages import PlansReport

DATASETS = {"A": "Dataset501_A", "B": "Dataset502_B", "C": "Dataset503_C"}


@pytest.fixture
def federation(roots, tmp_path) -> Iterator[LocalFederation]:
    """Two sites, and a third one with data that nobody has invited yet."""
    for number, name in enumerate(DATASETS.values()):
        write_cases(roots["nnUNet_raw"] / name, num_train=2 + number, seed=number)
    with served(tmp_path / "federation", make_settings()) as federation:
        yield federation


def write_cases(folder: Path, *, num_train: int, seed: int) -> None:
    scanner = Scanner(spacing_mm=(3.0 + seed, 3.0, 3.0), intensities=(60, 95 + seed, 130), noise=0.2, bias=0.05)
    write_dataset(folder, scanner, num_train=num_train, num_test=0, seed=seed)


def plan(federation: LocalFederation, site: str, **options) -> str:
    federation.credential(site)
    return plan_federated(
        DATASETS[site],
        PlanningOptions(mode="ffe", num_processes=1, show_progress_bar=False, planner=options),
        credential_file=federation.state.store.folder / f"credential.{site}.json",
    )


def read(roots, site: str, name: str) -> dict:
    return json.loads((roots["nnUNet_preprocessed"] / DATASETS[site] / name).read_text())


def change_dataset(roots, site: str, **changes) -> None:
    path = roots["nnUNet_raw"] / DATASETS[site] / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def plan_all(federation: LocalFederation, *sites: str) -> None:
    for result in in_threads(*(lambda site=site: plan(federation, site) for site in sites)):
        assert result == "nnUNetPlans", result


def test_a_late_site_holds_the_plans_of_the_others(federation, roots, capsys):
    plan_all(federation, "A", "B")
    federation.coordinator.invite("C", "site", by="boss")
    capsys.readouterr()
    assert plan(federation, "C") == "nnUNetPlans"
    shown = capsys.readouterr().out
    assert "its own 4 cases are not part of the plans, which are made from 5 cases of the others" in shown
    assert "All sites hold the same plans, nnUNetPlans, made from 5 cases" in shown
    pooled = read(roots, "A", "dataset_fingerprint.json")
    assert read(roots, "C", "dataset_fingerprint.json") == pooled and len(pooled["spacings"]) == 5
    assert len(read(roots, "C", "dataset_fingerprint_local.json")["spacings"]) == 4
    assert {**read(roots, "C", "nnUNetPlans.json"), "dataset_name": ""} == {
        **read(roots, "A", "nnUNetPlans.json"),
        "dataset_name": "",
    }
    assert any("site C plans late" in line for line in federation.lines)
    assert any(
        "site C has planned late, and its plans go with those of the others" in line for line in federation.lines
    )
    recorded = {(event.kind, event.site, event.key) for event in federation.state.store.load_events()}
    assert ("contribution", "C", LateCensusKey("C")) in recorded
    assert ("closing", None, LatePlansKey("nnUNetPlans", "C")) in recorded


def test_whoever_repeats_the_command_gets_the_same_unless_what_was_pooled_has_changed(federation, roots):
    plan_all(federation, "A", "B")
    federation.coordinator.invite("C", "site", by="boss")
    before = {site: plan(federation, site) and read(roots, site, "nnUNetPlans.json") for site in "AC"}
    for site in "AC":
        write_cases(roots["nnUNet_raw"] / DATASETS[site], num_train=6, seed=9)
    plan(federation, "C")  # whose cases are in nothing
    assert read(roots, "C", "nnUNetPlans.json") == before["C"]
    assert len(read(roots, "C", "dataset_fingerprint_local.json")["spacings"]) == 6
    with pytest.raises(RefusedError, match="fingerprint/census is closed, and what site A sends now differs"):
        plan(federation, "A")
    assert read(roots, "A", "nnUNetPlans.json") == before["A"]


def test_a_late_site_that_does_not_fit_is_told_what_differs(federation, roots):
    plan_all(federation, "A", "B")
    federation.coordinator.invite("C", "site", by="boss")
    right = json.loads((roots["nnUNet_raw"] / DATASETS["C"] / "dataset.json").read_text())
    for changes, complaint in (
        ({"channel_names": {"0": "CT"}}, 'channel_names.0 is "MR" at A, B and "CT" at C'),
        ({"labels": {**right["labels"], "other": 9}}, "labels.other is absent .* 9 at C"),
    ):
        change_dataset(roots, "C", **{**right, **changes})
        with pytest.raises(RefusedError, match=complaint):
            plan(federation, "C")
    assert not (roots["nnUNet_preprocessed"] / DATASETS["C"]).exists()  # nothing was read or computed
    change_dataset(roots, "C", **right)
    with pytest.raises(RefusedError, match=r"the plans differ: plans\.configurations.* not the same at A, B and at C"):
        plan(federation, "C", overwrite_target_spacing=[9.0, 9.0, 9.0])
    assert plan(federation, "C") == "nnUNetPlans"


def test_while_the_census_is_open_a_new_site_is_an_ordinary_one(federation, roots):
    with federation.client("A") as first:
        first.contribute(CensusKey(), make_census())
    federation.coordinator.invite("C", "site", by="boss")
    assert federation.state.registry.get(CensusKey()).waiting_for == ("B", "C")


def test_a_site_that_comes_in_between_waits_and_says_for_whom(federation, roots, capsys):
    """The census is closed, the rest is not: the newcomer waits for the others, and needs nobody to wait for it."""
    with federation.client("A") as first, federation.client("B") as second:
        for client, num_cases in ((first, 2), (second, 3)):
            client.contribute(CensusKey(), census_of(roots, client.credential.site, num_cases))
    wait_until(lambda: federation.state.registry.is_closed(CensusKey()))
    federation.coordinator.invite("C", "site", by="boss")
    shown: list[str] = []

    def come_when_it_waits(site: str) -> str:
        wait_until(lambda: f"{CoarseKey()}: waiting for A, B" in "".join(shown))
        return plan(federation, site)

    def come_late() -> str:
        return plan(federation, "C")

    def listen() -> None:
        wait_until(lambda: shown.append(capsys.readouterr().out) or f"{CoarseKey()}: waiting for" in "".join(shown))

    results = in_threads(come_late, listen, *(lambda site=site: come_when_it_waits(site) for site in "AB"))
    assert [results[0], *results[2:]] == ["nnUNetPlans"] * 3, results
    assert read(roots, "C", "dataset_fingerprint.json") == read(roots, "A", "dataset_fingerprint.json")


def census_of(roots, site: str, num_cases: int):
    described = json.loads((roots["nnUNet_raw"] / DATASETS[site] / "dataset.json").read_text())
    return make_census(num_cases, labels=described["labels"]).model_copy(
        update={"channel_names": described["channel_names"]}
    )


# ------------------------------------------------------------------------------------------------ who may do what
def test_nobody_else_is_let_in_by_a_latecomers_door(tmp_path):
    with (
        served(tmp_path / "federation", make_settings()) as federation,
        federation.client("A") as a,
        federation.client("B") as b,
    ):
        for client in (a, b):
            client.contribute(CensusKey(), make_census())
            client.contribute(PlansKey("p"), PlansReport(plans=make_plans()))
        wait_until(lambda: federation.state.registry.is_closed(PlansKey("p")))
        with pytest.raises(RefusedError, match="does not take part"):
            a.contribute(LateCensusKey("B"), make_census())
        with pytest.raises(RefusedError, match="does not take part"):
            a.contribute(LatePlansKey("p", "B"), PlansReport(plans=make_plans()))


def test_a_site_that_was_not_shown_in_reads_nothing_of_the_fingerprint(tmp_path):
    with (
        served(tmp_path / "federation", make_settings()) as federation,
        federation.client("A") as a,
        federation.client("B") as b,
    ):
        for client in (a, b):
            client.contribute(CensusKey(), make_census())
        wait_until(lambda: federation.state.registry.is_closed(CensusKey()))
        federation.coordinator.invite("C", "site", by="boss")
        with federation.client("C") as late:
            with pytest.raises(RefusedError, match="does not take part"):
                late.result(CoarseKey())
            with pytest.raises(RefusedError, match="labels.liver is 1 at A, B and 2 at C"):
                late.exchange(LateCensusKey("C"), make_census(labels={**LABELS, "liver": 2}))
            with pytest.raises(RefusedError, match="does not take part"):
                late.result(CoarseKey())
            assert late.exchange(LateCensusKey("C"), make_census(77)).message.num_cases == 6
            assert late.run_state("r").registered == ()


def test_plans_cannot_be_compared_before_the_others_have(tmp_path):
    with (
        served(tmp_path / "federation", make_settings()) as federation,
        federation.client("A") as a,
        pytest.raises(RefusedError, match="cannot begin before plans/p is closed"),
    ):
        a.contribute(LatePlansKey("p", "A"), PlansReport(plans=make_plans()))


def test_a_late_site_has_a_network_of_its_own_where_all_have(tmp_path):
    def report(patch: int, spacing: float = 1.0) -> PlansReport:
        described = {"spacing": [spacing] * 3, "patch_size": [patch] * 3}
        return PlansReport(plans=make_plans(configurations={"3d_fullres": described}))

    settings = make_settings(networks="own")
    with served(tmp_path / "f", settings) as federation, federation.client("A") as a, federation.client("B") as b:
        for client, patch in ((a, 16), (b, 32)):
            client.contribute(PlansKey("own"), report(patch))
        agreed = a.result(PlansKey("own")).message
        federation.coordinator.invite("C", "site", by="boss")
        with federation.client("C") as late:
            assert late.exchange(LatePlansKey("own", "C"), report(64)).message == agreed
            with pytest.raises(RefusedError, match=r"3d_fullres.spacing\[0\] is not the same at A, B and at C"):
                late.exchange(LatePlansKey("own", "C"), report(64, 2.0))


def test_late_planning_outlasts_a_restart(tmp_path):
    folder = tmp_path / "federation"
    with served(folder, make_settings()) as federation, federation.client("A") as a, federation.client("B") as b:
        for client in (a, b):
            client.contribute(CensusKey(), make_census())
        wait_until(lambda: federation.state.registry.is_closed(CensusKey()))
        federation.coordinator.invite("C", "site", by="boss")
        with federation.client("C") as late:
            late.exchange(LateCensusKey("C"), make_census())
    assert Path(folder, "gatherings", "fingerprint", "admissions", "C", "result.safetensors").is_file()
    with served(folder, make_settings()) as federation:
        assert federation.state.registry.is_closed(LateCensusKey("C"))
        assert federation.coordinator.result(CoarseKey(), "C").waiting_for == ("A", "B")
