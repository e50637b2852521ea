"""Programs written for the release: names that they import by a star, replace, override and pass."""

from __future__ import annotations

import inspect
import json
import sys

import numpy as np
import pytest
import torch
from tiny_dataset import NAME, make_dataset_json, make_plans, make_tiny_dataset
from tiny_models import write_model

import nnunetv2.inference.predict_from_raw_data as prediction
import nnunetv2.run.run_training as command
import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as trainers
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.loss.robust_ce_loss import TopKLoss
from nnunetv2.training.lr_scheduler.warmup import CosineAnnealingLR_offset
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

CPU = torch.device("cpu")

STAR_IMPORTS = {
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer": """
ANISO_THRESHOLD ApplyRandomBinaryOperatorTransform BGContrast BasicTransform ComposeTransforms ConfigurationManager
ContrastTransform Convert2DTo3DTransform Convert3DTo2DTransform ConvertSegmentationToRegionsTransform DC_and_BCE_loss
DC_and_CE_loss DDP DeepSupervisionWrapper DownsampleSegForDSTransform GammaTransform GaussianBlurTransform
GaussianNoiseTransform GradScaler List MaskImageTransform MemoryEfficientSoftDiceLoss MetaLogger MirrorTransform
MoveSegAsOneHotToDataTransform MultiThreadedAugmenter MultiplicativeBrightnessTransform NonDetMultiThreadedAugmenter
OptimizedModule PlansManager PolyLRScheduler RandomScalar RandomTransform RemoveLabelTansform
RemoveRandomConnectedComponentFromOneHotEncodingTransform SimulateLowResolutionTransform SingleThreadedAugmenter
SpatialTransform TORCH_HAS_OLD_GRADSCALER Tuple Union autocast check_workers_alive_and_busy collate_outputs
compute_gaussian compute_metrics_on_folder convert_labelmap_to_one_hot datetime deepcopy default_num_processes
determine_num_input_channels device_count dist dummy_context empty_cache export_prediction_from_logits
generate_crossval_split get_allowed_n_proc_DA get_network_from_plans get_patch_size get_tp_fp_fn_tn
infer_dataset_class inspect isfile join load_json maybe_mkdir_p multiprocessing nn nnUNetDataLoader nnUNetPredictor
nnUNetTrainer nnUNet_preprocessed nnUNet_results np os resample_and_save save_json shutil sleep sys time torch
warnings""",
    "nnunetv2.inference.predict_from_raw_data": """
ConfigurationManager DistributedDataParallel List MultiThreadedAugmenter OptimizedModule Optional PlansManager
PreprocessAdapterFromNpy Queue Thread Tuple Union check_workers_alive_and_busy compute_gaussian
compute_steps_for_sliding_window convert_labelmap_to_one_hot
convert_predicted_logits_to_segmentation_with_correct_shape create_lists_from_splitted_dataset_folder deepcopy
default_num_processes determine_num_input_channels dummy_context empty_cache export_prediction_from_logits
get_output_folder inspect isdir isfile itertools join load_json maybe_mkdir_p multiprocessing nn nnUNetPredictor np os
pad_nd_image predict_entry_point predict_entry_point_modelfolder preprocessing_iterator_fromfiles
preprocessing_iterator_fromnpy recursive_find_trainer_class_by_name recursive_fix_for_json_export save_json sleep
subdirs torch tqdm warnings""",
    "nnunetv2.training.dataloading.data_loader": """
DataLoader LabelManager List PlansManager Tuple Union crop_and_pad_nd join load_json nnUNetBaseDataset nnUNetDataLoader
nnUNetDatasetBlosc2 nnUNet_preprocessed np os threadpool_limits torch warnings""",
    "nnunetv2.run.run_training": """
Optional Union cleanup_ddp cudnn dist find_free_network_port get_trainer_from_args isfile join load_json
load_pretrained_weights maybe_convert_to_dataset_name maybe_load_checkpoint mp multiprocessing nnUNetTrainer
nnUNet_preprocessed os recursive_find_trainer_class_by_name run_ddp run_training run_training_entry setup_ddp socket
torch""",
}


# ----------------------------------------------------------------------------------------------------- star imports


@pytest.mark.parametrize("module", STAR_IMPORTS)
def test_a_star_import_brings_what_it_brings_from_the_release(module):
    found: dict = {}
    exec(f"from {module} import *", found)
    assert set(STAR_IMPORTS[module].split()) - set(found) == set()
    assert "steps" not in found and "annotations" not in found  # nothing that only our code uses


def test_names_mean_what_they_mean_in_the_release():
    found: dict = {}
    exec("from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import *", found)
    assert found["time"]() > 0 and found["datetime"].now() and found["dist"] is torch.distributed
    assert found["join"]("a", "b") == "a/b" and found["TORCH_HAS_OLD_GRADSCALER"] is False
    assert found["nnUNetTrainer"] is trainers.nnUNetTrainer and found["nnUNetPredictor"] is prediction.nnUNetPredictor
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        trainers.nonsense  # noqa: B018


@pytest.mark.slow
def test_a_trainer_written_with_a_star_import_trains(tmp_path, roots, monkeypatch):
    make_tiny_dataset(roots["nnUNet_preprocessed"], stages=3, cases=5)
    (tmp_path / "star_trainer.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import *\n\n\n"
        "class nnUNetTrainerStar(nnUNetTrainer):\n"
        "    def do_split(self) -> Tuple[List[str], List[str]]:\n"
        "        super().do_split()\n"
        "        splits = load_json(join(self.preprocessed_dataset_folder_base, 'splits_final.json'))\n"
        "        return deepcopy(splits[0]['val']), splits[0]['val']\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr(sys, "path", list(sys.path))
    trainer = short_trainer("nnUNetTrainerStar")
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", 0))


# --------------------------------------------------------------------------------------------------- replaced names


def short_trainer(name: str = "nnUNetTrainer"):
    trainer = command.get_trainer_from_args(NAME, "3d_fullres", 0, name, device=CPU)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 1, 1
    return trainer


class MetAStandInError(Exception):
    """A stand-in was used; nothing more has to happen."""


@pytest.mark.parametrize("entry", ["model folder", "dataset"])
def test_the_prediction_commands_use_a_predictor_put_in_the_place_of_ours(tmp_path, roots, monkeypatch, entry):
    class Mine(prediction.nnUNetPredictor):
        def initialize_from_trained_model_folder(self, folder, *arguments, **options):
            raise MetAStandInError(folder)

    monkeypatch.setattr(prediction, "nnUNetPredictor", Mine)
    monkeypatch.setattr(prediction, "get_output_folder", lambda *names: "/".join(map(str, names)))
    options = ["-i", str(tmp_path), "-o", str(tmp_path / "out"), "-f", "0", "-device", "cpu"]
    parsers = {"model folder": prediction.build_model_folder_parser, "dataset": prediction.build_parser}
    arguments = {"model folder": ["-m", "a/model"], "dataset": ["-d", "7", "-c", "2d"]}
    run = {"model folder": prediction._predict_from_model_folder, "dataset": prediction._predict}
    expected = {"model folder": "a/model", "dataset": "7/nnUNetTrainer/nnUNetPlans/2d"}
    with pytest.raises(MetAStandInError, match=expected[entry]):
        run[entry](parsers[entry]().parse_args([*arguments[entry], *options]))


def test_a_replaced_predictor_predicts(tmp_path, monkeypatch):
    import SimpleITK as sitk

    model = write_model(tmp_path / "model", folds=(0,))
    (tmp_path / "in").mkdir()
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(12, 14, 16)).astype(np.float32))
    sitk.WriteImage(image, str(tmp_path / "in" / "case_0000.nii.gz"))
    calls = []

    class Mine(prediction.nnUNetPredictor):
        def predict_sliding_window_return_logits(self, data):
            calls.append(tuple(data.shape))
            return super().predict_sliding_window_return_logits(data)

    monkeypatch.setattr(prediction, "nnUNetPredictor", Mine)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "predict",
            "-i",
            str(tmp_path / "in"),
            "-o",
            str(tmp_path / "out"),
            "-m",
            str(model),
            "-f",
            "0",
            "-device",
            "cpu",
            "-npp",
            "0",
            "-nps",
            "0",
        ],
    )
    prediction.predict_entry_point_modelfolder()
    assert calls and (tmp_path / "out" / "case.nii.gz").is_file()


def test_the_training_command_uses_what_is_put_in_the_place_of_its_names(roots, monkeypatch):
    make_tiny_dataset(roots["nnUNet_preprocessed"])
    looked_up = []

    class Mine(trainers.nnUNetTrainer):
        def initialize(self):
            self.was_initialized = True

    def find(name):
        looked_up.append(name)
        return Mine

    monkeypatch.setattr(command, "recursive_find_trainer_class_by_name", find)
    trainer = command.get_trainer_from_args(NAME, "3d_fullres", 0, "Whatever", device=CPU)
    assert type(trainer) is Mine and looked_up == ["Whatever"]
    loaded = []
    monkeypatch.setattr(command, "load_pretrained_weights", lambda *given, **options: loaded.append(given))
    command.maybe_load_checkpoint(trainer, False, False, "weights.pth")
    assert loaded == [(None, "weights.pth")]


@pytest.mark.slow
def test_the_trainer_uses_what_is_put_in_the_place_of_its_names(roots, monkeypatch):
    make_tiny_dataset(roots["nnUNet_preprocessed"], stages=3, cases=5)
    monkeypatch.setenv("nnUNet_n_proc_DA", "3")
    used = set()

    def note(name):
        used.add(name)

    class Loader(trainers.nnUNetDataLoader):
        def generate_train_batch(self):
            note("nnUNetDataLoader")
            return super().generate_train_batch()

    class Predictor(trainers.nnUNetPredictor):
        def predict_sliding_window_return_logits(self, data):
            note("nnUNetPredictor")
            return super().predict_sliding_window_return_logits(data)

    def splits(identifiers, seed, n_splits):
        note("generate_crossval_split")
        return [{"train": list(identifiers)[1:], "val": list(identifiers)[:1]}]

    score = trainers.compute_metrics_on_folder
    for name, mine in (
        ("nnUNetDataLoader", Loader),
        ("nnUNetPredictor", Predictor),
        ("generate_crossval_split", splits),
        ("get_allowed_n_proc_DA", lambda: 0),
        (
            "compute_metrics_on_folder",
            lambda *given, **options: note("compute_metrics_on_folder") or score(*given, **options),
        ),
    ):
        monkeypatch.setattr(trainers, name, mine, raising=False)
    trainer = short_trainer()
    trainer.run_training()
    trainer.perform_actual_validation()
    assert used == {"nnUNetDataLoader", "nnUNetPredictor", "generate_crossval_split", "compute_metrics_on_folder"}
    splits_file = roots["nnUNet_preprocessed"] / NAME / "splits_final.json"
    assert len(json.loads(splits_file.read_text())) == 1


def test_a_name_is_found_again_when_its_replacement_is_gone(monkeypatch):
    ours = trainers.nnUNetPredictor
    with monkeypatch.context() as patch:
        patch.setattr(prediction, "nnUNetPredictor", "mine")
        assert trainers.nnUNetPredictor == "mine"  # replaced where the trainer's module takes it from
    assert trainers.nnUNetPredictor is ours


# --------------------------------------------------------------------------------------- overridden and passed by name


@pytest.mark.parametrize(
    ("by_chance", "rule"), [(False, "_oversample_last_XX_percent"), (True, "_probabilistic_oversampling")]
)
def test_a_loader_hears_an_overridden_rule_of_oversampling(by_chance, rule):
    class Data:
        identifiers = ["a"]

    labels = PlansManager(make_plans()).get_label_manager(make_dataset_json())
    other = ({"_oversample_last_XX_percent", "_probabilistic_oversampling"} - {rule}).pop()
    even = type(
        "Even",
        (nnUNetDataLoader,),
        {
            rule: lambda self, sample_idx: sample_idx % 2 == 0,
            other: lambda self, sample_idx: pytest.fail("the other rule was asked"),
        },
    )
    loader = even(Data(), 4, (8, 8, 8), (8, 8, 8), labels, probabilistic_oversampling=by_chance)
    assert [loader.get_do_oversample(number) for number in range(4)] == [True, False, True, False]
    plain = nnUNetDataLoader(Data(), 3, (8, 8, 8), (8, 8, 8), labels, oversample_foreground_percent=0.33)
    assert [plain._oversample_last_XX_percent(number) for number in range(3)] == [False, False, True]
    assert plain._probabilistic_oversampling(0) in (True, False)


def test_parameters_have_the_names_of_the_release():
    assert convert_dataset_name_to_id(dataset_name="Dataset004_Hippocampus") == 4
    logits, target = torch.randn(1, 2, 4, 4), torch.zeros(1, 1, 4, 4)
    assert TopKLoss(k=50)(inp=logits, target=target) == TopKLoss(k=50)(logits, target)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = CosineAnnealingLR_offset(optimizer, T_max=4)
    schedule.step(epoch=2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)
    assert list(inspect.signature(schedule.step).parameters) == ["epoch"]


def test_plans_resolve_inheritance_under_the_name_of_the_release():
    plans = PlansManager({"configurations": {"a": {"x": 1, "y": {"u": 1}}, "b": {"inherits_from": "a", "y": {"v": 2}}}})
    assert plans._internal_resolve_configuration_inheritance("b", visited=("c",)) == {
        "inherits_from": "a",
        "x": 1,
        "y": {"v": 2},
    }
    with pytest.raises(ValueError, match="no configuration 'c'"):
        plans._internal_resolve_configuration_inheritance("c")

    class Wider(PlansManager):
        def _internal_resolve_configuration_inheritance(self, configuration_name, visited=None):
            return {**super()._internal_resolve_configuration_inheritance(configuration_name), "patch_size": [1, 2]}

    assert Wider(plans.plans).get_configuration("b").patch_size == [1, 2]
