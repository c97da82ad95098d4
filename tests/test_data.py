"Tasks from tensors, torch data sets, Hugging Face data sets and names; optional labels; held-out images."
import hashlib
import json
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from agft.config import DataConfig
from agft.core import AgftError, seeded
from agft.data import Task, held_out, load_task, load_tasks, task_of
from agft.registry import Images

PIXELS = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=seeded(0, 'test data'))
LABELS = [0, 1, 2]*4
NAMES = ('red fox', 'dog', 'gnu')


def photo(i): return Image.fromarray(PIXELS[i].permute(1, 2, 0).numpy())


def pixels_of(task):
    "The images of a task that holds them as a tensor."
    assert isinstance(task.images, torch.Tensor)
    return task.images


def labels_of(task): return task.require_labels().tolist()


class Photos(Dataset):
    "A torch data set of PIL images that counts what is read; `wide` makes the sizes differ."
    classes = ('red_fox', 'dog', 'gnu')
    targets:list[int]           # one test sets them
    target_transform:Callable   # and this
    def __init__(self, wide=False, form='PIL'):
        self.wide, self.form, self.reads = wide, form, 0
    def __len__(self): return len(PIXELS)
    def __getitem__(self, i):
        self.reads += 1
        if self.form == 'uint8':
            return PIXELS[i], LABELS[i]
        if self.form == 'float':
            return PIXELS[i]/255, torch.tensor(LABELS[i])
        if self.form == 'array':
            return PIXELS[i].permute(1, 2, 0).numpy(), np.int64(LABELS[i])
        return photo(i).resize((16 + i*self.wide, 16)), LABELS[i]


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_float_images_that_came_from_uint8_come_back_unchanged(dtype):
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    task = Task.from_tensors('ramp', (every.double()/255).to(dtype), None, NAMES)
    assert pixels_of(task).equal(every.expand(1, 3, 16, 16))


def test_tensors_give_the_task_that_the_class_gives():
    made = Task.from_tensors('noise', PIXELS, LABELS, NAMES, ['a {}'])
    direct = Task('noise', PIXELS, torch.tensor(LABELS), NAMES, ('a {}',))
    assert made.digest() == direct.digest()
    assert pixels_of(made).equal(pixels_of(direct))
    assert made.require_labels().equal(direct.require_labels())
    for labels in (torch.tensor(LABELS, dtype=torch.uint8), np.array(LABELS, np.int32), tuple(LABELS)):
        task = Task.from_tensors('noise', PIXELS, labels, NAMES)
        assert task.require_labels().equal(direct.require_labels())


@pytest.mark.parametrize('images, labels, classes, words', [
    (PIXELS.float(), LABELS, NAMES, r'values in \[0, 255\]; allowed: 0 to 1'),
    (PIXELS/255 - 1, LABELS, NAMES, r'values in \[-1, 0\]'),
    (PIXELS.int(), LABELS, NAMES, 'dtype torch.int32; allowed: uint8, or float'),
    (PIXELS[0], [0], NAMES, r'shape \(3, 16, 16\); allowed: \(N,3,H,W\)'),
    (PIXELS, LABELS[1:], NAMES, '12 images and 11 labels'),
    (PIXELS, [3]*12, NAMES, r'range over \[3, 3\]; allowed: 0 to 2'),
    (PIXELS, [1.]*12, NAMES, 'allowed: whole numbers'),
    (PIXELS, [LABELS], NAMES, 'allowed: whole numbers of shape'),
    (PIXELS, LABELS, 'abc', "class names are 'abc'; allowed: a list of texts"),
])
def test_tensors_that_are_no_task_are_refused_in_one_line(images, labels, classes, words):
    with pytest.raises(AgftError, match=words) as e:
        Task.from_tensors('noise', images, labels, classes)
    assert '\n' not in str(e.value) and 'noise' in str(e.value) or 'class names' in str(e.value)


@pytest.mark.parametrize('form', ['PIL', 'uint8', 'float', 'array'])
def test_torch_data_set_of_one_size_is_kept_as_it_is(form):
    task = Task.from_dataset('photos', Photos(form=form))
    assert pixels_of(task).equal(PIXELS)
    assert labels_of(task) == LABELS and task.classes == NAMES
    assert task.templates == ('a photo of a {}.',)


