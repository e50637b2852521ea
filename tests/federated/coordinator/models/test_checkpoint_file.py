"""Checkpoints written without torch are read by torch, with aliases sharing memory."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from nnunetv2.federated.coordinator.models.checkpoint_file import model_checkpoint, parameter_names, write_checkpoint
from nnunetv2.federated.errors import WireError
from nnunetv2.federated.protocol.document import TensorSpec, open_document, write_document
from nnunetv2.federated.protocol.messages import Aggregate

TENSORS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 7,
    "norm.weight": np.float16([1, 2.5]),
    "count": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float32),
}
CONTENT = model_checkpoint(
    plans={"plans_name": "nnUNetPlans", "spacing": [1.0, 0.5, 2], "ü": None, "nested": {"a": [True, {"b": 2**40}]}},
    configuration="3d_fullres",
    fold="0",
    dataset_json={"labels": {"background": 0}, "file_ending": ".nii.gz"},
    mirroring_axes=[0, 1, 2],
    current_epoch=1000,
)


def make_document(folder, tensors=None):
    tensors = TENSORS if tensors is None else tensors
    write_document(
        folder / "aggregate",
        Aggregate(round=0, contributors={"A": 1}),
        {name: TensorSpec.of(values) for name, values in tensors.items()},
        tensors.values(),
    )
    return open_document(folder / "aggregate")


def write(folder, names=None, content=CONTENT):
    path = folder / "checkpoint_final.pth"
    write_checkpoint(path, make_document(folder), names or {name: name for name in TENSORS}, content)
    return path


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_equal_tensors_with_weights_only(tmp_path, mmap):
    loaded = torch.load(write(tmp_path), map_location="cpu", weights_only=True, mmap=mmap)
    assert list(loaded["network_weights"]) == list(TENSORS)
    for name, values in TENSORS.items():
        tensor = loaded["network_weights"][name]
        assert tensor.is_contiguous() and not tensor.requires_grad
        assert tensor.numpy().dtype == values.dtype
        np.testing.assert_array_equal(tensor.numpy(), values)


def test_the_keys_of_a_checkpoint_are_there(tmp_path):
    loaded = torch.load(write(tmp_path), weights_only=True)
    del loaded["network_weights"]
    assert loaded == CONTENT
    assert loaded["trainer_name"] == "nnUNetTrainer"
    assert loaded["inference_allowed_mirroring_axes"] == (0, 1, 2)
    assert loaded["current_epoch"] == 1000
    assert loaded["init_args"]["configuration"] == "3d_fullres"
    assert loaded["init_args"]["fold"] == 0
    assert not any(loaded[name] for name in ("optimizer_state", "grad_scaler_state", "logging", "_best_ema"))


def test_aliases_share_their_storage_and_prefixes_are_removed(tmp_path):
    names = parameter_names(
        ["_orig_mod.a", "b"], {"_orig_mod.other.a": "_orig_mod.a"}, {"_orig_mod.a": "conv.weight", "b": "norm.weight"}
    )
    weights = torch.load(write(tmp_path, names), weights_only=True)["network_weights"]
    assert list(weights) == ["a", "b", "other.a"]
    assert weights["a"].data_ptr() == weights["other.a"].data_ptr() != weights["b"].data_ptr()
    with zipfile.ZipFile(tmp_path / "checkpoint_final.pth") as archive:
        assert sum("archive/data/" in name for name in archive.namelist()) == 2


def test_a_real_network_loads_it_strictly(tmp_path):
    from nnunetv2.federated.aggregation.matching import distinct_tensors

    def make():
        shared = torch.nn.Conv2d(1, 2, 3)
        return torch.nn.ModuleDict({"conv": shared, "norm": torch.nn.InstanceNorm2d(2, affine=True), "alias": shared})

    source, target = make(), make()
    distinct, aliases = distinct_tensors(source.state_dict())
    document = make_document(tmp_path, {name: tensor.numpy() for name, tensor in distinct.items()})
    write_checkpoint(
        tmp_path / "c.pth", document, parameter_names(distinct, aliases, {name: name for name in distinct}), CONTENT
    )
    target.load_state_dict(torch.load(tmp_path / "c.pth", weights_only=True)["network_weights"])
    for mine, theirs in zip(target.state_dict().values(), source.state_dict().values()):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_storages_are_aligned_so_that_torch_can_map_them(tmp_path):
    path = write(tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        members = [member for member in archive.infolist() if "archive/data/" in member.filename]
    content = path.read_bytes()
    for member in members:
        name_bytes, extra_bytes = np.frombuffer(content, "<u2", 2, member.header_offset + 26)
        assert (member.header_offset + 30 + int(name_bytes) + int(extra_bytes)) % 64 == 0


def test_equal_models_are_equal_files(tmp_path):
    first = write(tmp_path).read_bytes()
    assert write(tmp_path).read_bytes() == first


def test_a_tensor_that_is_not_there_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(WireError, match="no tensor 'nowhere'"):
        write(tmp_path, {"a": "nowhere"})
    assert not (tmp_path / "checkpoint_final.pth").exists()
    with pytest.raises(KeyError):
        parameter_names(["a"], {}, {})


@pytest.mark.parametrize("value", [np.float32(1), b"bytes", {1, 2}, object()])
def test_content_that_is_not_plain_is_refused(tmp_path, value):
    with pytest.raises(TypeError, match=r"checkpoint\['init_args'\]\[0\]"):
        write(tmp_path, content={"init_args": [value]})


def test_writing_needs_no_torch(tmp_path):
    script = """if True:
        import sys
        sys.modules["torch"] = None
        from pathlib import Path
        import nnunetv2.federated.aggregation.weighted_mean, nnunetv2.federated.aggregation.fingerprint_statistics
        from nnunetv2.federated.coordinator.models.checkpoint_file import write_checkpoint
        from nnunetv2.federated.protocol.document import open_document
        write_checkpoint(Path(sys.argv[2]), open_document(Path(sys.argv[1])), {"w": "conv.weight"}, {})
    """
    make_document(tmp_path)
    subprocess.run([sys.executable, "-c", script, tmp_path / "aggregate", tmp_path / "c.pth"], check=True)
    assert torch.load(tmp_path / "c.pth", weights_only=True)["network_weights"]["w"].shape == (2, 3, 4)
