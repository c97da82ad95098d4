"The photographs: archives that the test makes, and the real ones where they are."
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from agft.config import load_preset
from agft.core import asset, read_json, write_json
from agft.data import PHOTO_ARCHIVES, archives_dir, load_task

def write_archive(folder, name, classes, n, size, seed):
    "A photograph archive of n noise images of (height, width) `size`."
    rng, files = np.random.default_rng(seed), []
    for _ in range(n):
        f = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(f, 'JPEG')
        files.append(f.getvalue())
    labels = (np.arange(n) % len(classes)).astype(np.int32)
    offsets = np.cumsum([0, *map(len, files)])
    blob = np.frombuffer(b''.join(files), np.uint8)
    np.savez(folder/f'{name}.npz', blob=blob, offsets=offsets, labels=labels)
    (folder/f'{name}.json').write_text(json.dumps(dict(classes=list(classes))))


def size_of(task):
    if task.startswith('cifar'):
        return 32, 32
    return (64, 64) if task in ('tinyimagenet', 'eurosat') else (80, 100)


@pytest.fixture
def made_archives(tmp_path, monkeypatch):
    "Every archive of the photo preset, with noise for photographs."
    folder, names = tmp_path/'archives', read_json(asset('photo_names.json'))
    folder.mkdir()
    for i, (task, archive) in enumerate(PHOTO_ARCHIVES.items()):
        write_archive(folder, archive, names[archive]['classes'], 24, size_of(task), i)
    classes = names['tinyimagenet_val']['classes']
    for i, half in enumerate('ab'):
        write_archive(folder, f'tinyimagenet_train_{half}', classes, 600, (64, 64), 100 + i)
    monkeypatch.setenv('AGFT_DATA', str(folder))
    return folder


def test_photo_demo_runs_on_archives_that_we_made(made_archives, tmp_path):
    from agft.cli import main
    from agft.results import MEAN, Results
    preset = load_preset('photo')
    zero_shot = list(preset.data.zero_shot[:2])
    train = dict(images=64, steps=2, batch_size=16, checkpoint_every=1)
    evaluation = dict(images=12, attacks=['fgsm'])
    small = dict(base='photo', data=dict(zero_shot=zero_shot), train=train, eval=evaluation)
    write_json(tmp_path/'small.json', small)
    assert main(['demo', '--preset', str(tmp_path/'small.json'), '--out', str(tmp_path/'out')]) == 0
    results = Results.load(tmp_path/'out'/'results.json')
    rows = results.final()
    assert results.methods() == ['CLIP', *preset.demo]
    assert {'tinyimagenet', *zero_shot, MEAN} <= {*rows.task}
    assert {*preset.eval.eps} <= {*rows.eps} and {*rows.attack} == {'fgsm'}


def test_no_training_image_is_a_test_image(made_archives):
    "An image of the test archive that is also in a training archive is excluded from training."
    test = dict(np.load(made_archives/'tinyimagenet_val.npz'))
    description = (made_archives/'tinyimagenet_val.json').read_text()
    np.savez(made_archives/'tinyimagenet_train_b.npz', **test)
    (made_archives/'tinyimagenet_train_b.json').write_text(description)
    classes = json.loads(description)['classes']
    write_archive(made_archives, 'tinyimagenet_train_a', classes, 1100, (64, 64), 7)
    train, val = load_task('tinyimagenet', split='train'), load_task('tinyimagenet', split='val')
    assert len(train) + len(val) == 1100 and len(val) == 110
    known = {image.numpy().tobytes() for image in load_task('tinyimagenet').images}
    assert not any(image.numpy().tobytes() in known for task in (train, val) for image in task.images)


def test_covered_classes_are_those_of_the_whole_task(made_archives):
    whole, part = load_task('cifar100'), load_task('cifar100-covered')
    assert whole.covered is not None and part.classes == tuple(whole.classes[c] for c in whole.covered)
    assert 0 < len(part) < len(whole) and part.covered == tuple(range(len(part.classes)))
    both = zip(part.images, part.require_labels(), strict=True)
    for image, label in both:
        at = next(i for i in range(len(whole)) if torch.equal(whole.images[i], image))
        assert whole.classes[whole.require_labels()[at]] == part.classes[label]


@pytest.mark.skipif(archives_dir() is None, reason='the real photographs are not here (AGFT_DATA)')
def test_shipped_photo_encoder_is_a_zero_shot_model():
    "Far above chance on classes and images that it never trained on (numbers: results/bench_photo.json)."
    from agft.weights import load_model
    model, task = load_model('agft-photo'), load_task('cifar10', 500)
    head = model.head(task.classes, task.templates)
    with torch.no_grad():
        predicted = model.logits(task.images[:]/255, head).argmax(1)
    assert (predicted == task.require_labels()).float().mean() > .37
