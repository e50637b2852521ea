import pickle
from copy import deepcopy

import numpy as np
import torch

from nnunetv2.training.step_results import PendingArray, as_result, fetch, latest_loss
from nnunetv2.utilities.collate_outputs import collate_outputs


def test_results_on_the_cpu_are_arrays_at_once():
    loss = as_result(torch.tensor(0.5, requires_grad=True))
    assert isinstance(loss, np.ndarray) and loss.shape == () and loss == 0.5


def test_a_pending_array_behaves_like_the_array_it_becomes():
    loss, counts = PendingArray(torch.tensor(0.5)), PendingArray(torch.tensor([1.0, 2.0]))
    assert float(loss) == 0.5 and f"{loss:.2f}" == "0.50" and loss + 1 == 1.5 and loss.item() == 0.5
    assert counts.sum() == 3 and counts[1] == 2 and len(counts) == 2 and counts.shape == (2,)
    assert np.mean([loss, loss]) == 0.5 and np.isfinite(loss) and np.asarray(counts).dtype == np.float32


def test_the_results_of_an_epoch_are_fetched_together():
    outputs = [{"loss": PendingArray(torch.tensor(float(i))), "mine": i} for i in range(3)]
    fetched = fetch(outputs)
    assert [type(output["loss"]) for output in fetched] == [np.ndarray] * 3
    assert collate_outputs(fetched)["mine"] == [0, 1, 2]
    np.testing.assert_array_equal(collate_outputs(fetched)["loss"], [[0], [1], [2]])


def test_a_pending_array_can_be_changed_in_place():
    counts = kept = PendingArray(torch.tensor([1.0, 2.0]))
    counts[0] = 5
    counts += np.ones(2)
    np.testing.assert_array_equal(counts, [6, 3])
    np.testing.assert_array_equal(kept, [6, 3])
    assert fetch([{"tp": kept}])[0]["tp"].tolist() == [6, 3]


def test_other_processes_and_copies_get_plain_arrays():
    sent = pickle.loads(pickle.dumps(PendingArray(torch.tensor([1.0, 2.0]))))
    copied = deepcopy(PendingArray(torch.tensor(0.5)))
    assert type(sent) is np.ndarray and sent.tolist() == [1, 2]
    assert type(copied) is np.ndarray and copied.shape == () and copied == 0.5


def test_steps_need_not_all_return_the_same():
    outputs = [
        {"loss": PendingArray(torch.tensor(1.0))},
        {"loss": np.array(2.0)},
        {"loss": PendingArray(torch.ones(1))},
    ]
    assert [output["loss"].tolist() for output in fetch(outputs)] == [1, 2, [1]]
    assert all(type(output["loss"]) is np.ndarray for output in fetch(outputs))
    assert fetch([{"loss": PendingArray(torch.tensor(1.0))}, None])[1] is None


def test_a_training_loop_of_somebody_else_may_collate_results_as_steps_return_them():
    outputs = [{"loss": PendingArray(torch.tensor(float(i))), "tp_hard": PendingArray(torch.ones(2))} for i in range(3)]
    collated = collate_outputs(outputs)
    assert type(collated["loss"]) is np.ndarray and collated["loss"].tolist() == [[0], [1], [2]]
    assert collated["tp_hard"].shape == (3, 2)


def test_what_a_step_of_somebody_else_returns_is_left_alone():
    assert fetch([None, None]) == [None, None] and fetch([]) == []
    assert latest_loss([]) is None and latest_loss([None]) is None and latest_loss([{"loss": [1, 2]}]) is None
    assert latest_loss([{"loss": np.float32(2)}]) == 2
