"""Sites with networks of their own train together: what they are told, crashes, and the models that come of it."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch
from fake_federation import in_threads, outcomes_in_threads, wait_until
from federated_sites import weights_of
from seeded_sites import Killed, Seeded, assert_same
from tiny_dataset import make_plans

from nnunetv2.federated.commands import fetch_model, manifest
from nnunetv2.federated.coordinator.models.model_folder import name_of_zip
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.privacy.disclosure import allow_list_of
from nnunetv2.federated.protocol.keys import RoundKey
from nnunetv2.training.nnUNetTrainer.variants.federated.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg

pytestmark = pytest.mark.slow

STAGES = {"A": 2, "B": 3, "C": 3}
OWN = {"networks": "own", "matching": "resolution"}
RUN = "3d_fullres.fold_0.nnUNetTrainerAsymFedAvg"


def plans_of(site: str) -> dict:
    """Return a site's plans: network, batch and names are its own."""
    plans = make_plans(stages=STAGES[site], batch_size=2 + (site == "C"))
    return {**plans, "plans_name": f"nnUNetPlans_{site}", "experiment_planner_used": f"PlannerOf{site}"}


def train(make_sites, folder: str, *, dies_in_epoch=None, sites="AB", **settings) -> dict:
    """Train sites together, and return the trainers; the last dies once, where that is wanted, and goes on."""
    federation = make_sites(folder=folder, sites=tuple(sites), **OWN, **settings)
    trainers = {}
    for number, site in enumerate(sites):
        torch.manual_seed(number)
        trainers[site] = federation.trainer(site, Seeded, plans=plans_of(site))
    last = sites[-1]
    trainers[last].dies_in_epoch = dies_in_epoch

    def train_last():
        try:
            trainers[last].run_training()
        except Killed:
            wait_until(lambda: not trainers[last]._writer._thread)
            trainers[last] = federation.trainer(last, Seeded, plans=plans_of(last), go_on=True)
            trainers[last].run_training()

    others = [trainers[site].run_training for site in sites[:-1]]
    assert in_threads(*others, train_last) == [None] * len(sites)
    return {**trainers, "federation": federation.federation}


@pytest.mark.parametrize("settings", [{}, {"precision": "int8", "exchange_every": 2}], ids=["plain", "int8"])
def test_a_killed_site_ends_with_the_network_of_an_undisturbed_one(make_sites, settings):
    undisturbed = train(make_sites, "undisturbed", **settings)
    assert_same(undisturbed, train(make_sites, "killed", dies_in_epoch=1, **settings))
    (first, *_) = undisturbed["federation"].state.store.load_rounds(RUN)
    assert first["settings"]["networks"] == "own"
    shallow, deep = (weights_of(undisturbed[site]) for site in "AB")
    first = "encoder.stages.0.0.convs.0.conv.weight"
    at_full_resolution = ("decoder.seg_layers.0.weight", "decoder.seg_layers.1.weight")
    for name, other in ((first, first), at_full_resolution):
        np.testing.assert_array_equal(shallow[name], deep[other], err_msg=name)


