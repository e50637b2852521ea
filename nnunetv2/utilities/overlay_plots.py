"""Documented import path of `nnunetv2.evaluation.overlay_plots`."""

from nnunetv2.evaluation.overlay_plots import build_parser as build_parser
from nnunetv2.evaluation.overlay_plots import color_cycle as color_cycle
from nnunetv2.evaluation.overlay_plots import entry_point_generate_overlay as entry_point_generate_overlay
from nnunetv2.evaluation.overlay_plots import generate_overlay as generate_overlay
from nnunetv2.evaluation.overlay_plots import generate_overlays_from_preprocessed as generate_overlays_from_preprocessed
from nnunetv2.evaluation.overlay_plots import generate_overlays_from_raw as generate_overlays_from_raw
from nnunetv2.evaluation.overlay_plots import hex_to_rgb as hex_to_rgb
from nnunetv2.evaluation.overlay_plots import multiprocessing_plot_overlay as multiprocessing_plot_overlay
from nnunetv2.evaluation.overlay_plots import (
    multiprocessing_plot_overlay_preprocessed as multiprocessing_plot_overlay_preprocessed,
)
from nnunetv2.evaluation.overlay_plots import plot_overlay as plot_overlay
from nnunetv2.evaluation.overlay_plots import plot_overlay_preprocessed as plot_overlay_preprocessed
from nnunetv2.evaluation.overlay_plots import select_slice_to_plot as select_slice_to_plot
from nnunetv2.evaluation.overlay_plots import select_slice_to_plot2 as select_slice_to_plot2
from nnunetv2.utilities.legacy_names import file_helpers_of

__getattr__ = file_helpers_of(__name__)
