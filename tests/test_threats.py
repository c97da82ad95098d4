"""Named threats as an evaluation uses them, attacks of your own, the official ensemble with few classes."""
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agft.attack import NORMS, cross_entropy, misclassified, pgd, random_start
from agft.auditing import audit
from agft.config import EvalConfig
from agft.core import AgftError, raises, seeded
from agft.data import load_task
from agft.evaluation import _evaluate_batch, evaluate_threats
from agft.threats import THREATS, Attack, load_plugins, pgd20, register_attack, threat, threats_of
from agft.weights import load_model

OFFICIAL = ('autoattack', 'square')  # thousands of forward passes an image
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in OFFICIAL else name for name in THREATS]


@pytest.mark.parametrize('name', NAMES)
def test_robust_is_below_clean_and_falls_with_the_radius(name, tmp_path):
    "Image by image: what is robust is correct clean, and was robust in every smaller ball."
    if THREATS[name].counts == 'adversarial':
        pytest.skip('counts the adversarial image alone')
    task = load_task('letters', 6)
    radii = (0, 1/255, 4/255) if THREATS[name].steps else (0,)
    threats = [threat(name, eps) for eps in radii]
    found = evaluate_threats(load_model('agft-tiny'), [task], tmp_path, threats)
    flags = [found[t.label][task.name] for t in threats]
    assert np.array_equal(flags[0].clean, flags[0].robust) and not any(f.zero_grad.any() for f in flags)
    for f, smaller, eps in zip(flags, [flags[0], *flags[:-1]], radii, strict=True):
        assert not (f.robust & ~smaller.robust).any() and (f.distance <= eps*(1 + 1e-4) + 1e-6).all()


@pytest.mark.slow
@pytest.mark.parametrize('classes', [2, 3, 5])
def test_autoattack_with_few_classes_is_at_least_as_strong_as_apgd(classes):
    model, task = load_model('agft-tiny'), load_task('position', 24)
    head = model.head(task.classes, task.templates)[:classes]
    def logits_fn(x): return model.logits(x, head)
    x, left = task.images[:].contiguous()/255, {}
    with torch.no_grad():
        y = logits_fn(x).argmax(1)
    for name in ('autoattack', 'apgd-ce'):
        x_adv = threat(name, 2/255)(logits_fn, x, y, seeded(0))
        left[name] = (~misclassified(logits_fn, x_adv, y)).sum()
    assert left['autoattack'] <= left['apgd-ce'] + 1


@pytest.fixture
def registry():
    "The names of the attacks, without those that the test registers."
    before = dict(THREATS)
    yield THREATS
    THREATS.clear()
    THREATS.update(before)


@pytest.fixture
def two_steps(registry):
    "An attack of one's own: two steps of half the radius, from the image itself."
    @register_attack('two-steps', steps=2, how='steps of ε/2', norms=('Linf',))
    def attack(logits_fn, x, y, eps, norm, generator, steps=2):
        return pgd(logits_fn, x, y, eps, eps/2, steps, norm=norm, early_stop=True)
    return attack


def test_a_registered_attack_is_evaluated_like_any_other(two_steps, tmp_path):
    model, task = load_model('agft-tiny'), load_task('letters', 10)
    config = EvalConfig(attacks=('clean', 'two-steps'), eps=(1/255, 4/255))
    threats = threats_of(config)
    assert [t.label for t in threats] == ['clean 0', 'two-steps 1/255', 'two-steps 4/255']
    flags = evaluate_threats(model, [task], tmp_path, threats)
    clean, robust = flags['clean 0'][task.name].clean, flags['two-steps 4/255'][task.name].robust
    head = model.head(task.classes, task.templates)
    x, y = task.images[:]/255, task.require_labels()
    def logits_fn(x): return model.logits(x, head)
    ours = two_steps(logits_fn, x, y, 4/255, 'Linf', seeded(0))
    both = ~misclassified(logits_fn, x, y) & ~misclassified(logits_fn, ours, y)
    assert np.array_equal(robust, both.numpy()) and robust.sum() < clean.sum()
    text = threat('two-steps', 4/255).describe([32])
    assert '2 steps: steps of ε/2 (own code' in text
    assert text.endswith('robust = correct clean and under attack')
    raises(lambda: threat('two-steps', 4/255, 'L2'), "'L2'", 'Linf')


