"""Sites that annotate different classes train one network that predicts all of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_federation import in_threads, validations_of, wait_until
from federated_sites import run_of, weights_of
from seeded_sites import Killed, Seeded
from tiny_dataset import make_dataset_json

from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.protocol.api import Secure
from nnunetv2.federated.protocol.keys import RoundKey
from nnunetv2.plans.partial_labels import with_union
from nnunetv2.training.nnUNetTrainer.variants.federated.nnUNetTrainerFedAvg import nnUNetTrainerAsymFedAvgOverlapped

pytestmark = pytest.mark.slow

UNION = {"background": 0, "blob": 1, "core": 2}
BOTH, BLOB, CORE = ("blob", "core"), ("blob",), ("core",)
HEAD_WEIGHT, HEAD_BIAS = "decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"


class Annotating(Seeded):
    """A trainer in whose targets what its site does not annotate is 0."""

    credential_file = None

    def _register(self):
        self.participant._credential_file = self.credential_file  # sites are threads of one process
        return super()._register()

    def picture(self, labels, rng):
        return labels * 2 + rng.normal(0, 0.5, labels.shape)

    def annotate(self, labels):
        names = self.dataset_json.get("annotated_labels", UNION)
        return np.where(np.isin(labels, [UNION[name] for name in names]), labels, 0).astype(np.int16)


Annotating.__name__ = "nnUNetTrainerAsymFedAvg"


def dataset_of(classes) -> dict:
    """Return the dataset.json of a site that numbers its own classes from 1."""
    raw = make_dataset_json(labels={"background": 0, **{name: number for number, name in enumerate(classes, 1)}})
    return with_union(raw, UNION)


def train(make_sites, folder: str, annotated, *, trainer_class=Annotating, dies_in_epoch=None, start=None, **settings):
    """Train at all sites, and return their trainers; B dies once, where that is wanted, and goes on with --c."""
    settings = {"labels": "union", "sites": tuple(annotated), "validate_every": 1, **settings}
    sites = make_sites(folder=folder, **settings)
    trainers = {}
    for number, (site, classes) in enumerate(annotated.items()):
        torch.manual_seed(number)
        described = dataset_of(classes) if settings["labels"] == "union" else make_dataset_json()
        trainers[site] = sites.trainer(site, trainer_class, dataset_json=described)
        trainers[site].credential_file = sites.federation.credential_file(site)
    trainers["B"].dies_in_epoch = dies_in_epoch

    def train_b():
        try:
            trainers["B"].run_training()
        except Killed:
            wait_until(lambda: not trainers["B"]._writer._thread)
            trainers["B"] = sites.trainer("B", trainer_class, go_on=True, dataset_json=dataset_of(annotated["B"]))
            trainers["B"].run_training()

    others = [trainers[site].run_training for site in annotated if site != "B"]
    assert in_threads(train_b, *others) == [None] * len(annotated)
    trainers["federation"] = sites.federation
    return trainers


def records_of(trainers):
    return trainers["federation"].state.store.load_rounds(run_of(trainers["A"]))


def assert_same(one, other, sites="AB"):
    for site in sites:
        expected, found = weights_of(one[site]), weights_of(other[site])
        for tensor, values in expected.items():
            np.testing.assert_array_equal(values, found[tensor], err_msg=f"{site} {tensor}")


def assert_one_model(trainers, sites):
    first, *others = (weights_of(trainers[site]) for site in sites)
    for other in others:
        for tensor, values in first.items():
            np.testing.assert_array_equal(values, other[tensor], err_msg=tensor)


def test_with_nothing_hidden_union_ends_with_the_bits_of_equal(make_sites):
    everything = {"A": BOTH, "B": BOTH}
    union = train(make_sites, "union", everything)
    equal = train(make_sites, "equal", everything, labels="equal")
    assert_same(union, equal)
    for site in "AB":
        assert type(union[site].loss) is type(equal[site].loss)
        curves = [one[site].logger.get_value("dice_per_class_or_region", step=None) for one in (union, equal)]
        np.testing.assert_array_equal(*curves)
    assert all("labels" not in record["settings"] for record in records_of(equal))
    assert {record["settings"]["labels"] for record in records_of(union)} == {"union"}


FOUR = {"A": BLOB, "B": BOTH, "C": CORE, "D": BOTH}


def test_a_class_is_averaged_over_its_annotators_and_everybody_predicts_it(make_sites):
    trainers = train(make_sites, "", FOUR)
    assert_one_model(trainers, FOUR)
    match = trainers["A"].participant.match
    assert match.annotated == {"A": (1,), "B": (1, 2), "C": (2,), "D": (1, 2)}
    for leaf in ("weight", "bias"):
        assert list(match.shared[f"decoder.seg_layers.0.row0.{leaf}"]) == ["A", "B", "C", "D"]
        assert list(match.shared[f"decoder.seg_layers.0.row1.{leaf}"]) == ["A", "B", "D"]
        assert list(match.shared[f"decoder.seg_layers.0.row2.{leaf}"]) == ["B", "C", "D"]
        assert list(match.received[f"decoder.seg_layers.0.row2.{leaf}"]) == ["A"]
    assert {shared == total for shared, total in match.coverage.values()} == {True}

    dice = {site: trainers[site].logger.get_value("dice_per_class_or_region", step=-1) for site in FOUR}
    assert np.isnan(dice["A"][1]) and not np.isnan(dice["A"][0])
    assert np.isnan(dice["C"][0]) and not np.isnan(dice["C"][1])
    pooled = validations_of(trainers["federation"].state.store, run_of(trainers["A"]))[-1]
    assert None not in pooled["dice"]
    assert pooled["dice_of_site"]["A"][1] is None


def test_what_is_sent_of_a_class_is_the_mean_of_its_annotators(make_sites):
    trainers = train(make_sites, "", FOUR, num_epochs=1)
    reader, key = trainers["federation"].state.documents, RoundKey(run_of(trainers["A"]), 0)
    for row, sites in ((1, "ABD"), (2, "BCD"), (0, "ABCD")):
        name = f"decoder.seg_layers.0.row{row}.weight"
        sent = {}
        for site in FOUR:
            with reader.contribution(key, site) as document:
                if name in document.specs:
                    sent[site] = np.array(document.read(name), np.float64)
        assert "".join(sorted(sent)) == sites
        expected = np.mean(list(sent.values()), axis=0)  # all have two training cases
        np.testing.assert_allclose(weights_of(trainers["A"])[HEAD_WEIGHT][row], expected[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("settings", [{}, {"precision": "int8", "exchange_every": 2, "num_epochs": 4}])
def test_an_interrupted_site_ends_with_the_bits_of_an_undisturbed_one(make_sites, settings):
    undisturbed = train(make_sites, "undisturbed", FOUR, **settings)
    killed = train(make_sites, "killed", FOUR, dies_in_epoch=1, **settings)
    assert_same(undisturbed, killed, FOUR)


@pytest.mark.parametrize(
    "settings",
    [{"precision": "float16"}, {"proximal": 0.1}, {"keep_local": "head"}, {"finetune_epochs": 1}],
    ids=lambda settings: next(iter(settings)),
)
def test_other_ways_to_train_go_with_different_classes(make_sites, settings):
    trainers = train(make_sites, "", FOUR, **settings)
    own = [weights_of(trainers[site])[HEAD_WEIGHT] for site in "AC"]
    if "keep_local" in settings:
        assert not np.array_equal(own[0][0], own[1][0])  # background is each site's own
        others = weights_of(trainers["B"])[HEAD_WEIGHT]
        assert not np.array_equal(own[0][2], others[2])  # A takes the average of what it does not annotate
    else:
        np.testing.assert_array_equal(*own)


class Overlapped(Annotating, nnUNetTrainerAsymFedAvgOverlapped):
    pass


Overlapped.__name__ = "nnUNetTrainerAsymFedAvgOverlapped"


def test_overlapped_rounds_go_with_different_classes(make_sites):
    assert_one_model(train(make_sites, "", FOUR, trainer_class=Overlapped), FOUR)


def test_the_floor_holds_for_a_class(make_sites):
    trainers = train(make_sites, "", {"A": BLOB, "B": BOTH, "C": BLOB}, min_sites=3)
    heads = {site: weights_of(trainers[site])[HEAD_BIAS] for site in "ABC"}
    assert heads["A"][1] == heads["B"][1] == heads["C"][1]
    assert heads["A"][2] == heads["C"][2] == pytest.approx(-1e4, rel=1e-3)  # never predicted there
    assert abs(heads["B"][2]) < 10
    assert not np.any(weights_of(trainers["A"])[HEAD_WEIGHT][2])
    assert any("The classes [2] are not annotated here" in line for line in trainers["A"].lines)
    assert any("'core'" in line and "no common model" in line for line in trainers["B"].lines)
    pooled = validations_of(trainers["federation"].state.store, run_of(trainers["A"]))[-1]
    assert pooled["dice"][0] is not None
    assert pooled["dice"][1] is None  # that would be the score of one site


def test_a_site_that_joins_a_run_trains_what_it_annotates_and_gets_the_rest(make_sites):
    sites = make_sites(num_epochs=10, sites=("A", "B"), labels="union", validate_every=0)
    first, second = (sites.trainer(site, Annotating, dataset_json=dataset_of(BOTH)) for site in "AB")
    coordinator, run = sites.federation.coordinator, run_of(first)

    def join_late():
        wait_until(lambda: coordinator.state.registry.run_state(run).rounds_closed >= 1)
        sites.act("pause", run)
        coordinator.invite("C", "site", by="boss")
        newcomer = sites.trainer("C", Annotating, dataset_json=dataset_of(CORE))

        def resume():
            wait_until(lambda: any("operator has paused" in line for line in newcomer.lines))
            sites.act("resume", run)

        assert in_threads(newcomer.run_training, resume) == [None, None]
        return newcomer

    *others, third = in_threads(first.run_training, second.run_training, join_late)
    assert others == [None, None] and not isinstance(third, BaseException), third
    assert_one_model({"A": first, "B": second, "C": third}, "ABC")
    match = third.participant.match
    assert "C" in match.shared["decoder.seg_layers.0.row2.bias"]
    assert [*match.received["decoder.seg_layers.0.row1.bias"]] == ["C"]
    assert match.annotated["C"] == (2,)


def test_the_common_model_has_all_classes(make_sites):
    trainers = train(make_sites, "", FOUR)
    folder = trainers["federation"].state.store.folder
    finished = "models/nnUNet*/fold_*/checkpoint_final.pth"  # not `**`: temporary folders come and go there
    wait_until(lambda: list(folder.glob(finished)))
    model = next(iter(folder.glob(finished)))
    content = torch.load(model, weights_only=True)
    for tensor, values in weights_of(trainers["C"]).items():
        np.testing.assert_array_equal(content["network_weights"][tensor].numpy(), values, err_msg=tensor)
    described = json.loads((model.parents[1] / "dataset.json").read_text())
    assert described["labels"] == UNION
    assert "annotated_labels" not in described and "values_in_raw_data" not in described


def test_masked_sums_are_those_of_the_annotators(make_sites):
    five = {"A": BLOB, "B": BOTH, "C": CORE, "D": BOTH, "E": BOTH}
    clear = train(make_sites, "clear", five, min_sites=3)
    masked = train(make_sites, "masked", five, min_sites=3, secure=Secure(k=3))
    assert_one_model(masked, five)
    for tensor, values in weights_of(clear["A"]).items():
        np.testing.assert_allclose(weights_of(masked["A"])[tensor], values, atol=2e-5, err_msg=tensor)
    pooled = [validations_of(one["federation"].state.store, run_of(one["A"]))[-1]["dice"] for one in (clear, masked)]
    np.testing.assert_allclose(*pooled, atol=0.02)
    assert None not in pooled[1]


def test_counts_of_a_class_of_two_sites_stay_sealed_behind_masks(make_sites):
    trainers = train(make_sites, "", {"A": BLOB, "B": BOTH, "C": BOTH}, min_sites=3, secure=Secure(k=3))
    pooled = validations_of(trainers["federation"].state.store, run_of(trainers["A"]))[-1]["dice"]
    assert pooled[0] is not None and pooled[1] is None
    heads = {site: weights_of(trainers[site])[HEAD_BIAS] for site in "ABC"}
    assert heads["B"][2] != heads["C"][2]  # a sum of two is none


@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [("union", None, "planned without the others' classes"), ("equal", BOTH, "classes of another federation")],
)
def test_plans_of_another_kind_of_federation_are_refused(make_sites, labels, classes, words):
    sites = make_sites(labels=labels)
    described = make_dataset_json() if classes is None else dataset_of(classes)
    trainer = sites.trainer("A", Annotating, dataset_json=described)
    with pytest.raises(FederationError, match=words):
        trainer.run_training()


def test_the_final_validation_scores_what_the_site_annotates(make_sites):
    trainers = train(make_sites, "", FOUR)
    trainer = trainers["A"]
    trainer.perform_actual_validation()
    summary = json.loads(Path(trainer.output_folder, "validation", "summary.json").read_text())
    assert list(summary["mean"]) == ["1"]


def test_sites_that_annotate_one_class_each_teach_each_other_both(make_sites):
    five = {"A": BLOB, "B": BLOB, "C": CORE, "D": CORE, "E": BOTH}
    lengths = {"num_epochs": 10, "num_iterations_per_epoch": 15, "validate_every": 10}
    dice = {}
    for labels in ("union", "equal"):
        annotated = five if labels == "union" else dict.fromkeys(five, BOTH)
        trainers = train(make_sites, labels, annotated, labels=labels, **lengths)
        pooled = validations_of(trainers["federation"].state.store, run_of(trainers["A"]))[-1]
        dice[labels] = np.array(pooled["dice"])
    assert (dice["equal"] > 0.5).all(), dice
    assert (dice["union"] > 0.8 * dice["equal"]).all(), dice  # 0.90 and 0.93, after 150 iterations
