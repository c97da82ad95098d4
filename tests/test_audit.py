"The audit on models whose answer is known: a linear one in closed form, and broken ones that AutoAttack's own checks flag as well."
import warnings
from functools import partial
import pytest, torch
from pyautoattack import checks as official
from agft.attack import input_gradient, pgd
from agft.audit import (CHECKS, GAIN, allowed, audit, audit_figure, audit_markdown, falls_with_eps, full_precision, open_case, pgd20, radii,
                        saved_pixels, square)
from agft.core import AgftError, seeded

EPS  = 8/255
w    = torch.randn(6, 3*8*8, generator=seeded(0, 'w'))
x    = .3 + .4*torch.rand(60, 3, 8, 8, generator=seeded(0, 'x'))
linear = lambda x: x.flatten(1) @ w.T
y    = linear(x).argmax(1)
few  = dict(factors=(0, 1, 4), steps=(1, 5, 20), runs=3, auto=(20, 3), queries=200)
audited = partial(audit, x=x, y=y, eps=EPS, **few)
def flags(verdicts): return {v.name for v in verdicts if not v.ok}

class ThroughTheWrongWay(torch.autograd.Function):
    "The identity, with a gradient that is nothing but noise."
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return torch.randn(g.shape, generator=seeded(0, 'g')).to(g)

noise  = seeded(0, 'noise')
noisy  = lambda x: linear(x) + torch.randn(len(x), 6, generator=noise)
masked = {'zero gradients': lambda x: (40*linear(x)).half().softmax(1), 'deterministic': noisy}
blind  = {'rounded': lambda x: linear((15*x).round()/15), 'rippled': lambda x: linear(x + .2/255*(1e5*x).sin()),
          'noise for a gradient': lambda x: linear(ThroughTheWrongWay.apply(x))}

@pytest.mark.parametrize('norm,eps', [('Linf', EPS), ('L2', .5)])
def test_a_sound_model_passes(norm, eps):
    found = audit(linear, x, y, eps, norm, exact_fn=lambda x: linear(x.double().float()), **few)
    assert [v.name for v in found] == list(CHECKS) and flags(found) == set(), flags(found)

def test_two_classes_fall_as_the_closed_form_says():
    two = lambda x: linear(x)[:, :2]
    label = two(x).argmax(1)
    case = open_case(two, x, label, 1/255, 'Linf', pgd20, 0)
    gap = (two(x)[:, 0] - two(x)[:, 1]).abs()/(w[0] - w[1]).abs().sum()       # the radius at which an image breaks, away from the box
    at = [f/255 for f in (0, 1, 2, 4, 8)]
    assert falls_with_eps(case, [255*a for a in at]).data['left'][:-1] == [int((gap > a).sum()) for a in at]

def test_vanishing_gradients_and_noise_are_named():
    for name, f in masked.items(): assert name in flags(audited(f)), name

@pytest.mark.parametrize('name', blind)
def test_square_sees_what_gradients_do_not(name):
    found = flags(audited(blind[name]))
    assert 'black box' in found and ('zero gradients' in found) == (name == 'rounded') and 'deterministic' not in found

def test_the_official_checks_agree():
    def warned(f, *args):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            f(*args)
        return bool(said)
    for f in (linear, *masked.values(), *blind.values()):
        ours, grad = {v.name: v.ok for v in audited(f)}, input_gradient(f, x, y)[1]
        assert ours['zero gradients'] == (not warned(official.check_zero_gradients, grad))
        assert ours['deterministic'] == (not warned(official.check_randomized, f, x, y))

def test_attacks_that_are_none_are_named():
    attacks = {'nothing': (lambda f, x, y, eps, norm, g, steps=20: x, {'falls with eps', 'stronger than noise', 'as strong as Auto-PGD', 'saved pixels'}),
               'too far': (lambda f, x, y, eps, norm, g, steps=20: pgd20(f, x, y, 2*eps, norm, g, steps), {'saved pixels'}),
               'out of the box': (lambda f, x, y, eps, norm, g, steps=20: pgd20(f, x, y, eps, norm, g, steps) - .6*eps*(x < .31), {'saved pixels'}),
               'too slow': (lambda f, x, y, eps, norm, g, steps=20: pgd(f, x, y, eps, eps/50, steps), {'falls with steps', 'as strong as Auto-PGD'})}
    for name, (attack, expected) in attacks.items(): assert expected <= flags(audited(linear, attack=attack)), name

def test_pixels_that_a_file_does_not_hold():
    def fine(x): # class 0 as long as the pixels are single-precision numbers
        exact = (x.double() == x.float().double()).flatten(1).all(1)
        return torch.stack([exact.double(), torch.full_like(exact, .5, dtype=torch.float64)], 1) + 0*x.sum()
    case = open_case(fine, x.double(), torch.zeros_like(y), EPS, 'Linf', lambda f, x, y, *a: x + 1e-12, 0)
    assert '60 of the 60 broken ones are right again' in saved_pixels(case).finding and not saved_pixels(case).ok

def test_full_precision_counts_what_changes():
    case = open_case(linear, x, y, EPS, 'Linf', pgd20, 0)
    assert full_precision(case, linear).ok and not full_precision(case, lambda x: linear(x).roll(1, 1)).ok

def test_neighbours_must_not_matter():
    norm = torch.nn.BatchNorm2d(3)                                                           # left in training mode
    assert 'deterministic' in flags(audited(lambda x: linear(norm(x))))

def test_the_same_seed_gives_the_same_audit_and_torch_keeps_its_state():
    state = torch.get_rng_state()
    one, two = audited(blind['rippled'], seed=3), audited(blind['rippled'], seed=3)
    assert [v.finding for v in one] == [v.finding for v in two] and torch.equal(state, torch.get_rng_state())

def test_square_leaves_the_models_logits_alone():
    kept = linear(x).double()
    before = kept.clone()
    square(lambda x: kept[:len(x)], x, y, EPS, 'Linf', seeded(0, 'square'), 3)
    assert torch.equal(kept, before)

def test_radii_and_allowances():
    case = open_case(linear, x, y, .2, 'Linf', pgd20, 0)
    assert radii(case, (0, 1, 4)) == [0, .2, .5] and radii(open_case(linear, x, y, .5, 'Linf', pgd20, 0), (1,)) == [.5]
    assert [allowed(n, GAIN) for n in (1, 20, 60)] == [1, 1, 3]

def test_report():
    found = audited(linear, attack=lambda f, x, y, eps, norm, g: pgd20(f, x, y, eps, norm, g))
    table = audit_markdown(found)
    assert table.count('✓ ok') == len(found) == 8 and table.endswith('Left out: falls with steps, full precision.')
    assert audit_figure(found).png()[:4] == b'\x89PNG' and len(audit_figure(found).axes) == 3

@pytest.mark.parametrize('bad,word', [(dict(x=x[:0], y=y[:0]), '1 or more'), (dict(y=(y + 1) % 6), 'wrong on all'), (dict(norm='L1'), 'unknown norm'),
    (dict(eps=0), 'above 0'), (dict(eps=.6), '0.5'), (dict(eps=4), '4/255'), (dict(steps=(5, 1)), 'ascending'), (dict(draws=0), '1 or more'),
    (dict(x=255*x), '[0, 1]'), (dict(attack=lambda *a: a[1][1:]), 'equal'), (dict(logits_fn=lambda x: linear(x.detach())), 'gradient')])
def test_bad_input_is_named(bad, word):
    with pytest.raises(AgftError) as e: audit(**{**dict(logits_fn=linear, x=x, y=y, eps=EPS), **bad})
    assert word in str(e.value) and '\n' not in str(e.value)
