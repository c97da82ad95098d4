"Files that are read: image formats and depths, what is left out, damaged and hostile files, links, archives."
import io
import json
import multiprocessing
import os
import pickle
import random
import struct
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agft import registry
from agft.core import AgftError, seeded
from agft.data import Task, load_task, load_tasks, read_archive
from agft.registry import (
    DATA_SETS,
    Images,
    classes_of,
    data_report,
    fetch,
    listing,
    open_images,
    open_pack,
    pack,
)

PIXELS = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8, generator=seeded(0, 'test files')).numpy()


def encoded(form, image=None, **options):
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(file, form, **options)
    return file.getvalue()


def put(path, blob):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(blob)
    return path


def folder(at, n=3, classes=('cat', 'dog')):
    "A folder of class folders; every image is another one."
    for c, name in enumerate(classes):
        for i in range(n):
            put(at/name/f'{i}.png', encoded('PNG', Image.new('RGB', (24, 20), (40*c, 10*i, 90))))
    return at


def eurosat(root):
    for name in classes_of('eurosat')[0]:
        put(root/f'eurosat/2750/{name}/{name}_1.jpg', encoded('JPEG'))
    return root


# ---- what is read and what is left out

FORMATS = {'.jfif': 'JPEG', '.jpe': 'JPEG', '.JPG': 'JPEG', '.gif': 'GIF', '.avif': 'AVIF',
           '.jp2': 'JPEG2000', '.j2k': 'JPEG2000', '.pgm': 'PPM', '.pnm': 'PPM', '.tif': 'TIFF',
           '.webp': 'WEBP', '.dib': 'DIB', '.apng': 'PNG', '.mpo': 'MPO'}

@pytest.mark.parametrize('ending', FORMATS)
def test_an_image_is_read_whatever_its_ending(ending, tmp_path):
    image = Image.fromarray(PIXELS).convert('L' if ending == '.pgm' else 'RGB')
    put(folder(tmp_path)/f'cat/x{ending}', encoded(FORMATS[ending], image))
    task = load_task(str(tmp_path), size=16)
    assert len(task) == 7 and task.images[:].shape == (7, 3, 16, 16) and task.note == ''


def test_what_is_left_out_is_counted_and_said(tmp_path):
    folder(tmp_path/'mine')
    deeper = 'cat/more/x.png', 'cat/more/still/y.jpg'
    for name in (*deeper, 'z.gif', 'dog/clip.heic', 'dog/0001', 'dog/notes.txt'):
        put(tmp_path/'mine'/name, b'')
    for name in ('cat/.hidden.png', 'cat/Thumbs.db', '__MACOSX/cat/x.png', '.git/x.png'):
        put(tmp_path/'mine'/name, b'')
    with pytest.warns(UserWarning, match='6 files are left out: 2 in deeper folders') as warned:
        task = load_task(str(tmp_path/'mine'), size=16)
    assert len(task) == 6 and task.classes == ('cat', 'dog')
    for words in ('1 beside the class folders', "'z.gif'", '.heic', '.txt', 'without an ending'):
        assert words in task.note
    assert task.note in str(warned[0].message) and task.subset(2).note == task.choose([0]).note == task.note


def test_a_class_folder_of_folders_is_refused(tmp_path):
    put(folder(tmp_path)/'gnu/2024/x.png', encoded('PNG'))
    with pytest.raises(AgftError, match=r'no images in 1 class folder.*gnu \(but folders\)'):
        load_task(str(tmp_path))


@pytest.mark.parametrize('names', [('train', 'valid', 'test'), ('train', 'validation'), ('train', 'val')])
def test_the_folder_of_the_split_val_has_several_names(names, tmp_path):
    for i, name in enumerate(names):
        folder(tmp_path/name, 10 + i)
    assert len(load_task(str(tmp_path), split='val', size=16)) == 22
    assert len(load_task(str(tmp_path), split='train', size=16)) == 20


