"""AdamW on float32 master weights, learning-rate schedules, and training states that resume exactly.

A relative change of 1e-5 is below the resolution of bfloat16 (2^-8), so the optimizer updates a float32 copy
of each weight. Bytes per parameter with bfloat16 compute: 2 (weights) + 4 (gradients, summed in float32) + 4
(masters) + 8 (two moments) = 18. With float32 compute a weight is its own master: 16; sharded over N ranks,
16 / N on each. Masters and moments may be on another device.
"""

import math
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nano_atlas import distributed
from nano_atlas.checkpoint import in_shards
from nano_atlas.distributed import gather_rows, own_part, own_rows, rank
from nano_atlas.errors import UserError, say
from nano_atlas.runs import atomic_directory, read_json, strangers, write_json

SHARD_BYTES = 2 * 10**9  # size of a file of a training state
KEPT_STATES = 2  # on disk: the newest, and the one before in case the newest is damaged
MOST_SKIPPED = 3  # steps in a row whose gradients are not finite
DRY_STEP_ON = ("cuda",)  # devices whose memory is tight


def learning_rate(step: int, total: int, peak: float, warmup_fraction: float, schedule: str) -> float:
    """The rate of step `step` (0 <= step < total): linear warm-up, above 0 from the first step on; then
    `schedule`: "constant", or "cosine" decay that would reach 0 at step `total`.
    """
    warmup = round(total * warmup_fraction)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return peak * {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}[schedule]


