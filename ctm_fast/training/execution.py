"""How a run is executed, as far as that leaves its result alone: where, on how many ranks, in what pieces."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ctm_fast.distributed import Ranks
from ctm_fast.errors import ConfigError


@dataclass(frozen=True)
class Execution:
    """Device, ranks, micro-batches, compilation.

    Args:
        micro_batch: samples that go through the network at once on a rank; None: the rank's whole share of a batch.
        compile: whether the regions that pay are compiled.
        fsdp: whether the networks' blocks are sharded over the ranks, or all ranks have all of them.
        checkpoint_blocks: whether activations inside blocks are made again in the backward pass, to save their memory.

    Raises ConfigError for what is out of range or does not go together.
    """

    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)
    micro_batch: int | None = None
    compile: bool = False
    fsdp: bool = False
    checkpoint_blocks: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ConfigError(f"--micro-batch: expected a positive number, got {self.micro_batch}")
        if self.fsdp and self.compile:
            raise ConfigError("--parallel: expected ddp with --compile, got fsdp")

    @property
    def options(self) -> dict[str, Any]:
        """What must be the same on every rank, by the names of the command line."""
        return {
            "--micro-batch": self.micro_batch,
            "--compile": self.compile,
            "--parallel": "fsdp" if self.fsdp else "ddp",
            "--checkpoint-blocks": self.checkpoint_blocks,
        }

    def pieces(self, batch: int) -> list[slice]:
        """The positions in a batch of this rank's micro-batches; ConfigError where the ranks do not share it evenly."""
        share = self.ranks.share(batch)
        size = self.micro_batch or batch
        return [slice(i, min(i + size, share.stop)) for i in range(share.start, share.stop, size)]
