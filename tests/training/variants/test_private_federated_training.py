"""Two sites that train together with differential privacy, over real HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_federation import in_threads, make_settings, served, wait_until
from patience import PATIENCE_S
from tiny_dataset import NAME, make_dataset_json, make_plans, make_tiny_dataset

from nnunetv2.federated.commands import manifest
from nnunetv2.federated.coordinator.dashboard.overview import OverviewBuilder
from nnunetv2.federated.privacy.disclosure import allow_list_of
from nnunetv2.federated.privacy.ledger import LEDGER_FILE, Budget, BudgetError, read_ledger, set_budget
from nnunetv2.federated.protocol import keys
from nnunetv2.federated.site.transports.http import HttpTransport
from nnunetv2.plans.partial_labels import with_union
from nnunetv2.training.differential_privacy.options import PrivacyOptions
from nnunetv2.training.nnUNetTrainer.variants.privacy.nnUNetTrainerDPAsymFedAvg import nnUNetTrainerDPAsymFedAvg

pytestmark = pytest.mark.slow

CASES = 24
RUN = keys.run_name("3d_fullres", 0, "nnUNetTrainerDPAsymFedAvg")


def make_trainer(federation, folder: Path, site: str, monkeypatch, *, epsilon=50.0, dataset_json=None):
    for root in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(root, str(folder / site / root))
    preprocessed = folder / site / "nnUNet_preprocessed"
    if not preprocessed.exists():
        make_tiny_dataset(preprocessed, cases=CASES)
        cases = [f"case_{number:02}" for number in range(CASES)]
        (preprocessed / NAME / "splits_final.json").write_text(json.dumps([{"train": cases[:21], "val": cases[21:]}]))
        if epsilon is not None:
            set_budget(preprocessed / NAME / LEDGER_FILE, Budget(epsilon=epsilon, delta=1e-3), by="A. Weiss")
    plans = {**make_plans(), "continue_training": False}
    trainer = nnUNetTrainerDPAsymFedAvg(
        plans, "3d_fullres", 0, dataset_json or make_dataset_json(), torch.device("cpu")
    )
    trainer.credential = federation.credential(site)
    trainer.privacy_options = PrivacyOptions(sigma=30.0)
    trainer.make_transport = lambda credential, report: HttpTransport(
        credential, report=report, pause_s=0.05, give_up_after_s=PATIENCE_S
    )
    trainer.initialize()  # before the environment is another site's
    return trainer


@pytest.fixture
def quiet_machine(monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_cpu_autocast", "0")


def test_only_what_is_private_leaves_and_everybody_reads_what_was_declared(tmp_path, monkeypatch, quiet_machine):
    settings = make_settings(num_epochs=2, num_iterations_per_epoch=2, num_val_iterations_per_epoch=1, validate_every=1)
    with served(tmp_path / "federation", settings) as federation:
        trainers = [make_trainer(federation, tmp_path, site, monkeypatch) for site in ("A", "B")]
        # What the manifest lists is all that a training needs to send: no losses, no Dice, no counts of voxels.
        documents = manifest.collect(
            NAME, ["3d_fullres"], trainer="nnUNetTrainerDPAsymFedAvg", plans_name="nnUNetPlans"
        )
        assert {one.kind for one in documents} & {"validation"} == set()
        allowed = allow_list_of(documents, coordinator=trainers[0].credential.url)
        assert not [path for path in allowed.documents["update"].fields if "metrics" in path]
        (tmp_path / "allow.json").write_text(allowed.model_dump_json())
        monkeypatch.setenv("nnUNet_fed_allow", str(tmp_path / "allow.json"))
        assert in_threads(*(trainer.run_training for trainer in trainers)) == [None, None]

        store = federation.state.store
        rounds = store.load_rounds(RUN)
        assert [record["round"] for record in rounds] == [0, 1]
        for record in rounds:
            for contributed in record["sites"].values():
                assert not contributed["metrics"] and contributed["earlier"] is None
                assert contributed["declared_privacy"]["epsilon"] == 50.0
                assert contributed["declared_privacy"]["unit"] == "scan"
        assert store.load_validations(RUN) == []
        wait_until(lambda: store.load_events("model"))
        (event,) = store.load_events("model")
        assert "model written to" in event.detail["outcome"]
        assert (
            "declared by the sites: epsilon 50 per scan"
            in OverviewBuilder(federation.coordinator).build().runs[0].privacy
        )
        final = [torch.load(Path(t.output_folder, "checkpoint_final.pth"), weights_only=False) for t in trainers]
        for name, values in final[0]["network_weights"].items():
            assert torch.equal(values, final[1]["network_weights"][name])
    for site in ("A", "B"):
        assert len(read_ledger(tmp_path / site / "nnUNet_preprocessed" / NAME / LEDGER_FILE).charges) == 2


def test_a_site_without_a_budget_trains_nothing_and_says_so(tmp_path, monkeypatch, quiet_machine):
    with served(tmp_path / "federation", make_settings(num_epochs=2, num_iterations_per_epoch=2)) as federation:
        trainer = make_trainer(federation, tmp_path, "A", monkeypatch, epsilon=None)
        with pytest.raises(BudgetError, match="has no privacy budget yet"):
            trainer.run_training()
        assert not federation.state.registry.has_run(RUN)


def test_sites_with_differential_privacy_may_annotate_different_classes(tmp_path, monkeypatch, quiet_machine):
    settings = make_settings(
        num_epochs=1, num_iterations_per_epoch=2, num_val_iterations_per_epoch=1, sites=("A", "B", "C"), labels="union"
    )
    union = {"background": 0, "blob": 1, "core": 2}
    with served(tmp_path / "federation", settings) as federation:
        trainers = []
        for site, classes in (("A", ["blob"]), ("B", ["blob", "core"]), ("C", ["blob", "core"])):
            raw = make_dataset_json(labels={name: union[name] for name in ("background", *classes)})
            described = with_union(raw, union)
            trainers.append(make_trainer(federation, tmp_path, site, monkeypatch, dataset_json=described))
        assert in_threads(*(trainer.run_training for trainer in trainers)) == [None] * 3
        final = [torch.load(Path(t.output_folder, "checkpoint_final.pth"), weights_only=False) for t in trainers]
        for name, values in final[0]["network_weights"].items():
            assert all(torch.equal(values, other["network_weights"][name]) for other in final[1:])
