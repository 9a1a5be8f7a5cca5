"""Step 4. Figure 3: L = L_align + λ·L_gt, L_align the squared distance of the student's states from the teacher's."""

import pytest
import torch
from grading import same
from PIL import Image

import models
from data import Sample, collate, encode_images
from mimic import MimIC, Recorder, align_loss
from model import Shifts, attention, split_heads
from support.files import InputError
from train import learning_rate, losses, steps_of

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
    """1/B Σ_b 1/L Σ_ℓ 1/(N_b·d) Σ_kept ‖h_S − h_T‖²;  norm: each term divided by 1/(N_b·d) Σ_kept ‖h_T‖²"""
    student, teacher, mask = states(), states(), torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    expected, everything = by_hand(student, teacher, mask, norm), torch.ones_like(mask)
    squares = [((s - t)[mask] ** 2) for s, t in zip(student, teacher, strict=True)]
    same(align_loss(student, teacher, mask, norm), expected, {
        "tokens that are not kept count, too": lambda: by_hand(student, teacher, everything, norm),
        "the sum over layers": lambda: 3 * expected,
        "the sum over the tokens and d": lambda: torch.stack(squares).sum() / 6,
        "one mean over the tokens of all samples: a longer one counts more": lambda: torch.stack(squares).mean(),
        "norm divides by the teacher's mean square": lambda: by_hand(student, teacher, mask),
        "the norm is the teacher's, not the student's": lambda: by_hand(teacher, student, mask, norm)}, atol=1e-5)


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


class TrueShift(Shifts):
    """What demonstrations do at every head, exactly: μ·(SA_D − SA), with K_D and V_D of a pass over the demonstrations alone."""

    def __init__(self, model, demonstrations, layers):
        self.text_model, self.layers, self.kv = model.text_model, (), []
        model(demonstrations, torch.ones_like(demonstrations), shifts=self)
        self.layers = layers

    def after_embedding(self, input_ids, x):
        self.x = x                                       # what the next layer reads
        return x

    def after_attention(self, layer, q, k, out, lse):
        if len(self.kv) == layer:
            block, x = self.text_model.layers[layer], self.x
            x = self.text_model.enter(layer, x, None) if layer in self.text_model.crossed else x
            self.kv.append((k, split_heads(block.self_attn.v_proj(block.input_layernorm(x)), k.shape[1])))
        if layer not in self.layers:
            return out
        SA_D, log_z1 = attention(q, *self.kv[layer])
        return out + torch.sigmoid(log_z1 - lse).unsqueeze(-1) * (SA_D - out)

    def after_layer(self, layer, hidden_states):
        self.x = hidden_states
        return hidden_states


def imitate(model, layers):
    """Largest difference between the teacher's states and those of a student with the true shift in these layers, by layer."""
    ids = torch.randint(3, 98, (2, 11), generator=torch.Generator().manual_seed(0))
    positions, teacher = torch.arange(6, 11).expand(2, -1), Recorder(last=5)
    student = Recorder(TrueShift(model, ids[:, :6], layers))
    model(ids, torch.ones_like(ids), shifts=teacher)
    model(ids[:, 6:], torch.ones(2, 5), shifts=student, position_ids=positions)
    return [(s - t).abs().max().item() for s, t in zip(student.layer, teacher.layer, strict=True)]


def test_with_the_true_shift_in_every_layer_the_student_has_the_teachers_states(model):
    """The identity, from the embeddings to the last layer: L_align can reach 0, and what reaches it is in-context learning."""
    assert max(imitate(model, layers=(0, 1, 2))) < 1e-11


def test_one_layer_without_its_shift_leads_all_layers_above_astray(model):
    """Right below it, wrong from it on, although every other layer adds what is right for the query it is given."""
    first, second, third = imitate(model, layers=(0, 2))
    assert first < 1e-11 and second > 0.01 and third > 0.01


