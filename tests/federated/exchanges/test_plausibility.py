"""What cannot be right is refused before anything is made of it; what honest sites send is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fake_federation import (
    RUN,
    in_threads,
    make_census,
    make_plans,
    make_registration,
    make_settings,
    make_weights,
    outcomes_in_threads,
    served,
    wait_until,
)

from nnunetv2.experiment_planning import site_cases
from nnunetv2.federated.aggregation import fingerprint_statistics
from nnunetv2.federated.aggregation.outermost import Channel
from nnunetv2.federated.errors import FederationError, RefusedError, StatisticsError
from nnunetv2.federated.exchanges.plausibility import (
    Geometry,
    check_corrected,
    check_count,
    check_geometry,
    check_moments,
    describe_factor,
    factors_to_nearest,
    largest_validation,
)
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.keys import CensusKey, CoarseKey, InitialKey, RegistrationKey, RoundKey, ValidationKey


def draw(kind: str, number: int = 20_000) -> np.ndarray:
    rng = np.random.default_rng(3)
    values = {
        "normal": rng.normal(100, 20, number),
        "skewed": rng.exponential(300, number) - 1000,
        "constant": np.full(number, 7.25),
        "two": rng.choice([0.0, 1e6], number),
        "outlier": np.append(rng.normal(50, 1, number), [30_000.0, -2e6]),
        "tiny": rng.normal(0, 1e-30, number),
        "few": rng.normal(0, 1, 30),
    }
    return values[kind].astype(np.float32)


@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize("kind", ["normal", "skewed", "constant", "two", "outlier", "tiny", "few"])
def test_what_an_honest_site_sends_is_plausible(kind, hide):
    values, counts = np.unique(draw(kind), return_counts=True)
    check_moments(
        fingerprint_statistics.Moments.of(values, counts),
        Channel.of(values, counts, hide=hide).coarse_histogram(),
        is_whole=not hide,
    )


@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"mean": 1e30, "m2": 1e60}, "mean"),
        ({"mean": -100.0}, "mean"),
        ({"mean": 110.0}, "mean"),
        ({"m2": 1e60}, "deviation"),
        ({"m2": 0.0}, "deviation"),
        ({"m2": 20_000 * 30.0**2}, "deviation"),
        ({"count": 3}, "different numbers of voxels"),
    ],
)
def test_moments_must_be_those_of_the_histogram(change, complaint, hide):
    values, counts = np.unique(draw("normal"), return_counts=True)
    true = fingerprint_statistics.Moments.of(values, counts)
    told = messages.ChannelMoments(**{"count": true.count, "mean": true.mean, "m2": true.m2, **change})
    with pytest.raises(StatisticsError, match=complaint):
        check_moments(told, Channel.of(values, counts, hide=hide).coarse_histogram(), is_whole=not hide)


def test_a_site_cannot_outvote_the_others_with_voxels_that_nobody_samples():
    check_count(10**8, num_cases=3, num_all_cases=3)
    check_count(10**7, num_cases=1, num_all_cases=100)  # by an extractor that draws ten times as many
    for count in (10**7 + 1, 2**53):
        with pytest.raises(StatisticsError, match="more voxels than are sampled"):
            check_count(count, num_cases=1, num_all_cases=100)


def test_a_histogram_comes_again_with_fewer_hidden_values_or_not_at_all():
    values, counts = np.unique(draw("normal"), return_counts=True)
    channel = Channel.of(values, counts, hide=True)
    first = channel.coarse_histogram()
    lowest, highest = np.flatnonzero(first)[[0, -1]]
    shown = channel.showing([np.flatnonzero(channel.whole)[-1]])
    again = shown.showing([np.flatnonzero(channel.whole)[0]])
    check_corrected(first, first, shown.coarse_histogram())
    check_corrected(first, shown.coarse_histogram(), again.coarse_histogram())
    assert (again.lowest, again.highest) == (0, 0) and channel.lowest > 0
    middle = int(np.argmax(first))
    for taken_from, number in ((middle, 1), (lowest, channel.lowest + 1), (highest, channel.highest + 1)):
        moved = first.copy()
        moved[middle - 1] += number
        moved[taken_from] -= number
        with pytest.raises(StatisticsError, match="comes again has other values"):
            check_corrected(first, first, moved)
    with pytest.raises(StatisticsError):
        check_corrected(first, first, first + (first > 0))


@pytest.mark.parametrize(("spacing", "size"), [((0.0000001, 1, 1), 0.5), ((1, 1, 1e30), 0.5), ((1, 1, 1), 1.5)])
def test_lengths_that_are_none_are_refused(spacing, size):
    check_geometry([(1.0, 0.5, 0.5), (999.0, 1.0, 1.0)], [0.5, 1.0])
    with pytest.raises(StatisticsError):
        check_geometry([(1.0, 1.0, 1.0), spacing], [0.5, size])


def geometry(spacing, shape=(200, 300, 300)) -> Geometry:
    return Geometry.of([spacing] * 3, [shape] * 3)


@pytest.mark.parametrize(
    ("other", "factor"),
    [
        (geometry((0.001, 0.001, 0.001)), 0.001),
        (geometry((1000.0, 1000.0, 1000.0)), 1000.0),
        (geometry((0.1, 0.1, 0.1)), 0.1),
        (geometry((0.001, 1.0, 1.0)), 0.001),
        (geometry((5.0, 0.5, 0.5), (40, 600, 600)), 1.0),
        (geometry((1.0, 1.0, 1.0), (35, 50, 30)), 1.0),
        (geometry((3.0, 2.0, 2.0), (200, 300, 300)), 3.0),
    ],
    ids=["micro", "metres", "centimetres", "one axis", "thick slices", "cropped", "larger"],
)
def test_other_units_show_in_voxels_and_extents_alike(other, factor):
    assert other.factor_to(geometry((1.0, 1.0, 1.0))) == pytest.approx(factor, rel=1e-6)


def test_of_three_sites_the_one_that_is_alone_is_odd():
    found = factors_to_nearest({"A": geometry((1, 1, 1)), "B": geometry((1.1, 1, 1)), "M": geometry((1e-3,) * 3)})
    assert describe_factor(found["M"]) == "about 1000 times smaller"
    assert all(0.9 < found[site] < 1.2 for site in "AB")
    assert factors_to_nearest({"A": geometry((1, 1, 1))}) == {"A": 1.0}


def test_validated_voxels_are_bounded_by_what_batches_hold():
    plans = {
        "configurations": {
            "2d": {"batch_size": 10, "patch_size": [8, 8]},
            "x": {"inherits_from": "2d", "batch_size": 2},
        }
    }
    assert largest_validation(plans, "2d", 3) == 10 * 3 * 10 * 64
    assert largest_validation(plans, "x", None) == 10 * 50 * 2 * 64
    huge = {"batch_size": 2, "patch_size": [10**300] * 3}
    for broken in ({"inherits_from": "x"}, {"batch_size": "n"}, {}, [1], "text", None, huge):
        assert largest_validation({"configurations": {"x": broken}}, "x", 3) == math.inf
    assert largest_validation({}, "x", 3) == math.inf


# ------------------------------------------------------------------------------------------------- at the coordinator
def summary_of(values: np.ndarray, spacing=(1.0, 1.0, 1.0), **changes) -> messages.CoarseSummary:
    moments = fingerprint_statistics.Moments.of(values)
    told = messages.ChannelMoments(**{"count": moments.count, "mean": moments.mean, "m2": moments.m2, **changes})
    return messages.CoarseSummary(
        spacings=(spacing,) * 3,
        shapes=((200, 300, 300),) * 3,
        relative_sizes=(1.0,) * 3,
        promotes_to_float64=False,
        moments=(told,),
    )


def contribute_all(federation, spacings: dict) -> dict:
    """Let sites contribute their summaries; return what each is answered."""
    values = draw("normal")

    def take_part(site):
        with federation.client(site) as client:
            client.exchange(CensusKey(), make_census(3))
            return client.exchange(
                CoarseKey(),
                summary_of(values, spacings[site]),
                {"coarse.0": fingerprint_statistics.coarse_histogram(values)},
            ).message

    return dict(zip(spacings, outcomes_in_threads(*(lambda site=site: take_part(site) for site in spacings))))


def test_a_mean_beside_the_histogram_is_refused_and_no_figure_is_told(tmp_path):
    with (
        served(tmp_path / "federation", make_settings()) as federation,
        federation.client("A") as client,
        federation.client("B") as other,
    ):
        in_threads(*(lambda one=one: one.exchange(CensusKey(), make_census(3)) for one in (client, other)))
        values = draw("normal")
        with pytest.raises(RefusedError, match="channel 0: the mean does not lie where"):
            client.contribute(
                CoarseKey(),
                summary_of(values, mean=1e30, m2=1e60),
                {"coarse.0": fingerprint_statistics.coarse_histogram(values)},
            )
        assert any("cannot be right" in line and "1e+30" not in line for line in federation.lines)


def test_a_site_with_other_units_is_named_and_nothing_is_pooled(tmp_path):
    with served(tmp_path / "federation", make_settings(sites=("A", "B", "M"))) as federation:
        answers = contribute_all(federation, {"A": (1.0, 1.0, 1.0), "B": (1.2, 1.0, 1.0), "M": (0.001, 0.001, 0.001)})
        for answer in answers.values():
            assert isinstance(answer, RefusedError) and answer.code == "datasets_differ"
            assert "those of site M are about 1000 times smaller" in str(answer) and "site A" not in str(answer)
        mended = contribute_all(federation, {"M": (1.0, 1.0, 1.0)})["M"]
        assert isinstance(mended, messages.WantedBins)


def test_an_odd_site_is_told_to_the_operator_alone(tmp_path):
    with served(tmp_path / "federation", make_settings()) as federation:
        answers = contribute_all(federation, {"A": (1.0, 1.0, 1.0), "B": (0.1, 0.1, 0.1)})
        assert all(isinstance(answer, messages.WantedBins) for answer in answers.values())
        wait_until(
            lambda: any(
                "site B are about 10 times smaller than" in line and "0.1 x 0.1 x 0.1 mm" in line
                for line in federation.lines
            )
        )


def test_no_more_cases_are_trained_with_than_were_planned_with(tmp_path):
    with (
        served(tmp_path / "federation", make_settings()) as federation,
        federation.client("A") as client,
        federation.client("B") as other,
    ):
        in_threads(*(lambda one=one: one.exchange(CensusKey(), make_census(3)) for one in (client, other)))
        with pytest.raises(RefusedError, match="registers 100000 training cases, and had 3 cases in all"):
            client.contribute(RegistrationKey(RUN), make_registration(100_000))
        client.contribute(RegistrationKey(RUN), make_registration(2))
        other.contribute(RegistrationKey(RUN), make_registration(3))
        wait_until(
            lambda: any(
                f"run {RUN}: A 2 training cases (40%), B 3 training cases (60%); sites count by their "
                "training cases" in line
                for line in federation.lines
            )
        )


def test_a_site_cannot_decide_which_aggregate_is_best_by_claiming_voxels(tmp_path):
    plans = make_plans(configurations={"3d_fullres": {"patch_size": [16, 16, 16], "batch_size": 2}})
    with (
        served(tmp_path / "federation", make_settings(num_val_iterations_per_epoch=4)) as federation,
        federation.client("A") as a,
        federation.client("B") as b,
    ):
        registration = make_registration(plans=plans)
        in_threads(*(lambda one=one: one.exchange(RegistrationKey(RUN), registration) for one in (a, b)))
        for key, tensors in ((InitialKey(RUN), (make_weights(0), {})), (RoundKey(RUN, 0), (make_weights(1),) * 2)):
            answers = in_threads(
                *(
                    lambda key=key, one=one, own=own: one.exchange(key, messages.Update(), own).message
                    for one, own in zip((a, b), tensors)
                )
            )
            assert all(isinstance(answer, messages.Aggregate) for answer in answers), answers
        with pytest.raises(RefusedError, match="more voxels were validated than"):
            a.contribute(ValidationKey(RUN, 0), messages.Validation(tp=(2.0**53,), fp=(0,), fn=(0,)))
        a.contribute(ValidationKey(RUN, 0), messages.Validation(tp=(4 * 2 * 16.0**3,), fp=(0,), fn=(0,)))


# ---------------------------------------------------------------------------------------------------------- at a site
def pooled_with(own: messages.CoarseSummary, spacing) -> messages.PooledFingerprint:
    """Return what a site gets of which others have five cases of this spacing."""
    return messages.PooledFingerprint(
        num_cases=8,
        fingerprint={
            "spacings": [list(one) for one in own.spacings] + [list(spacing)] * 5,
            "shapes_after_crop": [list(one) for one in own.shapes] + [[200, 300, 300]] * 5,
        },
    )


def test_a_site_hears_of_other_units_before_it_preprocesses(capsys):
    own = summary_of(draw("few"), (0.1, 0.1, 0.1))
    site_cases.compare_geometry(own.spacings, own.shapes, pooled_with(own, (1.0, 1.0, 1.0)))
    assert (
        "The scans of this site are about 10 times smaller than those of the others: median spacing 0.1 x 0.1 x "
        "0.1 mm here, 1 x 1 x 1 mm there" in capsys.readouterr().out
    )
    with pytest.raises(FederationError, match="cannot all have spacings in millimetres"):
        site_cases.compare_geometry(own.spacings, own.shapes, pooled_with(own, (100.0, 100.0, 100.0)))
    for others in (pooled_with(own, (0.12, 0.1, 0.1)), pooled_with(own, (0.1, 0.1, 0.1))):
        site_cases.compare_geometry(own.spacings, own.shapes, others)
    assert capsys.readouterr().out == ""
