"""The presets: everything a run needs, in tables of networks, of stages and of runs.

``cifar10-*`` and ``imagenet64`` are the published settings (EDM, arXiv 2206.00364; CTM, arXiv 2310.02279) without EDM's
augmentations and the warm-up of its rate and its average. No run of this package has been made at them. They and
``fashion-mnist-32`` are for GPUs and compute in bf16, a solver's teacher too, which is faster and no longer exact.
"""

from dataclasses import replace

from ctm_fast.errors import ConfigError
from ctm_fast.models import NETWORKS, NetworkConfig
from ctm_fast.training.config import CTMConfig, DataConfig, GANConfig, RunConfig, TeacherConfig, nearest

# Tables are to be read by column.
# fmt: off

# Networks. CTM's students of ImageNet have no dropout; EDM's teacher had 0.1.
_CIFAR10_COND   = replace(NETWORKS["cifar10-ddpmpp"], label_dim=10)
_CIFAR10_UNCOND = NETWORKS["cifar10-ddpmpp"]
_IMAGENET64     = NETWORKS["imagenet64-adm"]
_FASHION_32     = replace(NETWORKS["cifar10-ddpmpp"], img_channels=1, label_dim=10, model_channels=96)
_FASHION_16     = NetworkConfig(img_resolution=16, img_channels=1, label_dim=10, model_channels=32, channel_mult=(1, 2),
                                num_blocks=1, attn_resolutions=(8,), dropout=0.0)
_DIGITS         = replace(_FASHION_16, img_resolution=8, attn_resolutions=())

# EDM's averages are told by their half-lives: 0.5 million images on CIFAR-10, 50 million on ImageNet.
_CIFAR10_TEACHER    = TeacherConfig(steps=390_625, batch=512,  lr=1e-3, ema=0.5 ** (512 / 0.5e6))
_IMAGENET64_TEACHER = TeacherConfig(steps=610_352, batch=4096, lr=1e-4, ema=0.5 ** (4096 / 50e6))
_FASHION_32_TEACHER = TeacherConfig(steps=10_000,  batch=256,  lr=1e-3, ema=0.999)
_FASHION_16_TEACHER = TeacherConfig(steps=4_000,   batch=128,  lr=1e-3, ema=0.998)
_DIGITS_TEACHER     = TeacherConfig(steps=1_000,   batch=128,  lr=1e-3, ema=0.995)

# points is N and max_solver_steps M. The last of ImageNet's further averages is as slow as its teacher's.
_CIFAR10_EMAS, _IMAGENET64_EMAS = ("0.9999",), ("0.9999", "0.999943218995")
_LPIPS = CTMConfig(distance="lpips", vgg16="vgg16-397923af.pth", solver_precision="bf16")
_HUBER = CTMConfig(distance="pseudo-huber", lr_decay=True)
_CIFAR10_COND_CTM   = replace(_LPIPS, steps=50_000, batch=256,  lr=4e-4, ema=0.999, points=18, max_solver_steps=17,
                              emas=_CIFAR10_EMAS)
_CIFAR10_UNCOND_CTM = replace(_LPIPS, steps=50_000, batch=384,  lr=4e-4, ema=0.999, points=18, max_solver_steps=17,
                              emas=_CIFAR10_EMAS)
_IMAGENET64_CTM     = replace(_LPIPS, steps=30_000, batch=1440, lr=4e-4, ema=0.999, points=40, max_solver_steps=39,
                              emas=_IMAGENET64_EMAS, adaptive_layer="block")
_FASHION_32_CTM     = replace(_HUBER, steps=3_000,  batch=256,  lr=4e-4, ema=0.999, points=18, max_solver_steps=8,
                              solver_precision="bf16")
_FASHION_16_CTM     = replace(_HUBER, steps=2_000,  batch=64,   lr=1e-3, ema=0.998, points=10, max_solver_steps=9)
_DIGITS_CTM         = replace(_HUBER, steps=400,    batch=64,   lr=1e-3, ema=0.98,  points=8,  max_solver_steps=7)
_DIGITS_CM          = replace(_DIGITS_CTM, s_strategy="smallest", target_inner="target-sg", dsm_weight=0.0)

