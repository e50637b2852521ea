"""Names that third parties import from the module of nnUNetTrainer.

They are looked up when asked for.

Such trainers start as a copy of one of its methods, together with the imports of the module it came from, or with a
star import of everything. All names of the release's module are here, those too that our module binds itself.
"""

from __future__ import annotations

from nnunetv2.utilities.legacy_names import origins

_TRANSFORMS = "batchgeneratorsv2.transforms"
_FILES = "batchgenerators.utilities.file_and_folder_operations"

TORCH_HAS_OLD_GRADSCALER = False
"""Whether torch is older than 2.3, which this package needs."""

ORIGINS = origins(
    {
        _FILES: "join load_json isfile isdir save_json maybe_mkdir_p subfiles subdirs",
        f"{_TRANSFORMS}.base.basic_transform": "BasicTransform",
        "batchgeneratorsv2.helpers.scalar_type": "RandomScalar",
        f"{_TRANSFORMS}.intensity.brightness": "MultiplicativeBrightnessTransform",
        f"{_TRANSFORMS}.intensity.contrast": "BGContrast ContrastTransform",
        f"{_TRANSFORMS}.intensity.gamma": "GammaTransform",
        f"{_TRANSFORMS}.intensity.gaussian_noise": "GaussianNoiseTransform",
        f"{_TRANSFORMS}.noise.gaussian_blur": "GaussianBlurTransform",
        f"{_TRANSFORMS}.nnunet.random_binary_operator": "ApplyRandomBinaryOperatorTransform",
        f"{_TRANSFORMS}.nnunet.remove_connected_components": "RemoveRandomConnectedComponentFromOneHotEncodingTransform",
        f"{_TRANSFORMS}.nnunet.seg_to_onehot": "MoveSegAsOneHotToDataTransform",
        f"{_TRANSFORMS}.spatial.low_resolution": "SimulateLowResolutionTransform",
        f"{_TRANSFORMS}.spatial.mirroring": "MirrorTransform",
        f"{_TRANSFORMS}.spatial.spatial": "SpatialTransform",
        f"{_TRANSFORMS}.utils.compose": "ComposeTransforms",
        f"{_TRANSFORMS}.utils.deep_supervision_downsampling": "DownsampleSegForDSTransform",
        f"{_TRANSFORMS}.utils.nnunet_masking": "MaskImageTransform",
        f"{_TRANSFORMS}.utils.pseudo2d": "Convert2DTo3DTransform Convert3DTo2DTransform",
        f"{_TRANSFORMS}.utils.random": "RandomTransform",
        f"{_TRANSFORMS}.utils.remove_label": "RemoveLabelTansform",
        f"{_TRANSFORMS}.utils.seg_to_regions": "ConvertSegmentationToRegionsTransform",
        "batchgenerators.dataloading.multi_threaded_augmenter": "MultiThreadedAugmenter",
        "batchgenerators.dataloading.nondet_multi_threaded_augmenter": "NonDetMultiThreadedAugmenter",
        "batchgenerators.dataloading.single_threaded_augmenter": "SingleThreadedAugmenter",
        "copy": "deepcopy",
        "datetime": "datetime",
        "time": "sleep time",
        "typing": "List Tuple Union",
        "torch": "autocast",
        "torch._dynamo": "OptimizedModule",
        "torch.amp": "GradScaler",
        "torch.cuda": "device_count",
        "nnunetv2.configuration": "ANISO_THRESHOLD default_num_processes",
        "nnunetv2.evaluation.evaluate_predictions": "compute_metrics_on_folder",
        "nnunetv2.inference.export_prediction": "export_prediction_from_logits resample_and_save",
        "nnunetv2.inference.predict_from_raw_data": "nnUNetPredictor",
        "nnunetv2.inference.sliding_window_prediction": "compute_gaussian",
        "nnunetv2.paths": "nnUNet_preprocessed nnUNet_results",
        "nnunetv2.training.data_augmentation.compute_initial_patch_size": "get_patch_size",
        "nnunetv2.training.dataloading.data_loader": "nnUNetDataLoader",
        "nnunetv2.training.dataloading.nnunet_dataset": "infer_dataset_class nnUNetDatasetNumpy nnUNetDatasetBlosc2",
        "nnunetv2.training.logging.nnunet_logger": "MetaLogger",
        "nnunetv2.training.loss.compound_losses": "DC_and_CE_loss DC_and_BCE_loss",
        "nnunetv2.training.loss.deep_supervision": "DeepSupervisionWrapper",
        "nnunetv2.training.loss.dice": "get_tp_fp_fn_tn MemoryEfficientSoftDiceLoss",
        "nnunetv2.training.lr_scheduler.polylr": "PolyLRScheduler",
        "nnunetv2.training.nnUNetTrainer.reexports": "TORCH_HAS_OLD_GRADSCALER",
        "nnunetv2.utilities.collate_outputs": "collate_outputs",
        "nnunetv2.utilities.crossval_split": "generate_crossval_split",
        "nnunetv2.utilities.default_n_proc_DA": "get_allowed_n_proc_DA",
        "nnunetv2.utilities.file_path_utilities": "check_workers_alive_and_busy",
        "nnunetv2.utilities.get_network_from_plans": "get_network_from_plans",
        "nnunetv2.utilities.helpers": "dummy_context empty_cache",
        "nnunetv2.utilities.label_handling.label_handling": "convert_labelmap_to_one_hot determine_num_input_channels",
        "nnunetv2.utilities.plans_handling.plans_handler": "ConfigurationManager PlansManager",
    },
    DDP="torch.nn.parallel:DistributedDataParallel",
    dist="torch.distributed",
    inspect="inspect",
    multiprocessing="multiprocessing",
    nn="torch.nn",
    np="numpy",
    os="os",
    shutil="shutil",
    sys="sys",
    torch="torch",
    warnings="warnings",
)
"""Name -> module, or module:attribute."""
