"""Choice of the best configuration, ensembles and postprocessing: this package against the reference release."""

from __future__ import annotations

import json
import math
import pickle
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from trained_models import NAME, make_trained_models

from nnunetv2.evaluation.evaluate_predictions import load_summary_json
from nnunetv2.evaluation.find_best_configuration import find_best_configuration
from nnunetv2.postprocessing.decision_files import load_functions

MODELS = (
    {"plans": "nnUNetPlans", "configuration": "2d", "trainer": "nnUNetTrainer"},
    {"plans": "nnUNetPlans", "configuration": "3d_fullres", "trainer": "nnUNetTrainer"},
)
# It opens dozens of pools; forked workers need not import everything anew.
THEIRS = """
import multiprocessing
get_context = multiprocessing.get_context
multiprocessing.get_context = lambda method=None: get_context("fork")
from nnunetv2.evaluation.find_best_configuration import find_best_configuration
find_best_configuration(value["dataset"], value["models"], num_processes=2, folds=(0, 1))
"""


def read_folder(folder):
    return {file.name: sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in folder.glob("*.nii.gz")}


def assert_same_label_maps(ours, theirs):
    assert set(ours) == set(theirs) and ours
    for name in ours:
        assert np.array_equal(ours[name], theirs[name]), name


def plain(summary):
    """A summary as text, without the paths, which differ between the two roots."""
    cases = [
        {
            "name": case["prediction_file"].split("/")[-1],
            "metrics": {str(which): scores for which, scores in case["metrics"].items()},
        }
        for case in summary["metric_per_case"]
    ]
    return json.dumps(
        {
            "cases": cases,
            "foreground_mean": summary["foreground_mean"],
            "mean": {str(k): v for k, v in summary["mean"].items()},
        },
        sort_keys=True,
    )


@pytest.mark.parametrize(("regions", "ignore"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_same_model_is_best_and_is_postprocessed_alike(tmp_path, monkeypatch, reference, regions, ignore):
    roots = {name: tmp_path / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for name, folder in roots.items():
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    make_trained_models(roots, regions=regions, ignore=ignore)
    shutil.copytree(roots["nnUNet_results"], tmp_path / "theirs")
    ours = find_best_configuration(NAME, MODELS, num_processes=2, folds=(0, 1))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "theirs"))
    reference.run(THEIRS, {"dataset": NAME, "models": MODELS})

    our_results, their_results = roots["nnUNet_results"] / NAME, tmp_path / "theirs" / NAME
    theirs = json.loads((their_results / "inference_information.json").read_text())
    text = json.dumps(json.loads((our_results / "inference_information.json").read_text()), sort_keys=True)
    assert text.replace(str(our_results), "RESULTS") == json.dumps(theirs, sort_keys=True).replace(
        str(their_results), "RESULTS"
    )
    for folder in [*our_results.glob("*/crossval_results_folds_0_1"), *our_results.glob("ensembles/*")]:
        twin = their_results / folder.relative_to(our_results)
        assert_same_label_maps(read_folder(folder), read_folder(twin))
        assert plain(load_summary_json(folder / "summary.json")) == plain(load_summary_json(twin / "summary.json"))

    best = our_results / theirs["best_model_or_ensemble"]["postprocessing_file"].split(f"{NAME}/")[1]
    twin = their_results / best.relative_to(our_results)
    assert_same_label_maps(read_folder(best.parent / "postprocessed"), read_folder(twin.parent / "postprocessed"))
    assert json.loads(best.with_suffix(".json").read_text()) == json.loads(twin.with_suffix(".json").read_text())
    assert plain(load_summary_json(best.parent / "postprocessed" / "summary.json")) == plain(
        load_summary_json(twin.parent / "postprocessed" / "summary.json")
    )
    assert (
        ours["best_model_or_ensemble"]["result_on_crossval_post_pp"]
        == theirs["best_model_or_ensemble"]["result_on_crossval_post_pp"]
    )
    # their pickle, which refers to NumPy scalars, is read without its JSON twin
    twin.with_suffix(".json").unlink()
    functions, kwargs = load_functions(twin)
    our_functions, our_kwargs = pickle.loads(best.read_bytes())
    assert functions == our_functions and kwargs == our_kwargs
    assert not math.isnan(ours["best_model_or_ensemble"]["result_on_crossval_pre_pp"])
