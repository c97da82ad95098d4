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
    with pytest.raises(AgftError, match='a/pets and .*b/pets are both called pets'):
        load_tasks([str(tmp_path/site/'pets') for site in 'ab'])
    with pytest.raises(AgftError, match="names are 'digits'; allowed: a list of texts"):
        load_tasks('digits')
    data = DataConfig(prompts=('a {}', 'the {}'), size=16)
    task = task_of(data, str(tmp_path/'a/pets'), 4)
    assert task.templates == ('a {}', 'the {}') and task.resolution == 16 and len(task) == 4
    assert task.digest() == load_task(str(tmp_path/'a/pets'), 4, prompts=data.prompts, size=16).digest()
    with pytest.raises(AgftError, match='unknown prompts .* a list of sentences'):
        load_task(str(tmp_path/'a/pets'), prompts='a {}')


def test_labelled_tasks_have_the_digest_that_results_recorded():
    "The hash of [class names, templates, resolution, labels] as JSON."
    task = Task('noise', PIXELS, torch.tensor(LABELS), NAMES, ('a {}',))
    question = json.dumps([NAMES, ('a {}',), 16, LABELS])
    assert task.digest() == hashlib.sha256(question.encode()).hexdigest()[:12]
