"""What the sections of gpu.py measure with: a process of their own, a clock, and one record per measurement.

Nothing here or in a section imports torch before it is needed: the next section's process loads what it
needs while it waits.
"""

import gc
import importlib
import json
import math
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.bench_loss import memory
from nano_atlas.model import ModelConfig, Transformer

RUNNING, NO_TIME = "did not return", "no time"
SELF = "the section itself"  # the name of a record about what lies between measurements
ONLY_ON_GPU = "only on a GPU"


class NotHere(Exception):
    """What is not measured on this machine, and why; no failure."""


class Probe:
    """One section's clock and records. A measurement that raises costs its own record and no other."""

    def __init__(self, section: str, stream: Path, seconds: float, options: Any, done=()):
        self.section, self.stream, self.options, self.done = section, stream, options, set(done)
        self.deadline = time.monotonic() + seconds
        self.device, self.is_small = options.device, options.device == "cpu"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def measure(self, name: str, call: Callable, *arguments: Any, **known: Any) -> Any:
        """Record what `call(*arguments)` measures, a dictionary, together with `known`."""
        if name in self.done:  # by a process of this section that is no more
            return
        if self.left() <= 0:
            self.write(name, known | {"note": NO_TIME})
            return
        self.write(name, known | {"error": RUNNING})  # what stays if this process dies now
        started, found = time.perf_counter(), {}
        try:
            found = call(*arguments) | {"seconds": time.perf_counter() - started}
        except NotHere as reason:
            found = {"note": str(reason)}
        except Exception as error:
            traceback.print_exc()  # to the log
            said = (str(error).strip().splitlines() or [""])[0]
            found = {"error": f"{type(error).__name__}: {said}"[:300]}
        self.write(name, known | found)
        gc.collect()
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except (
                RuntimeError
            ):  # an illegal access ends all that this process can do; the driver starts another
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """The last record of a name counts."""
        line = {"section": self.section, "name": name}
        for key, value in values.items():
            if isinstance(value, float):
                value = float(f"{value:.5g}") if math.isfinite(value) else str(value)
            line[key] = value
        with self.stream.open("a") as file:
            file.write(json.dumps(line) + "\n")


def work(section, function: str, imports, stream: Path, log: Path, options, done, gate: Connection) -> None:
    """A section's process: load, wait at the gate for its seconds, measure. function: "module:name"."""
    os.setsid()  # the driver ends it with all that it started
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    print(f"---- {section}", flush=True)
    module, name = function.split(":")
    call = getattr(importlib.import_module(module), name)
    for extra in imports:
        try:
            importlib.import_module(extra)
        except Exception as error:  # whoever uses it reports it
            print(f"{extra}: {error!r}")
    tqdm.set_lock(
        threading.RLock()
    )  # the usual one lies in shared memory, and is missed when we end as below
    gate.send("ready")
    probe = Probe(section, stream, gate.recv(), options, done)
    try:
        call(probe)
    except Exception as error:
        traceback.print_exc()
        probe.write(SELF, {"error": f"{type(error).__name__}: {error}"[:300]})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # an orderly end of CUDA and of compilers takes seconds


def milliseconds(device: str, call: Callable[[], Any]) -> float:
    if device == "cpu":
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def timed(device: str, call: Callable[[], Any], repeats: int = 10, warmups: int = 2) -> dict[str, float]:
    """Median time of a call, and its peak memory over what was there before; warm-ups are not counted."""
    repeats, warmups = (2, 1) if device == "cpu" else (repeats, warmups)
    for _ in range(warmups):
        call()
    gc.collect()
    before = memory(device, is_start=True)
    call()
    extra = memory(device, is_start=False) - before
    times = [milliseconds(device, call) for _ in range(repeats)]
    return {"ms": statistics.median(times), "extra_gb": extra / 1e9}


def relative_error(found: Tensor, right: Tensor) -> float:
    """norm(found - right) / norm(right), in float64 on the CPU; NaN where anything is."""
    found, right = (x.detach().to("cpu", torch.float64).flatten() for x in (found, right))
    return ((found - right).norm() / right.norm()).item()


def compared(parts: Mapping[str, tuple[Any, Any]], bound: float, **bounds: float) -> dict[str, Any]:
    """Relative errors of pairs (found, right): the record has the one nearest to its bound. NaN never passes.

    bounds: those of some parts, where they differ.
    """
    errors = {name: relative_error(*map(torch.as_tensor, pair)) for name, pair in parts.items()}
    limits = dict.fromkeys(parts, bound) | bounds
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name] / limits[name]))
    is_right = all(errors[name] <= limits[name] for name in parts)
    return {"relative_error": errors[worst], "of": worst, "bound": limits[worst], "ok": is_right}


@torch.no_grad()
def random_model(shape: ModelConfig, device: str, dtype: torch.dtype, seed: int = 0) -> Transformer:
    """A model made where it is needed, because `pretrain.initialize` would take a minute.

    Its logits have a deviation of about 1.
    """
    with torch.device("meta"):
        model = Transformer(shape).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        is_matrix = parameter.ndim > 1
        mean, std = (0.0, parameter.shape[-1] ** -0.5) if is_matrix else (1.0, 0.1)
        parameter.normal_(mean, std, generator=generator)
    return model
