"""Several processes that train one model: FSDP2 under torchrun. In a single process every function here does nothing.

All ranks hold the same data and share the computation: each samples part of the conversations (`divide`) and learns
from part of a step's tokens (`shares`). Each stores its rows of every parameter, gradient and moment (Rajbhandari et
al. 2020, arXiv:1910.02054, ZeRO stage 3); a whole layer exists only while it computes.
Gradients are summed, not averaged, because losses are normalised by the whole step. They are reduced after each
micro-batch: reducing once per step needs an unsharded float32 gradient (33 GB for 8B) and saves one of three transfers.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from nano_atlas.errors import UserError, say
from nano_atlas.gpu import compile_layers
from nano_atlas.lora import merged
from nano_atlas.model import Transformer

CORES = torch.get_num_threads()
ONE_THREAD = 20_000_000  # parameters; smaller models compute with one thread
largest = 0  # parameters of the largest model loaded so far
TIMEOUT = timedelta(hours=2)  # for a collective: the other ranks may be sampling long answers or evaluating


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group() -> Iterator[None]:
    """Under torchrun, joins its processes; within the block only rank 0 writes to stdout."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "LOCAL_RANK" not in os.environ:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    yield
    dist.destroy_process_group()  # not after an exception: it could wait for a failed rank


def is_first_failure() -> bool:
    """Whether this rank is the first of the job to fail. Only the first reports; the others exit silently."""
    with suppress(RuntimeError, ValueError):  # torchrun's store is closed, or there is no group
        return dist.distributed_c10d._get_default_store().add("failures", 1) == 1
    return True


def wait() -> None:
    """A barrier, so that all ranks see what rank 0 has written."""
    if size() > 1:
        dist.barrier()


def device(choice: str, gpus: int | None = None) -> str:
    """The device that an option names; "auto": the process's GPU, or the CPU without one. Raises UserError."""
    gpus = torch.cuda.device_count() if gpus is None else gpus
    if size() > 1 and choice.startswith("cuda"):
        raise UserError(f"{choice}: under torchrun each process has its own GPU; use auto or cpu")
    if choice == "cuda" or choice == "auto" and gpus:
        choice = f"cuda:{os.environ['LOCAL_RANK'] if size() > 1 else 0}"
    return check_gpu("cpu" if choice == "auto" else choice, gpus)


def check_gpu(name: str, gpus: int) -> str:
    if name.startswith("cuda") and torch.device(name).index >= gpus:
        raise UserError(f"no device {name}: this machine has {gpus} GPUs")
    return name


def settle_threads(parameters: int) -> None:
    """One thread for small models, else all; the process's largest model decides, unless OMP_NUM_THREADS is set.
    Beside another busy program two threads are slower than one: they spin while they wait (docs/speed.md)."""
    global largest
    if "OMP_NUM_THREADS" in os.environ or parameters <= largest:
        return
    largest = parameters
    torch.set_num_threads(1 if parameters < ONE_THREAD else CORES)
    say(f"{torch.get_num_threads()} of {CORES} CPU threads used; set OMP_NUM_THREADS to change it")


def shares(sizes: Sequence[int]) -> list[list[int]]:
    """Indices of each rank's items: contiguous, total sizes equal up to one item."""
    lengths = torch.tensor(sizes, dtype=torch.float64)
    owners = ((lengths.cumsum(0) - lengths / 2) * size() / lengths.sum()).int()  # of each item's middle
    return [(owners == owner).nonzero().flatten().tolist() for owner in range(size())]


def in_step(batches: Sequence, filler) -> Iterator[tuple]:
    """(micro-batch, whether it counts): this rank's own, then `filler` up to the most of any rank (passes are collective)."""
    most = torch.tensor(len(batches))
    if size() > 1:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    for index in range(int(most)):
        yield (batches[index], True) if index < len(batches) else (filler, False)


def sum_over_ranks(values: Tensor) -> Tensor:
    """In place; also returns the tensor."""
    if size() > 1:
        dist.all_reduce(values)
    return values


class DividedSeat:
    """A seat on every rank. Each rank asks part of the questions (or rank 0 all of them), and all get all replies."""

    is_batched = True

    def __init__(self, seat, parts: int):
        self.seat, self.parts = seat, parts
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)  # separate, so that a thread may ask

    def ask(self, questions, progress=None) -> list[list]:
        own = questions[rank() :: self.parts] if rank() < self.parts else []
        replies = self.seat.ask(own, progress if rank() == 0 else None)
        gathered: list[list] = [[] for _ in range(size())]
        dist.all_gather_object(gathered, replies, self.group)  # pickled between the ranks, never stored
        return [gathered[index % self.parts][index // self.parts] for index in range(len(questions))]

    def __getattr__(self, name: str):
        return getattr(self.seat, name)


def divide(seat, is_first_only: bool = False):
    """The seat, divided over the ranks if there are several. is_first_only: only rank 0 has a server to ask."""
    return DividedSeat(seat, 1 if is_first_only else size()) if size() > 1 else seat


def shard(model: Transformer) -> None:
    """Shards the parameters by rows, in place: what is trained is stored as float32, and cast when it is gathered.

    One group per layer, and one of embedding, final norm and head. This one stays gathered in the backward pass, because
    the loss uses `head_weight` outside of the model. Each rank gets ceil(rows / N), the last ranks fewer or none.
    """
    if size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh  # lazily: both take as long to import as torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model.compute_dtype = model.head_weight.dtype
    mesh = init_device_mesh(model.head_weight.device.type, (size(),))
    precision = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
    for module in (*model.model.layers, model):
        for parameter in module.parameters():
            if parameter.requires_grad and own_part(parameter) is parameter:  # not sharded yet
                parameter.data = parameter.data.float()
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=module is not model)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def own_part(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, as a view; any other tensor itself."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor


def own_rows(whole: Tensor) -> Tensor:
    """This rank's rows of a whole tensor, as a view."""
    count = -(-len(whole) // size())
    return whole[rank() * count : (rank() + 1) * count]


def gather_rows(part: Tensor, rows: int) -> Tensor:
    """The whole tensor, with `rows` rows, from each rank's part. Collective."""
    if size() == 1:
        return part
    padded = part.new_zeros(-(-rows // size()), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(size())]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[:rows]


@torch.no_grad()
def whole_parameters(model: Transformer, part: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) in the model's dtype, of names with `part` in them. Collective: iterate over all."""
    dtype = model.compute_dtype
    if dtype is not None:
        model.reshard()  # a forward pass without a backward pass leaves embedding and head gathered
    for name, weight in ((n, p.detach()) for n, p in model.named_parameters() if part in n):
        yield name, weight if dtype is None else gather_rows(own_part(weight).to(dtype), len(weight))


def copy_parameters(source: Transformer, target: Transformer) -> None:  # target: not sharded, on any device
    for (_, tensor), parameter in zip(merged(whole_parameters(source)), target.parameters()):
        parameter.data.copy_(tensor)


def whole_copy(model: Transformer) -> Transformer:
    """An unsharded model, to be filled by `copy_parameters`; in a single process the model itself, with adapters."""
    if size() == 1:
        return model
    copy = Transformer(model.config).to(model.head_weight.device, model.compute_dtype)
    return compile_layers(copy.requires_grad_(False))
