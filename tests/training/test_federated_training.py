"""The mixin that exchanges weights, with a network and a logger of a few lines."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from patience import PATIENCE_S

from nnunetv2.federated.errors import NonFiniteError, RefusedError, ShortEpochError
from nnunetv2.federated.privacy.min_cases import DEFAULT
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.rounds import Rounds
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.federated.federated_training import (
    METRICS,
    FederatedTraining,
    PendingExchange,
)
from nnunetv2.training.nnUNetTrainer.variants.federated.health import check_epoch, kind_of
from nnunetv2.training.nnUNetTrainer.variants.federated.network_weights import export_weights, import_weights_
from nnunetv2.training.nnUNetTrainer.variants.federated.nnUNetTrainerFedAvg import (
    nnUNetTrainerAsymFedAvg,
    nnUNetTrainerAsymFedAvgOverlapped,
)
from nnunetv2.training.nnUNetTrainer.variants.federated.overlapped_training import OverlappedTraining, catch_up
from nnunetv2.training.nnUNetTrainer.variants.federated.rank_zero import FirstProcessError
from nnunetv2.training.nnUNetTrainer.variants.federated.registration import describe_match
from nnunetv2.training.options import OptionError, TrainingOptions
from nnunetv2.training.stopping import listening


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
    curves = {
        "train_losses": [0.5] * epoch,
        "dice_per_class_or_region": [[0.1, 0.2]] * epoch,
        "epoch_start_timestamps": [1.0] * epoch,
    }
    trainer.logger = SimpleNamespace(local_logger=SimpleNamespace(my_fantastic_logging=curves))
    trainer.current_epoch = epoch
    trainer.print_to_log_file = lambda *_: None
    trainer.local_rank = 0
    return trainer, curves


def test_missed_epochs_are_gaps_in_the_curves():
    trainer, curves = make_trainer(2)
    trainer.resume_at(4)
    assert trainer.current_epoch == 4
    assert {len(values) for values in curves.values()} == {4}
    assert np.isnan(curves["train_losses"][2:]).all()
    assert np.isfinite(curves["epoch_start_timestamps"]).all()


def test_an_epoch_that_was_not_exchanged_is_trained_again():
    trainer, curves = make_trainer(3)
    trainer.resume_at(2)
    assert trainer.current_epoch == 2
    assert len(curves["train_losses"]) == 3  # overwritten when the epoch ends once more


@pytest.mark.parametrize(
    ("losses", "error", "complaint"),
    [
        ([0.5, 0.4], ShortEpochError, "had 2 of 3 iterations"),
        ([0.5, float("nan"), float("inf")], NonFiniteError, "from iteration 1 of epoch 7 on .2 of 3"),
    ],
)
def test_what_is_no_proper_epoch_becomes_no_update(losses, error, complaint):
    with pytest.raises(error, match=complaint):
        check_epoch([{"loss": np.float32(loss)} for loss in losses], epoch=7, num_iterations=3)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "OutOfMemoryError"),
        (MemoryError(), "OutOfMemoryError"),
        (RuntimeError("One or more background workers are no longer alive.\ncase_17"), "DataLoaderError"),
        (ValueError("/data/patient 17"), "ValueError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_only_the_kind_of_an_error_leaves(error, kind):
    assert kind_of(error) == kind


# ------------------------------------------------------------------------------------------------- a delayed average
def test_catching_up_adds_what_was_learned_meanwhile():
    caught_up = catch_up(
        {"w": np.array([2.0, 4.0])}, {"w": np.array([1.5, 1.0]), "own": np.ones(1)}, {"w": np.array([1.0, 1.0])}
    )
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
    match = messages.Match.model_construct(
        rule="name",
        weighting="cases",
        coverage={"a": (75, 100)},
        weights={"b": 1.0, "a": 1.0},
        shared=shared,
        initial_owner={"w": "a", "v": "b", "u": "b"},
        kept_local=(),
        received={},
    )
    lines = describe_match(match, "a")
    assert "75 of 100 parameters (75.0%)" in lines[0]
    assert lines[1:] == [
        "  1 tensors with b only: each of the two can compute what the other has sent",
        "  1 tensors with b, c",
        "Initial weights: those of this site (1 tensors), site b (1 tensors)",
        "Each of a, b counts by its training cases",
    ]


# ------------------------------------------------------------------------------------------------------ what is said
class Transport:
    def __init__(self, *_, **__) -> None:
        self.reports = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def report_failure(self, *report) -> None:
        self.reports.append(report)


@pytest.mark.parametrize(
    ("error", "reports"),
    [
        (MemoryError("case_17"), [("3d_fullres.fold_0.Failing", 5, "OutOfMemoryError")]),
        (FirstProcessError("process 0 of this site failed"), []),
        (OptionError("--epochs 5 contradicts the federation"), []),
    ],
)
def test_every_process_reports_what_went_wrong_in_it(error, reports):
    class Base:
        def run_training(self):
            raise error

    class Failing(FederatedTraining, Base):
        credential = SimpleNamespace(site="a")
        configuration_name, fold, round_in_training = "3d_fullres", 0, 5
        plans_manager = SimpleNamespace(dataset_name="Dataset001_X")

        def do_split(self):
            return [f"case_{number}" for number in range(DEFAULT)], []

        def print_to_log_file(self, *_):
            pass

    trainer, transport = Failing(), Transport()
    trainer.make_transport = lambda *_, **__: transport
    with pytest.raises(type(error)):
        trainer.run_training()
    assert transport.reports == reports


def test_an_option_that_contradicts_the_federation_changes_nothing():
    trainer, _ = make_trainer(0)
    trainer.num_epochs, trainer.training_options = 1000, TrainingOptions(epochs=5)
    with pytest.raises(OptionError, match="--epochs 5 contradicts federation F"):
        trainer.apply_settings(FederationSettings(federation="F", sites=("a", "b"), num_epochs=40))
    assert trainer.num_epochs == 1000


def test_a_signal_stops_no_site_and_is_answered_once():
    trainer, _ = make_trainer(0)
    lines = []
    trainer.log_line = lines.append
    with listening():
        assert not trainer._has_to_stop() and not lines
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not trainer._has_to_stop() and not trainer._has_to_stop()
    (line,) = lines
    assert "SIGUSR1 does not stop this training" in line and "nnUNetv2_fed_leave" in line


# ------------------------------------------------------------------------------------- what happens during an epoch
class Counting:
    """A trainer of a few lines: its only weight is the number of epochs that it has trained."""

    def on_train_epoch_start(self):
        pass

    def on_train_epoch_end(self, outputs):
        self.weight += 1
        self.logger.log("train_losses", 0.5 + self.current_epoch, self.current_epoch)

    def validate(self):
        for name in ("val_losses", "mean_fg_dice"):
            self.logger.log(name, 0.25 + self.current_epoch, self.current_epoch)
        self.logger.log("dice_per_class_or_region", [0.25, float("nan")], self.current_epoch)

    def on_epoch_end(self):
        self.current_epoch += 1


class Meeting(FederatedTraining, Counting):
    """Three epochs of one iteration; the others' weights are zero, so the aggregate is half of one's own."""

    local_rank, num_epochs, num_iterations_per_epoch, current_epoch, weight = 0, 3, 1, 0, 0.0
    _writing_in_background = nullcontext

    def __init__(self, exchange=None):
        self.participant = SimpleNamespace(run="run", exchange=exchange or self.exchange, megabytes=0.0)
        self.logger, self.sent, self.saved = MetaLogger(None, resume=False), [], []

    def exchange(self, number, weights, update):
        self.sent.append((number, weights["w"], update))
        return {"w": weights["w"] / 2}, messages.Aggregate(round=number, contributors={"a": 1.0, "b": 1.0})

    def run_epoch(self):
        self.on_train_epoch_start()
        self.on_train_epoch_end([{"loss": 0.5}])
        self.validate()
        self.on_epoch_end()

    def local_weights(self):
        return {"w": np.float32(self.weight)}

    def load_weights(self, weights):
        self.weight = float(weights["w"])

    def log_line(self, line, **_):
        pass

    def save_latest_checkpoint(self):
        self.saved.append((self.current_epoch, self.weight))

    def validate_aggregate(self, aggregate, *, is_last):
        pass


def test_weights_travel_while_they_are_validated():
    has_begun, is_validated = threading.Event(), threading.Event()

    def exchange(number, weights, update):
        has_begun.set()
        assert is_validated.wait(PATIENCE_S)
        return trainer.exchange(number, weights, update)

    class Patient(Meeting):
        def validate(self):
            assert has_begun.wait(PATIENCE_S)
            assert self.weight == 1  # its own weights, whatever has arrived
            super().validate()
            is_validated.set()

    trainer = Patient(exchange)
    trainer.run_epoch()
    assert [(number, weight) for number, weight, _ in trainer.sent] == [(0, 1)]
    assert trainer.saved == [(1, 0.5)]


def test_an_update_brings_the_validation_of_the_one_before():
    trainer = Meeting()
    for _ in range(trainer.num_epochs):
        trainer.run_epoch()
    first, second, last = (update for _, _, update in trainer.sent)
    assert (first.metrics, first.earlier) == ({"train_losses": 0.5}, None)
    assert second.metrics == {"train_losses": 1.5}
    assert second.earlier == messages.EarlierMetrics(
        round=0, metrics={"val_losses": 0.25, "mean_fg_dice": 0.25, "dice_per_class_or_region": [0.25, None]}
    )
    assert last.metrics.keys() == set(METRICS) and last.metrics["val_losses"] == 2.25
    assert last.earlier.round == 1 and last.earlier.metrics["val_losses"] == 1.25


class Patient(Meeting):
    """Exchanges after every second of five epochs."""

    num_epochs, rounds = 5, Rounds(2)


def test_within_a_round_of_several_epochs_nothing_travels_and_all_is_saved():
    trainer = Patient()
    for _ in range(trainer.num_epochs):
        trainer.run_epoch()
    assert [(number, weight) for number, weight, _ in trainer.sent] == [(0, 2), (1, 3), (2, 2.5)]
    assert trainer.saved == [(1, 1), (2, 1), (3, 2), (4, 1.5)]
    assert trainer.current_epoch == 5 and trainer.weight == 1.25


def test_an_update_of_several_epochs_says_what_the_last_of_them_measured():
    trainer = Patient()
    for _ in range(trainer.num_epochs):
        trainer.run_epoch()
    first, second, last = (update for _, _, update in trainer.sent)
    assert (first.metrics, first.earlier) == ({"train_losses": 1.5}, None)
    assert second.metrics == {"train_losses": 3.5}
    assert second.earlier.round == 0 and second.earlier.metrics["val_losses"] == 1.25
    assert last.metrics["train_losses"] == 4.5 and last.metrics["val_losses"] == 4.25
    assert last.earlier.round == 1 and last.earlier.metrics["val_losses"] == 3.25


def test_a_failure_within_a_round_is_reported_for_that_round():
    trainer = Patient()
    rounds = []
    for _ in range(3):
        trainer.run_epoch()
        rounds.append(trainer.round_in_training)
    assert rounds == [0, 0, 1]


def test_a_late_site_goes_on_at_the_round_of_the_aggregate():
    trainer = Patient()
    for brought, expected in ((0, 2), (1, 4), (2, 5)):
        trainer.num_epochs, trainer.current_epoch = 5, 2
        trainer.resume_at = lambda epoch: setattr(trainer, "current_epoch", epoch)
        trainer.resume_after(messages.Aggregate(round=brought, contributors={}), 1)
        assert trainer.current_epoch == expected
    trainer.current_epoch = 4
    trainer.resume_after(messages.Aggregate(round=0, contributors={}), 3)  # the operator has stopped the run
    assert trainer.num_epochs == 4


def test_a_trainer_without_validation_sends_what_it_has():
    class Blind(Meeting):
        def validate(self):
            pass

    trainer = Blind()
    for _ in range(trainer.num_epochs):
        trainer.run_epoch()
    assert [update.metrics for _, _, update in trainer.sent] == [{"train_losses": epoch + 0.5} for epoch in range(3)]


def test_an_exchange_that_is_refused_ends_its_epoch_with_the_own_weights_saved():
    def refuse(number, weights, update):
        raise RefusedError("no", code="not_expected")

    trainer = Meeting(refuse)
    with pytest.raises(RefusedError):
        trainer.run_epoch()
    assert len(trainer.logger.get_value("val_losses", None)) == 1  # the epoch has been validated
    assert trainer.saved == [(1, 1.0)]


def test_weights_that_broke_in_training_are_not_saved():
    def refuse(number, weights, update):
        raise NonFiniteError("tensor w holds NaN")

    trainer = Meeting(refuse)
    with pytest.raises(NonFiniteError):
        trainer.run_epoch()
    assert trainer.saved == []


def test_an_overlapped_training_sends_the_validation_with_its_update():
    trainer = type("Delayed", (OverlappedTraining, Meeting), {})()
    for _ in range(trainer.num_epochs):
        trainer.run_epoch()
    assert [number for number, _, _ in trainer.sent] == [0, 1, 2]
    assert all(update.metrics.keys() == set(METRICS) and update.earlier is None for _, _, update in trainer.sent)


# --------------------------------------------------------------------------------------- where an overlapped run goes
class Overlapped(OverlappedTraining):
    """Epoch `epoch` of 10 is over; the exchange that was under way has brought an aggregate of 7."""

    local_rank, num_epochs = 0, 10
    _writing_in_background = nullcontext

    def __init__(self, epoch: int, brought: int) -> None:
        self.current_epoch, self.weights, self.done = epoch + 1, {"w": np.array([2.0])}, []
        self.pending = PendingExchange(epoch - 1, {"w": np.array([1.0])}, Future())
        self.pending.answer.set_result(({"w": np.array([7.0])}, self.aggregate(brought)))
        self.participant = SimpleNamespace(run="run", exchange=self.exchange, megabytes=0.0)
        self.logger = MetaLogger(None, resume=False)

    @staticmethod
    def aggregate(number: int) -> messages.Aggregate:
        return messages.Aggregate(round=number, contributors={"a": 1.0, "b": 1.0})

    def exchange(self, number, weights, update):
        assert update.earlier is None
        self.done.append(("exchange", number, float(weights["w"][0])))
        return weights, self.aggregate(number)

    def local_weights(self):
        return dict(self.weights)

    def load_weights(self, weights):
        self.weights = dict(weights)

    def log_line(self, line, **_):
        pass

    def save_latest_checkpoint(self):
        self.done.append(("save", self.current_epoch))

    def validate_aggregate(self, aggregate, *, is_last):
        self.done.append(("validate", aggregate.round, float(self.weights["w"][0]), is_last))


@pytest.mark.parametrize(
    ("epoch", "brought", "done", "ends_at"),
    [
        # As usual: validate what came, go on from 7 + (2 - 1), and send that.
        (4, 3, [("validate", 3, 7.0, False), ("save", 5), ("exchange", 4, 8.0)], None),
        # The run has closed two rounds without this site: it goes on behind them.
        (4, 6, [("validate", 6, 7.0, False), ("save", 8), ("exchange", 7, 8.0)], None),
        # The last round is waited for.
        (9, 8, [("validate", 8, 7.0, False), ("exchange", 9, 8.0), ("validate", 9, 8.0, True)], 10),
        # The run is complete without this site, or was stopped: what came stays.
        (4, 9, [("validate", 9, 7.0, True)], 10),
        (4, 2, [("validate", 2, 7.0, True)], 5),
    ],
)
def test_an_overlapped_training_goes_on_where_the_run_is(epoch, brought, done, ends_at):
    trainer = Overlapped(epoch, brought)
    trainer.exchange_weights(epoch)
    if trainer.pending is not None:
        trainer.pending.answer.result(PATIENCE_S)
    assert trainer.done == done
    assert (trainer.current_epoch == trainer.num_epochs) is (ends_at is not None)
    assert ends_at is None or trainer.num_epochs == ends_at


# ---------------------------------------------------------------------------------------------- hooks with older names
def test_a_hook_that_is_overridden_by_its_older_name_is_heard():
    done = []

    class Later(OverlappedTraining):
        def exchange_weights(self, epoch):
            done.append("later")

    with pytest.warns(DeprecationWarning, match="Older.meet_the_others is now called exchange_weights"):

        class Older(Later):
            def meet_the_others(self, epoch):
                super().meet_the_others(epoch)
                done.append("older")

    class Newer(Older):
        def exchange_weights(self, epoch):
            super().exchange_weights(epoch)
            done.append("newer")

    Newer().exchange_weights(0)
    assert done == ["later", "older", "newer"]
    done.clear()
    Newer().meet_the_others(0)
    assert done == ["later", "older", "newer"]


# -------------------------------------------------------------------------------------------------------- checkpoints
class Uploading(nnUNetTrainerAsymFedAvg):
    def on_epoch_end(self):
        super().on_epoch_end()  # and then, say, copies checkpoint_latest


@pytest.mark.parametrize(
    ("trainer_class", "is_written_meanwhile"),
    [
        (nnUNetTrainer, True),
        (nnUNetTrainerAsymFedAvg, True),
        (nnUNetTrainerAsymFedAvgOverlapped, True),
        (Uploading, False),
    ],
)
def test_nobody_waits_for_checkpoints_unless_a_hook_may_look_for_them(trainer_class, is_written_meanwhile):
    trainer = trainer_class.__new__(trainer_class)
    with trainer._writing_in_background():
        assert trainer._is_writing_in_background is is_written_meanwhile
    assert not trainer._is_writing_in_background


@pytest.mark.parametrize(
    "weights",
    [
        {"first.weight": np.ones(1, np.float32)},
        {"first.weight": np.ones((), np.float32)},
        {"first.weight": np.ones((2, 2), np.int64)},
        {"nobody.weight": np.ones((2, 2), np.float32)},
        {"again.weight": np.ones((1, 2), np.float32)},
    ],
    ids=["one value", "no axis", "integers", "unknown", "one row"],
)
def test_weights_of_another_network_are_refused_before_any_is_written(weights):
    network = Tied()
    before = export_weights(network)
    with pytest.raises(ValueError, match="the network has"):
        import_weights_(network, {"first.weight": np.full((2, 2), 7, np.float32), **weights})
    assert all(np.array_equal(values, before[name]) for name, values in export_weights(network).items())
