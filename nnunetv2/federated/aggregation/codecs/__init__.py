"""The forms in which weights travel, by the name that settings and matches give them."""

from __future__ import annotations

from nnunetv2.federated.aggregation.codecs.base import UpdateCodec
from nnunetv2.federated.aggregation.codecs.float16 import Float16WithErrorFeedback
from nnunetv2.federated.aggregation.codecs.float32 import Float32
from nnunetv2.federated.aggregation.codecs.int8 import Int8WithErrorFeedback
from nnunetv2.federated.protocol.messages import Precision

CODECS: dict[Precision, type[Float32] | type[Float16WithErrorFeedback] | type[Int8WithErrorFeedback]] = {
    "float32": Float32,
    "float16": Float16WithErrorFeedback,
    "int8": Int8WithErrorFeedback,
}


def codec_of(precision: Precision) -> UpdateCodec:
    """Return a new codec."""
    return CODECS[precision]()
