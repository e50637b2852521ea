"""Fingerprints of small datasets."""

import json

import numpy as np
import pytest
from planning_scans import write_nifti

from nnunetv2.experiment_planning.dataset_fingerprint.case_sample import CaseSample
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint import compute_fingerprint, describe_intensities
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.case_workers import CaseFailedError


@pytest.fixture
def extractor(make_scans, make_case):
    """An extractor of three cases that draws 3000 voxels, in this process."""

    def build(cases=None, num_processes=1, **dataset):
        folder = make_scans(cases or {f"case_{i}": make_case(i, shape=(6, 8 + i, 10)) for i in range(3)}, **dataset)
        extractor = DatasetFingerprintExtractor(folder.name, num_processes)
        extractor.show_progress_bar = False
        extractor.num_foreground_voxels_for_intensitystats = 3000
        return extractor

    return build


def expand(samples):
    return [[np.repeat(values, counts) for values, counts in sample.intensities] for sample in samples]


def test_fingerprint_describes_the_concatenated_samples(extractor):
    subject = extractor()
    fingerprint = subject.run()
    drawn = []
    for files in subject.dataset.values():
        _, _, samples, _, _ = subject.analyze_case(files["images"], files["label"], SimpleITKIO, 1000)
        drawn += samples
    drawn = np.concatenate(drawn)
    low, median, high = np.percentile(drawn, [0.5, 50, 99.5])
    assert drawn.dtype == np.float32
    assert fingerprint["foreground_intensity_properties_per_channel"][0] == pytest.approx(
        {
            "mean": np.mean(drawn),
            "median": median,
            "std": np.std(drawn),
            "min": drawn.min(),
            "max": drawn.max(),
            "percentile_00_5": low,
            "percentile_99_5": high,
        },
        rel=1e-6,
    )
    assert fingerprint["foreground_intensity_properties_per_channel"][0]["median"] == median


def test_geometry_is_listed_in_the_order_of_the_cases(extractor):
    fingerprint = extractor().run()
    assert fingerprint["shapes_after_crop"] == [(6, 8, 10), (6, 9, 10), (6, 10, 10)]
    assert fingerprint["spacings"] == [(3.0, 1.5, 1.0)] * 3
    assert fingerprint["median_relative_size_after_cropping"] == 1.0


def test_file_holds_what_was_returned_with_channels_as_text(extractor, roots):
    subject = extractor()
    fresh = subject.run()
    text = (roots["nnUNet_preprocessed"] / subject.dataset_name / "dataset_fingerprint.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(fresh))
    assert list(json.loads(text)) == sorted(fresh)
    assert list(fresh["foreground_intensity_properties_per_channel"]) == [0]


def test_existing_file_is_taken_unless_told_otherwise(extractor, roots):
    subject = extractor()
    subject.run()
    file = roots["nnUNet_preprocessed"] / subject.dataset_name / "dataset_fingerprint.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mark": 1}))
    assert "mark" in subject.run()
    assert "mark" not in subject.run(overwrite_existing=True)


def test_existing_file_of_another_number_of_cases_is_pointed_out(extractor, caplog):
    subject = extractor()
    subject.run()
    subject.dataset.popitem()
    subject.run()
    assert "describes 3 cases, the dataset has 2 now" in caplog.text


@pytest.mark.slow
def test_samples_do_not_depend_on_the_number_of_processes(extractor):
    subject = extractor()
    here = subject.sample_cases(500)
    subject.num_processes = 2
    for one, other in zip(expand(here), expand(subject.sample_cases(500))):
        assert all(np.array_equal(a, b) for a, b in zip(one, other))
    assert subject.count_cases() == 3 and subject.num_samples_per_case(3) == 1000


def test_case_without_foreground_is_reported_and_turns_the_rest_into_float64(extractor, make_case, caplog):
    cases = {"a": make_case(0), "empty": make_case(1, foreground=False)}
    subject = extractor(cases)
    fingerprint = subject.run()
    assert "1 of 2 cases have no foreground and add no intensities: empty" in caplog.text
    drawn = subject.analyze_case(*subject.dataset["a"].values(), SimpleITKIO, 1500)[2][0]
    assert (
        fingerprint["foreground_intensity_properties_per_channel"][0]["median"]
        == np.percentile(drawn.astype(np.float64), [50])[0]
    )


