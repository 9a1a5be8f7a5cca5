"""Fixtures: the folder of oracle data, and tiny random models in the published layout."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # threads that spin at barriers are 5 times slower on a busy machine
os.environ.setdefault("GOMP_SPINCOUNT", "0")
from pathlib import Path

import grading
import pytest
import torch
from safetensors.torch import save_file

import models

torch.set_num_threads(1)         # the models of the tests are too small for two threads to help


def pytest_addoption(parser):
    parser.addoption("--of", default=None, metavar="FOLDER", help="grade the functions in this folder's files, "
                     "each by the tests of its own step: pytest tests/test_[1-5]* --of exercises")


def pytest_configure(config):
    if config.getoption("of"):
        grading.put_in_place(config.getoption("of"))
        if config.option.tbstyle == "auto":
            config.option.tbstyle = "short"
        if config.option.reportchars == "fE":                   # the default: every failure again, below the lines by step
            config.option.reportchars = ""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    grading.Now.step = grading.step_of(item.path)


def pytest_terminal_summary(terminalreporter, config):
    """With --of: a line a step."""
    if (folder := config.getoption("of")) is None:
        return
    passed, failed = (Counter(grading.step_of(r.location[0]) for kind in kinds for r in terminalreporter.getreports(kind))
                      for kinds in (["passed"], ["failed", "error"]))
    terminalreporter.section(f"{folder}, step by step")
    for step, names in grading.STEPS.items():
        if total := passed[step] + failed[step]:
            done = "done" if passed[step] == total else f"read exercises/step_{step}.md"
            what = ", ".join(name.split(".", 1)[1] for name in names)
            terminalreporter.write_line(f"step {step}, {what}: {passed[step]} of {total} tests pass; {done}")


@pytest.fixture(scope="session")
def shared():
    """The folder `shared` beside the repository: golden vectors, real data samples, the real tokenizer."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        why = f"{folder} (golden vectors and data samples) is not on this machine"
        pytest.fail(why) if os.environ.get("CI") == "true" else pytest.skip(why)
    return folder


