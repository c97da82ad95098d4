"""Properties of the attack on random networks, images and budgets."""
from functools import partial
import torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from agft.attack import NORMS, apgd, broken, cross_entropy, cw, input_gradient, pgd, worst_case
from agft.core import seeded


def linear(seed, classes): return torch.randn(classes, 3*4*4, generator=seeded(seed, 'w'), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(0, 1), ratio=st.floats(.01, 3), steps=st.integers(0, 6), soft=st.booleans(), start=st.booleans())
def test_the_result_stays_in_the_ball_and_in_the_box(seed, eps, ratio, steps, soft, start):
    w, x = linear(seed, 5), torch.rand(3, 3, 4, 4, generator=seeded(seed, 'x'), dtype=torch.float64)
    y = torch.randn(3, 5, generator=seeded(seed, 'y'), dtype=torch.float64).softmax(1) if soft else torch.arange(3)
    x_adv = pgd(lambda x: x.flatten(1) @ w.T, x, y, eps, eps*ratio, steps, seeded(seed, 'start') if start else None)
    assert (x_adv - x).abs().max() <= eps + 1e-12 and x_adv.min() >= 0 and x_adv.max() <= 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(.01, 300), soft=st.booleans())
def test_the_gradient_has_the_direction_of_the_cross_entropy(seed, scale, soft):
    z = (scale*torch.randn(4, 6, generator=seeded(seed, 'z'), dtype=torch.float64)).requires_grad_()
    t = torch.randn(4, 6, generator=seeded(seed, 't'), dtype=torch.float64).softmax(1) if soft else torch.arange(4)
    plain, = torch.autograd.grad(F.cross_entropy(z, t, reduction='sum'), z)
    ours = cross_entropy(z.detach(), t)[1]
    _, scaled, _ = input_gradient(lambda x: x.flatten(1), z[..., None, None], t)     # the pixels are the logits
    torch.testing.assert_close(scaled.abs().amax((1, 2, 3)), torch.ones(4, dtype=torch.float64))
    big = plain.norm(dim=1) > 1e-6          # below that, the plain gradient is rounding noise
    torch.testing.assert_close(F.normalize(plain[big]), F.normalize(ours[big]), atol=1e-6, rtol=0)


ATTACKS = {'pgd': partial(pgd, early_stop=True), 'cw': cw, 'apgd': apgd}
CASE = dict(seed=st.integers(0, 10**6), norm=st.sampled_from(sorted(NORMS)), eps=st.floats(.001, 1))


def labelled(seed, n=6, classes=5):
    "A random linear model and random images with the labels that it gives them, the last one wrong."
    w, x = linear(seed, classes), torch.rand(n, 3, 4, 4, generator=seeded(seed, 'x'), dtype=torch.float64)
    logits_fn = lambda x: x.flatten(1) @ w.T
    y = logits_fn(x).argmax(1)
    y[-1] = (y[-1] + 1) % classes
    return logits_fn, x, y


def run(name, logits_fn, x, y, norm, eps, steps, start):
    return ATTACKS[name](logits_fn, x, y, eps, steps=steps, start=start, norm=norm, **({} if name == 'apgd' else dict(step=eps/4)))


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(ATTACKS)), steps=st.integers(0, 8), start=st.booleans(), **CASE)
def test_attacks_that_stop_early_stay_in_the_ball_and_in_the_box(name, seed, norm, eps, steps, start):
    logits_fn, x, y = labelled(seed)
    x_adv = run(name, logits_fn, x, y, norm, eps, steps, seeded(seed, 'start') if start else None)
    assert NORMS[norm].size(x_adv - x).max() <= eps + 1e-9 and x_adv.min() >= 0 and x_adv.max() <= 1


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(['pgd', 'cw']), steps=st.integers(0, 5), more=st.integers(1, 5), **CASE)
def test_what_fewer_steps_break_more_steps_break(name, seed, norm, eps, steps, more):
    logits_fn, x, y = labelled(seed)
    few, many = (broken(logits_fn, run(name, logits_fn, x, y, norm, eps/10, k, seeded(seed, 'start')), y) for k in (steps, steps + more))
    assert (many | ~few).all()


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(ATTACKS)), restarts=st.integers(1, 3), **CASE)
def test_restarts_only_add_and_images_that_are_wrong_clean_are_left_alone(name, seed, norm, eps, restarts):
    logits_fn, x, y = labelled(seed)
    def worst(k):
        draws = seeded(seed, 'start')
        return worst_case(logits_fn, x, y, [lambda x, y: run(name, logits_fn, x, y, norm, eps/10, 2, draws)]*k)
    few, many = worst(restarts), worst(restarts + 1)
    assert (broken(logits_fn, many, y) | ~broken(logits_fn, few, y)).all()
    assert torch.equal(few[-1], x[-1]) and torch.equal(many[-1], x[-1])
