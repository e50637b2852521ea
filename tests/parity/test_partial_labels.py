"""What a federation of sites with different classes leaves behind is used by the reference release."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from fake_federation import wait_until
from federated_sites import make_sites  # noqa: F401  a fixture
from tiny_dataset import PATCH, make_dataset_json

from nnunetv2.models.networks import bare_network
from nnunetv2.plans.partial_labels import with_union

UNION = {"background": 0, "blob": 1, "core": 2}
CLASSES = {"A": ("blob",), "B": ("blob", "core"), "C": ("core", "blob")}
IN_THE_RELEASE = """
import json, torch
from pathlib import Path
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
image = torch.from_numpy(inputs["image"])
predictor = nnUNetPredictor(device=torch.device("cpu"))
predictor.initialize_from_trained_model_folder(value["common"], (0,), "checkpoint_final.pth")
with torch.no_grad():
    outputs["common"] = predictor.network.eval()(image).numpy()
site = Path(value["site"])
plans, dataset_json = (json.loads((site / name).read_text()) for name in ("plans.json", "dataset.json"))
manager = PlansManager(plans)
configuration = manager.get_configuration("3d_fullres")
labels = manager.get_label_manager(dataset_json)
network = nnUNetTrainer.build_network_architecture(manager, configuration, 1, labels.num_segmentation_heads, False)
checkpoint = torch.load(site / "fold_0" / "checkpoint_final.pth", map_location="cpu", weights_only=False)
network.load_state_dict(checkpoint["network_weights"])
with torch.no_grad():
    outputs["site"] = network.eval()(image).numpy()
answer = [[int(label) for label in labels.foreground_labels], checkpoint["init_args"]["dataset_json"]["labels"]]
"""


def test_the_release_predicts_all_classes_with_the_common_model_and_with_that_of_a_site(
    reference,
    make_sites,  # noqa: F811
):
    sites = make_sites(num_epochs=1, sites=tuple(CLASSES), labels="union")
    trainers = []
    for site, classes in CLASSES.items():
        own = {"background": 0, **{name: number for number, name in enumerate(classes, 1)}}
        described = with_union(make_dataset_json(labels=own), UNION)
        trainers.append(sites.trainer(site, dataset_json=described))
    assert sites.run(*trainers) == [None] * 3
    folder = sites.federation.state.store.folder
    wait_until(lambda: sites.federation.state.store.load_events("model"))
    common = next(iter(folder.glob("models/*/fold_0/checkpoint_final.pth"))).parents[1]

    image = np.random.default_rng(0).normal(size=(1, 1, *PATCH[3])).astype(np.float32)
    trainer = trainers[0]  # which has never seen a label of class 2
    outputs, (labels, in_checkpoint) = reference.run(
        IN_THE_RELEASE, value={"common": str(common), "site": str(Path(trainer.output_folder).parent)}, image=image
    )
    assert labels == [1, 2] and in_checkpoint == UNION
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        expected = bare_network(trainer.network).eval()(torch.from_numpy(image)).numpy()
    for name in ("common", "site"):
        assert outputs[name].shape[1] == 3
        np.testing.assert_allclose(outputs[name], expected, rtol=1e-3, atol=1e-4, err_msg=name)
