"""Generation: recorded ids and transformers as judges of greedy and beam search; the cache; what must not matter."""

import pytest
import torch
from test_model import EXACT, TOLERANCE, Explicit, features_of, golden, make_batch, save_reference  # noqa: F401

from mimic import MimIC
from model import Idefics2, KVCache
from models.idefics1 import Idefics1


def until_the_end(ids, ends):
    """Rows of generated ids as lists, each up to and with its first end token: what is behind it is padding."""
    rows = []
    for row in ids.tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:stop + 1])
    return rows


@pytest.mark.parametrize("name, search", [("greedy", {}), ("beam3_lp0", dict(num_beams=3, length_penalty=0.0)),
                                          ("beam3_lp1", dict(num_beams=3, length_penalty=1.0))])
def test_generated_ids_equal_the_recorded_ones(golden, name, search):  # noqa: F811
    ids = golden.model.generate(golden.input_ids, golden.attention_mask, golden.features, 8, **search)
    expected = golden.out[f"gen_{name}_ids"][:, golden.input_ids.shape[1]:]
    assert until_the_end(ids, {2}) == until_the_end(expected, {2})


def test_the_logits_behind_greedy_ids_equal_the_recorded_scores(golden):  # noqa: F811
    ids = golden.out["gen_greedy_ids"]
    mask = torch.nn.functional.pad(golden.attention_mask, (0, 8), value=1)
    logits = golden.model(ids, mask, golden.features)[:, golden.input_ids.shape[1] - 1:-1]
    torch.testing.assert_close(logits, golden.out["gen_greedy_scores"], **TOLERANCE)


# ---- transformers itself, on random models
SEARCHES = {"greedy": dict(num_beams=1), "beams_3_penalty_0": dict(num_beams=3, length_penalty=0.0),
            "beams_3_penalty_1": dict(num_beams=3, length_penalty=1.0),
            "beams_3_penalty_2": dict(num_beams=3, length_penalty=2.0),
            "beams_3_penalty_-0.5": dict(num_beams=3, length_penalty=-0.5)}
ENDS = {"one_end": dict(eos_token_id=2),
        "two_ends_and_banned_words": dict(eos_token_id=[2, 7], bad_words_ids=[[56], [57], [11], [30]]),
        "six_ends": dict(eos_token_id=[2, 7, 8, 9, 10, 11])}     # so many that all of the best 2K continuations may end
SEEDS = range(7)


@pytest.fixture(scope="module", params=[(kind, ends) for kind in (Idefics2, Idefics1) for ends in ENDS],
                ids=lambda param: f"{param[0].__name__}-{param[1]}")
def pairs(request, tmp_path_factory):
    """(seed, their model, our model, batch, our image features) of some seeds, and the ids that end an answer."""
    made, (kind, ends) = [], request.param
    for seed in SEEDS:
        folder = tmp_path_factory.mktemp("reference")
        text = (dict(num_key_value_heads=(1, 2, 4)[seed % 3], sliding_window=(None, 4, 9)[seed % 3]) if kind is Idefics2
                else dict(cross_layer_interval=1 + seed % 2))
        theirs = save_reference(folder, seed, text=text, generation=ENDS[ends], end_boost=2.3, kind=kind)
        ours, batch = kind.from_pretrained(folder), make_batch(theirs, seed, [1, 0, 2], [(8, 8), (12, 6)])
        made.append((seed, theirs, ours, batch, features_of(ours, batch)))
    return made, ours.end_ids


@pytest.mark.parametrize("search", SEARCHES)
def test_generated_ids_equal_transformers(pairs, search):
    made, ends = pairs
    lengths = []
    for seed, theirs, ours, batch, features in made:
        expected = theirs.generate(**batch.theirs, do_sample=False, max_new_tokens=8, **SEARCHES[search])
        expected = until_the_end(expected[:, batch.input_ids.shape[1]:], ends)
        ids = ours.generate(batch.input_ids, batch.attention_mask, features, 8, **SEARCHES[search])
        assert until_the_end(ids, ends) == expected, f"seed {seed}"
        lengths += map(len, expected)
    assert len(set(lengths)) > 1          # so beams of a batch did finish at different times


def test_banned_words_are_never_generated_and_end_ids_can_be_added(pairs):
    _, _, ours, batch, features = pairs[0][0]
    inputs = batch.input_ids, batch.attention_mask, features
    for beams in 1, 3:
        free = ours.generate(*inputs, 8, num_beams=beams)
        first = set(free[:, 0].tolist())
        assert not first & set(ours.generate(*inputs, 8, num_beams=beams, banned_ids=first).flatten().tolist())
    stopped = ours.generate(*inputs, 8, end_ids=ours.generate(*inputs, 1).flatten().tolist())
    assert stopped.shape == (3, 1)


