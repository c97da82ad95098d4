"""Random presets, options and damaged files: each works or is refused in one line.

    AGFT_FUZZ=2000 pytest -m slow -s tests/test_fuzz.py

tries as many examples of presets, of options and of files; the quick run tries a few.
"""
import json
import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from agft.cli import _COMMANDS, _options, parse
from agft.config import as_dict, check_names, load_preset, presets
from agft.core import AgftError, read_json
from agft.data import load_task
from agft.evaluation import Flags, read_flags, write_flags
from agft.loop import load_tensors, read_log, save_tensors
from agft.results import Results, summarise
from agft.threats import threats_of
from agft.weights import load_model, read_notes, read_weights, save_model

EXAMPLES = int(os.environ.get('AGFT_FUZZ', 0))
MARK = [pytest.mark.slow] if EXAMPLES else []
fuzz = settings(max_examples=EXAMPLES or 60, deadline=timedelta(seconds=20), derandomize=True,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
pytestmark = MARK

KEYS = st.sampled_from(['lr', 'eps', 'steps', 'name', 'base', 'gamma', 'images', 'attacks', 'größe', ''])
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-10**30, 10**30), st.floats(), st.text(max_size=8),
    st.sampled_from(['4/255', '1/0', 'NaN', 'AGFT', 'pgd20', 'tiny', '../tiny', '\x00', 'a'*300, '\ud800']))
VALUES = st.recursive(
    LEAVES, max_leaves=6,
    extend=lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


def allowed_to_refuse(f):
    "Call `f`: it returns, or raises an `AgftError` of one line."
    try:
        f()
    except AgftError as e:
        assert '\n' not in str(e) and str(e)


def paths(data, prefix=()):
    "The path of each key."
    for key, value in data.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


@cache
def plain(name): return json.dumps(as_dict(load_preset(name)))


@fuzz
@given(name=st.sampled_from(presets()), at=st.integers(0, 10**6), value=VALUES, key=KEYS,
       how=st.sampled_from(['replace', 'remove', 'add']))
def test_presets(tmp_path_factory, name, at, value, key, how):
    "One value of a preset replaced, removed or added."
    data = json.loads(plain(name))
    every = [*paths(data)]
    *groups, last = every[at % len(every)]
    part = data
    for group in groups:
        part = part[group]
    if how == 'replace':
        part[last] = value
    elif how == 'remove':
        part.pop(last)
    else:
        part[key] = value
    file = tmp_path_factory.getbasetemp()/'fuzz.json'
    file.write_text(json.dumps(data))
    def read():
        recipe = load_preset(str(file))
        for method in recipe.methods:
            check_names(recipe.finetune(method))
        check_names(recipe)
        if recipe.eval.attacks:
            threats_of(recipe.eval)
    allowed_to_refuse(read)


OPTIONS = {command: [name for name, _ in _options(cls)] for command, cls in _COMMANDS.items()}
WORDS = st.one_of(
    st.text(max_size=6), st.integers().map(str), st.floats().map(str),
    st.sampled_from(['1/255', '-1', 'None', 'True', 'AGFT', '{}', '[1]', 'a,b', ',', '--', '=', '']))


@settings(fuzz, max_examples=EXAMPLES or 20)
@given(command=st.sampled_from([*_COMMANDS]),
       words=st.lists(st.tuples(st.integers(0, 10**6), WORDS), max_size=3))
def test_options(command, words):
    "Random values of random options."
    options = OPTIONS[command]
    typed = [text for at, value in words for text in (options[at % len(options)], value)]
    allowed_to_refuse(lambda: parse(command, typed))


def write_image(path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    path.mkdir(parents=True)
    for i in range(2):
        Image.fromarray(pixels + i).save(path/f'{i}{suffix}')


def read_images(folder):
    task = load_task(str(folder), size=16)
    return task.images[:]


def image_folder(root, suffix):
    write_image(root/'cat', suffix)
    write_image(root/'dog', suffix)
    return root/'cat'/f'0{suffix}', partial(read_images, root)


def flags_file(root):
    some = np.zeros(4, bool)
    flags = Flags(some, some, some, np.zeros(4), np.arange(4), np.array(.25))
    write_flags(root/'a.npz', flags, {'seed': 0})
    return root/'a.npz', partial(read_flags, root/'a.npz', {'seed': 0})


def results_file(root):
    some = np.ones(4, bool)
    flags = Flags(some, some, ~some, np.zeros(4), np.arange(4), np.array(.25))
    records = summarise('AGFT', [{'digits': flags}], 'pgd20', 'Linf', 4/255, None)
    Results.from_records(records).save(root/'r.json')
    return root/'r.json', partial(Results.load, root/'r.json')


def tensors_file(root):
    save_tensors(dict(step=1, weights=torch.arange(30.)), root/'state.pt')
    return root/'state.pt', partial(load_tensors, root/'state.pt')


def checkpoint(root):
    file = root/'model.safetensors'
    save_model(load_model('agft-tiny'), file, torch.float16, lr=.1)
    def read():
        read_notes(file)
        read_weights(file)
    return file, read


def torch_file(root):
    torch.save({'a.weight': torch.arange(20.)}, root/'w.pt')
    return root/'w.pt', partial(read_weights, root/'w.pt')


def log_file(root):
    (root/'log.jsonl').write_text(''.join(f'{{"step": {i}, "loss": 1.5}}\n' for i in range(9)))
    return root/'log.jsonl', partial(read_log, root)


def json_file(root):
    (root/'run.json').write_text(plain('tiny'))
    return root/'run.json', partial(read_json, root/'run.json')


def preset_file(root):
    (root/'own.json').write_text(plain('tiny'))
    return root/'own.json', partial(load_preset, str(root/'own.json'))


KINDS:dict[str, Callable] = dict(
    flags=flags_file, results=results_file, state=tensors_file, checkpoint=checkpoint, torch=torch_file,
    log=log_file, json=json_file, preset=preset_file)
for kind in ('.png', '.jpg', '.gif', '.tif', '.webp', '.bmp', '.pgm'):
    KINDS[kind] = partial(image_folder, suffix=kind)


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
    "Of each kind: the file, what it holds, and what reads it."
    found = {}
    for kind, make in KINDS.items():
        root = tmp_path_factory.mktemp('kind')
        file, read = make(root)
        found[kind] = file, file.read_bytes(), read
        read()
    return found


EDITS = st.lists(st.tuples(st.floats(0, .999), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4)


@fuzz
@given(kind=st.sampled_from([*KINDS]), edits=EDITS, cut=st.none() | st.floats(0, 1), twice=st.booleans())
def test_damaged_files(originals, kind, edits, cut, twice):
    "Bytes overwritten, the end cut off, the content doubled."
    file, content, read = originals[kind]
    damaged = bytearray(content)
    for place, new in edits:
        at = int(place*len(damaged))
        damaged[at:at + len(new)] = new
    damaged = damaged if cut is None else damaged[:int(cut*len(damaged))]
    file.write_bytes(damaged*2 if twice else damaged)
    try:
        allowed_to_refuse(read)
    finally:
        file.write_bytes(content)


def test_what_was_tried(capsys):
    each = f'{fuzz.max_examples} presets, options and files each'
    with capsys.disabled():
        print(f'\nfuzz: {each}, {len(KINDS)} kinds of files')
