"""The mixin that exchanges weights, with a network and a logger of a few lines."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunetv2.training.nnUNetTrainer.variants.federated.federated_training import (
    FederatedTraining,
    describe_match,
    export_weights,
    import_weights_,
)


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


def test_several_devices_per_site_are_refused():
    trainer, _ = make_trainer(0)
    trainer.is_ddp = True
    with pytest.raises(ValueError, match="one device per site"):
        trainer.run_training()


def test_the_log_says_what_is_shared_with_whom():
    shared = {"w": {"a": "w", "b": "w"}, "v": {"a": "v", "b": "v", "c": "v"}, "u": {"b": "u", "c": "u"}}
    match = SimpleNamespace(rule="name", weighting="cases", coverage={"a": (75, 100)}, weights={"a": 3.0, "b": 1.0},
                            shared=shared)
    lines = describe_match(match, "a")
    assert "75 of 100 parameters (75.0%)" in lines[0]
    assert lines[1:] == ["  1 tensors with b", "  1 tensors with b, c", "Weights of the sites (cases): a 3, b 1"]
