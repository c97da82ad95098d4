"What a training step reads: images ahead of time, augmented or not, and the teacher's features."
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import agft.train as train
from agft.config import TrainConfig, load_preset, override
from agft.core import AgftError, seeded
from agft.data import Task, load_task
from agft.loop import read_log
from agft.methods import METHODS
from agft.model import ZeroShotCLIP
from agft.registry import Images
from agft.train import augmented, finetune

TINY = load_preset('tiny')
SMALL = {'train.images': 16, 'train.batch_size': 8, 'train.steps': 3, 'train.warmup': 0., 'method.lr': 1e-3,
         'train.grad_clip': 1.}


def run(out, method='AGFT', task=None, **changes):
    "The tuned weights of a short run."
    named = {key.replace('__', '.'): value for key, value in changes.items()}
    config = override(TINY.finetune(method), **SMALL | named)
    return dict(finetune(config, out, 'cpu', task=task).visual.named_parameters())


def largest_difference(a, b): return max((a[key] - b[key]).abs().max().item() for key in a)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder of images in two classes, train and test."
    root = tmp_path_factory.mktemp('images')
    for split in ('train', 'test'):
        for i, name in enumerate(('cats', 'dogs')):
            (root/split/name).mkdir(parents=True)
            for j in range(8):
                pixels = torch.randint(256, (40, 50, 3), generator=seeded(split, i, j), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root/split/name/f'{j}.png')
    return root


# -- worker processes

def test_worker_processes_read_what_a_thread_reads(tmp_path, folder):
    own:dict[str, Any] = dict(data__source=str(folder), train__images=None)
    thread, workers = run(tmp_path/'a', **own), run(tmp_path/'b', **own, train__workers=2)
    assert largest_difference(thread, workers) == 0


@pytest.mark.parametrize('how', ['fork', 'spawn'])
def test_images_can_be_read_in_any_kind_of_process(folder, how):
    found = load_task(str(folder), split='train').images
    assert isinstance(found, Images)
    images:Any = found  # torch's type of a data set is a class, which need not be derived from
    context = multiprocessing.get_context(how)
    loader = DataLoader(images, batch_size=4, num_workers=2, multiprocessing_context=context)
    assert (torch.cat([*loader]) == images[:]).all()


def test_parts_come_in_any_order(folder):
    task = load_task(str(folder), split='train')
    parts = train._Parts(task, TrainConfig(batch_size=4, accumulate=2), 0, None, None)
    read = train.Reader(parts, 1, torch.device('cpu'))
    for number in (0, 1, 2, 7, 8, 3):
        expected, found = parts[number], read(number)
        assert not isinstance(expected, AgftError)
        for ours, theirs in zip(found[:2], expected[:2], strict=True):
            assert ours is not None and theirs is not None and (ours == theirs).all()


def unreadable(i): raise AgftError(f'image {i} is broken')


@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_that_cannot_be_read_ends_the_run_in_one_line(tmp_path, workers):
    images = Images(unreadable, 64, torch.arange(16), identify=str)
    task = Task('mine', images, None, ('cat', 'dog'), ('a {}',))
    with pytest.raises(AgftError, match=r'^image \d+ is broken$'):
        run(tmp_path, 'FARE', task, train__images=None, train__workers=workers, train__augment=True)


class Deadly:
    "Images whose reader kills its process, once it is not the one that made them."
    def __init__(self): self.home = os.getpid()
    def __call__(self, i):
        if os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 64, 64, dtype=torch.uint8).numpy()


def test_a_worker_that_dies_ends_the_run_with_its_message(tmp_path):
    images = Images(Deadly(), 64, torch.arange(16), threads=False, identify=str)
    task = Task('mine', images, torch.arange(16) % 2, ('cat', 'dog'), ('a {}',))
    with pytest.raises(AgftError, match='a process that reads images ended: .*worker .pid'):
        run(tmp_path, 'TeCoA', task, train__images=None, train__workers=1)


# -- augmentation

def test_augmentation_moves_and_mirrors():
    "An image of its own coordinates shows where each pixel came from."
    size, most = 32, 4
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing='ij')
    grid = torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)
    found = augmented(grid.expand(200, -1, -1, -1), slice(0, 200), 200, seeded(0)).int()
    down = found[:, 0, 16, 16] - 16
    mirrored = found[:, 1, 16, 8] > found[:, 1, 16, 24]
    across = torch.where(mirrored, found[:, 1, 16, 15], found[:, 1, 16, 16]) - 16
    assert {*down.tolist()} == {*across.tolist()} == {*range(-most, most + 1)}
    assert .35 < mirrored.float().mean() < .65
    edges = found[:, 0, :, 0]
    assert ((edges[:, 1:] - edges[:, :-1]).abs() <= 1).all()  # the edge is reflected, not cut


