"""Our attacks against the official code of AutoAttack, image by image and from the same start."""
import copy
from functools import partial
from pathlib import Path
from typing import Any

import pyautoattack
import pytest
import torch
import torch.nn as nn
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

from agft.attack import (
    NORMS,
    apgd,
    apgd_targeted,
    cross_entropy,
    dlr,
    misclassified,
    random_start,
    runner_up,
    targeted_dlr,
)
from agft.core import seeded
from agft.data import archives_dir, read_archive

LOSSES = {'ce': cross_entropy, 'dlr': dlr, 'dlr-targeted': targeted_dlr}


def robust_images(net, x, y, name, norm, eps, steps):
    "Which images are correct under the official Auto-PGD, and which under ours."
    start = random_start(x, eps, NORMS[norm], seeded(0, 'start'))
    targeted = name == 'dlr-targeted'
    with torch.no_grad():
        target = runner_up(net(x), y, 2) if targeted else y
    kind = APGDAttack_targeted if targeted else partial(APGDAttack, loss=name)
    official:Any = kind(net, n_iter=steps, norm=norm, eps=eps, device='cpu')
    official.init_hyperparam(x)
    official.y_target = target.view(len(x), -1)[:, -1]
    theirs = official.attack_single_run(x, y, x_init=start)[1].bool()
    ours = apgd(net, x, target, eps, steps, start, norm, LOSSES[name])
    return theirs, ~misclassified(net, ours, y)


def random_net(kind, dtype=torch.float64):
    "An untrained network for 3 x 8 x 8 pixels and ten classes."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = (nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU())
        layers, width = (conv, 512) if kind == 'conv' else ((), 192)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 10)).to(dtype)


def random_images(net, n):
    "Random images in the network's precision, with its predictions as labels."
    x = torch.rand(n, 3, 8, 8, generator=seeded(0, 'x'), dtype=torch.float64).to(net[-1].weight.dtype)
    with torch.no_grad():
        return x, net(x).argmax(1)


CASES = [('linear', 'Linf', .02), ('linear', 'L2', .2), ('conv', 'Linf', .02), ('conv', 'L2', .2)]


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('kind,norm,eps', CASES)
def test_the_same_images_are_robust_as_under_the_official_attack(kind, norm, eps, name, one_thread):
    net = random_net(kind)
    theirs, ours = robust_images(net, *random_images(net, 100), name, norm, eps, 50)
    agree = (theirs == ours).double().mean().item()
    print(kind, norm, name, theirs.double().mean().item(), ours.double().mean().item(), agree)
    assert .1 < theirs.double().mean() < .9 and torch.equal(theirs, ours)


def test_targeted_apgd_as_a_whole_is_no_weaker(one_thread):
    net, eps = random_net('conv', torch.float32), .012
    x, y = random_images(net, 200)
    official = APGDAttack_targeted(net, n_iter=30, eps=eps, device='cpu')
    theirs = ~misclassified(net, official.perturb(x, y), y)
    ours = ~misclassified(net, apgd_targeted(net, x, y, eps, 30, seeded(0, 'start')), y)
    print(theirs.double().mean().item(), ours.double().mean().item())
    assert .1 < theirs.double().mean() < .9 and ours.double().mean() <= theirs.double().mean() + .005


@pytest.fixture(scope='module')
def cifar():
    "The network that AutoAttack ships, and images that it classifies correctly."
    from pyautoattack.examples.resnet import ResNet18
    net, weights = ResNet18(), Path(pyautoattack.__file__).parent/'examples/model_test.pt'
    net.load_state_dict(torch.load(weights, map_location='cpu', weights_only=True))
    net.eval().requires_grad_(False)
    x, y, _ = read_archive('cifar10_test')
    x, y = x[:40].contiguous()/255, y[:40]  # the official code cannot view channels-last gradients
    keep = (~misclassified(net, x, y)).nonzero()[:32, 0]
    return net, x[keep], y[keep]


ARCHIVES = archives_dir()
HAS_CIFAR = ARCHIVES is not None and (ARCHIVES/'cifar10_test.npz').is_file()
SLOW = [pytest.param(name, 32, 10, marks=pytest.mark.slow) for name in LOSSES]


@pytest.mark.skipif(not HAS_CIFAR, reason='the CIFAR-10 archive is not here (AGFT_DATA)')
@pytest.mark.parametrize('name,n,steps', [('ce', 10, 6), *SLOW])
def test_on_cifar_the_same_images_are_robust(cifar, name, n, steps):
    net, x, y = cifar
    if n < 32:  # single precision may decide an image at the boundary, which would be a tenth here
        net, x = copy.deepcopy(net).double(), x.double()
    theirs, ours = robust_images(net, x[:n], y[:n], name, 'Linf', .75/255, steps)
    agree = (theirs == ours).double().mean().item()
    official, own = theirs.double().mean().item(), ours.double().mean().item()
    print(f'{name}, n={n}: official {official:.3f}, ours {own:.3f}, agreement {agree:.3f}')
    assert agree >= .97 and 0 < official < 1 and own <= official + .005
