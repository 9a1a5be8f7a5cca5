"""Data parallelism: what train.py and eval.py do with the other processes of torchrun. Alone, every function here does nothing.

    torchrun --nproc-per-node 2 -- train.py --dataset okvqa --model FOLDER --data FOLDER

Every process runs the whole script with the whole model. Of each batch it computes its share; `add` sums gradients, `gather`
brings answers together, and the first process writes the files. gloo between CPUs, nccl between GPUs, one process a GPU.
"""

import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from model import InputError


def joined():
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if joined() else 0


def world():
    """Number of processes."""
    return dist.get_world_size() if joined() else 1


def join(device):
    """Joins the processes that torchrun started, if it did → the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not joined():
        # hours, because the first process encodes all pictures; whoever dies is noticed by the others, or by torchrun, at once
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=12))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def leave():
    if joined():
        dist.destroy_process_group()


def share(items):
    """What this process does of a list: every world-th, from its rank on."""
    return items[rank()::world()]


def together(call, *arguments):
    """A call that all processes make. Raises InputError if one of them is no longer there."""
    try:
        call(*arguments)
    except RuntimeError as e:
        raise InputError(f"torchrun: expected {world()} processes at work, found that one has ended "
                         f"({str(e).splitlines()[0]:.100}); the same command with --resume goes on") from None


def add(tensors):
    """Every tensor (all of one dtype and device) becomes its sum over the processes, the same bits in each of them."""
    if world() > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        together(dist.all_reduce, flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))


def gather(value):
    """Every process's value, of what JSON can hold, in the order of the ranks; all of them have to call it."""
    if world() == 1:
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(world())]
    together(dist.all_gather, sizes, torch.tensor([len(mine)]))
    longest = max(map(int, sizes))
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    together(dist.all_gather, parts, torch.nn.functional.pad(mine, (0, longest - len(mine))))
    return [json.loads(bytes(part[:size].tolist())) for part, size in zip(parts, map(int, sizes), strict=True)]


def wait():
    """Until all processes are here."""
    gather(None)
