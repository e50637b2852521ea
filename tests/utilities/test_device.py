"""Precision, memory layout and threads."""

import pytest
import torch

from nnunetv2.models.networks import speed_up_on_cpu_
from nnunetv2.utilities import device
from nnunetv2.utilities.device import autocast_context, resolve_device, to_fast_memory_format_, wants_cpu_autocast


@pytest.mark.parametrize(
    ("choice", "expected"), [("0", False), ("f", False), ("False", False), ("no", False), ("1", True), ("TRUE", True)]
)
def test_environment_decides(monkeypatch, choice, expected):
    monkeypatch.setenv("nnUNet_cpu_autocast", choice)
    assert wants_cpu_autocast() is expected


@pytest.mark.parametrize("capable", [True, False])
def test_processor_decides_otherwise(monkeypatch, capable):
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: capable)
    assert wants_cpu_autocast() is capable


def test_nonsense_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("nnUNet_cpu_autocast", "maybe")
    with pytest.raises(ValueError, match="nnUNet_cpu_autocast"):
        wants_cpu_autocast()


@pytest.mark.parametrize(("choice", "dtype"), [("1", torch.bfloat16), ("0", torch.float32)])
def test_cpu_precision(monkeypatch, choice, dtype):
    monkeypatch.setenv("nnUNet_cpu_autocast", choice)
    with autocast_context(torch.device("cpu")):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def test_cpu_flags():
    assert device._cpu_flags_name_bf16("model name\t: x\nflags\t\t: fpu avx512f avx512_bf16 sse\n")
    assert device._cpu_flags_name_bf16("flags : amx_bf16\n")
    assert not device._cpu_flags_name_bf16("flags : avx512f amx_tile\nbugs : amx_bf16\n")


@pytest.fixture
def matrix_units(monkeypatch):
    """A processor with AMX, on which networks run in bfloat16."""
    monkeypatch.setenv("nnUNet_cpu_autocast", "1")
    monkeypatch.setattr(device, "_cpu_has_amx", lambda: True)


def test_memory_format_keeps_values(matrix_units):
    tensor = torch.arange(2 * 3 * 4 * 5 * 6.0).reshape(2, 3, 4, 5, 6)
    fast = to_fast_memory_format_(tensor, "cpu")
    assert torch.equal(fast, tensor)
    assert fast.is_contiguous(memory_format=torch.channels_last_3d)


def test_network_of_both_ranks_is_laid_out_in_place(matrix_units):
    network = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3), torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(2, 2))
    before = [parameter.clone() for parameter in network.parameters()]
    assert to_fast_memory_format_(network, torch.device("cpu")) is network
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert network[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters()))


def test_other_devices_and_other_processors_keep_their_layout(matrix_units, monkeypatch):
    tensor = torch.ones(1, 2, 3, 4)
    assert to_fast_memory_format_(tensor, "cuda") is tensor
    monkeypatch.setattr(device, "_cpu_has_amx", lambda: False)
    assert to_fast_memory_format_(tensor, "cpu") is tensor


def test_networks_normalize_fast_on_a_cpu_only():
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.InstanceNorm3d(2, affine=True))
    image, plain = torch.randn(2, 1, 6, 7, 8), type(network[1])
    expected = network(image)
    assert speed_up_on_cpu_(network, "cuda") is network
    assert type(network[1]) is plain
    assert type(speed_up_on_cpu_(network, "cpu")[1]) is not plain
    torch.testing.assert_close(network(image), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("choice", "is_inference", "dtype"), [("1", True, torch.float16), ("1", False, None), ("", True, None)]
)
def test_mps_predicts_in_half_precision_on_request(monkeypatch, choice, is_inference, dtype):
    contexts = []
    monkeypatch.setenv("nnUNet_mps_autocast", choice)
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: True)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: contexts.append((kind, dtype)))
    autocast_context("mps", is_inference=is_inference)
    assert contexts == ([] if dtype is None else [("mps", dtype)])


def test_where_torch_has_no_half_precision_on_mps_it_predicts_in_float32(monkeypatch, caplog):
    monkeypatch.setenv("nnUNet_mps_autocast", "1")
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: False)
    assert not device.wants_mps_autocast()
    assert "predicting in float32" in caplog.text


def test_devices_are_checked():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="unknown device"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="-device cpu"):
            resolve_device("cuda")
