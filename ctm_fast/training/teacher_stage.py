"""The first stage: an EDM denoiser (arXiv 2206.00364)."""

import torch
from torch import Tensor

from ctm_fast.data import ImageDataset
from ctm_fast.diffusion.draws import draw_edm_sigmas
from ctm_fast.losses import dsm_loss
from ctm_fast.models import EDMDenoiser, build_network
from ctm_fast.ops import Stream
from ctm_fast.training.batches import Batches
from ctm_fast.training.config import RunConfig, TeacherConfig
from ctm_fast.training.execution import Execution
from ctm_fast.training.regions import Regions
from ctm_fast.training.stage import Stage
from ctm_fast.training.work import FORWARD_AND_BACKWARD


class TeacherStage(Stage):
    """Denoising score matching at log-normal levels, Adam, EMA. What is kept is the EMA."""

    name = "teacher"
    settings: TeacherConfig
    model: EDMDenoiser

    def __init__(self, config: RunConfig, dataset: ImageDataset, execution: Execution, regions: Regions) -> None:
        settings = config.teacher
        torch.manual_seed(config.stage_seed(self.name))
        net = build_network(config.network, s_branch=False)
        super().__init__(config, settings, EDMDenoiser(net, config.sigma_data), execution)
        self.optimizer = torch.optim.Adam(self.placement.groups(self.model), lr=settings.lr, fused=True)
        self.batches = Batches.of(config, self.name, settings.batch, dataset, execution.device)
        self.timer = regions.timer
        self.denoise = regions.compile("denoiser, forward and backward", self.model.denoise)

    def train_step(self, step: int) -> dict[str, Tensor]:
        """One update; the mean loss, exactly 1 for a network that returns zero on data of variance sigma_data^2."""
        settings, batches = self.settings, self.batches
        losses = []
        for positions in self.pieces:
            self.seed_dropout(step, positions)
            with self.timer("data"):
                x0, labels = batches.at(step, positions)
            sigma = batches.tensor(
                draw_edm_sigmas(positions, seed=batches.seed, step=step, p_mean=settings.p_mean, p_std=settings.p_std)
            )
            x_t = x0 + sigma.view(-1, 1, 1, 1) * batches.noise(step, x0, Stream.TRAIN, positions)
            loss = dsm_loss(self.denoise(x_t, sigma, labels), x0, sigma, sigma_data=self.config.sigma_data)
            self.scale(loss.sum() / self.share).backward()
            losses.append(loss.detach())
        self.passes += FORWARD_AND_BACKWARD * self.share
        return self.update(step, {"loss": torch.cat(losses).mean()})
