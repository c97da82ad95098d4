"Every public data set in its published layout, on small files made here, beside torchvision where it can."
import io
import json
import multiprocessing
import pickle
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat

from agft import registry
from agft.config import DataConfig, load_preset, presets
from agft.core import AgftError, write_json
from agft.data import load_task
from agft.methods import method
from agft.registry import (
    DATA_SETS,
    PAPER15,
    Missing,
    classes_of,
    data_report,
    digest,
    listing,
    open_images,
    open_pack,
    pack,
    read_folder,
    templates_of,
)
from agft.results import MEAN, MEAN_OF_ALL, Results
from agft.weights import SMALL

def main(*args):
    "The command line, imported when a test needs it."
    from agft.cli import main
    return main(*args)


pytestmark = pytest.mark.filterwarnings('ignore:.*were published')     # the test's sets are small

def image(i=0, size=(12, 10), form='JPEG'):
    f = io.BytesIO()
    Image.new('RGB', size, (i % 256, i//256, 90)).save(f, form)
    return f.getvalue()

def put(path, blob=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if blob is None:
        path.write_bytes(image(len(path.name)))
    elif isinstance(blob, bytes):
        path.write_bytes(blob)
    else:
        path.write_text(blob)

def folders(at, classes, name='{c}_0001.jpg'):
    for c in classes:
        put(at/c/name.format(c=c))
    return [*range(len(classes))]

def cifar(at, files, key, C):
    at.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for f in files:
        blob = pickle.dumps({'data': rng.integers(0, 256, (C, 3072), np.uint8), key: [*range(C)]}, protocol=2)
        for k in ('data', key):             # Python 2 wrote the real files: its strings are bytes
            unicode, string = b'X' + len(k).to_bytes(4, 'little'), b'U' + bytes([len(k)])
            blob = blob.replace(unicode + k.encode(), string + k.encode())
        (at/f).write_bytes(blob)

def layout(name, root):
    "Make a data set with one test image a class; say which labels must come out."
    classes, _ = classes_of(name)
    C = len(classes)
    if name == 'caltech101':
        put(root/'caltech101/101_ObjectCategories/BACKGROUND_Google/image_0001.jpg')
        folders(root/'caltech101/101_ObjectCategories', classes, 'image_0001.jpg')
    elif name == 'caltech256':
        for c in classes:
            put(root/f'caltech256/256_ObjectCategories/{c}/{c[:3]}_0001.jpg')
        put(root/'caltech256/256_ObjectCategories/198.spider/RENAME2', 'a stray file of the original archive')
    elif name == 'cifar10':
        batches = ['test_batch', *(f'data_batch_{i}' for i in range(1, 6))]
        cifar(root/'cifar-10-batches-py', batches, 'labels', 10)
    elif name == 'cifar100':
        cifar(root/'cifar-100-python', ['test', 'train'], 'fine_labels', 100)
    elif name == 'dtd':
        folders(root/'dtd/dtd/images', classes)
        put(root/'dtd/dtd/labels/test1.txt', ''.join(f'{c}/{c}_0001.jpg\n' for c in classes))
    elif name == 'eurosat':
        folders(root/'eurosat/2750', classes)
    elif name == 'fgvc_aircraft':
        data = root/'fgvc-aircraft-2013b/data'
        for i in range(C):
            put(data/f'images/{i:07}.jpg')
        put(data/'variants.txt', '\n'.join(classes) + '\n')
        put(data/'images_variant_test.txt', ''.join(f'{i:07} {c}\n' for i, c in enumerate(classes)))
    elif name == 'flowers102':
        at = root/'flowers-102'
        for i in range(1, C + 1):
            put(at/f'jpg/image_{i:05}.jpg')
        savemat(at/'setid.mat', dict(trnid=[[1]], valid=[[2]], tstid=[[*range(C, 0, -1)]]))
        savemat(at/'imagelabels.mat', dict(labels=[[*range(1, C + 1)]]))
        return [*range(C)][::-1]
    elif name == 'food101':
        folders(root/'food-101/images', classes, '100.jpg')
        put(root/'food-101/meta/test.txt', ''.join(f'{c}/100\n' for c in classes))
        put(root/'food-101/meta/test.json', json.dumps({c: [f'{c}/100'] for c in classes}))
    elif name == 'imagenet':
        folders(root/'imagenet/val', classes, 'ILSVRC2012_val_{c}.JPEG')
    elif name == 'imagenet_a':
        folders(root/'imagenet-a', classes)
    elif name == 'imagenet_r':
        folders(root/'imagenet-r', classes, 'art_0.jpg')
    elif name == 'imagenet_sketch':
        folders(root/'sketch', classes, 'sketch_0.JPEG')
    elif name == 'imagenet_v2':
        folders(root/'imagenetv2-matched-frequency-format-val', classes, '0.jpeg')
    elif name == 'oxford_pets':
        at = root/'oxford-iiit-pet'
        for c in classes:
            put(at/f'images/{c}_1.jpg')
        put(at/'annotations/test.txt', ''.join(f'{c}_1 {i} 1 1\n' for i, c in enumerate(classes, 1)))
    elif name == 'pcam':
        h5py = pytest.importorskip('h5py')
        (root/'pcam').mkdir(parents=True)
        labels = np.arange(2, dtype=np.uint8).reshape(2, 1, 1, 1)
        for k, v in dict(x=np.zeros((2, 96, 96, 3), np.uint8), y=labels).items():
            with h5py.File(root/f'pcam/camelyonpatch_level_2_split_test_{k}.h5', 'w') as f:
                f[k] = v
    elif name == 'stanford_cars':
        at = root/'stanford_cars'
        for i in range(C):
            put(at/f'cars_test/{i + 1:05}.jpg')
        (at/'devkit').mkdir()
        savemat(at/'devkit/cars_meta.mat', dict(class_names=np.array(classes, object)[None]))
        kinds = [('class', 'O'), ('fname', 'O')]
        notes = np.array([(i + 1, f'{i + 1:05}.jpg') for i in range(C)], kinds)
        savemat(at/'cars_test_annos_withlabels.mat', dict(annotations=notes[None]))
    elif name == 'stl10':
        at = root/'stl10_binary'
        put(at/'test_X.bin', np.random.default_rng(0).integers(0, 256, (10, 3, 96, 96), np.uint8).tobytes())
        put(at/'test_y.bin', np.arange(1, 11, dtype=np.uint8).tobytes())
        put(at/'class_names.txt', '\n'.join(classes) + '\n')
    elif name == 'sun397':
        for c in classes:
            put(root/f'SUN397{c}/sun_a.jpg')
        put(root/'SUN397/ClassName.txt', '\n'.join(classes) + '\n')
    elif name == 'tinyimagenet':
        for c in classes:
            put(root/f'tiny-imagenet-200/val/images/val_{c}.JPEG')
        rows = ''.join(f'val_{c}.JPEG\t{c}\t0\t0\t9\t9\n' for c in classes)
        put(root/'tiny-imagenet-200/val/val_annotations.txt', rows)
    elif name == 'country211':
        folders(root/'country211/test', classes)
    return [*range(C)]


def test_pcam_without_its_library_is_absent_or_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'h5py', None)
    with pytest.raises(Missing):
        open_images(tmp_path, 'pcam')
    (tmp_path/'pcam').mkdir()
    for key in 'xy':
        (tmp_path/f'pcam/camelyonpatch_level_2_split_test_{key}.h5').touch()
    with pytest.raises(AgftError, match='h5py'):
        open_images(tmp_path, 'pcam')


BY_SPLIT = ['dtd', 'fgvc_aircraft', 'food101', 'stanford_cars', 'country211', 'oxford_pets', 'flowers102',
            'stl10']
KIND = {name: dict(split='test') for name in BY_SPLIT}
KIND |= {name: {} for name in ('eurosat', 'sun397', 'caltech101', 'caltech256')}
KIND |= {name: dict(train=False) for name in ('cifar10', 'cifar100')}

@pytest.mark.parametrize('name', DATA_SETS)
def test_published_layout(name, tmp_path, monkeypatch):
    expected = layout(name, tmp_path)
    x, y = open_images(tmp_path, name)
    size = DATA_SETS[name].size
    assert y.tolist() == expected and x.shape == (len(expected), 3, size, size)
    task = load_task(name, root=tmp_path)
    assert task.classes == classes_of(name)[1] and task.templates == ('This is a photo of a {}',)
    assert task.images[:2].dtype == torch.uint8
    # torchvision reads the same files to the same labels
    if name not in KIND:
        return
    kind = getattr(torchvision.datasets, DATA_SETS[name].title)
    for check in ('_check_integrity', '_check_exists'):
        if hasattr(kind, check):
            monkeypatch.setattr(kind, check, lambda self: True)
    if name.startswith('cifar'):
        monkeypatch.setattr(kind, '_load_meta', lambda self: None)
    theirs = kind(str(tmp_path), **KIND[name])
    found, whole = listing(tmp_path, name), [theirs[i] for i in range(len(theirs))]
    by_label = {label: np.asarray(im.convert('RGB')) for im, label in whole}
    assert sorted(label for _, label in whole) == sorted(expected)
    for i in range(0, len(expected), 7):
        assert (found.decode(i).transpose(1, 2, 0) == by_label[found.labels[i]]).all()


def shard(path, rows, cut=None, ext='jpg'):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for key, blob, label in rows:
            for end, data in ((ext, blob), ('cls', str(label).encode())):
                info = tarfile.TarInfo(f'{key}.{end}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    if cut:
        path.write_bytes(path.read_bytes()[:cut])

@pytest.mark.parametrize('name', DATA_SETS)
def test_webdataset_layout(name, tmp_path):
    C = len(classes_of(name)[0])
    put(tmp_path/'wds'/name/'classnames.txt', '\n'.join(classes_of(name)[1]) + '\n')
    for s, at in enumerate(torch.arange(C).split(-(-C//2))):
        rows = [(f's{i:07}', image(int(i), form='WEBP' if s else 'JPEG'), int(i)) for i in at]
        shard(tmp_path/'wds'/name/f'test/{s}.tar', rows, ext='webp' if s else 'jpg')
    x, y = open_images(tmp_path, name)
    assert y.tolist() == [*range(C)]
    assert (x[torch.tensor([C - 1])][0, 0].float().mean() - (C - 1) % 256).abs() < 4      # JPEG is not exact


@pytest.mark.parametrize('name', ['cifar10', 'eurosat', 'stl10'])
def test_pack_is_the_same_images(name, tmp_path):
    layout(name, tmp_path)
    x, y = open_images(tmp_path, name)
    folder = pack(tmp_path, name)
    read, labels = open_images(tmp_path, name)
    assert open_pack(tmp_path, name) and read[:].equal(x[:]) and labels.equal(y)
    assert pack(tmp_path, name) == folder
    assert len(pickle.dumps(read)) < 2000 + 16*len(y)               # the path travels, not the pixels
    info = json.loads((folder/'pack.json').read_text())
    assert info['classes'] == digest(name)
    (folder/'pack.json').write_text(json.dumps(info | dict(classes='other')))
    with pytest.raises(AgftError, match='another version'):
        open_images(tmp_path, name)
    (folder/'pack.json').write_text(json.dumps(info))
    (folder/'images.npy').write_bytes((folder/'images.npy').read_bytes()[:500])
    with pytest.raises(AgftError, match='truncated'):
        open_images(tmp_path, name)


def test_a_pack_that_fails_leaves_nothing(tmp_path):
    layout('eurosat', tmp_path)
    (tmp_path/'eurosat/2750/River/River_0001.jpg').write_bytes(b'\xff\xd8\xff')
    with pytest.raises(AgftError, match='River_0001.jpg does not decode'):
        pack(tmp_path, 'eurosat')
    assert [f.name for f in (tmp_path/'packs').iterdir()] == ['.eurosat-test.lock']


def test_faults_are_named_by_path(tmp_path):
    at = tmp_path/'eurosat/2750'
    layout('eurosat', tmp_path)
    (at/'Oops').mkdir()
    with pytest.raises(AgftError, match="unknown folder 'Oops'"):
        listing(tmp_path, 'eurosat')
    (at/'Oops').rmdir()
    (at/'River/River_0001.jpg').unlink()
    with pytest.raises(AgftError, match='no images in 1 class folder.*River'):
        listing(tmp_path, 'eurosat')
    (at/'River').rmdir()
    with pytest.raises(AgftError, match="no folder 'River'"):
        listing(tmp_path, 'eurosat')
    shard(tmp_path/'wds/dtd/test/0.tar', [('a', image(), 0), ('b', image(), 1)], cut=3000)
    with pytest.raises(AgftError, match='0.tar.*(cut off|truncated)'):
        listing(tmp_path, 'dtd')
    shard(tmp_path/'wds/stl10/test/0.tar', [('a', image(), 10)])
    with pytest.raises(AgftError, match=r'range over \[10, 10\]; allowed: 0 to 9'):
        listing(tmp_path, 'stl10')
    put(tmp_path/'wds/stl10/classnames.txt', 'a\nb\n')
    with pytest.raises(AgftError, match='has 2 classes; stl10 has 10'):
        listing(tmp_path, 'stl10')
    with pytest.raises(AgftError, match='stanford_cars is not in .* its own site is gone'):
        listing(tmp_path, 'stanford_cars')
    with pytest.raises(AgftError, match="unknown data set 'cifar'"):
        listing(tmp_path, 'cifar')
    layout('cifar10', tmp_path)
    (tmp_path/'cifar-10-batches-py/test_batch').write_bytes(pickle.dumps(Path('x')))
    with pytest.raises(AgftError, match='a pickle asks for pathlib'):
        listing(tmp_path, 'cifar10')


def flat(mode='RGB'): return Image.new(mode, (9, 9), 77 if mode == 'L' else (77, 77, 77))

ODD = {'grey.png': flat('L'), 'deep.png': Image.fromarray(np.full((9, 9), 77*257, np.uint16)),
       'cmyk.jpg': flat().convert('CMYK'), 'palette.png': flat().quantize(4),
       'clear.png': Image.new('RGBA', (9, 9), (77, 77, 77, 255))}

@pytest.mark.parametrize('kind', ODD)
def test_every_kind_of_image_becomes_the_same_grey(kind):
    f = io.BytesIO()
    if kind.endswith('jpg'):
        ODD[kind].save(f, 'JPEG', quality=100)
    else:
        ODD[kind].save(f, 'PNG')
    for blob in (f.getvalue(), ODD[kind]):                          # an encoded image, and a PIL image
        x = registry.decode(blob, 16)
        assert x.shape == (3, 16, 16) and np.abs(x.astype(int) - 77).max() <= 3


def test_an_image_that_claims_to_be_huge_is_refused(tmp_path, monkeypatch):
    layout('eurosat', tmp_path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 40)
    rows = data_report(tmp_path, ['eurosat'])
    state = rows[0]['state']
    assert '10 damaged' in state and 'River' not in state and 'decompression bomb' in state


PINNED = dict(
    caltech101='c00b10168825', caltech256='8888643fa2c7', cifar10='fb39a06cc9cb',
    cifar100='e4264b188640', dtd='7b897a9610e7', eurosat='e58be65bd719',
    fgvc_aircraft='65beed79c9c4', flowers102='aca3a9a4aaa7', food101='066111ae3af1',
    imagenet='d23465c2b90f', oxford_pets='a95885677a6c', pcam='1e4f93a55e6c',
    stanford_cars='3dde0953a096', stl10='d11477d98e76', sun397='451b1ad3cf56',
    imagenet_a='4186680f459a', imagenet_r='f1ad6f89f2c1', imagenet_sketch='d23465c2b90f',
    imagenet_v2='53fcc94ceb48', tinyimagenet='3c3e4672f4e5', country211='379c70419f7e')

def test_names_and_orders_are_the_published_ones():
    wnids, words = classes_of('imagenet')
    assert len(wnids) == 1000 and wnids == tuple(sorted(wnids))
    assert wnids[0] == 'n01440764' and wnids[-1] == 'n15075141'
    assert words[0] == 'tench' and len({w.lower() for w in words}) == 1000
    assert {words[134], words[517]} == {'crane bird', 'construction crane'}
    assert len(PAPER15) == 15 and 'imagenet' in PAPER15
    counts = dict(
        caltech101=101, caltech256=257, cifar10=10, cifar100=100, dtd=47, eurosat=10, fgvc_aircraft=100,
        flowers102=102, food101=101, imagenet=1000, oxford_pets=37, pcam=2, stanford_cars=196, stl10=10,
        sun397=397, imagenet_a=200, imagenet_r=200, imagenet_sketch=1000, imagenet_v2=1000,
        tinyimagenet=200, country211=211)
    assert {k: len(classes_of(k)[0]) for k in DATA_SETS} == counts
    food = classes_of('food101')
    assert food[0] == tuple(sorted(food[0])) and food[1][0] == 'apple pie' and food[1][-1] == 'waffles'
    assert {*classes_of('imagenet_a')[0]} < {*wnids} and classes_of('imagenet_v2')[0][999] == '999'
    ensemble = templates_of('imagenet', 'openai')
    assert len(ensemble) == 80 and templates_of('tinyimagenet', 'openai') == ensemble
    flowers = torchvision.datasets.Flowers102.classes
    assert [n.lower() for n in classes_of('flowers102')[0]] == [n.lower() for n in flowers]
    # a name that changes is another question: say so in the changelog
    assert {k: digest(k) for k in DATA_SETS} == PINNED
    for k in DATA_SETS:
        assert len({' '.join(w.lower().split()) for w in classes_of(k)[1]}) == counts[k]
        assert all('{}' in t for t in templates_of(k, 'openai'))


PAPER_SENTENCES = dict(
    caltech101='A photo of a {}.', caltech256='A photo of a {}.', country211='A photo I took in {}.',
    dtd='A surface with a {} texture.', eurosat='A centered satellite photo of {}.',
    fgvc_aircraft='A photo of a {}, a type of aircraft.', flowers102='A photo of a {}, a type of flower.',
    food101='A photo of {}, a type of food.', oxford_pets='A photo of a {}, a type of pet.',
    pcam='This is a photo of {}.', stanford_cars='A photo of a {}.')

PAPER_WORDS = dict(  # some classes of each data set: official class -> words
    caltech101={'Faces': 'person', 'Faces_easy': 'person', 'Leopards': 'leopards', 'yin_yang': 'yin yang'},
    caltech256={'001.ak47': 'ak47', '091.grand-piano-101': 'grand piano', '251.airplanes-101': 'airplanes'},
    cifar10={'airplane': 'airplane'}, cifar100={'aquarium_fish': 'aquarium fish'},
    dtd={'polka-dotted': 'polka dotted'}, eurosat={'SeaLake': 'a sea or a lake', 'River': 'a river'},
    fgvc_aircraft={'707-320': 'Boeing 707-320', 'A319': 'A319', 'F-16A/B': 'F-16A/B'},
    flowers102={'hard-leaved pocket orchid': 'hard leaved pocket orchid', 'hippeastrum': 'hippeastrum'},
    food101={'apple_pie': 'apple pie'}, oxford_pets={'Egyptian_Mau': 'egyptian mau', 'pug': 'pug'},
    imagenet={'n02119789': 'kit fox', 'n02012849': 'crane bird', 'n03126707': 'construction crane',
              'n03710721': 'one-piece bathing suit', 'n02113186': 'Cardigan Welsh Corgi'},
    imagenet_a={'n01498041': 'stingray'}, imagenet_r={'n02066245': 'grey whale'},
    imagenet_sketch={'n02110185': 'Siberian husky'}, imagenet_v2={'0': 'tench', '134': 'crane bird'},
    pcam={'0': 'healthy lymph node tissue', '1': 'lymph node tumor tissue'},
    stanford_cars={'Acura TL Type-S 2008': 'Acura TL Type S', 'Audi S4 Sedan 2007': 'Audi S4 Sedan 2007'},
    stl10={'airplane': 'airplane'}, sun397={'/b/bazaar/outdoor': 'bazaar outdoor'},
    tinyimagenet={'n02124075': 'Egyptian cat'}, country211={'CH': 'switzerland'})

@pytest.mark.parametrize('name', DATA_SETS)
def test_questions_of_the_paper(name):
    "The sentence and the words of each data set; no two classes share a name, except for two of faces."
    usual = 'This is a photo of a {}.'
    assert templates_of(name, 'agft') == (PAPER_SENTENCES.get(name, usual),)
    (classes, words), own = classes_of(name, 'agft'), classes_of(name)
    assert classes == own[0] and len(words) == len(classes)
    found = dict(zip(classes, words, strict=True))
    assert found | PAPER_WORDS[name] == found
    assert len({word.lower() for word in words}) == len(words) - (name == 'caltech101')
    assert all(word == word.strip() for word in words)
    for prompts in ('plain', 'openai', ('a {}',)):
        assert classes_of(name, prompts) == own

def test_names_that_the_paper_gives_twice_stay_those_of_agft():
    "Three pairs of ImageNet and seven of StanfordCars: every other name follows the paper's rule."
    numbers, words = classes_of('imagenet', 'agft')
    asked = registry._paper_questions()['imagenet']
    other = {asked[wnid] for wnid, word in zip(numbers, words, strict=True) if word != asked[wnid]}
    assert other == {'crane', 'maillot', 'Cardigan'} and words[numbers.index('n02963159')] == 'cardigan'
    assert set(numbers) == set(asked)
    cars = [word for word in classes_of('stanford_cars', 'agft')[1] if word[-5:-2] in (' 20', ' 19')]
    assert len(cars) == 14 and len({word[:-5] for word in cars}) == 7

def test_the_faces_of_caltech101_are_one_class(tmp_path):
    expected = layout('caltech101', tmp_path)
    plain, task = (load_task('caltech101', root=tmp_path, prompts=p) for p in ('plain', 'agft'))
    assert plain.require_labels().tolist() == expected and len(plain.classes) == 101
    assert task.require_labels().tolist() == [0, 0, *range(1, 100)]  # labels above 0 shifted down by one
    assert task.classes[:3] == ('person', 'leopards', 'motorbikes') and len(task.classes) == 100
    assert len(task) == len(plain) and task.images[:].equal(plain.images[:])
    assert task.prompts()[0] == 'A photo of a person.' and task.digest() != plain.digest()

def test_a_folder_of_your_own_has_no_question_of_the_paper(tmp_path):
    for c in ('tree', 'sea'):
        put(tmp_path/'dtd'/c/'1.jpg')
    plain, agft = (load_task(str(tmp_path/'dtd'), size=8, prompts=p) for p in ('plain', 'agft'))
    assert agft.templates == plain.templates == ('This is a photo of a {}',)
    assert load_task('digits', 2, prompts='agft').digest() == load_task('digits', 2).digest()

def test_unknown_prompts_are_one_line(capsys):
    allowed = r"prompts 'paper'; allowed: agft, plain, openai, or a list of sentences with '\{\}'"
    with pytest.raises(AgftError, match=allowed):
        templates_of('dtd', 'paper')
    with pytest.raises(AgftError, match=allowed):
        DataConfig(prompts='paper')
    assert main(['train', '--prompts', 'paper']) == 2
    line = capsys.readouterr().err
    assert 'agft, plain, openai' in line and line.count('\n') == 1


def _get(root, counter):
    import torchvision

    from agft.registry import fetch
    class EuroSAT:
        def __init__(self, root, download):
            with open(counter, 'a') as f:
                f.write('download\n')
            layout('eurosat', Path(root))
    torchvision.datasets.EuroSAT = EuroSAT
    registry.DATA_SETS['eurosat'] = replace(registry.DATA_SETS['eurosat'], counts=dict(test=10))
    fetch(Path(root), 'eurosat')

def test_several_processes_download_once(tmp_path):
    ctx = multiprocessing.get_context('fork')
    ps = [ctx.Process(target=_get, args=(tmp_path/'d', tmp_path/'counter')) for _ in range(3)]
    for p in ps:
        p.start()
    for p in ps:
        p.join(60)
    assert [p.exitcode for p in ps] == [0]*3 and (tmp_path/'counter').read_text() == 'download\n'


def test_what_cannot_be_downloaded_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(AgftError, match='stanford_cars has no download.*mirror'):
        registry.fetch(tmp_path, 'stanford_cars')
    def gone(*a, **k): raise RuntimeError('404')
    monkeypatch.setattr(torchvision.datasets, 'DTD', gone)
    message = 'dtd does not download: 404; find it on a mirror and put it into dtd/dtd'
    with pytest.raises(AgftError, match=message):
        registry.fetch(tmp_path, 'dtd')


def test_data_commands(tmp_path, capsys):
    layout('eurosat', tmp_path)
    layout('stl10', tmp_path)
    assert main(['data', 'check', str(tmp_path), '--sets', 'eurosat,stl10,dtd']) == 2
    said = capsys.readouterr()
    assert '27000 were published' in said.out and 'dtd' in said.err
    assert 'dtd is not in' in said.out and 'torchvision.datasets.DTD' in said.out
    assert main(['data', 'check', str(tmp_path), '--sets', 'eurosat', '--quick']) == 0
    (tmp_path/'eurosat/2750/Stray').mkdir()
    assert main(['data', 'pack', str(tmp_path)]) == 2               # and the others are packed
    assert "unknown folder 'Stray'" in capsys.readouterr().out
    (tmp_path/'eurosat/2750/Stray').rmdir()
    assert main(['data', 'pack', str(tmp_path)]) == 0
    assert {p.name for p in (tmp_path/'packs').glob('[!.]*')} == {'eurosat-test', 'stl10-test'}
    capsys.readouterr()
    assert main(['data', 'pack', str(tmp_path), '--sets', 'dtd']) == 2
    assert 'dtd is not in' in capsys.readouterr().out
    assert main(['data', 'check']) == 2 and 'needs a data folder' in capsys.readouterr().err
    assert main(['data', 'list', '--sets', 'paper15']) == 0 and capsys.readouterr().out.count('\n') == 17


def test_one_download_that_fails_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    def made(name):
        def make(root, download=True, **how): layout(name, Path(root))
        return make
    for name in ('eurosat', 'caltech101'):
        monkeypatch.setattr(torchvision.datasets, DATA_SETS[name].title, made(name))
        counts = dict(test=len(classes_of(name)[0]))
        monkeypatch.setitem(registry.DATA_SETS, name, replace(DATA_SETS[name], counts=counts))
    assert main(['data', 'get', str(tmp_path), '--sets', 'caltech101,stanford_cars,eurosat']) == 2
    said = capsys.readouterr()
    assert 'its own site is gone' in said.out and said.out.count('there') == 2
    assert '1 of 3 are not ready: stanford_cars' in said.err


def test_imagenet_is_unpacked_from_its_archives(tmp_path, monkeypatch):
    seen = []
    def unpack(root, split):
        seen.append((root, split))
        layout('imagenet', tmp_path)
    monkeypatch.setattr(torchvision.datasets, 'ImageNet', unpack)
    entry = DATA_SETS['imagenet']
    monkeypatch.setitem(registry.DATA_SETS, 'imagenet', replace(entry, counts=dict(test=1000)))
    with pytest.raises(AgftError, match='imagenet has no download.*devkit'):
        registry.fetch(tmp_path, 'imagenet')
    (tmp_path/'imagenet').mkdir()
    monkeypatch.setitem(registry.DATA_SETS, 'imagenet', replace(entry, counts=dict(train=9, test=1000)))
    registry.fetch(tmp_path, 'imagenet', ['test'])
    assert seen == [(str(tmp_path/'imagenet'), 'val')]


def test_what_is_half_there_is_not_taken_for_all(tmp_path):
    for name in ('food101', 'sun397', 'stl10'):
        layout(name, tmp_path)
    (tmp_path/'food-101/images/waffles/100.jpg').unlink()
    with pytest.raises(AgftError, match='food101, test: 1 of 101 images are missing, .*waffles/100.jpg'):
        listing(tmp_path, 'food101')
    (tmp_path/'SUN397/a/abbey/sun_a.jpg').unlink()
    with pytest.raises(AgftError, match='no images in 1 class folder.*abbey'):
        listing(tmp_path, 'sun397')
    at = tmp_path/'stl10_binary/test_X.bin'
    at.write_bytes(at.read_bytes()[:3*96*96*7])
    with pytest.raises(AgftError, match='7 images and 10 labels'):
        listing(tmp_path, 'stl10')
    shard(tmp_path/'wds/dtd/test/0.tar', [('a', image(), 0)])
    put(tmp_path/'wds/dtd/test/nshards.txt', '3')
    with pytest.raises(AgftError, match='has 1 of 3 archives'):
        listing(tmp_path, 'dtd')
    layout('eurosat', tmp_path)
    with pytest.warns(UserWarning, match='eurosat: 10 images in .* 27000 were published'):
        load_task('eurosat', root=tmp_path)


def test_held_out_images_are_neither_trained_nor_tested_on(tmp_path):
    cifar(tmp_path/'cifar-10-batches-py', [f'data_batch_{i}' for i in range(1, 6)], 'labels', 10)
    train, val = (load_task('cifar10', split=s, root=tmp_path) for s in ('train', 'val'))
    def rows(task): return {x.numpy().tobytes() for x in task.images[:]}
    assert len(train) + len(val) == 50 and len(val) == 5 and not rows(train) & rows(val)


def test_a_folder_of_your_own(tmp_path):
    for split, n in (('train', 30), ('test', 3)):
        for c in ('red_fox', 'arctic fox'):
            for i in range(n):
                put(tmp_path/split/c/f'{i}.jpg')
    train, val, test = (load_task(str(tmp_path), split=s, size=32) for s in ('train', 'val', 'test'))
    assert test.classes == ('arctic fox', 'red fox') and test.resolution == 32
    assert (len(train), len(val), len(test)) == (54, 6, 6)
    x, y, names = read_folder(tmp_path/'test', 32)
    assert names == test.classes and y.equal(test.require_labels()) and x[:].equal(test.images[:])
    assert load_task(str(tmp_path/'test')).resolution == 224
    with pytest.raises(AgftError, match='unknown task'):
        load_task(str(tmp_path/'nowhere'))
    lone = tmp_path/'lone'
    for c in 'ab':
        for i in range(20):
            put(lone/c/f'{i}.jpg')
    assert [len(load_task(str(lone), split=s)) for s in ('train', 'val', 'test')] == [36, 4, 40]
    put(tmp_path/'train/wolf/1.jpg')
    with pytest.raises(AgftError, match='train, test have different class folders'):
        load_task(str(tmp_path))
    (tmp_path/'bare').mkdir()
    with pytest.raises(AgftError, match='0 subfolders'):
        load_task(str(tmp_path/'bare'))


def test_the_papers_table_from_one_command(tmp_path, capsys, monkeypatch):
    "All fifteen data sets, the paper's preset, a small encoder in place of ViT-B/32."
    monkeypatch.chdir(tmp_path)
    data = tmp_path/'data'
    for name in PAPER15:
        layout(name, data)
    for c in classes_of('imagenet')[0][:1000]:
        put(data/'imagenet/train'/c/'a.JPEG')
    train = dict(batch_size=8, steps=2, checkpoint_every=1)
    mine = dict(base='vit_b32_imagenet', model=dict(name='agft-tiny'), train=train)
    write_json('mine.json', mine | dict(data=dict(prompts=['{}'])))  # a small encoder reads few tokens
    training = ['train', '--preset', 'mine.json', '--method', 'AGFT', '--data', 'data', '--out', 'run']
    assert main([*training, '--dry-run']) == 0
    said = capsys.readouterr().out
    assert 'images  900' in said and 'hours' in said and not Path('run').exists() # a tenth is held out
    assert main(training) == 0
    line = ('eval run/model.safetensors --preset mine.json --data data --tasks paper15 --threats clean,pgd20 '
            '--eps 1/255 --n 2 --out eval')
    assert main(line.split()) == 0
    rows = Results.load('eval/results.json').select(attack='pgd20', eps=1/255).accuracy
    zero_shot = [name for name in PAPER15 if name != 'imagenet']
    assert [*rows.task] == ['imagenet', *zero_shot, MEAN, MEAN_OF_ALL]
    robust = dict(zip(rows.task, rows.robust, strict=True))
    assert robust[MEAN_OF_ALL] == pytest.approx(np.mean([robust[name] for name in PAPER15]))
    assert robust[MEAN] == pytest.approx(np.mean([robust[name] for name in zero_shot]))
    assert main(line.replace('--data data', '').replace('--out eval', '--out other').split()) == 2
    assert 'needs the data folder' in capsys.readouterr().err


def test_presets_name_models_tags_methods_and_sets_that_exist():
    assert {*SMALL} <= {*open_clip.list_models()}
    for name in presets():
        recipe = load_preset(name)
        model, _, tag = recipe.model.name.partition('@')
        assert model in open_clip.list_models()
        if tag:
            assert tag in open_clip.list_pretrained_tags_by_model(model)
            quick = open_clip.get_pretrained_cfg(model, tag).get('quick_gelu', False)
            assert quick == model.endswith('quickgelu')
        for config in recipe.methods.values():
            method(config.name, **config.settings())
        if recipe.bench is None:
            assert {recipe.data.source, *recipe.data.zero_shot} == {*PAPER15}
            assert recipe.data.prompts == 'agft' and recipe.eval.attacks == ('pgd20', 'pgd20-paper')


def test_a_folder_of_your_own_is_audited(tmp_path):
    drawn = load_task('things', 40)
    for i, (x, y) in enumerate(zip(drawn.images[:], drawn.require_labels(), strict=True)):
        f = io.BytesIO()
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(f, 'PNG')
        put(tmp_path/'mine'/drawn.classes[y]/f'{i}.png', f.getvalue())
    own = load_task(str(tmp_path/'mine'), size=32, prompts=drawn.templates)
    assert {x.numpy().tobytes() for x in own.images[:]} == {x.numpy().tobytes() for x in drawn.images}
    data = dict(source=str(tmp_path/'mine'), size=32, prompts=drawn.templates)
    write_json(tmp_path/'mine.json', dict(base='tiny', data=data))
    preset, out = str(tmp_path/'mine.json'), str(tmp_path/'audit')
    assert main(['audit', 'agft-tiny', '--preset', preset, '--n', '4', '--out', out]) == 0
    assert (tmp_path/'audit/audit.html').is_file()