def test_the_error_of_a_layer_teaches_that_layer_and_those_below(model):
    """So an error at the last layer alone blames all of them at once; one a layer tells each what it has to add."""
    ids, teacher = torch.randint(3, 98, (2, 9), generator=torch.Generator().manual_seed(0)), Recorder(last=5)
    model(ids, torch.ones_like(ids), shifts=teacher)
    for layer in range(3):
        mimic = MimIC(3, 4, 16).double()
        student = Recorder(mimic)
        model(ids[:, 4:], torch.ones(2, 5), shifts=student)
        align_loss(student.layer[layer:layer + 1], teacher.layer[layer:layer + 1], torch.ones(2, 5)).backward()
        assert [bool(g.abs().max() > 0) for g in mimic.vector.grad] == [n <= layer for n in range(3)]


def test_learning_rate_rises_for_a_tenth_of_the_steps_and_falls_to_zero():
    rates = [learning_rate(i, 100, 0.1) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1 and max(rates) == 1 and rates[99] < 0.001
    assert rates[55] == pytest.approx(0.5, abs=0.01) and all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


# ---------------------------------------------------------------------------------------------------------------------
# From prompts to gradients
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def exact(either_folder):
    """A tiny random model in float64, its processor, six samples with questions of other lengths, and their features."""
    model, processor = models.load_model(either_folder, "cpu", "float64")
    samples = [Sample(i, Image.new("RGB", (400, 400), (40 * i, 9, 9)), "why " * (1 + 5 * i) + "?", [], "so", i) for i in range(6)]
    return model, processor, samples, encode_images(model, processor, samples, {})


def step(exact, queries, icds, share=False, **options):
    """L_align, L_gt and the gradients of a batch, and how many tokens each pass embeds."""
    model, processor, _, features = exact
    torch.manual_seed(0)
    mimic, seen = MimIC(3, 4, 16).double(), []
    batch = collate(queries, icds, processor, processor.templates["vqa"], share)
    embedded = model.text_model.embed_tokens.register_forward_hook(lambda _m, x, _y: seen.append(x[0].numel()))
    align, ce = losses(model, mimic, batch, features, **options)
    embedded.remove()
    (align + 0.5 * ce).backward()
    return (align, ce, *(p.grad for p in mimic.parameters())), seen


def test_padding_a_batch_changes_no_loss_and_no_gradient(exact):
    """A short and a long sample together, the short one padded, against each alone, in float64."""
    a, b = samples = exact[2][:2]
    results = [step(exact, rows, [[b] if q is a else [a] for q in rows])[0] for rows in (samples, [a], [b])]
    for together, short, long in zip(*results, strict=True):                     # both answers have two tokens
        torch.testing.assert_close(together, (short + long) / 2, rtol=1e-5, atol=1e-7)      # the losses are fp32


@pytest.mark.parametrize("align_on", ["layer", "ffn"])
def test_demonstrations_that_a_batch_shares_are_read_once_and_change_no_loss_and_no_gradient(exact, align_on):
    """Queries of different lengths: beside the shared demonstrations the rows are padded inside, not on the left."""
    queries, icds = exact[2][:3], exact[2][3:]
    (alone, tokens), (shared, fewer) = (step(exact, queries, [icds] * 3, share, align_on=align_on) for share in (False, True))
    for a, b in zip(alone, shared, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)                          # the losses are fp32
    n = fewer[0]                                                        # of the instruction and three demonstrations
    assert n > 3 * 6 and tokens[0] >= 3 * n and sum(fewer) <= sum(tokens) - 2 * n


def test_shared_demonstrations_are_none_of_the_batchs_queries(exact):
    for micro in steps_of(exact[2], 0, 0, batch_size=3, accumulate=2, shots=3, share_icds=True):
        for queries, icds in micro:
            assert all(d == icds[0] for d in icds) and not {s.id for s in icds[0]} & {q.id for q in queries}
    with pytest.raises(InputError, match="expected at least 3 training samples"):
        list(steps_of(exact[2], 0, 0, batch_size=4, accumulate=1, shots=3, share_icds=True))
