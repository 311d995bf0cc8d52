"""The presets: everything a run needs, one table."""

from ctm_fast.errors import ConfigError
from ctm_fast.models import NetworkConfig
from ctm_fast.training.config import CTMConfig, DataConfig, RunConfig, TeacherConfig, nearest

PRESETS: dict[str, RunConfig] = {
    "digits": RunConfig(
        preset="digits",
        sigma_data=0.75,
        data=DataConfig(source="digits"),
        network=NetworkConfig(
            img_resolution=8,
            img_channels=1,
            label_dim=10,
            model_channels=32,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(),
            dropout=0.0,
        ),
        snapshot_every=100,
        teacher=TeacherConfig(steps=1000, batch=128, lr=1e-3, ema=0.995),
        ctm=CTMConfig(steps=400, batch=64, lr=1e-3, lr_decay=True, ema=0.98, points=8, max_solver_steps=7),
    ),
    "fashion-mnist-16": RunConfig(
        preset="fashion-mnist-16",
        sigma_data=0.6,
        data=DataConfig(source="fashion-mnist", flip=True),
        network=NetworkConfig(
            img_resolution=16,
            img_channels=1,
            label_dim=10,
            model_channels=32,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(8,),
            dropout=0.0,
        ),
        teacher=TeacherConfig(steps=4000, batch=128, lr=1e-3, ema=0.998),
        ctm=CTMConfig(steps=2000, batch=64, lr=1e-3, lr_decay=True, ema=0.998, points=10, max_solver_steps=9),
    ),
}


def preset(name: str) -> RunConfig:
    """The preset ``name``; ConfigError naming the nearest one if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"preset: unknown {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]
