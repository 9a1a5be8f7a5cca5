"""Step 4. Figure 3: L = L_align + λ·L_gt, L_align the squared distance of the student's states from the teacher's."""

import pytest
import torch

from mimic import align_loss
from train import learning_rate

torch.manual_seed(0)


def states(L=3, B=2, T=5, d=4):
    return [torch.randn(B, T, d, dtype=torch.float64) for _ in range(L)]


def by_hand(student, teacher, mask, norm=False):
    total = 0.0
    for b in range(len(mask)):
        for s, t in zip(student, teacher, strict=True):
            kept = [i for i in range(mask.shape[1]) if mask[b, i]]
            error = sum((s[b, i, j] - t[b, i, j]).item() ** 2 for i in kept for j in range(s.shape[2]))
            size = sum(t[b, i, j].item() ** 2 for i in kept for j in range(s.shape[2]))
            total += error / size if norm else error / (len(kept) * s.shape[2])
    return total / (len(mask) * len(student))


@pytest.mark.parametrize("norm", [False, True])
def test_align_loss_is_the_mean_over_layers_tokens_and_d_of_a_sample_then_over_samples(norm):
    student, teacher, mask = states(), states(), torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    assert align_loss(student, teacher, mask, norm).item() == pytest.approx(by_hand(student, teacher, mask, norm), rel=1e-5)


def test_align_loss_of_equal_states_is_zero():
    teacher = states()
    assert align_loss(teacher, teacher, torch.ones(2, 5, dtype=torch.bool)) == 0


def test_align_loss_compares_kept_tokens_only_whatever_stands_elsewhere():
    student, teacher, mask = states(), states(), torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    before = align_loss(student, teacher, mask)
    for x in student:
        x[~mask] = torch.nan
    assert align_loss(student, teacher, mask) == before


def test_a_sample_counts_the_same_beside_a_longer_one():
    student, teacher = states(), states()
    mask = torch.tensor([[0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()
    alone = [align_loss([x[b:b + 1] for x in student], [x[b:b + 1] for x in teacher], mask[b:b + 1]).item() for b in (0, 1)]
    assert align_loss(student, teacher, mask).item() == pytest.approx(sum(alone) / 2, rel=1e-6)


def test_dividing_by_the_teachers_mean_square_gives_every_layer_the_same_say():
    student, teacher, mask = states(), states(), torch.ones(2, 5, dtype=torch.bool)
    scaled = [[x * c for x, c in zip(side, (1, 10, 100), strict=True)] for side in (student, teacher)]
    same = align_loss(student, teacher, mask, norm=True).item()
    assert align_loss(*scaled, mask, norm=True).item() == pytest.approx(same, rel=1e-5)
    assert align_loss(*scaled, mask) > 1000 * align_loss(student, teacher, mask)


def test_align_loss_is_in_fp32_for_bf16_states():
    student = [x.bfloat16() for x in states()]
    assert align_loss(student, student, torch.ones(2, 5, dtype=torch.bool)).dtype == torch.float32


def test_learning_rate_rises_for_a_tenth_of_the_steps_and_falls_to_zero():
    rates = [learning_rate(i, 100, 0.1) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1 and max(rates) == 1 and rates[99] < 0.001
    assert rates[55] == pytest.approx(0.5, abs=0.01) and all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_padding_a_batch_changes_no_loss_and_no_gradient(either_folder):
    """A short and a long sample together, the short one padded, against each alone, from prompts to gradients in float64."""
    from PIL import Image

    from data import Sample, collate
    from eval import load_model
    from mimic import MimIC
    from train import losses, parse

    model, processor = load_model(either_folder, "cpu", "float64")
    pictures = [Image.new("RGB", (400, 400), (80 * i, 9, 9)) for i in range(2)]
    samples = [Sample(i, pictures[i], "why " * n + "?", [], "so", i) for i, n in enumerate((1, 12))]
    values, mask = processor.images([s.image for s in samples])
    features = dict(enumerate(model.encode_images(values, mask)))
    args, results = parse([]), []
    for rows in (samples, samples[:1], samples[1:]):
        torch.manual_seed(0)
        mimic = MimIC(3, 4, 16).double()
        batch = collate(rows, [[s for s in samples if s is not q] for q in rows], processor, processor.templates["vqa"])
        align, ce = losses(model, mimic, batch, features, args)
        (align + args.lambda_ce * ce).backward()
        results.append((align, ce, *(p.grad for p in mimic.parameters())))
    for together, short, long in zip(*results, strict=True):                     # both answers have two tokens
        torch.testing.assert_close(together, (short + long) / 2, rtol=1e-5, atol=1e-7)      # the losses are fp32
