"""The smallest and largest voxel of a site stay there, whatever else its plans say, and nobody notices."""

from __future__ import annotations

import json

import pytest
from fake_federation import RUN, in_threads, make_plans, make_registration, make_settings, served, train, wait_until

from nnunetv2.federated.commands.manifest import describe
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.outlook import foresee_model
from nnunetv2.federated.exchanges.steps.plans import agree_on_plans
from nnunetv2.federated.exchanges.steps.registration import match_registrations
from nnunetv2.federated.privacy.disclosure import Disclosure
from nnunetv2.federated.privacy.plans_redaction import without_extrema, without_own_statistics
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.keys import AdmissionKey, PlansKey, RegistrationKey

CHANNEL = {
    "max": 3071.0,
    "mean": 91.5,
    "median": 88.0,
    "min": -1024.0,
    "percentile_00_5": -12.0,
    "percentile_99_5": 240.0,
    "std": 40.25,
}


def with_intensities(**changes: float) -> dict:
    return make_plans(foreground_intensity_properties_per_channel={"0": {**CHANNEL, **changes}})


def test_percentiles_stand_where_extrema_were():
    plans = with_intensities()
    assert without_extrema(plans) == with_intensities(min=-12.0, max=240.0)
    assert plans == with_intensities(), "what was given stays"
    assert without_extrema(without_extrema(plans)) == without_extrema(plans)
    assert list(without_extrema(plans)) == list(plans)


@pytest.mark.parametrize(
    ("plans", "expected"),
    [
        (
            {"foreground_intensity_properties_by_modality": {"0": CHANNEL}},
            {"foreground_intensity_properties_by_modality": {"0": {**CHANNEL, "min": -12.0, "max": 240.0}}},
        ),
        (
            {"foreground_intensity_properties_per_channel": {"0": {"min": 1.0, "max": 2.0, "mean": 1.5}}},
            {"foreground_intensity_properties_per_channel": {"0": {"mean": 1.5}}},
        ),
        ({"foreground_intensity_properties_per_channel": None}, {"foreground_intensity_properties_per_channel": None}),
        (
            {"foreground_intensity_properties_per_channel": {"0": 3}, "min": 3},
            {"foreground_intensity_properties_per_channel": {"0": 3}, "min": 3},
        ),
    ],
)
def test_other_plans_are_understood_too(plans, expected):
    assert without_extrema(plans) == expected


def test_plans_are_compared_without_extrema():
    """Of sites with different versions, some send them."""
    digests = {
        agree_on_plans({"A": with_intensities(min=low), "B": without_extrema(with_intensities())}).digest
        for low in (-1024.0, -3.0)
    }
    assert len(digests) == 1
    with pytest.raises(RefusedError, match=r"channel.0.mean is not the same at A and at B"):
        agree_on_plans({"A": with_intensities(), "B": with_intensities(mean=92.0)})


def test_a_registration_holds_no_extrema():
    torch = pytest.importorskip("torch")
    from nnunetv2.training.nnUNetTrainer.variants.federated.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
    from nnunetv2.training.nnUNetTrainer.variants.federated.registration import describe_training

    registration = describe_training(
        torch.nn.Linear(2, 1),
        plans=with_intensities(),
        configuration="3d_fullres",
        fold=0,
        trainer=nnUNetTrainerFedAvg,
        dataset_json={
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "liver": 1},
            "file_ending": ".nii.gz",
            "name": "secret",
            "numTraining": 3,
            "dataset": {"case_1": {"images": ["/home/x.nii.gz"]}},
        },
        num_training_cases=3,
        mirroring_axes=(0,),
        requires_equal_plans=False,
    )
    text = registration.model_dump_json()
    assert not [word for word in ("3071", "-1024", "secret", "case_1", "/home") if word in text]
    lines = "\n".join(describe([Disclosure(when="", message=registration, passed_on="")], None))
    assert '    plans.dataset_name: "Dataset001_Fake"\n' in lines
    assert '"median": 88.0, "min": -12.0' in lines


