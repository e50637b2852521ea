"""Planners get the same plans, to the bit, from order statistics as from lists of all cases."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nnunetv2.errors import InvalidInputError
from nnunetv2.experiment_planning.experiment_planners.case_geometry import (
    ListedGeometry,
    PooledGeometry,
    geometry_of,
    resampled_shapes,
)
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from nnunetv2.preprocessed_data.fingerprint_files import LOCAL_FINGERPRINT, count_cases


def statistics_of(spacings, shapes, *targets) -> dict:
    """Return what a federation pools of these cases."""
    return {
        "num_cases": len(spacings),
        "spacings": {
            "percentile_10": np.percentile(spacings, 10, axis=0).tolist(),
            "percentile_50": np.percentile(spacings, 50, axis=0).tolist(),
            "median": np.median(spacings, axis=0).tolist(),
        },
        "shapes_after_crop": {"median": np.median(shapes, axis=0).tolist()},
        "resampled_shapes": [
            {
                "spacing": [float(length) for length in target],
                "median": np.median(resampled_shapes(spacings, shapes, target), axis=0).tolist(),
            }
            for target in targets
        ],
    }


def replace_lists(folder, *targets) -> None:
    """Turn the fingerprint of a dataset into one without lists."""
    file = folder / "dataset_fingerprint.json"
    fingerprint = json.loads(file.read_text())
    (folder / LOCAL_FINGERPRINT).write_text(file.read_text())  # as in a federation
    spacings, shapes = fingerprint.pop("spacings"), fingerprint.pop("shapes_after_crop")
    fingerprint["geometry_statistics"] = statistics_of(spacings, shapes, *targets)
    file.write_text(json.dumps(fingerprint))


def random_cases(seed):
    """Draw cases of a few scanners, thick slices among them."""
    rng = np.random.default_rng(seed)
    number = int(rng.integers(3, 60))
    usual = rng.choice([[5.0, 0.7, 0.7], [1.0, 0.9, 0.9], [8.0, 1.5, 1.25], [0.5, 0.5, 3.0]], 1)[0]
    spacings = np.where(rng.random((number, 1)) < 0.6, usual, usual * rng.uniform(0.7, 1.4, (number, 3)))
    shapes = np.maximum(8, (rng.uniform(60, 350, (number, 3)) / spacings).astype(int))
    return spacings.tolist(), shapes.tolist()


@pytest.mark.parametrize("planner", [ExperimentPlanner, nnUNetPlannerResEncM])
@pytest.mark.parametrize("seed", range(6))
def test_plans_are_the_same_to_the_bit(make_planned_dataset, roots, planner, seed):
    spacings, shapes = random_cases(seed)
    name = make_planned_dataset(spacings=spacings, shapes=shapes, num_training=len(spacings))
    listed = planner(name)
    expected = json.dumps(listed.plan_experiment())
    replace_lists(roots["nnUNet_preprocessed"] / name, listed.determine_fullres_target_spacing())
    assert json.dumps(planner(name).plan_experiment()) == expected


@pytest.mark.parametrize("seed", range(20))
def test_both_forms_answer_alike(seed):
    spacings, shapes = random_cases(seed)
    target = np.percentile(spacings, 50, axis=0)
    listed, pooled = ListedGeometry(spacings, shapes), PooledGeometry(statistics_of(spacings, shapes, target))
    for ask in (
        lambda geometry: geometry.spacing_percentile(50),
        lambda geometry: geometry.spacing_percentile(10),
        lambda geometry: geometry.median_spacing(),
        lambda geometry: geometry.median_shape(),
        lambda geometry: geometry.median_resampled_shape(target),
    ):
        assert ask(listed).tobytes() == ask(pooled).tobytes()


def test_a_target_spacing_that_was_not_pooled_is_refused(make_planned_dataset, roots):
    spacings, shapes = random_cases(0)
    name = make_planned_dataset(spacings=spacings, shapes=shapes, num_training=len(spacings))
    replace_lists(roots["nnUNet_preprocessed"] / name, (1.0, 1.0, 1.0))
    planner = ExperimentPlanner(name, overwrite_target_spacing=[2.0, 1.0, 1.0])
    with pytest.raises(InvalidInputError, match=r"\(2.0, 1.0, 1.0\) mm is not known.*--federated"):
        planner.plan_experiment()
    assert ExperimentPlanner(name, overwrite_target_spacing=[1.0, 1.0, 1.0]).plan_experiment()


def test_planners_of_users_that_read_the_lists_are_told_why_there_are_none(make_planned_dataset, roots):
    class EveryCase(ExperimentPlanner):
        def determine_fullres_target_spacing(self):
            return np.min(self.dataset_fingerprint["spacings"], axis=0)

    spacings, shapes = random_cases(1)
    name = make_planned_dataset(spacings=spacings, shapes=shapes, num_training=len(spacings))
    EveryCase(name).plan_experiment()
    replace_lists(roots["nnUNet_preprocessed"] / name)
    planner = EveryCase(name)
    with pytest.raises(InvalidInputError, match="no spacings.*--geometry quantiles.*--geometry list"):
        planner.plan_experiment()
    assert planner.dataset_fingerprint.get("spacings") is None
    with pytest.raises(KeyError, match="other"):
        planner.dataset_fingerprint["other"]


def test_statistics_that_are_missing_are_named():
    with pytest.raises(InvalidInputError, match="lacks percentile_10 of spacings"):
        geometry_of({"geometry_statistics": {"spacings": {"median": [1, 1, 1]}}}).spacing_percentile(10)


def test_cases_are_counted_in_either_form():
    spacings, shapes = random_cases(2)
    assert count_cases({"spacings": spacings, "shapes_after_crop": shapes}) == len(spacings)
    assert count_cases({"geometry_statistics": statistics_of(spacings, shapes)}) == len(spacings)
