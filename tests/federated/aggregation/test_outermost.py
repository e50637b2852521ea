"""The smallest and the largest voxel of a site cannot be told from its histograms, and percentiles stay exact."""

from __future__ import annotations

import numpy as np
import pytest
from fake_federation import in_threads, make_census, make_settings, served

from nnunetv2.experiment_planning import federated_planning
from nnunetv2.experiment_planning.dataset_fingerprint.case_sample import CaseSample
from nnunetv2.federated.aggregation import fingerprint_statistics
from nnunetv2.federated.aggregation.outermost import Channel, hidden_of
from nnunetv2.federated.errors import FederationError, StatisticsError
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.keys import CensusKey, CoarseKey, FineKey

PERCENTILES = ("percentile_00_5", "median", "percentile_99_5")


def weighted(values) -> tuple[np.ndarray, np.ndarray]:
    return np.unique(np.asarray(values, np.float32), return_counts=True)


def integers(low: int, high: int, number: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high + 1, number).astype(np.float32)


def bell(low: int, high: int, number: int, seed: int = 1) -> np.ndarray:
    """Return whole numbers from low to high, few of them near the ends."""
    drawn = np.random.default_rng(seed).normal((low + high) / 2, (high - low) / 8, number - 2)
    return np.append(np.clip(np.rint(drawn), low + 1, high - 1), [low, high]).astype(np.float32)


def bins_of(values) -> list[int]:
    return np.flatnonzero(fingerprint_statistics.coarse_histogram(np.asarray(values, np.float32))).tolist()


# ------------------------------------------------------------------------------------------------------ one histogram
@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        (integers(17, 243, 40_000), 0.0, 256.0),
        (integers(-137, 241, 40_000), -160.0, 256.0),
        (integers(-893, 1411, 400_000), -1024.0, 1536.0),
        (integers(0, 200, 40_000), -32.0, 224.0),
        (np.random.default_rng(0).normal(0, 1e-3, 40_000).astype(np.float32), None, None),
        (np.append(integers(90, 110, 40_000), np.float32(30_000)), None, 32_768.0),
    ],
)
def test_the_outermost_bins_hold_round_numbers_beyond_all_values(values, low, high):
    histogram = Channel.of(*weighted(values), hide=True).coarse_histogram()
    assert histogram.sum() == len(values) and histogram.min() >= 0
    ends = np.flatnonzero(histogram)[[0, -1]]
    for end, bound, own in ((ends[0], low, values.min()), (ends[1], high, values.max())):
        assert end not in bins_of([own])
        assert histogram[end] >= hidden_of(len(values)) >= 10
        if bound is not None:
            assert [end] == bins_of([bound])
    low, high = fingerprint_statistics.outermost_bounds(histogram)
    assert low < values.min() and high > values.max()


def test_that_many_values_are_hidden_is_a_matter_of_their_number():
    assert [hidden_of(number) for number in (0, 399, 400, 4_000, 100_000, 1_000_000)] == [0, 0, 1, 10, 10, 100]


@pytest.mark.parametrize("values", [[], [0.0] * 5000])
def test_there_may_be_nothing_to_hide(values):
    histogram = Channel.of(*weighted(values), hide=True).coarse_histogram()
    assert np.array_equal(histogram, fingerprint_statistics.coarse_histogram(np.asarray(values, np.float32)))


def test_values_near_the_largest_of_float32_have_finite_bounds():
    values = np.linspace(-3.4e38, 3.4e38, 5000, dtype=np.float32)
    histogram = Channel.of(*weighted(values), hide=True).coarse_histogram()
    assert all(map(np.isfinite, fingerprint_statistics.outermost_bounds(histogram)))


