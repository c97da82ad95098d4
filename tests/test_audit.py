"The audit on models with a known result: a linear one, and faulty ones that AutoAttack flags as well."
import subprocess
import sys
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from pyautoattack import checks as official

from agft.attack import input_gradient, pgd
from agft.auditing import (
    _GAIN,
    CHECKS,
    _allowed,
    _curve_over_eps,
    _full_precision,
    _open_case,
    _radii,
    _saved_pixels,
    audit,
    audit_figure,
    audit_markdown,
    audit_model,
)
from agft.config import AuditConfig
from agft.core import AgftError, seeded
from agft.data import load_task
from agft.threats import THREATS, pgd20, register_attack, square
from agft.weights import load_model

EPS = 8/255
w   = torch.randn(6, 3*8*8, generator=seeded(0, 'w'))
x   = .3 + .4*torch.rand(60, 3, 8, 8, generator=seeded(0, 'x'))
def linear(x): return x.flatten(1) @ w.T
y   = linear(x).argmax(1)
few:dict[str, Any] = dict(factors=(0, 1, 4), steps=(1, 5, 20), runs=3, auto=(20, 3), queries=200)
audited = partial(audit, x=x, y=y, eps=EPS, **few)
def flags(verdicts): return {v.name for v in verdicts if not v.ok}
def linear_case(logits_fn=linear, eps=EPS): return _open_case(logits_fn, x, y, eps, 'Linf', pgd20, 0)

class NoiseGradient(torch.autograd.Function):
    "The identity, with a gradient that is only noise."
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return torch.randn(g.shape, generator=seeded(0, 'g')).to(g)

noise  = seeded(0, 'noise')
def noisy(x): return linear(x) + torch.randn(len(x), 6, generator=noise)
masked = {'zero gradients': lambda x: (40*linear(x)).half().softmax(1), 'deterministic': noisy}
misled = {'rounded': lambda x: linear((15*x).round()/15),
          'rippled': lambda x: linear(x + .2/255*(1e5*x).sin()),
          'noise for a gradient': lambda x: linear(NoiseGradient.apply(x))}

@pytest.mark.parametrize('norm,eps', [('Linf', EPS), ('L2', .5)])
def test_a_sound_model_passes(norm, eps):
    found = audit(linear, x, y, eps, norm, exact_fn=lambda x: linear(x.double().float()), **few)
    assert [v.name for v in found] == list(CHECKS) and flags(found) == set(), flags(found)

def test_two_classes_fall_as_the_closed_form_says():
    def two(x): return linear(x)[:, :2]
    case = _open_case(two, x, two(x).argmax(1), 1/255, 'Linf', pgd20, 0)
    margin = (two(x)[:, 0] - two(x)[:, 1]).abs()
    radius = margin/(w[0] - w[1]).abs().sum()  # at which an image becomes misclassified, inside [0,1]
    at = [f/255 for f in (0, 1, 2, 4, 8)]
    expected = [int((radius > a).sum()) for a in at]
    assert _curve_over_eps(case, [255*a for a in at]).correct[:-1] == expected

def test_vanishing_gradients_and_noise_are_named():
    for name, f in masked.items():
        assert name in flags(audited(f)), name

@pytest.mark.parametrize('name', misled)
def test_square_finds_what_gradients_do_not(name):
    found = flags(audited(misled[name]))
    assert 'black box' in found and 'deterministic' not in found
    assert ('zero gradients' in found) == (name == 'rounded')

def test_the_official_checks_agree():
    def warned(f, *args):
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter('always')
            f(*args)
        return bool(messages)
    for f in (linear, *masked.values(), *misled.values()):
        ours, grad = {v.name: v.ok for v in audited(f)}, input_gradient(f, x, y)[1]
        assert ours['zero gradients'] == (not warned(official.check_zero_gradients, grad))
        assert ours['deterministic'] == (not warned(official.check_randomized, f, x, y))

def nothing(f, x, y, eps, norm, g, steps=20): return x
def too_far(f, x, y, eps, norm, g, steps=20): return pgd20(f, x, y, 2*eps, norm, g, steps)
def out_of_the_box(f, x, y, eps, norm, g, steps=20):
    return pgd20(f, x, y, eps, norm, g, steps) - .6*eps*(x < .31)
def too_slow(f, x, y, eps, norm, g, steps=20): return pgd(f, x, y, eps, eps/50, steps)

@pytest.mark.parametrize('attack,expected', [
    (nothing, {'falls with eps', 'stronger than noise', 'as strong as Auto-PGD', 'saved pixels'}),
    (too_far, {'saved pixels'}),
    (out_of_the_box, {'saved pixels'}),
    (too_slow, {'falls with steps', 'as strong as Auto-PGD'})])
def test_attacks_that_do_not_work_are_named(attack, expected):
    assert expected <= flags(audited(linear, attack=attack))

