"""A federation that pools fingerprints, compares plans, trains and keeps a model."""

import json
import zipfile

import numpy as np
import pytest
from fake_federation import (
    LABELS,
    RUN,
    SHAPES,
    in_threads,
    make_census,
    make_plans,
    make_registration,
    make_settings,
    served,
    train,
    wait_until,
)

from nnunetv2.federated.aggregation import fingerprint_statistics
from nnunetv2.federated.coordinator.models.model_folder import common_mirroring_axes, describe_dataset
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.keys import CensusKey, CoarseKey, FineKey, PlansKey, RegistrationKey, RoundKey


@pytest.mark.parametrize(
    ("axes", "expected"),
    [(((0, 1, 2), (0, 1, 2)), (0, 1, 2)), (((0, 1), (1, 2)), (1,)), (((0,), ()), ()), ((None, (0,)), None)],
)
def test_a_model_mirrors_where_all_sites_did(axes, expected):
    registrations = {str(i): make_registration().model_copy(update={"mirroring_axes": a}) for i, a in enumerate(axes)}
    assert common_mirroring_axes(registrations) == expected


# ------------------------------------------------------------------------------------------------------- fingerprints
@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    with served(tmp_path_factory.mktemp("closing") / "federation", make_settings(sites=("A", "B"))) as federation:
        yield federation


VALUES = {
    "A": np.random.default_rng(1).normal(300, 50, 4000).astype(np.float32),
    "B": np.random.default_rng(2).normal(-20, 900, 700).astype(np.float32),
}


def summarise(values: np.ndarray, num_cases: int) -> messages.CoarseSummary:
    moments = fingerprint_statistics.Moments.of(values)
    return messages.CoarseSummary(
        spacings=tuple((1.0 + i, 0.5, 0.5) for i in range(num_cases)),
        shapes=((8, 9, 10),) * num_cases,
        relative_sizes=(0.5,) * num_cases,
        promotes_to_float64=False,
        moments=(messages.ChannelMoments(count=moments.count, mean=moments.mean, m2=moments.m2),),
    )


def test_the_pooled_fingerprint_is_the_central_one(federation):
    def take_part(site, num_cases):
        values = VALUES[site]
        with federation.client(site) as client:
            client.exchange(CensusKey(), make_census(num_cases))
            bins = client.exchange(
                CoarseKey(), summarise(values, num_cases), {"coarse.0": fingerprint_statistics.coarse_histogram(values)}
            ).message.bins
            with pytest.raises(RefusedError, match="not those that were asked for"):
                client.contribute(
                    FineKey(), messages.FineSummary(bins=((0,),)), {"fine.0": np.zeros((1, 65536), np.int64)}
                )
            with pytest.raises(RefusedError, match="count different voxels"):
                client.contribute(
                    FineKey(), messages.FineSummary(bins=bins), {"fine.0": np.zeros((len(bins[0]), 65536), np.int64)}
                )
            fine = {"fine.0": fingerprint_statistics.fine_histogram(values, bins[0])}
            return client.exchange(FineKey(), messages.FineSummary(bins=bins), fine).message

    first, second = in_threads(lambda: take_part("A", 3), lambda: take_part("B", 2))
    assert first == second
    central = np.concatenate(list(VALUES.values()))
    found = first.fingerprint["foreground_intensity_properties_per_channel"]["0"]
    low, median, high = np.percentile(central, [0.5, 50, 99.5])
    assert (found["percentile_00_5"], found["median"], found["percentile_99_5"]) == (low, median, high)
    assert found["mean"] == pytest.approx(central.mean(dtype=np.float64), rel=1e-6)
    assert found["std"] == pytest.approx(central.std(dtype=np.float64), rel=1e-6)
    assert first.num_cases == 5 and len(first.fingerprint["spacings"]) == 5


