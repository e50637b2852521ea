"""Plans of random fingerprints against those of the reference release, all planners, to the last character."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

NUM_DATASETS = 320
SEED = 20240731

# planner -> module below experiment_planners, share of the datasets
PLANNERS = {
    "ExperimentPlanner": ("default_experiment_planner", 0.34),
    "ResEncUNetPlanner": ("resencUNet_planner", 0.08),
    "ResEncUNetPlanner again": ("residual_unets.residual_encoder_unet_planners", 0.06),
    "nnUNetPlannerResEncM": ("residual_unets.residual_encoder_unet_planners", 0.1),
    "nnUNetPlannerResEncL": ("residual_unets.residual_encoder_unet_planners", 0.12),
    "nnUNetPlannerResEncXL": ("residual_unets.residual_encoder_unet_planners", 0.1),
    "nnUNetPlannerResEncL_noResampling": ("resampling.planners_no_resampling", 0.05),
    "nnUNetPlanner_torchres": ("resampling.resample_with_torch", 0.05),
    "nnUNetPlannerResEncL_torchres": ("resampling.resample_with_torch", 0.05),
    "nnUNetPlannerResEncL_torchres_sepz": ("resampling.resample_with_torch", 0.05),
}
SHARE_FOLDERS = {"ResEncUNetPlanner", "nnUNetPlannerResEncM", "nnUNetPlannerResEncL", "nnUNetPlannerResEncXL"}
KINDS = ("isotropic", "large", "thick slices", "few thick slices", "any", "single slices", "mixed")
CHANNELS = ("CT", "ct", "MR", "T2", "noNorm", "rescale_to_0_1", "rgb_to_0_1", "zscore", "PET")

# Plans each dataset in `value`: (name, planner, its module, keywords). No image exists, so none is read. The reference
# builds networks; on the meta device, without weights, that changes no number and saves most of its time.
PLAN_ALL = """
import contextlib, importlib, io, time, warnings
os.environ["nnUNet_n_proc_DA"] = "1"  # the reference sets its number of threads by it
warnings.simplefilter("ignore")
base = "nnunetv2.experiment_planning.experiment_planners."
default = importlib.import_module(base + "default_experiment_planner")
default.ExperimentPlanner.determine_reader_writer = lambda self: type("SimpleITKIO", (), {})
context = contextlib.nullcontext()
if value["meta"]:
    import torch
    context = torch.device("meta")
start = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()), context:
    for name, planner, module, keywords in value["tasks"]:
        getattr(importlib.import_module(base + module), planner)(name, **keywords).plan_experiment()