@pytest.mark.parametrize("is_late", [False, True])
def test_a_run_that_was_registered_with_extrema_goes_on_without(tmp_path, is_late):
    """As a site does that is upgraded in the middle of a run."""
    sites = ("A", "B", "C") if is_late else ("A", "B")
    with served(tmp_path / "federation", make_settings(sites=sites, num_epochs=9)) as federation:
        with federation.client("A") as a, federation.client("B") as b:
            in_threads(
                *(
                    lambda c=client: c.contribute(RegistrationKey(RUN), make_registration(plans=with_intensities()))
                    for client in (a, b)
                )
            )
            if is_late:
                federation_proceeds(federation)
            wait_until(lambda: federation.state.registry.is_closed(RegistrationKey(RUN)))
            before = a.result(RegistrationKey(RUN)).message
            upgraded = make_registration(plans=without_extrema(with_intensities()))
            assert a.exchange(RegistrationKey(RUN), upgraded).message == before
            assert len(federation.state.store.load_events("contribution")) == 2
            for changed in (with_intensities(mean=0.5), with_intensities() | {"patch_size": 3}):
                with pytest.raises(RefusedError, match="what site A sends now differs from what it sent before"):
                    a.contribute(RegistrationKey(RUN), make_registration(plans=changed))
        if is_late:
            with federation.client("C") as c:
                first = c.exchange(AdmissionKey(RUN, "C"), make_registration(plans=with_intensities())).message
                assert c.exchange(AdmissionKey(RUN, "C"), upgraded).message == first


def federation_proceeds(federation) -> None:
    from nnunetv2.federated.coordinator.members import Member
    from nnunetv2.federated.protocol import api

    wait_until(lambda: len(federation.state.registry.get(RegistrationKey(RUN)).contributions) == 2)
    federation.coordinator.act(RUN, api.RunAction(action="proceed"), Member("olga", "operator"))


@pytest.mark.parametrize("is_common", [True, False])
def test_a_model_has_the_plans_as_they_are_at_the_sites(tmp_path, is_common):
    plans = with_intensities()
    with served(tmp_path / "federation", make_settings(num_epochs=1)) as federation:

        def take_part(site):
            with federation.client(site) as client:
                if is_common:
                    client.exchange(PlansKey("nnUNetPlans"), messages.PlansReport(plans=plans))
                train(client, seed=1, num_rounds=1, plans=without_extrema(plans))

        assert in_threads(*(lambda site=site: take_part(site) for site in "AB")) == [None, None]
        wait_until(lambda: federation.state.store.load_events("model"))
        (path,) = (federation.state.store.folder / "models").glob("*/plans.json")
    assert path.read_text() == json.dumps(plans if is_common else without_extrema(plans), indent=4)


# ------------------------------------------------------------------------------- where a federation masks statistics
def planned_alone() -> dict:
    plans = with_intensities() | {
        "original_median_spacing_after_transp": [3.1, 0.7, 0.7],
        "original_median_shape_after_transp": [40, 512, 512],
    }
    configuration = {"spacing": [3.1, 0.7, 0.7], "median_image_size_in_voxels": [40.0, 500.0, 501.0]}
    return plans | {"configurations": {"3d_fullres": configuration}}


def test_plans_made_alone_lose_what_tells_of_the_data():
    plans = planned_alone()
    kept = without_own_statistics(plans, None)
    assert kept["configurations"] == {"3d_fullres": {"spacing": [3.1, 0.7, 0.7]}}
    assert kept["statistics_withheld"] is True
    assert plans.keys() - kept.keys() == {
        "foreground_intensity_properties_per_channel",
        "original_median_spacing_after_transp",
        "original_median_shape_after_transp",
    }
    assert plans == planned_alone()


def test_pooled_statistics_stay_and_others_do_not():
    plans = planned_alone()
    field = "foreground_intensity_properties_per_channel"
    assert without_own_statistics(plans, {field: plans[field]}) == plans
    other = json.loads(json.dumps(plans[field]))
    other["0"]["mean"] += 1
    assert without_own_statistics(plans, {field: other}) == without_own_statistics(plans, None)
    del plans[field]  # by hand
    assert "original_median_shape_after_transp" not in without_own_statistics(plans, {field: other})


def test_there_is_no_common_model_without_statistics():
    plans = without_own_statistics(planned_alone(), None)
    registered = {site: make_registration(plans=plans) for site in "AB"}
    match = match_registrations(registered, make_settings())
    assert "keep the statistics in their plans to themselves" in str(foresee_model(registered.items(), match))