@pytest.mark.parametrize("seed", range(20))
def test_what_is_shown_changes_no_rank_inside_the_wanted_bins(seed):
    rng = np.random.default_rng(seed)
    channel = Channel.of(*weighted(rng.normal(rng.normal(0, 100), rng.uniform(1, 100), 20_000)), hide=True)
    wanted = [int(number) for number in rng.choice(np.flatnonzero(channel.whole), 3)]
    shown = channel.showing(wanted)
    before, after = np.cumsum(shown.whole), np.cumsum(shown.coarse_histogram())
    for number in wanted:
        assert shown.whole[number] == shown.coarse_histogram()[number]
        assert before[number] == after[number]
    assert shown.lowest <= channel.lowest and shown.highest <= channel.highest


def test_no_more_is_shown_than_a_wanted_bin_takes():
    values = np.arange(1, 2001, dtype=np.float32)
    counts = np.where(values <= 1000, 1000, 1)  # of those above, there is one each
    channel = Channel.of(values, counts, hide=True)
    assert (channel.lowest, channel.highest) == (100, 100)
    assert channel.showing(bins_of([500.0, 1500.0])) is channel
    for wanted, hidden in ((1950.0, 10), (1991.0, 1), (2000.0, 0)):
        shown = channel.showing(bins_of([wanted]))
        assert (shown.lowest, shown.highest) == (100, hidden)


def test_bins_that_hold_no_wanted_rank_are_not_looked_into():
    channel = Channel.of(*weighted(bell(17, 243, 40_000)), hide=True)
    channel.check_wanted_bins(bins_of([130.0]), others=100)  # the median
    for value in (17.0, 243.0, 100.0):
        with pytest.raises(StatisticsError, match="none of the percentiles of all sites can lie"):
            channel.check_wanted_bins(bins_of([value]), others=100)
    channel.check_wanted_bins(bins_of([17.0]), others=40_000)  # if all the others are below


