"""Properties of the attacks on random networks, images and budgets."""
from functools import partial

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from agft.attack import NORMS, apgd, cross_entropy, cw, input_gradient, misclassified, pgd, worst_case
from agft.core import seeded

SEEDS = st.integers(0, 10**6)


def weight_matrix(seed, classes):
    "The weights of a random linear model for 3 x 4 x 4 pixels."
    return torch.randn(classes, 3*4*4, generator=seeded(seed, 'w'), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, eps=st.floats(0, 1), ratio=st.floats(.01, 3), steps=st.integers(0, 6), soft=st.booleans(),
       start=st.booleans())
def test_the_result_stays_in_the_ball_and_in_the_pixel_range(seed, eps, ratio, steps, soft, start):
    w, x = weight_matrix(seed, 5), torch.rand(3, 3, 4, 4, generator=seeded(seed, 'x'), dtype=torch.float64)
    soft_targets = torch.randn(3, 5, generator=seeded(seed, 'y'), dtype=torch.float64).softmax(1)
    target = soft_targets if soft else torch.arange(3)
    draws = seeded(seed, 'start') if start else None
    x_adv = pgd(lambda x: x.flatten(1) @ w.T, x, target, eps, eps*ratio, steps, draws)
    assert (x_adv - x).abs().max() <= eps + 1e-12 and x_adv.min() >= 0 and x_adv.max() <= 1


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, scale=st.floats(.01, 300), soft=st.booleans())
def test_the_gradient_has_the_direction_of_the_cross_entropy(seed, scale, soft):
    z = (scale*torch.randn(4, 6, generator=seeded(seed, 'z'), dtype=torch.float64)).requires_grad_()
    soft_targets = torch.randn(4, 6, generator=seeded(seed, 't'), dtype=torch.float64).softmax(1)
    target = soft_targets if soft else torch.arange(4)
    plain, = torch.autograd.grad(F.cross_entropy(z, target, reduction='sum'), z)
    ours = cross_entropy(z.detach(), target)[1]
    pixels = z[..., None, None]
    _, scaled, _ = input_gradient(lambda x: x.flatten(1), pixels, target)
    torch.testing.assert_close(scaled.abs().amax((1, 2, 3)), torch.ones(4, dtype=torch.float64))
    big = plain.norm(dim=1) > 1e-6  # below that, the plain gradient consists of rounding errors
    torch.testing.assert_close(F.normalize(plain[big]), F.normalize(ours[big]), atol=1e-6, rtol=0)


ATTACKS = {'pgd': partial(pgd, early_stop=True), 'cw': cw, 'apgd': apgd}
CASE = dict(seed=SEEDS, norm=st.sampled_from(sorted(NORMS)), eps=st.floats(.001, 1))


def labelled(seed, n=6, classes=5):
    "A random linear model and random images with its predictions as labels, except for the last one."
    w = weight_matrix(seed, classes)
    x = torch.rand(n, 3, 4, 4, generator=seeded(seed, 'x'), dtype=torch.float64)
    def logits_fn(x): return x.flatten(1) @ w.T
    y = logits_fn(x).argmax(1)
    y[-1] = (y[-1] + 1) % classes
    return logits_fn, x, y


def run(name, logits_fn, x, y, norm, eps, steps, start):
    "The attack of that name, with steps of a quarter of the radius where it has a step length."
    length = {} if name == 'apgd' else dict(alpha=eps/4)
    return ATTACKS[name](logits_fn, x, y, eps, steps=steps, start=start, norm=norm, **length)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(ATTACKS)), steps=st.integers(0, 8), start=st.booleans(), **CASE)
def test_attacks_with_early_stop_stay_in_the_ball_and_in_the_pixel_range(name, seed, norm, eps, steps, start):
    logits_fn, x, y = labelled(seed)
    x_adv = run(name, logits_fn, x, y, norm, eps, steps, seeded(seed, 'start') if start else None)
    assert NORMS[norm].size(x_adv - x).max() <= eps + 1e-9 and x_adv.min() >= 0 and x_adv.max() <= 1


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(['pgd', 'cw']), steps=st.integers(0, 5), more=st.integers(1, 5), **CASE)
def test_more_steps_succeed_where_fewer_steps_succeed(name, seed, norm, eps, steps, more):
    logits_fn, x, y = labelled(seed)
    few = run(name, logits_fn, x, y, norm, eps/10, steps, seeded(seed, 'start'))
    many = run(name, logits_fn, x, y, norm, eps/10, steps + more, seeded(seed, 'start'))
    assert (misclassified(logits_fn, many, y) | ~misclassified(logits_fn, few, y)).all()


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(ATTACKS)), restarts=st.integers(1, 3), **CASE)
def test_restarts_only_add_and_images_misclassified_clean_are_not_attacked(name, seed, norm, eps, restarts):
    logits_fn, x, y = labelled(seed)
    def worst(k):
        draws = seeded(seed, 'start')
        def attack(x, y): return run(name, logits_fn, x, y, norm, eps/10, 2, draws)
        return worst_case(logits_fn, x, y, [attack]*k)
    few, many = worst(restarts), worst(restarts + 1)
    assert (misclassified(logits_fn, many, y) | ~misclassified(logits_fn, few, y)).all()
    assert torch.equal(few[-1], x[-1]) and torch.equal(many[-1], x[-1])
