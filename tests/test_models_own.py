"Models of the user's own: torch modules, functions, and models of transformers, beside what they must equal."
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from agft.config import AttackConfig, FinetuneConfig, TrainConfig, override
from agft.core import AgftError, seeded
from agft.data import Task
from agft.evaluation import evaluate_task
from agft.methods import Models, method
from agft.model import copy_model, fingerprint, from_modules, from_transformers, interpolate
from agft.threats import threat
from agft.train import adversarial_loss, finetune
from agft.weights import load_model, load_weights, save_model

TEXTS = ['a red circle', 'two hearts', 'a letter g']
SMALL = dict(embed_dim=32, quick_gelu=True, vision_cfg=dict(image_size=32, patch_size=8, width=64, layers=2),
             text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=1, layers=2))
TOWER = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1)
CLOSE:dict[str, Any] = dict(rtol=1e-5, atol=1e-5)


def noise(model):
    "Move every weight from where it starts."
    with torch.no_grad():
        for p in model.parameters():
            p += .02*torch.randn(p.shape)
    return model.eval()


@pytest.fixture
def clip():
    "A small CLIPModel of transformers with random weights."
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    text = dict(TOWER, vocab_size=49408, max_position_embeddings=77, eos_token_id=49407)
    vision = dict(TOWER, image_size=32, patch_size=8)
    config = transformers.CLIPConfig(projection_dim=32, text_config=text, vision_config=vision)
    return noise(transformers.CLIPModel(config))


