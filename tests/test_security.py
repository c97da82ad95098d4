"Files of weights that would run code: none of it is run, wherever the file is read."
import io
import json
import os
import pickle
import pickletools
import warnings
import zipfile
from typing import Any

import pytest
import torch
from torch import nn

from agft.core import AgftError
from agft.model import fingerprint
from agft.plots import show_attack
from agft.weights import load_model, load_visual, load_weights, new_model, read_weights

SMALL = dict(embed_dim=32, vision_cfg=dict(image_size=32, patch_size=8, width=64, layers=1),
             text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=1, layers=1))


@pytest.fixture(autouse=True)
def configs(architectures):
    "A small architecture from a JSON file of the user's."
    architectures({'agft-test': SMALL})


@pytest.fixture(autouse=True)
def never_called(monkeypatch):
    "torch.jit.load is only for the tests that compare with it."
    def refuse(*args, **settings): raise AssertionError('torch.jit.load was called')
    monkeypatch.setattr('torch.jit.load', refuse)


class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def bombs(path):
    "Programs that make the folder `path` when they are unpickled, as bytes."
    command = f'mkdir {path}'.encode()
    return {
        'reduce': pickle.dumps(Bomb(path)),
        'inside of a dictionary': pickle.dumps(dict(state_dict=Bomb(path))),
        'global': b"cos\nsystem\n(S'" + command + b"'\ntR.",
        'instance': b"(S'" + command + b"'\nios\nsystem\n.",
        'builtin': b"c__builtin__\neval\n(S'__import__(\"os\").mkdir(\"" + str(path).encode() + b"\")'\ntR.",
        'torch': b"ctorch.serialization\nload\n(S'x.pt'\ntR."}


def archive(path, data, code='', constants=b'\x80\x02).'):
    "A TorchScript archive with that pickle."
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('m/data.pkl', data)
        file.writestr('m/constants.pkl', constants)
        file.writestr('m/code/__torch__.py', code)
        file.writestr('m/version', '3')


def readers(file):
    "Every function that reads a file of weights."
    good = file.with_name('good.pt')
    if not good.exists():
        torch.save(new_model('agft-test').model.state_dict(), good)
    return {
        'read_weights': lambda: read_weights(file),
        'load_model': lambda: load_model('agft-test', file),
        'NAME@FILE': lambda: load_model(f'agft-test@{file}'),
        'NAME@FILE@FILE': lambda: load_model(f'agft-test@{good}@{file}'),
        'load_visual': lambda: load_visual(new_model('agft-test'), file),
        'load_weights': lambda: load_weights(new_model('agft-test'), file)}


@pytest.mark.parametrize('kind', bombs(''))
@pytest.mark.parametrize('layout', ['plain', 'torch.save', 'archive', 'constants'])
def test_a_pickle_that_runs_code_is_refused_by_every_reader(tmp_path, kind, layout):
    file, program = tmp_path/'m.pt', bombs(tmp_path/'ran')[kind]
    if layout == 'plain':
        file.write_bytes(program)
    elif layout == 'torch.save':
        with zipfile.ZipFile(file, 'w') as target:
            target.writestr('archive/data.pkl', program)
            target.writestr('archive/version', '3')
    elif layout == 'archive':
        archive(file, program)
    else:
        archive(file, b'\x80\x02}.', constants=program)
    for name, read in readers(file).items():
        with pytest.raises(AgftError, match='m.pt') as e:
            read()
        assert '\n' not in str(e.value), name
        assert not (tmp_path/'ran').exists(), name


@pytest.mark.parametrize('name', ['open_clip_pytorch_model.bin', 'model.pth'])
def test_a_folder_with_a_pickle_that_runs_code_is_refused(tmp_path, name):
    (tmp_path/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=SMALL, preprocess_cfg={})))
    torch.save(dict(state_dict=Bomb(tmp_path/'ran')), tmp_path/name)
    with pytest.raises(AgftError, match='never run'):
        load_model(f'local-dir:{tmp_path}')
    archive(tmp_path/name, bombs(tmp_path/'ran')['reduce'])
    with pytest.raises(AgftError):
        load_model(f'local-dir:{tmp_path}')
    assert not (tmp_path/'ran').exists()