@pytest.mark.parametrize('form', ['PIL', 'uint8', 'float', 'array'])
def test_torch_data_set_with_a_size_is_read_when_needed(form):
    source = Photos(form=form)
    task = Task.from_dataset('photos', source, size=8)
    before = source.reads
    part = task.choose(torch.tensor([5, 3]))
    assert source.reads == before and isinstance(part.images, Images) and labels_of(part) == [2, 0]
    assert part.images[:].shape == (2, 3, 8, 8) and source.reads == before + 2
    assert part.images[:].equal(Task.from_dataset('photos', Photos(), size=8).images[torch.tensor([5, 3])])


def test_images_of_several_sizes_are_brought_to_224_or_to_the_size_that_is_given():
    task = Task.from_dataset('photos', Photos(wide=True))
    assert isinstance(task.images, Images) and task.images[:2].shape == (2, 3, 224, 224)
    small = Task.from_dataset('photos', Photos(wide=True), size=16)
    assert small.images[0].equal(PIXELS[0]) and small.images[-1].shape == (3, 16, 16)
    again = pickle.loads(pickle.dumps(small))              # tasks travel to other processes
    assert again.images[:].equal(small.images[:])


def test_targets_are_used_if_they_agree_with_the_items():
    source = Photos()
    source.targets = list(LABELS)
    def labels(): return labels_of(Task.from_dataset('photos', source, size=8))
    assert labels() == LABELS and source.reads == 2
    source.targets = [2 - label for label in LABELS]       # what the data set holds is not what its items say
    assert labels() == LABELS
    source.targets, source.target_transform = list(LABELS), abs
    source.reads = 0
    assert labels() == LABELS
    assert source.reads == len(source)


def test_parts_of_torch_data_sets_know_their_classes():
    part = Task.from_dataset('part', Subset(Subset(Photos(), [3, 5, 7]), [2, 0]))
    assert part.classes == NAMES and pixels_of(part).equal(PIXELS[[7, 3]]) and labels_of(part) == [1, 0]
    pairs = TensorDataset(PIXELS/255, torch.tensor(LABELS))
    assert Task.from_dataset('pairs', pairs, NAMES, ['a {}']).digest() == Task.from_tensors(
        'pairs', PIXELS, LABELS, NAMES, ['a {}']).digest()


class Faulty(Photos):
    "One item is not what it should be."
    def __init__(self, item):
        super().__init__()
        self.item = item
    def __getitem__(self, i):
        if i != 7:
            return super().__getitem__(i)
        if isinstance(self.item, Exception):
            raise self.item
        return self.item

@pytest.mark.parametrize('item, words', [
    (OSError('cannot identify image file <_io.BytesIO object at 0x7f>'), 'image 7 does not decode: .* file$'),
    ((photo(7), 'dog'), "label 7 is 'dog'; allowed: a whole number"),
    ((photo(7), 1.5), 'label 7 is 1.5'),
    ((photo(7), None), '1 of 12 items have no label'),
    (('dog.jpg', 1), 'image 7 is a str; allowed: a PIL image'),
    ((PIXELS[7]/99, 1), 'image 7: pixels have values in .*normalisation'),
    ((PIXELS[7, 0], 1), r'image 7 has shape \(16, 16\)'),
    ((photo(7), 3), r'range over \[0, 3\]; allowed: 0 to 2'),
])
def test_an_item_that_cannot_be_used_is_named(item, words):
    with pytest.raises(AgftError, match=words) as e:
        Task.from_dataset('faulty', Faulty(item))
    assert str(e.value).startswith('faulty') and '\n' not in str(e.value)


def test_data_sets_without_labels_make_tasks_without_labels():
    class Bare(Photos):
        def __getitem__(self, i): return super().__getitem__(i)[0]
    task = Task.from_dataset('bare', Bare())
    assert task.labels is None and task.subset(3, 1).labels is None and len(task.subset(3)) == 3
    labelled = Task.from_dataset('photos', Photos())
    assert pixels_of(task.subset(5, 2)).equal(pixels_of(labelled.subset(5, 2)))
    with pytest.raises(AgftError, match='bare has no labels; an evaluation'):
        task.require_labels()
    assert task.digest() != task.subset(4).digest()        # the number of images belongs to the question


