"""Every named threat, as an evaluation uses it; the ensembles of other people with few classes."""
import numpy as np, pytest, torch
from agft.attack import broken
from agft.clip import load_clip
from agft.core import seeded
from agft.data import load_task
from agft.evaluate import evaluate_threats
from agft.threat import THREATS, threat

OFFICIAL = ('autoattack', 'square')      # thousands of forward passes an image


@pytest.mark.parametrize('name', [pytest.param(t, marks=pytest.mark.slow) if t in OFFICIAL else t for t in THREATS])
def test_robust_is_below_clean_and_falls_with_the_radius(name, tmp_path):
    "Picture by picture: what is robust is right clean, and was robust in every smaller ball."
    task = load_task('letters', 10)
    radii = (0, 1/255, 4/255) if THREATS[name].steps else (0,)
    rows = evaluate_threats(load_clip('agft-tiny'), [task], tmp_path, [threat(name, e) for e in radii])
    flags = [rows[threat(name, e).label][task.name] for e in radii]
    assert np.array_equal(flags[0]['clean'], flags[0]['robust']) and not any(f['blind'].any() for f in flags)
    for f, smaller, e in zip(flags, [flags[0], *flags], radii):
        assert not (f['robust'] & ~smaller['robust']).any() and (f['distance'] <= e*(1 + 1e-4) + 1e-6).all()


@pytest.mark.slow
@pytest.mark.parametrize('classes', [2, 3, 5])
def test_autoattack_with_few_classes_is_at_least_as_strong_as_apgd(classes):
    model, task = load_clip('agft-tiny'), load_task('position', 24)
    head = model.head(task.classes, task.templates)[:classes]
    logits_fn = lambda x: model.logits(x, head)
    x = task.images.contiguous()/255
    with torch.no_grad(): y = logits_fn(x).argmax(1)
    left = {name: (~broken(logits_fn, threat(name, 2/255)(logits_fn, x, y, seeded(0)), y)).sum() for name in ('autoattack', 'apgd-ce')}
    assert left['autoattack'] <= left['apgd-ce'] + 1