def test_splits_that_cannot_be_told_apart_are_refused(tmp_path):
    for name in ('train', 'val', 'valid'):
        folder(tmp_path/'two'/name)
    with pytest.raises(AgftError, match="2 folders for the split 'val'"):
        load_task(str(tmp_path/'two'))
    for name in ('train', 'Test'):
        folder(tmp_path/'capital'/name)
    with pytest.raises(AgftError, match="the folder 'Test'.* small letters"):
        load_task(str(tmp_path/'capital'))
    put(tmp_path/'flat/test/x.png', encoded('PNG'))
    folder(tmp_path/'flat/train')
    with pytest.raises(AgftError, match='different class folders'):
        load_task(str(tmp_path/'flat'), split='train')
    folder(tmp_path/'beside/test')
    folder(tmp_path/'beside', classes=('extra',))
    with pytest.warns(UserWarning, match='beside the splits are left out: extra'):
        assert 'extra' in load_task(str(tmp_path/'beside'), size=16).note


@pytest.mark.parametrize('name', ['train', 'test', 'valid', 'Train', '__init__'])
def test_a_class_may_have_the_name_of_a_split(name, tmp_path):
    task = load_task(str(folder(tmp_path, classes=('bus', 'plane', name))), size=16)
    assert len(task) == 9 and name.replace('_', ' ') in task.classes


# ---- the depth of a pixel

RAMP = np.linspace(0, 1, 1024).reshape(32, 32)

def pixels_of(array, form='TIFF', **options):
    return registry.decode(encoded(form, Image.fromarray(array), **options), 32)[0].astype(int)


def test_deep_images_become_the_same_ramp():
    expected = (255*RAMP).round()
    words = (65535*RAMP).round()
    inverted = pixels_of((65535 - words).astype(np.uint16), tiffinfo={262: 0})       # white is zero
    assert np.abs(inverted - expected).max() <= 1
    for array, form in ((words.astype('>u2'), 'TIFF'), (words.astype(np.uint16), 'PNG'),
                        (RAMP.astype(np.float32), 'TIFF'), (words.astype(np.int32), 'TIFF')):
        assert np.abs(pixels_of(array, form) - expected).max() <= 1, (array.dtype, form)
    grey = b'P5 32 32 4095\n' + (4095*RAMP).round().astype('>u2').tobytes()  # its header says 12 bits
    assert np.abs(registry.decode(grey)[0] - expected).max() <= 1


def twelve_bits(values):
    "A TIFF of 12 bits a pixel, two pixels in three bytes."
    a, b = values[0::2], values[1::2]
    data = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()
    tags = {256: 32, 257: 32, 258: 12, 259: 1, 262: 1, 273: 134, 277: 1, 278: 32, 279: len(data)}
    entries = b''.join(struct.pack('<HHIHH', tag, 3, 1, value, 0) for tag, value in tags.items())
    head = struct.pack('<2sHIH', b'II', 42, 8, len(tags)) + entries + b'\0'*4
    return head + b'\0'*(134 - len(head)) + data


def test_a_tiff_of_12_bits_is_scaled_by_its_own_white():
    found = registry.decode(twelve_bits((4095*RAMP).round().astype(int).ravel()))[0]
    assert np.abs(found - (255*RAMP).round()).max() <= 1


@pytest.mark.parametrize('array', [
    255*RAMP.astype(np.float32), RAMP.astype(np.float32) - .1, np.full((9, 9), np.nan, np.float32),
    (4095*RAMP).astype(np.uint16), (RAMP*2e9).astype(np.int32), (RAMP*100 - 50).astype(np.int32)])
def test_values_whose_white_is_not_known_are_refused(array, tmp_path):
    put(folder(tmp_path)/'cat/deep.tif', encoded('TIFF', Image.fromarray(array)))
    task = load_task(str(tmp_path), size=16)
    with pytest.raises(AgftError, match=r'deep.tif does not decode: values in \[.*\]; allowed: '):
        task.images[:]


# ---- damaged files

def sources():
    "Small files of every format."
    for form in ('JPEG', 'PNG', 'BMP', 'WEBP', 'TIFF', 'PPM', 'GIF', 'AVIF', 'JPEG2000'):
        yield form, encoded(form)
    yield 'deep TIFF', encoded('TIFF', Image.fromarray((65535*RAMP).astype(np.uint16)))
    yield 'LZW TIFF', encoded('TIFF', compression='tiff_lzw')
    yield 'palette PNG', encoded('PNG', Image.fromarray(PIXELS).quantize(9))
    yield 'CMYK JPEG', encoded('JPEG', Image.fromarray(PIXELS).convert('CMYK'))

SOURCES = dict(sources())