def test_hugging_face_data_set():
    datasets = pytest.importorskip('datasets')
    label = datasets.ClassLabel(names=['red_fox', 'dog', 'gnu'])
    columns = dict(img=[photo(i) for i in range(12)], fine_label=LABELS, coarse_label=[0]*12)
    features = datasets.Features(img=datasets.Image(), fine_label=label, coarse_label=datasets.Value('int64'))
    table = datasets.Dataset.from_dict(columns, features)
    task = Task.from_dataset('table', table)
    assert pixels_of(task).equal(PIXELS) and labels_of(task) == LABELS and task.classes == NAMES
    shuffled = table.shuffle(seed=1).select(range(6))
    lazy = Task.from_dataset('table', shuffled, size=8)
    known, rows = PIXELS.tolist(), pixels_of(Task.from_dataset('table', shuffled)).tolist()
    order = [known.index(row) for row in rows]
    assert labels_of(lazy) == [LABELS[i] for i in order] and lazy.images[:].shape == (6, 3, 8, 8)
    assert pickle.loads(pickle.dumps(lazy)).images[:].equal(lazy.images[:])
    tensors = Task.from_dataset('table', table.with_format('torch'))
    assert pixels_of(tensors).equal(PIXELS) and labels_of(tensors) == LABELS
    bare = table.remove_columns(['fine_label', 'coarse_label'])
    assert Task.from_dataset('bare', bare, NAMES).labels is None
    with pytest.raises(AgftError, match='bare: the data set has no class names'):
        Task.from_dataset('bare', bare)
    with pytest.raises(AgftError, match='columns fine_label, coarse_label; allowed: image or img'):
        Task.from_dataset('table', table.remove_columns('img'))
    with pytest.raises(AgftError, match='several splits; choose one of train, test'):
        Task.from_dataset('table', datasets.DatasetDict(train=table, test=table))
    with pytest.raises(AgftError, match='no length or no items'):
        Task.from_dataset('table', table.to_iterable_dataset())
    texts = bare.add_column('label', ['dog']*12)
    with pytest.raises(AgftError, match='column label holds .*class numbers'):
        Task.from_dataset('texts', texts, NAMES)