def test_a_registered_attack_can_be_audited(two_steps):
    w = torch.randn(6, 3*8*8, generator=seeded(0, 'w'))
    x = .3 + .4*torch.rand(60, 3, 8, 8, generator=seeded(0, 'x'))
    def linear(x): return x.flatten(1) @ w.T
    few:dict[str, Any] = dict(factors=(0, 1, 4), steps=(1, 5, 20), runs=3, auto=(20, 3), queries=200)
    y = linear(x).argmax(1)
    verdicts = audit(linear, x, y, 8/255, attack=THREATS['two-steps'].run, **few)
    assert {v.name for v in audit(linear, x, y, 8/255, **few)} == {v.name for v in verdicts}


def test_a_function_that_takes_a_loss_can_be_used_in_training(registry, two_steps):
    @register_attack('with-loss', steps=1)
    def attack(logits_fn, x, y, eps, norm, generator, *, loss=cross_entropy):
        return pgd(logits_fn, x, y, eps, eps, 1, norm=norm, loss=loss)
    assert registry['with-loss'].takes_loss and not registry['two-steps'].takes_loss
    for name in ('clean', 'pgd20', 'cw', 'apgd-t', 'autoattack', 'fgsm'):
        assert not registry[name].takes_loss


def test_names_that_are_taken_or_unknown_are_errors(two_steps):
    for name in ('pgd20', 'two-steps', 'pgd'):
        raises(lambda name=name: register_attack(name, steps=1), repr(name), 'registered already', 'pgd100')
    raises(lambda: threat('two-step', 4/255), "'two-step'", 'allowed', 'two-steps', 'pgd20')
    raises(lambda: threats_of(EvalConfig(attacks=('pgd20', 'nothing'))), "'nothing'", 'allowed', 'two-steps')
    raises(lambda: register_attack('two steps', steps=1), "'two steps'", 'allowed')
    raises(lambda: register_attack('none', steps=0), '0', 'allowed')
    raises(lambda: register_attack('none', steps=1, norms=('L1',)), 'L1', 'Linf, L2')
    raises(lambda: register_attack('none', steps=1, norms=()), 'Linf, L2')
    raises(lambda: register_attack('none', steps=1)(lambda x, y: x), '(x, y)', 'generator')
    assert 'none' not in THREATS


def test_a_result_outside_of_the_budget_is_an_error(registry):
    x, y = torch.full((2, 3, 4, 4), .5), torch.tensor([0, 1])
    def logits_fn(x): return x.flatten(1)[:, :4]
    register_attack('far', steps=1)(lambda logits_fn, x, y, eps, norm, generator: x + 2*eps)
    register_attack('idle', steps=1)(lambda logits_fn, x, y, eps, norm, generator: None)
    raises(lambda: threat('far', 4/255)(logits_fn, x, y, seeded(0)), 'far moved an image', 'allowed')
    raises(lambda: threat('idle', 4/255)(logits_fn, x, y, seeded(0)), 'NoneType', 'allowed')


PLUGIN = '''
from agft.threats import register_attack
@register_attack('{name}', steps=1)
def attack(logits_fn, x, y, eps, norm, generator): return (x + eps).clamp(0, 1)
'''


def test_plugins_are_imported_once_and_missing_ones_are_errors(registry, tmp_path, monkeypatch):
    (tmp_path/'a').mkdir()
    first, second = tmp_path/'attack.py', tmp_path/'a'/'attack.py'  # two files of one name
    first.write_text(PLUGIN.format(name='first'))
    second.write_text(PLUGIN.format(name='second'))
    load_plugins([str(first), str(second), str(first)])
    load_plugins([str(first)])
    x = torch.full((2, 3, 4, 4), .5)
    for name in ('first', 'second'):
        x_adv = threat(name, .1)(lambda x: x.flatten(1), x, torch.tensor([0, 1]), seeded(0))
        torch.testing.assert_close(x_adv, x + .1)
    (tmp_path/'my_attacks.py').write_text(PLUGIN.format(name='third'))
    monkeypatch.syspath_prepend(str(tmp_path))
    load_plugins(['my_attacks', 'my_attacks'])
    assert 'third' in registry
    for name in (str(tmp_path/'none.py'), 'no_such_plugin', 'my_attacks.part', str(tmp_path), '.attack', ''):
        raises(lambda name=name: load_plugins([name]), 'plugin', 'is missing', 'allowed')


