"""The functions and commands from raw data to preprocessed data."""

import json
import os
import subprocess
import sys

import pytest
from privileges import privileges_dropped

from nnunetv2.experiment_planning import plan_and_preprocess_api as api
from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints as entrypoints
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.models.model_folder import save_model_description
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

COMMANDS = {
    "plan_and_preprocess": entrypoints.build_plan_and_preprocess_parser,
    "extract_fingerprint": entrypoints.build_extract_fingerprint_parser,
    "plan_experiment": entrypoints.build_plan_experiment_parser,
    "preprocess": entrypoints.build_preprocess_parser,
}


@pytest.fixture
def folder(make_scans, make_case, monkeypatch):
    monkeypatch.setattr(DatasetFingerprintExtractor, "__init__", _with_few_voxels(DatasetFingerprintExtractor.__init__))
    return make_scans({f"case_{i}": make_case(i, shape=(10, 20, 24)) for i in range(3)})


def _with_few_voxels(constructor):
    def construct(self, *args, **kwargs):
        constructor(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 3000

    return construct


@pytest.mark.slow
def test_command_goes_from_raw_to_preprocessed_data(folder, roots, capsys):
    entrypoints.plan_and_preprocess_main(
        ["-d", "2", "-npfp", "1", "-np", "1", "--verify_dataset_integrity", "--no_pbar"]
    )
    preprocessed = roots["nnUNet_preprocessed"] / folder.name
    assert {file.name for file in preprocessed.glob("[!.]*")} == {
        "dataset.json",
        "dataset_fingerprint.json",
        "nnUNetPlans.json",
        "nnUNetPlans_2d",
        "nnUNetPlans_3d_fullres",
        "gt_segmentations",
        "dataset_overview.png",
    }
    assert len(list((preprocessed / "nnUNetPlans_2d").glob("*.b2nd"))) == 6
    printed = capsys.readouterr().out
    assert "INFO: nnUNetPlans.json has no configuration 3d_lowres" in printed
    assert "Dataset002_Scans: 3 training cases, plans nnUNetPlans" in printed
    assert "KB, 3 cases" in printed
    assert "Next: nnUNetv2_train Dataset002_Scans 3d_fullres 0" in printed
    assert (preprocessed / "dataset_overview.png").read_bytes().startswith(b"\x89PNG")


def test_labels_are_copied_when_newer(folder, roots, caplog):
    copies = roots["nnUNet_preprocessed"] / folder.name / "gt_segmentations"
    api.copy_labels(folder.name)
    source, copy = folder / "labelsTr" / "case_1.nii.gz", copies / "case_1.nii.gz"
    assert sorted(file.name for file in copies.iterdir()) == [f"case_{i}.nii.gz" for i in range(3)]
    assert copy.stat().st_mtime == pytest.approx(source.stat().st_mtime)
    os.utime(source, (copy.stat().st_mtime + 10,) * 2)
    api.copy_labels(folder.name)
    assert copy.stat().st_mtime == pytest.approx(source.stat().st_mtime)
    assert "replaced" not in caplog.text  # it says the same as before


@pytest.mark.slow
def test_read_only_raw_data_are_prepared_and_prepared_again(folder, roots, tmp_path):
    patients, splits = folder / "patients.json", folder / "splits_final.json"
    patients.write_text(json.dumps({f"case_{i}": f"patient_{i}" for i in range(3)}))
    splits.write_text(json.dumps([{"train": ["case_0", "case_1"], "val": ["case_2"]}]))
    for file in folder.rglob("*.*"):
        file.chmod(0o444)
    preprocessed = roots["nnUNet_preprocessed"] / folder.name
    (tmp_path / "model").mkdir()
    api.extract_fingerprint_dataset(2, num_processes=1, show_progress_bar=False)
    (preprocessed / "dataset_fingerprint.json").chmod(0o444)
    with privileges_dropped():
        for _ in range(2):
            api.plan_experiment_dataset(2)
            api.preprocess_dataset(2, configurations=("2d",), num_processes=(1,), show_progress_bar=False)
            save_model_description(str(tmp_path / "model"), {}, {}, str(preprocessed))
            for file in (folder / "labelsTr").iterdir():
                os.utime(file)  # so that it is copied again
    for name in ("dataset.json", "splits_final.json", "patients.json", "gt_segmentations/case_1.nii.gz"):
        assert (preprocessed / name).stat().st_mode & 0o200, name
    assert (tmp_path / "model" / "dataset_fingerprint.json").stat().st_mode & 0o200


def wait_for_the_clock(folder):
    """Return once the time of a new file differs from that of any other so far: file systems count in ticks."""
    probe = folder / "probe"
    probe.touch()
    before = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == before:
        probe.touch()
    probe.unlink()


@pytest.mark.parametrize("seconds", [-86400, 0, 86400])
@pytest.mark.parametrize("content", [b"corrected", b"of another length"])
def test_a_label_that_was_replaced_is_copied_whatever_its_time(folder, roots, caplog, seconds, content):
    source = folder / "labelsTr" / "case_1.nii.gz"
    source.write_bytes(b"not right")
    os.utime(source, (1_600_000_000,) * 2)
    api.copy_labels(folder.name)
    source.write_bytes(content)
    os.utime(source, (1_600_000_000 + seconds,) * 2)
    api.copy_labels(folder.name)
    assert (roots["nnUNet_preprocessed"] / folder.name / "gt_segmentations" / source.name).read_bytes() == content
    assert "copies of 1 labels were replaced" in caplog.text
    assert "case_1" in caplog.text


def test_a_copy_that_was_edited_later_stays(folder, roots, tmp_path):
    copy = roots["nnUNet_preprocessed"] / folder.name / "gt_segmentations" / "case_1.nii.gz"
    api.copy_labels(folder.name)
    wait_for_the_clock(tmp_path)
    copy.write_bytes(b"edited by hand")
    api.copy_labels(folder.name)
    assert copy.read_bytes() == b"edited by hand"
    wait_for_the_clock(tmp_path)
    (folder / "labelsTr" / copy.name).write_bytes(b"edited later")
    api.copy_labels(folder.name)
    assert copy.read_bytes() == b"edited later"


def test_the_spacing_of_tif_labels_is_copied_with_them(folder, roots):
    references = roots["nnUNet_preprocessed"] / folder.name / "gt_segmentations"
    dataset_json = json.loads((folder / "dataset.json").read_text())
    entry = {"images": ["imagesTr/case_1_0000.tif"], "label": "labelsTr/mask.tif"}
    (folder / "dataset.json").write_text(
        json.dumps({**dataset_json, "file_ending": ".tif", "dataset": {"case_1": entry}})
    )
    (folder / "labelsTr" / "mask.tif").write_bytes(b"pages")
    api.copy_labels(folder.name, Tiff3DIO())
    assert sorted(file.name for file in references.iterdir()) == ["case_1.tif"]
    (folder / "labelsTr" / "mask.json").write_text('{"spacing": [5, 1, 1]}')
    api.copy_labels(folder.name, Tiff3DIO())
    assert (references / "case_1.json").read_text() == '{"spacing": [5, 1, 1]}'


def test_planner_is_found_by_name_and_its_plans_named(folder):
    api.extract_fingerprints([2], num_processes=1, show_progress_bar=False)
    assert api.plan_experiments([2], "nnUNetPlannerResEncM") == "nnUNetResEncUNetMPlans"
    plans, name = api.plan_experiment_dataset(
        folder.name, nnUNetPlannerResEncM, overwrite_plans_name="mine", overwrite_target_spacing=(1, 2, 1)
    )
    assert name == plans["plans_name"] == "mine"
    assert plans["configurations"]["3d_fullres"]["spacing"] == [2, 1, 1]


def test_the_cases_of_all_sites_count_where_the_fingerprint_is_pooled(folder, roots):
    """Also where `nnUNetv2_plan_experiment` plans once more, alone."""
    api.extract_fingerprint_dataset(2, num_processes=1, show_progress_bar=False)
    alone, _ = api.plan_experiment_dataset(2)
    preprocessed = roots["nnUNet_preprocessed"] / folder.name
    own = (preprocessed / "dataset_fingerprint.json").read_text()
    pooled = json.loads(own)
    for per_case in ("spacings", "shapes_after_crop"):
        pooled[per_case] = pooled[per_case][:1] * 3000
    (preprocessed / "dataset_fingerprint_local.json").write_text(own)
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(pooled))
    together, _ = api.plan_experiment_dataset(2)
    assert alone["configurations"]["2d"]["batch_size"] < together["configurations"]["2d"]["batch_size"]


