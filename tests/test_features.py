"""Nothing is done twice: each image is encoded once and found again after a crash, shared demonstrations are read once."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train
from data import Sample, collate
from eval import load_model
from features import Features, encode_images
from mimic import MimIC
from model import InputError
from train import demonstrations, losses, parse


class Interrupted(Exception):
    pass


def pictures(n):
    return [Sample(i, Image.new("RGB", (400, 400), (40 * i, 9, 9)), "what " * (i + 1) + "?", [], "so", i) for i in range(n)]


@pytest.fixture(scope="module")
def exact(either_folder):
    """A tiny random model in float64, its processor, six samples and their features."""
    (model, processor), samples = load_model(either_folder, "cpu", "float64"), pictures(6)
    return model, processor, samples, encode_images(model, processor, samples, {})


def test_features_in_a_file_are_those_in_memory_and_survive_a_crash(tmp_path, exact):
    model, processor, samples, features = exact
    encoded = []

    def encode(values, mask, most):
        if len(encoded) == most:
            raise Interrupted
        encoded.append(len(values))
        return model.encode_images(values, mask)

    with pytest.raises(Interrupted):
        encode_images(model, processor, samples[:4], Features(tmp_path / "f", range(6)), encode=lambda *x: encode(*x, 0))
    encode_images(model, processor, samples[:4], Features(tmp_path / "f", range(6)), encode=lambda *x: encode(*x, 1))
    again = Features(tmp_path / "f", range(6))
    assert set(again) == {0, 1, 2, 3} and 5 not in again and encoded == [4]
    encode_images(model, processor, samples, again, encode=lambda *x: encode(*x, 2))
    assert encoded == [4, 2]
    for image_id, found in Features(tmp_path / "f", range(6)).items():
        torch.testing.assert_close(found, features[image_id], rtol=0, atol=1e-12)      # batches of other sizes: rounding
    assert not Features(tmp_path / "f", range(5))                                       # other images: begun anew


def test_a_file_of_bf16_features_keeps_their_bits(tmp_path):
    x = torch.randn(3, 4, 8).bfloat16()
    stored = Features(tmp_path / "f", [7, 5, 9])
    stored.update(zip((9, 7, 5), x, strict=True))
    assert all(torch.equal(Features(tmp_path / "f", [7, 5, 9])[i], y) for i, y in zip((9, 7, 5), x, strict=True))
    assert json.loads((tmp_path / "f.json").read_text())["filled"] == [5, 7, 9]


@pytest.mark.parametrize("align_on", ["layer", "ffn", "logits"])
def test_demonstrations_that_a_batch_shares_are_read_once_and_change_no_loss_and_no_gradient(align_on, exact):
    """Queries of different lengths: beside the shared demonstrations the rows are padded inside, not on the left."""
    model, processor, samples, features = exact
    args, results, seen = parse(["--align-on", align_on]), [], []
    for share in (False, True):
        torch.manual_seed(0)
        mimic = MimIC(3, 4, 16).double()
        batch = collate(samples[:3], [samples[3:]] * 3, processor, processor.templates["vqa"], share)
        embedded = model.text_model.embed_tokens.register_forward_hook(lambda _m, x, _y: seen[-1].append(x[0].numel()))
        seen.append([])
        align, ce = losses(model, mimic, batch, features, args)
        embedded.remove()
        (align + ce).backward()
        results.append((align, ce, *(p.grad for p in mimic.parameters())))
    for alone, shared in zip(*results, strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-7)                 # the losses are fp32
    n = batch.n_shared                                                                  # instruction and three demonstrations
    assert n > 3 * 6 and seen[0][0] >= 3 * n and sum(seen[1]) <= sum(seen[0]) - 2 * n


def test_shared_demonstrations_are_none_of_the_batchs_queries(exact):
    samples = exact[2]
    args = SimpleNamespace(share_icds=True, shots=3, seed=0)
    for queries in (samples[:2], samples[3:6]):
        icds = demonstrations(args, samples, queries, 0)
        assert all(d is icds[0] for d in icds) and not {s.id for s in icds[0]} & {q.id for q in queries}
    with pytest.raises(InputError, match="expected at least 3 training samples"):
        demonstrations(args, samples, samples[:4], 0)
    with pytest.raises(InputError, match="share their demonstrations"):
        collate(samples[:2], [samples[2:4], samples[3:5]], exact[1], exact[1].templates["vqa"], share=True)


def test_a_run_with_shared_demonstrations_learns_the_toy_and_leaves_no_features_behind(tmp_path):
    """Zero-shot gets 0 there."""
    rows = train.main(["--share-icds", "--samples", "200", "--dev-samples", "0", "--limit", "50", "--epochs", "4", "--compare",
                       "--out", str(tmp_path / "run")])
    assert rows[-1]["score"] > 5 and not list((tmp_path / "run").glob("features*"))
    with pytest.raises(InputError, match="--share-icds: expected gradient steps"):
        parse(["--share-icds", "--fit", "layerwise"])
