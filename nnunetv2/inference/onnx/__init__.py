"""Predict with ONNX files of `nnUNetv2_export_onnx`, without torch.

NumPy, SciPy, onnxruntime and an image reader suffice.

    python -m nnunetv2.inference.onnx -m model -i scans -o segmentations

From Python, `OnnxPredictor` has the methods of `nnUNetPredictor` that take files and arrays.
"""

from nnunetv2.utilities.legacy_names import names_from, origins

_ORIGINS = origins(
    {"nnunetv2.inference.onnx.predictor": "OnnxPredictor", "nnunetv2.inference.onnx.metadata": "OnnxFileError"}
)

__all__ = [*_ORIGINS]
__getattr__ = names_from(_ORIGINS, __name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ORIGINS})
