"""The forward pass: recorded vectors of transformers, transformers itself on random tiny models, and what must not matter."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.idefics import processing_idefics
from transformers.models.mistral import modeling_mistral as mistral

from mimic import Recorder
from model import Idefics2, RMSNorm, Shifts, attention, rope, rotate
from models.idefics1 import Idefics1, latest_picture
from support.files import InputError
from support.kernels import Linear

IMAGE = 57                       # the image token of the random models below, whose vocabulary has 60 words
TOLERANCE = dict(rtol=0, atol=1e-4)     # fp32 sums in another order, states and logits of up to 14
EXACT = dict(rtol=0, atol=1e-10)        # fp64: the same mathematics twice


class Explicit(Shifts):
    """Asks for lse, and so for our own attention, and changes nothing."""
    def after_attention(self, layer, q, k, out, lse):
        return out


def outputs_of(modules, run):
    """What each of `modules` returned while `run()` ran."""
    kept = [[] for _ in modules]
    hooks = [m.register_forward_hook(lambda _m, _i, out, to=to: to.append(out)) for m, to in zip(modules, kept, strict=True)]
    result = run()
    for hook in hooks:
        hook.remove()
    return result, [out[0] for out in kept]


# ---- Vectors recorded from transformers 5.23
@pytest.fixture(scope="module", params=["i2_a", "i1_a"])
def golden(request, shared):
    """The model in fp32 and fp64, its inputs with the real images only, the recorded outputs."""
    folder, kind = shared / "golden" / request.param, {"i2_a": Idefics2, "i1_a": Idefics1}[request.param]
    given = SimpleNamespace(**load_file(folder / "inputs.safetensors"), out=load_file(folder / "outputs.safetensors"),
                            folder=folder, model=kind.from_pretrained(folder), exact=kind.from_pretrained(folder, torch.float64))
    pixels = given.pixel_values.flatten(0, 1)
    mask = given.pixel_attention_mask.flatten(0, 1).bool() if kind is Idefics2 else torch.ones_like(pixels[:, 0]).bool()
    given.real = pixels.flatten(1).any(1)                    # the others fill up the rows
    given.pixels, given.mask = (x[given.real] for x in (pixels, mask))
    given.per_image = given.model.config.perceiver.resampler_n_latents if kind is Idefics2 else 1
    given.n_words, given.image_id = given.model.config.text.vocab_size, given.model.config.image_token_id
    given.keep = given.attention_mask.bool()
    given.features, given.exact_features = (m.encode_images(given.pixels, given.mask) for m in (given.model, given.exact))
    return given


@pytest.mark.parametrize("golden", ["i2_a"], indirect=True)
def test_vision_tower_and_connector_equal_the_recorded_ones_stage_by_stage(golden):
    vision, connector = golden.model.model.vision_model, golden.model.model.connector
    stages = {"vision_layers": list(vision.encoder["layers"]),
              "vision_post_layernorm": [vision.post_layernorm], "modality_projection": [connector.modality_projection],
              "perceiver_layers": list(connector.perceiver_resampler.layers)}
    for name, modules in stages.items():
        _, ours = outputs_of(modules, lambda: golden.model.encode_images(golden.pixels, golden.mask))
        torch.testing.assert_close(torch.stack(ours).view_as(golden.out[name]), golden.out[name], **TOLERANCE, msg=name)
    torch.testing.assert_close(golden.features, golden.out["image_features"], **TOLERANCE)


@pytest.mark.parametrize("golden", ["i1_a"], indirect=True)
def test_clip_resampler_and_gated_blocks_equal_the_recorded_ones_stage_by_stage(golden):
    text, real = golden.model.text_model, golden.real
    vision, resampler = text.vision_model, text.perceiver_resampler
    stages = {"vision_pre_layrnorm": [vision.pre_layrnorm],
              "vision_layers": list(vision.encoder["layers"]), "perceiver_attn": [block[0] for block in resampler.blocks]}
    for name, modules in stages.items():
        _, ours = outputs_of(modules, lambda: golden.model.encode_images(golden.pixels, golden.mask))
        expected = golden.out[name].view(len(modules), len(real), *golden.out[name].shape[-2:])[:, real]
        torch.testing.assert_close(torch.stack(ours), expected, **TOLERANCE, msg=name)
    torch.testing.assert_close(golden.features, golden.out["image_features"][real], **TOLERANCE)
    patches, valid = golden.model.patches(golden.pixels, golden.mask)                     # those without the class token
    torch.testing.assert_close(patches, golden.out["vision_layers"][-1][real][:, 1:], **TOLERANCE)
    assert valid.all()
    _, ours = outputs_of(list(text.gated_cross_attn_layers),
                         lambda: golden.model(golden.input_ids, golden.attention_mask, golden.features))
    torch.testing.assert_close(torch.stack(ours)[:, golden.keep], golden.out["cross_layers"][:, golden.keep], **TOLERANCE)


def test_every_decoder_layer_and_the_logits_equal_the_recorded_ones(golden):
    record = Recorder()
    logits = golden.model(golden.input_ids, golden.attention_mask, golden.features, record)
    for ours, name in ((record.ffn, "text_mlp_out"), (record.layer, "text_layers")):
        torch.testing.assert_close(torch.stack(ours)[:, golden.keep], golden.out[name][:, golden.keep], **TOLERANCE)
    torch.testing.assert_close(logits[golden.keep], golden.out["logits"][golden.keep], **TOLERANCE)


def test_separators_of_the_official_code_are_masked_keys_that_only_idefics2_counts_as_positions(golden):
    counted = torch.arange(golden.input_ids.shape[1]).expand_as(golden.input_ids)
    positions = None if isinstance(golden.model, Idefics1) else counted
    logits = golden.model(golden.sep_input_ids, golden.sep_attention_mask, golden.features, position_ids=positions)
    torch.testing.assert_close(logits[golden.keep], golden.out["sep_logits"][golden.keep], **TOLERANCE)


def test_a_prompt_without_images_needs_no_features(golden):
    logits, expected = golden.model(golden.input_ids[2:], golden.attention_mask[2:]), golden.out["logits"][2:]
    torch.testing.assert_close(logits[golden.keep[2:]], expected[golden.keep[2:]], **TOLERANCE)


# ---- transformers itself, on random models
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 24, "embed_dim": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 4}
RESAMPLER = {"resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 6}


def idefics2_reference(text, vision, perceiver):
    text = {"model_type": "mistral", "num_key_value_heads": 2, "vocab_size": 60, "pad_token_id": 0, "rms_norm_eps": 1e-5} | text
    perceiver = {"hidden_size": 32, "rms_norm_eps": 1e-5, "num_key_value_heads": 2} | perceiver
    config = transformers.Idefics2Config(text_config=text, vision_config=vision, perceiver_config=perceiver, image_token_id=IMAGE)
    config._attn_implementation = "eager"
    return transformers.Idefics2ForConditionalGeneration(config)


def idefics1_reference(text, vision, perceiver):
    text = {"vocab_size": IMAGE - 1, "additional_vocab_size": 4, "cross_layer_interval": 1, "qk_layer_norms": True,
            "use_resampler": True, "freeze_text_layers": False, "freeze_vision_layers": False} | text
    config = transformers.IdeficsConfig(vision_config=vision | {"hidden_act": "gelu"}, **text,
                                        perceiver_config=perceiver | {"qk_layer_norms_perceiver": True})
    config._attn_implementation = "eager"
    return transformers.IdeficsForVisionText2Text(config)


REFERENCES = {Idefics2: idefics2_reference, Idefics1: idefics1_reference}


def save_reference(folder, seed=0, text=(), vision=(), perceiver=(), generation=(), end_boost=1.0, kind=Idefics2):
    """A random model of transformers, the judge of `kind`, saved to `folder`. end_boost scales the end tokens' logits."""
    torch.manual_seed(seed)
    model = REFERENCES[kind](TEXT | dict(text), VISION | dict(vision), RESAMPLER | dict(perceiver)).eval()
    for name, p in model.named_parameters():      # everything random, or what a model does with ones and zeros goes unseen
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if "embed" not in name and "latents" not in name else 1.0)
        else:
            one = "alpha" in name or "norm" in name and name.endswith("weight")
            torch.nn.init.normal_(p, mean=1.0 if one else 0.0, std=0.3)
    model.generation_config.update(**{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **dict(generation)})
    model.lm_head.weight.data[model.generation_config.eos_token_id] *= end_boost
    model.save_pretrained(folder)
    return model


