"""Code in the styles of programs built on nnU-Net runs unchanged. Each test is one program's way of predicting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from patience import PATIENCE_S
from tiny_models import write_model

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path) -> str:
    return str(write_model(tmp_path / "model", folds=(0, "all")))


@pytest.fixture
def images(write_images) -> Path:
    return write_images(["volume"])


def test_a_brain_extractor_names_its_outputs_and_removes_what_it_does_not_want(model, images, tmp_path):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=0.5,
        use_gaussian=True,
        use_mirroring=False,
        perform_everything_on_device=True,
        device=CPU,
        verbose=False,
        verbose_preprocessing=False,
    )
    predictor.initialize_from_trained_model_folder(model, "all")
    (tmp_path / "out").mkdir()
    predictor.predict_from_files(
        [[str(images / "volume_0000.nii.gz")]],
        [str(tmp_path / "out" / "brain")],
        save_probabilities=False,
        overwrite=True,
        num_processes_preprocessing=4,
        num_processes_segmentation_export=8,
        folder_with_segs_from_prev_stage=None,
        num_parts=1,
        part_id=0,
    )
    for leftover in ("dataset.json", "plans.json", "predict_from_raw_data_args.json"):
        os.remove(os.path.join(tmp_path, "out", leftover))  # noqa: PTH107
    assert os.listdir(tmp_path / "out") == ["brain.nii.gz"]  # noqa: PTH208


def test_a_whole_body_tool_feeds_chunks_from_its_own_iterator(model, images):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    def iterate(chunks, properties, predictor):
        preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
        for chunk in chunks:
            data, _, about = preprocessor.run_case_npy(
                chunk,
                None,
                properties,
                predictor.plans_manager,
                predictor.configuration_manager,
                predictor.dataset_json,
            )
            yield {"data": torch.from_numpy(data).contiguous(), "data_properties": about, "ofile": None}

    predictor = nnUNetPredictor(allow_tqdm=False, device=CPU)
    predictor.initialize_from_trained_model_folder(model, use_folds=("all",), checkpoint_name="checkpoint_final.pth")
    image, properties = SimpleITKIO().read_images([str(images / "volume_0000.nii.gz")])
    chunks = [image, image]
    results = predictor.predict_from_data_iterator(
        iterate(chunks, properties, predictor), save_probabilities=False, num_processes_segmentation_export=2
    )
    assert [result.shape for result in results] == [image.shape[1:]] * 2


def test_an_interactive_tool_blends_its_own_tiles(model):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, (0,))
    patch = tuple(predictor.configuration_manager.patch_size)
    image = torch.randn(1, 20, 18, 25)
    gaussian = compute_gaussian(patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=CPU)
    logits, weights = torch.zeros(3, *image.shape[1:]), torch.zeros(image.shape[1:])
    steps = compute_steps_for_sliding_window(image.shape[1:], patch, 0.5)
    with torch.inference_mode():
        for x in steps[0]:
            for y in steps[1]:
                for z in steps[2]:
                    place = (slice(x, x + patch[0]), slice(y, y + patch[1]), slice(z, z + patch[2]))
                    logits[(slice(None), *place)] += predictor.network(image[(slice(None), *place)][None])[0] * gaussian
                    weights[place] += gaussian
    predictor.use_mirroring = False
    expected = predictor.predict_sliding_window_return_logits(image).float()
    differences = (logits / weights - expected).abs()
    assert (differences < 2e-2).float().mean() > 0.99  # at the rims the tool's weights are in half precision


def test_a_challenge_container_reads_predicts_and_writes_by_itself(model, images, tmp_path):
    import SimpleITK as sitk

    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, use_folds=None)
    image, properties = SimpleITKIO().read_images([str(images / "volume_0000.nii.gz")])
    segmentation, probabilities = predictor.predict_single_npy_array(image, properties, None, None, True)
    SimpleITKIO().write_seg(segmentation, str(tmp_path / "result.mha"), properties)
    assert sitk.ReadImage(str(tmp_path / "result.mha")).GetSize() == tuple(image.shape[:0:-1])
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)


def test_a_microscopy_tool_predicts_flat_images_from_arrays(tmp_path):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    folder = write_model(
        tmp_path / "flat",
        patch_size=(16, 24),
        spacing=(1.0, 1.0),
        file_ending=".png",
        reader="NaturalImage2DIO",
        mirroring_axes=(0, 1),
    )
    predictor = nnUNetPredictor(
        tile_step_size=0.5,
        use_gaussian=True,
        use_mirroring=True,
        device=torch.device("cpu"),
        perform_everything_on_device=False,
        verbose=False,
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(str(folder), use_folds=[0], checkpoint_name="checkpoint_final.pth")
    image = np.random.default_rng(0).integers(0, 255, (30, 40)).astype(np.float32)
    prediction = predictor.predict_single_npy_array(image[None, None], {"spacing": (999, 1, 1)}, None, None, False)
    assert prediction.squeeze().shape == (30, 40)


def test_a_service_preprocesses_with_the_adapter_and_exports_itself(model):
    from nnunetv2.inference.data_iterators import PreprocessAdapterFromNpy
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, [0])
    image = np.random.default_rng(0).normal(size=(1, 9, 20, 21)).astype(np.float32)
    ppa = PreprocessAdapterFromNpy(
        [image],
        [None],
        [{"spacing": [2.0, 1.5, 1.5]}],
        [None],
        predictor.plans_manager,
        predictor.dataset_json,
        predictor.configuration_manager,
        num_threads_in_multithreaded=1,
        verbose=False,
    )
    dct = next(ppa)
    predicted_logits = predictor.predict_logits_from_preprocessed_data(dct["data"]).cpu()
    segmentation = convert_predicted_logits_to_segmentation_with_correct_shape(
        predicted_logits,
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.label_manager,
        dct["data_properties"],
        return_probabilities=False,
    )
    assert segmentation.shape == (9, 20, 21)


def test_a_subclass_predicts_with_dropout_several_times(make_predictor):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    class MonteCarloPredictor(nnUNetPredictor):
        passes = 3

        def _internal_maybe_mirror_and_predict(self, x: torch.Tensor) -> torch.Tensor:
            prediction = self.network(x)
            for _ in range(self.passes - 1):
                prediction += self.network(x)
            return prediction / self.passes

        def predict_logits_from_preprocessed_data(self, data):
            self.seen = tuple(data.shape)
            return super().predict_logits_from_preprocessed_data(data)

    predictor = make_predictor(predictor_class=MonteCarloPredictor)
    image = torch.randn(1, 18, 20, 22)
    plain = make_predictor(options={"use_mirroring": False}).predict_logits_from_preprocessed_data(image)
    torch.testing.assert_close(predictor.predict_logits_from_preprocessed_data(image), plain, atol=5e-3, rtol=5e-3)
    assert predictor.seen == (1, 18, 20, 22)


def test_an_exported_network_takes_the_place_of_ours(model, images):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    class Session(torch.nn.Module):  # stands for a runtime that takes one tile of a fixed shape
        def __init__(self, network):
            super().__init__()
            self.run = network.forward

        def forward(self, x):
            assert x.shape == (1, 1, 16, 12, 20)
            return self.run(x)

        def load_state_dict(self, *args, **kwargs):
            return None

    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(model, [0])
    expected = predictor.predict_from_files(str(images), None)[0]
    with torch.no_grad():
        predictor.network = Session(predictor.network.eval())
    predictor.allowed_mirroring_axes = None
    assert np.mean(predictor.predict_from_files(str(images), None)[0] == expected) > 0.999


def test_a_wrapper_fills_the_command_line(roots, images, tmp_path, monkeypatch):
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point

    write_model(roots["nnUNet_results"] / "Dataset998_Tiny" / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    monkeypatch.setenv("nnUNet_compile", "F")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "nnUNetv2_predict",
            "-i",
            str(images),
            "-o",
            str(tmp_path / "out"),
            "-d",
            "998",
            "-c",
            "3d_fullres",
            "-f",
            "0",
            "-device",
            "cpu",
            "--disable_tta",
        ],
    )
    predict_entry_point()
    assert (tmp_path / "out" / "volume.nii.gz").exists()


def test_custom_trainers_are_injected_by_assignment(tmp_path, monkeypatch):
    import nnunetv2.inference.predict_from_raw_data as nnunet_predict
    import nnunetv2.utilities.find_objects as find_objects
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class nnUNetTrainerOfTheirs(nnUNetTrainer):
        pass

    original = find_objects.recursive_find_trainer_class_by_name

    def find(trainer_name):
        return {"nnUNetTrainerOfTheirs": nnUNetTrainerOfTheirs}.get(trainer_name) or original(trainer_name)

    monkeypatch.setattr(find_objects, "recursive_find_trainer_class_by_name", find)
    monkeypatch.setattr(nnunet_predict, "recursive_find_trainer_class_by_name", find, raising=False)
    predictor = nnunet_predict.nnUNetPredictor(device=CPU)
    predictor.initialize_from_trained_model_folder(
        str(write_model(tmp_path / "model", trainer="nnUNetTrainerOfTheirs")), use_folds=[0]
    )
    assert predictor.trainer_name == "nnUNetTrainerOfTheirs"


def test_attributes_are_assigned_by_hand_instead_of_initialising(model):
    from batchgenerators.utilities.file_and_folder_operations import join, load_json

    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    dataset_json, plans = load_json(join(model, "dataset.json")), load_json(join(model, "plans.json"))
    plans_manager = PlansManager(plans)
    checkpoint = torch.load(join(model, "fold_0", "checkpoint_final.pth"), map_location=CPU, weights_only=False)
    configuration_manager = plans_manager.get_configuration(checkpoint["init_args"]["configuration"])
    label_manager = plans_manager.get_label_manager(dataset_json)
    network = nnUNetTrainer.build_network_architecture(
        plans_manager,
        configuration_manager,
        determine_num_input_channels(plans_manager, configuration_manager, dataset_json),
        label_manager.num_segmentation_heads,
        enable_deep_supervision=False,
    )
    network.load_state_dict(checkpoint["network_weights"])

    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.plans_manager = plans_manager
    predictor.configuration_manager = configuration_manager
    predictor.list_of_parameters = [checkpoint["network_weights"]]
    predictor.network = network
    predictor.dataset_json = dataset_json
    predictor.trainer_name = checkpoint["trainer_name"]
    predictor.allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
    predictor.label_manager = label_manager
    image = np.random.default_rng(0).normal(size=(1, 16, 20, 24)).astype(np.float32)
    ret = predictor.predict_single_npy_array(image, {"spacing": [2.0, 1.0, 1.0]}, None, None, False)
    assert ret.shape == (16, 20, 24)


@pytest.mark.slow
def test_a_viewer_runs_the_executable_on_one_volume(images, tmp_path, model):
    executable = Path(sys.executable).parent / "nnUNetv2_predict_from_modelfolder"
    if not executable.exists():
        pytest.skip("the package is not installed with its commands")
    subprocess.run(
        [
            str(executable),
            "-i",
            str(images),
            "-o",
            str(tmp_path / "out"),
            "-m",
            model,
            "-f",
            "0",
            "-npp",
            "1",
            "-nps",
            "1",
            "-step_size",
            "0.5",
            "-device",
            "cpu",
            "-chk",
            "checkpoint_final.pth",
            "--disable_tta",
        ],
        check=True,
        capture_output=True,
    )
    assert next((tmp_path / "out").rglob("*.nii*")).name == "volume.nii.gz"


def test_an_uncertainty_map_comes_from_logits_and_a_plain_softmax(model):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.helpers import softmax_helper_dim0

    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, [0])
    iterator = predictor.get_data_iterator_from_raw_npy_data(
        [np.random.default_rng(0).normal(size=(1, 16, 12, 20)).astype(np.float32)],
        None,
        [{"spacing": [2, 1, 1]}],
        None,
        1,
    )
    for item in iterator:
        probabilities = softmax_helper_dim0(predictor.predict_logits_from_preprocessed_data(item["data"]).float())
    entropy = -(probabilities * probabilities.clamp(min=1e-8).log()).sum(0)
    assert entropy.shape == (16, 12, 20) and float(entropy.max()) <= np.log(3) + 1e-4


@pytest.mark.slow
def test_an_older_loop_exports_in_a_pool_of_its_own(model, images, tmp_path):
    import multiprocessing

    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.file_path_utilities import check_workers_alive_and_busy

    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, [0])
    lists, outputs, previous = predictor._manage_input_and_output_lists(
        str(images), str(tmp_path), None, True, 0, 1, False
    )
    with multiprocessing.get_context("spawn").Pool(1) as export_pool:
        worker_list, results = list(export_pool._pool), []
        for preprocessed in predictor._internal_get_data_iterator_from_lists_of_filenames(lists, previous, outputs, 1):
            prediction = predictor.predict_logits_from_preprocessed_data(preprocessed["data"]).cpu().numpy()
            assert not check_workers_alive_and_busy(export_pool, worker_list, results, allowed_num_queued=2)
            results.append(
                export_pool.starmap_async(
                    export_prediction_from_logits,
                    (
                        (
                            prediction,
                            preprocessed["data_properties"],
                            predictor.configuration_manager,
                            predictor.plans_manager,
                            predictor.dataset_json,
                            preprocessed["ofile"],
                            False,
                        ),
                    ),
                )
            )
        assert [result.get(timeout=PATIENCE_S)[0] for result in results] == [None]
    assert (tmp_path / "volume.nii.gz").exists()
