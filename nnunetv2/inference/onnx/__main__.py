"""Predict the images of a folder: `python -m nnunetv2.inference.onnx`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nnunetv2.inference.interruption import run_until_interrupted
from nnunetv2.utilities.command_line import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m nnunetv2.inference.onnx`."""
    run_command(lambda: run_until_interrupted(lambda: _predict(build_parser().parse_args(argv))))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `python -m nnunetv2.inference.onnx`."""
    parser = argparse.ArgumentParser(
        prog="python -m nnunetv2.inference.onnx",
        description="Segment the images of a folder with ONNX files of nnUNetv2_export_onnx. Needs no torch.",
    )
    parser.add_argument(
        "-i", required=True, help="Folder of input images, named as for training: CASE_0000, ..., one file per channel."
    )
    parser.add_argument("-o", required=True, help="Folder for the predictions; created if it does not exist.")
    parser.add_argument(
        "-m", required=True, nargs="+", help="Folder with the ONNX files of a model's folds, or these files."
    )
    parser.add_argument(
        "-step_size",
        type=float,
        default=0.5,
        help="Distance of neighbouring tiles as a fraction of the patch size, at most 1. Default: 0.5",
    )
    parser.add_argument(
        "--disable_tta",
        action="store_true",
        help="Do not average over mirrored copies: up to 8 times as fast, a little less accurate.",
    )
    parser.add_argument(
        "--save_probabilities",
        action="store_true",
        help="Also write class probabilities (.npz) and image properties (.pkl), for ensembling.",
    )
    parser.add_argument(
        "--continue_prediction",
        action="store_true",
        help="Keep the predictions that are there already and make the missing ones.",
    )
    parser.add_argument(
        "-prev_stage_predictions", default=None, help="Folder with the predictions of a cascade's previous stage."
    )
    parser.add_argument(
        "-npp", type=int, default=3, help="Workers for preprocessing; 0 preprocesses between predictions. Default: 3"
    )
    parser.add_argument(
        "-nps", type=int, default=3, help="Workers for export; 0 exports between predictions. Default: 3"
    )
    parser.add_argument(
        "-device", choices=("cpu", "cuda"), default="cpu", help="Where the network runs; cuda needs onnxruntime-gpu."
    )
    parser.add_argument("--verbose", action="store_true", help="Say more about each case.")
    return parser


def _predict(args: argparse.Namespace) -> None:
    from nnunetv2.inference.onnx.predictor import OnnxPredictor

    predictor = OnnxPredictor(
        args.m,
        device=args.device,
        tile_step_size=args.step_size,
        use_mirroring=not args.disable_tta,
        verbose=args.verbose,
    )
    predictor.predict_from_files(
        args.i,
        args.o,
        save_probabilities=args.save_probabilities,
        overwrite=not args.continue_prediction,
        num_processes_preprocessing=args.npp,
        num_processes_segmentation_export=args.nps,
        folder_with_segs_from_prev_stage=args.prev_stage_predictions,
    )


if __name__ == "__main__":
    main()
