"""Start the processes of a distributed training, or find out that torchrun has started them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from nnunetv2.training import stopping

if TYPE_CHECKING:
    import torch

LONGEST_WAIT = timedelta(hours=6)
"""How long a process waits for another one: unpacking a large dataset takes the first one long. The death of a process
is noticed at once, by the process that started it."""

REACTION_TIME_S = 1.0
"""How long it takes until a signal is passed on. The end of a process is noticed at once."""

_TORCHRUN_VARIABLES = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE")


def check_device(device: torch.device, num_gpus: int) -> None:
    """Refuse a number of processes that a device cannot have.

    Raises:
        AssertionError: Several processes are asked for on a device that knows only one, or more than there are GPUs.
    """
    import torch

    assert num_gpus >= 1, f"-num_gpus is {num_gpus}: at least one process must train"
    if num_gpus == 1:
        return
    assert device.type in ("cuda", "cpu"), f"-num_gpus {num_gpus} needs -device cuda or cpu, got {device.type}"
    if device.type == "cuda" and torch.cuda.is_available():
        count = torch.cuda.device_count()
        assert num_gpus <= count, f"-num_gpus is {num_gpus}, but this machine shows {count} (CUDA_VISIBLE_DEVICES)"


def are_launched_by_torchrun() -> bool:
    """Tell whether torchrun has started this process as one of several."""
    return all(name in os.environ for name in _TORCHRUN_VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def torchrun_rank(num_gpus: int) -> tuple[int, int]:
    """Return the number of this process and how many there are, as torchrun says.

    Raises:
        ValueError: The option -num_gpus says something else.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if num_gpus not in (1, world_size):
        raise ValueError(f"torchrun has started {world_size} processes, but -num_gpus is {num_gpus}: leave it out")
    return rank, world_size


def local_rank(rank: int) -> int:
    """Return the number of the GPU of a process on its machine."""
    return int(os.environ.get("LOCAL_RANK", rank))


def share_cores(world_size: int) -> None:
    """Give this process its share of the cores, unless OMP_NUM_THREADS says how many."""
    import torch

    from nnunetv2.utilities.device import usable_cpu_count

    if not os.environ.get("OMP_NUM_THREADS"):
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        torch.set_num_threads(max(1, usable_cpu_count() // here))


def spawn(
    function: Callable[..., None], arguments: tuple[Any, ...], num_processes: int, find_free_port: Callable[[], int]
) -> None:
    """Run `function(rank, *arguments)` in processes of their own until all are done.

    Raises:
        RuntimeError: One of them failed or died; the others were ended. The message says which, and why.
    """
    from torch import multiprocessing
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

    os.environ["MASTER_ADDR"] = "localhost"
    os.environ.setdefault("MASTER_PORT", str(find_free_port()))
    try:
        with stopping.holding_back():  # the signal would kill a process that does not listen yet
            running = multiprocessing.spawn(function, arguments, nprocs=num_processes, join=False)
        has_forwarded = False
        while not running.join(timeout=REACTION_TIME_S):
            if stopping.was_signalled() and not has_forwarded:
                has_forwarded = True
                stopping.forward_signal(running.pids())
    except ProcessRaisedException as error:
        last_line = str(error).strip().splitlines()[-1]
        raise RuntimeError(
            f"process {error.error_index} of {num_processes} failed, the others were stopped: {last_line}"
        ) from error
    except ProcessExitedException as error:
        raise RuntimeError(
            f"process {error.error_index} of {num_processes} {_describe_death(error)}; the others were "
            "stopped. Go on with --c"
        ) from error


def _describe_death(error: Any) -> str:
    name = error.signal_name
    if name == signal.SIGKILL.name:
        return "was killed (SIGKILL), usually because memory ran out"
    return f"was ended by {name}" if name else f"ended with exit status {error.exit_code}"
