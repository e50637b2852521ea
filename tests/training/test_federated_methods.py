"""What sites do beside plain averaging, as the operator wants it: a killed site ends as an undisturbed one does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fake_federation import in_threads, wait_until
from federated_sites import run_of, weights_of
from seeded_sites import Seeded, assert_same
from trained_sites import FINETUNED, HEADS, found_with_weights, train

from nnunetv2.federated.protocol.document import open_document
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.variants.federated.nnUNetTrainerFedAvg import nnUNetTrainerAsymFedAvgOverlapped

pytestmark = pytest.mark.slow

RUN = "3d_fullres.fold_0.nnUNetTrainerAsymFedAvg"


def apart(one, other) -> float:
    """Return how far the models of two trainings are apart."""
    ours, theirs = weights_of(one["A"]), weights_of(other["A"])
    return float(np.sqrt(sum(((ours[name] - theirs[name]) ** 2).sum() for name in ours)))


@pytest.fixture
def plain(make_sites):
    return train(make_sites, "plain")


def test_proximal_trainings_are_the_same_after_a_kill_and_stay_near(make_sites, plain):
    undisturbed = train(make_sites, "undisturbed", proximal=5.0)
    assert_same(undisturbed, train(make_sites, "killed", proximal=5.0, dies_in_epoch=1))
    assert apart(undisturbed, plain) > 1e-4
    norms = [
        np.mean([site["change_norm"] for record in one["records"] for site in record["sites"].values()])
        for one in (undisturbed, plain)
    ]
    assert norms[0] < norms[1]  # updates stay nearer to what their rounds began with
    assert {record["settings"]["proximal"] for record in undisturbed["records"]} == {5.0}
    assert all("proximal" not in record["settings"] for record in plain["records"])
    assert any("Proximal term of strength 5" in line for line in undisturbed["B"].lines)


def test_a_site_that_is_killed_within_a_round_is_pulled_to_what_the_round_began_with(make_sites):
    settings = {"proximal": 5.0, "exchange_every": 3, "num_epochs": 4}
    undisturbed = train(make_sites, "undisturbed", **settings)
    assert_same(undisturbed, train(make_sites, "killed", dies_in_epoch=2, **settings))


@pytest.mark.parametrize("what", ["head", "norm"])
def test_sites_keep_their_own_tensors_and_the_common_model_is_whole(make_sites, what):
    settings = {"keep_local": what, "validate_every": 1}
    undisturbed = train(make_sites, "undisturbed", **settings)
    assert_same(undisturbed, train(make_sites, "killed", dies_in_epoch=1, **settings))
    a, b = (weights_of(undisturbed[site]) for site in "AB")
    own = {name for name in a if not np.array_equal(a[name], b[name])}
    assert own and all((HEADS if what == "head" else ".norm.") in name or "all_modules.1" in name for name in own)
    assert undisturbed["records"][-1]["settings"]["keep_local"] == what
    # The coordinator's model has the mean of what the sites have of these, and the rest of both.
    common = torch.load(next(undisturbed["folder"].glob("models/*/fold_0/checkpoint_final.pth")), weights_only=True)[
        "network_weights"
    ]
    for name, values in a.items():
        expected = (values + b[name]) / 2 if name in own else values
        np.testing.assert_allclose(common[name].numpy(), expected, rtol=1e-5, atol=1e-7, err_msg=name)


def test_the_common_model_is_validated_and_not_what_a_site_keeps(make_sites):
    sites = make_sites(keep_local="head", validate_every=1, num_epochs=1)
    trainers = [sites.trainer(site, Seeded) for site in "AB"]
    seen = {}
    for trainer in trainers:
        step = trainer.validation_step

        def look(batch, trainer=trainer, step=step):
            head = {n: t.clone() for n, t in trainer.network.state_dict().items() if HEADS in n}
            seen.setdefault(trainer.credential.site, []).append(head)
            return step(batch)

        trainer.validation_step = look
    assert sites.run(*trainers) == [None, None]
    for name, values in seen["A"][-1].items():
        assert torch.equal(values, seen["B"][-1][name])  # the aggregate
        assert not torch.equal(seen["A"][0][name], seen["B"][0][name])  # each site's own
        for trainer in trainers:
            own = weights_of(trainer)[name]
            np.testing.assert_array_equal(own, seen[trainer.credential.site][0][name].numpy())


def test_a_site_that_joins_late_begins_with_the_average_and_keeps_its_own_from_then_on(make_sites):
    sites = make_sites(sites=("A", "B", "C"), quorum=2, deadline_s=1e6, keep_local="head", num_epochs=4)
    first, second = sites.trainer("A", Seeded), sites.trainer("B", Seeded)
    coordinator, run = sites.federation.coordinator, run_of(first)
    lines = []

    def join_late():
        wait_until(lambda: coordinator.state.registry.run_state(run).members)
        sites.act("pause", run)
        coordinator.invite("D", "site", by="boss")
        late = sites.trainer("D", Seeded)
        late.lines = lines
        loaded, load = [], late.load_weights
        late.load_weights = lambda weights: (loaded.append(set(weights)), load(weights))
        late.run_training()
        return late, loaded

    def resume():
        """Let the others go on when the newcomer is among them, so that they do not end before."""
        wait_until(lambda: any("operator has paused" in line for line in lines))
        sites.act("resume", run)

    third = sites.trainer("C", Seeded)
    *others, joined = in_threads(first.run_training, second.run_training, third.run_training, resume, join_late)
    assert others == [None] * 4 and not isinstance(joined, BaseException), joined
    late, loaded = joined
    assert late.local_tensors and late.local_tensors <= loaded[0]
    assert any(not late.local_tensors & names for names in loaded[1:])
    name = min(late.local_tensors)
    assert not np.array_equal(weights_of(late)[name], weights_of(first)[name])


class Overlapped(nnUNetTrainerAsymFedAvgOverlapped, Seeded):
    get_dataloaders = Seeded.get_dataloaders


def test_an_overlapped_training_keeps_its_own_tensors_too(make_sites):
    sites = make_sites(keep_local="head", proximal=0.1, num_epochs=4)
    trainers = [sites.trainer(site, Overlapped) for site in "AB"]
    assert sites.run(*trainers) == [None, None]
    first, second = map(weights_of, trainers)
    for name, values in first.items():
        assert np.array_equal(values, second[name]) == (HEADS not in f".{name}"), name


def test_a_name_that_no_tensor_has_is_refused(make_sites):
    sites = make_sites(keep_local="backbone")
    errors = sites.run(sites.trainer("A", Seeded), sites.trainer("B", Seeded))
    assert all("--keep-local backbone: none of the tensors" in str(error) for error in errors), errors


@pytest.mark.parametrize("dies_in_epoch", [1, 4], ids=["in a round", "while fine-tuning"])
def test_fine_tuned_networks_are_the_same_after_a_kill_and_stay_beside_the_common_model(make_sites, dies_in_epoch):
    settings = {"finetune_epochs": 2, "proximal": 0.5}
    undisturbed = train(make_sites, "undisturbed", **settings)
    interrupted = train(make_sites, "killed", dies_in_epoch=dies_in_epoch, **settings)
    for name in ("checkpoint_final.pth", FINETUNED):
        assert_same(undisturbed, interrupted, name)
    a, b = (weights_of(undisturbed[site], FINETUNED) for site in "AB")
    final = weights_of(undisturbed["A"])
    assert all(np.array_equal(values, weights_of(undisturbed["B"])[name]) for name, values in final.items())
    assert any(not np.array_equal(a[name], b[name]) for name in a)
    trainer = undisturbed["A"]
    for name, tensor in trainer.network.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), final[name])  # what is validated
    content = torch.load(Path(trainer.output_folder, FINETUNED), weights_only=False)
    assert content["current_epoch"] == 5 and trainer.current_epoch == 3
    rates = content["logging"]["lrs"]
    assert rates[3:] == rates[1:3] and len(undisturbed["records"]) == 3


def test_a_finished_fine_tuning_is_not_repeated_and_an_older_one_is(make_sites):
    sites = make_sites(finetune_epochs=1, num_epochs=1)
    first, second = sites.trainer("A", Seeded), sites.trainer("B", Seeded)
    assert sites.run(first, second) == [None, None]
    before = weights_of(first, FINETUNED)
    again = sites.trainer("A", Seeded, go_on=True)
    again.dies_in_epoch = 1
    assert sites.run(again) == [None]
    assert any("is there already" in line for line in again.lines)
    anew = sites.trainer("A", Seeded)  # another training in the folder, into a run that is over
    assert sites.run(anew) == [None]
    assert not any("is there already" in line for line in anew.lines)
    assert any(not np.array_equal(before[name], weights_of(anew, FINETUNED)[name]) for name in before)


def test_a_site_that_has_fine_tuned_after_a_stop_does_not_do_so_again(make_sites):
    sites = make_sites(finetune_epochs=1, num_epochs=9, exchange_every=2)
    trainers = [sites.trainer(site, Seeded) for site in "AB"]
    run = run_of(trainers[0])

    def stop_in_the_second_round():
        wait_until(lambda: sites.federation.state.store.load_rounds(run))
        sites.act("stop", run)

    assert in_threads(*(trainer.run_training for trainer in trainers), stop_in_the_second_round) == [None] * 3
    before = weights_of(trainers[0], FINETUNED)
    again = sites.trainer("A", Seeded, go_on=True)
    assert sites.run(again) == [None]
    assert any("is there already" in line for line in again.lines)
    assert again.current_epoch == trainers[0].current_epoch
    Path(again.output_folder, FINETUNED).unlink()  # as one that was interrupted
    once_more = sites.trainer("A", Seeded, go_on=True)
    assert sites.run(once_more) == [None]
    for name, values in before.items():
        np.testing.assert_array_equal(weights_of(once_more, FINETUNED)[name], values, err_msg=name)


def test_all_sites_start_from_the_weights_that_the_operator_gives(make_sites, tmp_path):
    source = make_sites(folder="source").trainer("A", Seeded)
    settings = {name: found_with_weights(tmp_path / name, source) for name in ("undisturbed", "killed", "refused")}
    undisturbed = train(make_sites, "undisturbed", **settings["undisturbed"])
    assert_same(undisturbed, train(make_sites, "killed", dies_in_epoch=0, **settings["killed"]))
    for site in "AB":
        text = "\n".join(undisturbed[site].lines)
        assert (
            f"All sites start from the weights of the operator, SHA-256 {settings['killed']['initial_weights']}" in text
        )
    assert undisturbed["records"][0]["settings"]["initial_weights"] == settings["killed"]["initial_weights"]
    with open_document(undisturbed["folder"] / "gatherings" / "runs" / RUN / "initial" / "result.safetensors") as first:
        given = source.network.state_dict()
        for name in first.specs:
            is_head = HEADS in f".{name}" and name.endswith("weight")  # biases of both are 0
            assert np.array_equal(first.read(name), given[name].numpy()) != is_head, name
    # Who brings other weights is named.
    sites = make_sites(folder="refused", num_epochs=1, **settings["refused"])
    a, b = (sites.trainer(site, Seeded) for site in "AB")
    other = tmp_path / "other.pth"
    torch.save({"network_weights": b.network.state_dict()}, other)
    maybe_load_checkpoint(b, False, False, str(other))
    assert all("and B brought others" in str(error) for error in sites.run(a, b))
