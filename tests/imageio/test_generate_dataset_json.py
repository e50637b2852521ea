"""dataset.json as conversion scripts write it."""

import json

import numpy as np
import pytest

from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json


def test_content_and_order(tmp_path):
    channels, labels = {0: "CT"}, {"background": 0, "a": (np.int64(1), 2), "b": np.int64(2)}
    generate_dataset_json(
        tmp_path,
        channels,
        labels,
        5,
        ".nii.gz",
        citation="paper",
        regions_class_order=(1, 2),
        dataset_name="X",
        release="1.0",
        license="CC0",
        converted_by="me",
        extra=[1],
        name="Y",
    )
    content = json.loads((tmp_path / "dataset.json").read_text())
    assert content == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "a": [1, 2], "b": 2},
        "numTraining": 5,
        "file_ending": ".nii.gz",
        "licence": "CC0",
        "converted_by": "me",
        "name": "Y",
        "release": "1.0",
        "citation": "paper",
        "regions_class_order": [1, 2],
        "extra": [1],
    }
    assert list(content)[:4] == ["channel_names", "labels", "numTraining", "file_ending"]
    assert channels == {0: "CT"} and labels["b"].dtype == np.int64


def test_regions_need_an_order(tmp_path):
    with pytest.raises(AssertionError, match="regions_class_order"):
        generate_dataset_json(tmp_path, {0: "CT"}, {"background": 0, "a": [1, 2]}, 5, ".nii.gz")