class Overwrites(nn.Module):
    "A scripted module that writes into a file while torch.jit.load loads it."
    def __init__(self, path:str):
        super().__init__()
        self.path, self.written = path, torch.zeros(1)
    def forward(self, x): return x
    @torch.jit.export
    def __getstate__(self): return self.path
    @torch.jit.export
    def __setstate__(self, path:str):
        self.path, self.training = path, False
        self.written = torch.from_file(path, shared=True, size=4, dtype=torch.uint8).fill_(0)


def scripted(module, file):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.script(module).save(str(file))


def test_an_archive_that_overwrites_a_file_does_not(tmp_path, monkeypatch):
    victim, file = tmp_path/'thesis.txt', tmp_path/'m.pt'
    victim.write_text('six years of work')
    scripted(Overwrites(str(victim)), file)
    for read in readers(file).values():
        with pytest.raises(AgftError, match='m.pt'):
            read()
        assert victim.read_text() == 'six years of work'
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.load(file)  # it is the attack that it claims to be
    assert victim.read_text() != 'six years of work'


class Part(nn.Module):
    "Everything that modules of an archive may have beside tensors."
    def __init__(self):
        super().__init__()
        self.names, self.sizes, self.shape = ['a', 'b'], [1, 2], (3, 4.5)
        self.table, self.off = {'a': 1}, None
        self.mask = torch.ones(2, 2)  # neither a parameter nor a buffer
        self.weight = nn.Parameter(torch.randn(4, 6).T)  # not contiguous
        self.register_buffer('steps', torch.tensor([2**40]))
        self.register_buffer('flags', torch.tensor([True, False]))
    def forward(self, x:torch.Tensor)->torch.Tensor:
        return x + self.mask.sum() + self.weight.sum() + len(self.names) + self.sizes[0]


class Whole(nn.Module):
    "Modules under names with digits, tensors in several precisions, two views of one storage."
    def __init__(self):
        super().__init__()
        self.part, self.blocks = Part(), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Part())
        self.fp16, self.bf16 = nn.Linear(2, 2).half(), nn.Linear(2, 2).bfloat16()
        both = torch.arange(10.)
        self.register_buffer('first', both[:4])
        self.register_buffer('last', both[4:])
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
    def forward(self, x:torch.Tensor)->torch.Tensor: return self.part(self.blocks[0](x))


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.logit_scale = nn.Linear(3, 3), nn.Parameter(torch.tensor(4.6))
    def forward(self, x): return self.logit_scale*self.linear(x)


@pytest.mark.parametrize('how', ['script', 'trace'])
def test_an_archive_has_the_tensors_that_torch_jit_load_returns(tmp_path, monkeypatch, how):
    torch.manual_seed(0)
    module, file = (Whole() if how == 'script' else Linear()).eval(), tmp_path/'m.pt'
    if how == 'script':
        scripted(module, file)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            traced:Any = torch.jit.trace(module, torch.ones(2, 3))
            traced.save(str(file))
    ours = read_weights(file)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs = torch.jit.load(file).state_dict()
    assert ours.keys() == theirs.keys() and len(theirs) == len(module.state_dict())
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key


def pickled(*parts:bytes)->bytes: return b'\x80\x02' + b''.join(parts) + b'.'


MODULE = b'c__torch__\nM\n)\x81'
WEIGHT = b'}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n'
CODE = 'class M(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = []\n'
STORAGE = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
ODD = {
    'a dictionary': pickled(b'}'),
    'a number as state': pickled(MODULE, b'K\x01b'),
    'attributes of a class': pickled(b'c__torch__\nM\n', b'N}X\x01\x00\x00\x00wK\x01s\x86b'),
    'a module in itself': pickled(MODULE, b'q\x00}X\x01\x00\x00\x00mh\x00sb'),
    'another name of torch': pickled(b'ctorch\nhub\n'),
    'a storage that is missing': pickled(MODULE, WEIGHT, STORAGE, b'K\x00K\x04\x85K\x01\x85tRsb'),
    'cut off': b'\x80\x02}q',
    'nothing': b''}


