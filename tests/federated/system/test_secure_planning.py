"""Sites plan from a fingerprint that they have added up behind masks: the plans are those of a federation in clear."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_federation import (
    LocalFederation,
    coordinator_process,
    in_threads,
    make_census,
    make_client,
    make_settings,
    outcomes_in_threads,
    served,
    wait_until,
)
from lying_coordinator import Seeds, cancels, lying

from demo.phantoms import Scanner, write_dataset
from nnunetv2.experiment_planning.dataset_fingerprint.case_sample import CaseSample
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.federated_planning import PlanningOptions, plan_federated
from nnunetv2.experiment_planning.secure_planning import SecurePooling
from nnunetv2.experiment_planning.site_cases import make_census as census_of
from nnunetv2.federated.aggregation.integer_moments import integer_sums, to_words
from nnunetv2.federated.aggregation.outermost import Channel
from nnunetv2.federated.coordinator.storage.quotas import has_name_of_its_own
from nnunetv2.federated.errors import FederationError, NotAllowedError, RefusedError
from nnunetv2.federated.exchanges.steps.secure_sum import UploadStep
from nnunetv2.federated.privacy.disclosure import allow_list_of
from nnunetv2.federated.protocol import keys
from nnunetv2.federated.protocol.api import Secure
from nnunetv2.federated.protocol.messages import ChannelMoments, CoarseSummary
from nnunetv2.federated.site.identity import secure_folder
from nnunetv2.federated.site.planned_documents import planning_documents

SITES = ("A", "B", "C")
DATASETS = {site: f"Dataset50{number}_{site}" for number, site in enumerate("ABCD", 1)}


@pytest.fixture
def datasets(roots) -> None:
    """Three sites with scanners of their own."""
    for number, site in enumerate(SITES):
        write_cases(roots, site, num_train=2 + number, seed=number)


def write_cases(roots, site: str, *, num_train: int, seed: int) -> None:
    scanner = Scanner(spacing_mm=(3.140625 + seed, 3.0, 3.0), intensities=(60, 95 + seed, 130), noise=0.2, bias=0.05)
    write_dataset(roots["nnUNet_raw"] / DATASETS[site], scanner, num_train=num_train, num_test=0, seed=seed)


@contextmanager
def federation_of(folder: Path, geometry: str | None, sites=SITES) -> Iterator[LocalFederation]:
    secure = None if geometry is None else Secure(k=3, geometry=geometry)
    with served(folder, make_settings(sites=sites, secure=secure)) as federation:
        yield federation


def plan(federation: LocalFederation, site: str, share_extrema: bool = False, **options) -> str:
    federation.credential(site)
    return plan_federated(
        DATASETS[site],
        PlanningOptions(
            mode="ffe", num_processes=1, show_progress_bar=False, share_extrema=share_extrema, planner=options
        ),
        credential_file=federation.credential_file(site),
    )


def outcomes(federation: LocalFederation, **options) -> list[object]:
    return outcomes_in_threads(*(lambda site=site: plan(federation, site, **options) for site in SITES))


def plan_all(federation: LocalFederation, **options) -> None:
    for result in outcomes(federation, **options):
        if isinstance(result, BaseException):
            raise result


def read(roots, site: str, name: str) -> dict:
    return json.loads((roots["nnUNet_preprocessed"] / DATASETS[site] / name).read_text())


# ------------------------------------------------------------------------------------------------- the same plans
def test_plans_are_those_of_a_federation_in_clear(datasets, roots, tmp_path):
    with federation_of(tmp_path / "clear", None) as federation:
        plan_all(federation)
    expected = {site: read(roots, site, "nnUNetPlans.json") for site in SITES}
    fingerprint = read(roots, "A", "dataset_fingerprint.json")
    for geometry in ("list", "quantiles"):
        with federation_of(tmp_path / geometry, geometry) as federation:
            plan_all(federation)
            nothing_of_a_site_is_stored(federation, roots, geometry)
        assert {site: read(roots, site, "nnUNetPlans.json") for site in SITES} == expected
        found = read(roots, "B", "dataset_fingerprint.json")
        if geometry == "list":
            assert found == fingerprint
        else:
            assert found["geometry_statistics"]["num_cases"] == 9 and "spacings" not in found
            for name in ("median_relative_size_after_cropping", "foreground_intensity_properties_per_channel"):
                assert found[name] == fingerprint[name]


@pytest.mark.parametrize("geometry", [None, "list", "quantiles"])
def test_sites_plan_networks_of_their_own_under_names_of_their_own(datasets, roots, tmp_path, geometry):
    secure = None if geometry is None else Secure(k=3, geometry=geometry)
    with served(tmp_path / "federation", make_settings(sites=SITES, secure=secure, networks="own")) as federation:
        names = {site: f"nnUNetPlans_{site}" for site in SITES}
        done = outcomes_in_threads(
            *(lambda site=site: plan(federation, site, overwrite_plans_name=names[site]) for site in SITES)
        )
        assert done == list(names.values())
        closed = {str(event.key) for event in federation.state.store.load_events("closing")}
        meetings = {key for key in closed if key.startswith("plans/")}
        assert meetings and all(key == "plans/own" or key.startswith("plans/own/sums/") for key in meetings)
        # What a site planned for stays there, and is the same again if it plans anew for another GPU.
        assert not [path for path, content in kept_by(federation).items() if b"patch_size" in content]
        assert plan(federation, "A", gpu_memory_target_in_gb=2.0, overwrite_plans_name="small") == "small"
        late = plan_with_other_spacing(federation, geometry)
        assert isinstance(late, RefusedError) and late.code in ("already_closed", "plans_differ"), late


def plan_with_other_spacing(federation: LocalFederation, geometry: str | None) -> object:
    """Return the refusal of plans that disagree where the data decide."""
    with pytest.raises((RefusedError, FederationError)) as info:
        plan(federation, "B", overwrite_target_spacing=[9.0, 3.0, 3.0], overwrite_plans_name="other")
    return info.value


def kept_by(federation: LocalFederation) -> dict[str, bytes]:
    """Return every file of the coordinator, without what the sites keep in the same folder for this test."""
    folder = federation.state.store.folder
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith("credential.")
    }


def nothing_of_a_site_is_stored(federation: LocalFederation, roots, geometry: str) -> None:
    """Look through every byte that the coordinator keeps for what describes a single site."""
    files = kept_by(federation)
    assert sum(b"masked_update" in content for content in files.values()) >= 3 * 3
    for site in SITES:
        local = read(roots, site, "dataset_fingerprint_local.json")["foreground_intensity_properties_per_channel"]["0"]
        for name in ("mean", "std", "percentile_00_5"):
            for needle in (repr(local[name]).encode(), struct.pack("<d", local[name])):
                assert not [path for path, content in files.items() if needle in content], (site, name)
    # Of the site whose spacing is no percentile of all: in the list of all cases, and only there.
    local = read(roots, "C", "dataset_fingerprint_local.json")
    for values in (local["spacings"][0], local["shapes_after_crop"][0]):
        needle = json.dumps(values, separators=(",", ":")).encode()
        found = {path for path, content in files.items() if needle in content}
        assert found == ({"gatherings/fingerprint/sums/2/result.safetensors"} if geometry == "list" else set())
    assert not [path for path, content in files.items() if struct.pack("<3d", *local["spacings"][0]) in content]


# ------------------------------------------------------------------------------------------- in memory, and quickly
class Extractor:
    """Stands for a dataset whose cases are here already."""

    dataset_name = "Dataset001_Memory"

    def __init__(self, folder: Path, number: int, seed: int) -> None:
        self.output_folder = str(folder)
        self.dataset_json = {"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "CT"}}
        rng = np.random.default_rng(seed)
        self.samples = [
            CaseSample(
                (20 + seed, 300, 310 + case),
                (5.0, 0.7 + seed / 64, 0.75),
                0.5,
                [np.unique(rng.normal(100 * seed, 40, 900).astype(np.float32), return_counts=True)],
            )
            for case in range(number)
        ]

    def count_cases(self) -> int:
        return len(self.samples)

    def num_samples_per_case(self, num_cases: int) -> int:
        return 900

    def sample_cases(self, num_samples: int) -> list[CaseSample]:
        return self.samples

    @staticmethod
    def compute_fingerprint(samples):
        return {}


class Killed(BaseException):
    """Stands for kill -9: nothing of the software goes on."""


class DyingTransport:
    """A transport whose site is killed before or after its n-th request."""

    def __init__(self, client, dies_at: int, *, after: bool) -> None:
        self._client, self._left, self._after = client, dies_at, after

    def __getattr__(self, name):
        method = getattr(self._client, name)

        def call(*args, **kwargs):
            self._left -= 1
            if self._left == 0 and not self._after:
                raise Killed
            result = method(*args, **kwargs)
            if self._left == 0:
                raise Killed
            return result

        return call


def pool(federation: LocalFederation, site: str, extractor: Extractor, wrap=lambda client: client) -> int:
    credential = federation.credential(site)
    with federation.client(site) as client:
        pooling = SecurePooling(
            wrap(client), federation.coordinator.settings.secure, credential, federation.credential_file(site)
        )
        return pooling.take_part(extractor, pooling.with_keys(census_of(extractor, share_extrema=False)), {})


def pool_all(federation: LocalFederation, extractors) -> list[object]:
    """Pool at all sites at the same time."""
    return in_threads(*(lambda site=site: pool(federation, site, extractors[site]) for site in SITES))


def make_extractors(folder: Path) -> dict[str, Extractor]:
    return {site: Extractor(folder / f"data.{site}", 2 + number, number) for number, site in enumerate(SITES)}


def written(extractors) -> set[str]:
    return {(Path(one.output_folder) / "dataset_fingerprint.json").read_text() for one in extractors.values()}


def test_no_histogram_and_no_moment_of_a_site_is_stored(tmp_path):
    with federation_of(tmp_path / "federation", "list") as federation:
        extractors = make_extractors(tmp_path)
        assert pool_all(federation, extractors) == [9, 9, 9]
        with federation.state.documents.result(keys.FingerprintSumKey(0)) as document:
            (steps,) = document.message.question.steps
        files = kept_by(federation).values()
    for extractor in extractors.values():
        values, counts = (np.concatenate(one) for one in zip(*(sample.intensities[0] for sample in extractor.samples)))
        histogram = Channel.of(values, counts, hide=True).coarse_histogram()
        used = np.flatnonzero(histogram)
        runs = used[:-1][np.diff(used) == 1]  # pairs of bins, both with values
        assert len(runs) > 10
        needles = [histogram[first : first + 2].tobytes() for first in runs if histogram[first : first + 2].min() > 1]
        needles += [word.tobytes() for word in to_words(*integer_sums(values, counts, steps)) if 2**20 < word < 2**63]
        assert len(needles) > 5
        assert not [needle for needle in needles if any(needle in content for content in files)]


def test_a_site_that_is_killed_at_any_request_ends_with_the_fingerprint_of_all(tmp_path):
    """Before the request, or after it was answered; until a run needs no further request."""
    fingerprints, dies_at, was_killed = set(), 0, True
    while was_killed:
        dies_at += 1
        was_killed = killed_once(tmp_path / str(dies_at), dies_at, fingerprints)
    assert dies_at > 15 and len(fingerprints) == 1


def killed_once(folder: Path, dies_at: int, fingerprints: set[str]) -> bool:
    """Kill a site at a request, start it again, and tell whether it got as far as that."""
    folder.mkdir()
    extractors, kills = make_extractors(folder), []
    with federation_of(folder / "federation", "list") as federation:

        def die_and_return() -> int:
            try:
                return pool(
                    federation,
                    "A",
                    extractors["A"],
                    lambda client: DyingTransport(client, dies_at, after=dies_at % 2 == 0),
                )
            except Killed:
                kills.append(dies_at)
                return pool(federation, "A", extractors["A"])

        results = in_threads(
            die_and_return, *(lambda site=site: pool(federation, site, extractors[site]) for site in ("B", "C"))
        )
    assert results == [9, 9, 9], results
    fingerprints |= written(extractors)
    return bool(kills)


def test_a_site_that_has_planned_before_only_receives(tmp_path):
    with federation_of(tmp_path / "federation", "list") as federation:
        extractors = make_extractors(tmp_path)
        assert pool_all(federation, extractors) == [9, 9, 9]
        (Path(extractors["A"].output_folder) / "dataset_fingerprint.json").unlink()
        assert pool(federation, "A", extractors["A"]) == 9  # its key was deleted; another one is not needed
        assert len(written(extractors)) == 1
        folder = secure_folder("test", "fingerprint", federation.credential_file("A"))
        assert not list(folder.rglob("*.pem"))
        shutil.rmtree(folder)  # as on another machine
        assert pool(federation, "A", extractors["A"]) == 9


def test_a_site_that_has_lost_its_key_in_between_is_refused(tmp_path):
    with federation_of(tmp_path / "federation", "list") as federation:
        extractors = make_extractors(tmp_path)

        def die(client):
            return DyingTransport(client, 3, after=False)

        results = outcomes_in_threads(
            lambda: catch(lambda: pool(federation, "A", extractors["A"], die)),
            *(lambda s=s: catch(lambda: pool(federation, s, extractors[s], die)) for s in ("B", "C")),
        )
        assert all(isinstance(result, Killed) for result in results)
        shutil.rmtree(secure_folder("test", "fingerprint", federation.credential_file("A")))
        with pytest.raises(FederationError, match="this site's key is not the one that it gave to the others.*Bring"):
            pool(federation, "A", extractors["A"])


def catch(function):
    try:
        return function()
    except BaseException as error:  # noqa: BLE001  looked at by the caller
        return error


# --------------------------------------------------------------------------------------------------------- refusals
def test_extrema_cannot_be_shared_behind_masks(roots, tmp_path, datasets):
    with federation_of(tmp_path / "federation", "list") as federation:
        with pytest.raises(RefusedError, match="a smallest voxel is no sum.*nothing was sent. Leave it out"):
            plan(federation, "A", share_extrema=True)
        assert not list(federation.state.registry)
        client = federation.client("A")
        with pytest.raises(RefusedError, match="site A wants to share.*without --share_extrema"):
            client.exchange(keys.CensusKey(), make_census().model_copy(update={"share_extrema": True}))


def test_the_coordinator_takes_no_statistics_in_clear(tmp_path):
    with federation_of(tmp_path / "federation", "list") as federation:
        with pytest.raises(RefusedError, match="has no key with which to mask"):
            federation.client("A").exchange(keys.CensusKey(), make_census())
        for site in SITES:
            add_census(federation, site)
        wait_until(lambda: federation.state.registry.is_closed(keys.CensusKey()))
        summary = CoarseSummary(
            spacings=[(1, 1, 1)],
            shapes=[(1, 1, 1)],
            relative_sizes=[1],
            moments=[ChannelMoments(count=0, mean=0, m2=0)],
            promotes_to_float64=False,
        )
        histograms = {"coarse.0": np.zeros(65536, np.int64)}
        for site in SITES:
            client = federation.client(site)
            with pytest.raises(FederationError, match="in clear|takes none that it can read"):
                client.contribute(keys.CoarseKey(), summary, histograms)


def add_census(federation: LocalFederation, site: str) -> None:
    credential = federation.credential(site)
    client = federation.client(site)
    pooling = SecurePooling(client, Secure(), credential, federation.credential_file(site))
    client.contribute(keys.CensusKey(), pooling.with_keys(make_census()))


@pytest.mark.parametrize(
    ("lie", "complaint"),
    [
        (lambda census: {"keys": {site: census.keys[site] for site in "AB"}}, "names 2 sites .* it takes 3"),
        (lambda census: {"keys": {**{s: census.keys[s] for s in "BC"}, "D": census.keys["A"]}}, "this one among them"),
        (lambda census: {"keys": {**census.keys, "C": census.keys["B"]}}, "identity|not signed"),
        (lambda census: {"num_cases": 1}, "counts 1 cases of all sites"),
    ],
    ids=["too few sites", "without this one", "one site twice", "fewer cases"],
)
def test_a_census_that_cannot_be_is_refused_before_anything_is_masked(lie, complaint, tmp_path):
    class Lying:
        def __init__(self, client):
            self._client = client

        def __getattr__(self, name):
            return getattr(self._client, name)

        def exchange(self, key, *args, **kwargs):
            document = self._client.exchange(key, *args, **kwargs)
            assert key == keys.CensusKey(), "nothing else is sent"
            return SimpleNamespace(message=document.message.model_copy(update=lie(document.message)))

    with federation_of(tmp_path / "federation", "list") as federation:
        for site in ("B", "C"):
            add_census(federation, site)
        with pytest.raises(FederationError, match=complaint):
            pool(federation, "A", make_extractors(tmp_path)["A"], Lying)
        assert not federation.state.registry.has_begun("fingerprint/sums/0/uploads")


@pytest.mark.parametrize("is_lie", [False, True])
def test_a_number_of_cases_that_some_alone_are_told_leaves_no_sum(tmp_path, monkeypatch, is_lie):
    """Else those others would sample next to nothing, and the sum would be that of one site."""
    seeds, upload_key = Seeds(monkeypatch), keys.FingerprintSumUploadKey(0)
    monkeypatch.setattr(UploadStep, "check", lambda *_: None)
    with lying(tmp_path) as liar:
        if is_lie:
            liar.about(
                keys.CensusKey(),
                lambda site, census, tensors: (
                    (census.model_copy(update={"num_cases": 10**7}), tensors) if site != "A" else None
                ),
            )
        extractors = make_extractors(tmp_path)
        clients = {site: liar.federation.client(site) for site in SITES}

        def stop() -> None:
            wait_until(lambda: len(liar.received(upload_key)) == len(SITES))
            for client in clients.values():
                client.close()

        outcomes_in_threads(
            *(
                lambda site=site, client=client: pool(liar.federation, site, extractors[site], lambda _: client)
                for site, client in clients.items()
            ),
            stop,
        )
        (words,) = seeds.sums(liar, upload_key).values()
        assert cancels(words) is not is_lie


def test_two_sites_cannot_add_up_anything(tmp_path):
    with federation_of(tmp_path / "federation", "list", sites=("A", "B")) as federation:
        for site in ("A", "B"):
            add_census(federation, site)
        with pytest.raises(RefusedError, match="secure aggregation needs 3. Wait for the others"):
            federation.client("A").result(keys.CensusKey())


# ------------------------------------------------------------------------------------------- late, again, otherwise
class EveryCase(ExperimentPlanner):
    """A planner of a user that reads the lists."""

    def determine_fullres_target_spacing(self):
        return np.min(self.dataset_fingerprint["spacings"], axis=0)


@pytest.mark.parametrize("geometry", ["list", "quantiles"])
def test_a_late_site_receives_only(geometry, datasets, roots, tmp_path, capsys):
    write_cases(roots, "D", num_train=3, seed=7)
    with federation_of(tmp_path / "federation", geometry) as federation:
        plan_all(federation)
        federation.coordinator.invite("D", "site", by="boss")
        capsys.readouterr()
        assert plan(federation, "D") == "nnUNetPlans"
        assert "its own 3 cases are not part of the plans, which are made from 9 cases" in capsys.readouterr().out
        contributed = [str(exchange.key) for exchange in federation.state.registry if "D" in exchange.contributions]
    assert contributed == ["fingerprint/admissions/D", "plans/nnUNetPlans/admissions/D"]
    fingerprint = read(roots, "D", "dataset_fingerprint.json")
    assert fingerprint == read(roots, "A", "dataset_fingerprint.json")
    plans = read(roots, "D", "nnUNetPlans.json")
    assert {**plans, "dataset_name": ""} == {**read(roots, "A", "nnUNetPlans.json"), "dataset_name": ""}


def test_other_plans_add_up_shapes_at_their_own_spacing(datasets, roots, tmp_path):
    with federation_of(tmp_path / "federation", "quantiles") as federation:
        plan_all(federation)
        plan_all(federation)  # again: everything is known
        options = {"overwrite_plans_name": "Fine", "overwrite_target_spacing": (2.0, 2.0, 2.0)}
        plan_all(federation, **options)
        shapes = read(roots, "B", "dataset_fingerprint.json")["geometry_statistics"]["resampled_shapes"]
        assert [entry["spacing"] for entry in shapes] == [[4.140625, 3.0, 3.0], [2.0, 2.0, 2.0]]
        # One site alone plans for another spacing, and is named.
        found = outcomes_in_threads(
            lambda: plan(federation, "A", overwrite_plans_name="Odd", overwrite_target_spacing=(2.0, 2.0, 2.5)),
            *(lambda site=site: plan(federation, site, **{**options, "overwrite_plans_name": "Odd"}) for site in "BC"),
        )
        assert all("different target spacings: A for others than most" in str(error) for error in found), found
        for error in outcomes(federation, experiment_planner_class=EveryCase, overwrite_plans_name="Every"):
            assert "no spacings" in str(error) and "--geometry list" in str(error)


def test_an_allow_list_of_the_manifest_lets_planning_through(tmp_path, monkeypatch):
    documents = planning_documents(
        {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}}, 4, is_masked=True
    )
    allowed = tmp_path / "allow.json"
    allowed.write_text(allow_list_of(documents, coordinator=None).model_dump_json())
    monkeypatch.setenv("nnUNet_fed_allow", str(allowed))
    with federation_of(tmp_path / "federation", "list") as federation:
        extractors = make_extractors(tmp_path)
        assert pool_all(federation, extractors) == [9, 9, 9]
    content = json.loads(allowed.read_text())
    del content["documents"]["unmasking_shares"]
    allowed.write_text(json.dumps(content))
    with (
        federation_of(tmp_path / "other", "list") as federation,
        pytest.raises(NotAllowedError, match="a message of kind unmasking_shares is not allowed to leave"),
    ):
        raise next(one for one in pool_all(federation, make_extractors(tmp_path)) if isinstance(one, Exception))


# ------------------------------------------------------------------------------------ coordinators that end, or hoard
def test_a_coordinator_that_is_killed_again_and_again_opens_the_same_sums(tmp_path):
    expected = tmp_path / "expected"
    expected.mkdir()
    extractors = make_extractors(expected)
    with federation_of(expected / "federation", "list") as federation:
        assert pool_all(federation, extractors) == [9, 9, 9]
    undisturbed = written(extractors)

    extractors, rng = make_extractors(tmp_path), np.random.default_rng(1)
    with coordinator_process(tmp_path / "federation", "--sites", *SITES, "--secure") as coordinator:
        credentials = coordinator.credentials()

        def take_part(site: str) -> int:
            with make_client(credentials[site]) as client:
                credential_file = tmp_path / f"{site}.json"
                pooling = SecurePooling(client, client.settings().secure, credentials[site], credential_file)
                census = pooling.with_keys(census_of(extractors[site], share_extrema=False))
                return pooling.take_part(extractors[site], census, {})

        def kill_whenever_something_new_begins() -> int:
            gatherings = tmp_path / "federation" / "gatherings" / "fingerprint" / "sums"
            for name in ("0/uploads", "0/survivors", "1"):
                wait_until((gatherings / name).exists)
                time.sleep(rng.uniform(0, 0.1))
                coordinator.kill()
                coordinator.start()
                kills.append(name)
            return len(kills)

        kills: list[str] = []
        *pooled, _ = in_threads(
            *(lambda site=site: take_part(site) for site in SITES), kill_whenever_something_new_begins
        )
    assert pooled == [9, 9, 9], pooled
    assert len(kills) == 3 and written(extractors) == undisturbed


def test_names_of_plans_are_no_way_to_fill_the_disk():
    assert has_name_of_its_own(keys.ShapeSumUploadKey("anything", 0))
    assert not has_name_of_its_own(keys.FingerprintSumUploadKey(0))