def make_batch(model, seed, images, sizes, text_length=9, adjacent=False):
    """A left-padded batch for `model` with images[b] images in row b, of the pixel sizes in `sizes` (used in turn).

    Holds what transformers takes (.theirs: images padded to the same size and number) and what we take (.pixels, .mask). Idefics1
    has one size, one token an image, and is told which image each token sees."""
    g, rows, real = torch.Generator().manual_seed(seed), [], []
    one_size = model.config.model_type == "idefics"
    n_latents = 1 if one_size else model.config.perceiver_config.resampler_n_latents
    sizes = [(28, 28)] if one_size else sizes
    for n in images:
        row = [1] + torch.randint(3, IMAGE, (text_length + int(torch.randint(0, 5, (), generator=g)),), generator=g).tolist()
        cuts = [1] * n if adjacent else torch.randint(1, len(row), (n,), generator=g).sort(descending=True).values.tolist()
        for cut in cuts:
            row[cut:cut] = [IMAGE] * n_latents
        rows.append(row)
        real.append([torch.randn(3, *sizes[(sum(images[:len(real)]) + i) % len(sizes)], generator=g) for i in range(n)])
    input_ids = torch.tensor([[0] * (max(map(len, rows)) - len(row)) + row for row in rows])
    keep, most, (H, W) = input_ids != 0, max(1, *images), (max(size[i] for size in sizes) for i in (0, 1))
    pixels, mask = torch.zeros(len(rows), most, 3, H, W), torch.zeros(len(rows), most, H, W, dtype=torch.bool)
    for b, row in enumerate(real):
        for i, image in enumerate(row):
            h, w = image.shape[1:]
            pixels[b, i, :, :h, :w], mask[b, i, :h, :w] = image, True
    there = mask.flatten(2).any(-1)
    theirs = {"input_ids": input_ids, "attention_mask": keep.long()}
    if one_size:
        latest = (input_ids == IMAGE).cumsum(1)
        theirs |= {"pixel_values": pixels, "image_attention_mask": torch.nn.functional.one_hot(latest, most + 1)[..., 1:]}
    elif any(images):
        theirs |= {"pixel_values": pixels, "pixel_attention_mask": mask}
    return SimpleNamespace(input_ids=input_ids, attention_mask=keep.long(), keep=keep, theirs=theirs, images=sum(images),
                           there=there, pixels=pixels[there], mask=mask[there])


