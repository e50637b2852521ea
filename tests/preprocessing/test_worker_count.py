import json
import sys

import numpy as np
import pytest
from preprocessing_scans import make_case, make_plans, write_image

from nnunetv2.preprocessing.worker_count import (
    WORKER_BYTES,
    available_cores,
    bytes_to_preprocess,
    bytes_to_read,
    choose_num_processes,
    voxels_in_file,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

GB = 2**30


@pytest.mark.parametrize(
    ("case_gb", "cases", "free_gb", "cores", "expected"),
    [
        (1, 100, 100, 4, 4),  # cores decide
        (1, 3, 100, 64, 3),  # cases
        (3, 100, 24, 16, 6),  # memory, of which a fifth stays free
        (50, 100, 24, 16, 1),  # at least one has to try
    ],
)
def test_cores_cases_and_memory_limit_the_processes(case_gb, cases, free_gb, cores, expected):
    assert choose_num_processes(case_gb * GB, cases, free_bytes=free_gb * GB, cores=cores) == expected


def test_short_memory_is_told(caplog):
    caplog.set_level("INFO")
    choose_num_processes(4 * GB, 10, free_bytes=10 * GB, cores=8)
    assert "2 process(es), because a case may take" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("50000 100000", 1), ("150000 100000", 2), ("max 100000", None), ("nonsense", None), (None, None)],
)
def test_quotas_of_containers_count(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert available_cores(tmp_path) == (expected or 12)


def fingerprint(*shapes, relative_size=1.0):
    return {
        "shapes_after_crop": shapes,
        "spacings": [(2.0, 1.0, 1.0)] * len(shapes),
        "median_relative_size_after_cropping": relative_size,
    }


def case_bytes(fingerprint, **plans) -> int:
    manager = PlansManager(make_plans(**plans))
    configuration = manager.get_configuration("3d_fullres")
    in_all = bytes_to_preprocess(
        fingerprint,
        spacing=configuration.spacing,
        transpose_forward=manager.transpose_forward,
        num_channels=len(configuration.normalization_schemes),
    )
    return in_all - WORKER_BYTES


def test_the_largest_case_decides():
    small, large = (10, 100, 100), (100, 100, 100)
    assert case_bytes(fingerprint(small, large)) == case_bytes(fingerprint(large)) > 5 * case_bytes(fingerprint(small))


def test_finer_grids_more_channels_and_margins_of_zeros_take_more():
    base = case_bytes(fingerprint((100, 100, 100)))
    assert case_bytes(fingerprint((100, 100, 100)), spacing=(0.5, 0.5, 0.5)) > 8 * base
    assert case_bytes(fingerprint((100, 100, 100)), channels=4) > 2 * base
    assert case_bytes(fingerprint((100, 100, 100), relative_size=0.3)) > 1.5 * base
    # 2d keeps the distance of slices
    assert case_bytes(fingerprint((100, 100, 100)), spacing=(0.5, 0.5)) < case_bytes(
        fingerprint((100, 100, 100)), spacing=(1.0, 0.5, 0.5)
    )


def test_voxels_are_read_from_headers(tmp_path):
    image = tmp_path / "image.nii.gz"
    write_image(make_case()[0][0], image)
    assert voxels_in_file(str(image)) == 12 * 16 * 20
    other = tmp_path / "image.unknown"
    other.write_bytes(b"x" * 50)
    assert voxels_in_file(str(other)) == 500
    assert bytes_to_read([[str(other)], [str(image), str(image)]]) > WORKER_BYTES + 2 * 12 * 16 * 20


def test_a_case_takes_about_what_was_estimated():
    """Measured where it counts: what the arrays of one case add up to."""
    import tracemalloc

    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    plans = {"spacing": (1.5, 0.9, 0.9), "channels": 2}
    manager = PlansManager(make_plans(**plans))
    configuration = manager.get_configuration("3d_fullres")
    dataset_json = {"labels": {"background": 0, "organ": 1}, "channel_names": {"0": "a", "1": "b"}}
    shape = (60, 100, 110)

    def preprocess(shape) -> None:
        arrays = [np.zeros((1, *shape), np.float32), np.random.default_rng(0).random((2, *shape), np.float32)]
        arrays[0][:, 2:9] = 1
        # popped, so that nothing but the preprocessor holds them, as after reading
        DefaultPreprocessor(verbose=False).run_case_npy(
            arrays.pop(), arrays.pop(), {"spacing": [2.0, 1.0, 1.0]}, manager, configuration, dataset_json
        )

    preprocess((10, 11, 12))  # imports count too
    tracemalloc.start()
    try:
        preprocess(shape)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    estimate = case_bytes(fingerprint(shape), **plans)
    # Before Python 3.11 the arrays as read stay until the end.
    assert (1 if sys.version_info >= (3, 11) else 0.7) * peak < estimate < 3 * peak


@pytest.mark.parametrize("is_federated", [False, True])
def test_the_sites_own_cases_decide_where_the_fingerprint_is_that_of_a_federation(tmp_path, is_federated):
    from nnunetv2.preprocessing.preprocessors.dataset_run import DatasetRun

    for name, shape in (
        ("dataset_fingerprint.json", (10, 100, 100)),
        *((("dataset_fingerprint_local.json", (99, 99, 99)),) if is_federated else ()),
    ):
        (tmp_path / name).write_text(json.dumps(fingerprint(shape)))
    run = DatasetRun(PlansManager(make_plans()), None, {}, {}, tmp_path / "nnUNetPlans_3d_fullres")
    assert run.fingerprint["shapes_after_crop"] == [[99, 99, 99] if is_federated else [10, 100, 100]]
