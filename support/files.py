"""Files: whatever is wrong with one is a single line; what is written is written whole, by process 0 alone.

    with reading(path, "VQA questions"):      # KeyError, … → "PATH: expected VQA questions, found: no 'x'"
        questions = [q["question"] for q in read_json(path)["questions"]]
"""

import contextlib
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save
from tokenizers import Tokenizer

from support.kernels import keep_freed


class InputError(ValueError):
    """A mistake in what the user gave us: one line with the file or option, the expected and the found."""


@contextlib.contextmanager
def reading(path, what):
    """Around parsing of `path`: whatever goes wrong becomes InputError `PATH: expected WHAT, found …`."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: expected {what}, found no file") from None
    except Exception as e:                            # libraries raise anything for wrong bytes
        said = getattr(e, "strerror", None) or str(e)
        found = f"no {e}" if isinstance(e, KeyError) else " ".join(said.split()) or type(e).__name__
        raise InputError(f"{path}: expected {what}, found: {found:.300}") from None


def read_json(path, what="a file of complete JSON"):
    """The parsed file. Raises InputError if it is missing or is not JSON."""
    with reading(path, what):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_tokenizer(path):
    """The tokenizers.Tokenizer in tokenizer.json, without padding and truncation."""
    with reading(path, "a tokenizer"):
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def string(value):
    """A str that a file can hold. Raises TypeError, or ValueError for half a character."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} in the place of text")
    value.encode()
    return value


def chunks(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


def read_tensors(path, what):
    """A safetensors file → {name: tensor}, metadata. Raises InputError for another file, NaN or infinity."""
    with reading(path, f"{what} in safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            about = file.metadata() or {}
        for name, x in tensors.items():
            if not x.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity")
    return tensors, about


def write_whole(path, content):
    """Writes the bytes under another name, which becomes `path` once all are there: a kill or a full disk
    leaves the older file whole. Raises InputError if there is no room or no right to."""
    temporary = Path(f"{path}.tmp")
    try:
        with reading(path, "a file that can be written"):
            temporary.write_bytes(content)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)             # still there only if something went wrong


def write_text(path, text):
    """Writes the whole text (UTF-8, line ends as they are), or leaves the older file."""
    if os.environ.get("RANK", "0") == "0":
        write_whole(path, text.encode())


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def save_tensors(path, tensors, about):
    """Tensors and metadata ({name: value}, kept as text) as safetensors; the same content, the same bytes."""
    if os.environ.get("RANK", "0") == "0":
        content = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()})
        n = 8 + int.from_bytes(content[:8], "little")
        about = {name: str(about[name]) for name in sorted(about)}            # the library's order is chance
        header = json.dumps({"__metadata__": about, **json.loads(content[8:n])}).encode()
        header += b" " * (-len(header) % 8)
        write_whole(path, len(header).to_bytes(8, "little") + header + content[n:])


class Stored(nn.Module):
    """A module with a safetensors file: `load` gives the constructor `sizes(tensors)` and the options `kept`,
    name → type, which travel in the metadata."""
    kept = {}

    @staticmethod
    def sizes(tensors):
        return tensors["vector"].shape

    @property
    def options(self):
        """The keyword arguments with which one like this is made."""
        return {name: getattr(self, name) for name in self.kept}

    def save(self, path, **about):
        """Writes the tensors; `about` (method, model, dataset, seed, …) goes into the metadata as text."""
        save_tensors(path, self.state_dict(), about | self.options)

    @classmethod
    def load(cls, path):
        """What `save` wrote, in evaluation mode. Raises InputError if the file is something else."""
        what = f"a {cls.__name__} adapter"
        tensors, about = read_tensors(path, what)
        with reading(path, what):
            options = {name: kind(about[name]) for name, kind in cls.kept.items() if name in about}
            module = cls(*cls.sizes(tensors), **options)
            module.load_state_dict(tensors)
        return module.eval()


def save_state(path, module, optimiser, numbers):
    """What a training continues from: parameters, the optimiser's moments, and numbers (a JSON list)."""
    tensors = {f"parameter.{name}": x for name, x in module.state_dict().items()}
    for n, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{n}.{name}": x for name, x in state.items()}
    save_tensors(path, tensors, {"numbers": json.dumps(numbers)})


def load_state(path, module, optimiser):
    """Sets module and optimiser to what `save_state` wrote → the numbers; None if there is no such file."""
    if not Path(path).exists():
        return None
    what = "the state of this run"
    tensors, about = read_tensors(path, what)
    with reading(path, what):
        moments = {}
        for name in [name for name in tensors if name.startswith("optimiser.")]:
            _, n, moment = name.split(".")
            moments.setdefault(int(n), {})[moment] = tensors.pop(name)
        module.load_state_dict({name.removeprefix("parameter."): x for name, x in tensors.items()})
        optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
        step, best, seconds = json.loads(about["numbers"])
        return int(step), float(best), float(seconds)


def make_folder(path):
    """The folder, and those above it. Raises InputError if it cannot be made."""
    with reading(path, "a folder that can be written"):
        Path(path).mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def fits_into_memory(option, size):
    """Around work on `size` queries at a time: if memory is short, InputError says which option to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:          # the CPU's allocator has no error of its own
        if not isinstance(e, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(e):
            raise
        raise InputError(f"{option} {size}: expected it to fit into the memory, found that it does not; "
                         "try a smaller one") from None


def check_finite(step, micro, **numbers):
    """Raises InputError, naming step and samples, unless all numbers are finite. micro: of train.steps_of."""
    if not all(map(math.isfinite, numbers.values())):
        found = ", ".join(f"{name} {x}" for name, x in numbers.items())
        ids = [q.id for queries, _ in micro for q in queries]
        raise InputError(f"step {step}: expected finite losses and gradients, found {found} for {ids}")


def run_command(main):
    """Runs a command: the user's mistakes are one line and exit status 2, ours a traceback."""
    keep_freed()
    try:
        main()
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; a command that has --resume goes on with it", file=sys.stderr)
        sys.exit(130)
