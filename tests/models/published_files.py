"""Valid files of every format that is read, made the way their publishers made them."""

import io
import pickle
import struct
import sys
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HOSTILE_SOURCE = "raise SystemExit('the source in a pickle was run')\n"
"""Stands where EDM's pickles hold the source of a class; never run."""


def save_zip(tensors: Mapping[str, Tensor], path: Path) -> None:
    """As torch.save writes it now."""
    torch.save(OrderedDict(tensors), path)


def save_legacy(tensors: Mapping[str, Tensor], path: Path) -> None:
    """As torch.save wrote it before 1.6."""
    torch.save(OrderedDict(tensors), path, _use_new_zipfile_serialization=False)


def save_tar(tensors: Mapping[str, Tensor], path: Path) -> None:
    """As torch.save wrote it in 2017; the code is gone, torch.load still reads it."""
    storages, views = io.BytesIO(), io.BytesIO()
    roots = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors.values()}
    pickle.dump(len(roots), storages, 2)
    for key, tensor in roots.items():
        pickle.dump((key, "cpu", _storage_type(tensor.dtype)), storages, 2)
        elements = torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage())
        storages.write(struct.pack("<q", elements.numel()) + _bytes(elements))
    pickle.dump([], storages, 2)
    pickle.dump(len(tensors), views, 2)
    for key, tensor in enumerate(tensors.values()):
        kind = tensor.type()  # "torch.FloatTensor": a class
        pickle.dump((key, tensor.untyped_storage().data_ptr(), getattr(torch, kind.removeprefix("torch."))), views, 2)
        views.write(struct.pack("<ii", tensor.dim(), 0))
        numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
        views.write(struct.pack(f"<{len(numbers)}q", *numbers))
    keys = {id(tensor): str(key) for key, tensor in enumerate(tensors.values())}

    class Pickler(pickle._Pickler):  # the one in C asks for the ids of all strings, too
        def persistent_id(self, value: Any) -> str | None:
            return keys[id(value)] if isinstance(value, Tensor) else None

    names = io.BytesIO()
    Pickler(names, 2).dump(OrderedDict(tensors))
    system = pickle.dumps({"protocol_version": 1000, "little_endian": True, "type_sizes": {"short": 2}}, 2)
    members = {"sys_info": system, "pickle": names.getvalue(), "tensors": views.getvalue()}
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, content in {**members, "storages": storages.getvalue()}.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5e9 + 0.25  # a fraction, which PAX writes into a header of its own
            archive.addfile(info, io.BytesIO(content))


def save_edm(
    tensors: Mapping[str, Tensor],
    path: Path,
    meta: Mapping[str, Any],
    *,
    precond: str = "EDMPrecond",
    conv: str = "Conv2d",
    protocol: int = 4,
) -> None:
    """As EDM's training wrote a network of those tensors; ``meta`` is that of a golden file."""
    with edm_classes() as classes:
        sizes = {key: meta[key] for key in ("img_resolution", "img_channels", "label_dim")}
        top = classes[precond](**sizes, **meta["network"])
        vars(top).update({**sizes, "sigma_data": meta["sigma_data"], "sigma_min": 0, "sigma_max": float("inf")})
        for name, tensor in tensors.items():
            *path_to, leaf = name.split(".")
            module: nn.Module = top
            for depth, part in enumerate(path_to):
                if part not in module._modules:
                    module._modules[part] = _module(classes, meta, conv, path_to[: depth + 1])
                module = module._modules[part]
            if leaf in ("weight", "bias"):
                module.register_parameter(leaf, nn.Parameter(tensor))
            else:
                module.register_buffer(leaf, tensor)
        loss = classes["EDMLoss"]()
        loss.P_mean = -1.2
        data = {"ema": top, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": classes["EasyDict"](path="a.zip")}
        with path.open("wb") as file:
            pickle.dump(data, file, protocol)


@contextmanager
def edm_classes() -> Iterator[dict[str, Any]]:
    """Classes that are pickled as those of EDM are, while its modules seem to be there."""
    names = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    modules = {name: ModuleType(name) for name in names}

    def reconstruct(meta: dict[str, Any]) -> Any:
        return meta["state"]

    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = reconstruct  # type: ignore[attr-defined]
    easy_dict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    modules["dnnlib.util"].EasyDict = easy_dict  # type: ignore[attr-defined]

    class Persistent:
        def __init__(self, **arguments: Any) -> None:
            super().__init__()
            self._init_args: tuple[Any, ...] = ()
            self._init_kwargs = arguments

        def __reduce__(self) -> Any:
            meta = {"type": "class", "version": 6, "module_src": HOSTILE_SOURCE, "class_name": type(self).__name__}
            return reconstruct, ({**meta, "state": self.__dict__},), None

    def module(name: str) -> type:
        return type(name, (Persistent, nn.Module), {})

    networks = ("SongUNet", "DhariwalUNet", "UNetBlock", "Linear", "Conv2d", "MPConv", "Block")
    classes = {name: module(name) for name in ("EDMPrecond", "VPPrecond", "Precond", *networks)}
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(modules)
    try:
        yield {**classes, "EDMLoss": type("EDMLoss", (Persistent,), {}), "EasyDict": easy_dict}
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old


def _module(classes: Mapping[str, Any], meta: Mapping[str, Any], conv: str, path: list[str]) -> Any:
    """What EDM has at that place: the network, its two dictionaries of blocks, blocks, layers."""
    if path == ["model"]:
        given = {key: value for key, value in meta["network"].items() if key != "model_type"}
        sizes = {"img_resolution": meta["img_resolution"], "label_dim": meta["label_dim"]}
        channels = {"in_channels": meta["img_channels"], "out_channels": meta["img_channels"]}
        return classes[meta["network"]["model_type"]](**sizes, **channels, **given)
    if path[-1] in ("enc", "dec"):
        return nn.ModuleDict()
    if "_block" in path[-1]:
        return classes["UNetBlock"](skip_scale=np.sqrt(0.5), init={"init_mode": "xavier_uniform"})
    return classes[conv]()


def _storage_type(dtype: torch.dtype) -> type:
    """``torch.FloatStorage``, ...: what the pickles call a dtype."""
    kind: type = getattr(torch, torch.storage._dtype_to_storage_type_map()[dtype])
    return kind


def _bytes(tensor: Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()
