"""Folds in which patients stay whole and groups are spread."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunetv2.experiment_planning.patient_splits import describe_folds, leave_one_group_out, split_patients
from nnunetv2.preprocessed_data.patients_file import find_separated


def make_patients(*scans: int) -> dict[str, str]:
    return {f"P{number}_{scan}": f"P{number}" for number, of_patient in enumerate(scans) for scan in range(of_patient)}


@pytest.mark.slow
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 5), min_size=3, max_size=30), st.integers(2, 3), st.data())
def test_each_case_is_validated_once_and_no_patient_is_separated(scans, num_folds, data):
    patients = make_patients(*scans)
    groups = {case: data.draw(st.sampled_from("AB")) for case in patients}
    folds = split_patients(patients, num_folds, groups)
    assert Counter(case for fold in folds for case in fold["val"]) == dict.fromkeys(patients, 1)
    assert all(sorted(fold["train"] + fold["val"]) == sorted(patients) for fold in folds)
    assert all(fold["train"] and fold["val"] for fold in folds)
    assert find_separated(folds, patients) == []


def test_groups_are_spread_evenly():
    patients = make_patients(*[1] * 40)
    groups = {case: "small" if number < 10 else "large" for number, case in enumerate(patients)}
    for fold in split_patients(patients, 5, groups):
        assert Counter(groups[case] for case in fold["val"]) == {"small": 2, "large": 6}


def test_folds_hold_about_equally_many_cases_although_patients_do_not():
    folds = split_patients(make_patients(6, 1, 1, 1, 1, 1, 1, 3, 3), 3)
    assert [len(fold["val"]) for fold in folds] == [6, 6, 6]


def test_the_split_is_the_same_again_and_another_with_another_seed():
    patients = make_patients(*[1, 2, 3] * 10)
    assert split_patients(patients, 5) == split_patients(dict(reversed(patients.items())), 5)
    assert split_patients(patients, 5) != split_patients(patients, 5, seed=1)


def test_fewer_patients_than_folds_are_refused():
    with pytest.raises(ValueError, match="cannot split 2 patients into 5 folds"):
        split_patients(make_patients(4, 4), 5)


def test_each_group_is_left_out_once():
    patients = make_patients(2, 1, 1)
    groups = {"P0_0": "Bonn", "P0_1": "Bonn", "P1_0": "Ulm", "P2_0": "Ulm"}
    folds = leave_one_group_out(patients, groups)
    assert [fold["val"] for fold in folds] == [["P0_0", "P0_1"], ["P1_0", "P2_0"]]
    assert describe_folds(folds, patients, groups)[0] == (
        "fold 0: train on 2 patients (2 cases), validate on 1 patient (2 cases): Bonn 2"
    )


def test_a_patient_of_two_groups_cannot_be_left_out():
    patients = make_patients(2, 1)
    with pytest.raises(ValueError, match="patient P0 has cases in the groups Bonn, Ulm"):
        leave_one_group_out(patients, {"P0_0": "Bonn", "P0_1": "Ulm", "P1_0": "Ulm"})
    with pytest.raises(ValueError, match="one group, Ulm"):
        leave_one_group_out(patients, dict.fromkeys(patients, "Ulm"))
