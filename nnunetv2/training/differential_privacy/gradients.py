"""Sum the clipped gradients of patients, and add the noise that hides each of them.

One backward pass per patient: whatever the network, its loss and its normalisation do, the gradient is that of one
patient alone. (Hooks that take all patients' gradients from one pass are wrong for networks that name a module twice,
as these do: Opacus 1.6.0 counts their encoders four times.)

Method: Abadi et al., Deep Learning with Differential Privacy, CCS 2016.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch


class ClippedSum:
    """Sum of the gradients of a lot's patients, each clipped.

    Args:
        parameters: Of the network; those that are not trained are left out.
        clip_norm: Largest L2 norm of one patient's gradient, over all parameters together.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], *, clip_norm: float) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.clip_norm = clip_norm
        self.total = [torch.zeros_like(parameter) for parameter in self.parameters]

    def add(self, loss: torch.Tensor) -> float:
        """Add the gradient of a patient's loss, clipped; return its norm before.

        A gradient with NaN or infinity adds nothing: it must not say by its silence who was there.
        """
        # Parameters that the loss does not reach, such as heads that deep supervision leaves out, have none.
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = [(total, gradient) for total, gradient in zip(self.total, gradients) if gradient is not None]
        norm = _norm([gradient for _, gradient in pairs])
        if np.isfinite(norm):
            scale = 1.0 if norm <= self.clip_norm else self.clip_norm / norm
            for total, gradient in pairs:
                total.add_(gradient, alpha=scale)
        return norm

    def release_(self, *, sigma: float, lot: float, generator: np.random.Generator) -> None:
        """Make the noisy mean the gradient of the parameters, and begin anew.

        Args:
            sigma: Standard deviation of the noise, in clipping norms.
            lot: Patients of a lot on average, by which the sum is divided for every draw.
        """
        for parameter, total in zip(self.parameters, self.total):
            noise = standard_normal_like(total, generator)
            parameter.grad = total.add(noise, alpha=sigma * self.clip_norm).div_(lot)
            total.zero_()


def standard_normal_like(tensor: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Return standard normal noise of the shape, dtype and device of a tensor."""
    noise = torch.from_numpy(generator.standard_normal(tuple(tensor.shape), dtype=np.float32))
    return noise.to(device=tensor.device, dtype=tensor.dtype)


def _norm(gradients: list[torch.Tensor]) -> float:
    if not gradients:
        return 0.0
    # In double precision: a clipped gradient must not exceed the norm by a rounding error of millions of additions.
    dtype = torch.float32 if gradients[0].device.type == "mps" else torch.float64
    norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient in gradients]
    return float(torch.linalg.vector_norm(torch.stack(norms)))
