"""Environment variables, dataset ids and names of model folders."""

import os
import subprocess
import sys

import pytest

from nnunetv2 import paths
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import (
    convert_dataset_name_to_id,
    convert_id_to_dataset_name,
    find_candidate_datasets,
    maybe_convert_to_dataset_name,
)
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.file_path_utilities import (
    check_workers_alive_and_busy,
    convert_ensemble_folder_to_model_identifiers_and_folds,
    convert_identifier_to_trainer_plans_config,
    convert_trainer_plans_config_to_identifier,
    folds_string_to_tuple,
    folds_tuple_to_string,
    get_ensemble_name,
    get_ensemble_name_from_d_tr_c,
    get_output_folder,
    parse_dataset_trainer_plans_configuration_from_path,
)


def test_unset_path_is_falsy_and_says_what_to_set():
    assert not nnUNet_raw
    assert nnUNet_raw.get() is None
    assert nnUNet_raw == None  # noqa: E711 (the comparison that scripts make)
    assert repr(nnUNet_raw) == "<unset nnUNet_raw>"
    for use in (str, os.fspath, lambda path: os.path.join(path, "x"), lambda path: path.require()):
        with pytest.raises(RuntimeError, match="nnUNet_raw"):
            use(nnUNet_raw)


@pytest.mark.parametrize("nothing", ["", " ", "\t"])
def test_path_set_to_nothing_is_unset(monkeypatch, nothing):
    monkeypatch.setenv("nnUNet_raw", nothing)
    assert not nnUNet_raw
    with pytest.raises(RuntimeError, match="nnUNet_raw is set to nothing"):
        os.path.join(nnUNet_raw, "x")


@pytest.mark.parametrize("quoted", ['"/data/raw"', "'/data/raw'", '""'])
def test_path_in_quotes_is_refused_instead_of_naming_a_folder_below_the_current_one(monkeypatch, quoted):
    monkeypatch.setenv("nnUNet_raw", quoted)
    with pytest.raises(RuntimeError, match="nnUNet_raw has quotes in its value"):
        os.path.join(nnUNet_raw, "x")


