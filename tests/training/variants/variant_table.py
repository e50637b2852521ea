"""The variants of the specification: module below `variants`, name, name of the parent, attributes that differ."""

from __future__ import annotations

from typing import NamedTuple

BASE = "nnUNetTrainer"


class Variant(NamedTuple):
    module: str
    name: str
    parent: str = BASE
    settings: dict = {}


_AUG, _LOSS, _OPT = "data_augmentation", "loss", "optimizer"
VARIANTS = [
    Variant(
        "benchmarking.nnUNetTrainerBenchmark_5epochs",
        "nnUNetTrainerBenchmark_5epochs",
        BASE,
        {"num_epochs": 5, "disable_checkpointing": True, "crashed_with_runtime_error": False},
    ),
    Variant(
        "benchmarking.nnUNetTrainerBenchmark_5epochs_noDataLoading",
        "nnUNetTrainerBenchmark_5epochs_noDataLoading",
        "nnUNetTrainerBenchmark_5epochs",
    ),
    Variant("competitions.aortaseg24", "nnUNetTrainer_onlyMirror01_DA5", "nnUNetTrainer_onlyMirror01"),
    Variant(f"{_AUG}.nnUNetTrainerDA5", "nnUNetTrainerDA5"),
    Variant(f"{_AUG}.nnUNetTrainerDA5", "nnUNetTrainerDA5ord0", "nnUNetTrainerDA5"),
    Variant(f"{_AUG}.nnUNetTrainerDA5", "nnUNetTrainerDA5Segord0", "nnUNetTrainerDA5"),
    Variant(f"{_AUG}.nnUNetTrainerDA5", "nnUNetTrainerDA5_10epochs", "nnUNetTrainerDA5", {"num_epochs": 10}),
    Variant(f"{_AUG}.nnUNetTrainerDAOrd0", "nnUNetTrainer_DASegOrd0"),
    Variant(f"{_AUG}.nnUNetTrainerDAOrd0", "nnUNetTrainer_DASegOrd0_NoMirroring", "nnUNetTrainer_DASegOrd0"),
    Variant(f"{_AUG}.nnUNetTrainerNoDA", "nnUNetTrainerNoDA"),
    Variant(f"{_AUG}.nnUNetTrainerNoMirroring", "nnUNetTrainerNoMirroring"),
    Variant(f"{_AUG}.nnUNetTrainerNoMirroring", "nnUNetTrainer_onlyMirror01"),
    Variant(
        f"{_AUG}.nnUNetTrainerNoMirroring",
        "nnUNetTrainer_onlyMirror01_1500ep",
        "nnUNetTrainer_onlyMirror01",
        {"num_epochs": 1500},
    ),
    Variant(f"{_AUG}.nnUNetTrainerNoMirroring", "nnUNetTrainer_onlyMirror01_DASegOrd0", "nnUNetTrainer_onlyMirror01"),
    Variant(f"{_AUG}.nnUNetTrainer_noDummy2DDA", "nnUNetTrainer_noDummy2DDA"),
    Variant(f"{_LOSS}.nnUNetTrainerCELoss", "nnUNetTrainerCELoss"),
    Variant(f"{_LOSS}.nnUNetTrainerCELoss", "nnUNetTrainerCELoss_5epochs", "nnUNetTrainerCELoss", {"num_epochs": 5}),
    Variant(f"{_LOSS}.nnUNetTrainerDiceLoss", "nnUNetTrainerDiceLoss"),
    Variant(f"{_LOSS}.nnUNetTrainerDiceLoss", "nnUNetTrainerDiceCELoss_noSmooth"),
    Variant(f"{_LOSS}.nnUNetTrainerTopkLoss", "nnUNetTrainerTopk10Loss"),
    Variant(f"{_LOSS}.nnUNetTrainerTopkLoss", "nnUNetTrainerTopk10LossLS01"),
    Variant(f"{_LOSS}.nnUNetTrainerTopkLoss", "nnUNetTrainerDiceTopK10Loss"),
    Variant("lr_schedule.nnUNetTrainerCosAnneal", "nnUNetTrainerCosAnneal"),
    Variant(
        "lr_schedule.nnUNetTrainer_warmup",
        "nnUNetTrainer_warmup",
        BASE,
        {"warmup_duration_whole_net": 50, "num_epochs": 1000, "training_stage": None},
    ),
    Variant("network_architecture.nnUNetTrainerBN", "nnUNetTrainerBN"),
    Variant(
        "network_architecture.nnUNetTrainerNoDeepSupervision",
        "nnUNetTrainerNoDeepSupervision",
        BASE,
        {"enable_deep_supervision": False},
    ),
    Variant(f"{_OPT}.nnUNetTrainerAdam", "nnUNetTrainerAdam"),
    Variant(f"{_OPT}.nnUNetTrainerAdam", "nnUNetTrainerAdam1en3", "nnUNetTrainerAdam", {"initial_lr": 1e-3}),
    Variant(f"{_OPT}.nnUNetTrainerAdam", "nnUNetTrainerAdam3en4", "nnUNetTrainerAdam", {"initial_lr": 3e-4}),
    Variant(f"{_OPT}.nnUNetTrainerAdam", "nnUNetTrainerVanillaAdam"),
    Variant(
        f"{_OPT}.nnUNetTrainerAdam", "nnUNetTrainerVanillaAdam1en3", "nnUNetTrainerVanillaAdam", {"initial_lr": 1e-3}
    ),
    Variant(
        f"{_OPT}.nnUNetTrainerAdam", "nnUNetTrainerVanillaAdam3en4", "nnUNetTrainerVanillaAdam", {"initial_lr": 3e-4}
    ),
    Variant(f"{_OPT}.nnUNetTrainerAdan", "nnUNetTrainerAdan"),
    Variant(f"{_OPT}.nnUNetTrainerAdan", "nnUNetTrainerAdan1en3", "nnUNetTrainerAdan", {"initial_lr": 1e-3}),
    Variant(f"{_OPT}.nnUNetTrainerAdan", "nnUNetTrainerAdan3en4", "nnUNetTrainerAdan", {"initial_lr": 3e-4}),
    Variant(f"{_OPT}.nnUNetTrainerAdan", "nnUNetTrainerAdan1en1", "nnUNetTrainerAdan", {"initial_lr": 1e-1}),
    Variant(f"{_OPT}.nnUNetTrainerAdan", "nnUNetTrainerAdanCosAnneal", "nnUNetTrainerAdan"),
    Variant(
        "sampling.nnUNetTrainer_probabilisticOversampling",
        "nnUNetTrainer_probabilisticOversampling",
        BASE,
        {"probabilistic_oversampling": True, "oversample_foreground_percent": 0.5},
    ),
    *[
        Variant(
            "sampling.nnUNetTrainer_probabilisticOversampling",
            f"nnUNetTrainer_probabilisticOversampling_{digits}",
            "nnUNetTrainer_probabilisticOversampling",
            {"oversample_foreground_percent": share},
        )
        for digits, share in (("033", 0.33), ("010", 0.1))
    ],
    *[
        Variant(
            "training_length.nnUNetTrainer_Xepochs",
            f"nnUNetTrainer_{n}epoch{'s' if n > 1 else ''}",
            BASE,
            {"num_epochs": n},
        )
        for n in (1, 5, 10, 20, 50, 100, 250, 500, 750, 2000, 4000, 8000)
    ],
    *[
        Variant(
            "training_length.nnUNetTrainer_Xepochs_NoMirroring",
            f"nnUNetTrainer_{n}epochs_NoMirroring",
            "nnUNetTrainerNoMirroring",
            {"num_epochs": n},
        )
        for n in (250, 2000, 4000, 8000)
    ],
]
BY_NAME = {variant.name: variant for variant in VARIANTS}
NAMES = list(BY_NAME)
