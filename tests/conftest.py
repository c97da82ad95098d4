import json
import shutil

import pytest

from agft.config import as_dict, load_preset
from agft.core import import_torchvision
from agft.data import archives_dir
from agft.methods import METHODS, Method
from agft.threats import THREATS

import_torchvision()  # the test modules import open_clip, which imports torchvision

SECONDS = {'model.name': 'agft-tiny', 'train.images': 96, 'train.steps': 4, 'train.batch_size': 32,
           'train.warmup': .25, 'train.checkpoint_every': 2, 'eval.images': 24, 'search.images': 24,
           'search.trials': 3}


def pytest_report_header(config):
    if archives_dir():
        return 'photographs: the archives that are here are used'
    return 'photographs: none here; tests use archives that they make (set AGFT_DATA to use real ones)'


@pytest.fixture(autouse=True)
def registries_as_they_were():
    "What a test registers, its plugin's method for one, is gone after the test."
    before = {*METHODS, *THREATS}
    yield
    for registry in (METHODS, THREATS):
        for name in {*registry} - before:
            del registry[name]


@pytest.fixture
def one_thread():
    "One thread: on small networks several threads mostly wait for each other, and they add in another order."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_preset(tmp_path):
    "Writes the tiny preset, cut down to seconds, to a file; returns the file's path."
    def write(name='small', methods=('TeCoA', 'AGFT'), tasks=2, **changes):
        data = as_dict(load_preset('tiny'))
        data['methods'] = {method: data['methods'][method] for method in methods}
        data['demo'] = list(methods)
        data['data']['zero_shot'] = data['data']['zero_shot'][:tasks]
        data['eval']['attacks'] = ['fgsm']
        for path, value in {**SECONDS, **changes}.items():
            *groups, last = path.split('.')
            part = data
            for group in groups:
                part = part[group]
            part[last] = value
        file = tmp_path/f'{name}.json'
        file.write_text(json.dumps(data))
        return str(file)
    return write


@pytest.fixture
def architectures(tmp_path, monkeypatch):
    "Makes architectures known to open_clip, from JSON files, until the test ends."
    import open_clip
    def add(configs):
        for table in ('_MODEL_CONFIGS', '_MODEL_CONFIG_PATHS'):
            monkeypatch.setattr(open_clip.factory, table, getattr(open_clip.factory, table).copy())
        (tmp_path/'configs').mkdir()
        for name, config in configs.items():
            (tmp_path/'configs'/f'{name}.json').write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path/'configs')
    return add


@pytest.fixture
def interrupted(monkeypatch):
    "Calls a training that is interrupted in one of its losses, counted from 1."
    def call(at, training, cls=Method):
        loss, calls = cls.loss, []
        def dies(self, *args):
            calls.append(0)
            if len(calls) == at:
                raise KeyboardInterrupt
            return loss(self, *args)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cls, 'loss', dies)
            training()
    return call


BROWSERS = 'chromium', 'chromium-browser', 'google-chrome'


@pytest.fixture(scope='session')
def chromium():
    "The browser's path."
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found:
        pytest.skip(f'no browser here: none of {", ".join(BROWSERS)}')
    return found[0]
