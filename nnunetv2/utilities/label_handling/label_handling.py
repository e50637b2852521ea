"""Documented import path of `nnunetv2.plans`; users put label managers of their own into this folder."""

from nnunetv2.plans.label_manager import LabelManager as LabelManager
from nnunetv2.plans.label_manager import LabelOrRegion as LabelOrRegion
from nnunetv2.plans.label_manager import convert_labelmap_to_one_hot as convert_labelmap_to_one_hot
from nnunetv2.plans.label_manager import get_labelmanager_class_from_plans as get_labelmanager_class_from_plans
from nnunetv2.plans.label_manager import sigmoid as sigmoid
from nnunetv2.plans.plans_manager import determine_num_input_channels as determine_num_input_channels