@pytest.mark.parametrize('name', ODD)
def test_odd_archives_are_one_line(tmp_path, name):
    archive(tmp_path/'m.pt', ODD[name], CODE)
    if name not in ('cut off', 'nothing'):
        pickletools.dis(ODD[name], io.StringIO())  # it is a pickle
    with pytest.raises(AgftError, match='m.pt') as e:
        read_weights(tmp_path/'m.pt')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('shape, stride', [(b'M\xe8\x03\x85', b'K\x00\x85'), (b'K\x05\x85', b'K\x01\x85')])
def test_a_tensor_larger_than_its_storage_is_refused(tmp_path, shape, stride):
    "A stride of zero would make a large tensor of one number."
    data = pickled(MODULE, WEIGHT, STORAGE, b'K\x00', shape, stride, b'tRsb')
    archive(tmp_path/'m.pt', data, CODE)
    with zipfile.ZipFile(tmp_path/'m.pt', 'a') as file:
        file.writestr('m/data/0', torch.arange(4.).numpy().tobytes())
    with pytest.raises(AgftError, match='storage of 4 numbers'):
        read_weights(tmp_path/'m.pt')


def test_a_member_that_unpacks_to_much_more_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path/'m.pt', 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('m/data.pkl', bytes(2**26 + 1))
        file.writestr('m/constants.pkl', b'')
    assert (tmp_path/'m.pt').stat().st_size < 2**20
    with pytest.raises(AgftError, match='m/data.pkl has'):
        read_weights(tmp_path/'m.pt')


def test_a_damaged_archive_is_one_line(tmp_path):
    scripted(Whole(), tmp_path/'good.pt')
    content, before = (tmp_path/'good.pt').read_bytes(), read_weights(tmp_path/'good.pt')
    for i in range(0, len(content), max(1, len(content)//300)):
        (tmp_path/'m.pt').write_bytes(content[:i] + bytes([content[i] ^ 0xff]) + content[i + 1:])
        try:
            read_weights(tmp_path/'m.pt')
        except AgftError as e:
            assert 'm.pt' in str(e) and '\n' not in str(e)
    assert before


def test_a_reader_leaves_nothing_changed_behind(tmp_path):
    "Attributes that a pickle sets on the reader's functions are gone with the reader."
    scripted(Whole(), tmp_path/'good.pt')
    before = {k: v.clone() for k, v in read_weights(tmp_path/'good.pt').items()}
    attribute = b'N}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b'
    for name in (b'ctorch._utils\n_rebuild_tensor_v2\n', b'ccollections\nOrderedDict\n',
                 b'ctorch.jit._pickle\nrestore_type_tag\n', b'ctorch\nFloatStorage\n', b'c__torch__\nM\n'):
        archive(tmp_path/'m.pt', pickled(name, attribute))
        with pytest.raises(AgftError):
            read_weights(tmp_path/'m.pt')
    after:dict[str, Any] = read_weights(tmp_path/'good.pt')
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_archive_of_a_whole_model_is_read(tmp_path):
    "The names and numbers of a model survive the way through an archive."
    model = new_model('agft-test')
    root = nn.Module()
    for key, value in model.model.state_dict().items():
        at, (*parents, last) = root, key.split('.')
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.register_buffer(last, value)
    scripted(root, tmp_path/'m.pt')
    assert fingerprint(load_model('agft-test', tmp_path/'m.pt')) == fingerprint(model)


HTML = '<script>alert(1)</script><img src=x onerror=alert(2)>"\'&'


@pytest.mark.parametrize('name', ['$', '$x_', r'$\frac', '$a$ bill', r'\textbf{', HTML])
def test_names_are_text_in_figures(name):
    x = torch.rand(2, 3, 8, 8)
    assert show_attack(x, x, [name, name], [name, name]).png()