def test_federated_command_plans_with_the_other_sites(folder, monkeypatch):
    calls = []

    def plan_federated(dataset_id, options):
        calls.append((dataset_id, options))
        return "nnUNetPlans"

    from nnunetv2.experiment_planning import federated_planning

    for shown in ("print_summary", "write_overview"):
        monkeypatch.setattr(api, shown, lambda *args, **kwargs: None)
    monkeypatch.setattr(federated_planning, "plan_federated", plan_federated)
    entrypoints.plan_and_preprocess_main(
        [
            "-d",
            "2",
            "--federated",
            "asym",
            "--no_pp",
            "-gpu_memory_target",
            "11",
            "-pl",
            "nnUNetPlannerResEncM",
            "-npfp",
            "3",
            "--no_pbar",
            "--clean",
        ]
    )
    assert calls == [
        (
            2,
            federated_planning.PlanningOptions(
                mode="asym",
                extractor_class=DatasetFingerprintExtractor,
                num_processes=3,
                verbose=False,
                clean=True,
                share_extrema=False,
                show_progress_bar=False,
                planner={
                    "experiment_planner_class": nnUNetPlannerResEncM,
                    "gpu_memory_target_in_gb": 11,
                    "preprocess_class_name": "DefaultPreprocessor",
                    "overwrite_target_spacing": None,
                    "overwrite_plans_name": None,
                },
            ),
        )
    ]