def test_pixels_that_a_file_does_not_hold():
    def fine(x): # class 0 as long as the pixels are single-precision numbers
        exact = (x.double() == x.float().double()).flatten(1).all(1).double()
        return torch.stack([exact, torch.full_like(exact, .5)], 1) + 0*x.sum()
    def shift(f, x, y, *budget): return x + 1e-12
    verdict = _saved_pixels(_open_case(fine, x.double(), torch.zeros_like(y), EPS, 'Linf', shift, 0))
    assert '60 of the 60 misclassified images are correct again' in verdict.finding and not verdict.ok

def test_full_precision_counts_what_changes():
    case = linear_case()
    assert _full_precision(case, linear).ok and not _full_precision(case, lambda x: linear(x).roll(1, 1)).ok

def test_other_images_of_the_batch_must_not_matter():
    norm = torch.nn.BatchNorm2d(3)  # left in training mode
    assert 'deterministic' in flags(audited(lambda x: linear(norm(x))))

def test_the_same_seed_gives_the_same_audit_and_torch_keeps_its_state():
    state = torch.get_rng_state()
    one, two = audited(misled['rippled'], seed=3), audited(misled['rippled'], seed=3)
    assert [v.finding for v in one] == [v.finding for v in two] and torch.equal(state, torch.get_rng_state())

def test_square_leaves_the_models_logits_alone():
    kept = linear(x).double()
    before = kept.clone()
    square(lambda x: kept[:len(x)], x, y, EPS, 'Linf', seeded(0, 'square'), 3)
    assert torch.equal(kept, before)

def test_radii_and_tolerances():
    assert _radii(linear_case(eps=.2), (0, 1, 4)) == [0, .2, .5] and _radii(linear_case(eps=.5), (1,)) == [.5]
    assert [_allowed(n, _GAIN) for n in (1, 20, 60)] == [1, 1, 3]

def test_report():
    def no_steps(f, x, y, eps, norm, g): return pgd20(f, x, y, eps, norm, g)
    found = audited(linear, attack=no_steps)
    table = audit_markdown(found)
    assert table.count('✓ ok') == len(found) == 8
    assert table.endswith('Left out: falls with steps, full precision.')
    assert audit_figure(found).png()[:4] == b'\x89PNG' and len(audit_figure(found).axes) == 3

def test_a_model_is_audited_by_its_configuration(monkeypatch):
    config = AuditConfig(eps=4/255, images=6, seed=2)
    verdicts, task = audit_model(config, device='cpu')
    model, same = load_model('agft-tiny'), load_task('source', n=6)
    head = model.head(same.classes, same.templates)
    pixels, labels = same.images[:]/255, same.require_labels()
    expected = audit(lambda x: model.logits(x, head), pixels, labels, 4/255, seed=2)
    assert task.digest() == same.digest() and [v.finding for v in verdicts] == [v.finding for v in expected]
    monkeypatch.setitem(THREATS, 'nothing', None)  # removed again after the test
    del THREATS['nothing']
    register_attack('nothing', steps=1)(lambda logits_fn, x, y, eps, norm, generator: x)
    verdicts, _ = audit_model(AuditConfig(attack='nothing', eps=4/255, images=6), model)
    assert {'falls with eps', 'saved pixels'} <= flags(verdicts)

@pytest.mark.parametrize('bad,words', [
    (dict(eps=0.), ['above 0']), (dict(attack='pgd21'), ['pgd21', 'pgd20']),
    (dict(attack='fgsm', norm='L2'), ['fgsm', 'Linf']),
    (dict(plugins=('no_such_file.py',)), ['no_such_file.py'])])
def test_a_bad_configuration_is_named(bad, words):
    with pytest.raises(AgftError) as e:
        audit_model(AuditConfig(**bad))
    assert all(word in str(e.value) for word in words) and '\n' not in str(e.value)

def test_heavy_libraries_are_imported_by_the_functions_that_use_them():
    heavy = {'matplotlib', 'scipy', 'torchmetrics', 'torchattacks', 'pyautoattack', 'pandas'}
    chapters = 'agft.auditing, agft.calibration, agft.evaluation'
    code = f'import sys, {chapters}; print({heavy} & sys.modules.keys())'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == 'set()'

@pytest.mark.parametrize('bad,word', [
    (dict(x=x[:0], y=y[:0]), '1 or more'), (dict(y=(y + 1) % 6), 'wrong on all'),
    (dict(norm='L1'), 'unknown norm'), (dict(eps=0), 'above 0'), (dict(eps=.6), '0.5'),
    (dict(eps=4), '4/255'), (dict(steps=(5, 1)), 'ascending'), (dict(draws=0), '1 or more'),
    (dict(x=255*x), '[0, 1]'), (dict(attack=lambda *a: a[1][1:]), 'equal'),
    (dict(logits_fn=lambda x: linear(x.detach())), 'gradient')])
def test_bad_input_is_named(bad, word):
    good = dict(logits_fn=linear, x=x, y=y, eps=EPS)
    with pytest.raises(AgftError) as e:
        audit(**{**good, **bad})
    assert word in str(e.value) and '\n' not in str(e.value)
