"""AdamW on float32 master weights, learning-rate schedules, and training states that resume exactly.

The model computes in its own dtype (bfloat16 or float32); what is *updated* is a float32 copy of each weight, because a step of
1e-5 relative size is below the resolution of bfloat16 (2^-8) and would be rounded away. Bytes per parameter with bfloat16
compute: 2 (weights) + 4 (gradients, summed in float32 over the micro-batches) + 4 (masters) + 8 (the two moments of Adam) = 18;
with float32 compute a weight is its own master and its own gradient sum: 16. The last 12 (masters and moments) may live on
another device. Of a sharded model (distributed.py) each rank updates its own rows, and its parameters are the masters: 16 / N.
"""

import math
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nano_atlas.distributed import gather_rows, own_part, own_rows, rank, size, sum_over_ranks
from nano_atlas.errors import UserError
from nano_atlas.runs import atomic_directory, read_json, write_json

CHUNK_ELEMENTS = (
    2**28
)  # parameters moved and updated at a time where the optimizer lives on another device: 1 GiB of float32
SHARD_BYTES = 2 * 10**9  # size of a file of a training state
SCHEDULES = ("cosine", "constant", "linear")


def learning_rate(step: int, total: int, peak: float, warmup_fraction: float, schedule: str) -> float:
    """The rate of optimizer step `step` (0 <= step < total).

    Linear warm-up over the first `warmup_fraction` of the steps, then cosine or linear decay that would reach 0 at step
    `total`, or constant. The first step already moves: warm-up counts from 1.
    """
    warmup = round(total * warmup_fraction)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress) if schedule == "linear" else peak