answer = time.perf_counter() - start
"""


@dataclass(frozen=True)
class Planning:
    """A dataset without images, and how it is to be planned."""

    name: str
    kind: str
    dataset_json: dict[str, Any]
    fingerprint: dict[str, Any]
    planner: str
    module: str
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> list:
        return [self.name, self.planner, self.module, self.keywords]


def make_planning(rng: np.random.Generator, number: int) -> Planning:
    kind = str(rng.choice(KINDS))
    spacings, shapes = make_geometry(rng, kind, num_cases=int(rng.integers(1, 12)))
    dataset_json = make_dataset_json(rng)
    fingerprint = {
        "spacings": spacings.tolist(),
        "shapes_after_crop": shapes.tolist(),
        "median_relative_size_after_cropping": float(rng.choice([0.3, 0.7499, 0.75, 1.0])),
        "foreground_intensity_properties_per_channel": {"0": {"mean": float(rng.normal()), "std": float(rng.random())}},
    }
    label = str(rng.choice(list(PLANNERS), p=[share for _, share in PLANNERS.values()]))
    keywords = make_keywords(rng, kind, np.median(spacings, axis=0))
    return Planning(
        f"Dataset{number:03d}_Random", kind, dataset_json, fingerprint, label.split()[0], PLANNERS[label][0], keywords
    )


def make_geometry(rng: np.random.Generator, kind: str, num_cases: int) -> tuple[np.ndarray, np.ndarray]:
    """Return spacings and shapes `(cases, 3)`; axes are permuted at times."""
    base = {
        "isotropic": np.full(3, rng.uniform(0.4, 2.5)),
        "large": rng.uniform(0.6, 1.2, 3),
        "any": rng.uniform(0.3, 4, 3),
        "single slices": np.array([999.0, 1.0, 1.0]),
        "mixed": rng.uniform(0.5, 1.5, 3),
    }.get(kind)
    if base is None:
        base = np.array([rng.uniform(2, 10), *[rng.uniform(0.3, 1.6)] * 2])
    if kind != "single slices":
        base = rng.permutation(base) if rng.random() < 0.3 else base
        base = np.round(base, int(rng.integers(1, 6)))
    spread = 0.0 if rng.random() < 0.3 or kind == "single slices" else 0.2
    spacings = base * rng.uniform(1 - spread, 1 + spread, (num_cases, 3))
    if kind == "mixed":
        spacings[rng.random(num_cases) < 0.5, 0] *= rng.uniform(3, 8)
    edge = np.exp(rng.uniform(np.log(300 if kind == "large" else 24), np.log(600 if kind == "large" else 700), 3))
    shapes = np.maximum(8, edge * rng.uniform(0.9, 1.1, (num_cases, 3))).astype(int)
    if "thick" in kind:
        few = kind == "few thick slices"
        shapes[:, int(np.argmax(base))] = rng.integers(3 if few else 8, 14 if few else 60, num_cases)
    if kind == "single slices":
        shapes[:, 0] = 1
        shapes[:, 1:] = (shapes[:, 1:] * rng.uniform(1, 3)).astype(int)
    return spacings, shapes


def make_dataset_json(rng: np.random.Generator) -> dict[str, Any]:
    """Return dataset.json with plain labels, regions or an ignore label, and now and then the old name of channels."""
    num_labels = int(np.exp(rng.uniform(np.log(2), np.log(120)))) if rng.random() < 0.3 else int(rng.integers(2, 8))
    labels: dict[str, Any] = {"background": 0, **{f"label {i}": i for i in range(1, num_labels)}}
    more = {}
    if rng.random() < 0.2:
        labels = {"background": 0, **{f"region {i}": list(range(i, num_labels)) for i in range(1, num_labels)}}
        more["regions_class_order"] = list(range(1, num_labels))
    if rng.random() < 0.2:
        labels["ignore"] = num_labels
    key = "modality" if rng.random() < 0.1 else "channel_names"
    return {
        key: {str(i): str(rng.choice(CHANNELS)) for i in range(int(rng.integers(1, 6)))},
        "labels": labels,
        "numTraining": int(np.exp(rng.uniform(np.log(2), np.log(3000)))),
        "file_ending": ".nii.gz",
        "dataset": {"case": {"images": ["absent"], "label": "absent"}},
        **more,
    }


def make_keywords(rng: np.random.Generator, kind: str, spacing: np.ndarray) -> dict[str, Any]:
    keywords: dict[str, Any] = {}
    if rng.random() < 0.3:
        keywords["gpu_memory_target_in_gb"] = float(rng.choice([3, 4, 6.5, 11, 16, 24, 32, 48, 80]))
    if rng.random() < 0.2 and kind != "single slices":
        keywords["overwrite_target_spacing"] = np.round(spacing * rng.uniform(0.6, 1.8, 3), 3).tolist()
    if rng.random() < 0.1:
        keywords["suppress_transpose"] = True
    if rng.random() < 0.15:
        keywords["plans_name"] = "minePlans"
    if rng.random() < 0.1:
        keywords["preprocessor_name"] = "MyPreprocessor"
    return keywords


def test_plans_of_random_fingerprints_are_the_same_files(roots, reference, ours, monkeypatch):
    rng = np.random.default_rng(SEED)
    plannings = [make_planning(rng, number) for number in range(1, NUM_DATASETS + 1)]
    for planning in plannings:
        write_dataset(roots, planning)
    theirs = roots["nnUNet_preprocessed"].with_name("preprocessed_by_reference")
    shutil.copytree(roots["nnUNet_preprocessed"], theirs)
    tasks = [planning.task for planning in plannings]
    _, our_seconds = ours.run(PLAN_ALL, {"tasks": tasks, "meta": False})
    monkeypatch.setenv("nnUNet_preprocessed", str(theirs))
    _, their_seconds = reference.run(PLAN_ALL, {"tasks": tasks, "meta": True})
    print(f"planned {NUM_DATASETS} datasets in {our_seconds:.2f} s, the reference in {their_seconds:.2f} s")

    written = {planning.name: read_plans(roots["nnUNet_preprocessed"] / planning.name) for planning in plannings}
    expected = {planning.name: with_own_folders(planning, read_plans(theirs / planning.name)) for planning in plannings}
    assert all(expected.values())
    differing = [planning.task for planning in plannings if written[planning.name] != expected[planning.name]]
    assert not differing, f"{len(differing)} of {NUM_DATASETS} plans differ: {differing[:5]}"
    require_variety(plannings, written)


def write_dataset(roots: dict[str, Path], planning: Planning) -> None:
    for root, file, content in (
        ("nnUNet_raw", "dataset.json", planning.dataset_json),
        ("nnUNet_preprocessed", "dataset_fingerprint.json", planning.fingerprint),
    ):
        (roots[root] / planning.name).mkdir()
        (roots[root] / planning.name / file).write_text(json.dumps(content))


def read_plans(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.glob("*Plans*.json")}


def with_own_folders(planning: Planning, plans: dict[str, str]) -> dict[str, str]:
    """Put in our one difference: plans with a name of their own do not share the folders of the default plans."""
    name = planning.keywords.get("plans_name")
    if name is None or planning.planner not in SHARE_FOLDERS:
        return plans
    return {
        file: text.replace('"nnUNetPlans_2d"', f'"{name}_2d"').replace('"nnUNetPlans_3d_', f'"{name}_3d_')
        for file, text in plans.items()
    }


def require_variety(plannings: list[Planning], written: dict[str, dict[str, str]]) -> None:
    """Make sure that the comparison covers what it claims to."""
    plans = [json.loads(text) for files in written.values() for text in files.values()]
    configurations = [set(content["configurations"]) for content in plans]
    assert sum("3d_lowres" in names for names in configurations) >= 30
    assert sum(names == {"2d"} for names in configurations) >= 30
    assert sum(content["transpose_forward"] != [0, 1, 2] for content in plans) >= 30
    assert {planning.kind for planning in plannings} == set(KINDS)
    assert {(planning.planner, planning.module) for planning in plannings} == {
        (label.split()[0], module) for label, (module, _) in PLANNERS.items()
    }
    for keyword in ("gpu_memory_target_in_gb", "overwrite_target_spacing", "suppress_transpose", "plans_name"):
        assert sum(keyword in planning.keywords for planning in plannings) >= 20
