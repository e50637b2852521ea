"""Tests of the predictor: files in, files out, arrays in, arrays out."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import write_model

from nnunetv2.inference import predict_from_raw_data as public
from nnunetv2.inference.forward_budget import ForwardBudget
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.plans.label_manager import LabelManager

MODEL_FILES = ["dataset.json", "plans.json", "predict_from_raw_data_args.json"]


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def read(path):
    import SimpleITK as sitk

    return sitk.ReadImage(str(path))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_predictions_have_the_geometry_of_their_images(make_predictor, write_images, tmp_path, workers):
    images = write_images()
    results = make_predictor().predict_from_files(
        str(images),
        str(tmp_path / "out"),
        num_processes_preprocessing=workers,
        num_processes_segmentation_export=workers,
    )
    assert results == [None, None]
    assert names_in(tmp_path / "out") == [MODEL_FILES[0], "liver_1.nii.gz", "liver_2.nii.gz", *MODEL_FILES[1:]]
    for case in ("liver_1", "liver_2"):
        image, labels = read(images / f"{case}_0000.nii.gz"), read(tmp_path / "out" / f"{case}.nii.gz")
        assert labels.GetSize() == image.GetSize()
        for what in ("Spacing", "Origin", "Direction"):
            np.testing.assert_allclose(getattr(labels, f"Get{what}")(), getattr(image, f"Get{what}")(), atol=1e-6)


@pytest.mark.slow
def test_probabilities_come_with_properties_and_arguments_are_noted(make_predictor, write_images, tmp_path):
    predictor = make_predictor(folds=(0, 1), use_folds=None)
    predictor.predict_from_files(write_images(["a"]), tmp_path / "out", save_probabilities=True)
    assert names_in(tmp_path / "out") == ["a.nii.gz", "a.npz", "a.pkl", *MODEL_FILES]
    arguments = json.loads((tmp_path / "out" / "predict_from_raw_data_args.json").read_text())
    assert list(arguments) == [
        "folder_with_segs_from_prev_stage",
        "list_of_lists_or_source_folder",
        "num_parts",
        "num_processes_preprocessing",
        "num_processes_segmentation_export",
        "output_folder_or_list_of_truncated_output_files",
        "overwrite",
        "part_id",
        "save_probabilities",
    ]
    assert json.loads((tmp_path / "out" / "plans.json").read_text()) == predictor.plans_manager.plans


def test_results_are_returned_where_no_output_is_named(make_predictor, write_images):
    results = make_predictor().predict_from_files(str(write_images()), None)
    assert [result.shape for result in results] == [(14, 18, 22)] * 2
    assert all(result.dtype == np.uint8 for result in results)


def test_sequential_prediction_returns_an_empty_list_for_files(make_predictor, write_images, tmp_path):
    predictor, images = make_predictor(), write_images()
    assert predictor.predict_from_files_sequential(str(images), str(tmp_path / "out")) == []
    assert len(json.loads((tmp_path / "out" / "predict_from_raw_data_args.json").read_text())) == 5
    sequential = predictor.predict_from_files_sequential(str(images), None, save_probabilities=True)
    parallel = predictor.predict_from_files(str(images), None, save_probabilities=True)
    for (mine, my_probabilities), (theirs, their_probabilities) in zip(sequential, parallel):
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(my_probabilities, their_probabilities)


def test_nothing_left_to_do_returns_none(make_predictor, write_images, tmp_path):
    predictor, images = make_predictor(), str(write_images())
    predictor.predict_from_files(images, str(tmp_path / "out"))
    assert predictor.predict_from_files(images, str(tmp_path / "out"), overwrite=False) is None
    assert predictor.predict_from_files_sequential(images, str(tmp_path / "out"), overwrite=False) is None


def test_lists_of_files_go_to_the_outputs_named_for_them(make_predictor, write_images, tmp_path):
    images = write_images(["x", "y"])
    make_predictor().predict_from_files(
        [[images / "y_0000.nii.gz"], [str(images / "x_0000.nii.gz")]],
        [tmp_path / "out" / "first", str(tmp_path / "out" / "second")],
    )
    assert {"first.nii.gz", "second.nii.gz", *MODEL_FILES} == set(names_in(tmp_path / "out"))
    assert read(tmp_path / "out" / "first.nii.gz").GetOrigin()[2] == 104  # y is the second image


def test_parts_share_the_cases(make_predictor, write_images, tmp_path):
    predictor, images = make_predictor(), str(write_images(["a", "b", "c"]))
    assert predictor.predict_from_files(images, str(tmp_path / "out"), num_parts=2, part_id=1) == [None]
    assert predictor.predict_from_files(images, str(tmp_path / "out"), num_parts=2, part_id=0) == [None] * 2
    assert {"a.nii.gz", "b.nii.gz", "c.nii.gz"} < set(names_in(tmp_path / "out"))
    with pytest.raises(ValueError, match="part 2 of 2"):
        predictor.predict_from_files(images, str(tmp_path / "out"), num_parts=2, part_id=2)


def test_a_damaged_image_is_named(make_predictor, write_images, tmp_path):
    images = write_images()
    (images / "liver_2_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(RuntimeError, match=r"^1 of 2 cases .*: liver_2: "):
        make_predictor().predict_from_files(str(images), str(tmp_path / "out"))
    assert (tmp_path / "out" / "liver_1.nii.gz").exists()  # what was predicted before is kept


def test_a_failed_export_does_not_stop_the_others(make_predictor, write_images, tmp_path):
    predictor, out = make_predictor(), tmp_path / "out"
    (out / "liver_1.nii.gz").mkdir(parents=True)  # cannot be replaced by a file
    with pytest.raises(RuntimeError, match="1 of 2 cases could not be predicted: liver_1"):
        predictor.predict_from_files(str(write_images()), str(out))
    assert (out / "liver_2.nii.gz").is_file()


@pytest.mark.parametrize("changes", [{}, {"transpose_forward": (2, 0, 1)}, {"patch_size": (12, 16), "spacing": (1, 1)}])
def test_arrays_are_predicted_as_files_are(make_predictor, write_images, changes):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    changes = {**changes, "mirroring_axes": (0, 1)}
    images = write_images(["a"])
    predictor = make_predictor(**changes)
    image, properties = SimpleITKIO().read_images([str(images / "a_0000.nii.gz")])
    before = json.dumps({key: str(value) for key, value in properties.items()})
    single = predictor.predict_single_npy_array(image, properties)
    assert json.dumps({key: str(value) for key, value in properties.items()}) == before
    assert single.shape == image.shape[1:]
    np.testing.assert_array_equal(single, predictor.predict_from_files([[str(images / "a_0000.nii.gz")]], None)[0])
    listed = predictor.predict_from_list_of_npy_arrays([image, image], None, [properties] * 2, None, 2)
    assert all(np.array_equal(single, labels) for labels in listed)
    alone = predictor.predict_from_list_of_npy_arrays(image, None, properties, None, save_probabilities=True)
    assert alone[0][1].shape == (3, *single.shape)


def test_an_array_is_written_where_asked(make_predictor, write_images, tmp_path):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    image, properties = SimpleITKIO().read_images([str(write_images(["a"]) / "a_0000.nii.gz")])
    assert make_predictor().predict_single_npy_array(image, properties, None, str(tmp_path / "case"), True) is None
    assert {"case.nii.gz", "case.npz", "case.pkl"} < set(names_in(tmp_path))


def test_preprocessed_data_may_come_from_a_file(make_predictor, write_images, tmp_path):
    predictor, images = make_predictor(), write_images(["a"])
    files = [[str(images / "a_0000.nii.gz")]]
    (item,) = predictor._internal_get_data_iterator_from_lists_of_filenames(files, [None], None, 1)
    np.save(tmp_path / "data.npy", item["data"].numpy())
    (result,) = predictor.predict_from_data_iterator([{**item, "data": str(tmp_path / "data.npy")}])
    assert not (tmp_path / "data.npy").exists()
    np.testing.assert_array_equal(result, predictor.predict_from_files(files, None)[0])


@pytest.mark.parametrize("shape", [(5, 6, 7), (16, 12, 20), (21, 13, 33)])
def test_logits_are_half_precision_in_main_memory_and_have_the_shape_of_the_image(make_predictor, shape):
    predictor = make_predictor()
    logits = predictor.predict_logits_from_preprocessed_data(torch.randn(1, *shape))
    assert logits.dtype == torch.float16
    assert logits.device.type == "cpu"
    assert logits.shape == (3, *shape)


def test_folds_are_averaged(make_predictor):
    image = torch.randn(1, 16, 14, 21)
    both = make_predictor(folds=(0, 1), use_folds=[0, 1]).predict_logits_from_preprocessed_data(image).float()
    single = [make_predictor(use_folds=fold).predict_logits_from_preprocessed_data(image).float() for fold in ("0", 1)]
    torch.testing.assert_close(both, (single[0] + single[1]) / 2, atol=2e-3, rtol=2e-3)


def test_batches_of_tiles_and_copies_change_nothing(make_predictor):
    predictor, image = make_predictor(), torch.randn(1, 20, 18, 31)
    batched = predictor.predict_sliding_window_return_logits(image)
    predictor._budget.voxels = 0
    torch.testing.assert_close(predictor.predict_sliding_window_return_logits(image), batched, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("perform_everything_on_device", [True, False])
def test_a_gpu_predicts_what_a_cpu_predicts(make_predictor, perform_everything_on_device):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    image = torch.randn(1, 40, 38, 51)
    expected = make_predictor().predict_logits_from_preprocessed_data(image)
    predictor = make_predictor(
        options={"device": torch.device("cuda"), "perform_everything_on_device": perform_everything_on_device}
    )
    logits = predictor.predict_logits_from_preprocessed_data(image)
    assert logits.dtype == torch.float16 and logits.device.type == "cpu"
    torch.testing.assert_close(logits, expected, atol=2e-2, rtol=2e-2)


def test_without_gaussian_and_mirroring_a_single_tile_is_the_networks_answer(make_predictor):
    predictor = make_predictor(options={"use_gaussian": False, "use_mirroring": False})
    image = torch.randn(1, 16, 12, 20)
    logits = predictor.predict_logits_from_preprocessed_data(image)
    with torch.inference_mode():
        torch.testing.assert_close(logits.float(), predictor.network(image[None])[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("axes", [None, ()])
def test_no_axes_mean_no_mirroring(make_predictor, axes):
    predictor = make_predictor(mirroring_axes=axes)
    tile = torch.randn(1, 1, 16, 12, 20)
    with torch.inference_mode():
        torch.testing.assert_close(predictor._internal_maybe_mirror_and_predict(tile), predictor.network(tile))


def test_mirroring_along_a_missing_axis_is_refused(make_predictor):
    predictor = make_predictor(patch_size=(16, 16), spacing=(1.0, 1.0), mirroring_axes=(0, 1, 2))
    with pytest.raises(AssertionError, match="cannot mirror"):
        predictor.predict_logits_from_preprocessed_data(torch.randn(1, 3, 16, 16))


def test_an_overridden_tile_method_sees_one_tile_at_a_time(make_predictor):
    class Own(nnUNetPredictor):
        def _internal_maybe_mirror_and_predict(self, x):
            assert x.shape == (1, 1, 16, 12, 20)
            return torch.cat((x, -x, 2 * x), dim=1)

    image = torch.randn(1, 20, 18, 31)
    logits = make_predictor(predictor_class=Own).predict_logits_from_preprocessed_data(image)
    torch.testing.assert_close(logits.float(), torch.cat((image, -image, 2 * image)), atol=5e-3, rtol=2e-3)


def test_a_network_put_in_the_place_of_ours_gets_batches_of_one(make_predictor):
    class Exported(torch.nn.Module):
        def forward(self, x):
            assert len(x) == 1
            return x.expand(-1, 3, -1, -1, -1)

    predictor, image = make_predictor(), torch.randn(1, 20, 18, 31)
    predictor.network = Exported()
    logits = predictor.predict_sliding_window_return_logits(image)
    torch.testing.assert_close(logits[0].float(), image[0], atol=5e-3, rtol=2e-3)


def test_a_predictor_that_changes_its_device_or_model_gets_batches_of_another_size(make_predictor, monkeypatch):
    made = []

    def budget_for(device, num_classes):
        made.append((device.type, num_classes))
        return ForwardBudget(0)

    monkeypatch.setattr("nnunetv2.inference.predictor.budget_for", budget_for)
    predictor = make_predictor()
    for device in ("cpu", "cpu", "meta"):
        predictor.device = torch.device(device)
        predictor._current_budget()
    predictor.label_manager = LabelManager({"background": 0, "liver": 1}, None)
    predictor._current_budget()
    assert made == [("cpu", 3), ("meta", 3), ("meta", 2)]


def test_the_patch_size_may_be_edited(make_predictor):
    predictor = make_predictor()
    predictor.configuration_manager.configuration["patch_size"] = [8, 8, 8]
    assert predictor._internal_get_sliding_window_slicers((8, 8, 12))[1] == (
        slice(None),
        slice(0, 8),
        slice(0, 8),
        slice(4, 12),
    )


def test_a_trainer_lookup_put_in_the_place_of_ours_is_used(make_predictor, monkeypatch):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    asked = []
    monkeypatch.setattr(
        public, "recursive_find_trainer_class_by_name", lambda name: asked.append(name) or nnUNetTrainer
    )
    make_predictor(trainer="nnUNetTrainerOfSomebodyElse")
    assert asked == ["nnUNetTrainerOfSomebodyElse"]


def test_a_trainer_class_may_be_handed_in(tmp_path):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    predictor = nnUNetPredictor(device=torch.device("cpu"))
    folder = write_model(tmp_path / "model", trainer="Unknown", folds=("all",))
    predictor.initialize_from_trained_model_folder(str(folder), "all", trainer_class=nnUNetTrainer)
    assert predictor.trainer_name == "Unknown"


def test_trainers_of_the_older_kind_are_built_with_a_warning(tmp_path):
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    class Old:
        @staticmethod
        def build_network_architecture(
            architecture_class_name,
            arch_init_kwargs,
            arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision=True,
        ):
            return get_network_from_plans(
                architecture_class_name,
                arch_init_kwargs,
                arch_init_kwargs_req_import,
                num_input_channels,
                num_output_channels,
                True,
                enable_deep_supervision,
            )

    predictor = nnUNetPredictor(device=torch.device("cpu"))
    with pytest.warns(DeprecationWarning, match="build_network_architecture"):
        predictor.initialize_from_trained_model_folder(str(write_model(tmp_path / "model")), (0,), trainer_class=Old)


def test_exports_put_in_the_place_of_ours_are_used(make_predictor, write_images, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(public, "export_prediction_from_logits", lambda *arguments: seen.append(arguments))
    make_predictor().predict_from_files(str(write_images(["a"])), str(tmp_path / "out"))
    ((logits, properties, _, _, dataset_json, output, save_probabilities),) = seen
    assert logits.shape[0] == 3
    assert dataset_json["file_ending"] == ".nii.gz"
    assert (output, save_probabilities) == (str(tmp_path / "out" / "a"), False)
    assert "bbox_used_for_cropping" in properties


def test_folds_are_found_by_their_checkpoint(tmp_path):
    folder = write_model(tmp_path / "model", folds=(0, 3, 10, "all"))
    (folder / "fold_3" / "checkpoint_final.pth").rename(folder / "fold_3" / "checkpoint_best.pth")
    assert nnUNetPredictor.auto_detect_available_folds(str(folder), "checkpoint_final.pth") == [0, 10]


@pytest.mark.parametrize(("folds", "message"), [([0, 4], "fold_4.*in .*: 0; name those"), ([], "no fold in")])
def test_missing_folds_are_named(tmp_path, folds, message):
    folder = write_model(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=message):
        nnUNetPredictor(device=torch.device("cpu")).initialize_from_trained_model_folder(str(folder), folds)


def test_a_folder_without_plans_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no dataset.json"):
        nnUNetPredictor(device=torch.device("cpu")).initialize_from_trained_model_folder(str(tmp_path), (0,))


def test_a_cascade_needs_its_previous_stage(make_predictor, write_images, tmp_path):
    predictor = make_predictor(previous_stage="3d_lowres")
    images = write_images()
    with pytest.raises(AssertionError, match="3d_lowres"):
        predictor.predict_from_files(str(images), str(tmp_path / "out"))
    previous = tmp_path / "previous"
    previous.mkdir()
    with pytest.raises(FileNotFoundError, match="2 of 2 cases have no prediction of the previous stage"):
        predictor.predict_from_files(str(images), str(tmp_path / "out"), folder_with_segs_from_prev_stage=str(previous))
    for name in ("liver_1", "liver_2"):
        shutil.copy(images / f"{name}_0000.nii.gz", previous / f"{name}.nii.gz")
    iterator = predictor._internal_get_data_iterator_from_lists_of_filenames(
        [[str(images / "liver_1_0000.nii.gz")]], [str(previous / "liver_1.nii.gz")], None, 1
    )
    assert next(iterator)["data"].shape[0] == 3  # one image channel, two foreground labels
    results = predictor.predict_from_files(str(images), None, folder_with_segs_from_prev_stage=previous)
    assert len(results) == 2


def test_a_previous_stage_for_a_model_without_one_is_refused(make_predictor, write_images, tmp_path):
    with pytest.raises(ValueError, match="no previous stage"):
        make_predictor().predict_from_files(str(write_images()), None, folder_with_segs_from_prev_stage=str(tmp_path))


def test_a_predictor_without_parameters_says_so(make_predictor):
    predictor = make_predictor()
    predictor.manual_initialization(
        predictor.network,
        predictor.plans_manager,
        predictor.configuration_manager,
        None,
        predictor.dataset_json,
        "nnUNetTrainer",
        (0,),
    )
    assert predictor.predict_sliding_window_return_logits(torch.randn(1, 9, 9, 9)).shape == (3, 9, 9, 9)
    with pytest.raises(RuntimeError, match="no parameters"):
        predictor.predict_logits_from_preprocessed_data(torch.randn(1, 9, 9, 9))


def test_images_without_channel_axis_are_refused(make_predictor):
    with pytest.raises(ValueError, match=r"\(c, x, y, z\)"):
        make_predictor().predict_sliding_window_return_logits(torch.randn(9, 9, 9))


def test_the_constructor_has_the_parameters_programs_look_for():
    parameters = inspect.signature(nnUNetPredictor).parameters
    assert list(parameters) == [
        "tile_step_size",
        "use_gaussian",
        "use_mirroring",
        "perform_everything_on_device",
        "device",
        "verbose",
        "verbose_preprocessing",
        "allow_tqdm",
    ]
    assert "perform_everything_on_gpu" not in parameters
    assert parameters["device"].default == torch.device("cuda")
    assert not nnUNetPredictor(device=torch.device("cpu")).perform_everything_on_device
    assert nnUNetPredictor(perform_everything_on_device=False).plans_manager is None


@pytest.mark.parametrize(
    "method",
    [
        "predict_from_files",
        "predict_from_data_iterator",
        "predict_single_npy_array",
        "predict_from_list_of_npy_arrays",
        "predict_from_files_sequential",
    ],
)
def test_cropped_resampling_is_offered_last(method):
    assert list(inspect.signature(getattr(nnUNetPredictor, method)).parameters)[-1] == "use_cropped_logits_resampling"


def test_cropped_resampling_reaches_the_export(make_predictor, write_images):
    assert len(make_predictor().predict_from_files(str(write_images()), None, use_cropped_logits_resampling=True)) == 2


@pytest.mark.parametrize("name", sorted(public._ORIGINS))
def test_every_promised_name_is_there(name):
    assert getattr(public, name) is not None
    assert name in dir(public)


def test_unknown_names_are_unknown():
    with pytest.raises(AttributeError, match="predict_from_raw"):
        public.predict_from_raw  # noqa: B018


def test_a_trainer_that_is_not_installed_is_replaced_with_a_warning(tmp_path, caplog):
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(write_model(tmp_path / "model", trainer="TrainerOfNobody"), (0,))
    assert "TrainerOfNobody" in caplog.text
    assert predictor.trainer_name == "TrainerOfNobody"


def change_checkpoint(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


def test_a_missing_trainer_that_builds_the_network_is_never_replaced(tmp_path):
    folder = write_model(tmp_path / "model", trainer="TrainerOfNobody")
    change_checkpoint(
        folder / "fold_0" / "checkpoint_final.pth",
        lambda checkpoint: checkpoint.update(network_trainer="TrainerOfNobody"),
    )
    with pytest.raises(RuntimeError, match="Prediction needs the code of TrainerOfNobody, which builds the network"):
        nnUNetPredictor(device=torch.device("cpu")).initialize_from_trained_model_folder(folder, (0,))


def test_weights_that_fit_no_other_network_name_the_trainer_that_is_missing(tmp_path):
    folder = write_model(tmp_path / "model", trainer="TrainerOfNobody")
    change_checkpoint(
        folder / "fold_0" / "checkpoint_final.pth", lambda checkpoint: checkpoint["network_weights"].popitem()
    )
    with pytest.raises(RuntimeError, match="does not fit .* needs the code of TrainerOfNobody"):
        nnUNetPredictor(device=torch.device("cpu")).initialize_from_trained_model_folder(folder, (0,))


def test_an_iterator_may_hand_out_the_same_items_twice(make_predictor, write_images):
    predictor = make_predictor()
    files = [[str(write_images(["a"]) / "a_0000.nii.gz")]]
    items = list(predictor._internal_get_data_iterator_from_lists_of_filenames(files, [None], None, 1))
    first, second = (predictor.predict_from_data_iterator(items)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("what_fails", ["network", "tiles"])
def test_a_device_that_is_too_small_leaves_the_case_to_the_cpu(make_predictor, monkeypatch, caplog, what_fails):
    """The device is one in name only; whatever reaches it exceeds its memory."""
    image = torch.randn(1, 20, 14, 24)
    expected = make_predictor().predict_logits_from_preprocessed_data(image)
    predictor = make_predictor(options={"device": torch.device("meta")})
    network = predictor.network

    def move(device):
        if what_fails == "network" and device.type == "meta":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return network

    def refuse(module, inputs):
        if inputs[0].device.type == "meta":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(network, "to", move)
    network.register_forward_pre_hook(refuse)
    logits = predictor.predict_logits_from_preprocessed_data(image)
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=2e-3)
    assert len([message for message in caplog.messages if "out of memory" in message]) == 1
    assert "on the CPU, which is slower" in caplog.text


def test_an_error_of_the_network_is_no_reason_to_try_again(make_predictor):
    predictor, calls = make_predictor(), []

    def fail(module, inputs):
        calls.append(len(inputs))
        raise RuntimeError("shapes do not fit")

    predictor.network.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        predictor.predict_logits_from_preprocessed_data(torch.randn(1, 20, 14, 24))
    assert len(calls) == 1


@pytest.mark.parametrize("sequential", [False, True])
def test_an_output_that_is_named_with_its_ending_gets_no_second_one(make_predictor, write_images, tmp_path, sequential):
    images, out, predictor = write_images(["a", "b"]), tmp_path / "out", make_predictor()
    predict = predictor.predict_from_files_sequential if sequential else predictor.predict_from_files
    files = [[str(images / f"{name}_0000.nii.gz")] for name in "ab"]
    predict(files, [str(out / "a_bet.nii.gz"), str(out / "b.nii")])  # b.nii is the stem of b.nii.gz
    assert {"a_bet.nii.gz", "b.nii.gz"} == set(names_in(out)) - set(MODEL_FILES)
    assert predict(files, [str(out / "a_bet.nii.gz"), str(out / "b.nii")], overwrite=False) is None
    with pytest.raises(ValueError, match="two cases would be written to"):
        predict(files, [str(out / "a"), str(out / "a.nii.gz")])


@pytest.mark.parametrize("sequential", [False, True])
def test_probabilities_keep_the_name_that_a_program_gave_as_those_of_the_release(
    make_predictor, write_images, tmp_path, sequential
):
    images, out, predictor = write_images(["a", "b", "c"]), tmp_path / "out", make_predictor()
    predict = predictor.predict_from_files_sequential if sequential else predictor.predict_from_files
    files = [[str(images / f"{name}_0000.nii.gz")] for name in "abc"]
    outputs = [str(out / "a.nii.gz"), str(out / "b.nii"), str(out / "c")]
    predict(files, outputs, save_probabilities=True)
    labels = {"a.nii.gz", "b.nii.gz", "c.nii.gz"}
    beside = {f"{name}{ending}" for name in ("a.nii.gz", "b.nii", "c") for ending in (".npz", ".pkl")}
    assert set(names_in(out)) - set(MODEL_FILES) == labels | beside
    assert predict(files, outputs, save_probabilities=True, overwrite=False) is None
    (out / "a.nii.gz.npz").unlink()
    predict(files, outputs, save_probabilities=True, overwrite=False)
    assert set(names_in(out)) - set(MODEL_FILES) == labels | beside


def test_arrays_go_to_files_that_are_named_with_their_ending(make_predictor, write_images, tmp_path):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    image, properties = SimpleITKIO().read_images([str(write_images(["a"]) / "a_0000.nii.gz")])
    predictor, out = make_predictor(), tmp_path / "out"
    out.mkdir()
    predictor.predict_single_npy_array(image, properties, None, str(out / "one.nii.gz"))
    predictor.predict_from_list_of_npy_arrays(
        [image] * 2, None, [properties] * 2, [str(out / "two.nii.gz"), str(out / "three")], 1
    )
    assert names_in(out) == ["one.nii.gz", "three.nii.gz", "two.nii.gz"]


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_a_case_with_an_ending_in_its_name_keeps_it(make_predictor, write_images, tmp_path, reader):
    names = ["scan", "scan.nii.gz", "scan.nii", "scan.hdr", "scan.img", "scan.nia", "1.2.840"]
    predictor, images, out = make_predictor(reader=reader), str(write_images(names)), tmp_path / "out"
    predictor.predict_from_files(images, str(out), save_probabilities=True)
    assert {path.name for path in out.glob("*.nii.gz")} == {f"{name}.nii.gz" for name in names}
    assert {path.name for path in out.glob("*.npz")} == {f"{name}.npz" for name in names}
    assert predictor.predict_from_files(images, str(out), save_probabilities=True, overwrite=False) is None


def test_a_link_to_nothing_is_a_case_that_fails(make_predictor, write_images, tmp_path):
    images = write_images(["a"])
    (images / "b_0000.nii.gz").symlink_to(tmp_path / "nowhere" / "b_0000.nii.gz")
    with pytest.raises(RuntimeError, match=r"1 of 2 cases .*: b: .*is a link to .*nowhere.*which does not exist"):
        make_predictor().predict_from_files(str(images), str(tmp_path / "out"))
    assert (tmp_path / "out" / "a.nii.gz").is_file()


@pytest.mark.parametrize("step", [0, 1.5, -0.5, float("nan")])
def test_a_step_that_leaves_gaps_is_refused_at_once(step):
    with pytest.raises(ValueError, match="tile_step_size must be above 0 and at most 1"):
        nnUNetPredictor(tile_step_size=step, device=torch.device("cpu"))


def test_properties_of_another_reader_are_refused(make_predictor, write_images, tmp_path, monkeypatch):
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO

    image, properties = NibabelIO().read_images([str(write_images(["a"]) / "a_0000.nii.gz")])
    predictor = make_predictor()
    with pytest.raises(RuntimeError, match="1 of 1 cases .*not made by SimpleITKIO"):
        predictor.predict_from_list_of_npy_arrays(image, None, properties, str(tmp_path / "a"), 1)
    monkeypatch.setattr(predictor, "predict_logits_from_preprocessed_data", lambda data: pytest.fail("predicted"))
    with pytest.raises(ValueError, match="not made by SimpleITKIO: they lack 'sitk_stuff'"):
        predictor.predict_single_npy_array(image, properties, None, str(tmp_path / "a"))