def test_path_follows_the_environment(monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/a")
    assert os.path.join(nnUNet_raw, "x") == "/a/x"
    monkeypatch.setenv("nnUNet_raw", "/b")
    assert str(nnUNet_raw) == nnUNet_raw.get() == nnUNet_raw.require() == "/b"
    assert nnUNet_raw and nnUNet_raw.is_set() and nnUNet_raw == "/b" and nnUNet_raw is not None
    assert repr(nnUNet_raw) == "'/b'"


def test_paths_compare_by_value(monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/a")
    assert nnUNet_raw != nnUNet_results
    monkeypatch.setenv("nnUNet_results", "/a")
    assert nnUNet_raw == nnUNet_results
    with pytest.raises(TypeError):
        {nnUNet_raw}  # noqa: B018
    with pytest.raises(TypeError):
        nnUNet_raw + "/x"


def test_a_path_knows_its_variable():
    path = paths.EnvironmentPath("some_name", "Set it.")
    assert (path.env_var_name, path.missing_message) == ("some_name", "Set it.")


def test_importing_the_basics_is_light():
    code = (
        "import sys, nnunetv2.configuration, nnunetv2.imageio.reader_writer_registry, "
        "nnunetv2.utilities.plans_handling.plans_handler, nnunetv2.utilities.find_objects, "
        "nnunetv2.utilities.get_network_from_plans, nnunetv2.utilities.command_line, nnunetv2.utilities.device\n"
        "print([name for name in ('torch', 'SimpleITK', 'skimage', 'nibabel', 'tifffile', 'scipy') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("wanted", "cores", "expected"), [(None, 64, 12), (None, 4, 4), ("3", 64, 3), ("99", 8, 8)])
def test_augmentation_workers(monkeypatch, wanted, cores, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    if wanted is not None:
        monkeypatch.setenv("nnUNet_n_proc_DA", wanted)
    assert get_allowed_n_proc_DA() == expected


def test_datasets_are_found_in_all_roots(roots):
    (roots["nnUNet_raw"] / "Dataset004_Hippocampus").mkdir()
    (roots["nnUNet_results"] / "Dataset004_Hippocampus").mkdir()
    (roots["nnUNet_preprocessed"] / "Dataset1000_Other").mkdir()
    assert find_candidate_datasets(4).tolist() == ["Dataset004_Hippocampus"]
    assert convert_id_to_dataset_name(1000) == "Dataset1000_Other"
    for given in (4, "4", "004", "Dataset004_Hippocampus"):
        assert maybe_convert_to_dataset_name(given) == "Dataset004_Hippocampus"


def test_longer_ids_do_not_match(roots):
    (roots["nnUNet_raw"] / "Dataset1000_Other").mkdir()
    with pytest.raises(RuntimeError, match="no dataset with id 100 found"):
        convert_id_to_dataset_name(100)


def test_ambiguous_id_names_the_candidates(roots):
    (roots["nnUNet_raw"] / "Dataset004_A").mkdir()
    (roots["nnUNet_results"] / "Dataset004_B").mkdir()
    with pytest.raises(RuntimeError, match="Dataset004_A, Dataset004_B"):
        convert_id_to_dataset_name(4)


def test_ids_without_any_root():
    with pytest.raises(RuntimeError, match="nnUNet_raw=None"):
        convert_id_to_dataset_name(4)


def test_names_to_ids():
    assert convert_dataset_name_to_id("Dataset004_Hippocampus") == 4
    assert convert_dataset_name_to_id("Dataset1000_x") == 1000
    with pytest.raises(AssertionError):
        convert_dataset_name_to_id("Task004_Hippocampus")
    with pytest.raises(ValueError, match="neither a dataset id"):
        maybe_convert_to_dataset_name("Hippocampus")


def test_identifier_round_trip():
    identifier = convert_trainer_plans_config_to_identifier("T", "P", "3d_fullres")
    assert identifier == "T__P__3d_fullres"
    assert convert_identifier_to_trainer_plans_config(f"/some/where/{identifier}") == ["T", "P", "3d_fullres"]


def test_output_folder(roots):
    folder = get_output_folder("Dataset004_X", fold=0)
    assert folder == str(roots["nnUNet_results"] / "Dataset004_X" / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_0")
    assert isinstance(get_output_folder("Dataset004_X"), str)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/r/Dataset004_H/T__P__3d_fullres/fold_0/validation", ("Dataset004_H", "T", "P", "3d_fullres")),
        ("/r/Dataset004_H/T__P__3d_fullres", ("Dataset004_H", "T", "P", "3d_fullres")),
        ("Dataset004_H/T__P__c/", ("Dataset004_H", "T", "P", "c")),
        ("/r/X/T__P__c/fold_0", None),
        ("/a/b", None),
    ],
)
def test_path_into_a_model_folder(path, expected):
    assert parse_dataset_trainer_plans_configuration_from_path(path) == expected


@pytest.mark.parametrize("path", ["/r/Dataset004_H", "fold_0", "/r/Dataset004_H/T_P"])
def test_path_that_is_none(path):
    with pytest.raises(AssertionError, match="TRAINER__PLANS__CONFIGURATION"):
        parse_dataset_trainer_plans_configuration_from_path(path)


def test_ensemble_names(roots):
    name = get_ensemble_name("/x/T__P__2d", "/x/T__P__3d", (0, 1, "all"))
    assert name == "ensemble___T__P__2d___T__P__3d___0_1_all"
    assert convert_ensemble_folder_to_model_identifiers_and_folds(f"/y/{name}") == (["T__P__2d", "T__P__3d"], "0_1_all")
    assert get_ensemble_name_from_d_tr_c("Dataset001_x", "T", "P", "2d", "T", "P", "3d", (0, 1, "all")) == name
    with pytest.raises(ValueError, match="no ensemble folder"):
        convert_ensemble_folder_to_model_identifiers_and_folds("/y/T__P__2d")


def test_folds():
    assert folds_tuple_to_string((0, 1, 2)) == "0_1_2"
    assert folds_string_to_tuple("0_1_all") == [0, 1, "all"]


class Fake:
    exitcode = -9

    def __init__(self, alive=True, ready=False):
        self.is_alive, self.ready, self._pool = (lambda: alive), (lambda: ready), [None, None]


def test_pool_is_busy_with_one_unfinished_result_per_worker():
    assert not check_workers_alive_and_busy(Fake(), [Fake()], [Fake(), Fake(ready=True)])
    assert check_workers_alive_and_busy(Fake(), [Fake()], [Fake(), Fake()])
    assert not check_workers_alive_and_busy(Fake(), [Fake()], [Fake(), Fake()], allowed_num_queued=1)


def test_dead_worker_is_an_error():
    with pytest.raises(RuntimeError, match=r"1 of 2 .*memory"):
        check_workers_alive_and_busy(Fake(), [Fake(), Fake(alive=False)], [])


def test_scripts_find_file_helpers_where_they_look():
    from nnunetv2.utilities.dataset_name_id_conversion import isdir  # noqa: F401
    from nnunetv2.utilities.file_path_utilities import load_json, maybe_mkdir_p  # noqa: F401
    from nnunetv2.utilities.utils import join, subfiles  # noqa: F401

    assert join("a", "b") == os.path.join("a", "b")
    with pytest.raises(ImportError):
        from nnunetv2.utilities.utils import no_such_helper  # noqa: F401
    assert nnUNet_preprocessed == None  # noqa: E711
