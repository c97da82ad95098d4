"""Properties of the attack on random networks, images and budgets."""
import torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from agft.attack import cross_entropy, pgd
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
    big = plain.norm(dim=1) > 1e-6          # below that, the plain gradient is rounding noise
    torch.testing.assert_close(F.normalize(plain[big]), F.normalize(ours[big]), atol=1e-6, rtol=0)