def test_unknown_class_is_named():
    with pytest.raises(RuntimeError, match="no class NoSuchPlanner in .*experiment_planning"):
        api.find_planning_class("NoSuchPlanner")


def test_missing_plans_are_named(folder):
    with pytest.raises(FileNotFoundError, match="absent.json is missing: plan Dataset002_Scans first"):
        api.preprocess_dataset(2, "absent")


def test_numbers_of_processes_must_fit_the_configurations(folder):
    with pytest.raises(RuntimeError, match="2d, 3d_fullres; got .1, 2, 3"):
        api.preprocess_dataset(2, configurations=("2d", "3d_fullres"), num_processes=(1, 2, 3))


def test_changed_dataset_json_is_pointed_out(folder, roots, caplog):
    api.extract_fingerprint_dataset(2, num_processes=1, show_progress_bar=False)
    api.plan_experiment_dataset(2)
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "labels": {"background": 0, "a": 1}}))
    api.preprocess_dataset(2, configurations=(), num_processes=1)
    assert "has changed since Dataset002_Scans was planned" in caplog.text


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_datasets_are_refused(name, capsys):
    with pytest.raises(SystemExit):
        getattr(entrypoints, f"{name}_main")([])
    assert "-d" in capsys.readouterr().err


def test_plan_and_preprocess_refuses_unknown_options(capsys):
    with pytest.raises(SystemExit):
        entrypoints.plan_and_preprocess_main(["-d", "4", "--misspelled"])
    assert "--misspelled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("extract_fingerprint", "extract_fingerprints"),
        ("plan_experiment", "plan_experiments"),
        ("preprocess", "preprocess"),
    ],
)
def test_options_of_other_commands_are_named_and_passed_over(name, function, monkeypatch, caplog):
    datasets = []
    monkeypatch.setattr(api, function, lambda ids, *arguments, **options: datasets.append(ids))
    getattr(entrypoints, f"{name}_main")(["-d", "4", "--no_pp", "-gpu", "8", "--verify"])
    assert datasets == [[4]]
    assert "does not know --no_pp" in caplog.text


def test_datasets_are_numbers_or_names(capsys):
    parser = COMMANDS["preprocess"]()
    assert parser.parse_args(["-d", "4", "Dataset005_Prostate"]).d == [4, "Dataset005_Prostate"]
    with pytest.raises(SystemExit):
        parser.parse_args(["-d", "four"])
    assert "'four' is neither the number of a dataset nor a name" in capsys.readouterr().err


