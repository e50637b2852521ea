import pickle

import blosc2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2.training.dataloading.nnunet_dataset import (
    comp_blosc2_params,
    file_ending_dataset_mapping,
    infer_dataset_class,
    nnUNetBaseDataset,
    nnUNetDatasetBlosc2,
    nnUNetDatasetNumpy,
)
from nnunetv2.training.dataloading.utils import unpack_dataset

SHAPES = {"chunks": (1, 6, 8, 10), "blocks": (1, 3, 4, 5)}


def make_case(seed=0, shape=(7, 9, 11)):
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(2, *shape)).astype(np.float32)
    seg = rng.integers(-1, 3, (1, *shape)).astype(np.int16)
    locations = {1: np.argwhere(seg == 1), (1, 2): []}
    return data, seg, {"spacing": [1.0, 2.0, np.float64(3.0)], "class_locations": locations}


@pytest.fixture(params=[nnUNetDatasetBlosc2, nnUNetDatasetNumpy])
def dataset_class(request):
    return request.param


def save(dataset_class, folder, name, case):
    options = SHAPES if dataset_class is nnUNetDatasetBlosc2 else {}
    dataset_class.save_case(*case, str(folder / name), **options)


@pytest.mark.parametrize(
    ("image", "patch", "itemsize", "block", "chunk"),
    [
        ((1, 128, 128, 128), (128, 128, 128), 4, (1, 32, 32, 32), (1, 128, 128, 96)),
        ((1, 128, 128, 128), (128, 128, 128), 2, (1, 64, 32, 32), (1, 128, 128, 128)),
        ((2, 300, 512, 512), (128, 128, 128), 4, (1, 32, 32, 32), (1, 96, 128, 128)),
        ((1, 300, 512, 512), (128, 128, 128), 2, (1, 64, 32, 32), (1, 128, 192, 128)),
        ((1, 300, 512, 512), (128, 128, 128), 1, (1, 64, 64, 32), (1, 192, 192, 160)),
        ((1, 300, 512, 512), (512, 512), 4, (1, 1, 256, 128), (1, 1, 512, 512)),
        ((1, 100, 512, 512), (512, 512), 4, (1, 1, 256, 128), (1, 1, 512, 512)),
        ((1, 1, 1024, 1024), (512, 512), 4, (1, 1, 256, 128), (1, 1, 768, 768)),
        ((1, 40, 320, 320), (20, 320, 256), 4, (1, 8, 64, 64), (1, 24, 256, 256)),
        ((1, 123, 423, 645), (96, 160, 160), 4, (1, 32, 32, 32), (1, 96, 128, 128)),
    ],
)
def test_chunk_shapes_of_the_specification(image, patch, itemsize, block, chunk):
    assert comp_blosc2_params(image, patch, itemsize) == (block, chunk)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(1, 4), *[st.integers(1, 700)] * 3),
    st.tuples(*[st.integers(1, 300)] * 3),
    st.sampled_from([1, 2, 4]),
)
def test_chunks_fit_their_limits(image, patch, itemsize):
    block, chunk = comp_blosc2_params(image, patch, itemsize)
    assert np.prod(block) * itemsize <= 131072
    assert np.prod(chunk) * itemsize <= 6291456
    assert all(1 <= b <= c <= n for b, c, n in zip(block, chunk, image))


@pytest.mark.parametrize(
    ("image", "patch", "options"),
    [
        ((9, 9, 9), (4, 4, 4), {}),
        ((1, 9, 9, 9), (4,), {}),
        ((1, 0, 9, 9), (4, 4, 4), {}),
        ((1, 9, 9, 9), (4, 4, 4), {"max_chunk_to_patch_ratio_per_axis": 0.5}),
        ((1, 9, 9, 9), (4, 4, 4), {"max_block_nbytes": 2}),
    ],
)
def test_impossible_sizes_are_refused(image, patch, options):
    with pytest.raises(ValueError, match="got|must|fit"):
        comp_blosc2_params(image, patch, **options)


