"""Pickles of the structure of EDM's checkpoints, made without its code: classes of the names that
EDM's have, in modules that are there only while something is pickled."""

import contextlib
import json
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

FIXTURES = Path(__file__).parent / "fixtures" / "edm"
BUFFERS = ("resample_filter", "freqs")


def _reconstruct_persistent_obj(meta):
    """What the original does first: it executes the source."""
    exec(meta["module_src"], {})


class EasyDict(dict):
    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@contextlib.contextmanager
def original_modules():
    """Modules in which pickle finds the two by the names that EDM gives them."""
    homes = {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict}
    for home, value in homes.items():
        package, module = home.split(".")[0], types.ModuleType(home)
        setattr(module, value.__name__, value)
        value.__module__, value.__qualname__ = home, value.__name__
        sys.modules |= {package: types.ModuleType(package), home: module}
    try:
        yield
    finally:
        for home in homes:
            del sys.modules[home], sys.modules[home.split(".")[0]]


class Persistent:
    """Pickled as an object of a `persistent_class`, with source that comes along."""

    def __init__(self, class_name, state, source=""):
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": class_name,
            "state": state,
        }

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,), None, None, None


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def dumps(value, protocol=4):
    with original_modules():
        return pickle.dumps(value, protocol)


def loads(data):
    """The ordinary way, which runs what the pickle wants."""
    with original_modules():
        return pickle.loads(data)


def module_state(parameters=(), buffers=(), modules=(), **attributes):
    """`__dict__` of a torch module."""
    return {
        "training": False,
        "_parameters": OrderedDict(parameters),
        "_buffers": OrderedDict(buffers),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": OrderedDict(),
        "_modules": OrderedDict(modules),
        **attributes,
    }


def network(tensors, arguments, class_name="EDMPrecond"):
    """An EDMPrecond with these parameters and buffers: persistent modules in two ModuleDicts."""
    return _module(tensors, class_name, _init_args=(), _init_kwargs=EasyDict(arguments))


def _module(tensors, class_name, **attributes):
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    children = dict.fromkeys(name.split(".")[0] for name in tensors if "." in name)
    modules = {}
    for child in children:
        inside = {n[len(child) + 1 :]: t for n, t in tensors.items() if n.startswith(f"{child}.")}
        if child in ("enc", "dec"):
            modules[child] = torch.nn.ModuleDict()
            modules[child]._modules |= _module(inside, "").meta["state"]["_modules"]
        else:
            scale = np.sqrt(0.5)  # UNetBlock keeps a numpy scalar
            modules[child] = _module(inside, "Layer", skip_scale=scale, sigma_max=float("inf"))
    state = module_state(
        parameters={n: torch.nn.Parameter(t) for n, t in own.items() if n not in BUFFERS}
        | {"absent": None},
        buffers={n: t for n, t in own.items() if n in BUFFERS},
        modules=modules,
        **attributes,
    )
    return Persistent(class_name, state)


def checkpoint(ema, **extra):
    """The dictionary that EDM pickles; `extra` goes into its dataset_kwargs."""
    return {
        "ema": ema,
        "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2, "P_std": np.float32(1.2)}),
        "augment_pipe": Persistent("AugmentPipe", {"p": 0.12, "xflip": np.int64(10**8)}),
        "dataset_kwargs": EasyDict({"path": "cifar10-32x32.zip", "use_labels": False} | extra),
    }


def tiny_network(**tensors):
    """A network of two small tensors, or of those given."""
    return network({"model.weight": torch.arange(6.0).view(2, 3)} | tensors, {})


def fixture(name):
    """Weights and constructor arguments of the original implementation."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        arguments = json.loads(file.metadata()["config"])
        tensors = {
            key.removeprefix("weights."): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118
            if key.startswith("weights.")
        }
    return tensors, arguments
