"""Properties of the attacks on random networks, images and budgets."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from agft.attack import (
    NORMS,
    apgd,
    apgd_targeted,
    cross_entropy,
    cw,
    input_gradient,
    misclassified,
    pgd,
    round_inward,
    runner_up,
    targeted_cross_entropy,
    targeted_dlr,
    worst_case,
)
from agft.core import AgftError, seeded

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
@given(seed=SEEDS, scale=st.floats(.01, 100), soft=st.booleans())
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


PRECISIONS = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(sorted(ATTACKS)), dtype=PRECISIONS, steps=st.integers(0, 5), start=st.booleans(),
       **CASE)
def test_in_every_precision_images_stay_in_the_ball(name, dtype, seed, norm, eps, steps, start):
    w, x = weight_matrix(seed, 5).to(dtype), torch.rand(4, 3, 4, 4, generator=seeded(seed, 'x')).to(dtype)
    seen = []
    def logits_fn(x):
        seen.append(x.detach().clone())
        return x.flatten(1) @ w.T
    y = logits_fn(x).argmax(1)
    x_adv = run(name, logits_fn, x, y, norm, eps, steps, seeded(seed, 'start') if start else None)
    assert x_adv.dtype == dtype and x_adv.min() >= 0 and x_adv.max() <= 1
    change = x_adv.double() - x.double()
    assert NORMS[norm].size(change).max() <= eps*(1 + 1e-6) + 1e-7
    assert all(part.dtype == dtype and part.min() >= 0 and part.max() <= 1 for part in seen)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, dtype=st.sampled_from([torch.float16, torch.bfloat16]), eps=st.floats(0, 1))
def test_rounding_inward_gives_the_nearest_value_that_is_not_further_away(seed, dtype, eps):
    x = torch.rand(200, generator=seeded(seed, 'x')).to(dtype).float()
    z = (x + eps*(2*torch.rand(200, generator=seeded(seed, 'z')) - 1)).clamp(0, 1)
    rounded = round_inward(z, x, dtype).float()
    every = torch.arange(0, 2**15, dtype=torch.int16).view(dtype).float()
    every = every[every <= 1]
    for point, clean, ours in zip(z.tolist(), x.tolist(), rounded.tolist(), strict=True):
        between = every[(every >= min(point, clean)) & (every <= max(point, clean))]
        best = between[(between - point).abs().argmin()].item()
        assert ours == best, (point, clean)


def test_small_steps_add_up_in_half_precision():
    "A step of 1/2550 is lost when the point itself is in bfloat16; twenty of them are not lost here."
    w = torch.ones(2, 48, dtype=torch.bfloat16)*torch.tensor([[-1.], [1.]], dtype=torch.bfloat16)
    x = torch.full((1, 3, 4, 4), .75, dtype=torch.bfloat16)
    x_adv = pgd(lambda x: x.flatten(1) @ w.T, x, torch.tensor([0]), 4/255, .1/255, 20)
    assert (x_adv.float() - x.float()).min() >= 1/256


ANSWERS = {
    'tuple': (lambda x: (x.flatten(1)[:, :5], x), 'tuple.*model.x.*0'),
    'list': (lambda x: [x.flatten(1)[:, :5]], 'list.*model.x.*0'),
    'array': (lambda x: x.flatten(1)[:, :5].detach().numpy(), 'ndarray'),
    'none': (lambda x: None, 'NoneType'),
    'one number an image': (lambda x: x.sum((1, 2, 3)), r'shape .4,.'),
    'one row too many': (lambda x: torch.cat([x, x]).flatten(1)[:, :5], r'shape .8, 5. for 4 images'),
    'labels': (lambda x: x.flatten(1)[:, :5].round().long(), 'int64'),
    'detached': (lambda x: x.flatten(1)[:, :5].detach(), 'no gradient'),
    'constant': (lambda x: torch.zeros(len(x), 5, requires_grad=True)*1, 'no gradient'),
    'wrong precision': (lambda x: x.flatten(1) @ torch.zeros(48, 5, dtype=torch.float64), 'does not take')}


@pytest.mark.parametrize('attack', [pgd, apgd, cw])
@pytest.mark.parametrize('name', ANSWERS)
def test_an_answer_that_is_no_row_of_logits_is_one_line(attack, name):
    model, words = ANSWERS[name]
    with pytest.raises(AgftError, match=words) as e:
        attack(model, torch.rand(4, 3, 4, 4), torch.arange(4))
    assert '\n' not in str(e.value)


def test_an_object_with_logits_says_how_to_get_them():
    class Output(dict):
        logits = None
    with pytest.raises(AgftError, match=r'Output.*model\(x\)\.logits'):
        pgd(lambda x: Output(), torch.rand(4, 3, 4, 4), torch.arange(4))


LINEAR = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
TARGETS = {
    'labels from 1': (torch.tensor([1, 2, 3, 5]), r'\[1, 5\] and the model has 5 classes; allowed: 0 to 4'),
    'minus one': (torch.tensor([0, 1, 2, -1]), '-1'),
    'pairs': (torch.tensor([[0, 1], [1, 5], [2, 0], [3, 0]]), r'\[0, 5\]'),
    'three probabilities': (torch.full((4, 3), 1/3), 'probabilities of 3 classes and the model 5'),
    'a list': ([0, 1, 2, 3], 'list'),
    'an array': (torch.arange(4).numpy(), 'ndarray'),
    'bytes': (torch.arange(4, dtype=torch.uint8), 'uint8')}


@pytest.mark.parametrize('name', TARGETS)
def test_targets_that_are_no_classes_of_the_model_are_one_line(name):
    target, words = TARGETS[name]
    loss = targeted_cross_entropy if name == 'pairs' else cross_entropy
    for attack in (pgd, apgd):
        with pytest.raises(AgftError, match=words):
            attack(LINEAR, torch.rand(4, 3, 4, 4), target, loss=loss)


def test_labels_are_compared_with_the_classes_where_images_are_classified():
    with pytest.raises(AgftError, match='0 to 4'):
        misclassified(LINEAR, torch.rand(4, 3, 4, 4), torch.tensor([1, 2, 3, 5]))


@pytest.mark.parametrize('changed, words', [
    (dict(eps='4/255'), "'4/255' of type str"), (dict(alpha='1/255'), "'1/255' of type str"),
    (dict(eps=None), 'None'), (dict(eps=torch.tensor(.1)), 'Tensor'), (dict(steps=2.), 'steps is 2.0'),
    (dict(steps='2'), "steps is '2'"), (dict(start=0), 'start is a int'), (dict(x=None), 'NoneType')])
def test_budgets_of_another_type_are_one_line(changed, words):
    settings = dict(logits_fn=LINEAR, x=torch.rand(4, 3, 4, 4), target=torch.arange(4)) | changed
    with pytest.raises(AgftError, match=words):
        pgd(**settings)


def network(seed, classes=5):
    "A random network with a hidden layer, and images and labels as in `labelled`."
    linear, x, y = labelled(seed, classes=32)
    out = torch.randn(32, classes, generator=seeded(seed, 'out'), dtype=torch.float64)
    def logits_fn(x): return linear(x).tanh() @ out
    y = logits_fn(x).argmax(1)
    y[-1] = (y[-1] + 1) % classes
    return logits_fn, x, y


def recorded(logits_fn):
    "The same model, and the list of the batches that it is given."
    batches = []
    def record(x):
        batches.append(x.detach().clone())
        return logits_fn(x)
    return record, batches


def target_by_target(logits_fn, x, y, eps, steps, norm, targets):
    "APGD-T as the official code runs it: one target after the other, each on the images that are correct."
    def attack(k, x, y):
        with torch.no_grad():
            pair = runner_up(logits_fn(x), y, k)
        return apgd(logits_fn, x, pair, eps, steps, norm=norm, loss=targeted_dlr)
    return worst_case(logits_fn, x, y, [partial(attack, k + 1) for k in range(targets)])


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(0, 30), targets=st.integers(1, 6), **CASE)
def test_targets_in_one_batch_find_the_images_that_targets_in_turn_find(seed, norm, eps, steps, targets):
    logits_fn, x, y = network(seed)
    record, batches = recorded(logits_fn)
    eps /= 20 if norm == 'Linf' else 4  # so that some images are found and others are not
    x_adv = apgd_targeted(record, x, y, eps, steps, norm=norm, targets=targets)
    in_turn = target_by_target(logits_fn, x, y, eps, steps, norm, min(targets, 4))
    assert torch.equal(misclassified(logits_fn, x_adv, y), misclassified(logits_fn, in_turn, y))
    assert max(map(len, batches)) <= len(x)
    attacked = torch.cat(batches[1:]) if batches[1:] else x[:0]
    assert not (attacked == x[-1]).flatten(1).all(1).any() and torch.equal(x_adv[-1], x[-1])


@pytest.mark.parametrize('norm', NORMS)
def test_targets_in_one_batch_visit_the_points_of_one_target_alone(norm):
    logits_fn, x, y = network(1)
    x, y, eps = x[:-1], y[:-1], 1e-3
    record, batches = recorded(logits_fn)
    alone, visited = recorded(logits_fn)
    assert not misclassified(logits_fn, apgd_targeted(record, x, y, eps, 25, norm=norm), y).any()
    for k in (1, 2, 3, 4):
        apgd(alone, x, runner_up(logits_fn(x), y, k), eps, 25, norm=norm, loss=targeted_dlr)
    expected, found = torch.cat(visited).flatten(1), torch.cat(batches).flatten(1)
    nearest = torch.cdist(expected, found, p=torch.inf).amin(1)
    assert nearest.max() < 1e-12 and len(expected) == 4*26*len(x)
    assert len(found) == len(expected) + len(x) + 4*len(x)  # and the clean images, and the results


def pixel_logits(x, offsets, gains):
    "Logit k is `offsets[k]` and a multiple of how much pixel k has changed from 1/2."
    change = x.flatten(1)[:, :len(offsets)] - .5
    return torch.tensor(offsets, dtype=x.dtype) + torch.tensor(gains, dtype=x.dtype)*change


def test_an_image_leaves_with_all_its_rows_when_one_target_succeeds():
    x = torch.full((4, 3, 4, 4), .5, dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 1])  # only the first one is correct; its second target is within reach
    gains = [.1, 0., 90., 0., 0.]
    record, batches = recorded(partial(pixel_logits, offsets=[0., -1., -2., -3., -4.], gains=gains))
    x_adv = apgd_targeted(record, x, y, .1, 50)
    assert list(map(len, batches)) == [4, 4, 4, 1]  # clean, start, first move, result
    assert misclassified(record, x_adv, y)[0] and torch.equal(x_adv[1:], x[1:])


def test_a_point_that_another_batch_classifies_correctly_ends_no_other_target():
    "The first target succeeds in a batch of four only, and the second one in smaller batches only."
    def logits_fn(x):
        gains = [.1, 90., 0., 0., 0.] if len(x) == 4 else [.1, 0., 90., 0., 0.]
        return pixel_logits(x, [0., -1., -2., -3., -4.], gains)
    x, y = torch.full((4, 3, 4, 4), .5, dtype=torch.float64), torch.tensor([0, 1, 1, 1])
    record, batches = recorded(logits_fn)
    x_adv = apgd_targeted(record, x, y, .1, 50)
    assert list(map(len, batches)) == [4, 4, 4, 1, 3, 3, 1]
    assert misclassified(logits_fn, x_adv[:1], y[:1])


def test_a_seed_gives_the_same_result():
    logits_fn, x, y = network(2)
    one, two, other = (apgd_targeted(logits_fn, x, y, .02, 5, seeded(s, 'start')) for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
