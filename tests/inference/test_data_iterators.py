"""Tests of preprocessing ahead of the network."""

from __future__ import annotations

import os
import queue
import threading

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from patience import PATIENCE_S
from tiny_models import TinyModel

from nnunetv2.inference import preprocessing_jobs
from nnunetv2.inference.data_iterators import (
    PreprocessAdapter,
    PreprocessAdapterFromNpy,
    preprocess_fromfiles_save_to_queue,
    preprocess_fromnpy_save_to_queue,
    preprocessing_iterator_fromfiles,
    preprocessing_iterator_fromnpy,
)
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def make_model(**changes):
    """Return (plans manager, dataset_json, configuration manager), as the iterators take them."""
    model = TinyModel(**changes)
    plans_manager = PlansManager(model.plans())
    return plans_manager, model.dataset_json(), plans_manager.get_configuration(model.configuration_name)


def make_arrays(count):
    return [np.random.default_rng(seed).normal(size=(1, 5, 6, 7 + seed)).astype(np.float32) for seed in range(count)]


def make_properties(count):
    return [{"spacing": [2.0, 1.0, 1.0]} for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_arrays_come_out_in_order(workers):
    outputs = [f"/out/case_{i}" for i in range(7)]
    properties = make_properties(7)
    items = list(preprocessing_iterator_fromnpy(make_arrays(7), None, properties, outputs, *make_model(), workers))
    assert [item["ofile"] for item in items] == outputs
    assert [item["data"].shape[-1] for item in items] == list(range(7, 14))
    assert all(item["data"].dtype == torch.float32 and item["data"].is_contiguous() for item in items)
    assert all("bbox_used_for_cropping" in item["data_properties"] for item in items)
    assert properties == make_properties(7)  # ours are copies


def test_files_come_out_in_order(write_images):
    folder = write_images(["a", "b", "c"])
    files = [[str(folder / f"{name}_0000.nii.gz")] for name in "cab"]
    items = list(preprocessing_iterator_fromfiles(files, None, None, *make_model(), num_processes=2))
    assert [item["data_properties"]["sitk_stuff"]["origin"][2] for item in items] == [105, 103, 104]
    assert [item["ofile"] for item in items] == [None] * 3


def test_the_previous_stage_becomes_channels():
    image, labels = make_arrays(1)[0], np.zeros((1, 5, 6, 7), dtype=np.int8)
    labels[0, 2:, 3, 4] = 2
    (item,) = preprocessing_iterator_fromnpy(
        [image], [labels], make_properties(1), None, *make_model(previous_stage="3d_lowres"), 0
    )
    assert item["data"].shape == (3, 5, 6, 7)
    assert item["data"][1].sum() == 0
    np.testing.assert_array_equal(item["data"][2], labels[0] == 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_error_of_a_case_is_forwarded_with_its_name(workers):
    properties = [*make_properties(2), {}]
    iterator = preprocessing_iterator_fromnpy(
        make_arrays(3), None, properties, ["/o/a", "/o/b", "/o/liver_7"], *make_model(), workers
    )
    assert next(iterator)["ofile"] == "/o/a"
    assert next(iterator)["ofile"] == "/o/b"
    with pytest.raises(RuntimeError, match=r"^case liver_7: .*spacing"):
        next(iterator)


def test_a_missing_file_is_named():
    iterator = preprocessing_iterator_fromfiles([["/nowhere/a_0000.nii.gz"]], None, None, *make_model(), 1)
    with pytest.raises(RuntimeError, match="a_0000"):
        next(iterator)


def test_too_few_channels_are_named():
    iterator = preprocessing_iterator_fromnpy(
        make_arrays(1), None, make_properties(1), ["/o/brain"], *make_model(channels=("T1", "T2")), 0
    )
    with pytest.raises(RuntimeError, match=r"case brain: .*has 1 channels, but the model expects 2.*T1, T2"):
        next(iterator)


class Deadly:
    """Ends the process that receives it without a word, as the system does when memory runs out."""

    def __reduce__(self):
        return os._exit, (9,)


@pytest.mark.slow
def test_a_killed_worker_process_is_noticed(monkeypatch):
    monkeypatch.setattr(preprocessing_jobs, "_CASES_WORTH_PROCESSES", 2)
    monkeypatch.setattr(preprocessing_jobs, "_BYTES_WORTH_PROCESSES", 0)
    plans_manager, dataset_json, _ = make_model()
    iterator = preprocessing_iterator_fromnpy(
        make_arrays(3), None, make_properties(3), None, plans_manager, dataset_json, Deadly(), 2
    )
    with pytest.raises(RuntimeError, match=r"^Background workers died\. .*memory"):
        next(iterator)


@pytest.mark.slow
def test_processes_give_what_threads_give(monkeypatch):
    arguments = (make_arrays(4), None, make_properties(4), None, *make_model(), 2)
    threads = list(preprocessing_iterator_fromnpy(*arguments))
    monkeypatch.setattr(preprocessing_jobs, "_CASES_WORTH_PROCESSES", 2)
    monkeypatch.setattr(preprocessing_jobs, "_BYTES_WORTH_PROCESSES", 0)
    for mine, theirs in zip(threads, preprocessing_iterator_fromnpy(*arguments), strict=True):
        torch.testing.assert_close(mine["data"], theirs["data"])


def test_a_consumer_that_stops_early_leaves_no_worker_behind():
    before = set(threading.enumerate())
    iterator = preprocessing_iterator_fromnpy(make_arrays(9), None, make_properties(9), None, *make_model(), 2)
    next(iterator)
    iterator.close()
    started = [thread for thread in threading.enumerate() if thread not in before]
    for thread in started:
        thread.join(PATIENCE_S)  # the case that it is at is finished, on a busy machine not at once
    assert not [thread.name for thread in started if thread.is_alive()]


@pytest.mark.parametrize(
    ("previous", "outputs", "message"),
    [([None], None, "2 cases, but 1 segmentations"), (None, ["a"] * 3, "2 cases, but 3 output")],
)
def test_lists_of_different_lengths_are_refused(previous, outputs, message):
    with pytest.raises(ValueError, match=message):
        preprocessing_iterator_fromnpy(make_arrays(2), previous, make_properties(2), outputs, *make_model(), 1)


def test_adapters_give_one_case_at_a_time_then_stop(write_images):
    model = make_model()
    adapter = PreprocessAdapterFromNpy(make_arrays(2), [None, None], make_properties(2), [None, "/out/b"], *model)
    assert [next(adapter)["ofile"], next(adapter)["ofile"]] == [None, "/out/b"]
    with pytest.raises(StopIteration):
        next(adapter)
    files = [[str(write_images(["a"]) / "a_0000.nii.gz")]]
    item = next(PreprocessAdapter(files, None, DefaultPreprocessor(verbose=False), None, *model))
    assert isinstance(item["data"], torch.Tensor)
    assert set(item) == {"data", "data_properties", "ofile"}


def test_own_workers_fill_a_queue():
    target, done, abort = queue.Queue(maxsize=1), threading.Event(), threading.Event()
    worker = threading.Thread(
        target=preprocess_fromnpy_save_to_queue,
        args=(make_arrays(3), None, make_properties(3), ["a", "b", "c"], *make_model(), target, done, abort),
    )
    worker.start()
    assert [target.get(timeout=PATIENCE_S)["ofile"] for _ in range(3)] == ["a", "b", "c"]
    worker.join(PATIENCE_S)
    assert done.is_set() and not abort.is_set()


def test_own_workers_report_a_failure_and_stop_when_told_to():
    target, done, abort = queue.Queue(maxsize=1), threading.Event(), threading.Event()
    ends = (target, done, abort)
    with pytest.raises(RuntimeError, match="case x"):
        preprocess_fromfiles_save_to_queue([["/nowhere/x.nii.gz"]], None, ["/out/x"], *make_model(), *ends)
    assert abort.is_set() and not done.is_set()
    preprocess_fromnpy_save_to_queue(make_arrays(3), None, make_properties(3), None, *make_model(), *ends)
    assert target.empty() and not done.is_set()


def test_labels_of_a_previous_stage_are_the_models_own(write_images, tmp_path):
    folder = write_images(["a"])
    image = sitk.ReadImage(str(folder / "a_0000.nii.gz"))
    labels = sitk.GetImageFromArray(np.ones_like(sitk.GetArrayFromImage(image), np.uint8))
    labels.CopyInformation(image)
    sitk.WriteImage(labels, str(tmp_path / "a.nii.gz"))
    plans_manager, dataset_json, configuration_manager = make_model()
    joint = {**dataset_json, "values_in_raw_data": {**dict.fromkeys(dataset_json["labels"], 9), "background": 7}}
    model = preprocessing_jobs.Model(plans_manager, configuration_manager, joint)
    case = preprocessing_jobs.FileCase((str(folder / "a_0000.nii.gz"),), str(tmp_path / "a.nii.gz"), None)
    assert case.preprocess(DefaultPreprocessor(verbose=False), model)["data"].shape[0] >= 1
