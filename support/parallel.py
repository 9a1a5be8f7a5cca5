"""Several processes, as torchrun starts them. Alone, every function here does nothing.

    torchrun --nproc-per-node 2 -- train.py --accumulate 2 --dataset okvqa --model FOLDER --data FOLDER

Every process runs the whole script with the whole model, on a GPU of its own if there are any. They share a
step's micro-batches, whose gradients are summed, and the batches of answers, which `gather` brings together.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from support.files import InputError, reading


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join(device):
    """Joins the processes that torchrun started, if it did → the device of this one. From here on only
    process 0 prints. Raises InputError for an impossible device."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if device == "cuda" and not alone:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    with reading(f"--device {device}", "a device of this machine"):
        torch.empty(0, device=device)
    if alone or dist.is_initialized():
        return device
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=12))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


def leave():
    """Ends what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def together(call, *arguments):
    """A call that all processes make. Raises InputError if one of them has ended."""
    try:
        call(*arguments)
    except RuntimeError as e:
        said = str(e).replace("\n", " ")
        raise InputError(f"torchrun: expected {world()} processes at work, found that one has ended; the "
                         f"same command with --resume goes on ({said:.60})") from None


def add(tensor):
    """The tensor becomes its sum over the processes, the same bits in each of them."""
    if world() > 1:
        together(dist.all_reduce, tensor)


def add_gradients(parameters):
    """Every gradient becomes its sum over the processes; one that had no work has nothing to add."""
    for p in parameters:
        if p.requires_grad and world() > 1:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            add(p.grad)


def gather(value):
    """Every process's value, in the order of the ranks; all have to call it."""
    if world() == 1:
        return [value]
    values = [None] * world()
    together(dist.all_gather_object, values, value)
    return values


def wait():
    """Until all processes are here."""
    gather(None)
