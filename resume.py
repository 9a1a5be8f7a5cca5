"""What an interrupted run goes on from: one safetensors file, replaced at once, so that a crash leaves the older one whole.

It holds the trained parameters, AdamW's moments, and what else the next step depends on as numbers in its metadata. Random
numbers are no part of it: all of them are drawn from (seed, epoch or step), so a position in the run says which come next.
"""

import contextlib
import json
import shlex
import signal
import sys

from mimic import read_whole, save_atomically
from model import InputError
from parallel import world


def save_state(path, parameters, optimiser, **numbers):
    """parameters: a state dict; optimiser: None or one whose state is tensors, such as AdamW's; numbers: what JSON can hold."""
    tensors = {f"parameter.{name}": x for name, x in parameters.items()}
    for number, state in (optimiser.state_dict()["state"] if optimiser else {}).items():
        tensors |= {f"optimiser.{number}.{name}": x for name, x in state.items()}
    save_atomically(tensors, path, {name: json.dumps(value) for name, value in numbers.items()})


def read_state(path):
    """→ the parameters (a state dict), the optimiser's state {number: {name: tensor}}, the numbers. Raises InputError."""
    tensors, about = read_whole(path, "a state to go on from")
    parameters, moments = {}, {}
    try:
        for key, x in tensors.items():
            kind, *rest = key.split(".")
            if kind == "parameter":
                parameters[".".join(rest)] = x
            else:
                number, name = rest
                moments.setdefault(int(number), {})[name] = x
        return parameters, moments, {name: json.loads(value) for name, value in about.items()}
    except ValueError:
        raise InputError(f"{path}: expected a state to go on from, found something else; delete it to start anew") from None


def load_state(path, module, optimiser):
    """Sets module and optimiser to what `save_state` wrote → the numbers. Raises InputError if they do not fit."""
    parameters, moments, numbers = read_state(path)
    try:
        module.load_state_dict(parameters)
        trained = [p for group in optimiser.param_groups for p in group["params"]]
        if any(x.shape not in ((), trained[n].shape) for n, state in moments.items() for x in state.values()):
            raise KeyError("moments of other shapes")
        optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    except (RuntimeError, LookupError) as e:
        raise InputError(f"{path}: expected the state of this run, found another ({str(e).splitlines()[0]:.100}); delete it to "
                         "start anew") from None
    return numbers


@contextlib.contextmanager
def held_back():
    """Ctrl-C, or a cluster's SIGTERM, waits for a good moment: → a list that holds the signal once there was one.

    A second Ctrl-C does not wait. (torchrun's processes get it twice, so there it is always waited for.)"""
    noted = []

    def note(number, frame):
        if noted and number == signal.SIGINT and world() == 1:
            raise KeyboardInterrupt
        noted.append(number)
        if number == signal.SIGINT and world() == 1:
            print("\nstopping behind this step or score; Ctrl-C again stops at once, without saving", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command_to_go_on():
    """The command line of this process, with --resume."""
    words = [*sys.argv, *(["--resume"] if "--resume" not in sys.argv else [])]
    return shlex.join(["python", *words] if world() == 1 else ["torchrun", "--nproc-per-node", str(world()), "--", *words])
