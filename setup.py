"""Package nnU-Net with native federated learning."""
from pathlib import Path

from setuptools import find_packages, setup

COMMANDS = {
    "nnUNetv2_plan_and_preprocess": "experiment_planning.plan_and_preprocess_entrypoints:plan_and_preprocess_entry",
    "nnUNetv2_extract_fingerprint": "experiment_planning.plan_and_preprocess_entrypoints:extract_fingerprint_entry",
    "nnUNetv2_plan_experiment": "experiment_planning.plan_and_preprocess_entrypoints:plan_experiment_entry",
    "nnUNetv2_preprocess": "experiment_planning.plan_and_preprocess_entrypoints:preprocess_entry",
    "nnUNetv2_move_plans_between_datasets":
        "experiment_planning.plans_for_pretraining.move_plans_between_datasets:entry_point_move_plans_between_datasets",
    "nnUNetv2_convert_MSD_dataset": "dataset_conversion.convert_MSD_dataset:entry_point",
    "nnUNetv2_convert_old_nnUNet_dataset":
        "dataset_conversion.convert_raw_dataset_from_old_nnunet_format:convert_entry_point",
    "nnUNetv2_train": "run.run_training:run_training_entry",
    "nnUNetv2_predict": "inference.predict_from_raw_data:predict_entry_point",
    "nnUNetv2_predict_from_modelfolder": "inference.predict_from_raw_data:predict_entry_point_modelfolder",
    "nnUNetv2_evaluate_folder": "evaluation.evaluate_predictions:evaluate_folder_entry_point",
    "nnUNetv2_find_best_configuration": "evaluation.find_best_configuration:find_best_configuration_entry_point",
    "nnUNetv2_accumulate_crossval_results":
        "evaluation.find_best_configuration:accumulate_crossval_results_entry_point",
    "nnUNetv2_determine_postprocessing":
        "postprocessing.remove_connected_components:entry_point_determine_postprocessing_folder",
    "nnUNetv2_apply_postprocessing": "postprocessing.remove_connected_components:entry_point_apply_postprocessing",
    "nnUNetv2_ensemble": "ensembling.ensemble:entry_point_ensemble_folders",
    "nnUNetv2_plot_overlay_pngs": "utilities.overlay_plots:entry_point_generate_overlay",
    "nnUNetv2_download_pretrained_model_by_url": "model_sharing.entry_points:download_by_url",
    "nnUNetv2_install_pretrained_model_from_zip": "model_sharing.entry_points:install_from_zip_entry_point",
    "nnUNetv2_export_model_to_zip": "model_sharing.entry_points:export_pretrained_model_entry",
    "nnUNetv2_evaluate_simple": "evaluation.evaluate_predictions:evaluate_simple_entry_point",
    "nnUNetv2_fed_coordinator": "federated.commands.coordinator:coordinator_entry",
    "nnUNetv2_fed_admin": "federated.commands.admin:admin_entry",
    "nnUNetv2_fed_join": "federated.site.credential:join_entry",
    "nnUNetv2_fed_leave": "federated.commands.status:leave_entry",
    "nnUNetv2_fed_status": "federated.commands.status:status_entry",
    "nnUNetv2_fed_manifest": "federated.commands.manifest:manifest_entry",
    "nnUNetv2_fed_fetch_model": "federated.commands.fetch_model:fetch_model_entry",
    "nnUNetv2_fed_simulate": "federated.commands.simulate:simulate_entry",
}

setup(
    name="nnunetv2",
    version="2.8.1+fed.4",
    description="nnU-Net v2 with native federated learning: several sites train one network, no scan leaves its site.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Healthcare Industry",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["nnunetv2", "nnunetv2.*"]),
    package_data={"nnunetv2.federated.coordinator.dashboard": ["static/*"]},
    install_requires=[
        "torch>=2.6,!=2.9.*",
        "dynamic-network-architectures>=0.4.4",
        "batchgenerators>=0.25.4",
        "batchgeneratorsv2>=0.3.6",
        "acvl-utils>=0.2.6",
        "connected-components-3d",
        "blosc2>=3.3.2",
        "numpy>=1.24",
        "scipy",
        "scikit-image>=0.20",
        "scikit-learn",
        "threadpoolctl",
        "SimpleITK>=2.4",
        "nibabel",
        "tifffile",
        "imagecodecs",
        "matplotlib",
        "tqdm",
        # the federation; the coordinator alone needs these and numpy only
        "pydantic>=2.8",
        "requests>=2.32.4",
        "safetensors>=0.4.2",
        # with upper bounds: coordinator/connections.py is built on the inside of uvicorn; newest tested: 0.54 and 1.10
        "h11>=0.16",
        "starlette>=0.49.1,<2",
        "uvicorn>=0.31,<0.55",
    ],
    extras_require={
        "dev": ["pytest>=8", "pytest-xdist", "pytest-timeout", "hypothesis", "ruff", "httpx", "setuptools>=70.1"],
        # loggers and an optimizer that trainers use on request
        "wandb": ["wandb"],
        "tensorboard": ["tensorboard"],
        "adan": ["adan-pytorch"],
    },
    entry_points={"console_scripts": [f"{name} = nnunetv2.{target}" for name, target in COMMANDS.items()]},
)