def features_of(model, batch):
    return model.encode_images(batch.pixels, batch.mask) if batch.images else None


def run_reference(theirs, batch):
    """→ logits, features of the real images (N,n_latents,d), outputs of every layer's FFN, outputs of every layer."""
    inner = theirs.model
    eyes, decoder = ((getattr(inner, "perceiver_resampler", inner.vision_model), inner.layers)
                     if theirs.config.model_type == "idefics" else (inner.connector, inner.text_model.layers))
    found = []
    hook = eyes.register_forward_hook(lambda _m, _i, out: found.append(getattr(out, "last_hidden_state", out)))
    with torch.no_grad():
        result, states = outputs_of([layer.mlp for layer in decoder] + list(decoder), lambda: theirs(**batch.theirs))
    hook.remove()
    features = found[0] if batch.images else None
    if batch.images and len(features) > batch.images:                   # Idefics1's are those of the padding images, too
        features = features[batch.there.flatten()]
    return result.logits, features, states[:len(decoder)], states[len(decoder):]


CASES = {
    "gqa_1": dict(text=dict(num_key_value_heads=4), perceiver=dict(num_key_value_heads=4, resampler_depth=3), images=[1, 2],
                  sizes=[(28, 28)]),
    "gqa_2_head_dim_of_its_own": dict(text=dict(head_dim=10), images=[2, 0, 1], sizes=[(28, 20), (12, 24)]),
    "gqa_4_partial_patches": dict(text=dict(num_key_value_heads=1), images=[1, 1], sizes=[(27, 22), (17, 25), (21, 28)],
                                  perceiver=dict(num_key_value_heads=1, resampler_head_dim=9, resampler_n_latents=5)),
    "gqa_8_first_row_without_images": dict(text=dict(num_attention_heads=8, num_key_value_heads=1), images=[0, 3, 1],
                                           sizes=[(20, 28), (28, 12), (8, 9)]),
    "window_shorter_than_the_prompt": dict(text=dict(sliding_window=5), images=[1, 3, 0], sizes=[(24, 16), (16, 24)]),
    "no_window_adjacent_images": dict(text=dict(sliding_window=None), images=[3, 2, 1], sizes=[(28, 8), (5, 27)], adjacent=True),
    "rope_theta_and_eps": dict(text=dict(rope_parameters={"rope_type": "default", "rope_theta": 50.0}, rms_norm_eps=1e-2),
                               vision=dict(layer_norm_eps=1e-2), perceiver=dict(rms_norm_eps=0.1), images=[1], sizes=[(16, 8)]),
    "grid_14": dict(vision=dict(image_size=42, patch_size=3, num_attention_heads=3), images=[2, 1], sizes=[(42, 33), (26, 41)],
                    text=dict(num_hidden_layers=5, intermediate_size=20)),
    "only_text": dict(images=[0, 0], sizes=[(8, 8)]),
}
CASES |= {f"idefics1_{name}": dict(kind=Idefics1, sizes=None, **case) for name, case in {
    "a_block_before_every_third_of_six_layers": dict(text=dict(num_hidden_layers=6, cross_layer_interval=3), images=[1, 3]),
    "adjacent_images_first_row_without": dict(images=[0, 3, 2], adjacent=True),
    "only_text": dict(images=[0, 0]),
    "rope_theta_and_eps": dict(text=dict(rope_parameters={"rope_type": "default", "rope_theta": 50.0}, rms_norm_eps=1e-2),
                               vision=dict(layer_norm_eps=1e-2), images=[1]),
    "other_sizes": dict(text=dict(num_attention_heads=8, additional_vocab_size=9, num_hidden_layers=4, cross_layer_interval=2),
                        vision=dict(num_attention_heads=3, patch_size=7, num_hidden_layers=3),
                        perceiver=dict(resampler_n_latents=5, resampler_n_heads=2, resampler_head_dim=9), images=[1, 2, 1]),
}.items()}


