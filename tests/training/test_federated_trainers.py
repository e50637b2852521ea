"""Whole trainers of two sites with one coordinator, all in one process: sites are threads, the network is tiny."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_federation import in_threads, validations_of, wait_until
from federated_sites import assert_equal_weights, run_of, weights_of
from patience import PATIENCE_S
from tiny_dataset import NAME

from nnunetv2.federated.commands import manifest
from nnunetv2.federated.coordinator.dashboard import curves
from nnunetv2.federated.errors import (
    CoordinatorUnreachable,
    FederationError,
    NonFiniteError,
    NotAllowedError,
    ShortEpochError,
)
from nnunetv2.federated.privacy.disclosure import allow_list_of
from nnunetv2.federated.protocol import messages
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.variants.federated.federated_training import METRICS, FederatedTraining
from nnunetv2.training.nnUNetTrainer.variants.federated.nnUNetTrainerFedAvg import (
    nnUNetTrainerAsymFedAvg,
    nnUNetTrainerAsymFedAvgOverlapped,
)

pytestmark = pytest.mark.slow


def test_every_aggregate_is_validated_by_all(make_sites, tmp_path, monkeypatch):
    sites = make_sites(validate_every=1)
    trainers = [sites.trainer("A"), sites.trainer("B")]
    # What the manifest lists is all that a training needs to send.
    documents = manifest.collect(NAME, ["3d_fullres"], trainer="nnUNetTrainerAsymFedAvg", plans_name="nnUNetPlans")
    allowed = tmp_path / "allow.json"
    allowed.write_text(allow_list_of(documents, coordinator=trainers[0].credential.url).model_dump_json())
    monkeypatch.setenv("nnUNet_fed_allow", str(allowed))
    assert sites.run(*trainers) == [None, None]
    assert_equal_weights(*trainers)
    found = validations_of(sites.federation.state.store, run_of(trainers[0]))
    assert [record["round"] for record in found] == [0, 1, 2]
    assert found[2]["dice_of_site"].keys() == {"A", "B"} and found[2]["best_round"] is not None
    for trainer in trainers:
        assert sum("Aggregate of round" in line for line in trainer.lines) == 3
        assert len(trainer.logger.get_value("mean_fg_dice", None)) == 3  # the curves are the site's own


class Ailing(nnUNetTrainerAsymFedAvg):
    """Something goes wrong at one site in epoch 1."""

    cause = None

    def _run_steps(self, phase, step, batches, number):
        if self.cause == "short" and phase == "training" and self.current_epoch == 1:
            number = 1
        return super()._run_steps(phase, step, batches, number)

    def train_step(self, batch):
        result = super().train_step(batch)
        if self.current_epoch == 1 and self.cause == "memory":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return result

    def on_train_epoch_end(self, train_outputs):
        if self.current_epoch == 1 and self.cause == "weights":
            with torch.no_grad():
                next(iter(self.network.parameters())).fill_(float("nan"))
        super().on_train_epoch_end(train_outputs)

    def validation_step(self, batch):
        if self.current_epoch == 1 and self.cause == "validation":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().validation_step(batch)


@pytest.mark.parametrize(
    ("cause", "error", "kind"),
    [
        ("weights", NonFiniteError, "NonFiniteError"),
        ("short", ShortEpochError, "ShortEpochError"),
        ("memory", torch.cuda.OutOfMemoryError, "OutOfMemoryError"),
    ],
)
def test_a_failure_is_reported_as_one_and_never_as_weights(make_sites, cause, error, kind):
    sites = make_sites(sites=("A", "B", "C"), quorum=2, deadline_s=1e6)
    ailing, healthy, other = (sites.trainer(site, Ailing) for site in "ABC")
    ailing.cause = cause
    failed, *done = sites.run(ailing, healthy, other)
    assert isinstance(failed, error) and done == [None, None]
    coordinator, run = sites.federation.coordinator, run_of(ailing)
    assert [
        (event.site, event.detail["round"], event.detail["reason"])
        for event in coordinator.state.store.load_events("failure")
    ] == [("A", 1, kind)]
    first, second, third = coordinator.state.store.load_rounds(run)
    assert set(first["sites"]) == {"A", "B", "C"} and set(second["sites"]) == set(third["sites"]) == {"B", "C"}
    assert second["failed"] == ["A"]
    # The site goes on from the last aggregate, and ends with that of the run.
    again = sites.trainer("A", Ailing, go_on=True)
    assert again.current_epoch in (1, 2)
    assert sites.run(again) == [None]
    assert_equal_weights(again, healthy)


def test_a_validation_that_fails_during_the_exchange_is_reported_and_nothing_hangs(make_sites):
    sites = make_sites(sites=("A", "B", "C"), quorum=2, deadline_s=1e6, validate_every=0)
    ailing, healthy, other = (sites.trainer(site, Ailing) for site in "ABC")
    ailing.cause = "validation"
    failed, *done = sites.run(ailing, healthy, other)
    assert isinstance(failed, torch.cuda.OutOfMemoryError) and done == [None, None]
    assert [
        (event.site, event.detail["round"], event.detail["reason"])
        for event in sites.federation.state.store.load_events("failure")
    ] == [("A", 1, "OutOfMemoryError")]
    assert wait([ailing.pending.answer], PATIENCE_S).done, "the thread that exchanges goes on"
    again = sites.trainer("A", Ailing, go_on=True)
    assert sites.run(again) == [None]
    assert_equal_weights(again, healthy)


def test_a_fold_with_too_few_cases_sends_nothing(make_sites, monkeypatch):
    sites = make_sites()
    trainer = sites.trainer("A")
    monkeypatch.setenv("nnUNet_fed_min_cases", "3")
    with pytest.raises(NotAllowedError, match=f"fold 0 of {NAME} has 2 training cases, .* with 3 or more"):
        trainer.run_training()
    coordinator = sites.federation.coordinator
    assert not list(coordinator.state.registry) and not coordinator.state.store.load_events("failure")


def test_the_log_names_the_floor_and_what_only_two_sites_share(make_sites):
    sites = make_sites(num_epochs=1)
    trainers = [sites.trainer(site) for site in "AB"]
    assert sites.run(*trainers) == [None, None]
    for trainer in trainers:
        lines = "\n".join(trainer.lines)
        assert "Nothing is averaged over fewer than 2 sites" in lines
        assert "only: each of the two can compute what the other has sent" in lines


@pytest.mark.parametrize(("contributors", "is_told"), [(("A",), True), (("A", "B"), False)])
def test_an_average_of_too_few_sites_is_told(contributors, is_told):
    """As a coordinator hands out that is older, or that lies."""
    lines = []
    trainer = SimpleNamespace(min_sites=2, log_line=lines.append)
    FederatedTraining.report_round(
        trainer, messages.Aggregate(round=3, contributors=dict.fromkeys(contributors, 1.0)), megabytes=1.0, waited_s=0.0
    )
    assert any("fewer than 2 sites" in line for line in lines) == is_told


def test_the_validation_of_a_round_comes_with_the_next_and_is_drawn_where_it_belongs(make_sites):
    sites = make_sites()
    trainers = {site: sites.trainer(site) for site in "AB"}
    assert sites.run(*trainers.values()) == [None, None]
    coordinator, run = sites.federation.coordinator, run_of(trainers["A"])
    records = coordinator.state.store.load_rounds(run)
    assert [set(record["sites"]["A"]["metrics"]) for record in records] == [{"train_losses"}] * 2 + [set(METRICS)]
    for number, drawn in enumerate(curves.build_curves(coordinator.state, run).rounds):
        for site, trainer in trainers.items():
            for name in ("train_losses", "val_losses"):
                logged = trainer.logger.get_value(name, step=number)
                assert drawn.sites[site].metrics[name] == pytest.approx(float(logged)), (number, site, name)


def test_an_operator_stops_a_run_in_order(make_sites):
    sites = make_sites(num_epochs=50)
    trainers = [sites.trainer("A"), sites.trainer("B")]
    coordinator, run = sites.federation.coordinator, run_of(trainers[0])

    def stop():
        wait_until(lambda: coordinator.state.registry.run_state(run).rounds_closed >= 2, timeout_s=60)
        sites.act("pause", run)
        wait_until(lambda: any("operator has paused" in line for one in trainers for line in one.lines), timeout_s=60)
        sites.act("stop", run)

    assert in_threads(*(one.run_training for one in trainers), stop) == [None] * 3
    closed = coordinator.state.registry.run_state(run).rounds_closed
    assert 2 <= closed < 50
    assert_equal_weights(*trainers)
    for trainer in trainers:
        assert any("operator has stopped" in line for line in trainer.lines)
        assert not Path(trainer.output_folder, "checkpoint_latest.pth").exists()
    model = coordinator.state.store.folder / "models" / "nnUNetTrainerAsymFedAvg__nnUNetPlans__3d_fullres" / "fold_0"
    content = torch.load(model / "checkpoint_final.pth", weights_only=True)["network_weights"]
    for name, values in weights_of(trainers[0]).items():
        np.testing.assert_array_equal(values, content[name].numpy(), err_msg=name)
    again = sites.trainer("A")  # from the beginning, into a run that is over
    assert sites.run(again) == [None]
    assert_equal_weights(again, trainers[1])
    assert any("is over after" in line for line in again.lines)


def test_a_site_joins_late_leaves_and_returns(make_sites):
    sites = make_sites(num_epochs=12, sites=("A", "B"))
    first, second = sites.trainer("A"), sites.trainer("B")
    coordinator, run = sites.federation.coordinator, run_of(first)

    class Newcomer(nnUNetTrainerAsymFedAvg):
        leaves_at = 3

        def on_epoch_end(self):
            if self.current_epoch == self.leaves_at:
                self.participant.transport.act(self.participant.run, "leave")
            super().on_epoch_end()

    Newcomer.__name__ = "nnUNetTrainerAsymFedAvg"

    def run_and_resume(newcomer):
        """Let the others go on when the newcomer is among them, so that they do not end before."""

        def resume():
            wait_until(lambda: any("operator has paused" in line for line in newcomer.lines))
            sites.act("resume", run)

        return in_threads(newcomer.run_training, resume)[0]

    def join_late():
        wait_until(lambda: coordinator.state.registry.run_state(run).rounds_closed >= 1)
        sites.act("pause", run)
        coordinator.invite("C", "site", by="boss")
        newcomer = sites.trainer("C", Newcomer)
        with pytest.raises(FederationError, match="has left run"):
            raise run_and_resume(newcomer)
        assert newcomer.participant.match.coverage.keys() == {"A", "B", "C"}
        sites.act("pause", run)
        newcomer = sites.trainer("C", Newcomer, go_on=True)
        newcomer.leaves_at = None
        assert run_and_resume(newcomer) is None
        return newcomer

    *others, third = in_threads(first.run_training, second.run_training, join_late)
    assert others == [None, None] and not isinstance(third, BaseException), third
    assert_equal_weights(first, second, third)
    taken_part = [set(record["sites"]) for record in coordinator.state.store.load_rounds(run)]
    assert taken_part[0] == {"A", "B"} and {"A", "B", "C"} in taken_part
    assert sum(values != values for values in third.logger.get_value("mean_fg_dice", None)) >= 1  # gaps


def test_a_training_outlasts_a_coordinator_that_is_away_for_too_long(make_sites, tmp_path):
    sites = make_sites(num_epochs=3)
    trainers = [sites.trainer(site, give_up_after_s=0.5) for site in "AB"]
    run = run_of(trainers[0])

    for trainer in trainers:
        transport_of = trainer.make_transport

        def make(credential, report, transport_of=transport_of):
            client = transport_of(credential, report)
            upload = client._upload

            def unreachable_in_round_1(key, *rest):
                if key.endswith("rounds/1"):
                    from nnunetv2.federated.site.transports.http_requests import NoAnswerError

                    raise NoAnswerError("the coordinator cannot be reached")
                return upload(key, *rest)

            client._upload = unreachable_in_round_1
            return client

        trainer.make_transport = make
    errors = sites.run(*trainers)
    assert all(isinstance(error, CoordinatorUnreachable) for error in errors)
    for trainer in trainers:
        saved = torch.load(Path(trainer.output_folder, "checkpoint_latest.pth"), weights_only=False)
        assert saved["current_epoch"] == 2
        for name, tensor in trainer.network.state_dict().items():
            assert torch.equal(tensor, saved["network_weights"][name])
    again = [sites.trainer(site, go_on=True) for site in "AB"]
    assert [one.current_epoch for one in again] == [2, 2]
    assert sites.run(*again) == [None, None]
    assert_equal_weights(*again)
    assert sites.federation.state.registry.run_state(run).state == "complete"


def test_exchanges_may_overlap_with_training(make_sites):
    sites = make_sites(num_epochs=4, validate_every=1)
    trainers = [sites.trainer(site, nnUNetTrainerAsymFedAvgOverlapped) for site in "AB"]
    sent = {}
    for trainer in trainers:
        spy_on_updates(trainer, sent)
    assert sites.run(*trainers) == [None, None]
    assert_equal_weights(*trainers)
    rounds = sites.federation.state.store.load_rounds(run_of(trainers[0]))
    assert [set(record["sites"]) for record in rounds] == [{"A", "B"}] * 4
    found = validations_of(sites.federation.state.store, run_of(trainers[0]))
    assert [record["round"] for record in found] == [0, 1, 2, 3]
    name = next(iter(weights_of(trainers[0])))
    final = (sent["A", 3][name] + sent["B", 3][name]) / 2  # both have two cases
    np.testing.assert_allclose(weights_of(trainers[0])[name], final, rtol=1e-5, atol=1e-7)
    assert not np.array_equal(sent["A", 3][name], sent["B", 3][name])


def test_an_overlapped_training_resumes(make_sites):
    sites = make_sites(num_epochs=4)

    class Interrupted(nnUNetTrainerAsymFedAvgOverlapped):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                raise KeyboardInterrupt
            super().on_train_epoch_start()

    Interrupted.__name__ = "nnUNetTrainerAsymFedAvgOverlapped"
    stopped = [sites.trainer(site, Interrupted) for site in "AB"]
    assert all(isinstance(error, KeyboardInterrupt) for error in sites.run(*stopped))
    again = [sites.trainer(site, nnUNetTrainerAsymFedAvgOverlapped, go_on=True) for site in "AB"]
    assert [one.current_epoch for one in again] == [2, 2]
    assert sites.run(*again) == [None, None]
    assert_equal_weights(*again)


# ------------------------------------------------------------------------------------------- rounds of several epochs
def interrupted_at(epoch: int, trainer_class) -> type:
    """Return a trainer of the same name that is interrupted before an epoch."""

    class Interrupted(trainer_class):
        def on_train_epoch_start(self):
            if self.current_epoch == epoch:
                raise KeyboardInterrupt
            super().on_train_epoch_start()

    Interrupted.__name__ = trainer_class.__name__
    return Interrupted


def test_a_training_goes_on_within_a_round(make_sites):
    sites = make_sites(num_epochs=5, exchange_every=2, validate_every=1)
    stopped, other = sites.trainer("A", interrupted_at(3, nnUNetTrainerAsymFedAvg)), sites.trainer("B")
    waiting = threading.Thread(target=other.run_training, daemon=True)
    waiting.start()
    with pytest.raises(KeyboardInterrupt):
        stopped.run_training()
    again = sites.trainer("A", go_on=True)
    assert again.current_epoch == 3
    again.run_training()
    waiting.join(PATIENCE_S)
    assert any("Going on within round 1 from this site's own weights, at epoch 3" in line for line in again.lines)
    assert_equal_weights(again, other)
    rounds = sites.federation.state.store.load_rounds(run_of(again))
    assert [set(record["sites"]) for record in rounds] == [{"A", "B"}] * 3
    assert {record["settings"]["exchange_every"] for record in rounds} == {2}
    found = validations_of(sites.federation.state.store, run_of(again))
    assert [record["round"] for record in found] == [0, 1, 2]


def test_an_overlapped_training_exchanges_after_several_epochs_and_resumes(make_sites):
    sites = make_sites(num_epochs=5, exchange_every=2)
    stopped = [sites.trainer(site, interrupted_at(3, nnUNetTrainerAsymFedAvgOverlapped)) for site in "AB"]
    assert all(isinstance(error, KeyboardInterrupt) for error in sites.run(*stopped))
    again = [sites.trainer(site, nnUNetTrainerAsymFedAvgOverlapped, go_on=True) for site in "AB"]
    assert sites.run(*again) == [None, None]
    assert_equal_weights(*again)
    assert len(sites.federation.state.store.load_rounds(run_of(again[0]))) == 3


def test_the_coordinators_model_counts_epochs_and_is_that_of_the_sites_in_eight_bits_too(make_sites):
    sites = make_sites(num_epochs=3, exchange_every=2, precision="int8")
    trainers = [sites.trainer(site) for site in "AB"]
    assert sites.run(*trainers) == [None, None]
    assert_equal_weights(*trainers)
    models = sites.folder / "federation" / "models"
    wait_until(lambda: any(models.glob("*/fold_0/checkpoint_final.pth")))
    (path,) = models.glob("*/fold_0/checkpoint_final.pth")
    model = torch.load(path, weights_only=False)
    assert model["current_epoch"] == 3
    for name, values in weights_of(trainers[0]).items():
        np.testing.assert_array_equal(model["network_weights"][name].numpy(), values, err_msg=name)


# ------------------------------------------------------------------------------------- what sites are told at the start
def test_a_second_start_in_the_same_folder_is_no_failure_of_the_site(make_sites):
    sites = make_sites()
    first, second = sites.trainer("A"), sites.trainer("A")
    with first._hold_output_folder(), pytest.raises(RuntimeError, match="another training writes into"):
        second.run_training()
    assert sites.federation.coordinator.status().failures == ()


class OtherNetwork(nnUNetTrainerAsymFedAvg):
    """The same tensors, another activation."""

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        network = nnUNetTrainerAsymFedAvg.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        for module in network.modules():
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.LeakyReLU):
                    setattr(module, name, torch.nn.Tanh())
        return network


class OtherSteps(nnUNetTrainerAsymFedAvg):
    """Another trainer, with the usual network."""


def test_registrations_say_whose_network_it_is(make_sites):
    sites = make_sites()
    usual, tanh, steps = (
        sites.trainer("A", one).describe_training() for one in (nnUNetTrainerAsymFedAvg, OtherNetwork, OtherSteps)
    )
    assert (usual.network_trainer, usual.architecture, usual.pretrained_weights) == (None, None, None)
    assert (tanh.network_trainer, steps.network_trainer) == ("OtherNetwork", "nnUNetTrainer")
    assert tanh.architecture != steps.architecture and tanh.tensors == steps.tensors
    again = sites.trainer("B", OtherSteps).describe_training()
    assert again.architecture == steps.architecture


def test_every_log_says_what_becomes_of_the_run_and_where_it_starts(make_sites):
    sites = make_sites(num_epochs=1)
    trainers = [sites.trainer(site, OtherSteps) for site in "AB"]
    assert sites.run(*trainers) == [None, None]
    for trainer, owner in zip(trainers, ("this site", "site A")):
        text = "\n".join(trainer.lines)
        assert "There will be a common model, with the network of nnUNetTrainer" in text
        assert f"Initial weights: those of {owner} (" in text
        assert "All sites start from the initial weights" in text


def test_pretrained_weights_are_those_of_all_sites_or_refused(make_sites):
    sites = make_sites(num_epochs=1)
    a, b = sites.trainer("A"), sites.trainer("B")
    torch.save({"network_weights": a.network.state_dict()}, sites.folder / "weights.pth")
    weights = str(sites.folder / "weights.pth")
    maybe_load_checkpoint(a, False, False, weights)
    errors = sites.run(a, b)
    assert all("do not start from the same pretrained weights (A: SHA-256" in str(error) for error in errors)
    again = [sites.trainer(site) for site in "AB"]
    for trainer in again:
        maybe_load_checkpoint(trainer, False, False, weights)
    sites.act("reset", run_of(again[0]))  # else whoever changes nothing hears of the old refusal
    assert sites.run(*again) == [None, None]
    for trainer in again:
        assert f"All sites start from the same pretrained weights, {weights}" in "\n".join(trainer.lines)
    late = sites.trainer("A")
    maybe_load_checkpoint(late, False, False, weights)
    assert sites.run(late) == [None]
    assert f"-pretrained_weights {weights} are not used" in "\n".join(late.lines)


def spy_on_updates(trainer, sent: dict) -> None:
    """Remember what a trainer sends: (site, round) -> weights under the site's own names."""
    local_weights, site = trainer.local_weights, trainer.credential.site

    def spy():
        weights = local_weights()
        if trainer.current_epoch:
            sent[site, trainer.current_epoch - 1] = weights  # the last call of a round is what is sent
        return weights

    trainer.local_weights = spy
