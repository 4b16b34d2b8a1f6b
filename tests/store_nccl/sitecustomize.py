"""A machine without GPUs as far as vLLM's NCCL weight transfer is concerned: broadcasts go through the rendezvous store of the same
group, and streams wait for nothing. Python imports this at the start of a process that has this directory in PYTHONPATH.

Engine and worker are forked, as vLLM does on GPUs, and the model's class is inspected where it is needed, not in a process of its
own: each import of torch and vLLM that this saves takes ten seconds.
"""

import contextlib
import importlib.abc
import importlib.machinery
import multiprocessing
import sys


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


REPLACEMENTS = {
    "vllm.distributed.device_communicators.pynccl": replacements,
    "vllm.model_executor.models.registry": lambda module: [
        (module, "_run_in_subprocess", lambda call: call())
    ],
}


class Patch(importlib.abc.MetaPathFinder):
    """Replaces them as soon as vLLM imports these modules."""

    def find_spec(self, name, path, target=None):
        if name not in REPLACEMENTS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            for replacement in REPLACEMENTS[name](module):
                setattr(*replacement)

        spec.loader.exec_module = exec_module
        return spec


if __name__ == "sitecustomize":
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: context("fork" if method == "spawn" else method)
    sys.meta_path.insert(0, Patch())
