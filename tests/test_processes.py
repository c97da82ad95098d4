"Several processes, or several parts of a batch, train as one process does."
import json
import os
import subprocess
import sys

import pytest
import torch

import agft.evaluation as evaluation
import agft.loop as loop
from agft.cli import main
from agft.config import load_preset, override
from agft.core import AgftError
from agft.loop import read_log
from agft.results import Results
from agft.train import finetune
from agft.weights import load_model

# gradients are clipped, as in the preset: an attack step is a sign, so rounding grows with the update
SMALL = {'train.images': 20, 'train.batch_size': 7, 'train.steps': 3, 'train.checkpoint_every': 2,
         'train.grad_clip': 1., 'train.warmup': 0.}
WORK = """
import json, sys
from agft.config import load_preset, override
from agft.train import finetune
name, out, changes = sys.argv[1:]
finetune(override(load_preset('tiny').finetune(name), **json.loads(changes)), out, 'auto')
"""


def together(count, name, out, **changes):
    "Train in processes that torchrun starts; output of all."
    script = out.parent/'work.py'
    script.write_text(WORK)
    launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={count}']
    words = [sys.executable, *launch, script, name, out, json.dumps(SMALL | changes)]
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.getcwd()}
    done = subprocess.run([*map(str, words)], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def alone(name, out, **changes):
    torch.manual_seed(0)
    config = override(load_preset('tiny').finetune(name), **{**SMALL, **changes})
    return dict(finetune(config, out, 'cpu').visual.named_parameters())


def largest_difference(a, b):
    return max((a[key] - b[key]).abs().max().item() for key in a)


def weights(out): return dict(load_model(out/'model.safetensors').visual.named_parameters())


METHODS = ['TeCoA', 'AGFT', 'PMG-AFT', 'TRADES-AGFT', 'FARE', 'Soft', 'PMG-AFT-mean', 'Clean']


def same_first_step(one, other):
    "The logs of two runs agree in their first step."
    first, second = read_log(one)[0], read_log(other)[0]
    for key in {*first} - {'seconds', 'zero_grad'}:
        assert second[key] == pytest.approx(first[key], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize('name', METHODS)
def test_a_batch_in_parts(tmp_path, name):
    "Gradients that are accumulated over ragged parts are those of the whole batch."
    whole = alone(name, tmp_path/'a')
    parts = alone(name, tmp_path/'b', **{'train.accumulate': 3})
    assert largest_difference(whole, parts) < 1e-5
    same_first_step(tmp_path/'a', tmp_path/'b')


QUICK, SLOW = ['PMG-AFT'], [name for name in METHODS if name != 'PMG-AFT']


@pytest.mark.parametrize('name', [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_two_processes_are_one(tmp_path, name):
    one, out = alone(name, tmp_path/'one'), tmp_path/'two'
    told = together(2, name, out)
    assert largest_difference(one, weights(out)) < 1e-5
    log = read_log(out)
    assert [line['step'] for line in log] == [0, 1, 2]
    assert len((out/'log.jsonl').read_text().splitlines()) == 3, 'more than one process wrote'
    same_first_step(tmp_path/'one', out)
    assert sorted(f.name for f in out.iterdir()) == ['.lock', 'log.jsonl', 'model.safetensors', 'run.json',
                                                     'state.pt']
    assert 'Traceback' not in told


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    whole = alone('AGFT', tmp_path/'whole')
    save = loop.save_tensors
    def stops(content, path):
        save(content, path)
        if content.get('step') == 2:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, 'save_tensors', stops)
        alone('AGFT', tmp_path/'cut')
    together(2, 'AGFT', tmp_path/'cut')
    assert largest_difference(whole, weights(tmp_path/'cut')) < 1e-5
    assert [line['step'] for line in read_log(tmp_path/'cut')] == [0, 1, 2]


def test_more_parts_than_images_are_refused(tmp_path):
    with pytest.raises(AgftError, match='train.batch_size is 7; allowed: 8 '):
        alone('AGFT', tmp_path, **{'train.accumulate': 8})


WORDS = ['--tasks', 'digits,texture', '--attacks', 'pgd20', '--eval.images', '10', '--eval.batch-size', '3']


def evaluated(out, count):
    "Evaluate in processes that torchrun starts."
    launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={count}', '-m', 'agft']
    work = ['eval', 'agft-tiny', *WORDS, '--out', out]
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.getcwd()}
    return subprocess.run([*map(str, [sys.executable, *launch, *work])], env=env, capture_output=True,
                          text=True, timeout=400)


def flags_of(out): return {f.relative_to(out): f.read_bytes() for f in (out/'flags').rglob('*.npz')}


def test_an_evaluation_is_shared_out_and_continued_by_another_number_of_processes(tmp_path):
    whole, cut = tmp_path/'whole', tmp_path/'cut'
    done = evaluated(whole, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('zero-shot mean') == 1, 'more than one process printed'
    files, batch = [], evaluation._evaluate_batch
    def dies(*args):
        files.append(1)
        if len(files) > 2:
            raise KeyboardInterrupt
        return batch(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, '_evaluate_batch', dies)
        assert main(['eval', 'agft-tiny', *WORDS, '--out', str(cut)]) == 130
    assert evaluated(cut, 2).returncode == 0
    assert main(['eval', 'agft-tiny', *WORDS, '--out', str(tmp_path/'one')]) == 0
    assert flags_of(whole) == flags_of(cut) == flags_of(tmp_path/'one') and len(flags_of(whole)) == 2
    rows = [Results.load(out/'results.json').accuracy.to_dict() for out in (whole, cut, tmp_path/'one')]
    assert rows[0] == rows[1] == rows[2]
    assert 'refused' not in done.stderr


def test_other_commands_refuse_several_processes(monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert main(['audit', 'agft-tiny']) == 2
    assert 'agft audit runs in one process' in capsys.readouterr().err
