"""The photograph path: on packs that the test makes, everywhere; on the real ones where they are."""
import io, json
import numpy as np, pytest, torch
from PIL import Image
from agft import cli
from agft.clip import load_clip
from agft.core import asset, load_preset, read_json
from agft.data import PHOTO_PACKS, load_task, packs_dir
from agft.evaluate import MEAN


def write_pack(folder, name, classes, n, size, seed):
    rng, files = np.random.default_rng(seed), []
    for _ in range(n):
        f = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(f, 'JPEG')
        files.append(f.getvalue())
    np.savez(folder/f'{name}.npz', blob=np.frombuffer(b''.join(files), np.uint8), offsets=np.cumsum([0, *map(len, files)]),
             labels=(np.arange(n) % len(classes)).astype(np.int32))
    (folder/f'{name}.json').write_text(json.dumps(dict(classes=list(classes))))


@pytest.fixture
def made_packs(tmp_path, monkeypatch):
    "Every pack of the photo preset, with noise for photographs."
    folder, names = tmp_path/'packs', read_json(asset('photo_names.json'))
    folder.mkdir()
    for i, (task, pack) in enumerate(PHOTO_PACKS.items()):
        size = (32, 32) if task.startswith('cifar') else (64, 64) if task in ('tinyimagenet', 'eurosat') else (80, 100)
        write_pack(folder, pack, names[pack]['classes'], 24, size, i)
    for i, half in enumerate('ab'): write_pack(folder, f'tinyimagenet_train_{half}', names['tinyimagenet_val']['classes'], 600, (64, 64), 100 + i)
    monkeypatch.setenv('AGFT_DATA', str(folder))
    return folder


def test_photo_demo_runs_on_packs_that_we_made(made_packs, tmp_path, monkeypatch):
    preset = load_preset('photo')
    preset['train'].update(images=64, steps=2, batch_size=16, every=1)
    preset['eval'].update(images=12, threat='fgsm')
    preset['zero_shot'] = preset['zero_shot'][:2]
    monkeypatch.setattr(cli, 'load_preset', lambda name: preset)
    assert cli.main(['demo', '--preset', 'photo', '--out', str(tmp_path/'out')]) == 0
    first, *others = preset['eval']['eps']
    results = read_json(tmp_path/'out'/'results.json')
    assert set(results) == {'CLIP', 'about', *preset['demo']} and list(results[preset['demo'][-1]]) == ['tinyimagenet', *preset['zero_shot'], MEAN]
    for eps in others: assert eps in read_json(tmp_path/'out'/f'results_{eps.replace("/", "_")}.json')['about']['threat']


def test_no_training_picture_is_a_test_picture(made_packs):
    "A picture of the test pack that also stands in a training pack is dropped from training."
    z, json_of = dict(np.load(made_packs/'tinyimagenet_val.npz')), (made_packs/'tinyimagenet_val.json').read_text()
    np.savez(made_packs/'tinyimagenet_train_b.npz', **z)
    (made_packs/'tinyimagenet_train_b.json').write_text(json_of)
    write_pack(made_packs, 'tinyimagenet_train_a', json.loads(json_of)['classes'], 1100, (64, 64), 7)
    train, val = load_task('tinyimagenet', split='train'), load_task('tinyimagenet', split='val')
    assert len(train) + len(val) == 1100


@pytest.mark.skipif(packs_dir() is None, reason='the real photographs are not here (AGFT_DATA)')
def test_shipped_photo_encoder_is_a_zero_shot_model():
    "Far above chance on classes and pictures that it never trained on; the recorded numbers are in results/bench_photo.json."
    model, task = load_clip('agft-photo'), load_task('cifar10', 500)
    with torch.no_grad(): right = model.logits(task.images/255, model.head(task.classes, task.templates)).argmax(1) == task.labels
    assert right.float().mean() > .37
