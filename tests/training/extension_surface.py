"""What trainers of third parties override, read and import: names of the specification, separated by spaces."""

from __future__ import annotations

HOOKS = """__init__ initialize build_network_architecture _build_loss _get_deep_supervision_scales
_set_batch_size_and_oversample _do_i_compile configure_optimizers
configure_rotation_dummyDA_mirroring_and_inital_patch_size get_training_transforms get_validation_transforms
get_tr_and_val_datasets get_dataloaders do_split set_deep_supervision_enabled on_train_start on_train_end on_epoch_start
on_epoch_end on_train_epoch_start train_step on_train_epoch_end on_validation_epoch_start validation_step
on_validation_epoch_end save_checkpoint load_checkpoint perform_actual_validation run_training print_to_log_file
print_plans plot_network_architecture _save_debug_information"""

STATIC_HOOKS = ("build_network_architecture", "get_training_transforms", "get_validation_transforms")

ATTRIBUTES = """plans_manager configuration_manager configuration_name dataset_json fold device is_ddp local_rank
my_init_kwargs preprocessed_dataset_folder_base preprocessed_dataset_folder output_folder_base output_folder log_file
logger dataset_class is_cascaded folder_with_segs_from_previous_stage initial_lr weight_decay
oversample_foreground_percent probabilistic_oversampling num_iterations_per_epoch num_val_iterations_per_epoch
num_epochs current_epoch enable_deep_supervision label_manager num_input_channels network optimizer lr_scheduler
grad_scaler loss dataloader_train dataloader_val _best_ema inference_allowed_mirroring_axes save_every
disable_checkpointing was_initialized"""

LOGGER_MEMBERS = "log get_value local_logger log_summary update_config plot_progress_png get_checkpoint loggers"

_TRAINING, _UTILITIES = "nnunetv2.training", "nnunetv2.utilities"
MODULES = {
    f"{_TRAINING}.nnUNetTrainer.nnUNetTrainer": "nnUNetTrainer join load_json isfile save_json maybe_mkdir_p autocast dist DDP OptimizedModule GradScaler",
    f"{_TRAINING}.loss.dice": "SoftDiceLoss MemoryEfficientSoftDiceLoss get_tp_fp_fn_tn",
    f"{_TRAINING}.loss.compound_losses": "DC_and_CE_loss DC_and_BCE_loss DC_and_topk_loss",
    f"{_TRAINING}.loss.robust_ce_loss": "RobustCrossEntropyLoss TopKLoss",
    f"{_TRAINING}.loss.deep_supervision": "DeepSupervisionWrapper",
    f"{_TRAINING}.lr_scheduler.polylr": "PolyLRScheduler",
    f"{_TRAINING}.lr_scheduler.warmup": "Lin_incr_LRScheduler Lin_incr_offset_LRScheduler PolyLRScheduler_offset CosineAnnealingLR_offset",
    f"{_TRAINING}.logging.nnunet_logger": "MetaLogger LocalLogger WandbLogger get_cluster_job_id",
    f"{_TRAINING}.dataloading.nnunet_dataset": "nnUNetBaseDataset nnUNetDatasetNumpy nnUNetDatasetBlosc2 infer_dataset_class file_ending_dataset_mapping",
    f"{_TRAINING}.dataloading.data_loader": "nnUNetDataLoader",
    f"{_TRAINING}.dataloading.utils": "unpack_dataset _convert_to_npy",
    f"{_TRAINING}.data_augmentation.compute_initial_patch_size": "get_patch_size",
    f"{_TRAINING}.data_augmentation.custom_transforms.cascade_transforms": "MoveSegAsOneHotToData RemoveRandomConnectedComponentFromOneHotEncodingTransform "
    "ApplyRandomBinaryOperatorTransform",
    f"{_TRAINING}.data_augmentation.custom_transforms.deep_supervision_donwsampling": "DownsampleSegForDSTransform2",
    f"{_TRAINING}.data_augmentation.custom_transforms.masking": "MaskTransform",
    f"{_TRAINING}.data_augmentation.custom_transforms.region_based_training": "ConvertSegmentationToRegionsTransform",
    f"{_TRAINING}.data_augmentation.custom_transforms.transforms_for_dummy_2d": "Convert3DTo2DTransform Convert2DTo3DTransform",
    "nnunetv2.run.run_training": "run_training run_training_entry get_trainer_from_args maybe_load_checkpoint setup_ddp cleanup_ddp run_ddp "
    "find_free_network_port",
    "nnunetv2.run.load_pretrained_weights": "load_pretrained_weights",
    f"{_UTILITIES}.get_network_from_plans": "get_network_from_plans",
    f"{_UTILITIES}.get_network_via_name": "get_network_from_name",
    f"{_UTILITIES}.collate_outputs": "collate_outputs",
    f"{_UTILITIES}.crossval_split": "generate_crossval_split",
    f"{_UTILITIES}.ddp_allgather": "AllGatherGrad print_if_rank0",
    f"{_UTILITIES}.default_n_proc_DA": "get_allowed_n_proc_DA",
    f"{_UTILITIES}.helpers": "softmax_helper_dim0 softmax_helper_dim1 empty_cache dummy_context",
    f"{_UTILITIES}.find_class_by_name": "recursive_find_python_class",
    f"{_UTILITIES}.find_objects": "recursive_find_trainer_class_by_name",
    f"{_UTILITIES}.label_handling.label_handling": "LabelManager convert_labelmap_to_one_hot determine_num_input_channels get_labelmanager_class_from_plans",
    f"{_UTILITIES}.network_initialization": "InitWeights_He",
    f"{_UTILITIES}.plans_handling.plans_handler": "PlansManager ConfigurationManager",
    "nnunetv2.configuration": "default_num_processes ANISO_THRESHOLD",
    "nnunetv2.paths": "nnUNet_raw nnUNet_preprocessed nnUNet_results nnUNet_extTrainer",
}