@pytest.mark.parametrize("gradients", [True, False], ids=["with_gradients", "without"])
@pytest.mark.parametrize("case", CASES)
def test_features_layers_and_logits_equal_transformers(case, gradients, tmp_path, monkeypatch):
    """Passes without gradients take other kernels: additive masks, and oneDNN for products, here with all weights."""
    monkeypatch.setattr(Linear, "LARGE", 0)
    given = dict(CASES[case])
    images, sizes, adjacent = given.pop("images"), given.pop("sizes"), given.pop("adjacent", False)
    theirs = save_reference(tmp_path, seed=len(case), **given)
    batch = make_batch(theirs, len(case), images, sizes, adjacent=adjacent)
    expected_logits, expected_features, *states = run_reference(theirs, batch)
    ours, record = given.get("kind", Idefics2).from_pretrained(tmp_path), Recorder()
    with torch.set_grad_enabled(gradients):
        features = features_of(ours, batch)
        if batch.images:
            torch.testing.assert_close(features, expected_features, **TOLERANCE)
        logits = ours(batch.input_ids, batch.attention_mask, features, record)
    for mine, expected in zip([*record.ffn, *record.layer, logits], [*states[0], *states[1], expected_logits], strict=True):
        torch.testing.assert_close(mine[batch.keep], expected[batch.keep], **TOLERANCE)


