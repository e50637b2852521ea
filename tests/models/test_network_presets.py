"""Networks of presets, without plans."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from nnunetv2.utilities.get_network_via_name import get_network_from_name


def test_the_residual_encoder_has_its_stages_and_blocks():
    with torch.device("meta"):  # shapes alone: 100 million weights need not be drawn
        network = get_network_from_name("ResEncL", 2, 3, allow_init=False)
        output = network(torch.empty(1, 2, 64, 64, 64))
        assert [len(stage.blocks) for stage in network.encoder.stages] == [1, 3, 4, 6, 6, 6]
        assert output.shape == (1, 3, 64, 64, 64) and not network.decoder.deep_supervision
        deep = get_network_from_name("ResEncL", 1, 3, allow_init=False, deep_supervision=True)
        assert len(deep(torch.empty(1, 1, 64, 64, 64))) == 5


def test_a_primus_is_given_its_patch(monkeypatch):
    class Fake(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.options = options

    name = "dynamic_network_architectures.architectures.primus"
    module = ModuleType(name)
    module.PrimusM = Fake
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("dynamic_network_architectures.architectures.primus", module, raising=False)
    network = get_network_from_name("PrimusM", 1, 3, (32, 64, 64))
    assert network.options == {
        "input_channels": 1,
        "output_channels": 3,
        "patch_embed_size": (8, 8, 8),
        "input_shape": (32, 64, 64),
    }
    with pytest.raises(ValueError, match="needs input_patchsize"):
        get_network_from_name("PrimusM", 1, 3)


def test_unknown_presets_are_refused_with_those_known():
    with pytest.raises(ValueError, match="no network preset 'ResEncXXL', only ResEncL, PrimusS"):
        get_network_from_name("ResEncXXL", 1, 2)