def damage(blob, seed):
    "Flip, overwrite, repeat or cut bytes, more often in the head, where the structure is."
    rng, blob = random.Random(seed), bytearray(blob)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not blob:
            break
        at = rng.randrange(min(len(blob), rng.choice((40, 200, len(blob)))))
        action = rng.randrange(5)
        if action == 0:
            blob[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            blob[at:at + 4] = rng.choice((b'\0'*4, b'\xff'*4, rng.randbytes(4)))
        elif action == 2:
            blob[at:at] = blob[at:at + rng.randrange(1, 30)]
        elif action == 3:
            del blob[at:at + rng.randrange(1, 30)]
        elif len(blob) > at + 1:
            del blob[at + 1:]
    return bytes(blob)


def outcome(read):
    "Whether a damaged file is refused; anything but an `AgftError` of one line is a fault."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            read()
        except AgftError as e:
            assert '\n' not in str(e)
            return 'refused'
    return 'read'


@settings(max_examples=int(os.environ.get('AGFT_FUZZ', 150)), deadline=None, derandomize=True, database=None)
@given(kind=st.sampled_from([*SOURCES]), seed=st.integers(0, 10**9))
def test_a_damaged_image_is_read_or_refused_in_one_line(kind, seed):
    with tempfile.NamedTemporaryFile() as f:
        f.write(damage(SOURCES[kind], seed))
        f.flush()
        outcome(lambda: registry.Listing([f.name], [0]).decode(0, 16))


def test_errors_of_every_class_become_one_line(tmp_path, monkeypatch):
    "Pillow's readers raise more classes than it documents."
    task = load_task(str(folder(tmp_path)), size=16)
    for error in (KeyError(282), TypeError('no'), struct.error('bad'), AssertionError(), MemoryError(),
                  ZeroDivisionError('x'), RecursionError('deep'), IndexError('range'), EOFError()):
        def broken(*args, error=error, **options): raise error
        monkeypatch.setattr(Image, 'open', broken)
        with pytest.raises(AgftError, match=f'cat/0.png does not decode: .*{type(error).__name__}'):
            task.images[:1]


def cifar10(root):
    at = root/'cifar-10-batches-py/test_batch'
    put(at, pickle.dumps({b'data': np.zeros((10, 3072), np.uint8), b'labels': [*range(10)]}, protocol=2))
    return at, 'cifar10'

def stl10(root):
    put(root/'stl10_binary/test_X.bin', bytes(3*96*96*10))
    return put(root/'stl10_binary/test_y.bin', bytes(range(1, 11))), 'stl10'

def flowers(root):
    from scipy.io import savemat
    at = root/'flowers-102'
    for i in range(1, 103):
        put(at/f'jpg/image_{i:05}.jpg', b'')
    savemat(at/'setid.mat', dict(tstid=[[*range(1, 103)]]))
    savemat(at/'imagelabels.mat', dict(labels=[[*range(1, 103)]]))
    return at/'imagelabels.mat', 'flowers102'

def shards(root):
    at = root/'wds/dtd/test/0.tar'
    write_shard(at, encoded('PNG'))
    return at, 'dtd'

def write_shard(at, image):
    "An archive with one image three times."
    tar(at, [(f'{i}.{end}', data) for i in range(3) for end, data in (('png', image), ('cls', b'1'))])

def tiny_pack(root):
    at = root/'packs/cifar10-test'
    cifar10(root)
    pack(root, 'cifar10')
    return at, 'cifar10'

def pcam(root):
    h5py = pytest.importorskip('h5py')
    (root/'pcam').mkdir(parents=True)
    for key, array in dict(x=np.zeros((2, 96, 96, 3), np.uint8), y=np.arange(2).reshape(2, 1, 1, 1)).items():
        with h5py.File(root/f'pcam/camelyonpatch_level_2_split_test_{key}.h5', 'w') as f:
            f[key] = array
    return root/'pcam/camelyonpatch_level_2_split_test_x.h5', 'pcam'

LAYOUTS = dict(cifar10=(cifar10, ''), stl10=(stl10, ''), flowers=(flowers, ''), shards=(shards, ''),
               pcam=(pcam, ''), pack_json=(tiny_pack, 'pack.json'), pack_labels=(tiny_pack, 'labels.npy'),
               pack_pixels=(tiny_pack, 'images.npy'))

@pytest.mark.parametrize('kind', LAYOUTS)
def test_damaged_files_of_data_sets_are_read_or_refused_in_one_line(kind, tmp_path):
    make, inside = LAYOUTS[kind]
    at, name = make(tmp_path)
    at = at/inside
    whole, seen = at.read_bytes(), set()
    crashes = 1, 70  # SciPy's reader of MATLAB files ends the process on one of them
    for seed in crashes if kind == 'flowers' else range(int(os.environ.get('AGFT_FUZZ', 800))//20):
        at.write_bytes(damage(whole, seed))
        seen.add(outcome(lambda: open_images(tmp_path, name)[0].digest()))
    assert 'refused' in seen
    at.write_bytes(whole)
    assert outcome(lambda: open_images(tmp_path, name)) == 'read'


@pytest.mark.parametrize('part', ['images.npy', 'labels.npy'])
def test_one_flipped_bit_of_a_pack_is_found(part, tmp_path):
    at, name = tiny_pack(tmp_path)
    blob = bytearray((at/part).read_bytes())
    blob[-3] ^= 1
    (at/part).write_bytes(blob)
    with pytest.raises(AgftError, match=f'{name}-test.*(damaged|truncated)'):
        open_pack(tmp_path, name)


# ---- places that cannot be read

def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    folder(tmp_path/'mine')
    with pytest.raises(AgftError, match='File name too long'):
        load_task('n'*300)
    with pytest.raises(AgftError, match='unknown task'):
        load_task(str(tmp_path/'mine/cat/0.png/deeper'))
    for name in (None, 3, 'a\0b'):
        with pytest.raises(AgftError, match='unknown task|task is'):
            load_task(name)  # pyright: ignore[reportArgumentType]
    with pytest.raises(AgftError, match='no folder'):
        pack('n'*300, 'eurosat')
    assert outcome(lambda: data_report('n'*300, ['eurosat'])) == 'read'          # a row with the fault
    def closed(path): raise PermissionError(13, 'Permission denied', os.fspath(path))
    monkeypatch.setattr(os, 'scandir', closed)
    with pytest.raises(AgftError, match='mine.* cannot be read: Permission denied'):
        load_task(str(tmp_path/'mine'))


def test_names_that_are_not_utf8_are_refused(tmp_path):
    folder(tmp_path/'mine')
    latin = os.fsdecode(b'\xe9t\xe9')
    os.rename(tmp_path/'mine', tmp_path/latin)
    with pytest.raises(AgftError, match='task name .*UTF-8'):
        load_task(str(tmp_path/latin))
    os.rename(tmp_path/latin, tmp_path/'mine')
    os.rename(tmp_path/'mine/cat', tmp_path/'mine'/latin)
    with pytest.raises(AgftError, match='class name 1 is .*UTF-8'):
        load_task(str(tmp_path/'mine'), size=16)
    long = 'm'*220
    folder(tmp_path/long)
    with pytest.raises(AgftError, match='has 220 bytes; allowed: at most 200'):
        load_task(str(tmp_path/long))


def test_numbers_of_images_and_pixels_that_cannot_be(tmp_path):
    mine = str(folder(tmp_path))
    for name in ('digits', 'source', mine):
        for n in (10**12, -1, 0, 1.5, '3'):
            with pytest.raises(AgftError, match='images asked for; allowed'):
                load_task(name, n)  # pyright: ignore[reportArgumentType]
    for size in (0, -1, 10**9, 3.5):
        with pytest.raises(AgftError, match='size is .* pixels'):
            load_task(mine, size=size)  # pyright: ignore[reportArgumentType]


# ---- links, devices, bombs

def test_a_pipe_a_device_and_a_broken_link_are_refused_and_not_waited_for(tmp_path):
    for i, make in enumerate((os.mkfifo, partial(os.symlink, '/dev/zero'), partial(os.symlink, 'nowhere'))):
        mine = folder(tmp_path/str(i))
        make(mine/'cat/x.png')
        with pytest.raises(AgftError, match=r'cat/x.png.* is a broken link, a device or a pipe'):
            load_task(str(mine), size=16)
    mine = folder(tmp_path/'later')
    task = load_task(str(mine), size=16)
    (mine/'cat/0.png').unlink()
    os.mkfifo(mine/'cat/0.png')
    with pytest.raises(AgftError, match='is a device, a pipe or a folder'):
        task.images[:]


def test_a_link_to_an_image_is_read_and_its_target_identified(tmp_path):
    mine = folder(tmp_path/'mine')
    target = put(tmp_path/'elsewhere/a.png', encoded('PNG'))
    (mine/'cat/9.png').symlink_to(target)
    before = load_task(str(mine), size=16).digest()
    put(target, encoded('PNG', Image.new('RGB', (9, 9))))
    assert load_task(str(mine), size=16).digest() != before


def png_of(width, height):
    "A small PNG file that claims a size: its rows are missing."
    blob = bytearray(encoded('PNG', Image.new('L', (8, 8))))
    blob[16:24] = struct.pack('>II', width, height)
    blob[29:33] = struct.pack('>I', zlib.crc32(bytes(blob[12:29])))
    return bytes(blob)


@pytest.mark.filterwarnings('ignore:Image size')
@pytest.mark.parametrize('width, height', [(13000, 13000), (60000, 60000), (2**31 - 1, 1), (9500, 9500)])
def test_images_that_claim_to_be_huge_are_refused(width, height, tmp_path):
    put(folder(tmp_path)/'cat/bomb.png', png_of(width, height))
    with pytest.raises(AgftError, match='bomb.png does not decode: .*(bomb|pixels|size)'):
        load_task(str(tmp_path), size=16).images[:]


def test_a_sparse_file_of_gigabytes_is_not_read(tmp_path):
    mine = folder(tmp_path)
    with open(mine/'cat/huge.jpg', 'wb') as f:
        f.truncate(2**40)
    task = load_task(str(mine), size=16)
    for read in (lambda: task.images[:], task.digest):
        with pytest.raises(AgftError, match='huge.jpg: an image of 1099511627776 bytes; allowed'):
            read()


def test_formats_that_start_other_programs_are_not_opened(tmp_path):
    script = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n'
    put(folder(tmp_path)/'cat/x.png', script)
    with pytest.raises(AgftError, match='x.png does not decode: cannot identify'):
        load_task(str(tmp_path), size=16).images[:]


# ---- archives

def tar(path, members):
    "An archive of (name, bytes) or of `TarInfo` objects."
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))