def test_a_summary_must_fit_the_census(tmp_path):
    with served(tmp_path / "federation", make_settings()) as federation:

        def count(site):
            with federation.client(site) as client:
                client.exchange(CensusKey(), make_census(2))

        assert in_threads(lambda: count("A"), lambda: count("B")) == [None, None]
        histogram = fingerprint_statistics.coarse_histogram(VALUES["A"])
        with federation.client("A") as client:
            for summary, tensor, complaint in [
                (summarise(VALUES["A"], 3), histogram, "the summary has 3 cases and 1 channels, the census of"),
                (summarise(VALUES["A"], 2), histogram // 2, "count different numbers of voxels"),
                (summarise(VALUES["A"], 2), -histogram, "negative or impossibly large"),
            ]:
                with pytest.raises(RefusedError, match=complaint):
                    client.contribute(CoarseKey(), summary, {"coarse.0": tensor})


def test_the_plans_of_the_sites_are_compared(federation):
    def report(site, plans):
        with federation.client(site) as client:
            return client.exchange(PlansKey("nnUNetPlans"), messages.PlansReport(plans=plans)).message.digest

    first, second = in_threads(lambda: report("A", make_plans()), lambda: report("B", make_plans(dataset_name="D")))
    assert first == second and len(first) == 64


# --------------------------------------------------------------------------------------------------------- kept models
def test_a_registration_must_belong_to_its_run(federation):
    with federation.client("A") as client:
        with pytest.raises(RefusedError, match="a registration for 3d_fullres.fold_0.nnUNetTrainerFake was sent"):
            client.contribute(RegistrationKey("2d.fold_0.nnUNetTrainerFake"), make_registration())
        with pytest.raises(RefusedError, match="cannot be part of a folder's name"):
            client.contribute(RegistrationKey(RUN), make_registration(plans=make_plans(plans_name="../../etc")))


def test_the_last_aggregate_becomes_a_model_folder(federation):
    torch = pytest.importorskip("torch")
    with federation.client("A") as a, federation.client("B") as b:
        in_threads(
            *(
                lambda client=client, seed=seed: train(client, seed=seed, num_rounds=3, num_cases=2)
                for seed, client in enumerate((a, b))
            )
        )
    wait_until(lambda: federation.state.store.load_events("model"))
    model = federation.state.store.folder / "models" / "nnUNetTrainerFake__nnUNetPlans__3d_fullres"
    assert any(f"run {RUN} is over: model written to {model}" in line for line in federation.lines)
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)
    weights = checkpoint["network_weights"]
    assert set(weights) == {*SHAPES, "decoder.encoder.weight"}
    assert weights["decoder.encoder.weight"].data_ptr() == weights["encoder.weight"].data_ptr()
    with federation.client("A") as client:
        document = client.result(RoundKey(RUN, 2))
        for name in SHAPES:
            np.testing.assert_array_equal(weights[name].numpy(), document.read(name))
    assert checkpoint["trainer_name"] == "nnUNetTrainerFake", "it does not say that its network is another trainer's"
    assert (checkpoint["init_args"]["configuration"], checkpoint["init_args"]["fold"]) == ("3d_fullres", 0)
    assert checkpoint["inference_allowed_mirroring_axes"] == (0, 1, 2)
    assert json.loads((model / "plans.json").read_text()) == make_plans()
    assert json.loads((model / "dataset.json").read_text()) == {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "file_ending": ".nii.gz",
        "numTraining": 4,
    }
    has_fingerprint = federation.state.registry.is_closed(FineKey())  # depends on which tests have run
    assert (model / "dataset_fingerprint.json").exists() == has_fingerprint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("readers", "expected"),
    [(("NoSuchReader", "SimpleITKIO", "SimpleITKIO"), "SimpleITKIO"), (("B", "A", "C"), "B"), (("B", "A", "A"), "A")],
)
def test_no_single_site_chooses_how_everybody_reads_files(tmp_path, readers, expected):
    with served(tmp_path / "federation", make_settings(sites=("a", "b", "c"), num_epochs=1)) as federation:

        def take_part(site, reader):
            with federation.client(site) as client:
                train(
                    client,
                    seed=1,
                    num_rounds=1,
                    plans=make_plans(image_reader_writer=reader, dataset_name=f"Dataset001_{reader}"),
                )

        in_threads(*(lambda site=site, reader=reader: take_part(site, reader) for site, reader in zip("abc", readers)))
        folder = federation.state.store.folder / "models"
        wait_until(lambda: list(folder.glob("*.zip")))
        with zipfile.ZipFile(next(folder.glob("*.zip"))) as archive:
            names = archive.namelist()
            plans = json.loads(archive.read(next(name for name in names if name.endswith("/plans.json"))))
        assert plans["image_reader_writer"] == expected
        assert {name.split("/")[0] for name in names} == {plans["dataset_name"]} == {f"Dataset001_{expected}"}


def test_the_model_reads_the_files_that_most_sites_have():
    registration = make_registration()
    ends = {
        site: registration.model_copy(
            update={"dataset_json": registration.dataset_json.model_copy(update={"file_ending": ending})}
        )
        for site, ending in {"a": ".odd", "b": ".nii.gz", "c": ".nii.gz"}.items()
    }
    assert describe_dataset(ends)["file_ending"] == ".nii.gz"
    assert describe_dataset({"a": ends["a"], "b": ends["b"]})["file_ending"] == ".odd"


def test_without_equal_plans_the_reason_is_given(tmp_path):
    from nnunetv2.federated.coordinator.models.model_folder import keep_models

    with served(tmp_path / "federation", make_settings(num_epochs=1)) as federation:

        def register(site, plans):
            with federation.client(site) as client:
                client.exchange(RegistrationKey(RUN), make_registration(plans=plans))

        other = make_plans(transpose_forward=[2, 0, 1])
        assert in_threads(lambda: register("A", make_plans()), lambda: register("B", other)) == [None, None]
        coordinator = federation.coordinator
        text = keep_models(RUN, tmp_path / "models", final=0, best=None, archive=coordinator.state.documents)
        assert text.startswith("no model folder is written") and "transpose_forward is not the same at A" in text
        assert not (tmp_path / "models").exists()