def test_errors_inside_of_a_plugin_keep_their_kind(registry, tmp_path):
    taken, broken = tmp_path/'taken.py', tmp_path/'broken.py'
    taken.write_text(PLUGIN.format(name='pgd20'))
    broken.write_text('import no_such_library')
    for _ in range(2):  # a file that failed is tried again
        with pytest.raises(AgftError, match='registered already'):
            load_plugins([str(taken)])
        with pytest.raises(ModuleNotFoundError, match='no_such_library'):
            load_plugins([str(broken)])


def test_pgd20_is_the_threat_of_that_name():
    w = torch.randn(6, 3*8*8, generator=seeded(0, 'w'))
    x = torch.rand(8, 3, 8, 8, generator=seeded(0, 'x'))
    def linear(x): return x.flatten(1) @ w.T
    y = linear(x).argmax(1)
    named = threat('pgd20', 4/255)(linear, x, y, seeded(0, 'start'))
    by_hand = pgd(linear, x, y, 4/255, 1/255, 20, seeded(0, 'start'), early_stop=True)
    assert torch.equal(named, pgd20(linear, x, y, 4/255, 'Linf', seeded(0, 'start')))
    assert torch.equal(named, by_hand)


def test_pgd20_of_the_paper_written_out():
    "Twenty steps of the radius from a random start, clamped; the last image, whether it is the worst or not."
    w = torch.randn(6, 3*8*8, generator=seeded(0, 'w'))
    x = torch.rand(8, 3, 8, 8, generator=seeded(0, 'x'))
    def net(x): return (x.flatten(1) @ w.T).sin()
    y, eps = net(x).argmax(1), 4/255
    low, high = (x - eps).clamp_min(0), (x + eps).clamp_max(1)
    start = random_start(x, eps, NORMS['Linf'], seeded(0, 'start'))
    assert not torch.equal(start, x)
    at = start
    for _ in range(20):
        at = at.detach().requires_grad_()
        grad, = torch.autograd.grad(F.cross_entropy(net(at), y, reduction='sum'), at)
        at = torch.minimum(torch.maximum(at + eps*grad.sign(), low), high)
    t = threat('pgd20-paper', eps)
    torch.testing.assert_close(t(net, x, y, seeded(0, 'start')), at.detach(), atol=1e-6, rtol=0)
    text = t.describe([8])
    assert '20 steps: steps of ε, random start, last iterate' in text
    assert text.endswith('robust = correct under attack, whether clean or not')


def test_pgd20_of_the_paper_counts_the_adversarial_image_alone(registry):
    "Wrong clean and right under attack counts as robust; the rule of all other threats needs both."
    x = torch.full((4, 3, 2, 2), .5)
    x[:, 0, 0, 0] = torch.tensor([.45, .45, .55, .55])
    y = torch.tensor([0, 1, 0, 1])                 # right, wrong, wrong, right
    def first_pixel(x): return (x[:, 0, 0, :1] - .5)*torch.tensor([-1., 1.])
    def cross(logits_fn, x, y, eps, norm, generator): return 1 - x # to the other side, by .1
    registry['cross'] = Attack(cross, 1, 'mirrored', 'a test', counts='adversarial')
    registry['cross-both'] = Attack(cross, 1, 'mirrored', 'a test')
    every, found = torch.ones(4, dtype=torch.bool), {}
    for name in ('cross', 'cross-both'):
        clean, robust, _, distance = _evaluate_batch(first_pixel, x, y, threat(name, .2), seeded(0), every)
        assert clean.tolist() == [True, False, False, True]
        found[name] = robust.tolist(), (distance > 0).tolist()
    assert found['cross'] == ([False, True, True, False], [True]*4)
    assert found['cross-both'] == ([False]*4, [True, False, False, True])