@pytest.mark.parametrize('n', [3, 10, 50, 9_999, 10_000, 50_000])
def test_held_out_images_are_a_tenth_and_at_most_a_thousand(n):
    train, val = held_out(n, 'train'), held_out(n, 'val')
    assert len(val) == min(1000, n//10) and torch.cat([train, val]).sort().values.equal(torch.arange(n))
    copies = torch.rand(n, generator=seeded('copies')) < .3
    train, val = held_out(n, 'train', copies), held_out(n, 'val', copies)
    assert torch.cat([train, val]).sort().values.equal(torch.arange(n)[~copies])
    assert len(val) == min(1000, int((~copies).sum())//10)


def test_several_tasks_and_the_tasks_of_a_configuration(tmp_path):
    names = ['digits', 'letters']
    for task, name in zip(load_tasks(names, 20, 3, 'val'), names, strict=True):
        assert task.digest() == load_task(name, 20, 3, 'val').digest() and len(task) == 20
    for site in 'ab':
        for c in ('cat', 'dog'):
            place = tmp_path/site/'pets'/c
            place.mkdir(parents=True)
            for i in range(3):
                photo(i).save(place/f'{i}.png')
    names = [str(tmp_path/site/'pets') for site in 'ab']
    assert [task.name for task in load_tasks(['digits', *names], 4)] == ['digits', 'a-pets', 'b-pets']
    assert [task.name for task in load_tasks(names[1:])] == ['pets']
    with pytest.raises(AgftError, match='several tasks are called'):
        load_tasks([names[0], names[0] + '/../pets'])
    with pytest.raises(AgftError, match="names are 'digits'; allowed: a list of texts"):
        load_tasks('digits')
    data = DataConfig(prompts=('a {}', 'the {}'), size=16)
    task = task_of(data, str(tmp_path/'a/pets'), 4)
    assert task.templates == ('a {}', 'the {}') and task.resolution == 16 and len(task) == 4
    assert task.digest() == load_task(str(tmp_path/'a/pets'), 4, prompts=data.prompts, size=16).digest()
    for prompts, words in (('a {}', 'unknown prompts .* a list of sentences'), (5, 'prompts are 5; allowed')):
        with pytest.raises(AgftError, match=words):
            load_task(str(tmp_path/'a/pets'), prompts=prompts)  # pyright: ignore[reportArgumentType]


def test_labelled_tasks_have_the_digest_that_results_recorded():
    "The hash of [class names, templates, resolution, labels, hash of the pixels] as JSON."
    task = Task('noise', PIXELS, torch.tensor(LABELS), NAMES, ('a {}',))
    pixels = hashlib.sha256(PIXELS.numpy().tobytes()).hexdigest()
    question = json.dumps([NAMES, ('a {}',), 16, LABELS, pixels])
    assert task.digest() == hashlib.sha256(question.encode()).hexdigest()[:12]


def task_with(images=PIXELS, labels=LABELS, classes=NAMES, templates=('a {}',)):
    return Task.from_tensors('noise', images, labels, classes, templates)

@pytest.mark.parametrize('names', [
    ('café', 'cafe\u0301', 'tea'), ('a & b', 'a &amp; b', 'c'), ('red fox', 'red\u00a0 fox', 'dog'),
    ('cat', 'c\u200bat', 'dog'), ('cat', ' CAT\t', 'dog'), ('é', '&eacute;', 'e'),
    ('a & b', 'a &amp;amp; b', 'c'), ('Å', 'A\u030a', 'a')])
def test_names_that_the_tokenizer_cannot_tell_apart_are_refused(names):
    with pytest.raises(AgftError, match='stands twice, at 0 .* and 1 .*unicode form'):
        task_with(classes=names)


def test_names_that_differ_are_kept_as_they_are():
    names = ('Maße', 'Masse', 'cafe\u0301')
    assert task_with(classes=names).classes == names


@pytest.mark.parametrize('change, words', [
    (dict(classes='cat'), r"class names are 'cat'; allowed: a list of texts, as in \['cat'\]"),
    (dict(templates='a photo of a {}'), r"templates are 'a photo of a {}'.*as in \['a photo"),
    (dict(classes={'cat', 'dog', 'gnu'}), 'allowed: a list of texts'),
    (dict(classes=dict(cat=0, dog=1, gnu=2)), 'allowed: a list of texts'),
    (dict(classes=3), 'class names are 3; allowed: a list'),
    (dict(classes=(b'cat', b'dog', b'gnu')), "class name 0 is b'cat'"),
    (dict(classes=('cat', 'dog', '&nbsp;')), "class name 2 is '&nbsp;'"),
    (dict(classes=('cat', 'dog', '\udce9')), 'class name 2 .*UTF-8'),
    (dict(templates=['a {}', 3]), 'template 3'),
    (dict(labels=[1, 2, 3]*4), r'range over \[1, 3\]; allowed: 0 to 2.*subtract 1'),
    (dict(labels=[-1, 0, 2]*4), r'range over \[-1, 2\]; .*without a label'),
    (dict(labels=[0., 1., 2.]*4), 'torch.float64 .*whole numbers'),
    (dict(labels=[True]*12), 'torch.bool'),
    (dict(labels=['cat']*12), 'noise: labels are no numbers'),
    (dict(labels=[0, None]*6), 'noise: labels are no numbers'),
    (dict(labels=[[0], [1, 2]]*6), 'noise: labels are no numbers'),
    (dict(labels=np.eye(3, dtype=int)[LABELS]), r'shape \(12, 3\).*argmax\(1\)'),
    (dict(labels=LABELS[1:]), '12 images and 11 labels'),
    (dict(images=PIXELS.permute(0, 2, 3, 1).numpy()), 'the channels come second'),
    (dict(images=[PIXELS[0], PIXELS[1, :, :8]]), 'images are no array'),
    (dict(images=[[1, 2], [3]]), 'images are no array'),
    (dict(images='images.npy'), 'images are no array'),
    (dict(images=PIXELS.numpy().astype('>i4')), 'images are no array|dtype'),
    (dict(images=PIXELS.numpy()*1.), 'values in .*divide bytes by 255'),
    (dict(images=PIXELS[:0], labels=[]), 'no numbers|no images|whole numbers'),
])
def test_inputs_that_are_no_task_say_what_to_pass(change, words):
    with pytest.raises(AgftError, match=words) as e:
        task_with(**change)
    assert '\n' not in str(e.value)


def test_arrays_and_lists_make_the_task_that_tensors_make():
    expected, array = task_with(), PIXELS.numpy()
    frozen = array.copy()
    frozen.setflags(write=False)
    for images in (array, frozen, array[::-1][::-1], [*PIXELS], [*array], (array/255).astype(np.float32)):
        for labels in (LABELS, tuple(LABELS), np.array(LABELS, np.uint8), torch.tensor(LABELS)):
            made = Task.from_tensors('noise', images, labels, [*NAMES], ['a {}'])
            assert made.digest() == expected.digest() and pixels_of(made).equal(PIXELS)
    direct = Task('noise', array, LABELS, [*NAMES], ['a {}'])      # pyright: ignore[reportArgumentType]
    assert direct.digest() == expected.digest() and direct.classes == NAMES and direct.templates == ('a {}',)
    assert expected.choose([3, 1]).digest() == expected.choose(torch.tensor([3, 1])).digest()


@pytest.mark.parametrize('name', ['', ' ', '..', 'a/b', 'a\\b', 'a\nb', 'x'*201, 'é'*101, '\udce9', None, 3])
def test_task_names_that_no_file_can_have_are_refused(name):
    with pytest.raises(AgftError, match='task name'):
        Task.from_tensors(name, PIXELS, LABELS, NAMES)
    assert Task.from_tensors('été 🐶 (2)', PIXELS, LABELS, NAMES).name == 'été 🐶 (2)'


def test_every_part_of_a_task_changes_its_digest():
    other = PIXELS.clone()
    other[7, 1, 3, 3] ^= 1
    tasks = [task_with(), task_with(images=other), task_with(labels=LABELS[::-1]), task_with(labels=None),
             task_with(classes=NAMES[::-1]), task_with(templates=('the {}',)), task_with().subset(11),
             task_with(images=PIXELS[:, :, :8, :8]), task_with().subset(12, 1), task_with().subset(12, 2)]
    assert len({task.digest() for task in tasks}) == len(tasks)


INDICES = [0, -1, 5, np.int64(3), torch.tensor(1), slice(None, 0), slice(2, 9, 3), slice(-3, None), [0, 2],
           [], np.array([4, 1]), torch.tensor([[0, 1], [2, 3]]), torch.arange(12) > 8, np.arange(12) < 2,
           (0, 1), (slice(0, 2), 0, slice(2, 4)), ([3, 1], slice(None), 0), (2, ..., 0)]

@pytest.mark.parametrize('at', INDICES, ids=map(str, INDICES))
def test_images_on_the_disk_are_indexed_like_a_tensor(at):
    lazy = Task.from_dataset('photos', Photos(), size=16).images
    assert isinstance(lazy, Images)
    found, expected = lazy[at], PIXELS[at]
    assert found.shape == expected.shape and found.equal(expected) and found.dtype == torch.uint8


def test_images_on_the_disk_behave_like_a_tensor():
    lazy = Task.from_dataset('photos', Photos(), size=16).images
    assert isinstance(lazy, Images)
    assert torch.stack([*lazy]).equal(PIXELS) and (lazy/255).equal(PIXELS/255)
    assert len(lazy) == 12 and lazy.index_select(0, torch.tensor([2]))[0].equal(PIXELS[2])
    for at in (12, -13, [99], (12, 0)):
        with pytest.raises(IndexError):
            lazy[at]
    for at in (..., None):
        with pytest.raises(AgftError, match='allowed: numbers of images'):
            lazy[at, 0]
    with pytest.raises(AttributeError, match=r"no 'mean'; images\[:\] reads them all"):
        lazy.mean()
    assert pickle.loads(pickle.dumps(lazy)).digest() == lazy.digest() and not hasattr(lazy, 'cpu')
