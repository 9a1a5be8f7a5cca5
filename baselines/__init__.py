"""What MimIC is compared with, a file each, read only when somebody asks for one."""

from mimic import MimIC
from support.files import InputError


def adapters():
    """Method → class of what train.py trains; a run's file is METHOD.safetensors."""
    from baselines.hificl import HiFICL
    from baselines.live import LIVE
    from baselines.lora import LoRA
    from baselines.prompt_tuning import PromptTuning
    from baselines.stave import STAVE
    return {"mimic": MimIC, "live": LIVE, "lora": LoRA, "hificl": HiFICL, "stave": STAVE,
            "prompt-tuning": PromptTuning}


def untrained():
    """Method → class of what eval.py makes of demonstrations alone, by its `prepare`."""
    from baselines.function_vector import FunctionVector
    from baselines.icl import ICL, ZeroShot
    from baselines.rices import Nearest, NearestFirst
    from baselines.task_vector import TaskVector
    return {"zero-shot": ZeroShot, "icl": ICL, "rices": Nearest, "rices-first": NearestFirst,
            "task-vector": TaskVector, "function-vector": FunctionVector}


def load_adapter(path, method, model):
    """The method's adapter in that file, on the model's device. Raises InputError if it was made for another
    model."""
    kind = adapters()[method]
    adapter = kind.load(path).to(model.device)
    expected = kind.for_model(model, **adapter.options)
    shapes, wanted = ({name: tuple(p.shape) for name, p in a.named_parameters()} for a in (adapter, expected))
    for name in wanted | shapes:
        if shapes.get(name) != wanted.get(name):
            found = f"{shapes.get(name, 'none')}"
            raise InputError(f"{path}: expected an adapter whose {name} is {wanted.get(name, 'not there')} as for "
                             f"this model, found {found}")
    return adapter