# Every second step moves the discriminator. On CIFAR-10 without labels the target is slow, and what was published of it
# is the faster average.
_BOTH = GANConfig(**vars(_LPIPS), features=("efflite0", "deit"), deit="deit_base_distilled_patch16_224-df68dfff.pth")
_CIFAR10_COND_GAN   = replace(_BOTH,  steps=30_000, batch=528,  lr=4e-4, ema=0.999,  points=18, max_solver_steps=17,
                              emas=_CIFAR10_EMAS)
_CIFAR10_UNCOND_GAN = replace(_BOTH,  steps=30_000, batch=528,  lr=4e-4, ema=0.9999, points=18, max_solver_steps=17,
                              emas=("0.999",))
_IMAGENET64_GAN     = replace(_BOTH,  steps=30_000, batch=4224, lr=8e-6, ema=0.999,  points=40, max_solver_steps=20,
                              emas=_IMAGENET64_EMAS, adaptive_layer="block")
_FASHION_32_GAN     = GANConfig(**vars(replace(_FASHION_32_CTM, steps=2_000, lr=1e-4)), features=("efflite0",))
_DIGITS_GAN         = GANConfig(**vars(replace(_DIGITS_CTM, steps=400, lr=2e-4)), features=("indomain",),
                                features_size=16, discriminator_width=16)

_BOTH_STAGES, _ALL_STAGES = ("teacher", "ctm"), ("teacher", "ctm", "gan")
_CIFAR10 = "cifar-10-python.tar.gz"
_ROWS = (
    RunConfig("cifar10-cond",     stages=_ALL_STAGES,  precision="bf16", sigma_data=0.5,  network=_CIFAR10_COND,
              data=DataConfig(_CIFAR10, flip=True), snapshot_every=5_000,
              teacher=_CIFAR10_TEACHER, ctm=_CIFAR10_COND_CTM, gan=_CIFAR10_COND_GAN),
    RunConfig("cifar10-uncond",   stages=_ALL_STAGES,  precision="bf16", sigma_data=0.5,  network=_CIFAR10_UNCOND,
              data=DataConfig(_CIFAR10, conditional=False, flip=True), snapshot_every=5_000,
              teacher=_CIFAR10_TEACHER, ctm=_CIFAR10_UNCOND_CTM, gan=_CIFAR10_UNCOND_GAN),
    RunConfig("imagenet64",       stages=_ALL_STAGES,  precision="bf16", sigma_data=0.5,  network=_IMAGENET64,
              data=DataConfig("imagenet-64x64.zip", flip=True), snapshot_every=1_000,
              teacher=_IMAGENET64_TEACHER, ctm=_IMAGENET64_CTM, gan=_IMAGENET64_GAN),
    RunConfig("fashion-mnist-32", stages=_BOTH_STAGES, precision="bf16", sigma_data=0.66, network=_FASHION_32,
              data=DataConfig("fashion-mnist", flip=True),
              teacher=_FASHION_32_TEACHER, ctm=_FASHION_32_CTM, gan=_FASHION_32_GAN),
    RunConfig("fashion-mnist-16", stages=_BOTH_STAGES, precision="auto", sigma_data=0.6,  network=_FASHION_16,
              data=DataConfig("fashion-mnist", flip=True),
              teacher=_FASHION_16_TEACHER, ctm=_FASHION_16_CTM),
    RunConfig("digits",           stages=_BOTH_STAGES, precision="auto", sigma_data=0.75, network=_DIGITS,
              data=DataConfig("digits"), snapshot_every=100,
              teacher=_DIGITS_TEACHER, ctm=_DIGITS_CTM, gan=_DIGITS_GAN),
    RunConfig("digits-gan",       stages=_ALL_STAGES,  precision="auto", sigma_data=0.75, network=_DIGITS,
              data=DataConfig("digits"), snapshot_every=100,
              teacher=_DIGITS_TEACHER, ctm=_DIGITS_CTM, gan=_DIGITS_GAN),
    RunConfig("digits-cm",        stages=_BOTH_STAGES, precision="auto", sigma_data=0.75, network=_DIGITS,
              data=DataConfig("digits"), snapshot_every=100,
              teacher=_DIGITS_TEACHER, ctm=_DIGITS_CM),
)
# fmt: on

PRESETS: dict[str, RunConfig] = {row.preset: row for row in _ROWS}


def preset(name: str) -> RunConfig:
    """The preset ``name``; ConfigError naming the nearest one if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"preset: unknown {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]