def test_a_case_comes_back_as_it_was(dataset_class, tmp_path):
    data, seg, properties = make_case()
    save(dataset_class, tmp_path, "b", (data, seg, properties))
    save(dataset_class, tmp_path, "a", make_case(1))
    dataset = dataset_class(str(tmp_path))
    assert dataset.identifiers == ["a", "b"]
    loaded, loaded_seg, previous, loaded_properties = dataset["b"]
    np.testing.assert_array_equal(loaded[:], data)
    np.testing.assert_array_equal(loaded_seg[0:1, 2:5], seg[:, 2:5])
    assert (loaded.dtype, loaded_seg.dtype, previous) == (np.float32, np.int16, None)
    assert loaded_properties["spacing"] == properties["spacing"]
    np.testing.assert_array_equal(loaded_properties["class_locations"][1], properties["class_locations"][1])
    assert list(loaded_properties["class_locations"]) == [1, (1, 2)]


def test_previous_stages_are_loaded_beside(dataset_class, tmp_path):
    case = make_case()
    previous_folder = tmp_path / "previous"
    previous_folder.mkdir()
    save(dataset_class, tmp_path, "a", case)
    for _ in range(2):  # an older one is replaced
        dataset_class.save_seg(case[1][0].astype(np.uint8), str(previous_folder / "a"))
    _, _, previous, _ = dataset_class(str(tmp_path), ["a"], str(previous_folder))["a"]
    np.testing.assert_array_equal(previous[:], case[1][0].astype(np.uint8))


def test_given_identifiers_are_sorted_in_place(dataset_class, tmp_path):
    identifiers = ["c", "a"]
    dataset = dataset_class(str(tmp_path), identifiers)
    assert dataset.identifiers is identifiers
    assert identifiers == ["a", "c"]


def test_missing_files_name_the_case(dataset_class, tmp_path):
    with pytest.raises(FileNotFoundError, match="case x: .*nnUNetv2_preprocess"):
        dataset_class(str(tmp_path), ["x"])["x"]
    save(dataset_class, tmp_path, "a", make_case())
    (tmp_path / "a.pkl").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.pkl is missing"):
        dataset_class(str(tmp_path))["a"]


def test_pickles_that_would_run_code_are_refused(tmp_path):
    save(nnUNetDatasetBlosc2, tmp_path, "a", make_case())

    class Trap:
        def __reduce__(self):
            return print, ("sprung",)

    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(pickle.UnpicklingError, match="print"):
        nnUNetDatasetBlosc2(str(tmp_path))["a"]


def test_existing_cases_are_not_overwritten(tmp_path):
    save(nnUNetDatasetBlosc2, tmp_path, "a", make_case())
    with pytest.raises(RuntimeError, match="exists already"):
        save(nnUNetDatasetBlosc2, tmp_path, "a", make_case(1))


def test_a_failed_write_leaves_nothing(tmp_path):
    data, seg, _ = make_case()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save(nnUNetDatasetBlosc2, tmp_path, "a", (data, seg, {"not": lambda: 0}))
    assert list(tmp_path.iterdir()) == []


def test_shapes_are_chosen_with_a_warning(tmp_path, caplog):
    nnUNetDatasetBlosc2.save_case(*make_case(), str(tmp_path / "a"))
    assert "128 voxels" in caplog.text
    assert blosc2.open(str(tmp_path / "a.b2nd")).chunks == (1, 7, 9, 11)


def test_compression_settings(tmp_path):
    _, seg, properties = make_case()
    smooth = np.linspace(0, 1, 2 * 7 * 9 * 11, dtype=np.float32).reshape(2, 7, 9, 11)
    save(nnUNetDatasetBlosc2, tmp_path, "a", (smooth, seg, properties))
    stored = blosc2.open(str(tmp_path / "a.b2nd"))
    assert (stored.chunks, stored.blocks) == (SHAPES["chunks"], SHAPES["blocks"])
    assert (stored.schunk.cparams.codec, stored.schunk.cparams.clevel) == (blosc2.Codec.LZ4HC, 5)
    assert stored.schunk.cparams.filters == [blosc2.Filter.SHUFFLE] + [blosc2.Filter.NOFILTER] * 5


