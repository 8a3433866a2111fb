"""One process under DistributedDataParallel, with the group's all-reduce: the gradients of plain training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import vaekernels as vk


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    backend = "nccl" if dist.is_nccl_available() else "gloo"
    torch.cuda.set_device(0)
    store = tmp_path_factory.mktemp("ddp") / "store"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 2 * 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


OPTIONS = {
    "batch": {"free_bits": 0.05},
    "sample": {"free_bits": 0.05, "clamp": "sample"},
    "weighted": {"free_bits": 0.05, "weight": torch.linspace(0, 2, 96)},
    "one_group": {"group_dims": (), "free_bits": 1.0},
}


def losses(model: nn.Module, x: Tensor, steps: int, **options: object) -> list[Tensor]:
    """Trains for some steps and returns each step's loss and, in the end, the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for i in range(steps):
        rng = torch.tensor([9, 4 * i], device=x.device)
        z, kl, _ = vk.sample_kl_packed(model(x), 1, rng=rng, **options)
        loss = (z - x[:, :24]).square().sum(1).mean() + kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return [*found, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("name", OPTIONS)
def test_training_is_that_of_one_plain_process(name, cuda, group):
    torch.manual_seed(3)
    model = Encoder().to(cuda)
    twin = DistributedDataParallel(copy.deepcopy(model), device_ids=[0])
    x = torch.randn(96, 40, device=cuda)
    options = {k: v.to(cuda) if torch.is_tensor(v) else v for k, v in OPTIONS[name].items()}
    plain = losses(model, x, 5, **options)
    shared = losses(twin, x, 5, process_group=group, **options)
    for a, b in zip(shared, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_partial_sums_survive_a_side_stream(cuda, group):
    """The all-reduce runs on a stream of its own and is waited for."""
    mu, logvar = (torch.randn(3000, 128, device=cuda) for _ in range(2))
    rng = torch.tensor([9, 4], device=cuda)
    expected = vk.sample_kl(mu, logvar, free_bits=0.5, rng=rng)
    for _ in range(20):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            result = vk.sample_kl(mu, logvar, free_bits=0.5, rng=rng, process_group=group)
            for a, b in zip(result, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