@pytest.fixture
def siglip():
    "A small SiglipModel of transformers with random weights."
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    text = dict(TOWER, vocab_size=300, max_position_embeddings=16)
    vision = dict(TOWER, image_size=32, patch_size=8)
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    model = noise(transformers.SiglipModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(2.5)
        model.logit_bias.fill_(-10.)
    return model


@pytest.fixture
def converted(clip, tmp_path, architectures):
    "The same weights, renamed for open_clip."
    architectures({'agft-test': SMALL})
    clip.save_pretrained(tmp_path/'clip')
    return load_model('agft-test', tmp_path/'clip'/'model.safetensors')


def letters_tokenizer(length):
    "A tokenizer of transformers with one token a letter, made without a download."
    transformers = pytest.importorskip('transformers')
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    letters = 'abcdefghijklmnopqrstuvwxyz '
    vocab = {'<pad>': 0, '<eos>': 1} | {letter: i + 2 for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token='<eos>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex('.'), 'isolated')
    tokenizer.post_processor = processors.TemplateProcessing(single='$A <eos>', special_tokens=[('<eos>', 1)])
    special = dict(pad_token='<pad>', eos_token='<eos>')
    special['model_max_length'] = length
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_task(size=32, n=4):
    images = torch.randint(0, 256, (n, 3, size, size), generator=seeded('task'), dtype=torch.uint8)
    classes = 'red circle', 'two hearts', 'letter g'
    return Task('noise', images, torch.arange(n) % 3, classes, ('an image of a {}',))


def one_step(original, task):
    "A student after one AGFT step, its teacher, the loss, and the numbers of the log."
    student, teacher = copy_model(original), copy_model(original)
    student.visual.requires_grad_(True)
    models = Models(student, teacher, teacher.head(task.classes, task.templates))
    agft = method('AGFT', logit_scale=1.8*original.logit_scale, gamma=.4)
    loss, numbers = adversarial_loss(models, agft, task, AttackConfig(), TrainConfig(batch_size=4))(0)
    loss.backward()
    torch.optim.SGD(student.visual.parameters(), lr=.1).step()
    return student, teacher, loss.detach(), numbers


def test_a_clip_model_of_transformers_equals_the_converted_one(clip, converted):
    ours, x = from_transformers(clip, converted.tokenizer), torch.rand(3, 3, 32, 32, generator=seeded('x'))
    torch.testing.assert_close(ours.encode_text(TEXTS), converted.encode_text(TEXTS), **CLOSE)
    torch.testing.assert_close(ours.features(x), converted.features(x), **CLOSE)
    logits = ours.logits(x, ours.encode_text(TEXTS))
    torch.testing.assert_close(logits, converted.logits(x, converted.encode_text(TEXTS)), **CLOSE)
    inputs = dict(input_ids=converted.tokenizer(TEXTS), pixel_values=(x - ours.mean)/ours.std)
    torch.testing.assert_close(logits, clip(**inputs).logits_per_image, **CLOSE)
    assert ours.size == (32, 32) and ours.logit_bias == 0
    assert ours.logit_scale == pytest.approx(converted.logit_scale, rel=1e-6)
    tuned = {id(p) for p in ours.visual.parameters()}
    assert tuned == {id(p) for m in (clip.vision_model, clip.visual_projection) for p in m.parameters()}


def test_one_agft_step_and_an_evaluation_equal_those_of_the_converted_model(clip, converted):
    task, images = make_task(), torch.rand(3, 3, 32, 32, generator=seeded('x'))
    ours = from_transformers(clip, converted.tokenizer)
    before = fingerprint(ours)
    mine, teacher, loss, numbers = one_step(ours, task)
    theirs, _, expected, expected_numbers = one_step(converted, task)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(numbers, expected_numbers, atol=1e-5, rtol=0)
    torch.testing.assert_close(mine.features(images), theirs.features(images), **CLOSE)
    assert not torch.allclose(mine.features(images), ours.features(images), **CLOSE)
    assert fingerprint(ours) == fingerprint(teacher) == before != fingerprint(mine)
    for left, right in ((ours, converted), (mine, theirs)):
        flags = [evaluate_task(model, task, threat('pgd20', 4/255)) for model in (left, right)]
        for name in ('clean', 'robust', 'zero_grad'):
            assert (getattr(flags[0], name) == getattr(flags[1], name)).all(), name
        torch.testing.assert_close(*(torch.tensor(f.distance).double() for f in flags), **CLOSE)


def test_a_clip_tokenizer_of_transformers_is_padded_and_masked(clip):
    "Each text is encoded as it is alone, whatever stands beside it; a long one is cut to the context length."
    clip.text_model.eos_token_id = 1
    tokenizer = letters_tokenizer(77)
    ours = from_transformers(clip, tokenizer)
    together = ours.encode_text(['a', 'two blue hearts', 'x'*200])
    for row, text in zip(together, ['a', 'two blue hearts', 'x'*200], strict=True):
        inputs = tokenizer([text], return_tensors='pt', truncation=True, max_length=77)
        theirs = clip.get_text_features(**inputs)
        theirs = getattr(theirs, 'pooler_output', theirs)
        torch.testing.assert_close(row[None], nn.functional.normalize(theirs, dim=-1), **CLOSE)


def test_a_siglip_model_of_transformers(siglip):
    tokenizer = letters_tokenizer(16)
    ours, x = from_transformers(siglip, tokenizer), torch.rand(3, 3, 32, 32, generator=seeded('x'))
    assert ours.mean.unique().item() == ours.std.unique().item() == .5
    assert ours.logit_bias == -10 and ours.name == 'SiglipModel' and ours.size == (32, 32)
    padded = tokenizer(TEXTS, padding='max_length', max_length=16, truncation=True, return_tensors='pt')
    tokens = padded.input_ids
    theirs = siglip(input_ids=tokens, pixel_values=2*x - 1).logits_per_image
    torch.testing.assert_close(ours.logits(x, ours.encode_text(TEXTS)), theirs, **CLOSE)
    as_ids = from_transformers(siglip, lambda texts: tokens[:len(texts)])
    torch.testing.assert_close(as_ids.encode_text(TEXTS), ours.encode_text(TEXTS), **CLOSE)
    student, teacher, loss, numbers = one_step(ours, make_task())
    assert torch.isfinite(loss) and numbers['zero_grad'] < 1
    assert fingerprint(teacher) == fingerprint(ours) != fingerprint(student)


def test_settings_of_a_transformers_model_can_be_given(clip):
    tokenizer = open_clip.get_tokenizer('ViT-B-32')
    ours = from_transformers(clip, tokenizer, (.1, .2, .3), (.4, .5, .6), 32, 'mine')
    assert ours.name == 'mine'
    torch.testing.assert_close(ours.mean.flatten(), torch.tensor([.1, .2, .3]))
    torch.testing.assert_close(ours.std.flatten(), torch.tensor([.4, .5, .6]))
    neither:Any = nn.Linear(2, 2)
    no_tokenizer:Any = None
    with pytest.raises(AgftError, match='Linear; allowed: CLIPModel, SiglipModel'):
        from_transformers(neither, no_tokenizer)


class Letters(nn.Module):
    "A text encoder: how often each letter occurs, times a matrix."
    def __init__(self, dim):
        super().__init__()
        self.table = nn.Linear(26, dim)

    def forward(self, texts):
        rows = [[text.count(letter) for letter in 'abcdefghijklmnopqrstuvwxyz'] for text in texts]
        return self.table(torch.tensor(rows, dtype=torch.float, device=self.table.weight.device))


def make_own(seed=0, name='own'):
    "A convolutional image encoder with batch norm and dropout, and a text encoder, both with random weights."
    torch.manual_seed(seed)
    visual = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                           nn.Flatten(), nn.Dropout(.5), nn.Linear(32, 12))
    return from_modules(visual, Letters(12), [.5]*3, [.25]*3, 16, logit_scale=20., name=name)


def test_modules_of_ones_own():
    model, x = make_own(), torch.rand(2, 3, 16, 16, generator=seeded('x'))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    visual, text = model.visual, model.model.text
    cosines = nn.functional.cosine_similarity(visual((x - .5)/.25)[:, None], text(TEXTS)[None], dim=-1)
    torch.testing.assert_close(model.logits(x, model.encode_text(TEXTS)), 20*cosines)
    assert model.logit_scale == pytest.approx(20.) and model.device == torch.device('cpu')
    assert model.cosines(torch.rand(2, 3, 40, 30), model.encode_text(TEXTS)).shape == (2, 3)
    shifted = from_modules(visual, text, [.5]*3, [.25]*3, (16, 16), 20., logit_bias=-3.)
    torch.testing.assert_close(shifted.logits(x, model.encode_text(TEXTS)), 20*cosines - 3)


def test_a_copy_shares_nothing_and_freezes_nothing():
    model = make_own()
    model.visual.requires_grad_(True)
    copied = copy_model(model)
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in model.parameters()]
    state, other = model.state_dict(keep_vars=True), copied.state_dict(keep_vars=True)
    assert {t.data_ptr() for t in state.values()}.isdisjoint(t.data_ptr() for t in other.values())
    assert fingerprint(copied) == fingerprint(model)
    with torch.no_grad():
        next(copied.visual.parameters()).add_(1.)
    assert fingerprint(copied) != fingerprint(model)
    class Stubborn(nn.Module):
        def __deepcopy__(self, memo): raise TypeError('no copies\nof this')
    stubborn = from_modules(Stubborn(), Letters(12), [.5]*3, [.25]*3, 16, logit_scale=20., name='stubborn')
    with pytest.raises(AgftError, match="'stubborn' cannot be copied: no copies of this"):
        copy_model(stubborn)


