"""Sharded networks: two ranks with half a batch each do what one process does with the whole, and save it for any."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ctm_fast.distributed import Ranks, average_gradients
from ctm_fast.errors import CheckpointError
from ctm_fast.models import CTM, EDMDenoiser, NetworkConfig, build_network
from ctm_fast.training.averages import Averages
from ctm_fast.training.pullback import GradientStore, Pulled, forward_cut, pull_tail, walk_back
from ctm_fast.training.radam import RAdam
from ctm_fast.training.shard_files import load_shards, optimizer_tensors, save_shards
from ctm_fast.training.shard_manifest import check_shards, read_about
from ctm_fast.training.sharded import full_state_dict, parameter_groups, shard_blocks, split_parameters
from tests.ranks import in_ranks

BATCH = 4
STEPS = 3


class World:
    """Student, target and teacher of one seed, and the steps of a small job: CTM-like and DSM-like losses."""

    def __init__(self, ranks: Ranks, *, sharded: bool, seed: int = 0, checkpointing: bool = False) -> None:
        torch.manual_seed(seed)
        config = NetworkConfig(
            arch="ddpmpp", img_resolution=8, img_channels=1, label_dim=3, model_channels=16, channel_mult=(1, 2),
            num_blocks=1, attn_resolutions=(8,), dropout=0.0,
        )  # fmt: skip
        self.ranks = ranks
        self.student = CTM(build_network(config, s_branch=True))
        self.teacher = EDMDenoiser(build_network(config, s_branch=False)).requires_grad_(False)
        for parameter in [*self.student.parameters(), *self.teacher.parameters()]:
            nn.init.normal_(parameter, std=0.2)
        self.averages = Averages(self.student, ["0.9"])
        self.target = self.averages.model_of("0.9")
        if checkpointing:
            self.student.net.checkpoint_blocks()
        if sharded:
            for model in (self.student, self.target, self.teacher):
                shard_blocks(model.net)
        self.optimizer = RAdam(parameter_groups(self.student), lr=1e-3)

    def pull(self, step: int, positions: slice) -> dict[str, Pulled]:
        """Two losses of some samples, as shares of the means over a batch, walked back to the cuts."""
        generator = torch.Generator().manual_seed(step)
        x, y, noise = torch.randn(3, BATCH, 1, 8, 8, generator=generator)[:, positions].unbind()
        t, s = torch.tensor([[3.0, 1.0, 0.5, 2.0], [1.0, 0.002, 0.5, 0.3]])[:, positions].unbind()
        labels = torch.tensor([0, 2, 1, 1])[positions]
        net = self.student.net
        with torch.no_grad():
            x_u = self.teacher.denoise(x, t, labels)
            wanted = self.target.jump(self.student.jump(x_u, t, s, labels), s, s, labels)
        pulled = {}
        for name in ("ctm", "dsm"):
            forward = forward_cut(net.body, net.tail, x if name == "ctm" else y + noise, t, s, labels)
            # The target takes no gradient, its input does.
            F_x = self.target.jump(forward.F_x, t, s, labels) if name == "ctm" else forward.F_x
            loss = (F_x - (wanted if name == "ctm" else y)).square().flatten(1).mean(1).sum() * self.ranks.size / BATCH
            (grad_F,) = torch.autograd.grad(loss, forward.F_x)
            pulled[name] = pull_tail(forward, grad_F, net.tail_parameters())
        return pulled

    def step(self, step: int) -> None:
        """Odd steps take a share in two pieces, and weigh the losses after the last; others walk back once."""
        share = self.ranks.share(BATCH)
        tail = self.student.net.tail_parameters()
        self.optimizer.zero_grad()
        if step % 2:
            stores = {name: GradientStore(list(self.student.parameters())) for name in ("ctm", "dsm")}
            middle = (share.start + share.stop) // 2
            for positions in (slice(share.start, middle), slice(middle, share.stop)):
                for name, pulled in self.pull(step, positions).items():
                    with stores[name].collecting():
                        walk_back([pulled], [1.0], tail)
            for name, store in stores.items():
                store.release(torch.tensor(1.0 if name == "ctm" else 0.7))
        else:
            walk_back(list(self.pull(step, share).values()), [1.0, torch.tensor(0.7)], tail)
        average_gradients(split_parameters(self.student.parameters())[1])

    def gradients(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self.student.named_parameters():
            assert parameter.grad is not None, name
            found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        return {name: gradient.clone() for name, gradient in found.items()}

    def train(self) -> "World":
        for step in range(STEPS):
            self.step(step)
            self.optimizer.step()
            self.averages.update(step + 1)
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {
            **{f"model.{name}": tensor for name, tensor in self.student.state_dict().items()},
            **{f"average.{name}": tensor for name, tensor in self.target.state_dict().items()},
            **{f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.student, self.optimizer).items()},
        }

    def whole(self) -> dict[str, Tensor]:
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().contiguous()
            for name, tensor in self.tensors().items()
        }


def save_one(ranks: Ranks, directory: Path) -> dict[str, Any]:
    """A rank of two: gradients, with and without checkpointing; weights after some steps; saved."""
    world, checkpointed = (World(ranks, sharded=True, checkpointing=on) for on in (False, True))
    blocks = [parameter for name, parameter in world.student.named_parameters() if isinstance(parameter, DTensor)]
    local = sum(parameter.to_local().numel() for parameter in blocks)
    assert local < 0.6 * sum(parameter.numel() for parameter in blocks)
    found = []
    for step in (0, 1):
        gradients = []
        for one in (world, checkpointed):
            one.step(step)
            gradients.append(one.gradients())
        assert_close(gradients[1], gradients[0], 1e-5)
        found.append(gradients[0])
    assert all(parameter.grad is None for parameter in world.target.parameters())
    world.train()
    state = full_state_dict(world.student, ranks)
    assert bool(state) == ranks.is_first
    save_shards(directory / "state", world.tensors(), {"step": STEPS, "rank": ranks.rank})
    return {"gradients": found, "weights": world.whole(), "state": state}


def load_one(ranks: Ranks, directory: Path) -> dict[str, Tensor]:
    """A rank of any number, from other weights."""
    world = World(ranks, sharded=True, seed=5)
    load_shards(directory / "state", world.tensors())
    return world.whole()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("shards")
    return directory, in_ranks(save_one, 2, directory)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).abs().max()
        assert error <= tolerance * tensor.abs().max() + 1e-8, (name, error)


def test_two_ranks_have_the_gradients_of_one(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    """Of two passes walked back at once, and of two pieces with a store for each loss."""
    world = World(Ranks(), sharded=False)
    for step in (0, 1):
        world.step(step)
        for rank in saved[1]:
            assert_close(rank["gradients"][step], world.gradients(), 1e-5)


def test_two_ranks_take_the_steps_of_one(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    expected = World(Ranks(), sharded=False).train()
    for rank in saved[1]:
        assert_close(rank["weights"], expected.whole(), 1e-4)
        weights = {name: tensor for name, tensor in rank["weights"].items() if name.startswith(("model.", "average."))}
        assert_close(weights, {name: expected.whole()[name] for name in weights}, 1e-5)
    state = saved[1][0]["state"]
    for name, tensor in state.items():
        assert torch.equal(tensor, saved[1][0]["weights"][f"model.{name}"])
    expected.student.load_state_dict(state)


def test_one_process_loads_what_two_ranks_saved(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    """Without any group; and goes on as they would."""
    directory, ranks = saved
    world = World(Ranks(), sharded=False, seed=5)
    load_shards(directory / "state", world.tensors())
    for name, tensor in world.whole().items():
        assert torch.equal(tensor, ranks[0]["weights"][name]), name
    assert read_about(directory / "state") == {"step": STEPS, "rank": 0}
    assert {float(state["step"]) for state in world.optimizer.state.values()} == {STEPS}
    assert sorted(path.name for path in directory.iterdir() if path.name.startswith(".")) == []


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 4])
def test_ranks_load_what_two_saved(size: int, saved: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, ranks = saved
    for rank in in_ranks(load_one, size, directory):
        assert rank.keys() == ranks[0]["weights"].keys()
        for name, tensor in rank.items():
            assert torch.equal(tensor, ranks[0]["weights"][name]), name


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.RAdam, RAdam])
def test_an_optimizer_goes_on(make: Any, tmp_path: Path) -> None:
    """From its file as it would have; and from what was filled in before its first update, as it would start."""

    def update(model: nn.Linear, optimizer: torch.optim.Optimizer, step: int) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 + step)
        optimizer.step()

    torch.manual_seed(0)
    models = [nn.Linear(3, 2) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    optimizers = [make(model.parameters(), lr=0.01) for model in models]
    optimizer_tensors(models[1], optimizers[1])
    for step in range(8):
        if step == 4:
            save_shards(tmp_path / "state", optimizer_tensors(models[0], optimizers[0]), {})
            load_shards(tmp_path / "state", optimizer_tensors(models[2], optimizers[2]))
            models[2].load_state_dict(models[0].state_dict())
        for model, optimizer in list(zip(models, optimizers, strict=True))[: 3 if step >= 4 else 2]:
            update(model, optimizer, step)
    for model in models[1:]:
        for ours, expected in zip(model.parameters(), models[0].parameters(), strict=True):
            assert torch.equal(ours, expected)


def small() -> dict[str, Tensor]:
    return {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.int64)}


def test_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    save_shards(tmp_path / "one", small(), {})
    with pytest.raises(CheckpointError, match=r"one: could not be written: .*one"):
        save_shards(tmp_path / "one", small(), {})
    with pytest.raises(CheckpointError, match="could not be written: rank 0"):
        save_shards(tmp_path / "one" / "about.json" / "two", small(), {})
    read = {name: torch.zeros_like(tensor) for name, tensor in small().items()}
    load_shards(tmp_path / "one", read)
    assert all(torch.equal(read[name], tensor) for name, tensor in small().items())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("b", None, "b: expected none, got one"),
        ("c", torch.zeros(2), "c: expected one, got none"),
        ("a", torch.zeros(3, 3), r"a: expected torch.float32 \[3, 3\], got 6 elements of torch.float32 \[2, 3\]"),
        (
            "a",
            torch.zeros(2, 3).half(),
            r"a: expected torch.float16 \[2, 3\], got 6 elements of torch.float32 \[2, 3\]",
        ),
    ],
)
def test_of_another_model(name: str, tensor: Tensor | None, message: str, tmp_path: Path) -> None:
    save_shards(tmp_path / "state", small(), {})
    wanted = {name: torch.zeros_like(tensor) for name, tensor in small().items()}
    wanted.pop(name, None)
    if tensor is not None:
        wanted[name] = tensor
    with pytest.raises(CheckpointError, match=message):
        load_shards(tmp_path / "state", wanted)
    assert all(not tensor.any() for tensor in wanted.values())


def test_broken_files(saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="could not be read"):
        load_shards(tmp_path / "nothing", small())
    for read in (read_about, check_shards):
        with pytest.raises(CheckpointError, match="expected a checkpoint with about"):
            read(tmp_path / "nothing")
    world = World(Ranks(), sharded=False)
    files = sorted((saved[0] / "state").glob("*.safetensors"))
    assert len(files) == 2
    for absent in files:
        (tmp_path / absent.stem).mkdir()
        for file in files:
            if file != absent:
                (tmp_path / absent.stem / file.name).write_bytes(file.read_bytes())
        with pytest.raises(CheckpointError, match=r"expected torch.float32 .* elements of|expected one, got none"):
            load_shards(tmp_path / absent.stem, world.tensors())
    cut = tmp_path / files[0].stem / files[1].name
    cut.write_bytes(cut.read_bytes()[:-4])
    (tmp_path / files[0].stem / files[0].name).write_bytes(files[0].read_bytes())
    with pytest.raises(CheckpointError, match="could not be read"):
        load_shards(tmp_path / files[0].stem, world.tensors())


@pytest.mark.parametrize("file", ["shard", "about"])
def test_a_byte_that_is_another(file: str, tmp_path: Path) -> None:
    save_shards(tmp_path / "state", small(), {"step": 3})
    check_shards(tmp_path / "state")
    (path,) = (path for path in (tmp_path / "state").iterdir() if path.name.startswith(file))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if file == "about" else -5] ^= 255
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the checksum of shard-.* is wrong|expected a checkpoint with about"):
        check_shards(tmp_path / "state")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"could not be read|expected a checkpoint with about"):
        check_shards(tmp_path / "state")
