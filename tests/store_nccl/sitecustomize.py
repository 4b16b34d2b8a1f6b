"""A machine without GPUs as far as vLLM's NCCL weight transfer is concerned: broadcasts go through the rendezvous store of the same
group, and streams wait for nothing. Python imports this at the start of a process that has this directory in PYTHONPATH.

Engine and worker are forked, as vLLM does on GPUs: each import of torch and vLLM that this saves takes ten seconds.
"""

import contextlib
import importlib.abc
import importlib.machinery
import multiprocessing
import sys

PYNCCL = "vllm.distributed.device_communicators.pynccl"


class StoreCommunicator:
    """As much of PyNcclCommunicator as the transfer uses."""

    def __init__(self, group, device, **_):
        self.group = group

    def broadcast(self, tensor, src, stream=None):
        received = self.group.broadcast(tensor, src)
        if received is not tensor:
            tensor.copy_(received)


class Stream:
    def __init__(self, *_, **__):
        pass

    def synchronize(self):
        pass


def replacements(pynccl) -> list[tuple]:
    """(object, name, value): what takes NCCL's and CUDA's places."""
    import torch

    return [
        (pynccl, "PyNcclCommunicator", StoreCommunicator),
        (torch.accelerator, "current_device_index", lambda: 0),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
    ]


class Patch(importlib.abc.MetaPathFinder):
    """Replaces them as soon as vLLM imports its own wrapper of NCCL."""

    def find_spec(self, name, path, target=None):
        if name != PYNCCL:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            for replacement in replacements(module):
                setattr(*replacement)

        spec.loader.exec_module = exec_module
        return spec


if __name__ == "sitecustomize":
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: context("fork" if method == "spawn" else method)
    sys.meta_path.insert(0, Patch())
