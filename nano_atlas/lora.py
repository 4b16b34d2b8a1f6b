"""LoRA (Hu et al. 2021, arXiv:2106.09685): training changes each matrix W only by ALPHA / r * B A, of rank r.

All linear layers of the blocks are adapted; all else is frozen. So gradients, float32 masters and moments
exist of A and B only, and the reference is the same model with its adapters off. With the factor 1 / r the
best learning rate hardly depends on the rank, and is about ten times that of full training (Schulman et al.
2025, "LoRA Without Regret", Thinking Machines).
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_atlas.model import Transformer

ALPHA = 32.0


class LoraLinear(nn.Module):
    """x `[N, in]` -> `x W^T + bias + ALPHA / r * (x A^T) B^T`, `[N, out]`. W and bias keep their names.

    A `[r, in]` and B `[out, r]` have W's dtype. A starts as in PEFT; B is zero: the model starts unchanged."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        a = nn.init.kaiming_uniform_(torch.empty(rank, linear.in_features), 5**0.5, generator=generator)
        self.lora_A = nn.Parameter(a.to(linear.weight))  # A and B come before W, see `merged`
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.is_on = ALPHA / rank, True

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.linear(x, self.lora_A) * self.scale, self.lora_B) if self.is_on else y


def adapt(model: Transformer, rank: int, seed: int) -> None:
    """Adds adapters in place and freezes everything else; to be called before `shard`. rank 0: no change."""
    if not rank:
        return
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every device
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.layers.set_submodule(name, LoraLinear(module, rank, generator))


class WithoutAdapters:
    """The model before training, in the same memory: to be called like it; no adapters, no gradient."""

    def __init__(self, model: Transformer):
        self.model = model

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    @torch.no_grad()
    def __call__(self, *arguments) -> Tensor:
        adapted = [module for module in self.model.modules() if isinstance(module, LoraLinear)]
        try:
            for module in adapted:
                module.is_on = False
            return self.model(*arguments)
        finally:
            for module in adapted:
                module.is_on = True


def merged(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name, W + ALPHA / r * B A), in float32 and rounded once; names and order are those before `adapt`."""
    parts: dict[str, Tensor] = {}
    for name, weight in weights:
        if name.endswith(("lora_A", "lora_B")):
            parts[name[-1]] = weight.float()
        else:
            if parts:  # the weight's own: its layer has them before it
                a, b = parts.pop("A"), parts.pop("B")
                weight = torch.addmm(weight.float(), b, a, alpha=ALPHA / len(a)).to(weight.dtype)
            yield name, weight