def test_sites_are_told_before_the_first_epoch_and_every_shared_network_becomes_a_model(make_sites):
    trained = train(make_sites, "own", sites="ABC", validate_every=1)
    for site, stages in STAGES.items():
        log = [part for line in trained[site].lines for part in line.split("\n")]
        told = log.index("The sites have 2 networks; there will be 2 common models")
        assert told < next(number for number, line in enumerate(log) if line.startswith("Epoch 0"))
        assert sum(f"site {one} shares" in line for one in STAGES for line in log) == 3
        whose = "A" if stages == 2 else "B, C"
        (network,) = (line for line in log if f"PlainConvUNet with {stages} stages" in line)
        assert f"at {whose}: there will be a common model of it" in network
        assert any("Each site has a network of its own; what matches by resolution is averaged" in line for line in log)
    federation = trained["federation"]
    folder = federation.state.store.folder / "models"
    wait_until(lambda: federation.state.store.load_events("model"))
    (text,) = (event.detail["outcome"] for event in federation.state.store.load_events("model"))
    path = folder / name_of_zip(text)
    assert path.name == "nnUNetTrainerAsymFedAvg__own__3d_fullres.zip"
    models = sorted(one for one in folder.iterdir() if one.is_dir())
    assert len(models) == 2 and {one.parts[1] for one in fetch_model.checkpoints_in(path)} == {
        one.name for one in models
    }
    with zipfile.ZipFile(path) as archive:
        everything = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".json")).decode()
    assert "PlannerOf" not in everything and "nnUNetPlans_" not in everything
    for model in models:
        plans = json.loads((model / "plans.json").read_text())
        assert f"__{plans['plans_name']}__" in model.name and list(plans["configurations"]) == ["3d_fullres"]
        described = plans["configurations"]["3d_fullres"]
        site = "A" if described["architecture"]["arch_kwargs"]["n_stages"] == 2 else "B"
        assert described["patch_size"] == plans_of(site)["configurations"]["3d_fullres"]["patch_size"]
        common = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"]
        own = weights_of(trained[site])
        assert own.keys() == common.keys()
        for name, values in own.items():
            np.testing.assert_array_equal(values, common[name].numpy(), err_msg=name)
        predict_with(model)
    # The same is foreseen by a coordinator that starts again.
    before = federation.coordinator.models.outlook(RUN)
    assert Coordinator(federation.state.store).models.outlook(RUN) == before and len(before.networks) == 2