class MasterAdamW:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019), float32 state, and global-norm clipping.

    Matrices decay, vectors (norm weights, biases) do not. `state_device` holds masters and moments; by default each lives beside
    its parameter. Gradients of low-precision parameters are summed in float32: each
    backward pass hands its gradient over to the sum at once, so only one low-precision gradient exists at a time and
    `parameter.grad` stays None.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        clip_norm: float = 1.0,
        state_device: torch.device | str | None = None,
    ):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # this rank's part of each; the parameters themselves where the model is not sharded
        self.weights = {name: own_part(p) for name, p in self.parameters.items()}
        self.masters = {name: _master(weight, state_device) for name, weight in self.weights.items()}
        self.gradient_sums: dict[str, Tensor] = {}  # name -> float32, of the low-precision parameters
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._hand_over(name, p))
        matrices = [master for master in self.masters.values() if master.ndim > 1]
        vectors = [master for master in self.masters.values() if master.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=betas, eps=eps, fused=True
        )
        self.clip_norm = clip_norm
        self.skipped_steps = 0

    def _hand_over(self, name: str, parameter: Tensor) -> None:
        if name in self.gradient_sums:
            self.gradient_sums[name] += parameter.grad
        else:
            self.gradient_sums[name] = parameter.grad.float()
        parameter.grad = None

    def _gradients(self) -> dict[str, Tensor]:
        """name -> float32 gradient of this step, for the parameters that took part in it."""
        own = {name: own_part(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        return {**own, **self.gradient_sums}

    @torch.no_grad()
    def step(self, rate: float) -> float:
        """Update with the gradients summed since the last step, clear them, and return their norm before clipping.

        A gradient that is not finite changes nothing: the step is skipped and counted in `skipped_steps`.
        """
        gradients = self._gradients()
        if not gradients:
            raise RuntimeError("step() without a backward pass before it")
        norm = float(torch.nn.utils.get_total_norm(list(gradients.values()), foreach=True))
        if size() > 1:
            norm = float(sum_over_ranks(torch.tensor(norm**2, dtype=torch.float64))) ** 0.5
        if math.isfinite(norm):
            if norm > self.clip_norm:
                torch._foreach_mul_(list(gradients.values()), self.clip_norm / norm)
            for group in self.adamw.param_groups:
                group["lr"] = rate
            for names in self._chunks(gradients):
                self._update(names, gradients)
        else:
            self.skipped_steps += 1
        self.clear_gradients()
        return norm

    def _chunks(self, gradients: Mapping[str, Tensor]) -> Iterable[list[str]]:
        chunk: list[str] = []
        size = 0
        for name in gradients:
            count = self.parameters[name].numel()
            if chunk and size + count > CHUNK_ELEMENTS:
                yield chunk
                chunk, size = [], 0
            chunk.append(name)
            size += count
        yield chunk

    def _update(self, names: list[str], gradients: Mapping[str, Tensor]) -> None:
        for master in self.masters.values():
            master.grad = None  # torch's AdamW leaves a parameter without a gradient alone
        for name in names:
            self.masters[name].grad = gradients[name].to(self.masters[name].device)
        self.adamw.step()
        for name in names:
            if self.masters[name] is not self.weights[name]:
                self.weights[name].copy_(self.masters[name])

    def clear_gradients(self) -> None:
        self.gradient_sums.clear()
        for tensor in (*self.parameters.values(), *self.masters.values()):
            tensor.grad = None

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that the next step depends on, as `{parameter name}.{master|step|exp_avg|exp_avg_sq}`, float32.

        Whole tensors, one at a time, which all ranks gather together.
        """
        for name, master in self.masters.items():
            for kind, value in {"master": master.detach(), **self.adamw.state[master]}.items():
                yield (
                    f"{name}.{kind}",
                    value if kind == "step" else gather_rows(value, len(self.parameters[name])),
                )

    @torch.no_grad()
    def load_state_tensor(self, key: str, value: Tensor) -> None:
        """Take over one tensor of `state_tensors()`; a master also sets the model's weight. Raises KeyError if unknown."""
        name, _, kind = key.rpartition(".")
        master = self.masters[name]
        if kind != "step":
            value = own_rows(value)
        if kind == "master":
            master.copy_(value)
            if master is not self.weights[name]:
                self.weights[name].copy_(master)
        else:
            self.adamw.state[master][kind] = value.to(master.device, copy=True)


def _master(parameter: nn.Parameter, device: torch.device | str | None) -> nn.Parameter:
    device = torch.device(device) if device is not None else parameter.device
    if parameter.dtype == torch.float32 and parameter.device == device:
        return parameter
    return nn.Parameter(parameter.detach().to(device, torch.float32))


# ---------------------------------------------------------------------------------------------------- training states


def save_training_state(
    root: Path, optimizer: MasterAdamW, step: int, extra: Mapping[str, Any], keep: int = 1
) -> Path:
    """Write `root/step-00000120/` (safetensors and state.json) and delete all but the newest `keep` states.

    The directory appears under its name only when it is complete, so an interrupted save leaves the one before. The masters are
    the model's weights, so there is no second copy of them; and no state of a random generator is stored, because every draw of
    training comes from a seed derived from (seed, step).
    """
    target = Path(root) / f"step-{step:08d}"
    tensors = optimizer.state_tensors()
    if rank() == 0:
        with atomic_directory(target) as folder:
            for number, run in enumerate(_runs(tensors)):
                save_file(run, folder / f"state-{number:05d}.safetensors")
            write_json(
                folder / "state.json", {"step": step, "skipped_steps": optimizer.skipped_steps, **extra}
            )
        for old in _states(root)[:-keep]:
            shutil.rmtree(old)
    deque(tensors, maxlen=0)  # the other ranks take part in gathering
    return target


def _runs(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Tensors in host memory, of SHARD_BYTES together (a larger one alone)."""
    run: dict[str, Tensor] = {}
    for key, tensor in tensors:
        if run and sum(t.nbytes for t in run.values()) + tensor.nbytes > SHARD_BYTES:
            yield run
            run = {}
        run[key] = tensor.cpu().contiguous()
    yield run


def _states(root: Path) -> list[Path]:
    return sorted(path for path in Path(root).glob("step-*") if path.is_dir())


def latest_training_state(root: Path) -> Path | None:
    """The newest complete state under `root`, or None."""
    states = _states(root)
    return states[-1] if states else None


def load_training_state(state: Path, optimizer: MasterAdamW) -> dict[str, Any]:
    """Restore optimizer and model weights bit for bit; returns state.json: `step`, `skipped_steps` and the saved `extra`.

    Raises UserError naming the tensor or file that is missing, unknown or of another shape.
    """
    remedy = "the state belongs to another model or is damaged; use --restart to start over"
    expected = {f"{name}.master": tuple(parameter.shape) for name, parameter in optimizer.parameters.items()}
    try:
        record = read_json(state / "state.json")
        for path in sorted(state.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    shape = tuple(file.get_slice(key).get_shape())
                    if expected.pop(key, shape) != shape:
                        raise UserError(f"{path}: {key} has shape {list(shape)}; {remedy}")
                    optimizer.load_state_tensor(key, file.get_tensor(key))
    except KeyError as error:
        raise UserError(f"{path}: unknown tensor for {error}; {remedy}") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{state}: {error}; {remedy}") from None
    if expected:
        raise UserError(f"{state}: missing {', '.join(sorted(expected)[:3])}; {remedy}")
    optimizer.skipped_steps = record["skipped_steps"]
    return record