def test_pgd20_of_the_paper_in_an_evaluation(tmp_path):
    "At every radius all images are attacked, and its worst case with pgd20 is within that of pgd20."
    model, task = load_model('agft-tiny'), load_task('handwritten', 30)
    config = EvalConfig(attacks=('pgd20', 'pgd20-paper'), eps=(1/255, 2/255))
    found = evaluate_threats(model, [task], tmp_path, threats_of(config))
    head = model.head(task.classes, task.templates)
    x, y = task.images[:]/255, task.require_labels()
    def logits_fn(x): return model.logits(x, head)
    for eps in config.eps:
        t = threat('pgd20-paper', eps)
        flags = found[t.label][task.name]
        x_adv = t(logits_fn, x, y, seeded(0, task.name, t.name, 0))
        assert np.array_equal(flags.robust, ~misclassified(logits_fn, x_adv, y).numpy())
        assert (flags.distance > 0).all() and not flags.clean.all()
        worst = found[t.label.replace('pgd20-paper', 'worst case')][task.name]
        ours = found[t.label.replace('-paper', '')][task.name]
        assert np.array_equal(worst.robust, ours.robust & flags.robust)


def test_importing_the_chapter_imports_no_attack_library():
    heavy = ('torchattacks', 'pyautoattack', 'scipy', 'matplotlib')
    code = f'import agft.threats, sys; print(*[name for name in {heavy} if name in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


QUICK = [name for name, attack in THREATS.items() if attack.steps < 100]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('name', [*QUICK, 'apgd-ce', 'autoattack'])
def test_threats_work_in_every_precision_and_stay_in_the_ball(name, dtype):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5)).to(dtype)
    x = torch.rand(3, 3, 8, 8, generator=seeded(0, 'x')).to(dtype)
    y = net(x).argmax(1)
    for norm in THREATS[name].norms:
        eps = 4/255 if norm == 'Linf' else .2
        eps *= 10 if name == 'autoattack' else 1  # its first attack succeeds, and the others need not run
        x_adv = threat(name, eps, norm)(net, x, y, seeded(0))
        change = x_adv.double() - x.double()
        size = change.abs().amax() if norm == 'Linf' else change.flatten(1).norm(dim=1).max()
        assert x_adv.dtype == dtype and size <= eps*(1 + 1e-6) + 1e-7


BAD_MODELS = {
    'tuple': (lambda net, x: (net(x), x), 'tuple'),
    'one number an image': (lambda net, x: net(x)[:, 0], 'shape'),
    'without gradient': (lambda net, x: net(x).detach(), 'no gradient')}


KINDS = ['fgsm', 'mifgsm-least', 'difgsm-random', 'pifgsm', 'apgd-t', 'autoattack', 'cw']


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('answer', BAD_MODELS)
def test_models_that_cannot_be_attacked_are_one_line(name, answer):
    wrap, words = BAD_MODELS[answer]
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
    x = torch.rand(3, 3, 8, 8, generator=seeded(0, 'x'))
    y = net(x).argmax(1)
    with pytest.raises(AgftError, match=words):
        threat(name, 4/255)(lambda x: wrap(net, x), x, y, seeded(0))


@pytest.mark.parametrize('name', ['fgsm', 'pifgsm', 'square', 'autoattack', 'pgd20'])
def test_labels_that_the_model_does_not_have_are_one_line(name):
    net, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5)), torch.rand(3, 3, 8, 8)
    with pytest.raises(AgftError, match='allowed: 0 to 4'):
        threat(name, 4/255)(net, x, torch.tensor([1, 3, 5]), seeded(0))


def test_a_radius_as_a_text_is_one_line():
    text:Any = '4/255'
    with pytest.raises(AgftError, match="'4/255' of type str; allowed: a number"):
        threat('pgd20', text)


def test_an_attack_of_ones_own_keeps_the_precision(registry):
    register_attack('single', steps=1)(lambda logits_fn, x, y, eps, norm, generator: x.float())
    x = torch.rand(3, 3, 8, 8).half()
    with pytest.raises(AgftError, match='single returned torch.float32 for images of torch.float16'):
        threat('single', .1)(lambda x: x.flatten(1), x, torch.arange(3), seeded(0))
