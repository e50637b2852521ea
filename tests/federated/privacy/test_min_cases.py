"""Nothing leaves a site that has fewer cases than its people want to take part with."""

from __future__ import annotations

import pytest
from fake_federation import make_settings, served

from nnunetv2.experiment_planning.federated_planning import PlanningOptions, plan_federated
from nnunetv2.federated.commands import simulate
from nnunetv2.federated.commands.manifest import describe
from nnunetv2.federated.errors import FederationError, NotAllowedError
from nnunetv2.federated.privacy.min_cases import VARIABLE, check_enough_cases, min_cases
from nnunetv2.federated.site.planned_documents import planning_documents

DATASET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1},
    "numTraining": 4,
    "file_ending": ".nii.gz",
}


def test_ten_cases_are_asked_for_unless_the_site_says_otherwise(monkeypatch):
    monkeypatch.delenv(VARIABLE)
    assert min_cases() == 10
    check_enough_cases(10, "it")
    with pytest.raises(NotAllowedError, match="Dataset1_X has 9 training cases, .* with 10 or more: nothing leaves"):
        check_enough_cases(9, "Dataset1_X")
    monkeypatch.setenv(VARIABLE, " 3 ")
    check_enough_cases(3, "it")
    with pytest.raises(NotAllowedError, match="it has 1 training case, .* export nnUNet_fed_min_cases=1"):
        check_enough_cases(1, "it")


@pytest.mark.parametrize("text", ["", "0", "-1", "ten", "1e1", "2.5", "٣", "9" * 30])
def test_what_is_no_number_of_cases_lets_nothing_out(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(FederationError, match=f"{VARIABLE} must be a whole number"):
        check_enough_cases(10**6, "it")


def test_planning_with_too_few_cases_sends_nothing(tmp_path, roots, monkeypatch):
    from demo.phantoms import Scanner, write_dataset

    write_dataset(
        roots["nnUNet_raw"] / "Dataset501_A",
        Scanner(spacing_mm=(3.0, 3.0, 3.0), intensities=(60, 95, 130), noise=0.2, bias=0.05),
        num_train=2,
        num_test=0,
        seed=0,
    )
    monkeypatch.setenv(VARIABLE, "3")
    with served(tmp_path / "federation", make_settings()) as federation:
        federation.credential("A")
        with pytest.raises(NotAllowedError, match="Dataset501_A has 2 training cases"):
            plan_federated(
                "Dataset501_A",
                PlanningOptions(mode="ffe", num_processes=1, show_progress_bar=False),
                credential_file=federation.coordinator.store.folder / "credential.A.json",
            )
        assert not list(federation.coordinator.book)
    assert not any((roots["nnUNet_preprocessed"]).iterdir()), "nothing was read or computed"


def test_the_manifest_says_that_nothing_leaves(monkeypatch):
    documents = planning_documents(DATASET, 4)
    assert "nothing of what follows leaves" not in "\n".join(describe(documents, None))
    monkeypatch.delenv(VARIABLE)
    first = next(describe(documents, None))
    assert first.startswith("As it is, nothing of what follows leaves this site: the dataset has 4 training cases")


def test_a_simulation_chooses_for_its_sites(monkeypatch, tmp_path):
    site = simulate.LocalSite(name="a", dataset="1", credential=tmp_path / "a.json")
    monkeypatch.delenv(VARIABLE)
    assert simulate.site_environment(site, num_sites=1)[VARIABLE] == "1"
    monkeypatch.setenv(VARIABLE, "20")
    assert simulate.site_environment(site, num_sites=1)[VARIABLE] == "20"