def special(name, kind, link=''):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info

GOOD = [('a.png', encoded('PNG')), ('a.cls', b'0')]

@pytest.mark.parametrize('members, words', [
    ([*GOOD, ('a.png', encoded('PNG'))], "'a' stands twice"),
    ([*GOOD, ('a.jpg', encoded('JPEG'))], "'a' stands twice"),
    ([*GOOD, ('a.cls', b'1')], "'a' stands twice"),
    ([*GOOD, ('b.png', encoded('PNG'))], '2 images and 1 labels'),
    ([*GOOD, special('b.png', tarfile.SYMTYPE, '/etc/passwd')], "'b.png' is a link, a device"),
    ([*GOOD, special('b.png', tarfile.LNKTYPE, 'a.png')], "'b.png' is a link, a device"),
    ([*GOOD, special('b.png', tarfile.CHRTYPE)], "'b.png' is a link, a device"),
    ([*GOOD, special('b.cls', tarfile.FIFOTYPE)], "'b.cls' is a link, a device"),
    ([('a.png', encoded('PNG')), ('a.cls', b'1'*5000)], 'has 5000 bytes'),
    ([('a.png', encoded('PNG')), ('a.cls', b'one')], 'cannot be read'),
])
def test_archives_that_lose_or_fake_a_sample_are_refused(members, words, tmp_path):
    tar(tmp_path/'wds/dtd/test/0.tar', members)
    with pytest.raises(AgftError, match=words):
        listing(tmp_path, 'dtd')