def test_dataset_without_any_foreground_is_refused_by_name(extractor, make_case):
    cases = {"one": make_case(0, foreground=False), "two": make_case(1, foreground=False)}
    with pytest.raises(ValueError, match="no case has foreground .*: one, two"):
        extractor(cases).run()


def test_label_that_does_not_fit_is_refused_by_case(extractor, make_case):
    subject = extractor()
    write_nifti(np.zeros((6, 8, 11), dtype=np.uint8), subject.dataset["case_0"]["label"])
    with pytest.raises(CaseFailedError, match=r"case case_0: ValueError: the label has shape \(6, 8, 11\)"):
        subject.run()


def test_too_few_voxels_for_the_cases_are_refused(extractor):
    subject = extractor()
    subject.num_foreground_voxels_for_intensitystats = 2
    with pytest.raises(ValueError, match="2 foreground voxels cannot be shared out among 3 cases"):
        subject.run()


def test_intensities_are_drawn_channel_by_channel_from_one_generator():
    rng = np.random.default_rng(0)
    images, label = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), np.zeros((1, 3, 4, 5))
    label[0, 1, 1:3, 2:] = [[1, 2, 5], [0, 1, 9]]
    drawn, statistics = DatasetFingerprintExtractor.collect_foreground_intensities(label, images, num_samples=50)
    generator = np.random.RandomState(1234)
    for image, values, described in zip(images, drawn, statistics):
        inside = image[label[0] > 0]
        assert np.array_equal(values, generator.choice(inside, 50, replace=True))
        assert described["mean"] == np.mean(inside) and described["max"] == np.max(inside)
        assert set(described) == {"mean", "median", "min", "max", "percentile_99_5", "percentile_00_5"}


def test_case_without_foreground_has_empty_lists_and_nan():
    drawn, statistics = DatasetFingerprintExtractor.collect_foreground_intensities(
        np.zeros((1, 2, 2, 2)), np.ones((1, 2, 2, 2))
    )
    assert drawn == [[]] and np.isnan(statistics[0]["median"])


def test_nan_is_an_assertion_error_of_the_public_function():
    image = np.full((1, 2, 2, 2), np.nan)
    with pytest.raises(AssertionError, match="the image contains NaN"):
        DatasetFingerprintExtractor.collect_foreground_intensities(np.ones((1, 2, 2, 2)), image)


def make_sample(values, counts, **more):
    return CaseSample(
        **{
            "shape_after_crop": (4, 5, 6),
            "spacing": (3, 1, 1),
            "relative_size": 0.5,
            "intensities": [(np.float32(values), np.array(counts, dtype=np.int64))],
            **more,
        }
    )


def test_order_of_the_cases_changes_no_intensity():
    samples = [make_sample([1, 2], [3, 1]), make_sample([5], [4]), make_sample([-1, 9], [2, 2])]
    forward, backward = compute_fingerprint(samples), compute_fingerprint(samples[::-1])
    key = "foreground_intensity_properties_per_channel"
    assert forward[key][0] == pytest.approx(backward[key][0])
    # -1 -1 1 1 1 2 5 5 5 5 9 9
    assert forward[key][0]["median"] == 3.5 and forward[key][0]["mean"] == pytest.approx(41 / 12)


def test_cases_must_agree_in_their_channels():
    two = make_sample([1], [1]).intensities * 2
    with pytest.raises(ValueError, match=r"number of channels: \[1, 2\]"):
        compute_fingerprint([make_sample([1], [1]), make_sample([1], [1], intensities=two)])


def test_numbers_have_the_precision_of_the_samples():
    third = (np.float32([1, 2]), np.array([1, 2]))
    empty = (np.zeros(0, np.float32), np.zeros(0, np.int64))
    assert describe_intensities([third])["mean"] == float(np.float32(5 / 3))
    assert describe_intensities([third, empty])["mean"] == pytest.approx(5 / 3, rel=1e-15)
