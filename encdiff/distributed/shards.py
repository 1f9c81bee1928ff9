"""Parameters in shards, a part of each in every process (FSDP2), for models that do not fit one device.

A module's parameters come together while it computes, and their gradients go apart as means of all processes'. What the
optimiser and the average keep is of the parts alone.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from encdiff.distributed.processes import Processes

if TYPE_CHECKING:  # else loaded with the first shard: it takes half a second
    from torch.distributed.tensor import DTensor


def shard(root: nn.Module, blocks: Sequence[nn.Module], whole: Iterable[nn.Parameter], among: Processes) -> None:
    """Put the parameters of the blocks of `root` in shards, but for those in `whole`, which others than the block read.

    Everything else of root stays whole in every process. The parameters must be contiguous.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    of_blocks = {p for block in blocks for p in block.parameters()} - set(whole)
    kept = {p for p in root.parameters() if p not in of_blocks}
    mesh = init_device_mesh(next(root.parameters()).device.type, (among.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=kept)
    fully_shard(root, mesh=mesh, ignored_params=kept)


def in_shards(tensor: Tensor) -> "TypeGuard[DTensor]":
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of this process, which shares its memory; of a tensor that is whole, itself."""
    return tensor.to_local() if in_shards(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on the CPU: every process must ask, and the memory of the first alone need hold more than one."""
    return tensor.full_tensor().cpu() if in_shards(tensor) else tensor.detach().cpu()


def like(part: Tensor, parameter: Tensor) -> Tensor:
    """What goes with a parameter, such as a moment, as it is in shards: a part like the parameter's own."""
    if not in_shards(parameter):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def part_of(full: Tensor, parameter: Tensor, among: Processes) -> Tensor:
    """Of a whole tensor what this process has of the parameter."""
    if not in_shards(parameter) or full.shape != parameter.shape:
        return full
    parts = full.chunk(among.size)  # as fully_shard cuts them, along the first dimension
    return parts[among.rank] if among.rank < len(parts) else full[:0]


def norm(gradients: Iterable[Tensor], among: Processes) -> Tensor:
    """Of all gradients, some in shards, as if they were whole."""
    squares = [(in_shards(g), local(g).float().square().sum()) for g in gradients]
    of_parts = sum((square for is_part, square in squares if is_part), torch.zeros_like(squares[0][1]))
    among.mean_(of_parts)
    return (of_parts * among.size + sum(square for is_part, square in squares if not is_part)).sqrt()