def test_a_model_of_functions_is_attacked_and_evaluated_but_not_tuned(tmp_path):
    def mean_colour(x): return x.mean((2, 3))
    def named_colour(texts): return torch.tensor([[1., -1, -1] if 'red' in t else [-1., 1, 1] for t in texts])
    model = from_modules(mean_colour, named_colour, [.5]*3, [.5]*3, 8, logit_scale=10.)
    colours = torch.tensor([[200, 100, 100], [100, 200, 200]], dtype=torch.uint8)
    images = colours.view(2, 3, 1, 1).repeat(1, 1, 8, 8)
    task = Task('colours', images, torch.arange(2), ('red', 'cyan'), ('a {} image',))
    assert not list(model.visual.parameters()) and fingerprint(copy_model(model)) == fingerprint(model)
    weak, strong = (evaluate_task(model, task, threat('pgd20', eps)) for eps in (1/255, 100/255))
    assert weak.clean.all() and weak.robust.all() and not strong.robust.any()
    with pytest.raises(AgftError, match='own has no parameters'):
        finetune(tiny_run(), tmp_path/'run', 'cpu', model, task)


def test_a_method_of_a_module_stands_for_the_module():
    whole = load_model('agft-tiny')
    tokenizer = whole.tokenizer
    assert tokenizer is not None
    def encode_text(texts): return whole.model.encode_text(tokenizer(texts))
    model = from_modules(whole.model.encode_image, encode_text, whole.mean.flatten().tolist(),
                         whole.std.flatten().tolist(), 64, whole.logit_scale)
    x = torch.rand(2, 3, 64, 64, generator=seeded('x'))
    logits = whole.logits(x, whole.encode_text(TEXTS))
    torch.testing.assert_close(model.logits(x, model.encode_text(TEXTS)), logits)
    copied = copy_model(model)
    with torch.no_grad():
        for p in copied.visual.parameters():
            p += .01
    assert torch.equal(model.features(x), whole.features(x))
    assert not torch.equal(copied.features(x), whole.features(x))