def test_patch_positions_follow_the_published_rounding_on_the_70_by_70_grid(tmp_path):
    """Images of 25, 49, 50, 55 and 58 patches a side, where fp32 fractions and exact arithmetic disagree."""
    thin = dict(image_size=140, patch_size=2, num_hidden_layers=1, hidden_size=8, num_attention_heads=1)
    theirs = save_reference(tmp_path, vision=thin, perceiver=dict(resampler_depth=1))
    ours, ids = Idefics2.from_pretrained(tmp_path), []
    for model in theirs.model.vision_model, ours.model["vision_model"]:
        model.embeddings.position_embedding.register_forward_pre_hook(lambda _module, inputs: ids.append(inputs[0]))
    batch = make_batch(theirs, 0, [3], [(2 * 49, 2 * 58), (2 * 50, 2 * 25), (2 * 58, 2 * 55)])
    with torch.no_grad():
        expected = theirs.get_image_features(batch.theirs["pixel_values"], batch.theirs["pixel_attention_mask"]).pooler_output[0]
    torch.testing.assert_close(features_of(ours, batch).flatten(0, 1), expected, **TOLERANCE)
    assert torch.equal(ids[0], ids[1])
    exact = torch.arange(49) * 70 // 49 * 70
    assert not torch.equal(ids[1][0].view(58, 58)[:49, 0], exact)         # so the trap is really there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_equals_transformers_bit_for_bit(dtype):
    torch.manual_seed(0)
    x, weight = 3 * torch.randn(2, 5, 128).to(dtype), torch.rand(128)
    norms = RMSNorm(128, 1e-5), mistral.MistralRMSNorm(128, 1e-5)
    with torch.no_grad():
        for norm in norms:
            norm.to(dtype).weight.copy_(weight)
        assert torch.equal(*(norm(x) for norm in norms))


def test_rotary_embedding_equals_transformers_bit_for_bit_at_the_published_size():
    torch.manual_seed(0)
    positions, x = torch.arange(4096)[None], torch.randn(1, 2, 4096, 128)
    expected, _ = mistral.apply_rotary_pos_emb(x, x, *mistral.MistralRotaryEmbedding(mistral.MistralConfig())(x, positions))
    got = rotate(x, *rope(positions, 128, 10000.0, torch.float32))
    assert torch.equal(got, expected), f"up to {(got - expected).abs().max():.1e} apart"


def test_a_prompt_longer_than_the_published_window_of_4096_equals_transformers(tmp_path):
    theirs = save_reference(tmp_path, text=dict(num_attention_heads=2, num_key_value_heads=1, sliding_window=4096))
    batch = make_batch(theirs, 0, [0], [(8, 8)], text_length=4200)
    with torch.no_grad():
        expected = theirs(**batch.theirs, logits_to_keep=200).logits
    logits = Idefics2.from_pretrained(tmp_path)(batch.input_ids, batch.attention_mask)[:, -200:]
    torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("shifts", [None, Explicit()], ids=["fused", "explicit"])