def test_flags_have_their_defaults():
    arguments = vars(COMMANDS["plan_and_preprocess"]().parse_args(["-d", "1"]))
    assert arguments == {
        "d": [1],
        "fpe": "DatasetFingerprintExtractor",
        "npfp": None,
        "verify_dataset_integrity": False,
        "without_bad_cases": False,
        "no_pp": False,
        "clean": False,
        "pl": "ExperimentPlanner",
        "gpu_memory_target": None,
        "preprocessor_name": "DefaultPreprocessor",
        "overwrite_target_spacing": None,
        "overwrite_plans_name": None,
        "c": ["2d", "3d_fullres", "3d_lowres"],
        "np": None,
        "verbose": False,
        "no_pbar": False,
        "federated": None,
        "share_extrema": False,
    }
    assert COMMANDS["plan_and_preprocess"]().parse_args(["-d", "1", "--federated"]).federated == "ffe"
    assert COMMANDS["preprocess"]().parse_args(["-d", "1"]).plans_name == "nnUNetPlans"


class RecordingPreprocessor:
    """Has a `run` of its own, as preprocessors of users may."""

    def __init__(self, verbose=True):
        self.counts = []

    def run(self, dataset, configuration, plans, num_processes):
        self.counts.append((configuration, num_processes))


class InheritingPreprocessor(DefaultPreprocessor):
    pass


@pytest.mark.parametrize(
    ("preprocessor", "expected"), [(RecordingPreprocessor, [8, 4, 8, 4]), (InheritingPreprocessor, [None] * 4)]
)
def test_processes_are_left_to_preprocessors_that_choose_themselves(preprocessor, expected):
    names = ["2d", "3d_fullres", "3d_lowres", "mine"]
    assert [api.count_for(preprocessor(verbose=False), name) for name in names] == expected


@pytest.mark.parametrize("flags", [["--verbose"], ["--no_pbar"]])
def test_log_lines_take_the_place_of_bars(monkeypatch, flags):
    seen = []
    monkeypatch.setattr(api, "preprocess", lambda *args: seen.append(args))
    entrypoints.preprocess_main(["-d", "1", "-np", "3", *flags])
    assert seen == [([1], "nnUNetPlans", ["2d", "3d_fullres", "3d_lowres"], [3], flags == ["--verbose"], False)]


def test_extrema_are_shared_in_a_federation_only(capsys):
    with pytest.raises(SystemExit):
        entrypoints.plan_and_preprocess_main(["-d", "1", "--share_extrema"])
    assert "--share_extrema needs --federated ffe" in capsys.readouterr().err


def test_every_dataset_is_preprocessed_with_its_own_plans(monkeypatch):
    calls = []
    for name in ("extract_fingerprints", "print_summary", "write_overview"):
        monkeypatch.setattr(api, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(api, "plan_experiments", lambda datasets, *args, **kwargs: f"plans of {datasets[0]}")
    monkeypatch.setattr(api, "preprocess", lambda datasets, plans, *args: calls.append((datasets, plans)))
    entrypoints.plan_and_preprocess_main(["-d", "1", "Dataset002_X"])
    assert calls == [([1], "plans of 1"), (["Dataset002_X"], "plans of Dataset002_X")]


def test_an_undrawable_overview_is_no_error(folder, caplog):
    api.write_overview(2)
    assert "dataset_overview.png could not be drawn" in caplog.text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_torch(name):
    code = (
        "import sys; from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints as e\n"
        f"try: e.{name}_main(['-h'])\n"
        "finally: assert not {'torch', 'numpy', 'scipy', 'SimpleITK'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "-d DATASET" in done.stdout


def test_error_is_one_line_for_the_person_at_the_terminal(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_plan_experiment", "-d", "2"])
    with pytest.raises(SystemExit) as caught:
        entrypoints.plan_experiment_entry()
    assert caught.value.code == 1
    assert "dataset_fingerprint.json is missing" in capsys.readouterr().err
