"""Speed on GPUs: compiled layers, FlexAttention for groups, decoding steps recorded as CUDA graphs.

Nothing here changes what is computed. Environment: NANO_ATLAS_COMPILE=0 disables all of it, 1 compiles
everything on any device. By default, models with a vocabulary of at least 4,096 get compiled layers and
FlexAttention on a GPU and compiled loss kernels on any device; decoding steps are recorded on every GPU.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from nano_atlas.model import Transformer

MIN_COMPILED_VOCABULARY = 4096  # smaller models finish before the compiler does
BLOCK = 128  # tokens in a block of FlexAttention
# cuDNN's attention needs up to a second to plan each new shape, and every batch has another shape
torch.backends.cuda.enable_cudnn_sdp(False)


def setting() -> str:
    """Raises ValueError for a NANO_ATLAS_COMPILE that is neither 0 nor 1 nor unset."""
    found = os.environ.get("NANO_ATLAS_COMPILE", "")
    if found not in ("", "0", "1"):
        raise ValueError(f"NANO_ATLAS_COMPILE is {found!r}; use 0, 1 or leave it unset")
    return found


def is_worth_compiling(vocabulary: int) -> bool:
    return setting() == "1" or (setting() == "" and vocabulary >= MIN_COMPILED_VOCABULARY)


def is_recorded(device: torch.device) -> bool:  # whether decoding steps are CUDA graphs
    return device.type == "cuda" and setting() != "0"


def compile_layers(model: Transformer) -> Transformer:
    """Compiles, in place, the parts of each layer before and after attention, if the model is worth it (a minute).

    One compilation serves all layers and numbers of tokens. Attention is not compiled: it depends on the
    documents' lengths, which differ in every batch, so it would be recompiled.
    """
    is_here = model.head_weight.is_cuda or setting() == "1"
    if is_here and is_worth_compiling(model.config.vocab_size):
        model.is_compiled = True
        # teacher and student, with gradient, without, and in inference mode: more than the default of 8
        torch._dynamo.config.recompile_limit = 64
        for layer in model.model.layers:
            for name in ("before", "after"):
                setattr(layer, name, torch.compile(getattr(layer, name), dynamic=True))
    return model


class FlexAttention:
    """`SharedPromptAttention` as one kernel over the flat tokens (Dong et al. 2024, arXiv:2412.05496), for GPUs only.

    Prompts are not copied for each completion, and blocks of 128 x 128 tokens that are masked completely are skipped.
    `positions` may be longer than the documents: padding, as one more document, fills the last block.
    """

    def __init__(self, prompt_lengths, completion_lengths, prompt_of: Sequence[int], device):
        from torch.nn.attention.flex_attention import create_block_mask  # lazily: it takes seconds to import

        count, lengths = len(prompt_lengths), [*prompt_lengths, *completion_lengths]
        lengths = torch.tensor([*lengths, -sum(lengths) % BLOCK])
        documents = torch.arange(len(lengths)).repeat_interleave(lengths)  # [N]: the document of each token
        starts = torch.tensor([0] * count + [prompt_lengths[i] for i in prompt_of] + [0])  # first positions
        places = torch.arange(len(documents))
        self.positions = (places - (lengths.cumsum(0) - lengths - starts)[documents]).to(device)
        prompts = torch.tensor([*range(count), *prompt_of, -1])[documents].to(device)
        is_prompt, documents = (documents < count).to(device), documents.to(device)

        # captures only tensors: for a number, each value would compile another kernel
        def sees(batch, head, query: Tensor, key: Tensor) -> Tensor:
            is_shared = (prompts[query] == prompts[key]) & is_prompt[key]
            return (query >= key) & (is_shared | (documents[query] == documents[key]))

        self.mask = create_block_mask(sees, None, None, len(documents), len(documents), device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H or H_kv, N, D_head]
        kernel = _flex_kernel(q.device.type)
        return kernel(q, k, v, block_mask=self.mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)


@cache
def _flex_kernel(device: str) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


# one for all graphs of a device, because cuBLAS keeps a workspace for each stream
_recording_stream = cache(torch.cuda.Stream)


def record(step: Callable[[], None], device: torch.device, pool) -> Callable[[], None]:
    """Runs `step` and records its kernels as a CUDA graph; returns a function that replays them on the same memory."""
    stream, graph = _recording_stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compiles, and loads libraries that must not be loaded while recording
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            step()  # recorded, not executed
    return graph.replay