TINY_CONFIG = {
    "model_type": "idefics2", "image_token_id": 32001, "tie_word_embeddings": False,
    "vision_config": {"model_type": "idefics2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                      "num_attention_heads": 4, "image_size": 980, "patch_size": 14},
    "perceiver_config": {"model_type": "idefics2", "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
                         "resampler_head_dim": 8, "num_key_value_heads": 2},
    "text_config": {"model_type": "mistral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32002, "pad_token_id": 0},
}


TINY_IDEFICS1 = {              # a block before every layer
    "model_type": "idefics", "vocab_size": 32000, "additional_vocab_size": 2, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0, "cross_layer_interval": 1,
    "vision_config": {"embed_dim": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                      "image_size": 28, "patch_size": 14},
    "perceiver_config": {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8},
}
TINY = {"idefics2": TINY_CONFIG, "idefics1": TINY_IDEFICS1}


def small(which, vocab):
    """The tiny config with `vocab` tokens, <image> the last."""
    config = json.loads(json.dumps(TINY[which]))
    if which == "idefics2":
        config["image_token_id"], config["text_config"]["vocab_size"] = vocab - 1, vocab
    else:
        config["vocab_size"] = vocab - 2
    return config


def save_model(folder, config, seed=0, std=0.1):
    """A random model of `config` (as config.json has it) written to `folder` as published."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    kind = models.of(folder)[0]
    model = kind(kind.config_class.from_file(folder / "config.json"))
    for name, p in model.named_parameters():
        if "alpha" in name:                          # gates that begin closed
            torch.nn.init.constant_(p, 0.5)
        elif p.ndim > 1:
            torch.nn.init.normal_(p, std=std)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}))
    return folder


def with_pictures(model, ids, at=(2,)):
    """The prompts with a picture before each of the columns `at`, and random features of them → ids, image_features."""
    c, image = model.config, torch.full_like(ids[:, :1], model.config.image_token_id)
    one_token = len(model.text_model.crossed) > 0                # Idefics1: a picture is one token, in the tower's width
    n, d = (1, c.vision.hidden_size) if one_token else (c.perceiver.resampler_n_latents, c.text.hidden_size)
    parts = [ids[:, a:b] for a, b in zip((0, *at), (*at, ids.shape[1]), strict=True)]
    ids = torch.cat([x for part in parts for x in (part, image.expand(-1, n))][:-1], 1)
    shape = len(ids) * len(at), c.perceiver.resampler_n_latents, d
    return ids, torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(model.dtype)


def tiny(which, tmp_path_factory, shared):
    folder = save_model(tmp_path_factory.mktemp("models") / f"tiny-{which}", TINY[which])
    shutil.copy(shared / "data/tokenizer/tokenizer.json", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, shared):
    """A tiny random Idefics2 with the real 32,002-word tokenizer: what a researcher's model folder looks like."""
    return tiny("idefics2", tmp_path_factory, shared)


@pytest.fixture(scope="session")
def tiny_idefics1(tmp_path_factory, shared):
    """The same of Idefics1, with the words of Idefics2: its own are not on this machine."""
    return tiny("idefics1", tmp_path_factory, shared)


@pytest.fixture(scope="session", params=["tiny_folder", "tiny_idefics1"], ids=TINY)
def either_folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", params=TINY)
def model(request, tmp_path_factory):
    """Three random layers in float64, vocabulary 100, picture token 99; either model."""
    folder = save_model(tmp_path_factory.mktemp("model"), small(request.param, 100))
    return models.of(folder)[0].from_pretrained(folder, torch.float64)


# Imports once, then forks for every order {"script", "words", "errors": file for stderr, "seconds": when to kill it, or null,
# "signal": with what, "victim": which of its processes, "rows": not before log.csv (the last word names its folder) has so many
# lines, "processes": how many, as torchrun starts them, "limit": longest file in bytes, "more_memory": bytes
# that it may take}; prints the exit statuses.
HELPER = """
import json, os, re, resource, signal, socket, sys, tempfile, threading, time
import train, eval as evaluation
from support.files import run_command
from tqdm import tqdm
tqdm.monitor_interval = 0                        # no thread beside the one that forks
with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as sys.stdout:     # imports what is imported at first use
    train.main(["--samples", "4", "--dev-samples", "2", "--limit", "1", "--epochs", "1", "--shots", "1", "--compare", "--out",
                folder])
sys.stdout = sys.__stdout__
print(0, flush=True)
for line in sys.stdin:
    order = json.loads(line)
    log, n, children = os.path.join(order["words"][-1], "log.csv"), order.get("processes", 1), []
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    open(order["errors"], "w").close()
    for rank in range(n):
        children.append(os.fork())
        if not children[-1]:
            signal.signal(signal.SIGINT, signal.default_int_handler)      # also where the tests run in the background
            tqdm.set_lock(threading.RLock())     # tqdm's own is shared by all forks: one that is killed with it stops the others
            if n > 1:
                os.environ |= {"WORLD_SIZE": str(n), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                               "MASTER_PORT": port}
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(order["errors"], os.O_WRONLY | os.O_APPEND), 2)
            sys.argv = [order["script"], *order["words"]]
            if "limit" in order:
                resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
            if "more_memory" in order:
                now = 1024 * int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1])
                resource.setrlimit(resource.RLIMIT_DATA, (now + order["more_memory"],) * 2)
            try:
                run_command({"train.py": train.main, "eval.py": evaluation.main}[order["script"]])
                os._exit(0)
            except SystemExit as e:
                sys.stderr.flush()
                os._exit(e.code)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
    if order["seconds"] is not None:
        while order.get("rows") and not (os.path.exists(log) and len(open(log).readlines()) >= order["rows"]):
            time.sleep(0.005)
        time.sleep(order["seconds"])
        os.kill(children[order.get("victim", 0)], order.get("signal", 9))
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """command(script, words, seconds=None, …) → exit status (−9: killed) or, of several processes, the list; text on stderr."""
    helper = subprocess.Popen([sys.executable, "-c", HELPER], cwd=Path(__file__).resolve().parents[1], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert helper.stdout.readline() == "0\n"
    errors = tmp_path_factory.mktemp("errors") / "stderr"

    def run(script, words, seconds=None, **more):
        order = {"script": script, "words": [*map(str, words)], "seconds": seconds, "errors": str(errors), **more}
        print(json.dumps(order), file=helper.stdin, flush=True)
        statuses = json.loads(helper.stdout.readline())
        return statuses[0] if len(statuses) == 1 else statuses, errors.read_text()

    yield run
    helper.stdin.close()
    helper.stdout.close()
    assert helper.wait() == 0
