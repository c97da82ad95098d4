import pytest
from agft.data import packs_dir


def pytest_report_header(config):
    d = packs_dir()
    return 'photographs: ' + ('the packs that are here are used' if d else 'no packs here; tests use packs that they make (set AGFT_DATA to use real ones)')


@pytest.fixture
def small_preset(monkeypatch):
    "The tiny preset cut down to seconds, wherever it is loaded."
    from agft import bench, cli
    from agft.core import load_preset
    def cut(name):
        p = load_preset(name)
        p['train'].update(images=96, steps=4, batch_size=32, warmup=.25, every=2)
        p['eval'].update(images=24, threat='fgsm')
        p['tune'].update(images=24)
        p['zero_shot'] = p['zero_shot'][:2]
        p['demo'] = ['TeCoA', 'AGFT']
        p['methods'] = {m: p['methods'][m] for m in p['demo']}
        return p
    for module in (bench, cli): monkeypatch.setattr(module, 'load_preset', cut)
    return cut
