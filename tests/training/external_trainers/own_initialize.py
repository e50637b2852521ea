"""`initialize` as a copy, and what the folder's own modules offer imported where it is used."""

import torch
from torch._dynamo import OptimizedModule

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels


class nnUNetTrainerInitializes(nnUNetTrainer):
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2

    def initialize(self):
        if self.was_initialized:
            raise RuntimeError("initialized already")
        self._set_batch_size_and_oversample()
        self.num_input_channels = determine_num_input_channels(
            self.plans_manager, self.configuration_manager, self.dataset_json
        )
        cm = self.configuration_manager
        net = self.build_network_architecture(
            cm.network_arch_class_name,
            cm.network_arch_init_kwargs,
            cm.network_arch_init_kwargs_req_import,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        )
        net.to(self.device)
        self.network = torch.compile(net) if self._do_i_compile() else net
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        self.loss = self._build_loss()
        self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        self.was_initialized = True

    @staticmethod
    def build_network_architecture(
        architecture_class_name,
        arch_init_kwargs,
        arch_init_kwargs_req_import,
        num_input_channels,
        num_output_channels,
        enable_deep_supervision=True,
    ):
        from nets.plain_net import PlainNet

        return PlainNet(num_input_channels, num_output_channels)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(
            [{"params": self.network.body.parameters()}, {"params": self.network.head.parameters()}],
            self.initial_lr,
            momentum=0.9,
        )
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def _get_deep_supervision_scales(self):
        return None

    def _build_loss(self):
        self.enable_deep_supervision = False
        return super()._build_loss()

    def set_deep_supervision_enabled(self, enabled: bool):
        assert not isinstance(self.network, OptimizedModule)
