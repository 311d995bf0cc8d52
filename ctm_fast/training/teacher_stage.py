"""The first stage: an EDM denoiser (arXiv 2206.00364)."""

import copy

import torch
from torch import Tensor

from ctm_fast.data import ImageDataset
from ctm_fast.diffusion.draws import draw_edm_sigmas
from ctm_fast.losses import dsm_loss
from ctm_fast.models import EDMDenoiser, build_network
from ctm_fast.ops import Stream
from ctm_fast.training.batches import Batches
from ctm_fast.training.config import RunConfig, TeacherConfig
from ctm_fast.training.ema import update_ema
from ctm_fast.training.regions import Regions
from ctm_fast.training.stage import Stage


class TeacherStage(Stage):
    """Denoising score matching at log-normal levels, Adam, EMA. What is kept is the EMA."""

    name = "teacher"
    settings: TeacherConfig
    model: EDMDenoiser

    def __init__(self, config: RunConfig, dataset: ImageDataset, device: torch.device, regions: Regions) -> None:
        self.config = config
        self.settings = config.teacher
        torch.manual_seed(config.stage_seed(self.name))
        self.model = EDMDenoiser(build_network(config.network, s_branch=False), config.sigma_data).to(device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.settings.lr, foreach=True)
        self.batches = Batches.of(config, self.name, self.settings.batch, dataset, device)
        self.denoise = regions.compile("denoiser, forward and backward", self.model.denoise)

    def train_step(self, step: int) -> dict[str, Tensor]:
        """One update; the mean loss, exactly 1 for a network that returns zero on data of variance sigma_data^2."""
        x0, labels = self.batches.at(step)
        sigmas = draw_edm_sigmas(
            self.settings.batch,
            seed=self.batches.seed,
            step=step,
            p_mean=self.settings.p_mean,
            p_std=self.settings.p_std,
        )
        sigma = self.batches.tensor(sigmas)
        x_t = x0 + sigma.view(-1, 1, 1, 1) * self.batches.noise(step, x0, Stream.TRAIN)
        loss = dsm_loss(self.denoise(x_t, sigma, labels), x0, sigma, sigma_data=self.config.sigma_data).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        update_ema(self.ema, self.model, self.settings.ema)
        return {"loss": loss.detach()}