def test_archives_may_hold_folders_and_texts_and_new_formats(tmp_path):
    members = [special('more', tarfile.DIRTYPE), *GOOD, ('a.json', b'{}'), ('b.avif', encoded('AVIF')),
               ('b.cls', b'3')]
    tar(tmp_path/'wds/dtd/test/0.tar', members)
    x, y = open_images(tmp_path, 'dtd')
    assert y.tolist() == [0, 3] and x[:].shape == (2, 3, 224, 224)


def hostile_tar(path, kind):
    kinds = dict(slip=('../evil.jpg', b'x'), absolute=('/tmp/agft-evil.jpg', b'x'),
                 link=special('out', tarfile.SYMTYPE, '../..'), device=special('null', tarfile.CHRTYPE),
                 hard=special('hard', tarfile.LNKTYPE, '../secret'))
    tar(path, [kinds[kind]])
    return path


def hostile_zip(path, kind):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr(dict(slip='../evil.jpg', absolute='/tmp/agft-evil.jpg')[kind], b'x')
    return path


@pytest.mark.parametrize('make, kind', [
    *((hostile_tar, kind) for kind in ('slip', 'absolute', 'link', 'device', 'hard')),
    *((hostile_zip, kind) for kind in ('slip', 'absolute'))])
def test_downloaded_archives_write_inside_the_data_folder_only(make, kind, tmp_path, monkeypatch):
    root = tmp_path/'data'
    put(tmp_path/'secret', b'secret')
    class EuroSAT:
        def __init__(self, at, download):
            archive = make(tmp_path/f'a.{"zip" if make is hostile_zip else "tar"}', kind)
            torchvision.datasets.utils.extract_archive(str(archive), f'{at}/eurosat')
    monkeypatch.setattr(torchvision.datasets, 'EuroSAT', EuroSAT)
    with pytest.raises(AgftError, match='eurosat'):
        fetch(root, 'eurosat')
    assert not os.path.exists('/tmp/agft-evil.jpg') and not (root/'evil.jpg').exists()
    assert {path.name for path in tmp_path.iterdir()} <= {'data', 'secret', 'a.zip', 'a.tar'}
    links = [path for path in root.rglob('*') if path.is_symlink()]
    assert not links and (tmp_path/'secret').stat().st_nlink == 1
    assert tarfile.TarFile.extraction_filter is None


