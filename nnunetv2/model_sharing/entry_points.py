"""The commands that export, install and download models."""

from __future__ import annotations

import argparse

from nnunetv2.utilities.command_line import run_command
from nnunetv2.utilities.plain_text import show


def print_license_warning() -> None:
    """Remind the reader that a model is shared under terms that others chose."""
    show(
        "Models are shared under the terms of those who trained them, and of the data they were trained with. "
        "Read these terms before you use a model, and cite what they ask you to cite."
    )


def download_by_url() -> None:
    """Run `nnUNetv2_download_pretrained_model_by_url`."""

    def download() -> None:
        from nnunetv2.model_sharing.model_download import download_and_install_from_url

        args = build_download_parser().parse_args()
        download_and_install_from_url(args.url, args.sha256)

    run_command(download)


def install_from_zip_entry_point() -> None:
    """Run `nnUNetv2_install_pretrained_model_from_zip`."""

    def install() -> None:
        from nnunetv2.model_sharing.model_import import install_model_from_zip_file

        install_model_from_zip_file(build_install_parser().parse_args().zip)

    run_command(install)


def export_pretrained_model_entry() -> None:
    """Run `nnUNetv2_export_model_to_zip`."""

    def export() -> None:
        from nnunetv2.model_sharing.model_export import export_pretrained_model

        args = build_export_parser().parse_args()
        export_pretrained_model(
            args.d,
            args.o,
            args.c,
            args.tr,
            args.p,
            args.f,
            strict=not args.not_strict,
            save_checkpoints=args.chk,
            export_crossval_predictions=args.exp_cv_preds,
        )

    run_command(export)


def export_onnx_entry() -> None:
    """Run `nnUNetv2_export_onnx`."""

    def export() -> None:
        args = build_onnx_parser().parse_args()
        if (args.m is None) == (args.d is None or args.c is None):
            raise ValueError("name the model by -d and -c, or by its folder with -m")

        from nnunetv2.model_sharing.onnx_export import export_to_onnx
        from nnunetv2.utilities.file_path_utilities import get_output_folder

        folder = get_output_folder(args.d, args.tr, args.p, args.c) if args.m is None else args.m
        show(*map(str, export_to_onnx(folder, args.o, folds=args.f, checkpoint_name=args.chk, opset=args.opset)))

    run_command(export)


def build_download_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_download_pretrained_model_by_url`."""
    parser = argparse.ArgumentParser(description="Download a zip file of models and install it in nnUNet_results.")
    parser.add_argument("url", help="Address of the zip file, with https.")
    parser.add_argument(
        "-sha256", default=None, help="Refuse the file unless it has this SHA-256 (64 hexadecimal digits)."
    )
    return parser


def build_install_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_install_pretrained_model_from_zip`."""
    parser = argparse.ArgumentParser(description="Install models from a zip file in nnUNet_results.")
    parser.add_argument("zip", help="The zip file, as nnUNetv2_export_model_to_zip writes it.")
    return parser


def build_export_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_export_model_to_zip`."""
    parser = argparse.ArgumentParser(description="Pack trained models into a zip file, to share them.")
    parser.add_argument("-d", required=True, help="Dataset name or id.")
    parser.add_argument("-o", required=True, help="The zip file to write.")
    configurations = ["3d_lowres", "3d_fullres", "2d", "3d_cascade_fullres"]
    parser.add_argument(
        "-c",
        nargs="+",
        default=configurations,
        help=f"Configurations; those that the plans do not have are left out. Default: {' '.join(configurations)}",
    )
    parser.add_argument("-tr", default="nnUNetTrainer", help="Trainer. Default: nnUNetTrainer")
    parser.add_argument("-p", default="nnUNetPlans", help="Plans. Default: nnUNetPlans")
    parser.add_argument(
        "-f",
        nargs="+",
        default=["0", "1", "2", "3", "4"],
        help="Folds: numbers, or all for fold_all. Default: 0 1 2 3 4",
    )
    parser.add_argument(
        "-chk", nargs="+", default=["checkpoint_final.pth"], help="Checkpoints to pack. Default: checkpoint_final.pth"
    )
    parser.add_argument(
        "--not_strict", action="store_true", help="Leave configurations out that were not trained, instead of stopping."
    )
    parser.add_argument("--exp_cv_preds", action="store_true", help="Also pack the validation predictions.")
    return parser


def build_onnx_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_export_onnx`."""
    parser = argparse.ArgumentParser(
        description="Write the networks of a trained model into ONNX files, with which "
        "`python -m nnunetv2.inference.onnx` predicts without torch."
    )
    parser.add_argument("-o", required=True, help="Folder for the files, one per fold; created if it does not exist.")
    parser.add_argument("-d", help="Dataset name or id.")
    parser.add_argument("-c", help="Configuration, for example 2d or 3d_fullres; stages of a cascade one by one.")
    parser.add_argument("-tr", default="nnUNetTrainer", help="Trainer. Default: nnUNetTrainer")
    parser.add_argument("-p", default="nnUNetPlans", help="Plans. Default: nnUNetPlans")
    parser.add_argument("-m", help="Model folder in any place, instead of -d and -c: it holds plans.json and fold_X.")
    parser.add_argument(
        "-f", nargs="+", help="Folds: numbers, or all for fold_all. Default: all numbered ones with the checkpoint"
    )
    parser.add_argument(
        "-chk", default="checkpoint_final.pth", help="File name of the checkpoint. Default: checkpoint_final.pth"
    )
    parser.add_argument(
        "-opset", type=int, default=17, help="Version of ONNX's operators, which onnxruntime must know. Default: 17"
    )
    return parser