def test_filters_may_be_given(tmp_path):
    data, seg, properties = make_case()
    nnUNetDatasetBlosc2.save_case(
        data,
        seg,
        properties,
        str(tmp_path / "a"),
        **SHAPES,
        filters=blosc2.Filter.BITSHUFFLE,
        filters_seg=[blosc2.Filter.NOFILTER],
    )
    assert blosc2.open(str(tmp_path / "a.b2nd")).schunk.cparams.filters[0] == blosc2.Filter.BITSHUFFLE
    assert blosc2.open(str(tmp_path / "a_seg.b2nd")).schunk.cparams.filters[0] == blosc2.Filter.NOFILTER


def test_trouble_with_filters_means_none(caplog):
    array = np.zeros((1, 4, 4, 4), np.float32)
    chosen = nnUNetDatasetBlosc2._select_filter(array, (1, 0, 4, 4), (1, 4, 4, 4), blosc2.Codec.LZ4HC, 99)
    assert chosen == blosc2.Filter.NOFILTER


@pytest.mark.parametrize(("dataset", "ending"), [(nnUNetDatasetBlosc2, "b2nd"), (nnUNetDatasetNumpy, "npz")])
def test_the_format_is_recognised_among_other_files(dataset, ending, tmp_path):
    assert file_ending_dataset_mapping[ending] is dataset
    for name in (f"a.{ending}", "a.pkl", "a.npy", ".DS_Store", "notes.json", "README"):
        (tmp_path / name).touch()
    (tmp_path / ".partial-1").mkdir()
    (tmp_path / ".partial-1" / f"b.{ending}").touch()
    assert infer_dataset_class(str(tmp_path)) is dataset
    assert dataset.get_identifiers(str(tmp_path)) == ["a"]


def test_empty_and_mixed_folders_are_explained(tmp_path):
    with pytest.raises(AssertionError, match="no preprocessed case"):
        infer_dataset_class(str(tmp_path))
    for name in ("a.npz", "a.b2nd"):
        (tmp_path / name).touch()
    with pytest.raises(AssertionError, match="several formats"):
        infer_dataset_class(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nnUNetv2_preprocess"):
        infer_dataset_class(str(tmp_path / "missing"))


def test_archives_are_unpacked_to_memory_maps(tmp_path):
    case = make_case()
    save(nnUNetDatasetNumpy, tmp_path, "a", case)
    nnUNetDatasetNumpy.unpack_dataset(str(tmp_path), num_processes=2)
    data, seg, _, _ = nnUNetDatasetNumpy(str(tmp_path))["a"]
    assert isinstance(data, np.memmap)
    assert isinstance(seg, np.memmap)
    np.testing.assert_array_equal(data, case[0])
    np.testing.assert_array_equal(seg, case[1])
    assert infer_dataset_class(str(tmp_path)) is nnUNetDatasetNumpy


def test_damaged_arrays_are_unpacked_again(tmp_path):
    case = make_case()
    save(nnUNetDatasetNumpy, tmp_path, "a", case)
    (tmp_path / "a.npy").write_bytes(b"half")
    unpack_dataset(str(tmp_path), unpack_segmentation=False, verify=True)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), case[0])
    assert not (tmp_path / "a_seg.npy").exists()


def test_existing_arrays_are_kept_unless_told(tmp_path):
    save(nnUNetDatasetNumpy, tmp_path, "a", make_case())
    np.save(tmp_path / "a.npy", np.zeros(3))
    unpack_dataset(str(tmp_path))
    assert np.load(tmp_path / "a.npy").shape == (3,)
    unpack_dataset(str(tmp_path), overwrite_existing=True)
    assert np.load(tmp_path / "a.npy").shape == (2, 7, 9, 11)


def test_blosc2_needs_no_unpacking(tmp_path):
    nnUNetDatasetBlosc2.unpack_dataset(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError):
        nnUNetBaseDataset("anywhere")


def test_a_dataset_class_of_a_user_needs_three_methods():
    class Minimal(nnUNetBaseDataset):
        def load_case(self, identifier):
            return identifier, None, None, {}

        @staticmethod
        def save_seg(seg, output_filename_truncated):
            pass

        @staticmethod
        def unpack_dataset(folder, overwrite_existing=False, num_processes=1, verify=True):
            pass

    assert Minimal("folder", ["b", "a"]).identifiers == ["a", "b"]
    with pytest.raises(NotImplementedError):
        Minimal("folder")