def test_packs_and_locks_are_not_written_through_links(tmp_path):
    root, victim = eurosat(tmp_path/'data'), put(tmp_path/'home/notes.txt', b'mine')
    (root/'packs').symlink_to(tmp_path/'home')
    with pytest.raises(AgftError, match='packs.* leads out of'):
        pack(root, 'eurosat')
    (root/'packs').unlink()
    (root/'packs').mkdir()
    (root/'packs/.eurosat-test.lock').symlink_to(victim)
    with pytest.raises(AgftError, match='lock is a link'):
        pack(root, 'eurosat')
    (root/'packs/.eurosat-test.lock').unlink()
    (root/'packs/.eurosat-test').symlink_to(tmp_path/'home')
    with pytest.raises(AgftError, match='eurosat-test is a link'):
        pack(root, 'eurosat')
    (root/'.eurosat.lock').symlink_to(victim)
    with pytest.raises(AgftError, match='eurosat.lock is a link'):
        fetch(root, 'eurosat')
    assert victim.read_bytes() == b'mine' and [*victim.parent.iterdir()] == [victim]


def test_lists_of_files_name_files_of_the_data_set_only(tmp_path):
    secret = put(tmp_path/'secret/abbey.jpg', encoded('JPEG'))
    for name in ('../../../secret/abbey.jpg', str(secret)):
        put(tmp_path/'data/dtd/dtd/labels/test1.txt', f'banded/{name}\n'.encode())
        (tmp_path/'data/dtd/dtd/images/banded').mkdir(parents=True, exist_ok=True)
        with pytest.raises(AgftError, match='dtd'):
            open_images(tmp_path/'data', 'dtd')[0][:]


class Evil:
    "A pickle that writes a file when it is loaded."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, 'w')


