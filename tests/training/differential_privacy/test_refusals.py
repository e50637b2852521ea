"""What is refused, each in one sentence that says what to do."""

from __future__ import annotations

import pytest
import torch

from nnunetv2.experiment_planning.plans_for_pretraining.other_channels import adapt_channels
from nnunetv2.training.differential_privacy import refusals
from nnunetv2.training.differential_privacy.refusals import PrivacyRefusedError

FIELD = "foreground_intensity_properties_per_channel"
INTENSITIES = {"0": {"mean": 0.5, "std": 0.2}}


def test_several_processes_are_refused():
    with pytest.raises(PrivacyRefusedError, match="DDP, -num_gpus.*train with one"):
        refusals.check_process(is_ddp=True, has_grad_scaler=False)


def test_float16_is_refused():
    with pytest.raises(PrivacyRefusedError, match="needs bfloat16 or float32"):
        refusals.check_process(is_ddp=False, has_grad_scaler=True)


@pytest.mark.parametrize("layer", [torch.nn.BatchNorm1d(2), torch.nn.BatchNorm3d(2), torch.nn.SyncBatchNorm(2)])
def test_batch_normalization_is_refused_by_its_name(layer):
    network = torch.nn.ModuleDict({"stem": torch.nn.Sequential(torch.nn.Identity(), layer)})
    with pytest.raises(PrivacyRefusedError, match=r"batch normalization \(stem.1\) mixes the patients"):
        refusals.check_network(network)
    refusals.check_network(torch.nn.Sequential(torch.nn.InstanceNorm3d(2), torch.nn.GroupNorm(1, 2)))


def test_few_patients_are_refused():
    with pytest.raises(PrivacyRefusedError, match="fold 0 has 19 training patients, and .* needs 20 or more"):
        refusals.check_number(19, "patient", 0)
    refusals.check_number(20, "patient", 0)


def test_a_second_stage_needs_a_private_first_one(tmp_path):
    segmentations = tmp_path / "predicted_next_stage" / "3d_cascade_fullres"
    with pytest.raises(PrivacyRefusedError, match="was trained without differential privacy"):
        refusals.check_previous_stage(segmentations)
    for fold in (0, 1):
        (tmp_path / f"fold_{fold}").mkdir()
    (tmp_path / "fold_0" / refusals.RECORD_FILE).write_text("{}")
    with pytest.raises(PrivacyRefusedError, match=r"fold_1, was trained without"):
        refusals.check_previous_stage(segmentations)
    (tmp_path / "fold_1" / refusals.RECORD_FILE).write_text("{}")
    refusals.check_previous_stage(segmentations)
    refusals.check_previous_stage(None)


def test_plans_of_the_same_patients_stay_uncovered_only_if_the_site_says_so():
    plans, own = {FIELD: INTENSITIES}, {"dataset_fingerprint.json": {FIELD: INTENSITIES}}
    with pytest.raises(PrivacyRefusedError, match=r"these very patients \(dataset_fingerprint.json\).*--dp_uncovered"):
        refusals.check_plans(plans, own, may_leak=False)
    assert refusals.check_plans(plans, own, may_leak=True)


def test_plans_of_other_patients_are_covered():
    other = {"dataset_fingerprint.json": {FIELD: {"0": {"mean": 0.7, "std": 0.2}}}}
    assert not refusals.check_plans({FIELD: INTENSITIES}, other, may_leak=False)


def test_pooled_plans_count_as_those_of_the_same_patients():
    """The fingerprint beside them is the pooled one, to which these patients have contributed."""
    plans = {FIELD: INTENSITIES}
    fingerprints = {
        "dataset_fingerprint_local.json": {FIELD: {"0": {"mean": 0.1}}},
        "dataset_fingerprint.json": {FIELD: INTENSITIES},
    }
    assert refusals.are_plans_from(plans, fingerprints) == "dataset_fingerprint.json"


def test_one_channel_that_was_measured_here_is_enough():
    own = {FIELD: {"0": {"mean": 0.1}, "1": {"mean": 0.2}}, "median_relative_size_after_cropping": 1.0}
    moved = adapt_channels({FIELD: INTENSITIES, "configurations": {}}, old=["T1"], new=["T1", "T2"], fingerprint=own)
    assert moved[FIELD] == {"0": INTENSITIES["0"], "1": {"mean": 0.2}}
    assert refusals.are_plans_from(moved, {"dataset_fingerprint.json": own}) == "dataset_fingerprint.json"


def test_old_plans_name_their_intensities_otherwise():
    plans = {"foreground_intensity_properties_by_modality": INTENSITIES}
    assert refusals.are_plans_from(plans, {"dataset_fingerprint.json": {FIELD: INTENSITIES}})
