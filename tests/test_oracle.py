"Every method against the public code of its authors: the same targets, images, losses and gradients."
import oracle
import pytest
import torch
from oracle import ABOUT, METHODS, ORACLE, case, compare, encoder

from agft.methods import attention_map

pytestmark = pytest.mark.usefixtures('one_thread')  # the order of sums depends on the number of threads


@pytest.mark.parametrize('name', ABOUT['preprocessing'])
def test_what_the_encoder_is_given(name):
    first = next(key for key, about in ABOUT['methods'].items() if about['preprocessing'] == name)
    seen = encoder('teacher', name).normalise(case(first).batch.x[:1])[0]
    channel, row, column = ORACLE['seen.index'].T
    spread = seen.double().std((1, 2), correction=0)
    found = dict(sample=seen[channel, row, column].double(), mean=seen.double().mean((1, 2)), std=spread)
    for what, ours in found.items():
        torch.testing.assert_close(ours, ORACLE[f'seen.{name}.{what}'], rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', METHODS)
def test_a_method_is_what_the_public_code_computes(name):
    found = compare(name)
    print(found)
    assert found['target'] is None or found['target'] <= 1e-5
    assert found['pixels'] <= (100 if name == 'fare10' else 0)  # gradients near zero
    assert found['loss_difference'] <= (1e-5 if name == 'pmg' else 2e-5*found['loss'])
    assert found['parts'] is None or found['parts'] <= (1e-6 if name == 'pmg' else 2e-5*found['loss'])
    assert found['gradients'] <= 5e-5 and found['gradients_compared'] == 3
    assert found['output'] <= 2e-4


def test_the_attention_maps_are_those_of_the_public_code():
    _, models, batch, _, x_adv = case('tga')
    text = ORACLE['head'][ORACLE['labels']]
    pairs = (models.student, x_adv), (models.teacher, batch.x), (models.student, batch.x)
    maps = torch.stack([attention_map(model, x, text).view(4, 224, 224) for model, x in pairs])
    torch.testing.assert_close(maps[..., 8::16, 8::16], ORACLE['tga.maps'], rtol=0, atol=1e-5)


@pytest.mark.parametrize('wrong', ['bilinear', 'bicubic-plain'])
def test_another_rule_of_resizing_gives_other_numbers(wrong, monkeypatch):
    monkeypatch.setitem(oracle.RESIZE, 'agft', wrong)
    assert compare('agft')['loss_difference'] > 1e-3

