"""What MimIC is compared with, a file each, read only when somebody asks for one."""

from mimic import MimIC
from support.files import reading


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
    """The method's adapter in that file, on the model's device. Raises InputError if it does not fit."""
    kind = adapters()[method]
    adapter = kind.load(path).to(model.device)
    with reading(path, "an adapter of this model's sizes"):
        kind.for_model(model, **adapter.options).load_state_dict(adapter.state_dict())
    return adapter
