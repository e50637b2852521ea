"""Two processes with shares of a batch learn what one process learns from the whole batch."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from tiny_dataset import make_tiny_dataset

from nnunetv2.run.run_training import find_free_network_port

PROJECT = Path(__file__).resolve().parents[2]
STEPS = 4

# Trains with one or two processes on the same batches, and writes weights and figures.
SCRIPT = """
    import json, os, sys
    import numpy as np
    import torch
    from torch import distributed


    def work(rank, world_size, port, plans_file, out):
        if world_size > 1:
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
            distributed.init_process_group("gloo", rank=rank, world_size=world_size)
        torch.set_num_threads(1)
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
        plans, dataset_json = json.load(open(plans_file))
        (configuration,) = plans["configurations"]
        trainer = nnUNetTrainer(plans, configuration, 0, dataset_json, torch.device("cpu"))
        torch.manual_seed(0)
        trainer.initialize()
        rng = np.random.default_rng(0)
        size = plans["configurations"][configuration]["batch_size"]
        patch = plans["configurations"][configuration]["patch_size"]
        first = 0 if rank == 0 else size - trainer.batch_size
        mine = slice(first, first + trainer.batch_size)

        def batch():
            labels = rng.integers(0, 3, (size, 1, *patch)).astype(np.int16)
            data = (labels + rng.normal(0, 0.5, labels.shape)).astype(np.float32)
            targets = [labels, labels[(slice(None), slice(None), *[slice(None, None, 2)] * len(patch))]]
            return {"data": torch.from_numpy(data[mine].copy()),
                    "target": [torch.from_numpy(target[mine].copy()) for target in targets], "keys": []}

        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        trainer.on_train_epoch_end([trainer.train_step(batch()) for _ in range(int(sys.argv[4]))])
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            trainer.on_validation_epoch_end([trainer.validation_step(batch()) for _ in range(2)])
        if rank == 0:
            network = trainer.network.module if world_size > 1 else trainer.network
            figures = {key: np.array(trainer.logger.get_value(key, step=-1), dtype=np.float64)
                       for key in ("train_losses", "val_losses", "mean_fg_dice", "dice_per_class_or_region")}
            weights = {"weight." + name: tensor.numpy() for name, tensor in network.state_dict().items()}
            np.savez(out, **figures, **weights)
        if world_size > 1:
            distributed.destroy_process_group()
            os._exit(0)  # threads of gloo (torch 2.13) abort some processes that end in the usual way


    if __name__ == "__main__":
        plans_file, out, port = sys.argv[1:4]
        world_size = int(sys.argv[5])
        if world_size == 1:
            work(0, 1, port, plans_file, out)
        else:
            torch.multiprocessing.spawn(work, args=(world_size, port, plans_file, out), nprocs=world_size)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "batch_dice"),
    [(4, False), (4, True), (3, False), (3, True)],
    ids=["even", "even, batch Dice", "uneven", "uneven, batch Dice"],
)
def test_two_processes_end_with_the_weights_and_figures_of_one(roots, tmp_path, batch_size, batch_dice):
    plans = make_tiny_dataset(
        roots["nnUNet_preprocessed"], stages=3, batch_size=batch_size, batch_dice=batch_dice, cases=1
    )
    dataset_json = json.loads(next(roots["nnUNet_preprocessed"].glob("*/dataset.json")).read_text())
    script, plans_file = tmp_path / "train.py", tmp_path / "plans.json"
    script.write_text(textwrap.dedent(SCRIPT))
    plans_file.write_text(json.dumps([plans, dataset_json]))
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "nnUNet_cpu_autocast": "0", "OMP_NUM_THREADS": "1"}
    results = []
    for world_size in (1, 2):
        out = tmp_path / f"{world_size}.npz"
        done = subprocess.run(
            [sys.executable, script, plans_file, out, str(find_free_network_port()), str(STEPS), str(world_size)],
            check=False,
            env=environment,
            timeout=300,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        with np.load(out) as loaded:
            results.append(dict(loaded))
    alone, together = results
    for name, values in alone.items():
        # The last output has weight 0 in one process and 1e-6 in several, where each parameter needs a gradient.
        np.testing.assert_allclose(together[name], values, rtol=1e-5, atol=1e-5, err_msg=name)
