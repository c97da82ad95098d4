"What callers pass by mistake: prompts that become one, pixels that are no numbers from 0 to 1."
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from agft.core import AgftError, seeded
from agft.data import load_task
from agft.model import from_modules
from agft.weights import load_model

LONG = 'a photo that was taken ' + 'on a sunny day in the garden '*12


@pytest.fixture(scope='module', params=['agft-tiny', 'agft-photo'])
def model(request): return load_model(request.param)


@pytest.mark.parametrize('classes, template', [
    (["cat's ear", 'cat\u2019s ear'], 'a {}'),
    (['red', 'blue', 'green'], LONG + 'and shows a {}'),
    ([f'{LONG} with a cat', f'{LONG} with a dog'], 'a {}'),
    (['ﬁsh', 'fish'], 'a {}')])
def test_classes_that_become_the_same_tokens_are_refused(model, classes, template):
    with pytest.raises(AgftError, match='become the same tokens') as e:
        model.head(classes, [template])
    assert '\n' not in str(e.value) and repr(classes[0]) in str(e.value)


def test_one_template_that_tells_the_classes_apart_is_enough(model):
    with pytest.warns(UserWarning, match='2 of 4 prompts have more tokens'):
        head = model.head(['red', 'blue'], [LONG + 'and is {}', 'a {} thing'])
    assert not torch.equal(head[0], head[1])


def test_a_prompt_that_is_cut_is_a_warning_with_the_text(model):
    with pytest.warns(UserWarning, match='of the first one this is cut.*the end') as caught:
        head = model.head(['red', 'blue'], ['a {} ' + LONG + 'up to the end'])
    assert len(caught) == 1 and not torch.equal(head[0], head[1])
    lost = str(caught[0].message).split("is cut: '")[1].rstrip("'")
    kept = ('a red ' + LONG + 'up to the end').removesuffix(lost)
    short, whole = model.token_ids([kept])[0], model.token_ids([kept + lost])[0]
    ends = int(short.argmax())  # where the end stands in the shorter one
    assert torch.equal(short[:ends], whole[:ends]) and ends >= len(short) - 4


def test_prompts_up_to_the_last_token_are_no_warning(model):
    length = model.tokenizer.context_length
    for words in range(length - 6, length):
        text = ' '.join(['a']*words)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            model.head(['red', 'blue'], ['{} ' + text])
        tokens = len(model.tokenizer.encode(f'blue {text}')) + 2
        assert bool(caught) == (max(tokens, len(model.tokenizer.encode(f'red {text}')) + 2) > length)


def test_the_head_is_that_of_the_prompts_one_by_one(model):
    classes, templates = ['red circle', 'blue star', 'green heart'], ['a {}', 'a photo of a {}']
    rows = [torch.stack([model.encode_text([t.replace('{}', c)])[0] for t in templates]) for c in classes]
    expected = nn.functional.normalize(torch.stack([row.mean(0) for row in rows]), dim=1)
    torch.testing.assert_close(model.head(classes, templates), expected)


def test_functions_that_cannot_tell_two_names_apart_are_refused():
    def colour(texts): return torch.tensor([[1., 0] if 'red' in text else [0, 1.] for text in texts])
    own = from_modules(nn.Flatten(), colour, [.5]*3, [.5]*3, 8, 10.)
    assert own.head(['red', 'blue'], ['{}']).shape == (2, 2) and own.token_ids(['red']) is None
    with pytest.raises(AgftError, match="'blue' and 'green' become the same embedding"):
        own.head(['red', 'blue', 'green'], ['{}'])


@pytest.mark.parametrize('texts', ['a cat', [1, 2], [None], ['a cat', b'a dog']])
def test_prompts_are_a_list_of_texts(model, texts):
    with pytest.raises(AgftError, match='allowed: a list of texts'):
        model.encode_text(texts)


def pixels(model): return torch.rand(2, 3, *model.size, generator=seeded('x'))


WRONG = {
    'bytes': (lambda x: (255*x).byte(), 'uint8'), 'whole numbers': (lambda x: (255*x).long(), 'int64'),
    'bytes as floats': (lambda x: 255*x, 'range over'), 'normalised': (lambda x: (x - .45)/.25, 'range over'),
    'half, to 255': (lambda x: (255*x).half(), 'range over'), 'one image': (lambda x: x[0], 'image.None.'),
    'grey': (lambda x: x[:, :1], 'B,3,H,W'), 'channels last': (lambda x: x.permute(0, 2, 3, 1), 'B,3,H,W'),
    'with alpha': (lambda x: torch.cat([x, x[:, :1]], 1), 'B,3,H,W'),
    'an array': (lambda x: x.numpy(), 'ndarray'), 'a list': (list, 'list'),
    'none': (lambda x: None, 'NoneType')}


@pytest.mark.parametrize('name', WRONG)
def test_what_is_no_batch_of_pixels_is_refused_by_every_encoder(model, name):
    change, words = WRONG[name]
    x, head = change(pixels(model)), torch.eye(2, model.encode_text(['a']).shape[1])
    for encode in (model.features, model.encode_image, lambda x: model.logits(x, head),
                   lambda x: model.cosines(x, head), model.normalise):
        with pytest.raises(AgftError, match=words) as e:
            encode(x)
        assert '\n' not in str(e.value)


def test_pixels_are_taken_in_every_precision_and_beside_the_range(model):
    x = pixels(model)
    plain = model.encode_image(x)
    for dtype, close in ((torch.float64, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, .2)):
        assert (model.encode_image(x.to(dtype)) - plain).abs().max() < close
    beyond = 1.2*x - .1  # as after bicubic resizing, and inside of some attacks
    assert model.encode_image(beyond).isfinite().all()
    assert model.encode_image(x[:0]).shape == (0, plain.shape[1])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_models_in_other_precisions_predict_the_same(dtype):
    task, plain = load_task('digits', 24), load_model('agft-tiny')
    other, x = load_model('agft-tiny').to(dtype), task.images[:]/255
    predicted = [m.logits(x, m.head(task.classes, task.templates)).argmax(1) for m in (plain, other)]
    assert np.mean((predicted[0] == predicted[1]).numpy()) > .95