# ----------------------------------------------------------------------------------------------------- planning
class Extractor:
    """A site's dataset, of which every case is a list of intensities."""

    dataset_name = "Dataset001_Fake"

    def __init__(self, folder, *cases) -> None:
        self.output_folder = folder
        self.cases = cases
        self.dataset_json = {"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "CT"}}

    def count_cases(self) -> int:
        return len(self.cases)

    def num_samples_per_case(self, num_cases: int) -> int:
        return max(map(len, self.cases))

    def sample_cases(self, num_samples: int) -> list[CaseSample]:
        return [CaseSample((8, 9, 10), (1.0, 1.0, 1.0), 0.5, [weighted(values)]) for values in self.cases]

    @staticmethod
    def compute_fingerprint(samples):
        return {}


def pool(tmp_path, values: dict[str, np.ndarray], *, share_extrema: bool = False):
    """Pool the fingerprints of sites that have one case each; return the results and all that was contributed."""
    with served(tmp_path / "federation", make_settings(sites=tuple(values))) as federation:

        def take_part(site):
            extractor = Extractor(tmp_path, values[site])
            census = federated_planning.make_census(extractor, share_extrema=share_extrema)
            with federation.client(site) as client:
                return federated_planning._take_part(client, extractor, census)

        results = in_threads(*(lambda site=site: take_part(site) for site in values))
        archive, sent = federation.state.documents, {}
        for key in (CoarseKey(), FineKey(), *map(FineKey, range(1, 9))):
            for site in values if archive.is_closed(key) else ():
                with archive.contribution(key, site) as document:
                    sent[key, site] = document.message, {name: document.read(name) for name in document.specs}
        assert archive.pooled_fingerprint() == results[0].fingerprint
    return results, sent


SPREAD = {
    "alike": ((100, 20), (101, 21)),
    "apart": ((60, 5), (900, 50)),
    "touching": ((100, 20), (150, 20)),
    "one inside": ((100, 50), (101, 1)),
    "three": ((60, 5), (900, 50), (-300, 3)),
    "far": ((1e-3, 1e-4), (1e6, 1e5), (0, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("spread", SPREAD.values(), ids=SPREAD)
@pytest.mark.parametrize("numbers", [(4000, 4000, 4000), (5000, 25, 7001), (39, 8001, 200)])
def test_percentiles_are_exact_whatever_has_to_be_shown(tmp_path, spread, numbers):
    rng = np.random.default_rng(len(numbers))
    values = {
        site: rng.normal(mean, std, number).astype(np.float32)
        for site, (mean, std), number in zip("ABC", spread, numbers)
    }
    results, _ = pool(tmp_path, values)
    properties = results[0].fingerprint["foreground_intensity_properties_per_channel"]["0"]
    everything = np.concatenate(list(values.values()))
    assert [properties[name] for name in PERCENTILES] == np.percentile(everything, (0.5, 50, 99.5)).tolist()
    assert properties["min"] <= everything.min() and properties["max"] >= everything.max()
    assert all(result == results[0] for result in results)


def test_sites_that_are_alike_tell_neither_end(tmp_path):
    values = {"A": bell(17, 243, 40_000), "B": bell(15, 240, 40_000, seed=2)}
    results, sent = pool(tmp_path, values)
    assert FineKey(1) not in {key for key, _ in sent}
    for site, own in values.items():
        coarse = sent[CoarseKey(), site][1]["coarse.0"]
        told = set(np.flatnonzero(coarse)) | set(sent[FineKey(), site][0].bins[0])
        assert not told & set(bins_of([own.min(), own.max()]))
    properties = results[0].fingerprint["foreground_intensity_properties_per_channel"]["0"]
    assert (properties["min"], properties["max"]) == pytest.approx((0.0, 256.0), rel=0.01)


def test_sites_that_lie_apart_tell_the_ends_that_the_median_is_made_of_and_no_other(tmp_path, capsys):
    values = {"A": bell(50, 90, 4000), "B": bell(300, 700, 4000, seed=2)}
    _, sent = pool(tmp_path, values)
    ends = {"A": (values["A"].max(), values["A"].min()), "B": (values["B"].min(), values["B"].max())}
    for site, (told, hidden) in ends.items():
        last = max(key for key, name in sent if name == site and getattr(sent[key, name][0], "corrected", ()))
        used = np.flatnonzero(sent[last, site][1]["coarse.0"])
        assert set(bins_of([told])) <= set(used) and not set(bins_of([hidden])) & set(used)
    assert "lies among this site's outermost values, in channel 0" in capsys.readouterr().out


def test_who_shares_its_extrema_counts_all_values_where_they_are(tmp_path):
    values = {"A": integers(17, 243, 4000), "B": integers(15, 240, 4000, seed=2)}
    results, sent = pool(tmp_path, values, share_extrema=True)
    assert np.array_equal(sent[CoarseKey(), "A"][1]["coarse.0"], fingerprint_statistics.coarse_histogram(values["A"]))
    properties = results[0].fingerprint["foreground_intensity_properties_per_channel"]["0"]
    assert (properties["min"], properties["max"]) == (15.0, 243.0)


class Curious:
    """A coordinator that asks for whatever bins it likes, again and again."""

    def __init__(self, bins) -> None:
        self.bins = bins
        self.sent = []

    def exchange(self, key, message, tensors=None):
        self.sent.append((key, tensors))
        answer = messages.PooledCensus(num_cases=2) if key == CensusKey() else messages.WantedBins(bins=self.bins)
        return type("Document", (), {"message": answer})


def test_a_coordinator_does_not_learn_the_ends_by_asking_for_them(tmp_path):
    values = bell(17, 243, 40_000)
    curious = Curious((tuple(bins_of([17.0, 243.0])),))
    extractor = Extractor(tmp_path, values, values[:10_000])
    with pytest.raises(StatisticsError, match="nothing more is sent"):
        federated_planning._take_part(curious, extractor, make_census(2))
    assert [key for key, _ in curious.sent] == [CensusKey(), CoarseKey()]


def test_a_site_does_not_look_again_and_again(tmp_path):
    curious = Curious((tuple(bins_of([130.0])),))
    with pytest.raises(FederationError, match="the 21th time"):
        federated_planning._take_part(curious, Extractor(tmp_path, integers(17, 243, 4000)), make_census(1))
    assert len(curious.sent) == 22