def test_gradients_of_every_parameter_equal_transformers(tmp_path, shifts, kind):
    theirs = save_reference(tmp_path, kind=kind)
    ours = kind.from_pretrained(tmp_path).requires_grad_(True)
    batch = make_batch(theirs, 0, [2, 0, 1], [(28, 20), (17, 24)])
    for logits in theirs(**batch.theirs).logits, ours(batch.input_ids, batch.attention_mask, features_of(ours, batch), shifts):
        answers = batch.input_ids[:, 1:].where(batch.keep[:, :-1], -100)      # no loss on padding, whose own rows mean nothing
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), answers.flatten()).backward()
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    unused = {name for name, p in ours.named_parameters() if p.grad is None}
    assert unused == {name for name in expected if kind is Idefics1 and "vision_model.post_layernorm" in name}
    for name, p in ours.named_parameters():
        if name not in unused:
            torch.testing.assert_close(p.grad, expected[name].grad, **TOLERANCE, msg=name)


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("shifts", [None, Explicit()], ids=["fused", "explicit"])
def test_bf16_errors_are_at_most_twice_those_of_transformers_in_bf16(tmp_path, shifts, kind):
    theirs = save_reference(tmp_path, text=dict(num_hidden_layers=4), kind=kind)
    batch = make_batch(theirs, 0, [2, 0, 1], [(28, 20), (17, 24)], text_length=30)
    exact, plain = run_reference(theirs, batch)[:2], run_reference(theirs.to(torch.bfloat16), batch)[:2]
    ours = kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
    features = features_of(ours, batch)
    logits = ours(batch.input_ids, batch.attention_mask, features, shifts)[batch.keep]
    for mine, bf16, fp32 in ((features, plain[1], exact[1]), (logits, plain[0][batch.keep], exact[0][batch.keep])):
        assert mine.dtype == torch.bfloat16
        assert (mine - fp32).square().mean().sqrt() <= 2 * (bf16 - fp32).square().mean().sqrt()


# ---- What must not matter, and what is refused
@pytest.mark.parametrize("golden", ["i2_a"], indirect=True)
def test_the_padding_of_an_image_changes_none_of_its_features(golden):
    for pixels, mask, together in zip(golden.pixels, golden.mask, golden.exact_features, strict=True):
        h, w = int(mask[:, 0].sum()), int(mask[0].sum())
        alone = golden.exact.encode_images(pixels[None, :, :h, :w], mask[None, :h, :w])[0]
        torch.testing.assert_close(alone, together, **EXACT)
        noisy = golden.exact.encode_images(pixels.where(mask, 5.0)[None], mask[None])[0]
        torch.testing.assert_close(noisy, together, **EXACT)


def test_changing_one_image_leaves_the_features_of_the_others_alone(golden):
    pixels = golden.pixels.clone()
    pixels[1] = -pixels[1]
    features = golden.exact.encode_images(pixels, golden.mask)
    torch.testing.assert_close(features[[0, 2]], golden.exact_features[[0, 2]], **EXACT)
    assert (features[1] - golden.exact_features[1]).abs().max() > 0.1


def test_wrong_numbers_of_image_tokens_and_words_that_do_not_exist_are_refused(golden):
    n = golden.per_image
    for rows, features, found, images in (0, golden.features[:2], 3 * n, 2), (0, None, 3 * n, 0), (2, golden.features, 0, 3):
        with pytest.raises(InputError, match=f"{found} image tokens in the prompts, but {images} images of {n} each"):
            golden.model(golden.input_ids[rows:], golden.attention_mask[rows:], features)
    for wrong in golden.n_words, -1:
        with pytest.raises(InputError, match=rf"expected token ids in 0 … {golden.n_words - 1}, found .*{wrong}"):
            golden.model(torch.tensor([[1, wrong]]), torch.ones(1, 2))


def test_a_token_looks_at_the_latest_picture_as_the_published_processor_says():
    """None before the first, none behind </s> until the next; judge: transformers' own loop, on random ids with many of both."""
    judge = processing_idefics.image_attention_mask_for_packed_input_ids
    tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda token: 3, eos_token_id=2)
    ids = torch.randint(0, 6, (200, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(latest_picture(ids, 3, 2), judge(ids, tokenizer, "pt")[0])


def test_key_value_heads_must_divide_the_heads():
    with pytest.raises(ValueError, match="4 query heads are no multiple of 3"):
        attention(torch.zeros(1, 4, 1, 2), torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2))
