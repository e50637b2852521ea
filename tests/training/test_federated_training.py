"""The mixin that exchanges weights, with a network and a logger of a few lines."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunetv2.federated.errors import NonFiniteError, ShortEpochError
from nnunetv2.training.nnUNetTrainer.variants.federated.federated_training import FederatedTraining
from nnunetv2.training.nnUNetTrainer.variants.federated.health import check_epoch, kind_of
from nnunetv2.training.nnUNetTrainer.variants.federated.network_weights import export_weights, import_weights_
from nnunetv2.training.nnUNetTrainer.variants.federated.overlapped_training import catch_up
from nnunetv2.training.nnUNetTrainer.variants.federated.registration import describe_match


class Tied(torch.nn.Module):
    """Two names for one tensor, and a buffer of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(2, 2)
        self.again = self.first
        self.register_buffer("steps", torch.tensor(3))


def test_every_tensor_is_exported_once_and_integers_stay():
    assert export_weights(Tied()).keys() == {"first.weight", "first.bias"}


def test_what_was_exported_is_a_copy():
    network = Tied()
    weights = export_weights(network)
    with torch.no_grad():
        network.first.weight += 1
    assert not np.array_equal(weights["first.weight"], network.first.weight.detach().numpy())


def test_imported_weights_reach_every_alias():
    network = Tied()
    import_weights_(network, {"first.weight": np.full((2, 2), 7, np.float32)})
    assert (network.again.weight == 7).all()


def make_trainer(epoch: int):
    trainer = FederatedTraining()
    curves = {"train_losses": [0.5] * epoch, "dice_per_class_or_region": [[0.1, 0.2]] * epoch,
              "epoch_start_timestamps": [1.0] * epoch}
    trainer.logger = SimpleNamespace(local_logger=SimpleNamespace(my_fantastic_logging=curves))
    trainer.current_epoch = epoch
    trainer.print_to_log_file = lambda *_: None
    trainer.local_rank = 0
    return trainer, curves


def test_missed_epochs_are_gaps_in_the_curves():
    trainer, curves = make_trainer(2)
    trainer.go_on_at(4)
    assert trainer.current_epoch == 4
    assert {len(values) for values in curves.values()} == {4}
    assert np.isnan(curves["train_losses"][2:]).all()
    assert np.isfinite(curves["epoch_start_timestamps"]).all()


def test_an_epoch_that_was_not_exchanged_is_trained_again():
    trainer, curves = make_trainer(3)
    trainer.go_on_at(2)
    assert trainer.current_epoch == 2
    assert len(curves["train_losses"]) == 3  # overwritten when the epoch ends once more


@pytest.mark.parametrize(("losses", "error", "complaint"), [
    ([0.5, 0.4], ShortEpochError, "had 2 of 3 iterations"),
    ([0.5, float("nan"), float("inf")], NonFiniteError, "from iteration 1 of epoch 7 on .2 of 3"),
])
def test_what_is_no_proper_epoch_becomes_no_update(losses, error, complaint):
    with pytest.raises(error, match=complaint):
        check_epoch([{"loss": np.float32(loss)} for loss in losses], epoch=7, num_iterations=3)


@pytest.mark.parametrize(("error", "kind"), [
    (torch.cuda.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "OutOfMemoryError"),
    (MemoryError(), "OutOfMemoryError"),
    (RuntimeError("One or more background workers are no longer alive.\ncase_17"), "DataLoaderError"),
    (ValueError("/data/patient 17"), "ValueError"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
])
def test_only_the_kind_of_an_error_leaves(error, kind):
    assert kind_of(error) == kind


# ------------------------------------------------------------------------------------------------- a delayed average
def test_catching_up_adds_what_was_learned_meanwhile():
    caught_up = catch_up({"w": np.array([2.0, 4.0])}, {"w": np.array([1.5, 1.0]), "own": np.ones(1)},
                         {"w": np.array([1.0, 1.0])})
    assert caught_up.keys() == {"w"}
    np.testing.assert_array_equal(caught_up["w"], [2.5, 4.0])


def test_a_delayed_average_loses_and_repeats_nothing():
    """Sites that move by constant steps end where they would have ended with exchanges that they wait for."""
    steps, weights = {"A": np.array([1.0, 0.0]), "B": np.array([0.0, 3.0])}, {"A": 0.25, "B": 0.75}

    def mean(values):
        return sum(weights[site] * values[site] for site in values)

    own = {site: np.zeros(2) for site in steps}
    for _ in range(5):
        own = dict.fromkeys(steps, mean({site: own[site] + steps[site] for site in steps}))
    sent = {site: steps[site].copy() for site in steps}  # after the first epoch
    for _ in range(4):
        aggregate, trained = mean(sent), {site: sent[site] + steps[site] for site in steps}
        sent = {site: catch_up({"w": aggregate}, {"w": trained[site]}, {"w": sent[site]})["w"] for site in steps}
        np.testing.assert_allclose(mean(sent), mean(trained))
    np.testing.assert_allclose(mean(sent), own["A"])


def test_the_log_says_what_is_shared_with_whom():
    shared = {"w": {"a": "w", "b": "w"}, "v": {"a": "v", "b": "v", "c": "v"}, "u": {"b": "u", "c": "u"}}
    match = SimpleNamespace(rule="name", weighting="cases", coverage={"a": (75, 100)}, weights={"a": 3.0, "b": 1.0},
                            shared=shared)
    lines = describe_match(match, "a")
    assert "75 of 100 parameters (75.0%)" in lines[0]
    assert lines[1:] == ["  1 tensors with b", "  1 tensors with b, c", "Weights of the sites (cases): a 3, b 1"]