def test_no_pickle_is_run(tmp_path):
    ran = tmp_path/'ran'
    at, name = tiny_pack(tmp_path)
    for file in ('labels.npy', 'images.npy'):
        whole = (at/file).read_bytes()
        np.save(at/file, np.array([Evil(ran)], object), allow_pickle=True)
        with pytest.raises(AgftError, match='pack .* cannot be read'):
            open_pack(tmp_path, name)
        (at/file).write_bytes(whole)
    put(tmp_path/'cifar-100-python/test', pickle.dumps({b'data': Evil(ran), b'fine_labels': []}))
    with pytest.raises(AgftError, match='a pickle asks for'):
        listing(tmp_path, 'cifar100')
    blob, offsets, labels = np.zeros(1, np.uint8), np.array([0, 1]), np.array([Evil(ran)], object)
    np.savez(tmp_path/'own.npz', blob=blob, offsets=offsets, labels=labels)
    put(tmp_path/'own.json', b'{"classes": ["a", "b"]}')
    with pytest.raises(AgftError, match="'own' cannot be read"):
        read_archive('own', folder=tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize('change', [dict(offsets=np.array([0., 9])), dict(labels=np.array([.5])),
                                    dict(offsets=np.array([1, 9])), dict(blob=np.zeros((3, 3), np.uint8))])
def test_photograph_archives_of_other_arrays_are_refused(change, tmp_path):
    arrays = dict(blob=np.zeros(9, np.uint8), offsets=np.array([0, 9]), labels=np.array([0]))
    np.savez(tmp_path/'own.npz', **arrays | change)  # pyright: ignore[reportArgumentType]
    put(tmp_path/'own.json', b'{"classes": ["a", "b"]}')
    with pytest.raises(AgftError, match="photograph archive 'own'(: offsets do not fit| holds other arrays)"):
        read_archive('own', folder=tmp_path)
    np.savez(tmp_path/'own.npz', **arrays)  # pyright: ignore[reportArgumentType]
    for classes in (b'{"classes": "ab"}', b'[]', b'{"classes": 3}'):
        put(tmp_path/'own.json', classes)
        with pytest.raises(AgftError, match="photograph archive 'own'"):
            read_archive('own', folder=tmp_path)


# ---- processes

def _first(images, queue): queue.put(int(images[0].sum()))

def test_images_that_were_read_before_a_fork_can_be_read_after_it(tmp_path):
    task = load_task(str(folder(tmp_path)), size=16)
    here = int(task.images[0].sum())
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    child = context.Process(target=_first, args=(task.images, queue), daemon=True)
    child.start()
    assert queue.get(timeout=30) == here
    child.join(30)


# ---- identity

def test_the_digest_sees_images_that_were_replaced_under_the_same_names(tmp_path):
    mine = folder(tmp_path/'mine')
    before = load_task(str(mine), size=16)
    digest = before.digest()
    assert load_task(str(mine), size=16).digest() == digest != load_task(str(mine), size=8).digest()
    os.rename(mine, tmp_path/'moved')
    assert load_task(str(tmp_path/'moved'), size=16).digest() == digest
    a, b = tmp_path/'moved/cat/1.png', tmp_path/'moved/dog/1.png'
    first, second = a.read_bytes(), b.read_bytes()
    put(a, second)
    put(b, first)
    assert load_task(str(tmp_path/'moved'), size=16).digest() != digest


def test_the_digest_of_many_images_is_sampled_and_sees_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, '_WHOLE', 10)
    monkeypatch.setattr(registry, '_SAMPLED', 2)
    mine = folder(tmp_path, 5)
    def digest(): return load_task(str(mine), size=16).digest()
    last, middle = mine/'dog/4.png', mine/'cat/3.png'
    before, status = digest(), last.stat()
    blob = last.read_bytes()
    put(last, blob[:-1] + b'x')
    os.utime(last, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest() != before                                   # a sampled image with another content
    put(last, blob)
    os.utime(last, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest() == before
    status = middle.stat()
    os.utime(middle, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert digest() != before                                   # another time of change
    os.utime(middle, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest() == before
    with open(middle, 'ab') as f:
        f.write(b'x')
    os.utime(middle, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest() != before                                   # another size


@pytest.mark.parametrize('make', [cifar10, shards, tiny_pack])
def test_the_digest_of_data_sets_sees_other_images(make, tmp_path):
    def digest(root):
        images, _ = open_images(root, name)
        return images.digest(), images.index_select(0, torch.tensor([1])).digest()
    _, name = make(tmp_path/'a')
    make(tmp_path/'b')
    assert digest(tmp_path/'a') == digest(tmp_path/'b')
    assert len({*digest(tmp_path/'a')}) == 2
    if make is shards:
        write_shard(tmp_path/'b/wds/dtd/test/0.tar', encoded('PNG', Image.new('RGB', (9, 9))))
    else:
        data = {b'data': np.ones((10, 3072), np.uint8), b'labels': [*range(10)]}
        put(tmp_path/'b/cifar-10-batches-py/test_batch', pickle.dumps(data, protocol=2))
        if make is tiny_pack:
            for file in (tmp_path/'b/packs/cifar10-test').iterdir():
                file.unlink()
            (tmp_path/'b/packs/cifar10-test').rmdir()
            pack(tmp_path/'b', 'cifar10')
    assert not {*digest(tmp_path/'a')} & {*digest(tmp_path/'b')}


def test_every_data_set_that_reads_files_has_a_digest_of_its_files(tmp_path):
    images, _ = open_images(eurosat(tmp_path), 'eurosat')
    assert isinstance(images, Images) and images.identify is not None
    before = images.digest()
    put(tmp_path/'eurosat/2750/River/River_1.jpg', encoded('JPEG', quality=50))
    assert images.digest() != before and DATA_SETS['eurosat'].size == 224


def test_tasks_of_one_name_are_told_apart_or_refused(tmp_path, monkeypatch):
    for place in ('x/a/pets', 'x/b/pets', 'y/a/pets', 'z/digits'):
        folder(tmp_path/place)
    names = [str(tmp_path/place) for place in ('x/a/pets', 'x/b/pets', 'y/a/pets')]
    assert [task.name for task in load_tasks(names, size=16)] == ['x-a-pets', 'b-pets', 'y-a-pets']
    both = load_tasks(['digits', str(tmp_path/'z/digits')], 4, size=16)
    assert len({task.name for task in both}) == 2 and both[0].name == 'digits'
    monkeypatch.chdir(tmp_path/'z')
    with pytest.warns(UserWarning, match='write ./digits for the folder'):
        assert load_task('digits', 4).classes[0] == 'zero'
    assert load_task('./digits', size=16).classes == ('cat', 'dog')
    from agft import evaluate
    same = [Task.from_tensors('pets', torch.zeros(2, 3, 8, 8), [0, 1], ['cat', 'dog']) for _ in range(2)]
    with pytest.raises(AgftError, match='several tasks are called pets'):
        evaluate('agft-tiny', same, 'fgsm')


# ---- the command line

def main(*args):
    "The command line, imported when a test needs it."
    from agft.cli import main
    return main([*args])


@pytest.mark.filterwarnings('ignore:.*left out')
def test_results_say_what_was_left_out_and_which_folder_is_the_source(tmp_path, monkeypatch, capsys):
    from agft.results import Results
    monkeypatch.chdir(tmp_path)
    folder(tmp_path/'mine')
    put(tmp_path/'mine/cat/x.heic', b'')
    folder(tmp_path/'other')
    data = dict(source='./mine', zero_shot=['other'], size=32, prompts=['a {}'])
    put(tmp_path/'own.json', json.dumps(dict(base='tiny', data=data)).encode())
    options = ['--preset', 'own.json', '--attacks', 'fgsm', '--n', '4', '--out', 'out']
    assert main('eval', 'agft-tiny', *options) == 0
    assert "mine: 1 files are left out: 1 of the kind .heic ('cat/x.heic')" in capsys.readouterr().out
    rows = Results.load('out/results.json').accuracy
    assert dict(zip(rows.task, rows.role, strict=True))['mine'] == 'source'
    folder(tmp_path/'mine', n=4)                                   # one image more in each class
    put(tmp_path/'mine/cat/0.png', encoded('PNG'))
    assert main('eval', 'agft-tiny', *options) == 2
    assert 'tasks.mine' in capsys.readouterr().err


@pytest.mark.parametrize('what', ['check', 'pack'])
def test_data_commands_on_folders_that_are_none_or_broken_exit_with_2(what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    eurosat(tmp_path/'packed')
    put(tmp_path/'a-file', b'')
    for place in ('ok', 'packed there', 'absent', 'a-file', 'x'*300):
        assert main('data', what, place, '--sets', 'eurosat') == 2
        assert f'{place!r} is no folder' in capsys.readouterr().err
    for name in ('ok', 'packed', 'absent', 'there'):
        (tmp_path/name).mkdir(exist_ok=True)
        assert main('data', what, name, '--sets', 'dtd') == 2
        assert capsys.readouterr().err.strip().endswith('are not ready: dtd')
    put(tmp_path/'packed/eurosat/2750/River/River_1.jpg', b'not an image')
    assert main('data', what, 'packed', '--sets', 'eurosat') == 2
    put(tmp_path/'packed/eurosat/2750/River/River_1.jpg', encoded('JPEG'))
    assert main('data', what, 'packed', '--sets', 'eurosat') == 0