# ---- What must not matter
@pytest.mark.parametrize("window", [4096, 6])
@pytest.mark.parametrize("shifts", [None, Explicit()], ids=["fused", "explicit"])
def test_decoding_one_by_one_gives_the_logits_of_one_full_forward(golden, window, shifts):  # noqa: F811
    model, n = golden.exact, golden.input_ids.shape[1]
    model.config.text.sliding_window, before = window, model.config.text.sliding_window
    whole = model(golden.input_ids, golden.attention_mask, golden.exact_features, shifts)
    cache, parts = KVCache(model.config.text.num_hidden_layers, n), []
    rows, columns = (golden.input_ids == golden.image_id).nonzero()[::golden.per_image].T        # the first token of each image
    last = int(columns.max()) + golden.per_image
    first = int(columns[(rows == 0)].max()) - 1 if golden.per_image == 1 else last      # one-token images: cut between them, too
    for start, end in zip(cuts := sorted({0, first, last, last + 1, last + 2, n}), cuts[1:], strict=False):
        new = golden.exact_features[(columns >= start) & (columns < end)]
        states = model.hidden_states(golden.input_ids[:, start:end], golden.attention_mask[:, :end],
                                     new if len(new) else None, shifts, cache=cache)
        parts.append(model.lm_head(states))
    model.config.text.sliding_window = before
    torch.testing.assert_close(torch.cat(parts, 1)[golden.keep], whole[golden.keep], **EXACT)


@pytest.mark.parametrize("search", SEARCHES)
def test_more_left_padding_and_other_rows_change_no_generated_ids(golden, search):  # noqa: F811
    ids = golden.model.generate(golden.input_ids, golden.attention_mask, golden.features, 8, **SEARCHES[search])
    padded, mask = (torch.nn.functional.pad(x, (5, 0)) for x in (golden.input_ids, golden.attention_mask))
    assert torch.equal(golden.model.generate(padded, mask, golden.features, 8, **SEARCHES[search]), ids)
    n = int(golden.attention_mask[2].sum())
    short = golden.input_ids[2:, -n:], golden.attention_mask[2:, -n:]      # the row without images, alone and unpadded
    alone = golden.model.generate(*short, None, 8, **SEARCHES[search])
    assert until_the_end(alone, {2}) == until_the_end(ids[2:], {2})


@pytest.mark.parametrize("beams", [1, 3])
def test_finished_rows_are_filled_with_the_pad_id(pairs, beams):
    made, ends = pairs
    for _, _, ours, batch, features in made[:3]:
        ids = ours.generate(batch.input_ids, batch.attention_mask, features, 8, num_beams=beams)
        for row, kept in zip(ids.tolist(), until_the_end(ids, ends), strict=True):
            assert row[len(kept):] == [0] * (len(row) - len(kept))


def test_a_generated_image_token_is_an_ordinary_word(golden):  # noqa: F811
    """Forced: every other word is banned, so the second step is fed an image token without an image."""
    others = set(range(golden.n_words)) - {golden.image_id}
    ids = golden.model.generate(golden.input_ids, golden.attention_mask, golden.features, 3, banned_ids=others)
    assert ids.tolist() == [[golden.image_id] * 3] * 3


@pytest.mark.parametrize("beams", [1, 3])
def test_bf16_models_generate(golden, beams):  # noqa: F811
    model = type(golden.model).from_pretrained(golden.folder, dtype=torch.bfloat16)
    features = model.encode_images(golden.pixels, golden.mask)
    ids = model.generate(golden.input_ids, golden.attention_mask, features, 8, num_beams=beams)
    assert features.dtype == torch.bfloat16 and ids.shape[0] == 3 and ids.ge(0).all() and ids.lt(golden.n_words).all()


# ---- Passes without gradients take the library's kernel, those with gradients our own attention
@pytest.mark.parametrize("last", [1, 4])
def test_the_last_columns_alone_are_those_of_the_whole_pass(golden, last):  # noqa: F811
    torch.manual_seed(0)
    for shifts in (None, MimIC.for_model(golden.exact).double()):
        given = golden.input_ids, golden.attention_mask, golden.exact_features, shifts
        whole, alone = golden.exact.hidden_states(*given), golden.exact.hidden_states(*given, last=last)
        torch.testing.assert_close(alone, whole[:, -last:], **EXACT)