def tiny_run():
    "Three steps of AGFT."
    train = {'train.steps': 3, 'train.batch_size': 4, 'train.checkpoint_every': 2}
    return override(FinetuneConfig(), **train, **{'method.lr': .05, 'method.gamma': .4})


def test_a_model_of_ones_own_is_fine_tuned_and_the_run_is_read_again(tmp_path):
    model, task = make_own(name='mine'), make_task(16, 8)
    before, x = fingerprint(model), torch.rand(2, 3, 16, 16, generator=seeded('x'))
    tuned = finetune(tiny_run(), tmp_path/'run', 'cpu', model, task)
    assert fingerprint(model) == before != fingerprint(tuned)
    again = finetune(tiny_run(), tmp_path/'run', 'cpu', model, task)
    assert fingerprint(again) == fingerprint(tuned)
    filled = load_weights(make_own(seed=1, name='mine'), tmp_path/'run'/'model.safetensors')
    assert torch.equal(filled.features(x), tuned.features(x))
    with pytest.raises(AgftError, match="saved from 'mine'.*load_weights"):
        load_model(tmp_path/'run'/'model.safetensors')
    middle = interpolate(model, tuned, .5)
    assert fingerprint(middle) not in (before, fingerprint(tuned))
    other = from_modules(nn.Flatten(), Letters(768), [.5]*3, [.25]*3, 16, logit_scale=20., name='mine')
    with pytest.raises(AgftError, match='one architecture'):
        interpolate(model, other, .5)


def test_encoders_that_share_a_weight_are_saved(tmp_path):
    shared = nn.Linear(26, 12)
    texts, images = Letters(12), nn.Sequential(nn.Conv2d(3, 26, 16), nn.Flatten(), shared)
    texts.table = shared
    model = from_modules(images, texts, [.5]*3, [.25]*3, 16, logit_scale=20.)
    save_model(model, tmp_path/'m.safetensors')
    copied = copy_model(model)
    with torch.no_grad():
        shared.weight.add_(1.)
    load_weights(model, tmp_path/'m.safetensors')
    assert isinstance(model.visual, nn.Sequential)
    assert fingerprint(model) == fingerprint(copied) and model.model.text.table is model.visual[2]


@pytest.mark.parametrize('wrong, words', [
    (dict(size=0), 'size is 0'), (dict(size=(8, 0)), r'size is \(8, 0\)'), (dict(mean=[.5]), 'mean is'),
    (dict(std=[.5, 0., .5]), 'std is'), (dict(logit_scale=-1.), 'logit_scale is -1.0'),
    (dict(logit_scale=float('nan')), 'logit_scale is nan'), (dict(resize='nearest'), 'bilinear, bicubic')])
def test_wrong_settings_of_ones_own_model(wrong, words):
    settings = dict(mean=[.5]*3, std=[.5]*3, size=8, logit_scale=10.) | wrong
    with pytest.raises(AgftError, match=words):
        from_modules(nn.Flatten(), Letters(192), **settings)


def test_encoders_that_return_something_else_are_refused():
    bad = from_modules(lambda x: dict(features=x), lambda texts: torch.zeros(1, 4), [.5]*3, [.5]*3, 8, 10.)
    with pytest.raises(AgftError, match=r'type dict for 2 inputs; allowed: a tensor of shape \(2, D\)'):
        bad.features(torch.zeros(2, 3, 8, 8))
    with pytest.raises(AgftError, match=r'shape \(1, 4\) for 3 inputs'):
        bad.encode_text(TEXTS)