class MasterAdamW:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019), float32 state, and clipping by the global norm.

    Only matrices decay. state_device: of masters and moments ("auto": each parameter's). Each gradient of a
    low-precision parameter is added to a float32 sum during the backward pass; `parameter.grad` stays None.
    """

    def __init__(self, model, betas=(0.9, 0.95), weight_decay=1e-4, clip_norm=1.0, state_device="auto"):
        self.clip_norm, self.skipped_steps, self.skipped_in_a_row = clip_norm, 0, 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: own_part(p) for name, p in self.parameters.items()}  # this rank's rows
        self.masters = {name: _master(weight, state_device) for name, weight in self.weights.items()}
        matrices = [master for master in self.masters.values() if master.ndim > 1]
        vectors = [master for master in self.masters.values() if master.ndim <= 1]
        groups = {"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, fused=True)
        for master in self.masters.values():  # allocated now, to run out of memory before the first step
            zeros = {kind: torch.zeros_like(master.detach()) for kind in ("exp_avg", "exp_avg_sq")}
            self.adamw.state[master] = {"step": torch.zeros((), device=master.device), **zeros}
        self.gradient_sums: dict[str, Tensor] = {}  # float32, of the low-precision parameters
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(partial(self._add_gradient, name))

    def _add_gradient(self, name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if name in self.gradient_sums:
            self.gradient_sums[name] += gradient
        else:
            self.gradient_sums[name] = gradient.float()

    @torch.no_grad()
    def step(self, rate: float) -> float:
        """Updates with the gradients summed since the last step, clears them, returns their norm before clipping.

        A step with a gradient that is not finite is skipped and counted; MOST_SKIPPED in a row raise UserError.
        """
        gradients = {name: own_part(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        gradients |= self.gradient_sums
        norm = float(torch.nn.utils.get_total_norm(list(gradients.values()), foreach=True))
        if distributed.size() > 1:
            square = torch.tensor(norm**2, dtype=torch.float64)
            norm = float(distributed.sum_over_ranks(square)) ** 0.5
        is_finite = math.isfinite(norm)
        self.skipped_steps += not is_finite
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MOST_SKIPPED:
            remedy = "lower --lr, or look for a damaged checkpoint or bad data; the saved state is older"
            raise UserError(f"{MOST_SKIPPED} steps in a row had gradients that are not finite; {remedy}")
        if is_finite and norm > self.clip_norm:
            torch._foreach_mul_(list(gradients.values()), self.clip_norm / norm)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        updates = [(self.masters[name], self.weights[name], g) for name, g in gradients.items()]
        is_near = all(master.device == gradient.device for master, _, gradient in updates)
        chunks = [updates] if is_near else [[one] for one in updates]  # to another device one at a time
        for some in chunks if is_finite else ():
            for master, _, gradient in some:
                master.grad = gradient.to(master.device)
            self.adamw.step()
            for master, weight, _ in some:
                master.grad = None
                weight.copy_(master)  # no effect if a weight is its own master
        self.clear_gradients()
        return norm

    def clear_gradients(self) -> None:
        self.gradient_sums.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    @contextmanager
    def dry_step(self, tokens: int) -> Iterator[None]:
        """Around a pass of the largest micro-batch, before step 1; drops its gradients. UserError: it does not fit."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            less = "lower --tokens-per-batch, or use --gradient-checkpointing or --optimizer-device cpu"
            cause = str(error).split(". ")[0]
            raise UserError(f"a micro-batch of {tokens:,} tokens does not fit ({cause}): {less}") from None
        self.clear_gradients()
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 1e9
            say(f"the longest micro-batch, {tokens:,} tokens, fits: {peak:.1f} GB at most so far")

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The whole state, `{parameter name}.{master|step|exp_avg|exp_avg_sq}`, float32, not sharded. Collective."""
        for name, master in self.masters.items():
            for kind, value in {"master": master.detach(), **self.adamw.state[master]}.items():
                whole = value if kind == "step" else gather_rows(value, len(self.parameters[name]))
                yield f"{name}.{kind}", whole

    @torch.no_grad()
    def load_state_tensor(self, key: str, value: Tensor) -> None:
        """Restores one of the `state_tensors()`; a master also sets the model's weight. Raises UserError."""
        name, _, kind = key.rpartition(".")
        is_step = kind == "step"  # a scalar; all others have the parameter's shape
        if name not in self.masters or not (is_step or value.shape == self.parameters[name].shape):
            raise UserError(f"{key} {list(value.shape)} does not fit this model")
        value = value if is_step else own_rows(value)
        master = self.masters[name]
        if kind == "master":
            self.weights[name].copy_(master.copy_(value))
        else:
            self.adamw.state[master][kind] = value.to(master.device, copy=True)


def _master(weight: Tensor, choice: torch.device | str) -> Tensor:
    """The weight itself if it is float32 on the chosen device ("auto": its own), else such a copy. Raises UserError."""
    device = weight.device if choice == "auto" else torch.device(distributed.device(str(choice)))
    is_master = weight.dtype == torch.float32 and weight.device == device
    return weight if is_master else nn.Parameter(weight.detach().to(device, torch.float32))


def save_training_state(root: Path, optimizer: MasterAdamW, step: int, **extra: Any) -> None:
    """Writes `root/step-00000120/` (safetensors, state.json) atomically; keeps the last KEPT_STATES states.

    Weights are stored once, as masters. There is no generator state: seeds are derived from (seed, step).
    """
    tensors = optimizer.state_tensors()
    if rank() > 0:
        deque(tensors, maxlen=0)  # takes part in gathering; rank 0 writes
        return
    with atomic_directory(Path(root) / f"step-{step:08d}") as folder:
        for number, shard in enumerate(in_shards(tensors, SHARD_BYTES)):
            save_file(shard, folder / f"state-{number:05d}.safetensors")
        write_json(folder / "state.json", {"step": step, "skipped_steps": optimizer.skipped_steps, **extra})
    for old in sorted(Path(root).glob("step-*"))[:-KEPT_STATES]:
        if not strangers(old):
            shutil.rmtree(old)


def load_training_state(state: Path, optimizer: MasterAdamW, base: str | None = None) -> dict[str, Any]:
    """Restores optimizer and weights bit for bit; returns state.json. Raises UserError naming the bad tensor or file.

    base: digest of the frozen checkpoint under adapters, which the state does not hold; None without adapters.
    """
    missing = {f"{name}.master" for name in optimizer.masters}
    try:
        record = read_json(state / "state.json")
        if record.get("base") != base:
            raise UserError("its adapters were trained on another checkpoint than the one to start from")
        for path in sorted(state.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    optimizer.load_state_tensor(key, file.get_tensor(key))
                    missing.discard(key)
        if missing:
            raise UserError(f"missing {', '.join(sorted(missing)[:3])}")
    except (OSError, SafetensorError, UserError) as error:
        remedy = "the state is damaged or of another model; use --restart to start over"
        raise UserError(f"{state}: {error}; {remedy}") from None
    optimizer.skipped_steps = record.get("skipped_steps", 0)
    return record
