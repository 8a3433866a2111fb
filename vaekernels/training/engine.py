"""Lightning Fabric for a run: device, precision, processes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from vaekernels.training.config import EngineConfig
from vaekernels.training.errors import ConfigError, TrainingError

# Fabric imports torch._dynamo, which takes 3 s: it is imported where a run starts.
if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.distributed import ProcessGroup

__all__ = ["launch", "leave", "once", "process_group", "set_threads", "single_device"]

T = TypeVar("T")


def set_threads(config: EngineConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)


def launch(config: EngineConfig) -> Fabric:
    """A Fabric whose processes are all there: those of torchrun, where it started this one, else
    ``config.devices``, which Fabric starts as copies of this command."""
    _require_available(config.device)
    devices, nodes = config.devices, 1
    if dist.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    elif config.device == "cuda" and devices > torch.cuda.device_count():
        raise ConfigError(f"engine.devices {devices}: this machine has {torch.cuda.device_count()}")
    strategy = "ddp" if devices * nodes > 1 else "auto"
    from lightning_fabric import Fabric

    from vaekernels.training.checkpoint_io import SavesInPlace

    fabric = Fabric(
        accelerator=config.device,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision=config.precision,
        plugins=[SavesInPlace()],
    )
    fabric.launch()
    return fabric


def once(fabric: Fabric, action: Callable[[], T]) -> T:
    """What ``action`` returns in the first process, in every process. A TrainingError is raised in all of
    them: the others would wait for the first one."""
    done: T | None = None
    failed: TrainingError | None = None
    if fabric.is_global_zero:
        try:
            done = action()
        except TrainingError as error:
            failed = error
    if fabric.world_size > 1:
        done, failed = fabric.broadcast((done, failed))
    if failed is not None:
        raise failed
    return done  # type: ignore[return-value]


def leave(fabric: Fabric) -> None:
    """The end of what `launch` began, when the trainer is gone.

    A gloo group that something still refers to keeps its threads. One that drops its last tensor while Python
    shuts down aborts the process, with everything done (https://github.com/pytorch/pytorch/issues/190489).
    ``DistributedDataParallel`` refers to the group and is in a cycle, so it takes a collection.
    """
    if fabric.world_size > 1:
        gc.collect()
        dist.destroy_process_group()


def single_device(name: str) -> torch.device:
    """The device that a run of one process with this setting would take."""
    _require_available(EngineConfig(device=name).device)  # type: ignore[arg-type]  # checked at run time
    if name == "cpu" or (name == "auto" and not torch.accelerator.is_available()):
        return torch.device("cpu")
    from lightning_fabric import Fabric

    return Fabric(accelerator=name, devices=1).device


def _require_available(name: str) -> None:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(name, True):
        raise ConfigError(
            f"--device {name}: torch {torch.__version__} sees no such device here; use cpu or auto"
        )


def process_group(fabric: Fabric) -> ProcessGroup | None:
    """Of all processes, None where there is one."""
    return dist.group.WORLD if fabric.world_size > 1 else None
