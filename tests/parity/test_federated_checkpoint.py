"""The reference release predicts with a checkpoint that the coordinator wrote without torch."""

from __future__ import annotations

import json

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunetv2.federated.aggregation.matching import distinct_tensors
from nnunetv2.federated.coordinator.models.checkpoint_file import model_checkpoint, parameter_names, write_checkpoint
from nnunetv2.federated.protocol.document import TensorSpec, open_document, write_document
from nnunetv2.federated.protocol.messages import Aggregate

ARCHITECTURE = {
    "n_stages": 3,
    "features_per_stage": [4, 8, 8],
    "kernel_sizes": [[3, 3]] * 3,
    "strides": [[1, 1], [2, 2], [2, 2]],
    "n_conv_per_stage": [2] * 3,
    "n_conv_per_stage_decoder": [2] * 2,
    "conv_bias": True,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op_kwargs": None,
    "nonlin_kwargs": {"inplace": True},
}
CLASSES = {
    "conv_op": "torch.nn.modules.conv.Conv2d",
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
    "dropout_op": None,
    "nonlin": "torch.nn.LeakyReLU",
}
DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "tumour": 1},
    "file_ending": ".nii.gz",
    "numTraining": 4,
}


def make_plans():
    resampling = {}
    for kind in ("data", "seg", "probabilities"):
        resampling[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        resampling[f"resampling_fn_{kind}_kwargs"] = {
            "is_seg": kind == "seg",
            "order": 1,
            "order_z": 0,
            "force_separate_z": None,
        }
    return {
        "dataset_name": "Dataset999_Parity",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [8, 16, 16],
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "experiment_planner_used": "ExperimentPlanner",
        "foreground_intensity_properties_per_channel": {},
        "configurations": {
            "2d": {
                "data_identifier": "nnUNetPlans_2d",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": [16, 16],
                "median_image_size_in_voxels": [16.0, 16.0],
                "spacing": [1.0, 1.0],
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                **resampling,
                "architecture": {
                    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                    "arch_kwargs": {**ARCHITECTURE, **CLASSES},
                    "_kw_requires_import": list(CLASSES),
                },
                "batch_dice": True,
            }
        },
    }


def test_the_reference_predicts_with_our_checkpoint(reference, tmp_path):
    torch.manual_seed(0)
    network = PlainConvUNet(
        input_channels=1,
        num_classes=2,
        conv_op=nn.Conv2d,
        norm_op=nn.InstanceNorm2d,
        dropout_op=None,
        nonlin=nn.LeakyReLU,
        deep_supervision=False,
        **ARCHITECTURE,
    )
    distinct, aliases = distinct_tensors(network.state_dict())
    write_document(
        tmp_path / "aggregate",
        Aggregate(round=0, contributors={"A": 1.0}),
        {name: TensorSpec.of(tensor.numpy()) for name, tensor in distinct.items()},
        (tensor.numpy() for tensor in distinct.values()),
    )
    model = tmp_path / "nnUNetTrainer__nnUNetPlans__2d"
    (model / "fold_0").mkdir(parents=True)
    (model / "plans.json").write_text(json.dumps(make_plans()))
    (model / "dataset.json").write_text(json.dumps(DATASET))
    write_checkpoint(
        model / "fold_0" / "checkpoint_final.pth",
        open_document(tmp_path / "aggregate"),
        parameter_names(distinct, aliases, {name: name for name in distinct}),
        model_checkpoint(
            plans=make_plans(),
            configuration="2d",
            fold="0",
            dataset_json=DATASET,
            mirroring_axes=(0, 1),
            current_epoch=5,
        ),
    )
    image = np.random.default_rng(0).normal(size=(1, 1, 16, 16)).astype(np.float32)
    outputs, axes = reference.run(
        """
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
predictor = nnUNetPredictor(device=torch.device("cpu"))
predictor.initialize_from_trained_model_folder(value, (0,), "checkpoint_final.pth")
with torch.no_grad():
    outputs["logits"] = predictor.network.eval()(torch.from_numpy(inputs["image"])).numpy()
answer = predictor.allowed_mirroring_axes
""",
        value=str(model),
        image=image,
    )
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-4, atol=1e-5)
    assert axes == [0, 1]
