"""What a run needs of the memory is known before it begins."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import memory
import train
from baselines.lora import LoRA
from data import Processor
from idefics1 import Idefics1
from mimic import MimIC
from model import Config, Idefics2, InputError, PerceiverConfig, TextConfig, VisionConfig

SMALL = Config(VisionConfig(32, 64, 2, 4, 28), PerceiverConfig(4, 1, 4, 8, 2), TextConfig(64, 128, 3, 4, 2, vocab_size=100),
               image_token_id=99)


@pytest.mark.parametrize("kind, size", [(Idefics2, 8_402_759_920), (Idefics1, 8_929_679_632)])
def test_weights_of_the_published_models_are_counted_by_shape(kind, size):
    found = memory.parts(memory.meta_model(kind.config_class(), torch.bfloat16, kind), 8, (0,), 3, 16)
    assert found["weights"] * memory.GIB == 2 * size and "training" not in found


@pytest.mark.parametrize("adapter_of", [MimIC.for_model, LoRA.for_model])
def test_what_autograd_keeps_is_counted_without_memory_as_it_is_with_it(adapter_of):
    """The judge runs the pass for real and adds up the storages of everything that the graph's nodes hold."""
    meta = memory.meta_model(SMALL, torch.float32)
    counted = memory.kept_by_autograd(meta, adapter_of(meta), 2, 9)
    torch.manual_seed(0)
    model = memory.Idefics2(SMALL).requires_grad_(False)
    shifts = adapter_of(model)
    x, mask = torch.randn(2, 9, 64, requires_grad=True), torch.ones(2, 9, dtype=torch.bool)
    out = shifts.student(model).text_model(x, mask, mask.long().cumsum(1), shifts, None)
    own = {p.data_ptr() for p in model.parameters()}
    nodes, kept = [out.grad_fn], {}
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        for name in dir(node):
            if name.startswith("_saved_") and torch.is_tensor(t := getattr(node, name)):
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    real = sum(n for at, n in kept.items() if at not in own)
    assert counted == pytest.approx(real, rel=0.05)          # a kernel may keep a byte or two for itself


def args(**more):
    return SimpleNamespace(**{"device": "cpu", "dtype": "float32", "num_beams": 3, "eval_batch_size": 16, "batch_size": 4,
                              "accumulate": 1, **more})


def test_a_run_that_cannot_fit_stops_with_options_that_do(monkeypatch, capsys):
    """Four layers of the published decoder: 7.1 GiB of fp32 weights; advice is taken at its word and tried."""
    config = Config(VisionConfig(num_hidden_layers=2), text=TextConfig(num_hidden_layers=4))

    def check(there, **more):
        monkeypatch.setattr(memory, "free", lambda device: there)
        memory.check(args(**more), config, 8, (0, 8), MimIC.for_model)

    check(50)
    assert "weights 7.13" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"expected 11\.5 GiB free .*, found 10; it would fit with --eval-batch-size 8$"):
        check(10)
    check(10, eval_batch_size=8)
    with pytest.raises(InputError, match="found 7; it would fit with --dtype bfloat16$"):
        check(7)
    check(7, dtype="bfloat16")
    with pytest.raises(InputError, match="it would fit with --batch-size 2 --eval-batch-size 4 --accumulate 4$"):
        check(4.8, dtype="bfloat16", batch_size=4, accumulate=2)
    with pytest.raises(InputError, match="no batch is small enough"):
        check(3)


def test_a_layerwise_fit_asks_for_what_it_needs_and_not_for_all_it_may_take(monkeypatch, capsys):
    args = train.parse(["--fit", "layerwise", "--memory-gb", "8"])
    processor = Processor.from_pretrained(args.model)
    monkeypatch.setattr(memory, "free", lambda device: 1)
    train.check_memory(args, 50, processor)                     # measured: 0.5 GiB, the libraries' code included
    with pytest.raises(InputError, match="no batch is small enough, a smaller --memory-gb may be"):
        train.check_memory(args, 50_000, processor)
    args.memory_gb = 0.3
    train.check_memory(args, 50_000, processor)


@pytest.mark.parametrize("main", [train.main, evaluation.main])
def test_both_commands_ask_before_the_weights_are_read(main, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "free", lambda device: 1e-3)
    monkeypatch.setattr(evaluation.Idefics2, "from_pretrained", lambda *x: pytest.fail("weights were read"))
    with pytest.raises(InputError, match="GiB free"):
        main(["--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_machine_that_does_not_say_is_taken_at_its_word(monkeypatch, capsys):
    monkeypatch.setattr(memory, "free", lambda device: None)
    memory.check(args(), SMALL)
    assert "unknown" in capsys.readouterr().out


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the others' malloc has no such knob")
def test_freed_memory_is_kept_for_the_next_tensors():
    """Page faults of tensors of 1, 2, … 30 MB, each freed before the next: every page once, or every time."""
    code = """if True:
        import resource, sys, torch, memory
        if sys.argv[1] == "keep":
            memory.keep_freed()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for megabytes in range(1, 31):
            torch.ones(megabytes * 2 ** 18)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    faults = {how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
              for how in ("keep", "plain")}
    assert faults["keep"] < faults["plain"] / 4, faults