def test_augmentation_depends_on_the_step_and_not_on_the_parts(tmp_path):
    whole = run(tmp_path/'whole', train__augment=True)
    again = run(tmp_path/'again', train__augment=True)
    parts = run(tmp_path/'parts', train__augment=True, train__accumulate=3)
    plain = run(tmp_path/'plain')
    assert largest_difference(whole, again) == 0
    assert largest_difference(whole, parts) < 1e-5 < largest_difference(whole, plain)


def test_with_augmentation_the_teacher_sees_the_augmented_images(tmp_path, monkeypatch):
    seen, teacher_features = [], METHODS['AGFT'].teacher_features
    def spy(self, teacher, x):
        seen.append(x)
        return teacher_features(self, teacher, x)
    monkeypatch.setattr(METHODS['AGFT'], 'teacher_features', spy)
    run(tmp_path, train__augment=True)
    images = load_task('source', n=16, split='train').images/255
    assert len(seen) == 3 and {len(x) for x in seen} == {8}
    whole = images.flatten(1)
    known = [(whole == x.flatten(1)[i]).all(1).any().item() for x in seen for i in range(8)]
    assert sum(known) < 6  # hardly any image is as it was


# -- the teacher's features

@pytest.fixture
def counted(monkeypatch):
    "How many images a model has embedded."
    counts, features = [], ZeroShotCLIP.features
    def spy(self, x):
        counts.append(len(x))
        return features(self, x)
    monkeypatch.setattr(ZeroShotCLIP, 'features', spy)
    return counts


def test_features_are_shared_by_methods_and_seeds(tmp_path):
    root = tmp_path/'data'
    root.mkdir()
    for method, seed in (('AGFT', 0), ('Soft', 0), ('TRADES-AGFT', 1), ('TeCoA', 0)):
        run(tmp_path/f'{method}', method, data__root=str(root), seed=seed)
        assert not (tmp_path/f'{method}'/'teacher.pt').exists()
    one = [*(root/'features').iterdir()]
    assert len(one) == 1
    run(tmp_path/'FARE', 'FARE', data__root=str(root))  # not normalised
    run(tmp_path/'other', data__root=str(root), train__images=12)
    assert len([*(root/'features').iterdir()]) == 3


def test_stored_features_are_read(tmp_path, counted):
    root = tmp_path/'data'
    root.mkdir()
    computed = run(tmp_path/'a', data__root=str(root))
    before = len(counted)
    again = run(tmp_path/'b', data__root=str(root))
    own = run(tmp_path/'c')
    assert len(counted) - before == before + before - 1  # one call less: of the teacher for all images
    assert largest_difference(computed, again) == largest_difference(computed, own) == 0


def test_damaged_features_are_refused(tmp_path):
    root = tmp_path/'data'
    root.mkdir()
    run(tmp_path/'a', data__root=str(root))
    file, = (root/'features').iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AgftError, match='features.*cannot be read; remove it'):
        run(tmp_path/'b', data__root=str(root))


def test_a_data_folder_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr(train.os, 'access', lambda path, mode: Path(path).name != 'data')
    (tmp_path/'data').mkdir()
    run(tmp_path/'a', data__root=str(tmp_path/'data'))
    assert [*(tmp_path/'data').iterdir()] == [] and len(read_log(tmp_path/'a')) == 3


def test_augment_and_workers_change_what_they_should(tmp_path):
    "Workers do not define a run, augmentation does."
    first = run(tmp_path)
    assert largest_difference(first, run(tmp_path, train__workers=2)) == 0
    with pytest.raises(AgftError, match='train.augment'):
        run(tmp_path, train__augment=True)


def test_two_runs_may_compute_the_same_features(tmp_path, monkeypatch):
    "While one run computes them, another one begins and ends."
    root, features_of, begun = tmp_path/'data', train._features_of, []
    root.mkdir()
    def meanwhile(*args):
        if not begun:
            begun.append(0)
            run(tmp_path/'other', data__root=str(root))
        return features_of(*args)
    monkeypatch.setattr(train, '_features_of', meanwhile)
    first = run(tmp_path/'first', data__root=str(root))
    assert largest_difference(first, run(tmp_path/'alone')) == 0
    assert [path.suffix for path in (root/'features').iterdir()] == ['.pt']


def test_features_of_a_method_of_ones_own_depend_on_its_settings(tmp_path):
    (tmp_path/'own.py').write_text(OWN)
    root = tmp_path/'data'
    root.mkdir()
    for i, power in enumerate((1, 1, 2)):
        own = dict(plugins=[str(tmp_path/'own.py')], method__options=dict(power=power))
        run(tmp_path/f'{i}', 'Powers', data__root=str(root), **own)
    assert len([*(root/'features').iterdir()]) == 2


OWN = """
from agft.methods import AGFT, register_method

@register_method('Powers')
class Powers(AGFT):
    power:int = 1
    def teacher_features(self, teacher, x): return teacher.encode_image(x**self.power)
"""