def predict_with(model) -> None:
    """Load a model folder as nnUNetv2_predict does, and predict an image with it."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), ("0",), "checkpoint_final.pth")
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 20)).astype(np.float32)
    found = predictor.predict_single_npy_array(image, {"spacing": [1.0, 1.0, 1.0]})
    assert found.shape == image.shape[1:]


def test_what_leaves_is_what_the_manifest_lists(make_sites, tmp_path, monkeypatch):
    sites = make_sites(num_epochs=1, **OWN)
    trainers = {site: sites.trainer(site, plans=plans_of(site)) for site in "AB"}
    assert trainers["B"].credential.networks == "own"  # by which the manifest knows
    folder = tmp_path / "B" / "nnUNet_preprocessed" / "Dataset998_Tiny"
    (folder / "nnUNetPlans_B.json").write_text(json.dumps(plans_of("B")))
    documents = manifest.collect(
        "Dataset998_Tiny", ["3d_fullres"], trainer="nnUNetTrainerAsymFedAvg", plans_name="nnUNetPlans_B", networks="own"
    )
    text = "\n".join(manifest.describe(documents, None))
    assert "Memory target, planner, batch size" in text and "PlannerOfB" not in text
    allowed = tmp_path / "allow.json"
    allowed.write_text(allow_list_of(documents, coordinator=trainers["B"].credential.url).model_dump_json())
    monkeypatch.setenv("nnUNet_fed_allow", str(allowed))
    listed = next(one.message for one in documents if one.kind == "registration")
    assert sites.run(trainers["A"], trainers["B"]) == [None, None]
    registered = sites.federation.state.documents.registration(RUN, "B")
    assert registered.plans == listed.plans and registered.tensors == listed.tensors


def test_a_trainer_that_wants_equal_plans_is_refused(make_sites):
    sites = make_sites(num_epochs=1, **OWN)
    (error,) = sites.run(sites.trainer("A", nnUNetTrainerFedAvg, plans=plans_of("A")))
    assert "nnUNetTrainerFedAvg, which wants the same plans at all sites" in str(error)


def test_plans_from_other_data_are_refused_by_the_field(make_sites):
    sites = make_sites(num_epochs=1, **OWN)
    other = plans_of("B")
    other["configurations"]["3d_fullres"]["spacing"] = [1.0, 1.0, 1.5]
    trainers = sites.trainer("A", plans=plans_of("A")), sites.trainer("B", plans=other)
    for error in sites.run(*trainers):
        assert "plans.configurations.3d_fullres.spacing[2] is not the same at A and at B" in str(error)
        assert "1.5" not in str(error)


def test_a_site_with_another_network_is_let_in_late(make_sites):
    sites = make_sites(sites=("A", "B", "C"), quorum=2, deadline_s=1e6, num_epochs=3, **OWN)
    coordinator = sites.federation.coordinator
    first, second = (sites.trainer(site, Seeded, plans=plans_of(site)) for site in "BC")
    lines = []

    def join_late():
        wait_until(lambda: coordinator.state.registry.run_state(RUN).members)
        sites.act("pause", RUN)
        late = sites.trainer("A", Seeded, plans=plans_of("A"))
        late.lines = lines
        late.run_training()

    def proceed():
        wait_until(lambda: len(coordinator.state.registry.run_state(RUN).registered) == 2)
        sites.act("proceed", RUN)

    def resume():
        wait_until(lambda: any("operator has paused" in line for line in lines))
        sites.act("resume", RUN)

    assert in_threads(first.run_training, second.run_training, proceed, join_late, resume) == [None] * 5
    text = "\n".join(lines)
    assert "The sites have 2 networks; there will be 2 common models" in text
    assert "site A shares" in text and "(100.0%)" in text


class LeavesAfterOneRound(Seeded):
    """A site that leaves the run when a round is over."""

    leaves_in = 1

    def on_train_epoch_start(self):
        if self.current_epoch == self.leaves_in:
            self.participant.transport.act(RUN, "leave")
            raise Killed
        super().on_train_epoch_start()


LeavesAfterOneRound.__name__ = Seeded.__name__  # of which the run is called


def test_a_site_whose_partners_have_left_is_told_that_its_layers_stay_as_they_are(make_sites):
    """Nothing of a single site becomes an average, or a model: what it alone has trained since goes nowhere."""
    sites = make_sites(sites=("A", "B", "C"), num_epochs=3, **OWN)
    shallow, leaving, staying = (
        sites.trainer(site, kind, plans=plans_of(site))
        for site, kind in zip("ABC", (Seeded, LeavesAfterOneRound, Seeded))
    )
    found = outcomes_in_threads(shallow.run_training, leaving.run_training, staying.run_training)
    assert found[0] is found[2] is None and isinstance(found[1], Killed)
    lines = "\n".join(staying.lines)
    assert "shared tensors keep their values of the round before, since fewer than 2 of the sites" in lines
    assert "keep their values" not in "\n".join(shallow.lines)
    store = sites.federation.state.store
    assert [record["kept"] > 0 for record in store.load_rounds(RUN)] == [False, True, True]
    deepest = "encoder.stages.2.0.convs.0.conv.weight"
    with sites.federation.state.documents.result(RoundKey(RUN, 1)) as document:
        np.testing.assert_array_equal(weights_of(staying)[deepest], document.read(deepest))


class LeavesAtOnce(LeavesAfterOneRound):
    """A site that leaves the run before it has trained."""

    leaves_in = 0


LeavesAtOnce.__name__ = Seeded.__name__


def test_there_is_no_model_of_a_network_that_was_never_averaged_whole(make_sites):
    """It was foreseen, and would now hold the random numbers that its training began with."""
    sites = make_sites(sites=("A", "B", "C"), num_epochs=2, validate_every=1, **OWN)
    shallow, leaving, staying = (
        sites.trainer(site, kind, plans=plans_of(site)) for site, kind in zip("ABC", (Seeded, LeavesAtOnce, Seeded))
    )
    found = outcomes_in_threads(shallow.run_training, leaving.run_training, staying.run_training)
    assert found[0] is found[2] is None and isinstance(found[1], Killed)
    assert "there will be 2 common models" in "\n".join(staying.lines)
    federation = sites.federation
    wait_until(lambda: federation.state.store.load_events("model"))
    text = federation.state.store.load_events("model")[0].detail["outcome"]
    folder = federation.state.store.folder / "models"
    (model,) = (one for one in folder.iterdir() if one.is_dir())
    assert (
        json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"][
            "n_stages"
        ]
        == STAGES["A"]
    )
    assert "no round had enough of the sites with tensor decoder." in text, text
    assert {one.parts[1] for one in fetch_model.checkpoints_in(folder / name_of_zip(text))} == {model.name}
